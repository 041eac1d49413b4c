//! The plain form of an answer: `{"out": NAME, "result": …, "id": …}`.
//!
//! [`result`] and [`error`] append a body to a buffer, without a frame's header, so that one
//! write can carry many; [`read`] is the other end of it, for clients and for pool programs'
//! answers. Results and ids go through as the JSON text they are given as: whoever made them
//! vouches for them.

use super::json;
use super::rpc_error::RpcError;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::borrow::Cow;

/// The `out` of every error; no method may answer with it.
pub const ERROR: &str = "error";

/// How a sentence begins that says why something is no answer.
pub(super) const NO_ANSWER: &str = "what came back is no answer: ";

/// Appends the answer of a call that has a result. `result` and `id` must be JSON.
#[cfg(any(test, feature = "internals"))]
pub fn result(out: &mut Vec<u8>, name: &str, result: &str, id: Option<&str>) {
    begin(out, name);
    out.extend_from_slice(result.as_bytes());
    end(out, id);
}

/// Appends the answer of a call that has none. `id` must be JSON.
pub fn error(out: &mut Vec<u8>, error: &RpcError, id: Option<&str>) {
    begin(out, ERROR);
    bare_error(out, error);
    end(out, id);
}

/// Appends an error alone: what stands in the `result` of one, and all that HTTP's bare form has.
pub fn bare_error(out: &mut Vec<u8>, error: &RpcError) {
    out.extend_from_slice(b"{\"code\":");
    json(out, &error.code);
    out.extend_from_slice(b",\"name\":");
    string(out, &error.name);
    out.extend_from_slice(b",\"message\":");
    string(out, &error.message);
    out.extend_from_slice(b",\"started\":");
    out.extend_from_slice(if error.started { b"true" } else { b"false" });
    if let Some(data) = &error.data {
        out.extend_from_slice(b",\"data\":");
        out.extend_from_slice(data.get().as_bytes());
    }
    out.push(b'}');
}

/// An answer as it was received, borrowed from its body.
#[derive(Debug, Clone)]
pub struct Answer<'a> {
    /// The value of `out`.
    pub name: Cow<'a, str>,
    /// The result as JSON text, or the error.
    pub outcome: std::result::Result<&'a str, RpcError>,
    /// The id as JSON text; none when it is absent or null.
    #[cfg_attr(not(any(test, feature = "internals")), allow(dead_code))]
    pub id: Option<&'a str>,
}

/// Reads an answer nested at most `depth` deep. Of an error only the code must be there: a name
/// is taken from the table, and what does not say that it was not started may have been.
///
/// # Errors
/// [`Error::Protocol`] for what is no answer.
pub fn read(body: &[u8], depth: usize) -> Result<Answer<'_>> {
    let text = json::text(body, depth).map_err(|error| no_answer(&error.message))?;
    let envelope: CallMembers<'_> = object(text).ok_or_else(|| no_answer("not an object"))??;
    let outcome = if envelope.out == ERROR {
        let failure: Failure = object(envelope.result.get())
            .ok_or_else(|| no_answer("the result of an error is not an object"))??;
        Err(failure.into())
    } else {
        Ok(envelope.result.get())
    };
    Ok(Answer {
        name: envelope.out,
        outcome,
        id: envelope.id.map(RawValue::get),
    })
}

#[derive(Deserialize)]
struct CallMembers<'a> {
    #[serde(borrow)]
    out: Cow<'a, str>,
    #[serde(borrow)]
    result: &'a RawValue,
    #[serde(borrow)]
    id: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Failure {
    code: i64,
    name: Option<String>,
    #[serde(default)]
    message: String,
    started: Option<bool>,
    data: Option<Box<RawValue>>,
}

impl From<Failure> for RpcError {
    fn from(failure: Failure) -> Self {
        let error = RpcError::new(failure.code, failure.message);
        RpcError {
            name: failure.name.map_or(error.name, Cow::Owned),
            started: failure.started.unwrap_or(true),
            data: failure.data,
            ..error
        }
    }
}

/// `None` where the text is not an object: a derived struct would take an array for one.
fn object<'a, T: Deserialize<'a>>(text: &'a str) -> Option<Result<T>> {
    text.trim_start().starts_with('{').then(|| {
        serde_json::from_str(text).map_err(|error| no_answer(&json::not_json(text, &error).message))
    })
}

fn no_answer(why: &str) -> Error {
    Error::Protocol(format!("{NO_ANSWER}{why}"))
}

/// Appends an answer up to its result, which is to be appended next, as JSON.
pub fn begin(out: &mut Vec<u8>, name: &str) {
    out.extend_from_slice(b"{\"out\":");
    string(out, name);
    out.extend_from_slice(b",\"result\":");
}

/// Ends what [`begin`] began. `id` must be JSON.
pub fn end(out: &mut Vec<u8>, id: Option<&str>) {
    if let Some(id) = id {
        out.extend_from_slice(b",\"id\":");
        out.extend_from_slice(id.as_bytes());
    }
    out.push(b'}');
}

/// Appends a JSON string, escaped as needed.
pub(super) fn string(out: &mut Vec<u8>, text: &str) {
    json(out, text);
}

/// Appends a number or a string as JSON.
pub(super) fn json<T: Serialize + ?Sized>(out: &mut Vec<u8>, value: &T) {
    serde_json::to_writer(out, value).expect("numbers and strings are JSON, and a Vec takes them");
}

#[cfg(test)]
#[path = "answer_tests.rs"]
mod tests;
