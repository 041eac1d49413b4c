//! Defines the error of one call: a handler returns it and its caller sees it.
//!
//! [`answer`](super::answer) encodes it. [`crate::error::Error`] is another type: the error of a command.

use super::code::Code;
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};
use std::borrow::Cow;
use std::fmt;

/// Why a call has no result.
#[derive(Debug, Clone)]
pub struct RpcError {
    /// The number that programs check: from the table of [`Code`], or a handler's own.
    pub code: i64,
    /// The name of the code, for people and logs; `"error"` for a handler's own code.
    pub name: Cow<'static, str>,
    /// One sentence for people: what happened and, if possible, what to change.
    pub message: String,
    /// Whether the call began. If false, it is safe to send the call again.
    pub started: bool,
    /// Further data of the handler for its caller.
    pub data: Option<Box<RawValue>>,
}

/// The number of characters of a client's text that a message repeats. The client knows its own text, and
/// escapes could make a long one several times longer.
const EXCERPT: usize = 100;

/// Returns the beginning of `text`, for a message.
pub fn excerpt(text: &str) -> Cow<'_, str> {
    match text.char_indices().nth(EXCERPT) {
        Some((end, _)) => Cow::Owned(format!("{}\u{2026}", &text[..end])),
        None => Cow::Borrowed(text),
    }
}

impl RpcError {
    /// Creates a handler's error. A number of [`Code`]'s table gets the name of its row; any other number
    /// is named `"error"`. The call counts as started, except for invalid params and unknown methods, because
    /// a handler that refuses a call has done nothing yet.
    pub fn new(code: i64, message: impl Into<String>) -> Self {
        let row = Code::from_number(code);
        RpcError {
            code,
            name: Cow::Borrowed(row.map_or("error", Code::name)),
            message: message.into(),
            started: !row.is_some_and(Code::is_refusal),
            data: None,
        }
    }

    /// Creates an error of the table.
    pub fn of(code: Code, message: impl Into<String>, started: bool) -> Self {
        RpcError {
            code: code.number(),
            name: Cow::Borrowed(code.name()),
            message: message.into(),
            started,
            data: None,
        }
    }

    /// Creates the error for params that the method does not accept; the message says what it accepts.
    /// `started` is false, so the caller may send the call again. If the function has already done
    /// something, use [`RpcError::new`] with another code.
    pub fn invalid_params(message: impl Into<String>) -> Self {
        RpcError::of(Code::InvalidParams, message, false)
    }

    /// Replaces the name that [`RpcError::new`] set.
    #[must_use]
    pub fn with_name(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.name = name.into();
        self
    }

    /// Adds data for the caller. If the data cannot be encoded as JSON (for example a map with keys that are not
    /// strings), a string with the reason is sent instead, so that the error still reaches the caller.
    #[must_use]
    pub fn with_data(mut self, data: impl Serialize) -> Self {
        self.data = to_raw_value(&data)
            .or_else(|error| to_raw_value(&format!("data that cannot be encoded: {error}")))
            .ok();
        self
    }

    /// Returns the code of the table; `None` for a handler's own code.
    pub fn table_code(&self) -> Option<Code> {
        Code::from_number(self.code)
    }
}

impl fmt::Display for RpcError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}): {}", self.name, self.code, self.message)
    }
}

impl std::error::Error for RpcError {}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn a_code_of_a_handler_counts_as_started_and_is_named_error() {
        let error = RpcError::new(42, "no such customer");
        assert_eq!(
            (error.code, &*error.name, error.started),
            (42, "error", true)
        );
        assert_eq!(error.to_string(), "error (42): no such customer");
        assert_eq!(error.with_name("no-customer").name, "no-customer");
    }

    #[test]
    fn a_code_of_the_table_always_has_its_name() {
        let error = RpcError::new(-32602, "two numbers, please");
        assert_eq!((&*error.name, error.started), ("invalid-params", false));
        let error = RpcError::of(Code::Timeout, "its 30 s were over", true);
        assert_eq!(
            (error.table_code(), error.started),
            (Some(Code::Timeout), true)
        );
    }

    #[test]
    fn data_that_cannot_be_encoded_keep_the_error() {
        let data = BTreeMap::from([((1, 2), 3)]);
        let error = RpcError::new(7, "seven").with_data(data);
        let text = error.data.unwrap();
        assert!(
            text.get().starts_with("\"data that cannot be encoded: "),
            "{text}"
        );
    }
}
