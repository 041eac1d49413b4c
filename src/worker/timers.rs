//! Holds the deadlines of a worker, in milliseconds of CLOCK_MONOTONIC.
//!
//! The deadlines are in an ordered set. A deadline that is met in time is removed. A connection without a deadline
//! needs no memory here. Pure: the caller passes the time.

use std::collections::BTreeSet;
use std::time::Duration;

pub use crate::handler::call_state::CallKey;
use crate::sys::event::Token;

/// The purpose of a deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum TimerTarget {
    /// A frame that has begun must be complete.
    Read(Token),
    /// The client must have read some bytes.
    Write(Token),
    /// A connection without activity may be closed.
    Idle(Token),
    /// The peer of a closed connection must have closed it too.
    Linger(Token),
    /// A call must be answered.
    Call(CallKey),
    /// Accepting may be tried again.
    Listen,
    /// Sending a connection may be tried again.
    Give,
    /// A rebalance order has expired.
    Rebalance,
    /// A connection that never had a call may be old enough to make room for another one.
    Unused,
    /// The time of a refused connection may be over.
    Refused,
    /// A call may have become slow.
    Slow,
}

#[derive(Debug, Default)]
pub struct Timers {
    set: BTreeSet<(u64, TimerTarget)>,
}

impl Timers {
    /// Arms a deadline instead of the one in `armed` (0 means none), and stores it there.
    pub fn arm(&mut self, armed: &mut u64, at: u64, target: TimerTarget) {
        self.disarm(armed, target);
        *armed = at.max(1);
        self.set.insert((*armed, target));
    }

    /// Removes the deadline in `armed`, if there is one.
    pub fn disarm(&mut self, armed: &mut u64, target: TimerTarget) {
        if *armed != 0 {
            self.set.remove(&(*armed, target));
            *armed = 0;
        }
    }

    /// Returns the first deadline.
    pub fn next(&self) -> Option<u64> {
        self.set.first().map(|(at, _)| *at)
    }

    /// Removes one deadline that has passed. The variable of `arm` keeps the time until the caller sets it to 0.
    pub fn expired(&mut self, now: u64) -> Option<TimerTarget> {
        let &(at, target) = self.set.first()?;
        (at <= now).then(|| {
            self.set.pop_first();
            target
        })
    }
}

/// Converts a duration to milliseconds, capped at the largest value.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_expire_in_order_once_unless_removed() {
        let mut timers = Timers::default();
        let (mut first, mut second, mut third) = (0, 0, 0);
        let key = |index| TimerTarget::Call(CallKey { index, serial: 1 });
        timers.arm(&mut second, 20, key(2));
        timers.arm(&mut first, 10, key(1));
        timers.arm(&mut third, 5, key(3));
        timers.arm(&mut third, 30, key(3));
        assert_eq!(timers.next(), Some(10));
        assert_eq!(timers.expired(9), None);
        assert_eq!(timers.expired(25), Some(key(1)));
        timers.disarm(&mut second, key(2));
        assert_eq!(timers.expired(25), None);
        assert_eq!(timers.expired(30), Some(key(3)));
        assert_eq!(timers.next(), None);
    }
}
