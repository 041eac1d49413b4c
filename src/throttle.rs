//! Decides how long to wait before a process is started again after a death or a refused fork. The
//! process is that of a slot, the observer, or a program of a pool.
//!
//! There is one [`Throttle`] per slot and generation, so a reload starts with a cleared count. It records
//! deaths and forks and returns a time; the caller does the waiting. It cannot fail. `limiter` limits how
//! often a repeated warning is logged.

pub mod jitter;
pub mod limiter;

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// Milliseconds of a monotonic clock. The caller chooses the zero point.
pub type Millis = u64;

/// The configured limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ThrottleLimits {
    /// This many early deaths are each followed by an immediate start.
    pub burst: u32,
    /// The longest delay; 0 disables the throttle.
    pub max_delay: Millis,
}

/// A death this long after ready is no early death, and it clears the count.
pub const HEALTHY_AFTER: Millis = 60_000;
/// The first delay after the burst. Each further death doubles it.
const FIRST_DELAY: Millis = 100;
/// The longest delay after a refused fork. So all workers run again within 2 s after the limit is lifted.
const LONGEST_AFTER_REFUSAL: Millis = 1_000;
/// The number of throttled forks allowed in one [`WINDOW`] per slot.
const FORKS_PER_WINDOW: usize = 12;
const WINDOW: Millis = 60_000;

/// The recent deaths and refused forks of a slot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Throttle {
    /// Consecutive early deaths.
    young: u32,
    /// Consecutive refused forks.
    refused: u32,
    /// The times of the last throttled forks, at most [`FORKS_PER_WINDOW`].
    forks: VecDeque<Millis>,
    /// Whether the next fork counts as throttled.
    #[serde(rename = "late")]
    is_delayed: bool,
}

impl Throttle {
    /// Records the death of a worker that had been ready for `health` (`None`: it was never ready).
    /// Returns when its successor may be forked; `now` means at once.
    pub fn death(
        &mut self,
        health: Option<Millis>,
        limits: &ThrottleLimits,
        now: Millis,
    ) -> Millis {
        self.record_ready_time(health);
        if health.is_none_or(|health| health < HEALTHY_AFTER) {
            self.young = self.young.saturating_add(1);
        }
        if self.young <= limits.burst || limits.max_delay == 0 {
            return now;
        }
        self.is_delayed = true;
        let doublings = self.young - limits.burst - 1;
        let due = now + doubled(doublings).min(limits.max_delay);
        match self.forks.front() {
            Some(first) if self.forks.len() == FORKS_PER_WINDOW => due.max(first + WINDOW),
            _ => due,
        }
    }

    /// Records a refused fork. Returns when to try again. That is always later than `now`, because an
    /// immediate retry could loop.
    pub fn record_refused_fork(&mut self, now: Millis) -> Millis {
        let delay = doubled(self.refused).min(LONGEST_AFTER_REFUSAL);
        self.refused = self.refused.saturating_add(1);
        now + delay
    }

    pub fn forked(&mut self, now: Millis) {
        self.refused = 0;
        if std::mem::take(&mut self.is_delayed) {
            if self.forks.len() == FORKS_PER_WINDOW {
                self.forks.pop_front();
            }
            self.forks.push_back(now);
        }
    }

    /// Records that a worker leaves after it had been ready for `health`. A long enough time clears the
    /// count.
    pub fn record_ready_time(&mut self, health: Option<Millis>) {
        if health.is_some_and(|health| health >= HEALTHY_AFTER) {
            *self = Throttle::default();
        }
    }

    pub fn young_deaths(&self) -> u32 {
        self.young
    }

    pub fn refused_forks(&self) -> u32 {
        self.refused
    }
}

/// Returns [`FIRST_DELAY`], doubled `times` times.
fn doubled(times: u32) -> Millis {
    FIRST_DELAY << times.min(32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(burst: u32, max_delay: Millis) -> ThrottleLimits {
        ThrottleLimits { burst, max_delay }
    }

    /// Returns the delays of a worker that dies right after each fork.
    fn waits(limits: &ThrottleLimits, deaths: usize) -> Vec<Millis> {
        let (mut throttle, mut now, mut waits) = (Throttle::default(), 0, Vec::new());
        for _ in 0..deaths {
            let due = throttle.death(None, limits, now);
            waits.push(due - now);
            now = due;
            throttle.forked(now);
        }
        waits
    }

    #[test]
    fn the_burst_is_free_then_the_delay_doubles_up_to_its_limit() {
        let expected = [
            0, 0, 0, 0, 0, 100, 200, 400, 800, 1600, 3200, 6400, 12_800, 25_600, 30_000, 30_000,
        ];
        assert_eq!(waits(&limits(5, 30_000), 16), expected);
        assert_eq!(waits(&limits(0, 150), 3), [100, 150, 150]);
    }

    #[test]
    fn at_most_twelve_throttled_forks_per_minute() {
        let waits = waits(&limits(2, 500), 60);
        let forks: Vec<Millis> = waits[2..]
            .iter()
            .scan(0, |now, wait| {
                *now += wait;
                Some(*now)
            })
            .collect();
        assert!(
            forks.windows(13).all(|w| w[12] - w[0] >= WINDOW),
            "{forks:?}"
        );
        assert!(forks.len() > 24 && forks[forks.len() - 1] < 6 * WINDOW);
    }

    #[test]
    fn a_ready_minute_clears_the_count_and_less_does_not() {
        let limits = limits(2, 30_000);
        let mut throttle = Throttle::default();
        for _ in 0..4 {
            throttle.death(None, &limits, 0);
        }
        assert_eq!(throttle.death(Some(59_999), &limits, 0), 400);
        assert_eq!(throttle.death(Some(60_000), &limits, 7), 7);
        assert_eq!(throttle.young_deaths(), 0);
    }

    #[test]
    fn a_max_delay_of_zero_is_no_throttle_but_a_refused_fork_still_waits() {
        let limits = limits(0, 0);
        assert!(waits(&limits, 10_000).iter().all(|wait| *wait == 0));
        let mut throttle = Throttle::default();
        let waits: Vec<_> = (0..6).map(|_| throttle.record_refused_fork(0)).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1000, 1000]);
        throttle.forked(0);
        assert_eq!(throttle.record_refused_fork(0), 100);
    }
}
