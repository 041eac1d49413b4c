//! Decides about jobs: states, retries, turns of queues, validation and retention.
//!
//! Nothing here reads a clock, makes a random number or a system call. Callers pass the time in milliseconds
//! since 1970 (UTC) and random bits. The engine and the model of the tests call these functions inside their
//! transactions, so a rule is written once.

pub mod enqueue;
#[cfg(test)]
mod enqueue_tests;
pub mod members;
pub mod retention;
pub mod states;
#[cfg(test)]
mod states_tests;
pub mod turns;

/// Milliseconds since 1970 (UTC), by the clock of the engine.
pub type UnixMs = u64;
