//! Computes when calls are due in an open loop. Pure.
//!
//! Times are in nanoseconds since the load began. The calls of all threads together are evenly spaced. With
//! n threads each has every n-th call.

use std::time::Duration;

const SECOND: u128 = 1_000_000_000;

/// The schedule of one thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Interval {
    /// The calls of all threads per second.
    pub(super) rate: u64,
    /// The number of threads.
    pub(super) every: u64,
    /// The number of this thread, from 0 on.
    pub(super) offset: u64,
}

impl Interval {
    /// Returns when call number `number` of this thread is due. Computed from the beginning each time, so
    /// that rounding errors do not add up.
    pub(super) fn due(self, number: u64) -> u64 {
        let place = u128::from(number) * u128::from(self.every) + u128::from(self.offset);
        u64::try_from(place * SECOND / u128::from(self.rate)).unwrap_or(u64::MAX)
    }

    /// Returns how many calls of this thread are due before `end`.
    pub(super) fn due_before(self, end: u64) -> u64 {
        let places = (u128::from(end) * u128::from(self.rate)).div_ceil(SECOND);
        let places = places.saturating_sub(u128::from(self.offset));
        u64::try_from(places.div_ceil(u128::from(self.every))).unwrap_or(u64::MAX)
    }
}

/// Converts a duration to the unit of the engine.
pub(super) fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calls_of_all_threads_are_evenly_spaced_and_never_drift() {
        let interval = |offset| Interval {
            rate: 3,
            every: 2,
            offset,
        };
        let due = [interval(0).due(0), interval(1).due(0), interval(0).due(1)];
        assert_eq!(due, [0, 333_333_333, 666_666_666]);
        assert_eq!(interval(1).due(1), 1_000_000_000);
        // After a day the calls have not drifted.
        assert_eq!(interval(0).due(86_400 * 3 / 2), 86_400 * 1_000_000_000);
        assert_eq!(interval(0).due(u64::MAX), u64::MAX);
    }

    #[test]
    fn the_number_of_calls_before_a_time_is_that_of_their_due_times() {
        for (rate, every, offset) in [(3, 2, 0), (3, 2, 1), (7, 3, 2), (1_000_000_007, 4, 3)] {
            let interval = Interval {
                rate,
                every,
                offset,
            };
            for end in [0, 1, 333_333_333, 333_333_334, 1_000_000_000, 1_000_000_001] {
                let count = interval.due_before(end);
                assert!(count == 0 || interval.due(count - 1) < end, "{rate} {end}");
                assert!(interval.due(count) >= end, "{rate} {end}");
            }
        }
        let fast = Interval {
            rate: u64::MAX,
            every: 1,
            offset: 0,
        };
        assert_eq!(fast.due_before(u64::MAX), u64::MAX);
    }
}
