//! Holds the quarantined calls, which are refused because they repeatedly crashed their worker. It is
//! memory that the master and the workers of one configuration share.
//!
//! A call has a key: a hash of its method and params that clients cannot predict. The master writes the
//! quarantined and the suspected keys. A worker refuses a quarantined call. When a suspected call
//! completes, the worker clears the suspicion. While there are no such keys, each call costs a worker one
//! load. The crash report of a dead worker names the calls that its threads were running.

use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::io;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use super::scoreboard::RECORDS;
use super::stuck_calls::StuckCalls;
use crate::sys::shared_memory;
use crate::sys::shared_memory::shared_record;

/// The largest number of quarantined calls, and of suspected calls, at once.
pub const PLACES: usize = 64;
/// The largest number of running calls in one crash report.
pub const MAX_REPORTED_CALLS: usize = 16;
/// Stands for a running call without a key. No key has this value, because keys are odd.
pub const WITHOUT_KEY: u64 = 2;

shared_record! {
    /// The quarantined and the suspected keys.
    #[derive(Debug)]
    pub struct QuarantineTable {
        quarantined_count: AtomicU32,
        /// The number of suspected keys.
        suspect_count: AtomicU32,
        /// The quarantined keys; 0 means free.
        keys: [AtomicU64; PLACES],
        refused: [AtomicU64; PLACES],
        /// The suspected keys; 0 means free or cleared.
        suspects: [AtomicU64; PLACES],
    }
}

shared_record! {
    /// What is known about the death of one worker.
    #[derive(Debug)]
    pub struct CrashReport {
        /// The keys of the calls that ran on a thread, terminated by 0. Calls with a key come first, then calls
        /// without one.
        pub keys: [AtomicU64; MAX_REPORTED_CALLS],
        pub methods: [AtomicU32; MAX_REPORTED_CALLS],
        /// The key of the call whose thread failed, if `fault` says that a thread failed.
        pub faulting_call: AtomicU64,
        /// The key of the call that the event loop itself was running; 0 means none.
        pub event_loop_call: AtomicU64,
        /// The recorded fault, a number of `sys::signal::Fault`.
        pub fault: AtomicU32,
        /// Padding: keeps the size a multiple of eight.
        pub spare: AtomicU32,
    }
}

/// The shared memory, and the hasher for keys.
#[derive(Debug, Clone)]
pub struct Quarantine {
    board: &'static QuarantineTable,
    evidence: &'static [CrashReport],
    stuck: &'static [StuckCalls],
    hasher: RandomState,
}

impl Quarantine {
    /// Creates an empty table.
    ///
    /// # Errors
    /// If there is not enough memory.
    pub fn new() -> io::Result<Self> {
        let records = NonZeroUsize::new(RECORDS).unwrap_or(NonZeroUsize::MIN);
        Ok(Quarantine {
            board: &shared_memory::array_without_file(NonZeroUsize::MIN)?[0],
            evidence: shared_memory::array_without_file(records)?,
            stuck: shared_memory::array_without_file(records)?,
            hasher: RandomState::new(),
        })
    }

    /// Returns the crash report of the worker with this record of the scoreboard.
    ///
    /// # Panics
    /// If `index` is not below `RECORDS`.
    pub fn evidence(&self, index: usize) -> &'static CrashReport {
        &self.evidence[index]
    }

    /// Returns the stuck calls of the worker with this record of the scoreboard.
    ///
    /// # Panics
    /// If `index` is not below `RECORDS`.
    pub fn stuck(&self, index: usize) -> &'static StuckCalls {
        &self.stuck[index]
    }

    /// Leaves the shared memory. For a session, which must not write what workers and the master read.
    ///
    /// # Errors
    /// If there is not enough memory.
    pub fn leave(&self) -> io::Result<()> {
        shared_memory::make_private(std::slice::from_ref(self.board))?;
        shared_memory::make_private(self.evidence)?;
        shared_memory::make_private(self.stuck)
    }

    /// Publishes which calls are quarantined and which are suspected, at most `PLACES` of each. A quarantined
    /// call that stays keeps its number of refusals.
    pub fn publish(&self, quarantined: &[u64], suspects: &[u64]) {
        for place in replace_keys(&self.board.keys, quarantined) {
            self.board.refused[place].store(0, Relaxed);
        }
        replace_keys(&self.board.suspects, suspects);
        let count = |keys: &[u64]| keys.len().min(PLACES) as u32;
        let board = self.board;
        board.suspect_count.store(count(suspects), Relaxed);
        board.quarantined_count.store(count(quarantined), Relaxed);
    }

    /// Returns how often a quarantined call was refused; 0 if it is not quarantined.
    pub fn refusals(&self, key: u64) -> u64 {
        let place = place_of(&self.board.keys, key);
        place.map_or(0, |place| self.board.refused[place].load(Relaxed))
    }

    /// Returns whether a published suspicion holds: no call with this key has completed since.
    pub fn is_suspected(&self, key: u64) -> bool {
        place_of(&self.board.suspects, key).is_some()
    }

    /// Returns the key of a call; never 0.
    pub fn key(&self, method: &str, params: &str) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        method.hash(&mut hasher);
        // Hash all params, because otherwise a call that differs only in the middle would be refused.
        // This takes a fraction of the time for parsing them.
        hasher.write(params.as_bytes());
        hasher.finish() | 1
    }

    /// Returns whether a call must be refused, and counts it.
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

    /// Clears the suspicion of a call that has completed.
    #[inline]
    pub fn clear_suspicion(&self, key: u64) {
        if self.board.suspect_count.load(Relaxed) > 0
            && let Some(place) = place_of(&self.board.suspects, key)
        {
            // The master may have put another call there meanwhile.
            let _ = self.board.suspects[place].compare_exchange(key, 0, Relaxed, Relaxed);
        }
    }
}

