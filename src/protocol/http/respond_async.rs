//! Turns a request with `Prefer: respond-async` (RFC 7240) into an enqueue.
//!
//! Its path names the method and its body is the params. The id of the job follows from `Idempotency-Key` and a
//! secret that only the jobs process knows. So the params of this enqueue have a form of their own: they begin
//! with a byte that no JSON has, and no client can send them.

use std::borrow::Cow;

use httparse::Header;
use serde_json::value::RawValue;

use super::refusal::RejectedRequest;
use crate::protocol::call::JOB_ENQUEUE;
use crate::protocol::rpc_error::RpcError;
use crate::protocol::{Code, answer};

/// The first byte of the params. JSON text never begins with it.
const MARK: u8 = 1;

/// A request that wants to be a job.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct JobRequestHead {
    /// The value of `Idempotency-Key`.
    pub key: Option<String>,
}

/// The params of an enqueue that was an HTTP request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AsyncRequest<'a> {
    pub method: Cow<'a, str>,
    pub key: Option<Cow<'a, str>>,
    pub params: &'a str,
}

/// Returns what the headers say about a job; `None` without `Prefer: respond-async`.
///
/// # Errors
/// Two keys, or a key that is not UTF-8.
pub(super) fn read_headers(
    headers: &[Header<'_>],
) -> Result<Option<JobRequestHead>, RejectedRequest> {
    let named = |name: &'static str| {
        let headers = headers.iter();
        headers.filter(move |header| header.name.eq_ignore_ascii_case(name))
    };
    let mut preferences = named("prefer").flat_map(|header| header.value.split(|&b| b == b','));
    let is_wanted = |preference: &[u8]| {
        let name = preference.split(|&b| b == b';').next().unwrap_or_default();
        name.trim_ascii().eq_ignore_ascii_case(b"respond-async")
    };
    if !preferences.any(is_wanted) {
        return Ok(None);
    }
    let mut keys = named("idempotency-key");
    let key = keys.next().map(|header| header.value.trim_ascii());
    if keys.next().is_some() {
        return Err(RejectedRequest::new(400, "two Idempotency-Keys"));
    }
    let key = key.map(|key| match key {
        // A string of a structured field (RFC 9651).
        [b'"', inside @ .., b'"'] => inside,
        key => key,
    });
    let key = key.map(|key| std::str::from_utf8(key).map(str::to_owned));
    match key.transpose() {
        Ok(key) => Ok(Some(JobRequestHead { key })),
        Err(_) => Err(RejectedRequest::new(
            400,
            "an Idempotency-Key that is not UTF-8",
        )),
    }
}

/// Returns the method and the params of the call that a request becomes. `method` and `params` are its own.
pub fn translate<'a>(
    head: &Option<JobRequestHead>,
    method: String,
    params: &'a str,
) -> (Cow<'static, str>, Cow<'a, str>) {
    let Some(head) = head else {
        return (method.into(), params.into());
    };
    let mut text = Vec::with_capacity(params.len() + method.len() + 32);
    text.extend_from_slice(&[MARK, b'[']);
    answer::string(&mut text, &method);
    text.push(b',');
    match &head.key {
        Some(key) => answer::string(&mut text, key),
        None => text.extend_from_slice(b"null"),
    }
    text.push(b',');
    text.extend_from_slice(params.as_bytes());
    text.push(b']');
    // All parts are UTF-8.
    let text = String::from_utf8(text).unwrap_or_default();
    (JOB_ENQUEUE.into(), text.into())
}

/// Reads params that [`translate`] has written; `None` if a client has sent them.
///
/// # Errors
/// `invalid-params` if they are damaged.
pub fn read(params: &str) -> Result<Option<AsyncRequest<'_>>, RpcError> {
    let Some(text) = params.strip_prefix(char::from(MARK)) else {
        return Ok(None);
    };
    type Parts<'a> = (Text<'a>, Option<Text<'a>>, &'a RawValue);
    let read: Result<Parts<'_>, _> = serde_json::from_str(text);
    let (Text(method), key, params) = read.map_err(|error| {
        RpcError::of(
            Code::InvalidParams,
            format!("a damaged request: {error}"),
            false,
        )
    })?;
    Ok(Some(AsyncRequest {
        method,
        key: key.map(|Text(key)| key),
        params: params.get(),
    }))
}

/// A text that is borrowed if it has no escapes.
#[derive(serde::Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn headers(fields: &[(&'static str, &'static str)]) -> Option<Option<String>> {
        let headers: Vec<Header<'_>> = fields
            .iter()
            .map(|(name, value)| Header {
                name,
                value: value.as_bytes(),
            })
            .collect();
        read_headers(&headers).unwrap().map(|head| head.key)
    }

    #[test]
    fn only_one_preference_makes_a_job() {
        for value in [
            "respond-async",
            "Respond-Async, wait=10",
            "handling=lenient , respond-async; foo=bar",
        ] {
            assert_eq!(headers(&[("prefer", value)]), Some(None), "{value}");
        }
        for value in [
            "",
            "wait=10",
            "respond-async2",
            "\"respond-async\"",
            "x; respond-async",
        ] {
            assert_eq!(
                headers(&[("Prefer", value), ("Idempotency-Key", "k")]),
                None,
                "{value}"
            );
        }
        let two = [("Prefer", "wait=1"), ("PREFER", "respond-async")];
        assert_eq!(headers(&two), Some(None));
    }

    #[test]
    fn a_key_may_have_quotes() {
        let key = |value| headers(&[("Prefer", "respond-async"), ("Idempotency-key", value)]);
        assert_eq!(key(" a b "), Some(Some("a b".into())));
        assert_eq!(key("\"8e03978e\""), Some(Some("8e03978e".into())));
        assert_eq!(key("\""), Some(Some("\"".into())));
        assert_eq!(key(""), Some(Some(String::new())));
        let header = |value| Header {
            name: "Idempotency-Key",
            value,
        };
        let prefer = Header {
            name: "Prefer",
            value: b"respond-async",
        };
        for keys in [&[header(b"a"), header(b"a")][..], &[header(b"\xff")]] {
            let all: Vec<Header<'_>> = keys.iter().copied().chain([prefer]).collect();
            assert_eq!(read_headers(&all).unwrap_err().status, 400);
        }
    }

    #[test]
    fn a_request_is_read_back_byte_for_byte() {
        let head = JobRequestHead {
            key: Some("k\"1".into()),
        };
        let (method, params) = translate(&Some(head), "a\"b".into(), "[1e0,  2]");
        assert_eq!(method, JOB_ENQUEUE);
        let request = read(&params).unwrap().unwrap();
        assert_eq!((&*request.method, request.params), ("a\"b", "[1e0,  2]"));
        assert_eq!(request.key.as_deref(), Some("k\"1"));
        let (_, params) = translate(&Some(JobRequestHead::default()), "a".into(), "null");
        assert_eq!(read(&params).unwrap().unwrap().key, None);
        assert_eq!(read("\u{1}[1]").unwrap_err().code, -32602);
    }

    #[test]
    fn params_of_a_client_are_never_taken_for_a_request() {
        for params in ["{}", "[\"a\",null,1]", " [1]"] {
            assert_eq!(read(params).unwrap(), None);
        }
        assert!(crate::protocol::body::params("\u{1}[\"a\",null,1]".as_bytes(), 9).is_err());
        assert_eq!(translate(&None, "a".into(), "1"), ("a".into(), "1".into()));
    }
}
