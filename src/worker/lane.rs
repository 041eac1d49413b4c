//! Holds the calls that a worker has for one executor.

use std::sync::Arc;

use super::call_table::ScheduledCall;
use super::fair_queue::Waiting;
use super::run_queue::RunQueue;
use super::shares::{Shares, Source};
use super::threads::HandlerCall;
use crate::handler::registry::Registry;
use crate::sys::event::Token;

/// The bytes of params that may wait or run in a worker, for all its connections together. Each lane has
/// an equal part.
pub const MOST_BYTES: usize = 64 * 1024 * 1024;

/// The bytes of params of calls to the jobs process, for all connections of a worker together. They wait in the jobs
/// process for the next commit.
pub const MOST_JOB_BYTES: usize = 4 * 1024 * 1024;

/// The largest number of bytes of the params and the id of a call to the jobs process that only names a job.
pub const MOST_ID_PARAMS: usize = 1024;

/// The calls of one executor: the handler threads, a pool, or the jobs process.
#[derive(Debug)]
pub struct Lane {
    pub queue: Arc<RunQueue>,
    /// Calls that enter `queue` together.
    pub batch: Vec<(Waiting, HandlerCall)>,
    /// Calls that must be answered.
    pub unanswered: usize,
    /// Unanswered calls that run in other processes.
    pub sent: usize,
    /// Calls in `queue`, or with the executor of this process, which has not reported them.
    pub local: usize,
    /// Calls that still run although they were given up. Each occupies its thread or program.
    pub orphaned: usize,
    /// Calls that made room for others and are not removed yet.
    pub evicted: usize,
    /// The bytes of params and ids of all calls.
    pub bytes: usize,
    /// The shares of the connections in the unanswered calls.
    pub shares: CallShares,
}

/// The number of calls of each connection, and their bytes.
#[derive(Debug, Default)]
pub struct CallShares {
    pub calls: Shares,
    pub bytes: Shares,
}

impl CallShares {
    /// Counts one more call of a connection, with `size` bytes.
    pub fn add(&mut self, owner: (Source, Token), size: usize) {
        self.calls.add(owner, 1);
        self.bytes.add(owner, size);
    }

    /// Counts one call less of its connection.
    pub fn remove(&mut self, call: &ScheduledCall) {
        let owner = (call.source, call.token);
        self.calls.remove(owner, 1);
        self.bytes.remove(owner, call.size);
    }
}

impl Lane {
    /// Creates all lanes up to `last`. `threads` is the queue of the handler threads.
    pub fn all(threads: Arc<RunQueue>, registry: &Registry, last: usize) -> Vec<Self> {
        let queue = |lane| {
            // How long calls of the jobs process took says nothing about the next one.
            let timed = match registry.jobs_lane() == Some(lane) {
                true => 0,
                false => registry.methods().len(),
            };
            Arc::new(RunQueue::new(timed))
        };
        let others = (1..=last).map(queue);
        std::iter::once(threads)
            .chain(others)
            .map(Lane::new)
            .collect()
    }

    fn new(queue: Arc<RunQueue>) -> Self {
        Lane {
            queue,
            batch: Vec::new(),
            unanswered: 0,
            sent: 0,
            local: 0,
            orphaned: 0,
            evicted: 0,
            bytes: 0,
            shares: CallShares::default(),
        }
    }

    /// Stops counting a call that is not awaited any more.
    pub fn forget(&mut self, call: &ScheduledCall) {
        self.unanswered -= 1;
        if call.is_own() && !call.is_evicted {
            self.shares.remove(call);
        }
    }
}
