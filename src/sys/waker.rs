//! A waker: any thread of a process wakes its event loop (eventfd(2)).
//!
//! Wakes that come before the loop has looked are one. Fails only when it is made.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

/// Wakes an event loop that watches it.
#[derive(Debug)]
pub struct Waker {
    eventfd: EventFd,
    /// Set by the first wake, cleared by the loop before it looks for what it was woken for.
    pending: AtomicBool,
}

impl Waker {
    /// A waker that nobody has used yet.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Waker {
            eventfd: EventFd::from_flags(flags)?,
            pending: AtomicBool::new(false),
        })
    }

    /// Makes the descriptor readable, once until the loop has cleared it.
    pub fn wake(&self) {
        if !self.pending.swap(true, Ordering::AcqRel) {
            // EAGAIN means that the counter is full: readable all the same. What is not written
            // and not tried again would be the last wake ever, for the flag is set.
            while self.eventfd.write(1) == Err(Errno::EINTR) {}
        }
    }

    /// Clears it; to be called before looking at what the wakes were for.
    pub fn clear(&self) {
        let _ = self.eventfd.read();
        // A swap, not a store: it synchronises with a `wake` that found the flag still set and
        // wrote nothing, so what that one announced is seen by the look that follows.
        self.pending.swap(false, Ordering::AcqRel);
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}
