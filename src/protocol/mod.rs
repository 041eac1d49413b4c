//! The protocol layer: turns bytes into calls, and answers into bytes.
//!
//! Pure: no system call, no clock, no connection. All input of clients is checked here and nowhere else.
//! So this layer accepts any bytes without a panic, without recursion, and without memory in proportion
//! to a length that was only declared.
//!
//! From the bottom up:
//!
//! | module | what it knows |
//! | --- | --- |
//! | [`code`] | the table of codes: number, name, whether the connection is closed |
//! | [`rpc_error`] | the error that a handler returns and a caller sees |
//! | [`json`] | whether bytes are JSON at all, and not nested too deep |
//! | [`frame`] | where a frame ends |
//! | `envelope` | the members of a call's object, and which occur twice |
//! | [`call`] | the plain form of a call |
//! | [`call_id`], [`job_id`] | the ids that the server gives to a call and to a job |
//! | [`answer`] | the plain form of an answer |
//! | [`jsonrpc`] | the JSON-RPC 2.0 form of both, and batches |
//! | [`body`] | which form a body has |
//! | [`mod@line`], [`http`] | where a line or a request ends, and what the request asks for |
//! | [`trace_context`], [`trace_search`] | the place of a call in a trace, and where it is in a body |
//! | [`program`] | the messages of pool programs |
//! | [`reply`] | an answer in any form and dialect |
//! | [`control`], [`job_control`] | the messages of the control socket |
//! | [`detect`] | the dialect of a connection, from its first four bytes |
//!
//! Other layers decide which methods exist, when a call runs or is given up, and what happens to a
//! connection after an answer. A well-formed call that spells its method without escapes needs no
//! allocation, because its parts are borrowed from the body.

pub mod answer;
pub mod body;
pub mod call;
pub mod call_id;
pub mod cancel;
pub mod code;
pub mod control;
mod death_status;
pub mod detect;
mod envelope;
pub mod frame;
pub mod http;
pub mod job_control;
pub mod job_id;
pub mod json;
pub mod jsonrpc;
pub mod line;
pub mod program;
pub mod reply;
pub mod rpc_error;
mod status_parts;
pub mod trace_context;
pub mod trace_search;

pub use call_id::CallId;
pub use code::Code;
pub use detect::Dialect;
pub use rpc_error::RpcError;
