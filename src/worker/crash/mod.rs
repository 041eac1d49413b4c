//! Keeps connections alive when a worker crashes.
//!
//! The worker's event loop writes what it does to the `journal`, in shared memory. If the worker
//! dies, its `keeper` reads the journal, `recovery` decides what becomes of each connection, and
//! the keeper hands them to other workers or closes them.

pub mod journal;
pub mod keeper;
pub mod recovery;
pub mod unrecorded_sockets;
