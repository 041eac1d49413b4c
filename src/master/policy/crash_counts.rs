//! Decides which calls are quarantined. Pure: the caller publishes the result.
//!
//! When a worker crashes, at most one of the calls that it was running is counted:
//!
//! - If the crash report names a thread (a fault or an abort), that thread's call.
//! - If the master has ended the worker because its event loop was stuck, the call that the event loop
//!   itself ran.
//! - If another process sent the signal, none. This includes SIGKILL, unless the kernel's OOM killer sent
//!   it.
//! - If nothing is known (OOM killer, or a thread of a handler called `exit`), the only call that ran. If
//!   there were several, none is counted: otherwise a client that crashes workers could get the call
//!   of another client quarantined.
//!
//! At most [`MAX_CALLS`] calls are suspected. At this limit, crashes of other calls are not counted.
//! If a call completes, its count is cleared. The third crash quarantines the call, if each crash came within an hour
//! of the one before.

use std::collections::HashMap;

use super::event::Millis;
use crate::sys::signal::Fault;

/// The number of crashes after which a call is quarantined.
pub const MAX_CRASHES: u32 = 3;
/// The largest number of quarantined calls, and of suspected calls.
pub const MAX_CALLS: usize = 64;
/// If no further crash is counted for a call within this time, in milliseconds, its count is cleared.
const CRASH_WINDOW_MS: Millis = 3_600_000;

/// Which call of a worker may have caused its end, as far as the master knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Suspicion {
    /// None, because the end was ordered or another process caused it.
    Nothing,
    /// The call that the crash report names.
    Reported,
    /// The call that the event loop ran, because the loop was stuck.
    EventLoop,
}

/// What is known about the crash of a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CrashEvidence {
    pub fault: Fault,
    /// The key of the call that the failed thread ran; 0 if it ran none.
    pub faulting_call: u64,
    /// The key of the call that the event loop itself ran; 0 if it ran none.
    pub event_loop_call: u64,
    /// The key and the method of each call that ran. A call without a key has 0.
    pub running: Vec<(u64, String)>,
}

impl CrashEvidence {
    /// Returns the call that is counted, by key and method.
    pub fn cause(&self, suspicion: Suspicion) -> Option<&(u64, String)> {
        let by_key = |key: u64| self.running.iter().find(|(it, _)| *it == key);
        let found = match (suspicion, self.fault) {
            (Suspicion::Nothing, _) => None,
            (Suspicion::EventLoop, _) => by_key(self.event_loop_call),
            (Suspicion::Reported, Fault::Own) => by_key(self.faulting_call),
            (Suspicion::Reported, Fault::Sent) => None,
            (Suspicion::Reported, Fault::Unknown) => {
                let first = self.running.first()?;
                let is_only = self.running.iter().all(|(key, _)| *key == first.0);
                is_only.then_some(first)
            }
        };
        found.filter(|(key, _)| *key != 0)
    }
}

#[derive(Debug)]
struct Suspect {
    crashes: u32,
    last: Millis,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuarantinedCall {
    pub key: u64,
    pub method: String,
    /// When it was quarantined, in seconds since 1970.
    pub at: u64,
}

/// A newly quarantined call, and the call that was released for it if the quarantine was full.
pub type Caught = (QuarantinedCall, Option<QuarantinedCall>);

/// The calls that are suspected, and those that are quarantined.
#[derive(Debug, Default)]
pub struct CrashCounts {
    suspects: HashMap<u64, Suspect>,
    quarantined: Vec<QuarantinedCall>,
    /// The number of processes that the OOM killer had ended when the count was last read; `None` if the kernel gives
    /// no count.
    kills: Option<u64>,
}

impl CrashCounts {
    /// Starts without a suspect. `kills` is the number of processes that the OOM killer has ended by now.
    pub fn new(kills: Option<u64>) -> Self {
        CrashCounts {
            kills,
            ..CrashCounts::default()
        }
    }

    /// Returns whether the OOM killer has ended a process since the last call. `kills` is the kernel's count now.
    /// Returns false if one of the two counts is not known.
    pub fn ran_out_of_memory(&mut self, kills: Option<u64>) -> bool {
        let before = std::mem::replace(&mut self.kills, kills);
        matches!((before, kills), (Some(before), Some(now)) if now > before)
    }

