//! Decides when the store is tried again after a fault. Pure: the caller passes the time and random bits.

use crate::jobs::store::error::StoreFault;

/// The delay before a store that is away is tried again, in milliseconds. It doubles up to the longest one.
const FIRST_DELAY_MS: u64 = 100;
const LONGEST_DELAY_MS: u64 = 5_000;
/// The delay before the next try on a full disk.
const FULL_DELAY_MS: u64 = 1_000;

/// The state of the store, as status shows it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum StoreState {
    Up,
    /// It cannot be reached, or is not open yet.
    #[default]
    Away,
    /// Its disk is full.
    Full,
    /// It is damaged: nothing more is written.
    Broken,
}

impl StoreState {
    /// Returns the name in status.
    pub const fn name(self) -> &'static str {
        match self {
            StoreState::Up => "up",
            StoreState::Away => "away",
            StoreState::Full => "full",
            StoreState::Broken => "broken",
        }
    }
}

/// The state of the store, and when it is tried again.
#[derive(Debug, Default)]
pub struct StoreHealth {
    state: StoreState,
    /// The failed tries in a row.
    failures: u32,
    /// When the first try failed after the last success, in milliseconds; `None` if none has failed since then.
    down_since_ms: Option<u64>,
    next_try_ms: u64,
}

impl StoreHealth {
    pub fn state(&self) -> StoreState {
        self.state
    }

    /// Records a fault at `now_ms`. `jitter` is random, and adds up to a quarter of the delay. Returns whether it is
    /// the first fault in a row, or has changed the state.
    pub fn failed(&mut self, fault: StoreFault, now_ms: u64, jitter: u16) -> bool {
        let state = match fault {
            StoreFault::Full => StoreState::Full,
            StoreFault::Away => StoreState::Away,
            // After a failed sync the process exits, so the difference does not matter.
            StoreFault::SyncFailed | StoreFault::Corrupt => StoreState::Broken,
        };
        let delay = match state {
            StoreState::Full => FULL_DELAY_MS,
            _ => (FIRST_DELAY_MS << self.failures.min(16)).min(LONGEST_DELAY_MS),
        };
        let more = delay / 4 * u64::from(jitter) / u64::from(u16::MAX);
        self.next_try_ms = now_ms.saturating_add(delay + more);
        self.failures = self.failures.saturating_add(1);
        self.down_since_ms.get_or_insert(now_ms);
        let is_first = self.failures == 1;
        std::mem::replace(&mut self.state, state) != state || is_first
    }

    /// Records a success at `now_ms`. Returns for how many milliseconds the store was not up, if it has just come
    /// back.
    pub fn succeeded(&mut self, now_ms: u64) -> Option<u64> {
        self.state = StoreState::Up;
        self.failures = 0;
        let since_ms = self.down_since_ms.take()?;
        Some(now_ms.saturating_sub(since_ms))
    }

    /// Tries again at `at_ms`, whatever the number of failed tries is.
    pub fn try_at(&mut self, at_ms: u64) {
        self.next_try_ms = at_ms;
    }

    /// Returns whether the store may be tried at `now_ms`.
    pub fn may_try(&self, now_ms: u64) -> bool {
        match self.state {
            StoreState::Up => true,
            StoreState::Away | StoreState::Full => now_ms >= self.next_try_ms,
            StoreState::Broken => false,
        }
    }

    /// Returns how long to wait for the next try, in milliseconds; `None` if the store is up or damaged.
    pub fn wait_ms(&self, now_ms: u64) -> Option<u64> {
        match self.state {
            StoreState::Away | StoreState::Full => Some(self.next_try_ms.saturating_sub(now_ms)),
            StoreState::Up | StoreState::Broken => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_delay_doubles_up_to_five_seconds_and_starts_again_after_a_success() {
        let mut health = StoreHealth::default();
        assert_eq!(health.succeeded(0), None, "it was never down");
        let mut now = 1_000;
        for (number, delay) in [100, 200, 400, 800, 1600, 3200, 5000, 5000]
            .into_iter()
            .enumerate()
        {
            assert_eq!(health.failed(StoreFault::Away, now, 0), number == 0);
            assert_eq!(health.wait_ms(now), Some(delay));
            assert!(!health.may_try(now + delay - 1) && health.may_try(now + delay));
            now += delay;
        }
        assert_eq!(health.state(), StoreState::Away);
        assert_eq!(health.succeeded(now), Some(now - 1_000));
        assert!(health.may_try(now) && health.wait_ms(now).is_none());
        assert!(health.failed(StoreFault::Away, now, u16::MAX));
        assert_eq!(health.wait_ms(now), Some(125), "a quarter more");
    }

    #[test]
    fn a_full_disk_is_tried_each_second_and_a_damaged_store_never() {
        let mut health = StoreHealth::default();
        for _ in 0..5 {
            health.failed(StoreFault::Full, 10, 0);
            assert_eq!(health.wait_ms(10), Some(1_000));
        }
        assert_eq!(health.state().name(), "full");
        assert!(health.failed(StoreFault::Corrupt, 10, 0));
        assert_eq!(
            (health.wait_ms(10), health.may_try(u64::MAX)),
            (None, false)
        );
        assert!(!health.failed(StoreFault::Corrupt, 11, 0));
    }
}
