//! Encodes and decodes the plain form of an answer: `{"out": NAME, "result": …, "id": …}`.
//!
//! [`result`] and [`error`] append a body without a frame header to a buffer, so that one write can carry
//! many answers. [`read`] decodes answers, for clients and for answers of pool programs. Results and ids
//! must be JSON text; they are passed on unchanged.

use super::call_id::CallId;
use super::code::Code;
use super::json;
use super::rpc_error::RpcError;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::borrow::Cow;

/// The `out` of every error. No method may have this name.
pub const ERROR: &str = "error";

/// The beginning of a message that says why something is not an answer.
pub(super) const NO_ANSWER: &str = "the response is not an answer: ";

/// Appends the answer of a successful call. `result` and `id` must be JSON.
#[cfg(any(test, feature = "internals"))]
pub fn result(out: &mut Vec<u8>, name: &str, result: &str, id: Option<&str>) {
    begin(out, name);
    out.extend_from_slice(result.as_bytes());
    end(out, id);
}

/// Appends an error answer. `id` must be JSON. `call` is the id that the server gave to the call; `None` if the error
/// must not contain it.
pub fn error(out: &mut Vec<u8>, error: &RpcError, id: Option<&str>, call: Option<CallId>) {
    begin(out, ERROR);
    bare_error(out, error, call);
    end(out, id);
}

/// Appends whether the call began, and its id if there is one.
pub(super) fn started(out: &mut Vec<u8>, error: &RpcError, call: Option<CallId>) {
    out.extend_from_slice(b",\"started\":");
    out.extend_from_slice(if error.started { b"true" } else { b"false" });
    if let Some(call) = call {
        out.extend_from_slice(format!(",\"call\":\"{call}\"").as_bytes());
    }
}

/// Returns the bare error as text, without the id of a call.
pub fn bare_error_text(error: &RpcError) -> String {
    let mut json = Vec::new();
    bare_error(&mut json, error, None);
    String::from_utf8(json).expect("an error is written as text")
}

/// Appends the bare error: the `result` of an error answer, and the whole body in HTTP's bare form.
pub fn bare_error(out: &mut Vec<u8>, error: &RpcError, call: Option<CallId>) {
    out.extend_from_slice(b"{\"code\":");
    json(out, &error.code);
    out.extend_from_slice(b",\"name\":");
    string(out, &error.name);
    out.extend_from_slice(b",\"message\":");
    string(out, &error.message);
    started(out, error, call);
    if let Some(data) = &error.data {
        out.extend_from_slice(b",\"data\":");
        out.extend_from_slice(data.get().as_bytes());
    }
    out.push(b'}');
}

/// A received answer, borrowed from its body.
#[derive(Debug, Clone)]
pub struct Answer<'a> {
    /// The value of `out`.
    pub name: Cow<'a, str>,
    /// The result, or the error.
    pub outcome: std::result::Result<&'a RawValue, RpcError>,
    /// The id; `None` if it is absent or null.
    pub id: Option<&'a RawValue>,
}

/// Decodes an answer nested at most `depth` levels. An error needs only a code. Its name is taken from
/// the table. If it does not say `started: false`, it counts as started.
///
/// # Errors
/// [`Error::Protocol`] if it is not an answer.
pub fn read(body: &[u8], depth: usize) -> Result<Answer<'_>> {
    let text = json::text(body, depth).map_err(|error| no_answer(&error.message))?;
    let envelope: CallMembers<'_> = object(text).ok_or_else(|| no_answer("not an object"))??;
    let outcome = if envelope.out == ERROR {
        let failure: Failure = object(envelope.result.get())
            .ok_or_else(|| no_answer("the result of an error is not an object"))??;
        Err(failure.into())
    } else {
        Ok(envelope.result)
    };
    Ok(Answer {
        name: envelope.out,
        outcome,
        id: envelope.id,
    })
}

/// Checks the outcome of a call that another process of the server ran. `name` is the name of the answer. That
/// process has checked the outcome too, but an attacker may control it. A result that is not JSON, or has several
/// lines, could be taken for further answers of the connection.
///
/// # Errors
/// The error that the process sent, or `bad-output` for an invalid result.
pub fn check_forwarded(
    name: Option<&str>,
    outcome: std::result::Result<Vec<u8>, RpcError>,
) -> std::result::Result<Vec<u8>, RpcError> {
    match outcome {
        Ok(mut result) => {
            let problem = match serde_json::from_slice::<&RawValue>(&result) {
                Ok(_) if name == Some(ERROR) => "a result that is called an error".to_owned(),
                Ok(_) => {
                    json::flatten_to_one_line(&mut result);
                    return Ok(result);
                }
                Err(error) => error.to_string(),
            };
            let text = format!("the process that ran the call sent no result: {problem}");
            Err(RpcError::of(Code::BadOutput, text, true))
        }
        Err(error) => Err(RpcError {
            data: error.data.map(unbroken),
            ..error
        }),
    }
}

/// JSON on one line.
pub(super) fn unbroken(data: Box<RawValue>) -> Box<RawValue> {
    if !data.get().contains(['\n', '\r']) {
        return data;
    }
    let text = data.get().replace(['\n', '\r'], " ");
    RawValue::from_string(text).unwrap_or(data)
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

/// Returns `None` if the text is not an object, because a derived struct would also accept an array.
fn object<'a, T: Deserialize<'a>>(text: &'a str) -> Option<Result<T>> {
    text.trim_start().starts_with('{').then(|| {
        serde_json::from_str(text).map_err(|error| no_answer(&json::not_json(text, &error).message))
    })
}

fn no_answer(why: &str) -> Error {
    Error::Protocol(format!("{NO_ANSWER}{why}"))
}

/// Appends an answer up to its result. The caller then appends the result as JSON.
pub fn begin(out: &mut Vec<u8>, name: &str) {
    out.extend_from_slice(b"{\"out\":");
    string(out, name);
    out.extend_from_slice(b",\"result\":");
}

/// Appends the part of the answer after the result. `id` must be JSON.
pub fn end(out: &mut Vec<u8>, id: Option<&str>) {
    if let Some(id) = id {
        out.extend_from_slice(b",\"id\":");
        out.extend_from_slice(id.as_bytes());
    }
    out.push(b'}');
}

/// Appends a JSON string, escaped as needed.
pub(super) fn string(out: &mut Vec<u8>, text: &str) {
    let is_plain = |byte: &u8| *byte >= b' ' && *byte != b'"' && *byte != b'\\';
    if !text.as_bytes().iter().all(is_plain) {
        return json(out, text);
    }
    out.reserve(text.len() + 2);
    out.push(b'"');
    out.extend_from_slice(text.as_bytes());
    out.push(b'"');
}

/// Appends a number or a string as JSON.
pub(super) fn json<T: Serialize + ?Sized>(out: &mut Vec<u8>, value: &T) {
    serde_json::to_writer(out, value).expect("numbers and strings are JSON, and a Vec takes them");
}

#[cfg(test)]
#[path = "answer_tests.rs"]
mod tests;
