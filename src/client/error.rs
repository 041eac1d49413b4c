//! Why a call through the client has no result, and what that means for sending it again.

use std::fmt;
use std::io;
use std::time::Duration;

use crate::error::Error;
use crate::protocol::rpc_error::RpcError;

/// Why there is no connection, or a call has no result.
#[derive(Debug)]
pub enum ClientError {
    /// What was given is no address: what is wrong with it, and how it is written.
    Address(String),
    /// Nobody answers there.
    NoServer {
        /// The address.
        address: String,
        /// What the system says.
        source: io::Error,
    },
    /// The params can't be written as JSON, or are none. Nothing was sent.
    Params(serde_json::Error),
    /// The call has more bytes than a frame can tell. Nothing was sent.
    TooLarge(usize),
    /// The server answered with an error.
    Refused(RpcError),
    /// The result is not of the type that was asked for.
    Result(serde_json::Error),
    /// The connection failed before the call was sent whole, so that it can't have begun.
    NotSent(io::Error),
    /// The connection ended before the answer came; the call may have run.
    Gone(io::Error),
    /// No answer came within the client's own limit; the call may be running.
    TimedOut(Duration),
    /// What came is no answer to this call; the call may have run.
    Protocol(String),
    /// An earlier error closed the connection. Nothing was sent.
    Closed,
    /// The pool was closed or terminated before the call's turn came. Nothing was sent.
    Ended,
    /// The system gives no thread for it.
    NoThread(io::Error),
}

impl ClientError {
    /// Whether it is certain that the call did not begin, so that sending it again is safe.
    pub fn is_safe_to_repeat(&self) -> bool {
        match self {
            ClientError::Refused(error) => !error.started,
            ClientError::Address(_)
            | ClientError::NoServer { .. }
            | ClientError::Params(_)
            | ClientError::TooLarge(_)
            | ClientError::NotSent(_)
            | ClientError::Closed
            | ClientError::Ended
            | ClientError::NoThread(_) => true,
            ClientError::Result(_)
            | ClientError::Gone(_)
            | ClientError::TimedOut(_)
            | ClientError::Protocol(_) => false,
        }
    }
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ClientError::Address(text) => f.write_str(text),
            ClientError::NoServer { address, source } => {
                write!(f, "no server at {address}: {source}")
            }
            ClientError::Params(error) => write!(f, "the params are no JSON: {error}"),
            ClientError::TooLarge(bytes) => {
                write!(f, "the call has {bytes} bytes, more than a frame can tell")
            }
            ClientError::Refused(error) => error.fmt(f),
            ClientError::Result(error) => {
                write!(f, "the result is not of the type asked for: {error}")
            }
            ClientError::NotSent(error) => write!(
                f,
                "the connection failed before the call was sent: {error}; the call did not begin"
            ),
            ClientError::Gone(error) => write!(
                f,
                "the connection ended before the answer came: {error}; the call may have run"
            ),
            ClientError::TimedOut(limit) => write!(
                f,
                "no answer within {}; the call may still be running",
                humantime::format_duration(*limit)
            ),
            ClientError::Protocol(text) => f.write_str(text),
            ClientError::Closed => f.write_str("an earlier error closed the connection"),
            ClientError::Ended => f.write_str("the pool was closed before the call's turn came"),
            ClientError::NoThread(error) => write!(f, "start a thread for the client: {error}"),
        }
    }
}

impl std::error::Error for ClientError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ClientError::NoServer { source, .. }
            | ClientError::NotSent(source)
            | ClientError::Gone(source)
            | ClientError::NoThread(source) => Some(source),
            ClientError::Params(error) | ClientError::Result(error) => Some(error),
            ClientError::Refused(error) => Some(error),
            _ => None,
        }
    }
}

/// The same failure once more, for each of the calls that it took along.
pub(super) fn clone_error(error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), error.to_string())
}

/// For commands: each becomes the error whose exit code design.md gives it.
impl From<ClientError> for Error {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::NoServer { address, source }
                if source.kind() == io::ErrorKind::PermissionDenied =>
            {
                Error::system_with(
                    format!("connect to {address}"),
                    source,
                    "ask whoever runs the server to let this user in",
                )
            }
            ClientError::NoServer { address, source } => Error::NoServer {
                place: address,
                source,
            },
            ClientError::Address(_) | ClientError::Params(_) | ClientError::TooLarge(_) => {
                Error::Usage(error.to_string())
            }
            ClientError::Refused(_) => Error::Refused(error.to_string()),
            ClientError::NoThread(source) => Error::system("start a thread for the client", source),
            ClientError::Result(_)
            | ClientError::NotSent(_)
            | ClientError::Ended
            | ClientError::Gone(_)
            | ClientError::TimedOut(_)
            | ClientError::Protocol(_)
            | ClientError::Closed => Error::Protocol(error.to_string()),
        }
    }
}
