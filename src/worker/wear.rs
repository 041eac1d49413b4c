//! What a worker notices of its own wear, and tells the master: that it has had calls enough.
//!
//! It goes on as before. The master starts a successor, and orders the drain when that is ready.

use super::event_loop::EventLoop;
use crate::link::ids::Pid;
use crate::link::jitter;
use crate::link::message::Report;

/// So many calls later the master is told once more, when it could not be.
const TELL_AGAIN: u64 = 100;

/// After how many calls this worker has had enough; 0 is never.
pub(super) fn enough(max_calls: u64) -> u64 {
    match max_calls {
        0 => u64::MAX,
        most => jitter::earlier(most, Pid::current()),
    }
}

impl EventLoop {
    /// To be asked after every turn: two comparisons, when there is nothing to tell.
    pub(super) fn feel_wear(&mut self) {
        if self.service.read >= self.worn_after {
            self.worn_after = match self.report(Report::Worn(self.service.read)) {
                Ok(()) => u64::MAX,
                Err(_) => self.service.read + TELL_AGAIN,
            };
        }
    }
}
