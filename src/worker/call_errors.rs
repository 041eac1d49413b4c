//! Creates the errors of calls that a worker itself refuses or gives up.

use crate::handler::registry::Registry;
use crate::protocol::code::Code;
use crate::protocol::rpc_error::{RpcError, excerpt};

/// Checks the length of a result.
///
/// # Errors
/// `bad-output` if it is more than `limit` bytes.
pub fn check_size(length: usize, limit: usize) -> Result<(), RpcError> {
    if length <= limit {
        return Ok(());
    }
    let text = format!("a result of {length} bytes; limits.frame allows {limit}");
    Err(RpcError::of(Code::BadOutput, text, true))
}

/// Returns the error of a call that arrives while the server stops.
pub fn stopping() -> RpcError {
    RpcError::of(Code::Stopping, "the server stops", false)
}

/// Returns the error of a call whose deadline had passed before it was read.
pub fn over_when_read() -> RpcError {
    RpcError::of(
        Code::Timeout,
        "its deadline had passed when it arrived",
        false,
    )
}

/// Returns the error of a call of an unknown method, or of one that only isolated listeners have.
pub fn no_method(registry: &Registry, name: &str) -> RpcError {
    let is_elsewhere = registry.find(name, true).is_some();
    let name = excerpt(name);
    let text = match is_elsewhere {
        true => format!(
            "the method {name:?} keeps state for a connection, so only listeners with isolation = \"connection\" \
             have it"
        ),
        false => format!("there is no method {name:?} here"),
    };
    RpcError::of(Code::MethodNotFound, text, false)
}

/// Returns the error of a call that `rpc.cancel` has cancelled.
pub fn cancelled(begun: bool) -> RpcError {
    RpcError::of(Code::Cancelled, "cancelled by its caller", begun)
}

/// Returns the error of a waiting call whose deadline would pass before it is done.
pub fn too_late() -> RpcError {
    let text = "its deadline would pass before it is done, so it was not begun";
    RpcError::of(Code::Timeout, text, false)
}

/// Returns the error of a call whose client has closed the connection.
pub fn caller_gone(begun: bool) -> RpcError {
    RpcError::of(Code::Cancelled, "its caller has disconnected", begun)
}

/// Returns the error of a quarantined call.
pub fn quarantined() -> RpcError {
    let text = "this call is quarantined, because it crashed its worker repeatedly: it is refused until the next \
                reload";
    RpcError::of(Code::Crashed, text, false)
}

/// Returns the error of a call of a batch whose answer would exceed `limit` bytes, the room for answers that
/// wait in a worker.
pub fn no_room(limit: usize) -> RpcError {
    let text = format!(
        "the waiting answers of this worker have reached {limit} bytes, the limit for calls of a batch; \
         send it again later, or in a smaller batch"
    );
    RpcError::of(Code::Overloaded, text, false)
}
