//! The ground floor: safe wrappers around what the kernel offers, and the only place with
//! `unsafe` in it.
//!
//! One file per concern. Nothing here knows of calls, workers or configuration; each file says in
//! its head how it fails.

pub mod account;
pub mod bounded;
pub mod closer;
pub mod daemon;
pub mod descriptor;
pub mod event;
pub mod exec;
mod execute;
pub mod guard;
pub mod lock;
pub mod memory;
pub mod notify;
pub mod privilege;
pub mod process;
pub mod rights;
pub mod shared;
pub mod signal;
pub mod socket;
pub mod spawn;
pub mod task;
pub mod timer;
pub mod title;
pub mod tree;
pub mod twin;
pub mod waker;
