//! The ids that master and workers share: pid, slot, generation.
//!
//! Each is a type of its own, so that none is taken for another. They are plain values: making one
//! checks nothing and can't fail.

use std::fmt;

pub use crate::sys::process::Pid;

/// A worker's place, 0 to N-1. A respawned worker takes the slot of the one that died.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u16);

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
        self.0.fmt(f)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
