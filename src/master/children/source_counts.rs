//! Does the master's part of `per-source`. It creates the tables in which processes count the connections of each
//! source, when the first listener has a limit. If a process dies, it clears the counts of that process. The tables
//! are passed on at an upgrade.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::generation_info::GenerationContext;
use crate::link::ids::Slot;
use crate::link::source_table::{SourceLimit, SourceTables, listener_number};
use crate::worker_init::SourceInit;

/// The tables, and the memory file that they are in; `None` until a listener has a limit.
#[derive(Debug, Default)]
pub struct SourceCounts {
    shared: Option<(&'static SourceTables, OwnedFd)>,
}

impl SourceCounts {
    /// Returns the tables and limits for the process in `slot`. `record` is its place in the tables. Creates the
    /// tables if they are needed.
    ///
    /// # Errors
    /// If there is no memory or no descriptor.
    pub fn init(
        &mut self,
        slot: Slot,
        record: usize,
        context: &GenerationContext,
    ) -> io::Result<Option<SourceInit>> {
        let configured = &context.settings.listen;
        let most_at = |index: usize| configured.get(index).map_or(0, |listen| listen.per_source);
        let limits = context.accepted_by(slot);
        let limits = limits
            .map(|(index, listener)| SourceLimit::new(&listener.bound, most_at(index)))
            .collect::<Vec<_>>();
        if self.shared.is_none() && limits.iter().any(|limit| limit.most > 0) {
            self.shared = Some(SourceTables::new()?);
        }
        self.clear(record);
        let tables = self.shared.as_ref();
        Ok(tables.map(|(tables, _)| SourceInit { tables, limits }))
    }

    /// Clears the counts of the process with this record, because it is dead.
    pub fn clear(&self, record: usize) {
        if let Some((tables, _)) = &self.shared {
            tables.clear(record);
        }
    }

    /// Returns how many connections the listener at this address has refused.
    pub fn refusals_of(&self, address: &str) -> u64 {
        let tables = self.shared.as_ref();
        tables.map_or(0, |(tables, _)| {
            tables.refusals_of(listener_number(address))
        })
    }

    /// Returns the descriptor of the tables, for the program after an upgrade.
    pub fn export(&self) -> Option<RawFd> {
        self.shared.as_ref().map(|(_, file)| file.as_raw_fd())
    }

    /// Imports the tables of the program before an upgrade. If the tables have another format, they are not used, and
    /// the connections of the old workers do not count.
    pub fn import(file: Option<OwnedFd>) -> Self {
        let shared = file.and_then(|file| Some((SourceTables::of(&file).ok()?, file)));
        SourceCounts { shared }
    }
}
