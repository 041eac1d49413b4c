//! Who is put into quarantine: pure but for the board that it writes on.
//!
//! A call gets a strike when a worker died while it ran. Where the worker could say whose thread
//! has failed (a fault, an abort), that call alone gets it, and nobody when it was a signal of
//! somebody else's. A KILL is somebody else's too, unless the kernel had to end somebody for want of
//! memory. Where nobody could say anything (that, or a worker that left on its own), all that ran get
//! one; so whoever runs to the end once is acquitted of all. The third one within an hour is the last.

use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;

use super::event::Millis;
use crate::link::quarantine::{PLACES, Quarantine, place_of};
use crate::sys::signal::Fault;

/// So many deaths.
pub const MAX_CRASHES: u32 = 3;
/// Within so long.
const CRASH_WINDOW_MS: Millis = 3_600_000;

#[derive(Debug)]
struct Suspect {
    strikes: u32,
    last: Millis,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuarantinedCall {
    pub key: u64,
    pub method: String,
    /// When it was put there, in seconds since 1970.
    pub at: u64,
}

/// Suspects and prisoners.
#[derive(Debug, Default)]
pub struct CrashCounts {
    suspects: HashMap<u64, Suspect>,
    quarantined: Vec<QuarantinedCall>,
    /// How many processes the kernel had ended for want of memory when last looked.
    kills: Option<u64>,
}

impl CrashCounts {
    /// Nobody is suspected yet, and the kernel has ended so many processes for want of memory.
    pub fn new(kills: Option<u64>) -> Self {
        CrashCounts {
            kills,
            ..CrashCounts::default()
        }
    }

    /// Some workers got a KILL, and by now it is so many: whether those may be among them. Where the
    /// kernel does not say, they are not.
    pub fn ran_out_of_memory(&mut self, kills: Option<u64>) -> bool {
        let before = std::mem::replace(&mut self.kills, kills);
        matches!((before, kills), (Some(before), Some(now)) if now > before)
    }

    /// A worker has died at `now` (and `at` by the wall clock) while these calls ran, by key and
    /// method. Returns those that are in quarantine from now on, each with the one that had to leave for it,
    /// and how often that was refused.
    pub fn death(
        &mut self,
        quarantine: &Quarantine,
        (fault, culprit): (Fault, u64),
        ran: &[(u64, String)],
        (now, at): (Millis, u64),
    ) -> Vec<(QuarantinedCall, Option<(QuarantinedCall, u64)>)> {
        self.forget(quarantine, now);
        let mut caught = Vec::new();
        for (key, method) in ran {
            let blamed = match fault {
                Fault::Unknown => true,
                Fault::Own => *key == culprit,
                Fault::Sent => false,
            };
            if !blamed || self.quarantined.iter().any(|prisoner| prisoner.key == *key) {
                continue;
            }
            let strikes = self.strike(quarantine, *key, now);
            if strikes >= MAX_CRASHES {
                self.release(quarantine, *key);
                let prisoner = QuarantinedCall {
                    key: *key,
                    method: method.clone(),
                    at,
                };
                let evicted = self.hold(quarantine, prisoner.clone());
                caught.push((prisoner, evicted));
            }
        }
        self.count(quarantine);
        caught
    }

    /// Those in quarantine, and how often each was refused.
    pub fn quarantined<'a>(
        &'a self,
        quarantine: &'a Quarantine,
    ) -> impl Iterator<Item = (&'a QuarantinedCall, u64)> {
        let board = quarantine.board();
        self.quarantined.iter().map(|prisoner| {
            let place = place_of(&board.keys, prisoner.key);
            let refused = place.map_or(0, |place| board.refused[place].load(Relaxed));
            (prisoner, refused)
        })
    }

    /// Lets everybody go, and forgets what they were suspected of.
    pub fn reset(&mut self, quarantine: &Quarantine) {
        for key in quarantine.board().keys.iter() {
            key.store(0, Relaxed);
        }
        for suspect in quarantine.board().suspects.iter() {
            suspect.store(0, Relaxed);
        }
        self.suspects.clear();
        self.quarantined.clear();
        self.count(quarantine);
    }

