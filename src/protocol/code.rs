//! Defines all errors that preforkd itself answers with.
//!
//! Each variant is a row of the table. The number and name of a code are an interface and never change.
//! [`RpcError`](super::RpcError) holds the rest of an error answer (message, `started`). A handler may
//! use numbers that are not in this table.

/// A row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code {
    /// Not UTF-8, not JSON, or nested deeper than `limits.depth`.
    ParseError,
    /// Valid JSON, but not a call.
    InvalidRequest,
    /// The method does not exist.
    MethodNotFound,
    /// The handler refused the params.
    InvalidParams,
    /// The handler panicked.
    Internal,
    /// The deadline passed while the call waited or ran.
    Timeout,
    /// The queue is full, or the method is over its rate or concurrency.
    Overloaded,
    /// The process that ran the call died, or the call is quarantined.
    Crashed,
    /// A frame, line or body over `limits.frame`, a too long HTTP head, or an unknown protocol.
    TooLarge,
    /// The server is stopping.
    Stopping,
    /// Cancelled by `rpc.cancel`, or the client closed its connection.
    Cancelled,
    /// A command exited with a nonzero code.
    CommandFailed,
    /// A result over its limit, or an invalid answer of a pool program.
    BadOutput,
    /// The store of jobs is away, broken or full, or gave no answer in time.
    Unavailable,
    /// The id of a job exists with another method or other params.
    Conflict,
    /// The job is unknown or was removed.
    NoSuchJob,
}

impl Code {
    /// All codes in the order of the table.
    pub const ALL: [Code; 16] = [
        Code::ParseError,
        Code::InvalidRequest,
        Code::MethodNotFound,
        Code::InvalidParams,
        Code::Internal,
        Code::Timeout,
        Code::Overloaded,
        Code::Crashed,
        Code::TooLarge,
        Code::Stopping,
        Code::Cancelled,
        Code::CommandFailed,
        Code::BadOutput,
        Code::Unavailable,
        Code::Conflict,
        Code::NoSuchJob,
    ];

    /// Returns the code with this number, if it is in the table.
    pub fn from_number(number: i64) -> Option<Code> {
        Code::ALL.into_iter().find(|code| code.number() == number)
    }

    /// Returns the number, as in `"code"`. The first five are those of JSON-RPC 2.0.
    pub const fn number(self) -> i64 {
        match self {
            Code::ParseError => -32700,
            Code::InvalidRequest => -32600,
            Code::MethodNotFound => -32601,
            Code::InvalidParams => -32602,
            Code::Internal => -32603,
            Code::Timeout => -32001,
            Code::Overloaded => -32002,
            Code::Crashed => -32003,
            Code::TooLarge => -32004,
            Code::Stopping => -32005,
            Code::Cancelled => -32006,
            Code::CommandFailed => -32010,
            Code::BadOutput => -32011,
            Code::Unavailable => -32012,
            Code::Conflict => -32013,
            Code::NoSuchJob => -32014,
        }
    }

    /// Returns the name, as in `"name"`.
    pub const fn name(self) -> &'static str {
        match self {
            Code::ParseError => "parse-error",
            Code::InvalidRequest => "invalid-request",
            Code::MethodNotFound => "method-not-found",
            Code::InvalidParams => "invalid-params",
            Code::Internal => "internal",
            Code::Timeout => "timeout",
            Code::Overloaded => "overloaded",
            Code::Crashed => "crashed",
            Code::TooLarge => "too-large",
            Code::Stopping => "stopping",
            Code::Cancelled => "cancelled",
            Code::CommandFailed => "command-failed",
            Code::BadOutput => "bad-output",
            Code::Unavailable => "unavailable",
            Code::Conflict => "conflict",
            Code::NoSuchJob => "no-such-job",
        }
    }

    /// Returns whether a handler that gives this error has done nothing yet: it refuses the params, or knows no such
    /// method.
    pub const fn is_refusal(self) -> bool {
        matches!(self, Code::InvalidParams | Code::MethodNotFound)
    }

    /// Returns whether the connection is closed after the answer.
    pub const fn closes(self) -> bool {
        matches!(self, Code::TooLarge | Code::Stopping)
    }
}

#[cfg(test)]
mod tests {
    use super::Code;
    use std::collections::BTreeSet;

    #[test]
    fn each_code_has_a_unique_number_and_name() {
        let numbers: BTreeSet<_> = Code::ALL.iter().map(|code| code.number()).collect();
        let names: BTreeSet<_> = Code::ALL.iter().map(|code| code.name()).collect();
        assert_eq!(numbers.len(), Code::ALL.len());
        assert_eq!(names.len(), Code::ALL.len());
    }

    #[test]
    fn a_number_gives_its_code() {
        for code in Code::ALL {
            assert_eq!(Code::from_number(code.number()), Some(code));
        }
        assert_eq!(Code::from_number(-32000), None);
        assert_eq!(Code::from_number(42), None);
    }

    #[test]
    fn only_two_codes_close_the_connection() {
        let closing: Vec<_> = Code::ALL.into_iter().filter(|code| code.closes()).collect();
        assert_eq!(closing, [Code::TooLarge, Code::Stopping]);
    }
}
