//! The errors of the client, and whether a call can be repeated after them.

use std::fmt;
use std::io;
use std::time::Duration;

use super::job_info::JobInfo;
use crate::error::Error;
use crate::protocol::rpc_error::RpcError;

/// Why there is no connection, or a call has no result.
#[derive(Debug)]
pub enum ClientError {
    /// The text is no address. Says what is wrong and how to write one.
    Address(String),
    /// No server answers at the address.
    NoServer {
        /// The address.
        address: String,
        /// The error of the system.
        source: io::Error,
    },
    /// The params cannot be written as JSON, or are no JSON. Nothing was sent.
    Params(serde_json::Error),
    /// The call is larger than a frame can be; the size in bytes. Nothing was sent.
    TooLarge(usize),
    /// The server answered with an error.
    Refused(RpcError),
    /// The job is dead or cancelled, so it has no result.
    Job(Box<JobInfo>),
    /// The result is not of the requested type.
    Result(serde_json::Error),
    /// The connection failed before the whole call was sent, so the call has not begun.
    NotSent(io::Error),
    /// The connection ended before the answer came. The call may have run.
    Gone(io::Error),
    /// No answer came within the client's own limit. The call may be running.
    TimedOut(Duration),
    /// The received bytes are no answer to this call. The call may have run.
    Protocol(String),
    /// An earlier error closed the connection. Nothing was sent.
    Closed,
    /// The pool was closed or terminated before the call began. Nothing was sent.
    Ended,
    /// The system refused a thread.
    NoThread(io::Error),
}

impl ClientError {
    /// Returns whether it is certain that the call did not begin, so that repeating it is safe.
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
            ClientError::Job(_)
            | ClientError::Result(_)
            | ClientError::Gone(_)
            | ClientError::TimedOut(_)
            | ClientError::Protocol(_) => false,
        }
    }

    /// Returns the error to report if an earlier try failed with `earlier`. An error that is safe to repeat says
    /// nothing of the earlier try, which may have been carried out.
    pub(super) fn or_earlier(self, earlier: Option<ClientError>) -> Self {
        match earlier {
            Some(earlier) if self.is_safe_to_repeat() && !earlier.is_safe_to_repeat() => earlier,
            _ => self,
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
            ClientError::Params(error) => write!(f, "the params are not JSON: {error}"),
            ClientError::TooLarge(bytes) => {
                write!(
                    f,
                    "the call has {bytes} bytes, which is too large for a frame"
                )
            }
            ClientError::Refused(error) => error.fmt(f),
            ClientError::Job(job) => f.write_str(&job.describe()),
            ClientError::Result(error) => {
                write!(f, "the result is not of the requested type: {error}")
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
            ClientError::Ended => f.write_str("the pool was closed before the call began"),
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

/// Copies an error, for each call of a lost connection.
pub(super) fn clone_error(error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), error.to_string())
}

/// Converts to the error of a command, which has an exit code.
impl From<ClientError> for Error {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::NoServer { address, source }
                if source.kind() == io::ErrorKind::PermissionDenied =>
            {
                Error::system_with(
                    format!("connect to {address}"),
                    source,
                    "let this user connect: see mode and socket-group of the listener",
                )
            }
            ClientError::NoServer { address, source } => Error::NoServer {
                place: address,
                source,
            },
            ClientError::Address(_) | ClientError::Params(_) | ClientError::TooLarge(_) => {
                Error::Usage(error.to_string())
            }
            ClientError::Refused(_) | ClientError::Job(_) => Error::Refused(error.to_string()),
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