    fn strike(&mut self, quarantine: &Quarantine, key: u64, now: Millis) -> u32 {
        let suspects = &quarantine.board().suspects;
        if place_of(suspects, key).is_none() {
            // New, or acquitted meanwhile.
            self.suspects.remove(&key);
            let Some(free) = place_of(suspects, 0) else {
                return 0; // As many are watched as can be.
            };
            suspects[free].store(key, Relaxed);
        }
        let suspect = self.suspects.entry(key).or_insert(Suspect {
            strikes: 0,
            last: now,
        });
        suspect.strikes += 1;
        suspect.last = now;
        suspect.strikes
    }

    fn release(&mut self, quarantine: &Quarantine, key: u64) {
        let suspects = &quarantine.board().suspects;
        if let Some(place) = place_of(suspects, key) {
            suspects[place].store(0, Relaxed);
        }
        self.suspects.remove(&key);
    }

    /// Puts a call into quarantine. If that is full, the call that was refused least leaves, of several the
    /// oldest, and is returned with the number of its refusals.
    fn hold(
        &mut self,
        quarantine: &Quarantine,
        call: QuarantinedCall,
    ) -> Option<(QuarantinedCall, u64)> {
        let board = quarantine.board();
        let mut evicted = None;
        if place_of(&board.keys, 0).is_none() {
            let refusals = self.quarantined(quarantine).map(|(_, refused)| refused);
            let least = refusals.enumerate().min_by_key(|(_, refused)| *refused);
            evicted = least.map(|(index, refused)| (self.quarantined.remove(index), refused));
        }
        let leaves = evicted.as_ref().map_or(0, |(old, _)| old.key);
        if let Some(place) = place_of(&board.keys, leaves) {
            board.refused[place].store(0, Relaxed);
            board.keys[place].store(call.key, Relaxed);
            self.quarantined.push(call);
        }
        evicted
    }

    /// Drops suspects that were acquitted, or that nothing was heard of for long.
    fn forget(&mut self, quarantine: &Quarantine, now: Millis) {
        let suspects = &quarantine.board().suspects;
        self.suspects.retain(|&key, suspect| {
            let place = place_of(suspects, key);
            let old = now.saturating_sub(suspect.last) > CRASH_WINDOW_MS;
            if let (Some(place), true) = (place, old) {
                suspects[place].store(0, Relaxed);
            }
            place.is_some() && !old
        });
    }

