//! All integration tests, as one binary: `support` is what they share, each other module is a
//! theme with one test per sentence.
//!
//! What a module needs beside the crate (Python, netcat, root, a test suite from a registry) is
//! brought by `tests/run`; a test that can't do without it is `#[ignore]`d with the reason, and
//! `tests/run` runs it where its needs are met.
#![allow(clippy::unwrap_used)]
// What a failing test shows goes to stderr, which libtest captures.
#![allow(clippy::print_stderr, clippy::print_stdout)]
// support/ offers more than the themes of the moment use.
#![allow(dead_code)]

mod support;

mod architecture;
mod cli;
mod faults;
mod lifecycle;
mod pools;
mod protocol;
mod snapshots;
