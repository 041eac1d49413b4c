//! Deadlines of a worker, in milliseconds of CLOCK_MONOTONIC.
//!
//! An ordered set, so that a deadline that is met in time is taken out again and leaves nothing
//! behind, and a connection that waits for nothing costs nothing. Pure: it is told what time it is.

use std::collections::BTreeSet;

pub use crate::handler::call_state::CallKey;
use crate::sys::event::Token;

/// What a deadline is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum TimerTarget {
    /// A started frame must be whole.
    Read(Token),
    /// The reader must have taken something.
    Write(Token),
    /// A connection on which nothing happens may be closed.
    Idle(Token),
    /// A closed connection's peer must have closed too.
    Linger(Token),
    /// A call must be answered.
    Call(CallKey),
    /// The listeners may be tried again.
    Listen,
    /// A connection may be given away again.
    Give,
    /// An order to spread connections is over.
    Spread,
    /// A silent connection may be old enough to make room for another one.
    Silent,
}

/// The deadlines of a worker.
#[derive(Debug, Default)]
pub struct Timers {
    set: BTreeSet<(u64, TimerTarget)>,
}

impl Timers {
    /// Arms a deadline in place of the one in `armed` (0: none), and keeps it there.
    pub fn arm(&mut self, armed: &mut u64, at: u64, target: TimerTarget) {
        self.disarm(armed, target);
        *armed = at.max(1);
        self.set.insert((*armed, target));
    }

    /// Takes back the deadline in `armed`, if there is one.
    pub fn disarm(&mut self, armed: &mut u64, target: TimerTarget) {
        if *armed != 0 {
            self.set.remove(&(*armed, target));
            *armed = 0;
        }
    }

    /// The first deadline.
    pub fn next(&self) -> Option<u64> {
        self.set.first().map(|(at, _)| *at)
    }

    /// Takes one deadline that has passed.
    pub fn expired(&mut self, now: u64) -> Option<TimerTarget> {
        let &(at, target) = self.set.first()?;
        (at <= now).then(|| {
            self.set.pop_first();
            target
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_come_in_order_once_and_not_when_taken_back() {
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
