//! Defines the ids that master and workers share: slot and generation.
//!
//! Each is a separate type, so that the compiler refuses one for the other. They are plain values without checks.

use std::fmt;

use serde::{Deserialize, Serialize};

pub use crate::sys::process::Pid;

/// The position of a worker (0 to N-1) or of a process of another kind. A respawned process takes the slot
/// of the dead one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Slot(pub u16);

/// The slot of the first pool. Slots of workers are lower.
const FIRST_POOL: u16 = 0x8000;
/// The slot of the first acceptor.
const FIRST_ACCEPTOR: u16 = 0xC000;
/// The slot of the first session. The policy knows none of these: they are the acceptor's children.
const FIRST_SESSION: u16 = 0xD000;

impl Slot {
    /// The slot of the jobs process.
    pub const JOBS: Slot = Slot(FIRST_ACCEPTOR - 1);

    /// Returns the slot of the pool process of a pool; pools are numbered from 0.
    pub fn of_pool(number: usize) -> Slot {
        Slot::numbered(FIRST_POOL, Slot::JOBS.0 - 1, number)
    }

    /// Returns the slot of the acceptor of the isolated listener with this number, counted from 0.
    pub fn of_acceptor(number: usize) -> Slot {
        Slot::numbered(FIRST_ACCEPTOR, FIRST_SESSION - 1, number)
    }

    /// Returns the slot of a session. `number` is its index among the sessions of its listener.
    pub fn of_session(number: usize) -> Slot {
        Slot::numbered(FIRST_SESSION, u16::MAX, number)
    }

    fn numbered(first: u16, last: u16, number: usize) -> Slot {
        let number = u16::try_from(number).unwrap_or(u16::MAX);
        Slot(first.saturating_add(number).min(last))
    }

    /// Returns whether it belongs to a worker.
    pub fn is_worker(self) -> bool {
        self.0 < FIRST_POOL
    }

    /// Returns the number of the pool of this slot.
    pub fn pool(self) -> Option<usize> {
        let is_pool = (FIRST_POOL..Slot::JOBS.0).contains(&self.0);
        is_pool.then(|| usize::from(self.0 - FIRST_POOL))
    }

    /// Returns whether it belongs to the jobs process.
    pub fn is_jobs(self) -> bool {
        self == Slot::JOBS
    }

    /// Returns the number of the isolated listener whose acceptor has this slot.
    pub fn acceptor(self) -> Option<usize> {
        let is_acceptor = (FIRST_ACCEPTOR..FIRST_SESSION).contains(&self.0);
        is_acceptor.then(|| usize::from(self.0 - FIRST_ACCEPTOR))
    }

    /// Returns the index of the session that has this slot.
    pub fn session(self) -> Option<usize> {
        self.0.checked_sub(FIRST_SESSION).map(usize::from)
    }

    /// Returns the number that logs and handlers see: the slot of a worker, or the number within its kind.
    pub fn number(self) -> u16 {
        let first = [FIRST_SESSION, FIRST_ACCEPTOR, Slot::JOBS.0, FIRST_POOL];
        let first = first.into_iter().find(|first| self.0 >= *first);
        self.0 - first.unwrap_or(0)
    }

    /// Returns the kind of its process in one word.
    pub fn kind(self) -> &'static str {
        match self.role() {
            "pool process" => "pool",
            "jobs process" => "jobs",
            "connection process" => "connection",
            role => role,
        }
    }

    /// Names the kind of its process, for the log.
    pub fn role(self) -> &'static str {
        match self.0 {
            _ if self.is_jobs() => "jobs process",
            ..FIRST_POOL => "worker",
            FIRST_POOL..FIRST_ACCEPTOR => "pool process",
            FIRST_ACCEPTOR..FIRST_SESSION => "acceptor",
            FIRST_SESSION.. => "connection process",
        }
    }
}

/// The number of the configuration from which a worker was started: 1 at the start, plus one for each
/// reload that starts processes, even if it fails then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Generation(pub u32);

impl Generation {
    /// The generation of a new master.
    pub const FIRST: Generation = Generation(1);

    #[must_use]
    pub fn next(self) -> Generation {
        Generation(self.0 + 1)
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.is_worker() {
            true => self.0.fmt(f),
            false if self.is_jobs() => f.write_str(self.kind()),
            false => write!(f, "{}-{}", self.kind(), self.number()),
        }
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slot_of_the_jobs_process_is_that_of_no_pool() {
        let last = Slot::of_pool(usize::MAX);
        assert_eq!(last.0 + 1, Slot::JOBS.0);
        assert!(last.pool().is_some() && !last.is_jobs());
        let jobs = Slot::JOBS;
        assert!(jobs.is_jobs() && !jobs.is_worker());
        assert_eq!(
            (jobs.pool(), jobs.acceptor(), jobs.number()),
            (None, None, 0)
        );
        assert_eq!((jobs.role(), &*jobs.to_string()), ("jobs process", "jobs"));
        assert_eq!(Slot::of_pool(2).to_string(), "pool-2");
    }
}
