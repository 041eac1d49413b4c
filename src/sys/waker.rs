//! Lets any thread of a process wake its event loop (eventfd(2)).
//!
//! Several wakes before the loop runs count as one. It fails only at its creation.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

#[derive(Debug)]
pub struct Waker {
    eventfd: EventFd,
    /// Set by the first wake. The loop clears it before it checks for work.
    pending: AtomicBool,
}

impl Waker {
    /// Creates a waker.
    ///
    /// # Errors
    /// If no descriptor is left.
    pub fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Waker {
            eventfd: EventFd::from_flags(flags)?,
            pending: AtomicBool::new(false),
        })
    }

    /// Makes the descriptor readable. Until the loop clears it, further calls do nothing.
    pub fn wake(&self) {
        if !self.pending.swap(true, Ordering::AcqRel) {
            // EAGAIN means that the counter is full, so the descriptor is readable. A failed write must
            // be repeated: the flag is set, so no later wake would write.
            while self.eventfd.write(1) == Err(Errno::EINTR) {}
        }
    }

    /// Clears the waker. Call it before checking for work.
    pub fn clear(&self) {
        let _ = self.eventfd.read();
        // This is a swap and not a store: it synchronises with a `wake` that found the flag set and wrote
        // nothing. So the check that follows sees the work of that `wake`.
        self.pending.swap(false, Ordering::AcqRel);
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}
