//! Defines the limits of a request and the answer to a refused request.

use crate::protocol::code::Code;
use crate::protocol::rpc_error::RpcError;

/// The largest number of bytes of a head, including the request line, and of a trailer section.
pub const HEAD_MAX: usize = 16 * 1024;

/// The limits of the server.
#[derive(Debug, Clone, Copy)]
pub struct RequestLimits<'r> {
    /// The largest number of bytes of a body.
    pub body: usize,
    /// The origins whose web pages may call.
    pub origins: &'r [String],
    /// Whether the trace context of a request is read.
    pub traces: bool,
    /// Whether its `X-Request-Id` is read.
    pub request_ids: bool,
    /// Whether a request may become a job.
    pub jobs: bool,
}

#[derive(Debug, Clone)]
pub struct RejectedRequest {
    pub status: u16,
    /// The error in the response.
    pub error: RpcError,
}

impl RejectedRequest {
    /// Statuses 413 and 431 mean that it is too large; all others that it is invalid.
    pub(super) fn new(status: u16, message: impl Into<String>) -> Self {
        let code = match status {
            413 | 431 => Code::TooLarge,
            _ => Code::InvalidRequest,
        };
        RejectedRequest {
            status,
            error: RpcError::of(code, message, false),
        }
    }
}
