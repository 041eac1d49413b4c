//! The ids that master and workers share: pid, slot, generation.
//!
//! Each is a type of its own, so that none is taken for another. They are plain values: making one
//! checks nothing and can't fail.

use std::fmt;

pub use crate::sys::process::Pid;

/// A worker's place, 0 to N-1, or that of a pool process. A respawned process takes the slot of the one
/// that died.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u16);

/// The slot of the first pool; the number of a worker's slot is lower.
const FIRST_POOL: u16 = 0x8000;

impl Slot {
    /// The slot of the pool process of the pool with this number, counted from 0.
    pub fn of_pool(number: usize) -> Slot {
        let number = u16::try_from(number).unwrap_or(u16::MAX);
        Slot(FIRST_POOL.saturating_add(number))
    }

    /// The number of the pool whose pool process has this slot; `None` for a worker's.
    pub fn pool(self) -> Option<usize> {
        self.0.checked_sub(FIRST_POOL).map(usize::from)
    }

    /// What its process is, for the log.
    pub fn role(self) -> &'static str {
        match self.pool() {
            Some(_) => "pool process",
            None => "worker",
        }
    }
}

/// Which configuration a worker was started from: 1 at the start, one more at each reload, also at
/// those that are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(pub u32);

impl Generation {
    /// The generation of a fresh master.
    pub const FIRST: Generation = Generation(1);

    /// The generation after this one.
    #[must_use]
    pub fn next(self) -> Generation {
        Generation(self.0 + 1)
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pool() {
            Some(number) => write!(f, "pool-{number}"),
            None => self.0.fmt(f),
        }
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
