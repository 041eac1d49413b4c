//! The errors of calls that a worker itself refuses or gives up.

use crate::protocol::code::Code;
use crate::protocol::rpc_error::{RpcError, excerpt};

/// # Errors
/// `bad-output`, if a result is longer than its limit. Bytes.
pub fn check_size(length: usize, limit: usize) -> Result<(), RpcError> {
    if length <= limit {
        return Ok(());
    }
    let text = format!("a result of {length} bytes; limits.frame allows {limit}");
    Err(RpcError::of(Code::BadOutput, text, true))
}

/// The error of a call that comes while the worker leaves.
pub fn stopping() -> RpcError {
    RpcError::of(Code::Stopping, "the server stops", false)
}

/// The error of a call that has waited for too long before it was read.
pub fn over_when_read() -> RpcError {
    RpcError::of(Code::Timeout, "its time was over when it came", false)
}

/// The error of a call of a method that is not there.
pub fn no_method(name: &str) -> RpcError {
    let text = format!("there is no method {:?} here", excerpt(name));
    RpcError::of(Code::MethodNotFound, text, false)
}

/// The error of a call that `rpc.cancel` has ended.
pub fn cancelled(begun: bool) -> RpcError {
    RpcError::of(Code::Cancelled, "cancelled by its caller", begun)
}

/// The error of a call that waits and has too little time left.
pub fn too_late() -> RpcError {
    let text = "its time would be over before it could be done, so it was not begun";
    RpcError::of(Code::Timeout, text, false)
}

/// The error of a call whose caller has closed the connection.
pub fn caller_gone(begun: bool) -> RpcError {
    RpcError::of(Code::Cancelled, "its caller has disconnected", begun)
}

/// The error of a call that is in quarantine.
pub fn quarantined() -> RpcError {
    let text = "this very call has ended its worker again and again: it is not run any more until the next \
                reload";
    RpcError::of(Code::Crashed, text, false)
}

/// The error of a call whose answer would wait in a worker that has no room for more of them: `limit`,
/// `limits.unfinished`.
pub fn no_room(limit: usize) -> RpcError {
    let text = format!(
        "the answers that wait in this worker are as much as limits.unfinished allows, {limit} bytes; \
         send it again later"
    );
    RpcError::of(Code::Overloaded, text, false)
}
