//! Times the calls that run on the event loop. Nothing can look at them while they run, so they are recorded at
//! their end.
//!
//! A clock for each inline call would cost more than a short one takes. So the cycles of the processor are
//! counted, and a clock is read only for what seems slow.

use crate::sys::timer::{CycleBase, cycles};

/// What is needed to time inline calls.
#[derive(Debug, Clone, Copy)]
pub struct InlineTimer {
    base: CycleBase,
    /// Calls of fewer cycles are not slow; 0: nothing is slow.
    limit: u64,
}

/// When an inline call began.
#[derive(Debug, Clone, Copy)]
pub struct InlineBegin {
    /// 0: it is not timed.
    cycles: u64,
    /// The number of errors before it.
    pub errors: u64,
}

impl InlineTimer {
    pub(super) fn new() -> Self {
        InlineTimer {
            base: CycleBase::now(),
            limit: 0,
        }
    }

    /// Sets the lowest threshold.
    pub(super) fn set(&mut self, lowest_ns: Option<u64>) {
        // Nearly every x86_64 processor counts at least one cycle per nanosecond. So a call of fewer cycles than
        // nanoseconds in the threshold is not slow. Elsewhere `cycles` is a coarse clock: its error is up to one tick.
        self.limit = lowest_ns.unwrap_or(0);
    }

    /// Call it before an inline call. `errors` is the number of errors so far.
    #[inline]
    pub fn begin(&self, errors: u64) -> InlineBegin {
        let cycles = if self.limit == 0 { 0 } else { cycles() };
        InlineBegin { cycles, errors }
    }

    /// Returns whether a call may have passed the lowest threshold.
    #[inline]
    pub(super) fn seems_slow(&self, begin: InlineBegin) -> bool {
        begin.cycles != 0 && cycles().wrapping_sub(begin.cycles) >= self.limit
    }

    /// Returns how long a call has run, in nanoseconds.
    pub(super) fn ns_since(&self, begin: InlineBegin) -> u64 {
        self.base.ns_since(begin.cycles)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_long_call_seems_slow_and_none_without_a_threshold() {
        let mut timer = InlineTimer::new();
        let begin = timer.begin(3);
        assert!(!timer.seems_slow(begin));
        timer.set(Some(50_000_000_000));
        assert!(!timer.seems_slow(timer.begin(3)));
        timer.set(Some(1_000_000));
        let begin = timer.begin(3);
        while timer.ns_since(begin) < 2_000_000 {
            std::hint::spin_loop();
        }
        assert!(timer.seems_slow(begin) && begin.errors == 3);
    }
}
