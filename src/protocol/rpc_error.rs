//! The error of one call: what a handler returns and what its caller sees.
//!
//! It says nothing about its form on the wire; [`answer`](super::answer) writes it. Not to be
//! mistaken for [`crate::error::Error`], which ends a command of preforkd.

use super::code::Code;
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};
use std::borrow::Cow;
use std::fmt;

/// Why a call has no result.
#[derive(Debug, Clone)]
pub struct RpcError {
    /// What programs decide by: a number of [`Code`]'s table, or a handler's own.
    pub code: i64,
    /// The code's name, for people and logs; `"error"` for a handler's own code.
    pub name: Cow<'static, str>,
    /// One sentence for people: what happened, and where it can be said, what to change.
    pub message: String,
    /// Whether the call began. `false` is a promise: sending it again is safe.
    pub started: bool,
    /// Whatever else the handler wants its caller to have.
    pub data: Option<Box<RawValue>>,
}

/// Characters of a client's own words that a message repeats: whoever sends a name of a megabyte
/// knows it already, and escapes would make it several.
const EXCERPT: usize = 100;

/// The beginning of `text`, for a message.
pub fn excerpt(text: &str) -> Cow<'_, str> {
    match text.char_indices().nth(EXCERPT) {
        Some((end, _)) => Cow::Owned(format!("{}\u{2026}", &text[..end])),
        None => Cow::Borrowed(text),
    }
}

impl RpcError {
    /// A handler's error. A number of [`Code`]'s table gets that row's name, any other is called
    /// `"error"`. The call counts as started, save for invalid params: a handler that refuses
    /// those has done nothing yet.
    pub fn new(code: i64, message: impl Into<String>) -> Self {
        let row = Code::from_number(code);
        RpcError {
            code,
            name: Cow::Borrowed(row.map_or("error", Code::name)),
            message: message.into(),
            started: row != Some(Code::InvalidParams),
            data: None,
        }
    }

    /// An error of the table.
    pub fn of(code: Code, message: impl Into<String>, started: bool) -> Self {
        RpcError {
            code: code.number(),
            name: Cow::Borrowed(code.name()),
            message: message.into(),
            started,
            data: None,
        }
    }

    /// The params are not what the method takes; the message says what it takes. The caller is told
    /// that the call did not begin (`started` is false), and may make it again: for a function that has
    /// done something by then, [`RpcError::new`] with a code of its own is right.
    pub fn invalid_params(message: impl Into<String>) -> Self {
        RpcError::of(Code::InvalidParams, message, false)
    }

    /// With another name than [`RpcError::new`] gave it.
    #[must_use]
    pub fn with_name(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.name = name.into();
        self
    }

    /// With data for the caller. Where they can't be written as JSON (a map whose keys are no
    /// strings), a string that says so stands in their place: an error's own trouble must not
    /// hide the error.
    #[must_use]
    pub fn with_data(mut self, data: impl Serialize) -> Self {
        self.data = to_raw_value(&data)
            .or_else(|error| to_raw_value(&format!("data that can't be written: {error}")))
            .ok();
        self
    }

    /// The row of the table, unless the code is a handler's own.
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
    fn a_handlers_own_code_counts_as_started_and_has_a_plain_name() {
        let error = RpcError::new(42, "no such customer");
        assert_eq!(
            (error.code, &*error.name, error.started),
            (42, "error", true)
        );
        assert_eq!(error.to_string(), "error (42): no such customer");
        assert_eq!(error.with_name("no-customer").name, "no-customer");
    }

    #[test]
    fn a_code_of_the_table_has_its_name_whoever_answers_it() {
        let error = RpcError::new(-32602, "two numbers, please");
        assert_eq!((&*error.name, error.started), ("invalid-params", false));
        let error = RpcError::of(Code::Timeout, "its 30 s were over", true);
        assert_eq!(
            (error.table_code(), error.started),
            (Some(Code::Timeout), true)
        );
    }

    #[test]
    fn data_that_cannot_be_written_leave_the_error_in_place() {
        let data = BTreeMap::from([((1, 2), 3)]);
        let error = RpcError::new(7, "seven").with_data(data);
        let text = error.data.unwrap();
        assert!(
            text.get().starts_with("\"data that can't be written: "),
            "{text}"
        );
    }
}
