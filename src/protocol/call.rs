//! Encodes and decodes the plain form of a call: `{"in": "ping", "params": …, "id": …, "timeout_ms": …}`.
//!
//! [`parse`] reads a body once and borrows from it. Params and id stay byte for byte as they were
//! written. Params may be any JSON by the grammar of RFC 8259. A number of 40 digits, a duplicate member
//! inside them and a lone surrogate (`"\ud800"`) are passed on, and the handler decides. A handler that
//! wants a Rust `String` refuses a lone surrogate as invalid params. Only a method name must be valid
//! text, because it is compared.
//!
//! A filter in front of the server must not see another method than the server does. So duplicate members
//! of the call are refused, even if one is spelt with escapes, and so is `in` beside `method`. Other
//! members are ignored. The grammar is checked first, up to the end of the body. So the refusal of one
//! member still echoes an id behind it.
//!
//! [`body`](super::body) finds the form of a body; this module decodes the plain form.

use super::code::Code;
use super::envelope::{CallMembers, Member, inside_quotes};
use super::rpc_error::RpcError;
use std::borrow::Cow;

/// The methods of the protocol itself.
pub const CANCEL: &str = "rpc.cancel";
pub const DISCOVER: &str = "rpc.discover";
/// The methods of durable jobs.
pub const JOB_ENQUEUE: &str = "rpc.job.enqueue";
pub const JOB_GET: &str = "rpc.job.get";
pub const JOB_WAIT: &str = "rpc.job.wait";
pub const JOB_CANCEL: &str = "rpc.job.cancel";

/// Returns whether a name is reserved for the methods of the server itself.
pub fn is_reserved(name: &str) -> bool {
    name.starts_with("rpc.")
}

/// A call, borrowed from its body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call<'a> {
    /// The method name; owned only if the body spells it with escapes.
    pub method: Cow<'a, str>,
    /// The params as JSON text; `null` if the body has none.
    pub params: &'a str,
    /// The id as JSON text, a string or a number; `None` if it is absent or null.
    pub id: Option<&'a str>,
    /// How long the caller waits, in milliseconds; with 0 the call has already timed out.
    pub timeout_ms: Option<u64>,
}

/// Why a body is not a call.
#[derive(Debug, Clone)]
pub struct InvalidCall<'a> {
    /// `parse-error` or `invalid-request`.
    pub error: RpcError,
    /// The id to echo, if it could be read.
    pub id: Option<&'a str>,
}

/// Decodes a body. `depth` is the deepest allowed nesting; the call's own object is level 1.
#[cfg(any(test, feature = "internals"))]
pub fn parse(body: &[u8], depth: usize) -> Result<Call<'_>, InvalidCall<'_>> {
    use super::json;
    use serde_json::value::RawValue;

    let without_id = |error| InvalidCall { error, id: None };
    let text = json::text(body, depth).map_err(without_id)?;
    let not_json = |error| without_id(json::not_json(text, &error));
    match text.trim_start_matches([' ', '\t', '\n', '\r']).as_bytes() {
        [b'{', ..] => {
            let envelope = CallMembers::read(text).map_err(not_json)?;
            envelope.into_call(text)
        }
        _ => {
            let value: &RawValue = serde_json::from_str(text).map_err(not_json)?;
            let message = match value.get().as_bytes() {
                [b'[', ..] => {
                    "an array is a JSON-RPC 2.0 batch, not a call of the plain form".into()
                }
                _ => not_a_call(value.get()),
            };
            Err(without_id(invalid(message)))
        }
    }
}

impl Call<'_> {
    /// Appends the call's body to `out`. `params` and `id` must be JSON.
    /// `more` may append further members, each behind a comma.
    pub fn write(&self, out: &mut Vec<u8>, more: impl FnOnce(&mut Vec<u8>)) {
        out.extend_from_slice(b"{\"in\":");
        super::answer::string(out, &self.method);
        out.extend_from_slice(b",\"params\":");
        out.extend_from_slice(self.params.as_bytes());
        more(out);
        if let Some(id) = self.id {
            out.extend_from_slice(b",\"id\":");
            out.extend_from_slice(id.as_bytes());
        }
        if let Some(timeout_ms) = self.timeout_ms {
            out.extend_from_slice(format!(",\"timeout_ms\":{timeout_ms}").as_bytes());
        }
        out.push(b'}');
    }
}

impl<'a> CallMembers<'a> {
    /// Checks the members. `text` is the body, so that messages can name positions in it.
    pub(super) fn into_call(self, text: &'a str) -> Result<Call<'a>, InvalidCall<'a>> {
        let id = self.id(text);
        let echoed = id.as_ref().ok().copied().flatten();
        let call = || {
            let method = self.one_plain_method(text)?;
            Ok(Call {
                method: decoded(text, "in", method)?,
                params: self.get(Member::Params).unwrap_or("null"),
                id: id?,
                timeout_ms: self.timeout_ms(text)?,
            })
        };
        call().map_err(|error| InvalidCall { error, id: echoed })
    }

