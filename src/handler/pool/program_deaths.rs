//! Keeps the last deaths of a pool's programs in memory that the pool process shares with the master.
//!
//! It is a ring: the threads of the pool process write, and the master takes the records when it needs them. So
//! programs that die often cost the master nothing. The master does not trust the pool process: lengths and
//! numbers are bounded here, and the reader cleans the texts. An entry that is overwritten before the master
//! takes it is lost.

use std::sync::atomic::{
    AtomicI32, AtomicU32, AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release, fence,
};

use crate::protocol::call_id::CallId;
use crate::sys::process::{Exit, Pid};
use crate::sys::shared_memory::{load_text, load_u128, shared_record, store_text, store_u128};

/// The largest number of deaths that are kept until the master takes them.
const CAPACITY: usize = 100;
/// The room for a reason, in words of eight bytes. A longer reason is cut.
const REASON_WORDS: usize = 32;

/// How a program of a pool ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgramDeath {
    pub pid: Pid,
    pub exit: Exit,
    /// From its start to its end, in milliseconds.
    pub uptime_ms: u64,
    /// The number of the method that it ran.
    pub method: Option<usize>,
    /// The call that it ran.
    pub call: Option<CallId>,
    /// The id of the job if that was an attempt; otherwise 0.
    pub job: u128,
    /// The highest resident memory that it had, in bytes.
    pub rss_bytes: u64,
    pub reason: String,
    /// The wall clock, in unix seconds.
    pub at: u64,
}

shared_record! {
    /// A death, as it lies in shared memory.
    #[derive(Debug)]
    pub struct DeathEntry {
        /// Which death it is, counted from 1; 0: none, or one that is being written.
        number: AtomicU64,
        uptime_ms: AtomicU64,
        rss_bytes: AtomicU64,
        at: AtomicU64,
        /// The number of the call; 0: it ran none.
        call: AtomicU64,
        /// The id of the job in two halves; 0: it ran no attempt.
        job: [AtomicU64; 2],
        /// The bytes of the reason.
        reason: [AtomicU64; REASON_WORDS],
        reason_length: AtomicU32,
        pid: AtomicI32,
        /// The method plus one; 0: it ran none.
        method: AtomicU32,
        /// The exit code, or the number of the signal.
        exit: AtomicI32,
        /// 0: it exited. 1: a signal ended it. 2: a signal that dumped core.
        how: AtomicU32,
        /// The pid in the id of the call.
        home: AtomicI32,
    }
}

shared_record! {
    /// The deaths of the programs of one pool. All zero: none.
    #[derive(Debug)]
    pub struct ProgramDeaths {
        /// How many there were.
        count: AtomicU64,
        entries: [DeathEntry; CAPACITY],
    }
}

impl ProgramDeaths {
    /// Adds a death and replaces the oldest if the ring is full.
    pub(super) fn add(&self, death: &ProgramDeath) {
        let before = self.count.fetch_add(1, Relaxed);
        let entry = &self.entries[before as usize % CAPACITY];
        entry.number.store(0, Relaxed);
        // A reader must not mistake the fields that are written now for those of the replaced death.
        fence(Release);
        let (how, exit) = match death.exit {
            Exit::Code(code) => (0, code),
            Exit::Signal {
                number,
                core_dumped,
            } => (1 + u32::from(core_dumped), number),
        };
        entry.how.store(how, Relaxed);
        entry.exit.store(exit, Relaxed);
        entry.pid.store(death.pid.0, Relaxed);
        entry.uptime_ms.store(death.uptime_ms, Relaxed);
        entry.rss_bytes.store(death.rss_bytes, Relaxed);
        entry.at.store(death.at, Relaxed);
        let method = death.method.map_or(0, |method| method as u32 + 1);
        entry.method.store(method, Relaxed);
        let (home, call) = death.call.map_or((0, 0), |call| (call.pid, call.number));
        entry.home.store(home, Relaxed);
        entry.call.store(call, Relaxed);
        store_u128(&entry.job, death.job);
        let length = store_text(&entry.reason, &death.reason);
        entry.reason_length.store(length, Relaxed);
        entry.number.store(before.wrapping_add(1), Release);
    }

