//! Calls that are run no more, because again and again they were what a worker died of: memory that
//! the master and the workers of one configuration share.
//!
//! A call is known by a key, a hash of its method and params that nobody outside can aim at. The
//! master writes who is in quarantine and who is suspected; a worker refuses the one and acquits
//! the other, which it does by running such a call to its end. While nobody is either, that costs a
//! worker one load for each call. What a dead worker was running stands in its evidence.

use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::io;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use super::scoreboard::RECORDS;
use super::stuck_calls::StuckCalls;
use crate::sys::shared_memory;
use crate::sys::shared_memory::shared_record;

/// Calls that can be in quarantine, and under suspicion, at once.
pub const PLACES: usize = 64;
/// Running calls that are told of one worker's death.
pub const MAX_REPORTED_CALLS: usize = 16;

shared_record! {
    /// Who is refused, and who is watched.
    #[derive(Debug)]
    pub struct QuarantineTable {
        pub quarantined_count: AtomicU32,
        /// How many are under suspicion.
        pub suspect_count: AtomicU32,
        /// The keys in quarantine; 0: a free place.
        pub keys: [AtomicU64; PLACES],
        pub refused: [AtomicU64; PLACES],
        /// The keys under suspicion; 0: a free place, or one that was acquitted.
        pub suspects: [AtomicU64; PLACES],
    }
}

shared_record! {
    /// What is known of the end of one worker.
    #[derive(Debug)]
    pub struct CrashReport {
        /// The keys of the calls that ran; 0 ends them.
        pub keys: [AtomicU64; MAX_REPORTED_CALLS],
        pub methods: [AtomicU32; MAX_REPORTED_CALLS],
        /// The key of the call whose thread has failed, where `fault` says that one has.
        pub faulting_call: AtomicU64,
        /// What the worker knows of its end: a number of `sys::signal`.
        pub fault: AtomicU32,
        /// Keeps the size a multiple of eight.
        pub spare: AtomicU32,
    }
}

/// The shared memory, and what keys are made with.
#[derive(Debug, Clone)]
pub struct Quarantine {
    board: &'static QuarantineTable,
    evidence: &'static [CrashReport],
    stuck: &'static [StuckCalls],
    hasher: RandomState,
}

impl Quarantine {
    /// One in which nobody is.
    ///
    /// # Errors
    /// When there is no memory to be had.
    pub fn new() -> io::Result<Self> {
        let records = NonZeroUsize::new(RECORDS).unwrap_or(NonZeroUsize::MIN);
        Ok(Quarantine {
            board: &shared_memory::array_without_file(NonZeroUsize::MIN)?[0],
            evidence: shared_memory::array_without_file(records)?,
            stuck: shared_memory::array_without_file(records)?,
            hasher: RandomState::new(),
        })
    }

    /// The evidence of the worker with this record of the scoreboard.
    ///
    /// # Panics
    /// When `index` is not below `RECORDS`.
    pub fn evidence(&self, index: usize) -> &'static CrashReport {
        &self.evidence[index]
    }

    /// The stuck calls of the worker with this record of the scoreboard.
    ///
    /// # Panics
    /// When `index` is not below `RECORDS`.
    pub fn stuck(&self, index: usize) -> &'static StuckCalls {
        &self.stuck[index]
    }

    /// Who is refused, and who is watched.
    pub fn board(&self) -> &'static QuarantineTable {
        self.board
    }

    /// The key of a call; never 0.
    pub fn key(&self, method: &str, params: &str) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        method.hash(&mut hasher);
        // All of it, or a call that differs in the middle would be refused. It takes a fraction of the time
        // that parsing the params has taken.
        hasher.write(params.as_bytes());
        hasher.finish() | 1
    }

    /// Whether a call is to be refused, which is counted.
    #[inline]
    pub fn is_quarantined(&self, key: u64) -> bool {
        self.board.quarantined_count.load(Relaxed) > 0 && self.is_held(key)
    }

    #[cold]
    fn is_held(&self, key: u64) -> bool {
        let place = place_of(&self.board.keys, key);
        if let Some(place) = place {
            self.board.refused[place].fetch_add(1, Relaxed);
        }
        place.is_some()
    }

    /// A call has run to its end.
    #[inline]
    pub fn clear_suspicion(&self, key: u64) {
        if self.board.suspect_count.load(Relaxed) > 0
            && let Some(place) = place_of(&self.board.suspects, key)
        {
            self.board.suspects[place].store(0, Relaxed);
        }
    }
}

/// Where a key stands.
pub fn place_of(keys: &[AtomicU64; PLACES], key: u64) -> Option<usize> {
    keys.iter().position(|it| it.load(Relaxed) == key)
}

impl CrashReport {
    /// Makes it empty, for the next worker.
    pub fn clear(&self) {
        self.keys[0].store(0, Relaxed);
        self.faulting_call.store(0, Relaxed);
        self.fault.store(0, Relaxed);
    }

    /// The calls that ran, by key and method.
    pub fn running_calls(&self) -> Vec<(u64, usize)> {
        let keys = self.keys.iter().map(|key| key.load(Relaxed));
        let methods = self
            .methods
            .iter()
            .map(|method| method.load(Relaxed) as usize);
        keys.take_while(|&key| key != 0).zip(methods).collect()
    }

    /// Says which ran; more than there are places for are not told.
    pub fn tell(&self, calls: impl Iterator<Item = (u64, u32)>) {
        let mut told = 0;
        for (key, method) in calls.take(MAX_REPORTED_CALLS) {
            self.methods[told].store(method, Relaxed);
            self.keys[told].store(key, Relaxed);
            told += 1;
        }
        if let Some(end) = self.keys.get(told) {
            end.store(0, Relaxed);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_of_method_and_params_alone() {
        let quarantine = Quarantine::new().unwrap();
        let key = |method, params: &str| quarantine.key(method, params);
        assert_eq!(key("a", "[1]"), key("a", "[1]"));
        assert_ne!(key("a", "[1]"), key("a", "[2]"));
        assert_ne!(key("a", "[1]"), key("b", "[1]"));
        let long = "x".repeat(100_000);
        assert_ne!(key("a", &long), key("a", &long[1..]));
        let mut other = long.clone();
        other.replace_range(50_000..50_001, "y");
        assert_ne!(key("a", &long), key("a", &other));
        assert_ne!(key("a", &long), Quarantine::new().unwrap().key("a", &long));
    }

    #[test]
    fn evidence_is_told_and_forgotten() {
        let evidence = Quarantine::new().unwrap().evidence(7);
        assert!(evidence.running_calls().is_empty());
        evidence.tell((1..100).map(|key| (key, key as u32 + 1)));
        assert_eq!(evidence.running_calls().len(), MAX_REPORTED_CALLS);
        evidence.tell([(9, 2)].into_iter());
        assert_eq!(evidence.running_calls(), [(9, 2)]);
        evidence.clear();
        assert!(evidence.running_calls().is_empty());
    }
}
