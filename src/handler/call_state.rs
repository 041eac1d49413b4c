//! A call on its way to the threads that run it, and what comes back.
//!
//! The worker's loop hands out jobs, by lanes: the handler threads are one, each pool of programs
//! another, so that neither ever waits for the other. Whoever runs a job reports exactly once.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::Sender;

use super::CallState;
use crate::protocol::rpc_error::RpcError;
use crate::sys::waker::Waker;

/// Names a call of this worker, for good: places are reused, serials are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct CallKey {
    /// Its place in the table of calls.
    pub index: usize,
    /// Its number, counted from the worker's start.
    pub serial: u64,
}

#[derive(Debug)]
pub struct HandlerCall {
    pub key: CallKey,
    pub method: usize,
    pub params: Box<str>,
    pub id: Option<Arc<str>>,
    /// Where its connection comes from.
    pub peer: Option<SocketAddr>,
    /// When the caller stops waiting, as time since boot.
    pub deadline: Duration,
    /// How long it is expected to run, where that is known.
    pub expected: Option<Duration>,
    /// Whether it may begin.
    pub state: Arc<CallState>,
}

/// What became of a job.
#[derive(Debug)]
pub struct Done {
    pub key: CallKey,
    /// Its result as JSON, or its error; `None` when it was given up before it began.
    pub outcome: Option<Result<Vec<u8>, RpcError>>,
    /// How long it ran.
    pub took: Duration,
    /// What stands in `out` in place of the name that the method's answers have, if anything.
    pub out: Option<Box<str>>,
}

/// Where threads report to: the worker's loop, which is woken.
#[derive(Debug, Clone)]
pub struct Reports {
    sender: Sender<Done>,
    waker: Arc<Waker>,
}

impl Reports {
    /// To whoever holds the other end of `sender` and waits for `waker`.
    pub fn new(sender: Sender<Done>, waker: Arc<Waker>) -> Self {
        Reports { sender, waker }
    }

    /// Reports one job; false when nobody listens any more.
    pub fn send(&self, done: Done) -> bool {
        let sent = self.leave(done);
        self.wake();
        sent
    }

    /// Reports one job without waking the loop for it, which `wake` does then.
    pub fn leave(&self, done: Done) -> bool {
        self.sender.send(done).is_ok()
    }

    /// Wakes the loop for what was left.
    pub fn wake(&self) {
        self.waker.wake();
    }
}
