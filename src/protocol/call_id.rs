//! The id of a call, as logs, status, errors and environments have it: `4712.90211`.
//!
//! The id has two parts: the pid of the process that has the connection of the call, and the number of the call in
//! that process. The numbers begin at 1. Numbers from [`PROGRAMS`] on belong to no call: they mark the programs of
//! pools.

use std::fmt;
use std::num::ParseIntError;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The first number that no call has. With a million calls per second a process gets there in 31 years.
pub const PROGRAMS: u64 = 1_000_000_000_000_000;

/// The id of a call; unique while the process that has its connection lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct CallId {
    /// The pid of the process that has the connection of the call.
    pub pid: i32,
    /// The number of the call in that process.
    pub number: u64,
}

/// What ran a call, besides the process that has its connection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CallRunner {
    /// The pid of the process that ran it; 0: the one that has the connection.
    pub process: i32,
    /// The pid of its command or of the program of a pool; 0: none, or not known.
    pub program: i32,
    /// The CPU time of its command.
    pub cpu: Duration,
    /// The highest resident memory of its command; 0: it had none.
    pub max_rss_bytes: u64,
}

impl CallId {
    /// Returns the id that shared memory has: `None` if the number is 0.
    pub fn recorded(pid: i32, number: u64) -> Option<Self> {
        (number > 0).then_some(CallId { pid, number })
    }
}

impl fmt::Display for CallId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.pid, self.number)
    }
}

/// Why a text is no id of a call.
#[derive(Debug)]
pub struct InvalidCallId;

impl fmt::Display for InvalidCallId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the id of a call is PID.NUMBER")
    }
}

impl std::error::Error for InvalidCallId {}

impl From<ParseIntError> for InvalidCallId {
    fn from(_: ParseIntError) -> Self {
        InvalidCallId
    }
}

impl FromStr for CallId {
    type Err = InvalidCallId;

    fn from_str(text: &str) -> Result<Self, InvalidCallId> {
        let (pid, number) = text.split_once('.').ok_or(InvalidCallId)?;
        Ok(CallId {
            pid: pid.parse()?,
            number: number.parse()?,
        })
    }
}

impl From<CallId> for String {
    fn from(call: CallId) -> Self {
        call.to_string()
    }
}

impl TryFrom<String> for CallId {
    type Error = InvalidCallId;

    fn try_from(text: String) -> Result<Self, InvalidCallId> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_read_as_it_was_written() {
        let call = CallId {
            pid: 4712,
            number: 90_211,
        };
        assert_eq!(call.to_string(), "4712.90211");
        assert_eq!("4712.90211".parse().ok(), Some(call));
        for text in ["", "4712", ".", "4712.", ".1", "a.1", "1.b", "1.2.3"] {
            assert!(text.parse::<CallId>().is_err(), "{text}");
        }
        assert_eq!(CallId::recorded(7, 0), None);
    }
}