    fn count(&self, quarantine: &Quarantine) {
        let board = quarantine.board();
        debug_assert!(self.quarantined.len() <= PLACES && self.suspects.len() <= PLACES);
        board
            .suspect_count
            .store(self.suspects.len() as u32, Relaxed);
        board
            .quarantined_count
            .store(self.quarantined.len() as u32, Relaxed);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    struct World {
        quarantine: Quarantine,
        strikes: CrashCounts,
        now: Millis,
    }

    impl World {
        fn new() -> Self {
            World {
                quarantine: Quarantine::new().unwrap(),
                strikes: CrashCounts::default(),
                now: 1000,
            }
        }

        /// A death while these ran; who is caught.
        fn death(&mut self, fault: Fault, culprit: u64, ran: &[u64]) -> Vec<u64> {
            let caught = self.caught(fault, culprit, ran);
            caught.into_iter().map(|(call, _)| call.key).collect()
        }

        /// The same, with who had to leave.
        fn caught(
            &mut self,
            fault: Fault,
            culprit: u64,
            ran: &[u64],
        ) -> Vec<(QuarantinedCall, Option<(QuarantinedCall, u64)>)> {
            self.now += 1000;
            let ran: Vec<_> = ran.iter().map(|&key| (key, format!("m{key}"))).collect();
            let when = (self.now, 0);
            self.strikes
                .death(&self.quarantine, (fault, culprit), &ran, when)
        }

        fn held(&self) -> usize {
            self.strikes.quarantined(&self.quarantine).count()
        }
    }

    #[test]
    fn the_third_death_of_a_call_is_its_last() {
        let mut world = World::new();
        assert!(world.death(Fault::Own, 7, &[5, 7, 9]).is_empty());
        assert!(world.death(Fault::Own, 7, &[5, 7]).is_empty());
        assert!(!world.quarantine.is_quarantined(7));
        assert_eq!(world.death(Fault::Own, 7, &[7, 5]), [7]);
        assert!(world.quarantine.is_quarantined(7) && !world.quarantine.is_quarantined(5));
        let held: Vec<_> = world.strikes.quarantined(&world.quarantine).collect();
        assert_eq!((held.len(), held[0].1), (1, 1), "refused once, just now");
        world.strikes.reset(&world.quarantine);
        assert!(!world.quarantine.is_quarantined(7));
        // and is watched anew
        assert!(world.death(Fault::Own, 7, &[7]).is_empty());
    }

    #[test]
    fn whoever_runs_to_the_end_is_innocent() {
        let mut world = World::new();
        for _ in 0..10 {
            assert!(world.death(Fault::Unknown, 0, &[5]).is_empty());
            world.quarantine.clear_suspicion(5);
        }
        // the culprit is never acquitted, whoever runs beside it
        world.death(Fault::Unknown, 0, &[5, 7]);
        world.quarantine.clear_suspicion(5);
        world.death(Fault::Unknown, 0, &[5, 7]);
        world.quarantine.clear_suspicion(5);
        assert_eq!(world.death(Fault::Unknown, 0, &[5, 7]), [7]);
    }

    #[test]
    fn nobody_is_blamed_for_a_signal_that_was_sent_or_for_what_is_long_ago() {
        let mut world = World::new();
        for _ in 0..10 {
            assert!(world.death(Fault::Sent, 0, &[5]).is_empty());
            assert!(world.death(Fault::Own, 0, &[5]).is_empty());
        }
        world.death(Fault::Own, 5, &[5]);
        world.death(Fault::Own, 5, &[5]);
        world.now += CRASH_WINDOW_MS;
        assert!(world.death(Fault::Own, 5, &[5]).is_empty());
    }

    #[test]
    fn a_kill_counts_when_the_kernel_has_run_out_of_memory_since_the_one_before() {
        let mut strikes = CrashCounts::new(Some(7));
        assert!(!strikes.ran_out_of_memory(Some(7)));
        assert!(strikes.ran_out_of_memory(Some(9)));
        assert!(!strikes.ran_out_of_memory(Some(9)));
        assert!(!strikes.ran_out_of_memory(None));
        assert!(!strikes.ran_out_of_memory(Some(12)), "nobody knows when");
        assert!(!CrashCounts::new(None).ran_out_of_memory(None));
    }

    #[test]
    fn a_full_quarantine_lets_the_call_go_that_was_refused_least() {
        let mut world = World::new();
        for _ in 0..3 {
            let many: Vec<u64> = (1..=PLACES as u64 + 20).collect();
            world.death(Fault::Unknown, 0, &many);
        }
        assert_eq!(world.held(), PLACES);
        assert!(!world.quarantine.is_quarantined(PLACES as u64 + 20));
        for key in (1..=PLACES as u64).filter(|key| *key != 7) {
            assert!(world.quarantine.is_quarantined(key));
        }
        for _ in 0..2 {
            world.death(Fault::Own, 1000, &[1000]);
        }
        let found = world.caught(Fault::Own, 1000, &[1000]);
        let (caught, evicted) = &found[0];
        let (evicted, refused) = evicted.as_ref().unwrap();
        assert_eq!((caught.key, evicted.key, *refused), (1000, 7, 0));
        assert!(world.quarantine.is_quarantined(1000) && !world.quarantine.is_quarantined(7));
        assert_eq!(world.held(), PLACES);
    }
}