/// Returns the index of a key.
fn place_of(keys: &[AtomicU64; PLACES], key: u64) -> Option<usize> {
    keys.iter().position(|it| it.load(Relaxed) == key)
}

/// Makes these the keys of a table; those that stay keep their places. Returns the places of the others.
fn replace_keys(table: &[AtomicU64; PLACES], keys: &[u64]) -> Vec<usize> {
    for place in table {
        if !keys.contains(&place.load(Relaxed)) {
            place.store(0, Relaxed);
        }
    }
    let is_new = |key: &&u64| place_of(table, **key).is_none();
    let new: Vec<u64> = keys.iter().filter(is_new).copied().collect();
    let mut places = Vec::new();
    for key in new {
        let Some(free) = place_of(table, 0) else {
            break;
        };
        table[free].store(key, Relaxed);
        places.push(free);
    }
    places
}

impl CrashReport {
    /// Empties the report for the next worker.
    pub fn clear(&self) {
        self.keys[0].store(0, Relaxed);
        self.faulting_call.store(0, Relaxed);
        self.event_loop_call.store(0, Relaxed);
        self.fault.store(0, Relaxed);
    }

    /// Returns the keys and methods of the calls that ran; `WITHOUT_KEY` for one that has none.
    pub fn running_calls(&self) -> Vec<(u64, usize)> {
        let keys = self.keys.iter().map(|key| key.load(Relaxed));
        let methods = self
            .methods
            .iter()
            .map(|method| method.load(Relaxed) as usize);
        keys.take_while(|&key| key != 0).zip(methods).collect()
    }

    /// Records the calls that ran, at most as many as there is room for. `event_loop_call` is the key of the
    /// one that the event loop ran; 0 means none.
    pub fn tell(&self, mut calls: Vec<(u64, u32)>, event_loop_call: u64) {
        self.event_loop_call.store(event_loop_call, Relaxed);
        let identified = [self.faulting_call.load(Relaxed), event_loop_call];
        calls.sort_by_key(|(key, _)| !identified.contains(key));
        let mut count = 0;
        for (key, method) in calls.into_iter().take(MAX_REPORTED_CALLS) {
            self.methods[count].store(method, Relaxed);
            self.keys[count].store(key, Relaxed);
            count += 1;
        }
        if let Some(end) = self.keys.get(count) {
            end.store(0, Relaxed);
        }
    }
}

/// The quarantine, for a process that may be without: then no call is in it.
#[derive(Debug, Default)]
pub struct UsedQuarantine(pub Option<Quarantine>);

impl UsedQuarantine {
    /// Returns the key of a call.
    #[inline]
    pub fn key(&self, method: &str, params: &str) -> Option<u64> {
        Some(self.0.as_ref()?.key(method, params))
    }

    /// Returns whether the call with this key is quarantined. A call without a key has 0 and is not.
    #[inline]
    pub fn is_quarantined(&self, key: u64) -> bool {
        let quarantine = self.0.as_ref().filter(|_| key != 0);
        quarantine.is_some_and(|quarantine| quarantine.is_quarantined(key))
    }

    /// Clears the suspicion of a call that has completed.
    #[inline]
    pub fn clear_suspicion(&self, key: u64) {
        if let Some(quarantine) = &self.0 {
            quarantine.clear_suspicion(key);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_key_depends_only_on_method_and_params() {
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
    fn a_crash_report_is_recorded_and_cleared() {
        let evidence = Quarantine::new().unwrap().evidence(7);
        assert!(evidence.running_calls().is_empty());
        evidence.faulting_call.store(99, Relaxed);
        evidence.tell((1..100).map(|key| (key, key as u32 + 1)).collect(), 98);
        let reported = evidence.running_calls();
        assert_eq!(reported.len(), MAX_REPORTED_CALLS);
        assert_eq!(
            reported[..2],
            [(98, 99), (99, 100)],
            "identified calls come first"
        );
        assert_eq!(evidence.event_loop_call.load(Relaxed), 98);
        evidence.tell(vec![(9, 2)], 0);
        assert_eq!(evidence.running_calls(), [(9, 2)]);
        evidence.clear();
        assert!(evidence.running_calls().is_empty());
    }

    #[test]
    fn published_keys_keep_their_refusals_and_a_completed_call_clears_its_suspicion() {
        let quarantine = Quarantine::new().unwrap();
        quarantine.publish(&[7, 9], &[11, 13]);
        assert!(quarantine.is_quarantined(9) && !quarantine.is_quarantined(11));
        quarantine.clear_suspicion(11);
        assert!(!quarantine.is_suspected(11) && quarantine.is_suspected(13));
        quarantine.publish(&[9, 11], &[13]);
        assert!(!quarantine.is_quarantined(7));
        assert_eq!([7, 9, 11].map(|key| quarantine.refusals(key)), [0, 1, 0]);
        let many: Vec<u64> = (1..100).collect();
        quarantine.publish(&many, &many);
        assert!(quarantine.is_suspected(13) && quarantine.is_quarantined(9));
        quarantine.publish(&[], &[]);
        assert!(!quarantine.is_suspected(13) && !quarantine.is_quarantined(9));
    }
}
