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

mod accept;
mod architecture;
mod backpressure;
mod bars;
mod bench;
mod call;
mod chaos;
mod chaos_acts;
mod chaos_ledger;
mod clients;
mod commands;
mod environments;
mod errors;
mod forgery;
mod frames;
mod guard;
mod handoff;
mod hostile;
mod hostile_descriptors;
mod http;
mod http_corpus;
mod idle;
mod injections;
mod json_suite;
mod jsonrpc;
mod keeper;
mod lame_duck;
mod leftovers;
mod library;
mod lifecycle;
mod lines;
mod listeners;
mod manual;
mod nine;
mod overload;
mod pool;
mod pool_leftovers;
mod pool_programs;
mod pools;
mod quarantine;
mod queue;
mod readme;
mod recycle;
mod reload;
mod removed;
mod scaling;
mod serving;
mod snapshots;
mod spreading;
mod start;
mod stop;
mod storms;
mod stuck;
mod systemd;
mod terminal;
mod throttle;
mod trouble;
mod upgrade;
mod upgrade_baseline;
mod upgrade_failures;
mod vanished;
mod verdict;