    /// Drops the suspected calls that have completed since, and those that are too old. `is_suspected` says whether
    /// the published suspicion of a key still holds.
    pub fn forget(&mut self, is_suspected: impl Fn(u64) -> bool, now: Millis) {
        self.suspects.retain(|&key, suspect| {
            now.saturating_sub(suspect.last) <= CRASH_WINDOW_MS && is_suspected(key)
        });
    }

    /// Counts a crash for a call. `now` is monotonic, `at` is the wall clock; `refusals` says how often a
    /// quarantined call was refused. Returns the call if it is newly quarantined.
    pub fn count(
        &mut self,
        (key, method): &(u64, String),
        (now, at): (Millis, u64),
        refusals: impl Fn(u64) -> u64,
    ) -> Option<Caught> {
        let is_held = self.quarantined.iter().any(|call| call.key == *key);
        let is_full = self.suspects.len() >= MAX_CALLS && !self.suspects.contains_key(key);
        if is_held || is_full {
            return None;
        }
        let suspect = self.suspects.entry(*key).or_insert(Suspect {
            crashes: 0,
            last: now,
        });
        suspect.crashes += 1;
        suspect.last = now;
        if suspect.crashes < MAX_CRASHES {
            return None;
        }
        self.suspects.remove(key);
        let call = QuarantinedCall {
            key: *key,
            method: method.clone(),
            at,
        };
        let evicted = self.evict(refusals);
        self.quarantined.push(call.clone());
        Some((call, evicted))
    }

    /// If the quarantine is full, removes the call that was refused least often. If there are several, removes the
    /// oldest.
    fn evict(&mut self, refusals: impl Fn(u64) -> u64) -> Option<QuarantinedCall> {
        if self.quarantined.len() < MAX_CALLS {
            return None;
        }
        let calls = self.quarantined.iter().enumerate();
        let least = calls.min_by_key(|(_, call)| refusals(call.key))?.0;
        Some(self.quarantined.remove(least))
    }

    /// Returns the quarantined calls.
    pub fn quarantined(&self) -> &[QuarantinedCall] {
        &self.quarantined
    }

    /// Returns the keys of the suspected calls.
    pub fn suspects(&self) -> impl Iterator<Item = u64> {
        self.suspects.keys().copied()
    }

