//! Holds the connections that may be closed to make room when a worker is full.

use std::collections::VecDeque;

use crate::sys::event::Token;

/// Connections that may be closed to make room.
#[derive(Debug, Default)]
pub struct SilentConnections {
    /// The result of the last search, oldest first. Connections that have sent something since, or are
    /// closed, are skipped.
    pub(super) found: VecDeque<Token>,
    pub(super) next_search_ms: u64,
    /// The time of the next search, if the worker is still full then; `Timers::arm` keeps it.
    pub(super) deadline: u64,
}
