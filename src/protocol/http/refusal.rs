//! Names the limits of a request and the answer to a request that is not served.

use crate::protocol::code::Code;
use crate::protocol::rpc_error::RpcError;

/// The most bytes of a head, request line included, and of a trailer section.
pub const HEAD_MAX: usize = 16 * 1024;

/// What a server allows.
#[derive(Debug, Clone, Copy)]
pub struct RequestLimits<'r> {
    /// The most bytes of a body.
    pub body: usize,
    /// The origins whose pages may call.
    pub origins: &'r [String],
}

#[derive(Debug, Clone)]
pub struct RejectedRequest {
    pub status: u16,
    /// What the response says.
    pub error: RpcError,
}

impl RejectedRequest {
    /// Two statuses speak of size, the others of a request that is none.
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
