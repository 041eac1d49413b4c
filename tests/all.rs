//! All integration tests as one binary. `support` is shared code; each other module is a topic with one
//! test per scenario.
//!
//! `tests/run` provides what a module needs besides the crate (Python, netcat, root, a test suite from a
//! registry). A test that cannot run without it is `#[ignore]`d with the reason, and `tests/run` runs it
//! where it can.
#![allow(clippy::unwrap_used)]
// Output of a failing test goes to stderr, which libtest captures.
#![allow(clippy::print_stderr, clippy::print_stdout)]
// support/ has more functions than the current tests use.
#![allow(dead_code)]

mod support;

mod access_log;
mod architecture;
mod cli;
mod durable_jobs;
mod faults;
mod isolation;
mod lifecycle;
mod metrics;
mod observe;
mod pools;
mod protocol;
mod slow_log;
mod snapshots;
mod tracing;
