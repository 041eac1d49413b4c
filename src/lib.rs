//! preforkd: a prefork RPC server for Linux, nginx's process model for functions.
//!
//! A master binds once, forks one worker per CPU and keeps the workers alive. The workers answer
//! JSON calls over TCP or a unix socket. A program gives the server its functions:
//!
//! ```no_run
//! fn main() -> std::process::ExitCode {
//!     let too_large = || preforkd::RpcError::invalid_params("the sum is too large");
//!     preforkd::Server::new()
//!         .method("add", move |(a, b): (i64, i64)| a.checked_add(b).ok_or_else(too_large))
//!         .run()
//! }
//! ```
//!
//! This program is a whole server. It has all commands, options, signals and configuration keys of
//! the `preforkd` program.
//!
//! - [`Server`] registers methods and runs the server. [`Handler`] and [`Context`] are for methods that
//!   need more than a function: raw JSON, deadline, cancellation, the caller.
//! - [`CallId`] names a call in logs, errors and death records; [`Trace`] is its place in a trace.
//! - [`RpcError`] and [`Code`] are the errors that a method returns.
//! - [`Worker`] and [`StartError`] are for state that is made once per worker.
//! - [`client`] calls a server: one call at a time, many ahead, or from several threads.
//!
//! # For developers of this crate
//!
//! The modules are layers, and imports only go down. From the base: `sys` (system calls), `error`;
//! `throttle`, `logging`; `protocol` (bytes to calls); `link` (what processes share); `config`;
//! `handler` (what answers a call); `worker_init`, `observe` (what operators see); `worker`, `acceptor`, `master` (the
//! kinds of process) and `jobs` (durable jobs); `server`; `client` and `cli`. `tests/architecture` holds the table.
//!
//! To follow one call, read `worker/event_loop.rs`, then `worker/call_dispatcher.rs`. To follow one
//! death of a worker, read `master/main_loop.rs`, then `master/policy/lifecycle.rs`.
//! docs/architecture.md names the file of each behaviour.

mod acceptor;
mod cli;
pub mod client;
mod config;
mod error;
mod handler;
mod jobs;
mod link;
mod logging;
mod master;
mod observe;
mod protocol;
mod server;
mod sys;
mod throttle;
mod worker;
mod worker_init;

pub use handler::handler_state::{StartError, Worker};
pub use handler::job_attempt::JobAttempt;
pub use handler::trace::Trace;
pub use handler::{Context, Handler, Placement};
pub use protocol::{CallId, Code, RpcError};
pub use serde_json::value::RawValue;
pub use server::Server;

/// The items that the fuzz targets and the protocol benchmark use. Not for users: they change without
/// notice.
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod internals {
    pub use crate::error::Error;
    pub use crate::handler::command::output;
    pub use crate::link::{adoption_queue, call_frame};
    pub use crate::master::pid_in;
    pub use crate::protocol::{
        Code, answer, body, call, control, detect, frame, http, json, jsonrpc, line, program,
        reply, trace_context, trace_search,
    };
    pub use crate::sys::memory_file;

    pub mod config {
        pub use crate::config::{OutputFormat, Overrides, keep_restart_only_keys, load_text};
    }
}
