//! What a worker has of the calls for one executor.

use std::sync::Arc;

use super::call_table::ScheduledCall;
use super::fair_queue::Waiting;
use super::run_queue::RunQueue;
use super::shares::Shares;
use super::threads::HandlerCall;

/// Bytes of params that may wait or run in a worker, of all its connections together; each lane has
/// an equal part of that.
pub const MOST_BYTES: usize = 64 * 1024 * 1024;

/// The calls for one executor: the handler threads, or a pool.
#[derive(Debug)]
pub struct Lane {
    pub queue: Arc<RunQueue>,
    /// Calls that go to `queue` together.
    pub batch: Vec<(Waiting, HandlerCall)>,
    /// Calls that are to be answered.
    pub unanswered: usize,
    /// Of those, the ones that other processes run.
    pub sent: usize,
    /// Calls in `queue`, or with the executor of this process, which has not reported them.
    pub local: usize,
    /// Of those, the ones that run and whose callers do not wait any more.
    pub lost: usize,
    /// Calls that made room for others and are not removed yet.
    pub evicted: usize,
    /// Bytes of params and ids, of all calls.
    pub bytes: usize,
    /// Who has the unanswered calls, and their bytes.
    pub shares: (Shares, Shares),
}

impl Lane {
    pub fn new(queue: Arc<RunQueue>) -> Self {
        Lane {
            queue,
            batch: Vec::new(),
            unanswered: 0,
            sent: 0,
            local: 0,
            lost: 0,
            evicted: 0,
            bytes: 0,
            shares: Default::default(),
        }
    }

    /// Who has the unanswered calls, or their bytes.
    pub fn shares(&self, is_by_count: bool) -> &Shares {
        if is_by_count {
            &self.shares.0
        } else {
            &self.shares.1
        }
    }

    /// A call is not waited for any more.
    pub fn forget(&mut self, call: &ScheduledCall) {
        self.unanswered -= 1;
        if call.is_own() && !call.is_evicted {
            let owner = (call.source, call.token);
            self.shares.0.remove(owner, 1);
            self.shares.1.remove(owner, call.size);
        }
    }
}