    /// Returns the value of `in`. Refuses what another parser could take for another call, and other
    /// forms.
    fn one_plain_method(&self, text: &str) -> Result<&'a str, RpcError> {
        self.no_member_twice(text)?;
        if let Some(version) = self.get(Member::Jsonrpc) {
            let at = offset(text, version);
            return Err(invalid(format!(
                "`jsonrpc` at byte {at} makes this JSON-RPC 2.0; the plain form is \
                 {{\"in\": METHOD, \"params\": …}}"
            )));
        }
        match (self.get(Member::In), self.get(Member::Method)) {
            (Some(_), Some(method)) => Err(invalid(format!(
                "`in` and `method` (at byte {}) in one call; `in` alone names the method",
                offset(text, method)
            ))),
            (None, Some(method)) => Err(invalid(format!(
                "`in` is missing; it names the method, `method` (at byte {}) does not",
                offset(text, method)
            ))),
            (None, None) => Err(invalid("`in` is missing; it names the method".to_owned())),
            (Some(raw), None) => Ok(raw),
        }
    }

    /// Refuses what another parser could take for another call.
    pub(super) fn no_member_twice(&self, text: &str) -> Result<(), RpcError> {
        let Some((member, again)) = self.given_twice() else {
            return Ok(());
        };
        let (name, at) = (member.name(), offset(text, again));
        Err(invalid(format!(
            "`{name}` is given twice, the second time at byte {at}"
        )))
    }

    fn id(&self, text: &str) -> Result<Option<&'a str>, RpcError> {
        // With two ids the right one is unknown, so none is echoed.
        if self.again(Member::Id).is_some() {
            return Ok(None);
        }
        match self.get(Member::Id) {
            None | Some("null") => Ok(None),
            Some(raw) => match raw.as_bytes() {
                [b'"' | b'-' | b'0'..=b'9', ..] => Ok(Some(raw)),
                _ => Err(wrong(text, "id", raw, "a string or a number")),
            },
        }
    }

    pub(super) fn timeout_ms(&self, text: &str) -> Result<Option<u64>, RpcError> {
        let Some(raw) = self.get(Member::TimeoutMs) else {
            return Ok(None);
        };
        // JSON has no plus sign and no leading zeros, so only plain digits can be parsed here.
        raw.parse().map(Some).map_err(|_| {
            invalid(format!(
                "`timeout_ms` at byte {} is not a whole number of milliseconds in plain digits \
                 (0 to {})",
                offset(text, raw),
                u64::MAX
            ))
        })
    }
}

pub(super) fn invalid(message: String) -> RpcError {
    RpcError::of(Code::InvalidRequest, message, false)
}

/// Returns the refusal of a member that has another type than `takes`.
#[cold]
pub(super) fn wrong(text: &str, name: &str, raw: &str, takes: &str) -> RpcError {
    let (at, is) = (offset(text, raw), kind(raw));
    invalid(format!("`{name}` at byte {at} is {is}; it takes {takes}"))
}

/// Decodes the method name from the value of its member.
pub(super) fn decoded<'a>(text: &str, name: &str, raw: &'a str) -> Result<Cow<'a, str>, RpcError> {
    match inside_quotes(raw) {
        Some(name) if !name.contains('\\') => Ok(Cow::Borrowed(name)),
        Some(_) => serde_json::from_str(raw).map(Cow::Owned).map_err(|_| {
            invalid(format!(
                "`{name}` at byte {} contains half a surrogate pair",
                offset(text, raw)
            ))
        }),
        None => Err(wrong(text, name, raw, "a string, the method's name")),
    }
}

/// Returns the message for a body that is neither an object nor an array.
pub(super) fn not_a_call(raw: &str) -> String {
    format!("{} is not a call; a call is an object", kind(raw))
}

/// Names the type of a JSON value.
fn kind(raw: &str) -> &'static str {
    match raw.as_bytes() {
        [b'{', ..] => "an object",
        [b'[', ..] => "an array",
        [b'"', ..] => "a string",
        [b't' | b'f', ..] => "a boolean",
        [b'n', ..] => "null",
        _ => "a number",
    }
}

/// Returns the position of `part`, a slice of `text`, in bytes from 0.
pub(super) fn offset(text: &str, part: &str) -> usize {
    part.as_ptr().addr().wrapping_sub(text.as_ptr().addr())
}

#[cfg(test)]
#[path = "call_tests.rs"]
mod tests;
