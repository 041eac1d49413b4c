//! Defines what can be wrong with a store, and what follows from it.
//!
//! A [`StoreError`] is a fault of an open store. An [`OpenError`] says why a store is refused at the start.

use std::fmt;
use std::path::PathBuf;

/// The kind of a fault. It decides what the jobs process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreFault {
    /// The disk is full. Nothing is stored; try again every second.
    Full,
    /// The store cannot be reached or read now. Open it again, with a growing delay.
    Away,
    /// A sync has failed. The kernel may have dropped the data and would report success the next time, so the
    /// process must exit. The next one opens the store afresh.
    SyncFailed,
    /// The store is damaged. Nothing more is written until an operator has acted.
    Corrupt,
}

/// A fault of an open store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreError {
    pub fault: StoreFault,
    /// What was attempted, and what the library said.
    pub detail: String,
    /// Whether the group may be stored all the same. Then an enqueue is answered with `started: true`.
    pub is_maybe_stored: bool,
}

impl StoreError {
    /// Creates an error of a request that is certainly not stored.
    pub fn new(fault: StoreFault, detail: impl Into<String>) -> Self {
        StoreError {
            fault,
            detail: detail.into(),
            is_maybe_stored: false,
        }
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)
    }
}

impl std::error::Error for StoreError {}

/// Why a store cannot be used. The message has the path, the reason and the remedy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenError {
    pub path: PathBuf,
    /// What is wrong.
    pub problem: String,
    /// What to change.
    pub remedy: String,
    pub fault: OpenFault,
}

/// What follows from an [`OpenError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenFault {
    /// An operator has to change something.
    Unusable,
    /// Another process still holds the store, so waiting may help.
    Away,
    /// The store is damaged, so an operator has to act before anything is written.
    Damaged,
}

impl OpenError {
    pub fn new(
        path: impl Into<PathBuf>,
        problem: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        OpenError {
            path: path.into(),
            problem: problem.into(),
            remedy: remedy.into(),
            fault: OpenFault::Unusable,
        }
    }

    /// Says that the store is damaged.
    #[must_use]
    pub fn damaged(self) -> Self {
        OpenError {
            fault: OpenFault::Damaged,
            ..self
        }
    }

    /// Says that another process still holds the store.
    #[must_use]
    pub fn away(self) -> Self {
        OpenError {
            fault: OpenFault::Away,
            ..self
        }
    }
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        write!(f, "job store {path}: {}; {}", self.problem, self.remedy)
    }
}

impl std::error::Error for OpenError {}

impl From<OpenError> for crate::error::Error {
    fn from(error: OpenError) -> Self {
        crate::error::Error::JobStore(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_store_is_named_with_reason_and_remedy() {
        let error = OpenError::new("/var/lib/x.db", "it is a text file", "name another file");
        let error = crate::error::Error::from(error);
        assert_eq!(
            error.to_string(),
            "job store /var/lib/x.db: it is a text file; name another file"
        );
        assert_eq!(error.exit_code(), 71);
    }
}
