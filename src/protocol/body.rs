//! Decodes a body of any dialect: finds the form of the call, or that it is a batch.
//!
//! An object with `jsonrpc` is a JSON-RPC 2.0 call. An array is always a batch of them. Invalid JSON is
//! answered in the form that its text suggests. Everything else is the plain form.

use super::call::{Call, InvalidCall, invalid, not_a_call};
use super::envelope::{CallMembers, Member};
use super::json;
use super::jsonrpc::{self, Elements};
use super::rpc_error::RpcError;
use memchr::memmem;
use serde_json::value::RawValue;

/// The form of a call and of its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `{"in": …}`, answered with `{"out": …}`.
    Plain,
    /// JSON-RPC 2.0.
    JsonRpc,
    /// A notification of JSON-RPC 2.0; it is not answered.
    Notification,
    /// Only the params, answered with only the result or the error: HTTP's `POST /METHOD`.
    ParamsOnly,
}

#[derive(Debug)]
pub enum Body<'a> {
    /// One call, or an invalid one.
    One(Form, Result<Call<'a>, InvalidCall<'a>>),
    /// Calls that are answered together; [`jsonrpc::member`] decodes each.
    Batch {
        text: &'a str,
        /// Never empty.
        members: Vec<&'a str>,
    },
}

/// Decodes a body. `depth` is the deepest allowed nesting, `most` the largest number of calls in a batch.
#[inline]
pub fn read(body: &[u8], depth: usize, most: usize) -> Body<'_> {
    let text = match json::text(body, depth) {
        Ok(text) => text,
        Err(error) => return unreadable(body, error),
    };
    match text.trim_start_matches([' ', '\t', '\n', '\r']).as_bytes() {
        [b'{', ..] => match CallMembers::read(text) {
            Ok(envelope) if envelope.get(Member::Jsonrpc).is_none() => {
                Body::One(Form::Plain, envelope.into_call(text))
            }
            Ok(envelope) => {
                let call = envelope.into_request(text);
                Body::One(request_form(&call), call)
            }
            Err(error) => unreadable(body, json::not_json(text, &error)),
        },
        [b'[', ..] => match jsonrpc::elements(text, most) {
            Ok(elements) => batch(text, elements, most),
            Err(error) => unreadable(body, json::not_json(text, &error)),
        },
        _ => match serde_json::from_str::<&RawValue>(text) {
            Ok(value) => refused(Form::Plain, invalid(not_a_call(value.get()))),
            Err(error) => unreadable(body, json::not_json(text, &error)),
        },
    }
}

/// Returns the form in which a JSON-RPC call is answered. A notification is not answered, but an invalid
/// call is.
pub fn request_form(call: &Result<Call<'_>, InvalidCall<'_>>) -> Form {
    match call {
        Ok(call) if call.id.is_none() => Form::Notification,
        _ => Form::JsonRpc,
    }
}

/// Returns the params of a [`Form::ParamsOnly`] call as JSON text. An empty body means null.
///
/// # Errors
/// `parse-error`.
pub fn params(body: &[u8], depth: usize) -> Result<&str, RpcError> {
    if body.is_empty() {
        return Ok("null");
    }
    let text = json::text(body, depth)?;
    match serde_json::from_str::<&RawValue>(text) {
        Ok(value) => Ok(value.get()),
        Err(error) => Err(json::not_json(text, &error)),
    }
}

fn batch<'a>(text: &'a str, elements: Elements<'a>, most: usize) -> Body<'a> {
    let Elements { first, count } = elements;
    let why = match count {
        0 => "the batch has no calls".to_owned(),
        _ if count > most => {
            format!("a batch of {count} calls; limits.batch allows {most}")
        }
        _ => {
            return Body::Batch {
                text,
                members: first,
            };
        }
    };
    refused(Form::JsonRpc, invalid(why))
}

#[cold]
fn unreadable(body: &[u8], error: RpcError) -> Body<'_> {
    let form = match memmem::find(body, b"\"jsonrpc\"") {
        Some(_) => Form::JsonRpc,
        None => Form::Plain,
    };
    refused(form, error)
}

fn refused<'a>(form: Form, error: RpcError) -> Body<'a> {
    Body::One(form, Err(InvalidCall { error, id: None }))
}
