//! Event layer: reports what happens at sockets as completions, over epoll.
//!
//! The layers above do not see readiness. They learn that a connection was accepted, and that bytes were received or
//! sent. Received bytes are lent during the call, so an idle connection owns no buffer.
//!
//! Three rules keep the loop from spinning:
//! - Interest in writing exists only while bytes wait to be written.
//! - A connection whose end was seen is not read again.
//! - A listener that cannot accept (no descriptor left) is removed until `resume_listeners`.
//!
//! An error of a connection is a completion. Only `Reactor::new` and `Reactor::poll_once` fail, if epoll
//! itself fails.

mod accept;
mod completion;
pub mod io_progress;
mod reactor;
mod send_buffer;
mod socket;
#[cfg(test)]
mod tests;

pub use accept::{is_connection_gone, is_queue_shut_down};
pub use completion::{Completion, Interest, Token};
pub use io_progress::{IoProgress, UnsentData};
pub use reactor::{Driver, Reactor};