    /// Takes the deaths that were not taken yet, oldest first.
    pub fn take(&self) -> Vec<ProgramDeath> {
        let mut taken: Vec<_> = self.entries.iter().filter_map(DeathEntry::take).collect();
        taken.sort_by_key(|(number, _)| *number);
        taken.into_iter().map(|(_, death)| death).collect()
    }
}

impl DeathEntry {
    fn take(&self) -> Option<(u64, ProgramDeath)> {
        let number = self.number.load(Acquire);
        if number == 0 {
            return None;
        }
        let exit = self.exit.load(Relaxed);
        let death = ProgramDeath {
            pid: Pid(self.pid.load(Relaxed)),
            exit: match self.how.load(Relaxed) {
                0 => Exit::Code(exit),
                how => Exit::Signal {
                    number: exit,
                    core_dumped: how == 2,
                },
            },
            uptime_ms: self.uptime_ms.load(Relaxed),
            method: (self.method.load(Relaxed).checked_sub(1)).map(|method| method as usize),
            call: CallId::recorded(self.home.load(Relaxed), self.call.load(Relaxed)),
            job: load_u128(&self.job),
            rss_bytes: self.rss_bytes.load(Relaxed),
            reason: load_text(&self.reason, self.reason_length.load(Relaxed)),
            at: self.at.load(Relaxed),
        };
        // If the number has changed, another record was written meanwhile. It is taken the next time.
        fence(Acquire);
        let is_whole = (self.number).compare_exchange(number, 0, Relaxed, Relaxed);
        is_whole.is_ok().then_some((number, death))
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;
    use crate::sys::shared_memory::OwnedArray;

    fn death(pid: i32) -> ProgramDeath {
        ProgramDeath {
            pid: Pid(pid),
            exit: Exit::Signal {
                number: 11,
                core_dumped: true,
            },
            uptime_ms: 1_250,
            method: Some(0),
            call: CallId::recorded(7, 12),
            job: 5 << 64 | 6,
            rss_bytes: 1 << 20,
            reason: "was ended by SIGSEGV".into(),
            at: 1_700_000_000,
        }
    }

    #[test]
    fn each_death_is_taken_once_and_the_last_hundred_are_kept() -> std::io::Result<()> {
        let deaths = &OwnedArray::<ProgramDeaths>::new(NonZeroUsize::MIN)?[0];
        assert_eq!(deaths.take(), []);
        let other = ProgramDeath {
            exit: Exit::Code(3),
            method: None,
            call: None,
            job: 0,
            ..death(2)
        };
        deaths.add(&death(1));
        deaths.add(&other);
        assert_eq!(deaths.take(), [death(1), other]);
        assert_eq!(deaths.take(), []);
        (0..250).for_each(|pid| deaths.add(&death(pid)));
        let pids: Vec<i32> = deaths.take().iter().map(|death| death.pid.0).collect();
        assert_eq!(pids, Vec::from_iter(150..250));
        Ok(())
    }

    #[test]
    fn a_pool_process_that_lies_harms_nobody() -> std::io::Result<()> {
        let deaths = &OwnedArray::<ProgramDeaths>::new(NonZeroUsize::MIN)?[0];
        deaths.count.store(u64::MAX, Relaxed);
        deaths.add(&death(1));
        deaths.add(&death(2));
        for entry in &deaths.entries[2..] {
            entry.number.store(u64::MAX, Relaxed);
            entry.how.store(u32::MAX, Relaxed);
            entry.reason_length.store(u32::MAX, Relaxed);
            entry.reason[0].store(u64::MAX, Relaxed);
        }
        let taken = deaths.take();
        assert!((CAPACITY - 2..=CAPACITY).contains(&taken.len()));
        assert!(
            taken
                .iter()
                .all(|death| death.reason.len() <= 3 * 8 * REASON_WORDS)
        );
        Ok(())
    }
}
