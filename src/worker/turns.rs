//! Decides which source gets the next free place when a limit of a method is reached (`concurrency`, `rate`): a
//! source that was refused before.
//!
//! Calls over such a limit are refused and do not wait, so the client that asks most often would get each free place.
//! So a place is kept for a refused source, until it asks again or the time is over. The place is kept only from
//! callers that had a call more recently than that source. A source that had no call recently is never refused for
//! this. Without refusals nothing is recorded. Memory is bounded. Pure.

use std::collections::BTreeMap;

use rustc_hash::FxHashMap;

use super::shares::Source;

/// How long a place is kept after a refusal, in milliseconds: longer than the `Retry-After` of HTTP answers.
const KEPT_MS: u64 = 1500;
/// Sources that are remembered: of those that were refused, and of those that had a call.
const MOST_SOURCES: usize = 1024;

/// Sources that share the limits of a method.
#[derive(Debug, Clone, Default)]
pub struct Turns {
    /// Sources that were refused, by the number of their last call (0: none is known), and until when a place
    /// is kept for them.
    refused: BTreeMap<(u64, Source), u64>,
    /// The number of the last call of each source that had one since the first refusal.
    last_calls: FxHashMap<Source, u64>,
    by_last_call: BTreeMap<u64, Source>,
    calls: u64,
    /// Until when any of this counts.
    until_ms: u64,
}

impl Turns {
    /// Returns whether a call of this source may be taken while there are `free` places.
    pub fn is_next(&mut self, source: Source, free: usize, now_ms: u64) -> bool {
        if now_ms > self.until_ms && self.until_ms > 0 {
            *self = Turns::default();
        }
        let own = self.last_call(source);
        while let Some(first) = self.refused.first_entry()
            && *first.get() < now_ms
        {
            first.remove();
        }
        let before = self.refused.iter().take_while(|((call, _), _)| *call < own);
        let kept = before.filter(|(_, until_ms)| **until_ms >= now_ms);
        kept.take(free).count() < free
    }

    /// Records that a source was refused.
    pub fn refuse(&mut self, source: Source, now_ms: u64) {
        self.until_ms = now_ms + KEPT_MS;
        let key = (self.last_call(source), source);
        if self.refused.len() >= MOST_SOURCES {
            self.refused.retain(|_, until_ms| *until_ms >= now_ms);
        }
        if self.refused.len() < MOST_SOURCES || self.refused.contains_key(&key) {
            self.refused.insert(key, self.until_ms);
        }
    }

    /// Records that a call of a source was taken.
    pub fn record_call(&mut self, source: Source) {
        if self.until_ms == 0 {
            return;
        }
        self.forget(source);
        self.calls += 1;
        self.last_calls.insert(source, self.calls);
        self.by_last_call.insert(self.calls, source);
        if self.last_calls.len() > MOST_SOURCES
            && let Some((_, oldest)) = self.by_last_call.first_key_value()
        {
            self.forget(*oldest);
        }
    }

    fn forget(&mut self, source: Source) {
        let call = self.last_calls.remove(&source).unwrap_or(0);
        self.by_last_call.remove(&call);
        self.refused.remove(&(call, source));
    }

    fn last_call(&self, source: Source) -> u64 {
        self.last_calls.get(&source).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Asks for a place, and says what was the answer.
    fn ask(turns: &mut Turns, source: u32, free: usize, now_ms: u64) -> bool {
        let source = Source::User(source);
        let is_next = turns.is_next(source, free, now_ms);
        match is_next {
            true => turns.record_call(source),
            false => turns.refuse(source, now_ms),
        }
        is_next
    }

    #[test]
    fn a_source_that_was_refused_is_next() {
        let mut turns = Turns::default();
        assert!((0..10).all(|_| ask(&mut turns, 1, 1, 1000)));
        assert!(turns.last_calls.is_empty(), "nothing was refused");
        assert!(!ask(&mut turns, 2, 0, 1000));
        assert!(ask(&mut turns, 1, 1, 1000), "it had none since");
        assert!(!ask(&mut turns, 1, 1, 1400), "the place is kept for 2");
        assert!(ask(&mut turns, 1, 2, 1400), "and only one");
        assert!(ask(&mut turns, 3, 1, 1400), "it had less than 1 as well");
        assert!(ask(&mut turns, 2, 1, 1500));
        assert!(ask(&mut turns, 1, 1, 1500));
        assert!(!ask(&mut turns, 2, 0, 1500));
        assert!(!ask(&mut turns, 1, 1, 3000));
        assert!(ask(&mut turns, 1, 1, 3001), "2 has not come back");
        assert!(ask(&mut turns, 1, 1, 9000));
        assert!(turns.last_calls.is_empty(), "that is long ago");
    }

    #[test]
    fn sources_that_do_not_come_back_keep_no_room_from_others() {
        let mut turns = Turns::default();
        for source in 2..2 + MOST_SOURCES as u32 {
            assert!(!ask(&mut turns, source, 0, 1000));
        }
        // One of them asks all the time.
        assert!(!ask(&mut turns, 2, 0, 1400));
        assert!(!ask(&mut turns, 1, 0, 2501));
        assert!(turns.refused.contains_key(&(0, Source::User(1))));
    }

    proptest! {
        /// While a source waits for its turn, each other one has one call at most.
        #[test]
        fn places_go_round(asks in prop::collection::vec((0..12_u32, any::<bool>()), 0..400)) {
            let mut turns = Turns::default();
            // By source: how many calls each other one had while it waits.
            let mut waiting = BTreeMap::<u32, [usize; 4]>::new();
            for (source, is_free) in asks {
                // Source 0 asks nine times as often as each of the others.
                let source = source.saturating_sub(8);
                if ask(&mut turns, source, usize::from(is_free), 2) {
                    waiting.remove(&source);
                    waiting.values_mut().for_each(|had| had[source as usize] += 1);
                } else {
                    waiting.entry(source).or_default();
                }
                prop_assert!(waiting.values().flatten().all(|had| *had <= 1), "{:?}", waiting);
            }
        }

        #[test]
        fn memory_is_bounded(asks in prop::collection::vec((0..5000_u32, 0..3_usize), 0..5000)) {
            let mut turns = Turns::default();
            for (source, free) in asks {
                ask(&mut turns, source, free, 2);
            }
            prop_assert!(turns.refused.len() <= MOST_SOURCES);
            prop_assert!(turns.last_calls.len() <= MOST_SOURCES);
            prop_assert_eq!(turns.by_last_call.len(), turns.last_calls.len());
        }
    }
}
