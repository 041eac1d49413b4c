//! How soon a process may be started again after a death or a refused fork: a slot's worker, or a
//! pool's program.
//!
//! One [`Throttle`] per slot and generation, so a reload starts with a clear count. It is told of
//! deaths and forks and answers with a time; who waits for that time is not its business. It can't
//! fail. Beside it `limiter`: how often a repeated trouble may be logged.

pub mod jitter;
pub mod limiter;

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// Monotonic milliseconds; where zero lies is the caller's choice.
pub type Millis = u64;

/// What the configuration says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ThrottleLimits {
    /// How many young deaths are followed by a start at once.
    pub burst: u32,
    /// The longest wait; 0 is no throttle.
    pub max_delay: Millis,
}

/// A death this long after ready is no young one any more, and so much health clears the count.
pub const HEALTHY_AFTER: Millis = 60_000;
/// The first wait after the burst; doubles from there.
const FIRST_DELAY: Millis = 100;
/// The longest wait after a refused fork: full strength is back within 2 s of the limit's lifting.
const LONGEST_AFTER_REFUSAL: Millis = 1_000;
/// So many forks of a throttled slot are allowed in one [`WINDOW`].
const FORKS_PER_WINDOW: usize = 12;
/// The minute of "at most 12 forks a minute and slot".
const WINDOW: Millis = 60_000;

/// A slot's record of trouble.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Throttle {
    /// Young deaths in a row.
    young: u32,
    /// Refused forks in a row.
    refused: u32,
    /// The times of the last throttled forks, at most [`FORKS_PER_WINDOW`].
    forks: VecDeque<Millis>,
    /// Whether the next fork is a throttled one.
    #[serde(rename = "late")]
    is_delayed: bool,
}

impl Throttle {
    /// A worker of the slot died after `health` of being ready (`None`: it never was). Answers when
    /// its successor may be forked: `now` is at once.
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

    /// A fork was refused. Answers when to try again: never at once, so that a refusal is no loop.
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

    /// A worker leaves after `health` of being ready: enough of it clears the count.
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

/// [`FIRST_DELAY`], doubled so many times.
fn doubled(times: u32) -> Millis {
    FIRST_DELAY << times.min(32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(burst: u32, max_delay: Millis) -> ThrottleLimits {
        ThrottleLimits { burst, max_delay }
    }

    /// The waits of a worker that dies as soon as it is forked.
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
    fn no_minute_has_more_than_twelve_throttled_forks() {
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
    fn a_minute_of_health_clears_the_count_and_less_does_not() {
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
