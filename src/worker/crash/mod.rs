//! Keeps connections alive when a worker crashes.
//!
//! The worker's event loop records what it does in the `journal`, in shared memory. If the worker dies,
//! its `keeper` reads the journal, `recovery` decides what to do with each connection, and the keeper
//! hands it to other workers or closes it.

pub mod call_record;
pub mod journal;
pub mod keeper;
pub mod recovery;
pub mod unrecorded_sockets;
