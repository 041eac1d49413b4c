//! Forwards the startup log of a new worker to the master, so that a failed start or reload reports its
//! reason.
//!
//! Each line is a packet on a socket that the master made for this worker. The worker does not wait. If
//! there is no room or no master, the line is still in the log.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Mutex;

use log::{Level, Record};

use super::text::printable;
use crate::sys::lock::lock;
use crate::sys::socket;

/// The largest number of bytes of a line that are forwarded.
pub const LONGEST: usize = 600;

static FORWARD_TO: Mutex<Option<OwnedFd>> = Mutex::new(None);

/// Forwards warnings and errors of this process to `to` from now on.
pub fn start_forwarding(to: Option<OwnedFd>) {
    *lock(&FORWARD_TO) = to;
}

/// Stops forwarding.
pub fn stop_forwarding() {
    *lock(&FORWARD_TO) = None;
}

/// Returns the descriptor of the forwarding socket, for a list of descriptors to keep.
pub fn forwarding_fd() -> Option<RawFd> {
    lock(&FORWARD_TO).as_ref().map(AsRawFd::as_raw_fd)
}

pub(super) fn pass_on(record: &Record<'_>) {
    if record.level() > Level::Warn {
        return;
    }
    if let Some(to) = lock(&FORWARD_TO).as_ref() {
        let line = format!(
            "{} {}",
            record.level(),
            printable(&record.args().to_string())
        );
        let line = &line.as_bytes()[..line.len().min(LONGEST)];
        let _ = socket::send_packet(to, &[line], &[]);
    }
}
