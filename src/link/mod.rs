//! Contains what the processes of a server share: ids, messages, shared memory, the channel between the master
//! and each child, and the links between the other processes.

pub mod access_counts;
pub mod adoption_queue;
pub mod attempt_frame;
pub mod call_frame;
pub mod call_link;
pub mod channel;
pub mod executor_end;
mod frame_fields;
pub mod ids;
pub mod message;
pub mod metrics_board;
pub mod quarantine;
pub mod scoreboard;
pub mod session_draining;
pub mod session_limits;
pub mod session_memory;
pub mod session_table;
pub mod slow_calls;
pub mod source_table;
pub mod stuck_calls;
