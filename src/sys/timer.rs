//! Provides a timer as a descriptor, with a finer resolution than the milliseconds of epoll_wait(2)
//! (timerfd_create(2)).
//!
//! The timer fires once each time it is set. Setting it again cancels an expiration that was not read. Only its
//! creation can fail, if no descriptor is left.
//!
//! This file also reads the time stamp counter of the processor, which costs one instruction. The rate of the counter
//! is not known in advance: it follows from a comparison with a clock. So the counter is used for a first estimate
//! only. On processors without it, the coarse clock of the kernel is used.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::process::monotonic_ns;

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

/// Returns the time stamp counter. If this is no x86_64 processor, returns nanoseconds of the coarse clock.
#[inline]
pub fn cycles() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the instruction reads a register. Each x86_64 processor has it, and Linux lets programs use it.
    return unsafe { std::arch::x86_64::_rdtsc() };
    #[cfg(not(target_arch = "x86_64"))]
    return super::process::monotonic_coarse_ms() * 1_000_000;
}

/// One time, read from the counter and from CLOCK_MONOTONIC. A second such pair gives the rate of the counter.
#[derive(Debug, Clone, Copy)]
pub struct CycleBase {
    cycles: u64,
    ns: u64,
}

impl CycleBase {
    pub fn now() -> Self {
        CycleBase {
            cycles: cycles(),
            ns: monotonic_ns(),
        }
    }

    /// Returns how many nanoseconds ago the counter had the value `then`. The rate of the counter is
    /// measured from `self` until now.
    pub fn ns_since(self, then: u64) -> u64 {
        let now = CycleBase::now();
        let passed = u128::from(now.cycles.saturating_sub(self.cycles).max(1));
        let ns = u128::from(now.ns.saturating_sub(self.ns));
        let took = u128::from(now.cycles.saturating_sub(then)) * ns / passed;
        u64::try_from(took).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_of_the_counter_follows_from_the_clock() {
        let base = CycleBase::now();
        let (begin, begin_ns) = (cycles(), monotonic_ns());
        while monotonic_ns() < begin_ns + 20_000_000 {
            std::hint::spin_loop();
        }
        let took = base.ns_since(begin);
        let most = monotonic_ns() - begin_ns + 5_000_000;
        assert!((15_000_000..=most).contains(&took), "{took}");
    }
}
