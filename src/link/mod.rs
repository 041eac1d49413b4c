//! What stands between master and workers: what a worker starts
//! from, ids, messages, the socket pair, the scoreboard.

pub mod boot;
pub mod channel;
pub mod handoff;
pub mod ids;
pub mod jitter;
pub mod message;
pub mod quarantine;
pub mod scoreboard;
pub mod stuck;
