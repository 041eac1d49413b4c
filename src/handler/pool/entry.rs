//! A call on its way to a program of a pool, and what becomes of it.

use std::time::Duration;

use crate::handler::call_state::{Done, HandlerCall};
use crate::protocol::rpc_error::RpcError;
use crate::sys::process::monotonic;

/// A call for a program.
#[derive(Debug)]
pub(super) struct Entry {
    pub job: HandlerCall,
    /// A program has died already before it had read it.
    pub returned: bool,
    /// When it came here, as time since boot.
    pub put: Duration,
    /// When it was written, likewise.
    pub begun: Option<Duration>,
}

impl Entry {
    pub fn new(job: HandlerCall, returned: bool) -> Self {
        Entry {
            job,
            returned,
            put: monotonic(),
            begun: None,
        }
    }

    /// What became of it; `None`: it was given up before it began.
    pub fn done(self, outcome: Option<Result<Vec<u8>, RpcError>>, out: Option<Box<str>>) -> Done {
        let took = self.begun.map(|begun| monotonic().saturating_sub(begun));
        Done {
            key: self.job.key,
            outcome,
            took: took.unwrap_or_default(),
            out,
        }
    }
}