    /// Releases all calls and clears all suspects.
    pub fn reset(&mut self) {
        self.suspects.clear();
        self.quarantined.clear();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[derive(Default)]
    struct World {
        counts: CrashCounts,
        /// The keys of suspected calls that have completed.
        cleared: HashSet<u64>,
        now: Millis,
    }

    fn evidence(fault: Fault, faulting_call: u64, ran: &[u64]) -> CrashEvidence {
        CrashEvidence {
            fault,
            faulting_call,
            event_loop_call: 0,
            running: ran.iter().map(|&key| (key, format!("m{key}"))).collect(),
        }
    }

    impl World {
        /// Counts a crash during the calls `ran`. Returns the key of the newly quarantined call.
        fn death(&mut self, fault: Fault, faulting_call: u64, ran: &[u64]) -> Option<u64> {
            let evidence = evidence(fault, faulting_call, ran);
            Some(self.caught(&evidence, Suspicion::Reported)?.0.key)
        }

        /// Counts a crash. Returns the newly quarantined call, and the call that was released for it.
        fn caught(&mut self, evidence: &CrashEvidence, suspicion: Suspicion) -> Option<Caught> {
            self.now += 1000;
            let cleared = std::mem::take(&mut self.cleared);
            (self.counts).forget(|key| !cleared.contains(&key), self.now);
            let cause = evidence.cause(suspicion)?;
            // All but call 7 were refused.
            let refusals = |key| u64::from(key != 7);
            self.counts.count(cause, (self.now, 0), refusals)
        }

        fn held(&self) -> Vec<u64> {
            self.counts
                .quarantined
                .iter()
                .map(|call| call.key)
                .collect()
        }
    }

    #[test]
    fn the_third_crash_quarantines_the_call() {
        let mut world = World::default();
        assert_eq!(world.death(Fault::Own, 7, &[5, 7, 9]), None);
        assert_eq!(world.death(Fault::Own, 7, &[5, 7]), None);
        assert_eq!(world.counts.suspects().collect::<Vec<_>>(), [7]);
        assert_eq!(world.death(Fault::Own, 7, &[7, 5]), Some(7));
        assert_eq!(
            (world.held(), world.counts.suspects().count()),
            (vec![7], 0)
        );
        world.counts.reset();
        assert!(world.held().is_empty());
        // It is counted from zero again.
        assert_eq!(world.death(Fault::Own, 7, &[7]), None);
    }

    #[test]
    fn a_call_that_completes_is_no_suspect() {
        let mut world = World::default();
        for _ in 0..10 {
            assert_eq!(world.death(Fault::Unknown, 0, &[5]), None);
            world.cleared.insert(5);
        }
    }

    #[test]
    fn no_call_is_counted_for_a_signal_that_was_sent_or_for_what_is_long_ago() {
        let mut world = World::default();
        for _ in 0..10 {
            assert_eq!(world.death(Fault::Sent, 0, &[5]), None);
            assert_eq!(world.death(Fault::Own, 0, &[5]), None);
        }
        world.death(Fault::Own, 5, &[5]);
        world.death(Fault::Own, 5, &[5]);
        world.now += CRASH_WINDOW_MS;
        assert_eq!(world.death(Fault::Own, 5, &[5]), None);
    }

    #[test]
    fn without_evidence_only_a_call_that_ran_alone_is_counted() {
        let cause = |ran: &[u64]| {
            let evidence = evidence(Fault::Unknown, 0, ran);
            evidence.cause(Suspicion::Reported).map(|(key, _)| *key)
        };
        assert_eq!(cause(&[5]), Some(5));
        assert_eq!(cause(&[5, 5]), Some(5), "the same call twice");
        assert_eq!(cause(&[]), None);
        assert_eq!(cause(&[5, 7]), None);
        // A call without a key, such as one of a batch.
        assert_eq!(cause(&[5, 0]), None);
        assert_eq!(cause(&[0]), None);
    }

    #[test]
    fn for_a_stuck_event_loop_only_the_call_that_it_ran_is_counted() {
        let mut stuck = evidence(Fault::Sent, 0, &[5, 7]);
        assert_eq!(stuck.cause(Suspicion::EventLoop), None);
        stuck.event_loop_call = 7;
        let cause = stuck.cause(Suspicion::EventLoop);
        assert_eq!(cause, Some(&(7, "m7".to_owned())));
        assert_eq!(stuck.cause(Suspicion::Nothing), None);
        // The same holds without a report of its threads.
        let alone = evidence(Fault::Unknown, 0, &[5]);
        assert_eq!(alone.cause(Suspicion::EventLoop), None);
    }

    #[test]
    fn a_kill_counts_when_the_kernel_has_run_out_of_memory_since_the_one_before() {
        let mut counts = CrashCounts::new(Some(7));
        assert!(!counts.ran_out_of_memory(Some(7)));
        assert!(counts.ran_out_of_memory(Some(9)));
        assert!(!counts.ran_out_of_memory(Some(9)));
        assert!(!counts.ran_out_of_memory(None));
        assert!(!counts.ran_out_of_memory(Some(12)), "the time is unknown");
        assert!(!CrashCounts::new(None).ran_out_of_memory(None));
    }

    #[test]
    fn a_full_quarantine_lets_the_call_go_that_was_refused_least() {
        let mut world = World::default();
        let keys = 1..=MAX_CALLS as u64;
        for key in keys.clone().flat_map(|key| [key; 3]) {
            world.death(Fault::Own, key, &[key]);
        }
        assert_eq!(world.held(), keys.collect::<Vec<_>>());
        for _ in 0..2 {
            world.death(Fault::Own, 1000, &[1000]);
        }
        let last = evidence(Fault::Own, 1000, &[1000]);
        let (caught, evicted) = world.caught(&last, Suspicion::Reported).unwrap();
        assert_eq!((caught.key, evicted.unwrap().key), (1000, 7));
        assert_eq!(world.held().len(), MAX_CALLS);
        // Suspects are limited as well.
        for key in 2000..3000 {
            world.death(Fault::Own, key, &[key]);
        }
        assert_eq!(world.counts.suspects().count(), MAX_CALLS);
    }
}
