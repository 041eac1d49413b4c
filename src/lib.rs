//! preforkd: a prefork RPC server for Linux, nginx's process model for functions.
//!
//! A master binds once, forks one worker per CPU and keeps them alive; the workers answer JSON
//! calls over TCP. This crate is the daemon and the library behind it:
//!
//! ```no_run
//! fn main() -> std::process::ExitCode {
//!     preforkd::Server::new().method("add", |(a, b): (i64, i64)| Ok(a + b)).run()
//! }
//! ```
//!
//! is a whole server, with all commands, options, signals and the configuration of the `preforkd`
//! program.
//!
//! # The floors
//!
//! Imports go down only; `tests/architecture.rs` holds the table. From the ground up:
//!
//! * [`sys`]: the kernel in safe wrappers, and the only `unsafe`. The event floor in it speaks in
//!   completions: a connection was accepted, these bytes were received.
//! * [`error`], [`logging`], [`throttle`]: the one error type with its exit codes; a log that never
//!   blocks; how soon what died may be started again.
//! * [`protocol`] and [`config`]: bytes to calls and back; a file to settings. Both pure.
//! * [`handler`] and [`link`]: what answers a call; what master and workers share.
//! * [`worker`] | [`master`]: the two kinds of process. Neither knows the other's code, but for the
//!   one place where the master forks and the child becomes a worker.
//! * [`server`]: joins them.
//! * [`client`] and [`cli`]: a blocking client, and the commands.
//!
//! To follow one call, read `worker::event_loop`, then `worker::service`; to follow one death,
//! `master::supervise`, then `master::life`.

mod cli;
pub mod client;
mod config;
mod error;
mod handler;
mod link;
mod logging;
mod master;
mod protocol;
mod server;
mod sys;
mod throttle;
mod worker;
mod worker_init;

pub use handler::handler_state::{StartError, Worker};
pub use handler::{Context, Handler, Placement};
pub use protocol::{Code, RpcError};
pub use serde_json::value::RawValue;
pub use server::Server;

/// What the fuzz targets and the benchmark of the protocol call. Not for users: it changes without
/// notice.
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod internals {
    pub use crate::error::Error;
    pub use crate::handler::command::output;
    pub use crate::link::adoption_queue;
    pub use crate::master::pid_in;
    pub use crate::protocol::{
        Code, answer, body, call, control, detect, frame, http, json, jsonrpc, line, program, reply,
    };
    pub use crate::sys::socket;

    pub mod config {
        pub use crate::config::{OutputFormat, Overrides, keep_restart_only_keys, load_text};
    }
}
