//! preforkd: a prefork RPC server for Linux.

pub mod config;
pub mod error;
pub mod handler;
pub mod link;
pub mod logging;
pub mod master;
pub mod protocol;
pub mod server;
pub mod sys;
pub mod worker;

pub use protocol::RpcError;
pub use server::Server;
