//! What stands between master and workers: what a worker starts
//! from, ids, messages, the socket pair, the scoreboard.

pub mod adoption_queue;
pub mod call_frame;
pub mod call_link;
pub mod channel;
pub mod ids;
pub mod message;
pub mod quarantine;
pub mod scoreboard;
pub mod stuck_calls;
