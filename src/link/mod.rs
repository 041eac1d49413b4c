//! What master and workers share: ids, messages, the socketpair, the scoreboard; and the links between
//! workers.

pub mod adoption_queue;
pub mod call_frame;
pub mod call_link;
pub mod channel;
pub mod ids;
pub mod message;
pub mod metrics_board;
pub mod quarantine;
pub mod scoreboard;
pub mod session_draining;
pub mod session_limits;
pub mod session_table;
pub mod slow_calls;
pub mod source_table;
pub mod stuck_calls;
