//! Holds the memory of all session records, and finds the record of a process of any kind for a link.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;

use super::scoreboard::{RECORDS, WorkerRecord};
use super::session_table::{RANGES, SESSIONS, SessionRecord};
use crate::sys::shared_memory;

const LENGTH: NonZeroUsize = NonZeroUsize::new(SESSIONS * RANGES).expect("there are some");

/// All records, and the memory file that they are in.
#[derive(Debug)]
pub struct SessionTable {
    records: &'static [SessionRecord],
    file: OwnedFd,
}

impl SessionTable {
    /// Creates an empty table.
    ///
    /// # Errors
    /// If there is no memory or no descriptor.
    pub fn new() -> io::Result<Self> {
        let (records, file) = shared_memory::array(LENGTH)?;
        Ok(SessionTable { records, file })
    }

    /// Maps the table that the master before an upgrade has created.
    ///
    /// # Errors
    /// If there is no memory, or the file is too short.
    pub fn of(file: OwnedFd) -> io::Result<Self> {
        let records = shared_memory::array_in(&file, LENGTH)?;
        Ok(SessionTable { records, file })
    }

    pub fn file(&self) -> &OwnedFd {
        &self.file
    }

    pub fn records(&self) -> &'static [SessionRecord] {
        self.records
    }

    /// Returns the records of one listener. `range` must be below `RANGES`.
    pub fn range(&self, range: usize) -> &'static [SessionRecord] {
        &self.records[range * SESSIONS..][..SESSIONS]
    }
}

/// Returns the index that links use for the record of a session. These indices follow those of the scoreboard.
pub fn link_index(session: usize) -> usize {
    RECORDS + session
}

/// Returns the record of a worker or session by the index that links use.
pub fn shown<'a>(
    records: &'a [WorkerRecord],
    sessions: &'a [SessionRecord],
    index: usize,
) -> Option<&'a WorkerRecord> {
    match index.checked_sub(RECORDS) {
        None => records.get(index),
        Some(session) => sessions.get(session).map(|session| &session.worker),
    }
}
