//! preforkd: a prefork RPC server for Linux.

pub mod config;
pub mod error;
pub mod logging;
pub mod protocol;
pub mod sys;
