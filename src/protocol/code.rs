//! The table of codes: every error that preforkd itself answers with.
//!
//! One row a variant; a code's number and name are an interface and never change. What a caller
//! was told beside them (message, `started`) is in [`RpcError`](super::RpcError). A handler may
//! answer with numbers that are not in this table.

/// A row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code {
    /// Not UTF-8, not JSON, or nested deeper than `limits.depth`.
    ParseError,
    /// JSON, but no call.
    InvalidRequest,
    /// No method of that name.
    MethodNotFound,
    /// The handler refused the params.
    InvalidParams,
    /// The handler panicked.
    Internal,
    /// The call's time was over, while it waited or while it ran.
    Timeout,
    /// No room in the queue, or over the method's rate or concurrency.
    Overloaded,
    /// What ran the call died, or it is quarantined.
    Crashed,
    /// A declared length is over `limits.frame`.
    TooLarge,
    /// The server stops.
    Stopping,
    /// Cancelled by `rpc.cancel`, or the caller left.
    Cancelled,
    /// A command ended non-zero.
    CommandFailed,
    /// A result over its limit, or a pool program's answer that is none.
    BadOutput,
}

impl Code {
    /// All rows, in the order of the table.
    pub const ALL: [Code; 13] = [
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
    ];

    /// The row of a number, where it is in the table.
    pub fn from_number(number: i64) -> Option<Code> {
        Code::ALL.into_iter().find(|code| code.number() == number)
    }

    /// The number, as in `"code"`; the first five are JSON-RPC 2.0's own.
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
        }
    }

    /// The name, as in `"name"`.
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
        }
    }

    /// Whether the connection is closed after the answer.
    pub const fn closes(self) -> bool {
        matches!(self, Code::TooLarge | Code::Stopping)
    }
}

#[cfg(test)]
mod tests {
    use super::Code;
    use std::collections::BTreeSet;

    #[test]
    fn each_row_has_a_number_and_a_name_of_its_own() {
        let numbers: BTreeSet<_> = Code::ALL.iter().map(|code| code.number()).collect();
        let names: BTreeSet<_> = Code::ALL.iter().map(|code| code.name()).collect();
        assert_eq!(numbers.len(), Code::ALL.len());
        assert_eq!(names.len(), Code::ALL.len());
    }

    #[test]
    fn a_number_leads_back_to_its_row() {
        for code in Code::ALL {
            assert_eq!(Code::from_number(code.number()), Some(code));
        }
        assert_eq!(Code::from_number(-32000), None);
        assert_eq!(Code::from_number(42), None);
    }

    #[test]
    fn only_two_rows_close_the_connection() {
        let closing: Vec<_> = Code::ALL.into_iter().filter(|code| code.closes()).collect();
        assert_eq!(closing, [Code::TooLarge, Code::Stopping]);
    }
}
