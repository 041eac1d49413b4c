//! Defines the error type of the crate and maps it to exit codes.
//!
//! Each variant holds the path, line and value that its message needs: what happened, what follows, what
//! to change. Only `cli` prints an error, once.

use std::fmt;
use std::io;
use std::path::PathBuf;

pub type Result<T> = std::result::Result<T, Error>;

/// A position in a configuration file; line and column start at 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    pub line: usize,
    pub column: usize,
}

/// Everything that can make a command of preforkd fail.
#[derive(Debug)]
pub enum Error {
    /// The command line is wrong (exit code 64).
    Usage(String),
    /// The configuration is wrong (exit code 78).
    Config {
        /// The file, or `None` for an option of the command line.
        file: Option<PathBuf>,
        /// The position in the file, if it is known.
        position: Option<Position>,
        /// The dotted key, such as `workers.count`; empty for a syntax error.
        key: String,
        problem: String,
        /// What to change; may be empty.
        remedy: String,
    },
    /// The operating system refused a request (exit code 71; 77 if a permission is missing).
    System {
        /// What was attempted and on what, such as `bind 127.0.0.1:8080`.
        attempt: String,
        source: io::Error,
        /// What to change; may be empty.
        remedy: String,
    },
    /// Another master holds the pid file (exit code 71).
    AlreadyRunning {
        pid_file: PathBuf,
        /// The pid in the pid file. It is only a hint, because only the lock counts.
        pid: Option<i32>,
        /// Whether the configuration names the pid file, so that another name of the server changes nothing.
        is_configured: bool,
    },
    /// No server answers (exit code 69).
    NoServer {
        /// The address or socket path that was tried.
        place: String,
        source: io::Error,
    },
    /// The peer violates the protocol, or closed the connection before its answer was complete (exit code
    /// 69).
    Protocol(String),
    /// The user is not permitted to do this (exit code 77).
    Permission(String),
    /// A call was answered with an error, or a reload, a scale or an upgrade was refused
    /// (exit code 1).
    Refused(String),
    /// The workers of a new master did not become ready (exit code 71).
    NotReady(String),
    /// The store of durable jobs cannot be used (exit code 71). The text has path, reason and remedy.
    JobStore(String),
    /// The error of a daemon, as its launching process prints it.
    Daemon {
        /// The exit code that belongs to the daemon's error.
        code: u8,
        message: String,
    },
    /// A bug of preforkd (exit code 70).
    Bug(String),
}

impl Error {
    /// Creates a system error without a remedy.
    pub fn system(attempt: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::system_with(attempt, source, "")
    }

    /// Creates a system error with a remedy.
    pub fn system_with(
        attempt: impl Into<String>,
        source: impl Into<io::Error>,
        remedy: impl Into<String>,
    ) -> Self {
        Error::System {
            attempt: attempt.into(),
            source: source.into(),
            remedy: remedy.into(),
        }
    }

    /// Returns the exit code of a command that fails with this error, as in sysexits.h(3head).
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Refused(_) => 1,
            Error::Usage(_) => 64,
            Error::NoServer { .. } | Error::Protocol(_) => 69,
            Error::Bug(_) => 70,
            Error::System { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => 77,
            Error::System { .. }
            | Error::AlreadyRunning { .. }
            | Error::NotReady(_)
            | Error::JobStore(_) => 71,
            Error::Permission(_) => 77,
            Error::Config { .. } => 78,
            Error::Daemon { code, .. } => *code,
        }
    }
}

/// Writes "; REMEDY", or nothing if `remedy` is empty.
fn write_remedy(f: &mut fmt::Formatter<'_>, remedy: &str) -> fmt::Result {
    if remedy.is_empty() {
        Ok(())
    } else {
        write!(f, "; {remedy}")
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Usage(text)
            | Error::Protocol(text)
            | Error::Permission(text)
            | Error::Refused(text)
            | Error::NotReady(text)
            | Error::JobStore(text)
            | Error::Daemon { message: text, .. } => f.write_str(text),
            Error::Config {
                file,
                position,
                key,
                problem,
                remedy,
            } => {
                match (file, position) {
                    (Some(file), Some(at)) => {
                        write!(f, "{}:{}:{}: ", file.display(), at.line, at.column)?;
                    }
                    (Some(file), None) => write!(f, "{}: ", file.display())?,
                    (None, _) => f.write_str("command line: ")?,
                }
                if !key.is_empty() {
                    write!(f, "{key}: ")?;
                }
                f.write_str(problem)?;
                write_remedy(f, remedy)
            }
            Error::System {
                attempt,
                source,
                remedy,
            } => {
                write!(f, "could not {attempt}: {source}")?;
                write_remedy(f, remedy)
            }
            Error::AlreadyRunning {
                pid_file,
                pid,
                is_configured,
            } => {
                write!(f, "another master holds the lock on {}", pid_file.display())?;
                if let Some(pid) = pid {
                    write!(f, " (the file names pid {pid})")?;
                }
                f.write_str(match is_configured {
                    true => {
                        "; the configuration sets pid-file, so give a second server a configuration with another \
                         pid-file and control-socket; or stop the other master"
                    }
                    false => {
                        "; start a second server with --name NAME, which gives it a pid file and a control socket \
                         of its own, or set pid-file and control-socket; or stop the other master"
                    }
                })
            }
            Error::NoServer { place, source } => write!(f, "no server at {place}: {source}"),
            Error::Bug(text) => write!(f, "{text}; this is a bug of preforkd, please report it"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::System { source, .. } | Error::NoServer { source, .. } => Some(source),
            _ => None,
        }
    }
}
