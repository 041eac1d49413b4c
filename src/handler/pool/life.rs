//! When a pool program is ready, worn out, or idle for too long.
//!
//! Pure: it is told the time and what was seen, and answers. How soon a dead one is started again
//! is `throttle`'s.

use std::time::Duration;

use crate::config::PoolConfig;
use crate::throttle::{Millis, ThrottleLimits};

/// A program without a handshake is ready when it is still there after so long.
const ALIVE: Millis = 50;
/// Between two looks at a program's memory.
const LOOK: Millis = 1000;
/// So many looks in a row must find it too large: what is freed at once is no leak.
const HEAVY: u32 = 2;
/// Programs of a pool are recycled up to a tenth earlier than they could, so that they do not
/// go together.
const SPREAD: u64 = 10;

/// What the configuration says about a program's life. Of times and numbers 0 is never.
#[derive(Debug, Clone)]
pub(super) struct Rules {
    pub handshake: bool,
    pub boot: Millis,
    pub throttle: ThrottleLimits,
    idle: Millis,
    pub max_calls: u64,
    max_memory: u64,
    max_lifetime: Millis,
}

impl Rules {
    /// Those of the program with this number.
    pub fn new(pool: &PoolConfig, number: usize) -> Self {
        let share = number as u64 * SPREAD / pool.processes as u64;
        let earlier = |value: u64| value - value / SPREAD * share / SPREAD;
        Rules {
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

    /// When a program that was started at `since` counts as ready by itself; `None`: it says so.
    pub fn ready_at(&self, since: Millis) -> Option<Millis> {
        (!self.handshake).then_some(since + ALIVE)
    }
}

/// A duration in milliseconds.
pub(super) fn millis(duration: Duration) -> Millis {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// What a program that serves has been through.
#[derive(Debug)]
pub(super) struct Wear {
    ready_at: Millis,
    idle_since: Millis,
    calls: u64,
    heavy: u32,
    looked_at: Millis,
}

impl Wear {
    pub fn new(now: Millis) -> Self {
        Wear {
            ready_at: now,
            idle_since: now,
            calls: 0,
            heavy: 0,
            looked_at: now,
        }
    }

    /// How long it has been ready.
    pub fn health(&self, now: Millis) -> Millis {
        now.saturating_sub(self.ready_at)
    }

    /// So many calls were answered by it, the last one then; 0 is never.
    pub fn saw(&mut self, (calls, answered_at): (u64, Millis)) {
        self.calls = calls;
        self.idle_since = self.idle_since.max(answered_at);
    }

    /// It has something to do.
    pub fn is_busy(&mut self, now: Millis) {
        self.idle_since = now;
    }

    /// Whether it is time for a look at its memory.
    pub fn wants_look(&self, rules: &Rules, now: Millis) -> bool {
        rules.max_memory > 0 && now >= self.looked_at + LOOK
    }

    /// It was looked at.
    pub fn looked(&mut self, bytes: u64, rules: &Rules, now: Millis) {
        self.looked_at = now;
        self.heavy = if bytes > rules.max_memory {
            self.heavy + 1
        } else {
            0
        };
    }

    /// Why it is to be replaced, if it is.
    pub fn is_worn(&self, rules: &Rules, now: Millis) -> Option<&'static str> {
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

    /// Whether it has had nothing to do for too long, being idle.
    pub fn is_idle_for_too_long(&self, rules: &Rules, now: Millis) -> bool {
        rules.idle > 0 && now >= self.idle_since + rules.idle
    }

    /// When one of these is to be asked again; `may_sleep`: also whether it has been idle for too
    /// long.
    pub fn next(&self, rules: &Rules, may_sleep: bool) -> Millis {
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

    fn rules() -> Rules {
        Rules {
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
    fn calls_age_and_memory_seen_twice_wear_a_program_out() {
        let rules = rules();
        let mut wear = Wear::new(0);
        for now in 1..=2 {
            wear.saw((now, now));
            assert_eq!(wear.is_worn(&rules, now), None);
        }
        wear.saw((3, 3));
        assert_eq!(wear.is_worn(&rules, 3), Some("max-calls"));
        let mut wear = Wear::new(0);
        assert!(!wear.wants_look(&rules, 999) && wear.wants_look(&rules, 1000));
        for (bytes, worn) in [(2000, false), (500, false), (2000, false), (2000, true)] {
            wear.looked(bytes, &rules, 1000);
            assert_eq!(wear.is_worn(&rules, 1000).is_some(), worn);
        }
        assert_eq!(Wear::new(5).is_worn(&rules, 10_005), Some("max-lifetime"));
    }

    #[test]
    fn what_is_not_configured_is_never_due() {
        let rules = Rules {
            idle: 0,
            max_calls: 0,
            max_memory: 0,
            max_lifetime: 0,
            ..rules()
        };
        let wear = Wear::new(0);
        assert_eq!(wear.next(&rules, true), Millis::MAX);
        assert!(!wear.is_idle_for_too_long(&rules, 1 << 40));
        assert_eq!(wear.is_worn(&rules, 1 << 40), None);
    }

    #[test]
    fn idle_counts_from_the_last_answer() {
        let rules = rules();
        let mut wear = Wear::new(0);
        wear.saw((1, 50));
        assert!(!wear.is_idle_for_too_long(&rules, 149) && wear.is_idle_for_too_long(&rules, 150));
        assert_eq!(
            (wear.next(&rules, true), wear.next(&rules, false)),
            (150, 1000)
        );
    }
}
