//! A timer as a descriptor, finer than the milliseconds that epoll_wait(2) counts
//! (timerfd_create(2)).
//!
//! It goes off once for each time it was set; setting it again takes back what it had to say. Fails
//! when it is made and there is no descriptor left.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

#[derive(Debug)]
pub struct Timer(TimerFd);

impl Timer {
    /// A timer that is not set.
    ///
    /// # Errors
    /// EMFILE, ENFILE, ENOMEM.
    pub fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        Ok(Timer(TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?))
    }

    /// Makes it readable after this time; at once for zero.
    ///
    /// # Errors
    /// None that a valid time has.
    pub fn set(&self, after: Duration) -> io::Result<()> {
        // Zero would take it back altogether.
        let after = TimeSpec::from_duration(after.max(Duration::from_nanos(1)));
        let once = Expiration::OneShot(after);
        Ok(self.0.set(once, TimerSetTimeFlags::empty())?)
    }

    /// Takes back that it went off, and the time it was set to.
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
