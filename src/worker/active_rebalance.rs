//! Holds the order to send or adopt connections that is in progress.

/// A rebalance order in progress.
#[derive(Debug, Default)]
pub struct ActiveRebalance {
    /// The number of connections to send when they become quiescent.
    pub(super) give: u32,
    /// Whether recently moved connections are sent too.
    pub(super) after_change: bool,
    /// `Some` while connections are adopted only by order: how many more.
    pub(super) take: Option<u32>,
    /// Its timer; kept by `Timers::arm`.
    pub(super) until: u64,
}

impl ActiveRebalance {
    /// Returns whether a connection that has become quiescent must be sent to a sibling.
    pub fn gives(&self) -> bool {
        self.give > 0
    }
}
