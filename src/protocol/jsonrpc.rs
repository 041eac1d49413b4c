//! Encodes and decodes the JSON-RPC 2.0 form of calls and answers (jsonrpc.org/specification).
//!
//! A call without an id is a notification and is never answered; a null id is an id. An error with a code
//! of the specification has the message of the specification. `data` contains the rest: `name`,
//! `started`, and `detail` or the handler's own `data`. `timeout_ms` has the same meaning as in the plain
//! form.

use super::answer;
use super::call::{Call, InvalidCall, decoded, invalid, offset, wrong};
use super::call_id::CallId;
use super::code::Code;
use super::envelope::{CallMembers, Member};
use super::rpc_error::RpcError;
use serde::de::{Deserializer, SeqAccess, Visitor};
use serde_json::value::RawValue;
use std::fmt;

const VERSION: &str = "\"2.0\"";

/// The id of an answer to a call whose id could not be read or was null.
pub const NULL: &str = "null";

impl<'a> CallMembers<'a> {
    /// Checks the members of a call in this form. `text` is the body, so that messages can name
    /// positions.
    pub(super) fn into_request(self, text: &'a str) -> Result<Call<'a>, InvalidCall<'a>> {
        let id = self.request_id(text);
        let echoed = id.as_ref().ok().copied().flatten();
        let call = || {
            self.no_member_twice(text)?;
            match self.get(Member::Jsonrpc) {
                Some(VERSION) => {}
                Some(other) => return Err(wrong(text, "jsonrpc", other, "\"2.0\"")),
                None => {
                    let text = "`jsonrpc` is missing; a batch consists of JSON-RPC 2.0 calls";
                    return Err(invalid(text.to_owned()));
                }
            }
            if let Some(name) = self.get(Member::In) {
                let at = offset(text, name);
                return Err(invalid(format!(
                    "`in` (at byte {at}) in a JSON-RPC 2.0 call; `method` alone names the method"
                )));
            }
            let Some(method) = self.get(Member::Method) else {
                let text = "`method` is missing; it names the method";
                return Err(invalid(text.to_owned()));
            };
            Ok(Call {
                method: decoded(text, "method", method)?,
                params: self.request_params(text)?,
                id: id?,
                timeout_ms: self.timeout_ms(text)?,
            })
        };
        call().map_err(|error| InvalidCall { error, id: echoed })
    }

    /// Returns the id: a string, a number or null; `None` for a notification.
    fn request_id(&self, text: &str) -> Result<Option<&'a str>, RpcError> {
        if self.again(Member::Id).is_some() {
            return Ok(None);
        }
        match self.get(Member::Id) {
            None => Ok(None),
            Some(raw) => match raw.as_bytes() {
                [b'"' | b'-' | b'0'..=b'9' | b'n', ..] => Ok(Some(raw)),
                _ => Err(wrong(text, "id", raw, "a string, a number or null")),
            },
        }
    }

    fn request_params(&self, text: &str) -> Result<&'a str, RpcError> {
        match self.get(Member::Params) {
            // Some clients write null if there are no params.
            None | Some(NULL) => Ok(NULL),
            Some(raw) if raw.starts_with(['[', '{']) => Ok(raw),
            Some(raw) => Err(wrong(text, "params", raw, "an array or an object")),
        }
    }
}

/// Decodes `raw`, a call of the batch `text`, whose grammar is already checked.
pub fn member<'a>(text: &'a str, raw: &'a str) -> Result<Call<'a>, InvalidCall<'a>> {
    let refused = |error| InvalidCall { error, id: None };
    if !raw.starts_with('{') {
        let at = offset(text, raw);
        let text = format!(
            "at byte {at} of the batch: {}",
            super::call::not_a_call(raw)
        );
        return Err(refused(invalid(text)));
    }
    let envelope =
        CallMembers::read(raw).map_err(|error| refused(super::json::not_json(raw, &error)))?;
    envelope.into_request(text)
}

/// The elements of a batch as JSON text, up to a limit.
#[derive(Debug)]
pub struct Elements<'a> {
    pub first: Vec<&'a str>,
    /// The number of all elements.
    pub count: usize,
}

/// Splits an array into its elements and keeps the first `most` of them.
///
/// # Errors
/// If the text is not an array.
pub fn elements(text: &str, most: usize) -> serde_json::Result<Elements<'_>> {
    let mut reader = serde_json::Deserializer::from_str(text);
    let found = reader.deserialize_seq(ElementsVisitor { most })?;
    reader.end()?;
    Ok(found)
}

struct ElementsVisitor {
    most: usize,
}

impl<'de> Visitor<'de> for ElementsVisitor {
    type Value = Elements<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a batch")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Elements<'de>, A::Error> {
        let (mut first, mut count) = (Vec::new(), 0);
        while let Some(element) = seq.next_element::<&RawValue>()? {
            count += 1;
            if first.len() < self.most {
                first.push(element.get());
            }
        }
        Ok(Elements { first, count })
    }
}

/// Appends an answer up to its result. The caller then appends the result as JSON.
pub fn begin(out: &mut Vec<u8>) {
    out.extend_from_slice(b"{\"jsonrpc\":\"2.0\",\"result\":");
}

/// Appends the part of the answer after the result. `id` must be JSON.
pub fn end(out: &mut Vec<u8>, id: Option<&str>) {
    out.extend_from_slice(b",\"id\":");
    out.extend_from_slice(id.unwrap_or(NULL).as_bytes());
    out.push(b'}');
}

/// Appends an error answer. `id` must be JSON; `call` as in [`answer::error`].
pub fn error(out: &mut Vec<u8>, error: &RpcError, id: Option<&str>, call: Option<CallId>) {
    let standard = match error.table_code() {
        Some(Code::ParseError) => Some("Parse error"),
        Some(Code::InvalidRequest) => Some("Invalid Request"),
        Some(Code::MethodNotFound) => Some("Method not found"),
        _ => None,
    };
    out.extend_from_slice(b"{\"jsonrpc\":\"2.0\",\"error\":{\"code\":");
    answer::json(out, &error.code);
    out.extend_from_slice(b",\"message\":");
    answer::string(out, standard.unwrap_or(&error.message));
    out.extend_from_slice(b",\"data\":{\"name\":");
    answer::string(out, &error.name);
    answer::started(out, error, call);
    if standard.is_some() {
        out.extend_from_slice(b",\"detail\":");
        answer::string(out, &error.message);
    }
    if let Some(data) = &error.data {
        out.extend_from_slice(b",\"data\":");
        out.extend_from_slice(data.get().as_bytes());
    }
    out.extend_from_slice(b"}}");
    end(out, id);
}

#[cfg(test)]
#[path = "jsonrpc_tests.rs"]
mod tests;
