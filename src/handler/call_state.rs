//! Defines a call on its way to the threads that run it, and its result.
//!
//! The handler threads have one call queue (lane), and each pool has its own. So they do not wait for each
//! other. The thread or program that runs a call reports exactly once.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::Sender;

use super::CallState;
use crate::protocol::call_id::CallRunner;
use crate::protocol::rpc_error::RpcError;
use crate::sys::waker::Waker;

/// Identifies a call of this worker. Indexes are reused, serial numbers are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct CallKey {
    /// The index in the table of calls.
    pub index: usize,
    /// The serial number, counted from the start of the worker.
    pub serial: u64,
}

#[derive(Debug)]
pub struct HandlerCall {
    pub key: CallKey,
    pub method: usize,
    pub params: Box<str>,
    pub id: Option<Arc<str>>,
    /// The address of its client.
    pub peer: Option<SocketAddr>,
    /// The deadline as time since boot.
    pub deadline: Duration,
    /// The expected run time, if it is known.
    pub expected: Option<Duration>,
    /// Decides whether it may begin.
    pub state: Arc<CallState>,
}

/// The result of a call.
#[derive(Debug)]
pub struct Done {
    pub key: CallKey,
    /// The result as JSON, or the error; `None` if it was given up before it began.
    pub outcome: Option<Result<Vec<u8>, RpcError>>,
    /// The run time.
    pub took: Duration,
    pub runner: CallRunner,
    /// The `out` of the answer, if it differs from the method's.
    pub out: Option<Box<str>>,
}

/// Sends results to the event loop of the worker, and wakes it.
#[derive(Debug, Clone)]
pub struct Reports {
    sender: Sender<Done>,
    waker: Arc<Waker>,
}

impl Reports {
    /// Sends to the receiver of `sender`, which waits for `waker`.
    pub fn new(sender: Sender<Done>, waker: Arc<Waker>) -> Self {
        Reports { sender, waker }
    }

    /// Sends a result; false if there is no receiver any more.
    pub fn send(&self, done: Done) -> bool {
        let sent = self.leave(done);
        self.wake();
        sent
    }

    /// Sends a result without waking the loop; `wake` must follow.
    pub fn leave(&self, done: Done) -> bool {
        self.sender.send(done).is_ok()
    }

    /// Wakes the loop for results of `leave`.
    pub fn wake(&self) {
        self.waker.wake();
    }
}
