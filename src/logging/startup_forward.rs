//! What a new worker logs before it is ready, told to the master besides: whoever waits for a
//! start or a reload is told why it failed, without a look into the log.
//!
//! Each line is a packet on a socket that the master made for this one worker. Nothing waits for
//! it: a line that finds no room, or no master, is in the log all the same.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use log::{Level, Record};

use super::text::printable;
use crate::sys::socket;

/// The most bytes of a line that are told.
pub const LONGEST: usize = 600;

static WITNESS: Mutex<Option<OwnedFd>> = Mutex::new(None);

/// From now on warnings and errors of this process are told there too.
pub fn start_forwarding(to: Option<OwnedFd>) {
    *lock() = to;
}

/// Tells nothing more.
pub fn stop_forwarding() {
    *lock() = None;
}

/// The descriptor that lines are told to, for a list of what to keep.
pub fn forwarding_fd() -> Option<RawFd> {
    lock().as_ref().map(AsRawFd::as_raw_fd)
}

pub(super) fn pass_on(record: &Record<'_>) {
    if record.level() > Level::Warn {
        return;
    }
    if let Some(to) = lock().as_ref() {
        let line = format!(
            "{} {}",
            record.level(),
            printable(&record.args().to_string())
        );
        let line = &line.as_bytes()[..line.len().min(LONGEST)];
        let _ = socket::send_packet(to, &[line], &[]);
    }
}

fn lock() -> MutexGuard<'static, Option<OwnedFd>> {
    WITNESS.lock().unwrap_or_else(PoisonError::into_inner)
}
