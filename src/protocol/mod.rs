//! The protocol layer: bytes to calls, and answers to bytes.
//!
//! Pure: no system call, no clock, no connection. What a stranger can send is judged here and
//! nowhere else, so everything in this layer takes any bytes at all without panicking, without
//! recursion, and without memory in proportion to a length that was only declared.
//!
//! From the bottom up:
//!
//! | module | what it knows |
//! | --- | --- |
//! | [`code`] | the table of codes: number, name, whether the connection is closed |
//! | [`rpc_error`] | the error that a handler returns and a caller sees |
//! | [`json`] | whether bytes are JSON at all, and not nested too deep |
//! | [`frame`] | where a frame ends |
//! | `envelope` | which members a call's object has, and which of them twice |
//! | [`call`] | the plain form of a call |
//! | [`answer`] | the plain form of an answer |
//! | [`jsonrpc`] | the JSON-RPC 2.0 form of both, and batches |
//! | [`body`] | which form a body has |
//! | [`mod@line`], [`http`] | where a line ends, where a request does; what it asks for |
//! | [`program`] | what a pool program is told and answers |
//! | [`reply`] | an answer in any form and dialect |
//! | [`detect`] | which dialect a connection's first four bytes speak |
//!
//! It leaves to others: which methods there are, when a call is begun or given up, and what is
//! done with a connection after an answer. Nothing is allocated for a call that is well-formed
//! and spells its method without escapes: its parts are borrowed from the body.

pub mod answer;
pub mod body;
pub mod call;
pub mod cancel;
pub mod code;
pub mod control;
pub mod detect;
mod envelope;
pub mod frame;
pub mod http;
pub mod json;
pub mod jsonrpc;
pub mod line;
pub mod program;
pub mod reply;
pub mod rpc_error;

pub use code::Code;
pub use detect::Dialect;
pub use rpc_error::RpcError;
