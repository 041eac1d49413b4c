//! Provides a timer as a descriptor, with a finer resolution than the milliseconds of epoll_wait(2)
//! (timerfd_create(2)).
//!
//! It fires once each time it is set. Setting it again cancels an expiration that was not read. Only its
//! creation fails, if no descriptor is left.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

#[derive(Debug)]
pub struct Timer(TimerFd);

impl Timer {
    /// Creates a timer that is not set.
    ///
    /// # Errors
    /// EMFILE, ENFILE, ENOMEM.
    pub fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        Ok(Timer(TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?))
    }

    /// Makes the descriptor readable after this time; at once for zero.
    ///
    /// # Errors
    /// None for a valid time.
    pub fn set(&self, after: Duration) -> io::Result<()> {
        // Zero would disarm the timer.
        let after = TimeSpec::from_duration(after.max(Duration::from_nanos(1)));
        let once = Expiration::OneShot(after);
        Ok(self.0.set(once, TimerSetTimeFlags::empty())?)
    }

    /// Disarms the timer and cancels an expiration that was not read.
    ///
    /// # Errors
    /// None.
    pub fn clear(&self) -> io::Result<()> {
        Ok(self.0.unset()?)
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
