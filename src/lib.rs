//! preforkd: a prefork RPC server for Linux.
#![warn(missing_docs)]

pub mod error;
