//! Works with durable jobs (`job`).
//!
//! - [`calls`]: what any client can do, over a listener.
//! - [`operate`]: what only the user of the server can do, over the control socket.
//! - [`check`]: what needs no server.

pub(super) mod calls;
pub(super) mod check;
pub(super) mod operate;
pub mod options;
