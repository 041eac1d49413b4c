//! Holds the order to send or adopt connections that is in progress.

/// An order under way.
#[derive(Debug, Default)]
pub struct ActiveRebalance {
    /// Connections that are to be given as they come to rest.
    pub(super) give: u32,
    /// Also those that were moved lately.
    pub(super) after_change: bool,
    /// `Some` while the queue is taken from by order alone: so many more.
    pub(super) take: Option<u32>,
    /// Its timer; `Timers::arm` keeps it.
    pub(super) until: u64,
}

impl ActiveRebalance {
    /// Whether a connection that has come to rest is to be given away.
    pub fn gives(&self) -> bool {
        self.give > 0
    }
}
