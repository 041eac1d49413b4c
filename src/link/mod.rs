//! What stands between master and workers: ids, messages, the socket pair, the scoreboard.

pub mod channel;
pub mod ids;
pub mod message;
pub mod scoreboard;
