//! Decides when a pool program is ready, must be recycled, or was idle for too long.
//!
//! Pure: it gets the time and the observed values. `throttle` decides how soon a dead program is started
//! again.

use std::time::Duration;

use crate::config::PoolConfig;
use crate::throttle::{Millis, ThrottleLimits};

/// The time in milliseconds after which a program without a ready message counts as ready, if it is
/// alive.
const ALIVE: Millis = 50;
/// The time between two checks of a program's memory, in milliseconds.
const LOOK: Millis = 1000;
/// This many checks in a row must find too much memory, because memory that is freed soon is no leak.
const HEAVY: u32 = 2;
/// Programs of a pool are recycled up to a tenth earlier than configured, so that they are not all
/// recycled at the same time.
const SPREAD: u64 = 10;

/// The configured limits of a program. For times and numbers, 0 means never.
#[derive(Debug, Clone)]
pub(super) struct ProgramLimits {
    pub handshake: bool,
    pub boot: Millis,
    pub throttle: ThrottleLimits,
    idle: Millis,
    pub max_calls: u64,
    max_memory: u64,
    max_lifetime: Millis,
}

impl ProgramLimits {
    /// Returns the limits of the program with this number.
    pub fn new(pool: &PoolConfig, number: usize) -> Self {
        let earlier = |limit| earlier(limit, number, pool.processes);
        ProgramLimits {
            handshake: pool.handshake,
            boot: millis(pool.boot_timeout),
            throttle: ThrottleLimits {
                burst: pool.respawn_burst,
                max_delay: millis(pool.respawn_max_delay),
            },
            idle: millis(pool.idle_timeout),
            max_calls: earlier(pool.max_calls),
            max_memory: pool.max_memory,
            max_lifetime: earlier(millis(pool.max_lifetime)),
        }
    }

    /// Returns when a program that was started at `since` counts as ready. `None` means that it reports
    /// it.
    pub fn ready_at(&self, since: Millis) -> Option<Millis> {
        (!self.handshake).then_some(since + ALIVE)
    }
}

/// The limit of the program with this number: up to a tenth less, so that programs are not replaced
/// together. A program that is started while others are replaced may have a number beyond `processes`.
fn earlier(limit: u64, number: usize, processes: usize) -> u64 {
    let processes = processes.max(1);
    let share = (number % processes) as u64 * SPREAD / processes as u64;
    limit - limit / SPREAD * share / SPREAD
}

