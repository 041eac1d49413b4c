//! The base layer: safe wrappers of system calls, and the only place with `unsafe` code.
//!
//! One file per concern. This layer knows nothing of calls, workers or configuration. The head of each
//! file says how it fails.

pub mod account;
pub mod attached;
pub mod bounded;
pub mod clone_files;
pub mod closer;
pub mod daemon;
pub mod descriptor;
pub mod event;
pub mod guard;
// Without an engine there is no store whose lock is looked at.
#[cfg_attr(not(feature = "jobs-sqlite"), allow(dead_code))]
pub mod instance_lock;
pub mod lock;
pub mod memory;
pub mod memory_file;
pub mod notify;
pub mod other_writer;
pub mod privilege;
pub mod process;
pub mod process_facts;
pub mod process_tree;
pub mod random;
pub mod reexec;
pub mod rights;
pub mod shared_memory;
pub mod signal;
pub mod socket;
pub mod spawn;
pub mod thread_state;
pub mod timer;
pub mod title;
pub mod waker;