/// Converts a duration to milliseconds.
pub(super) fn millis(duration: Duration) -> Millis {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The observed values of a ready program.
#[derive(Debug)]
pub(super) struct ProgramUsage {
    ready_at: Millis,
    idle_since: Millis,
    calls: u64,
    heavy: u32,
    looked_at: Millis,
}

impl ProgramUsage {
    pub fn new(now: Millis) -> Self {
        ProgramUsage {
            ready_at: now,
            idle_since: now,
            calls: 0,
            heavy: 0,
            looked_at: now,
        }
    }

    /// Returns how long it has been ready.
    pub fn health(&self, now: Millis) -> Millis {
        now.saturating_sub(self.ready_at)
    }

    /// Records that it has answered `calls` calls, the last one at `answered_at`; 0 means never.
    pub fn saw(&mut self, (calls, answered_at): (u64, Millis)) {
        self.calls = calls;
        self.idle_since = self.idle_since.max(answered_at);
    }

    /// Records that it is busy.
    pub fn is_busy(&mut self, now: Millis) {
        self.idle_since = now;
    }

    /// Returns whether its memory must be checked now.
    pub fn wants_look(&self, rules: &ProgramLimits, now: Millis) -> bool {
        rules.max_memory > 0 && now >= self.looked_at + LOOK
    }

    /// Records a check of its memory.
    pub fn looked(&mut self, bytes: u64, rules: &ProgramLimits, now: Millis) {
        self.looked_at = now;
        self.heavy = if bytes > rules.max_memory {
            self.heavy + 1
        } else {
            0
        };
    }

    /// Returns why it must be recycled, if it must.
    pub fn recycle_reason(&self, rules: &ProgramLimits, now: Millis) -> Option<&'static str> {
        if rules.max_calls > 0 && self.calls >= rules.max_calls {
            Some("max-calls")
        } else if self.heavy >= HEAVY {
            Some("max-memory")
        } else if rules.max_lifetime > 0 && self.health(now) >= rules.max_lifetime {
            Some("max-lifetime")
        } else {
            None
        }
    }

    /// Returns whether it was idle for too long.
    pub fn is_idle_for_too_long(&self, rules: &ProgramLimits, now: Millis) -> bool {
        rules.idle > 0 && now >= self.idle_since + rules.idle
    }

    /// Returns when the next of these checks is due. `may_sleep` includes the check for idleness.
    pub fn next(&self, rules: &ProgramLimits, may_sleep: bool) -> Millis {
        let at = |wanted: bool, at: Millis| if wanted { at } else { Millis::MAX };
        at(rules.max_memory > 0, self.looked_at + LOOK)
            .min(at(
                rules.max_lifetime > 0,
                self.ready_at.saturating_add(rules.max_lifetime),
            ))
            .min(at(
                rules.idle > 0 && may_sleep,
                self.idle_since.saturating_add(rules.idle),
            ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> ProgramLimits {
        ProgramLimits {
            handshake: false,
            boot: 1000,
            throttle: ThrottleLimits {
                burst: 5,
                max_delay: 0,
            },
            idle: 100,
            max_calls: 3,
            max_memory: 1000,
            max_lifetime: 10_000,
        }
    }

    #[test]
    fn calls_age_and_memory_found_twice_recycle_a_program() {
        let rules = rules();
        let mut usage = ProgramUsage::new(0);
        for now in 1..=2 {
            usage.saw((now, now));
            assert_eq!(usage.recycle_reason(&rules, now), None);
        }
        usage.saw((3, 3));
        assert_eq!(usage.recycle_reason(&rules, 3), Some("max-calls"));
        let mut usage = ProgramUsage::new(0);
        assert!(!usage.wants_look(&rules, 999) && usage.wants_look(&rules, 1000));
        for (bytes, worn) in [(2000, false), (500, false), (2000, false), (2000, true)] {
            usage.looked(bytes, &rules, 1000);
            assert_eq!(usage.recycle_reason(&rules, 1000).is_some(), worn);
        }
        assert_eq!(
            ProgramUsage::new(5).recycle_reason(&rules, 10_005),
            Some("max-lifetime")
        );
    }

    #[test]
    fn each_program_has_up_to_a_tenth_less_whatever_its_number() {
        for processes in [1, 2, 16, 64] {
            for number in 0..=64 {
                let limit = earlier(1000, number, processes);
                assert!(
                    (900..=1000).contains(&limit),
                    "{number} of {processes}: {limit}"
                );
            }
            assert_eq!(earlier(u64::MAX, 0, processes), u64::MAX);
        }
        assert!(earlier(1000, 0, 4) > earlier(1000, 3, 4));
    }

    #[test]
    fn limits_that_are_not_configured_are_never_due() {
        let rules = ProgramLimits {
            idle: 0,
            max_calls: 0,
            max_memory: 0,
            max_lifetime: 0,
            ..rules()
        };
        let usage = ProgramUsage::new(0);
        assert_eq!(usage.next(&rules, true), Millis::MAX);
        assert!(!usage.is_idle_for_too_long(&rules, 1 << 40));
        assert_eq!(usage.recycle_reason(&rules, 1 << 40), None);
    }

    #[test]
    fn idle_counts_from_the_last_answer() {
        let rules = rules();
        let mut usage = ProgramUsage::new(0);
        usage.saw((1, 50));
        assert!(
            !usage.is_idle_for_too_long(&rules, 149) && usage.is_idle_for_too_long(&rules, 150)
        );
        assert_eq!(
            (usage.next(&rules, true), usage.next(&rules, false)),
            (150, 1000)
        );
    }
}
