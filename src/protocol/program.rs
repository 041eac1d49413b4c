//! What is said between a worker and a pool program: frames on its descriptor 3.
//!
//! A call is told as in the plain form, without an id: a program has one at a time. Its answer may
//! name itself, as a handler's may. What is no answer is told in words, for the log and the caller.

use serde::Deserialize;
use serde_json::value::RawValue;
use std::borrow::Cow;

use super::answer::{self, Answer};
use super::call::Call;
use super::code::Code;
use super::rpc_error::RpcError;
use super::{frame, json};
use crate::error::Error;

/// What a program sends once it can take calls: `{"out": "ready"}`, without a result.
const READY: &str = "ready";
/// The method that takes back a call.
const CANCEL: &str = "rpc.cancel";
/// So long it may be, with what else may stand there.
const LONGEST_READY: usize = 4096;

#[derive(Debug)]
pub enum Sent<'a> {
    /// That it can take calls.
    Ready,
    Answer(Answer<'a>),
}

/// Appends the frame of a call, with an id for a program that has several at once. `params` must be JSON;
/// it stays as it is.
pub fn call(out: &mut Vec<u8>, method: &str, params: &str, id: Option<u64>) -> bool {
    let mark = frame::begin(out);
    let id = id.map(|id| id.to_string());
    let call = Call {
        method: Cow::Borrowed(method),
        params,
        id: id.as_deref(),
        timeout_ms: None,
    };
    call.write(out);
    frame::finish(out, mark)
}

/// Appends the frame that tells a program that the call with this id was given up.
pub fn cancel(out: &mut Vec<u8>, id: u64) -> bool {
    call(out, CANCEL, &format!("{{\"id\":{id}}}"), None)
}

/// The id of an answer of a program that has several calls at once, also of one that makes no sense
/// otherwise.
pub fn id(body: &[u8]) -> Option<u64> {
    #[derive(Deserialize)]
    struct OnlyId {
        id: u64,
    }
    let text = std::str::from_utf8(body).ok()?;
    let is_object = text.trim_start().starts_with('{');
    let only: Option<OnlyId> = serde_json::from_str(text).ok();
    only.filter(|_| is_object).map(|only| only.id)
}

/// Reads the body of a program's frame, nested at most `depth` deep.
///
/// # Errors
/// Why it is none, in words.
pub fn read(body: &[u8], depth: usize) -> Result<Sent<'_>, String> {
    match answer::read(body, depth) {
        Ok(answer) => Ok(Sent::Answer(answer)),
        Err(_) if body.len() <= LONGEST_READY && is_ready(body, depth) => Ok(Sent::Ready),
        Err(Error::Protocol(why)) => {
            let why = why.strip_prefix(answer::NO_ANSWER).unwrap_or(&why);
            Err(why.to_owned())
        }
        Err(error) => Err(error.to_string()),
    }
}

fn is_ready(body: &[u8], depth: usize) -> bool {
    #[derive(Deserialize)]
    struct Handshake<'a> {
        #[serde(borrow)]
        out: Cow<'a, str>,
        #[serde(default)]
        result: Option<serde::de::IgnoredAny>,
    }
    let Ok(text) = json::text(body, depth) else {
        return false;
    };
    text.trim_start().starts_with('{')
        && serde_json::from_str::<Handshake<'_>>(text)
            .is_ok_and(|sent| sent.out == READY && sent.result.is_none())
}

/// An answer as its caller is to have it: its name, where it is not `method`, and its result or
/// its error, each on one line.
pub fn outcome(answer: Answer<'_>, method: &str) -> (Option<Box<str>>, Result<Vec<u8>, RpcError>) {
    match answer.outcome {
        Ok(result) => {
            let mut line = result.as_bytes().to_vec();
            json::flatten_to_one_line(&mut line);
            let name = (answer.name != method).then(|| answer.name.into());
            (name, Ok(line))
        }
        Err(mut error) => {
            // As of any handler: who refuses those has done nothing yet.
            error.started &= error.table_code() != Some(Code::InvalidParams);
            if let Some(data) = error.data.take() {
                error.data = Some(unbroken(data));
            }
            (None, Err(error))
        }
    }
}

fn unbroken(data: Box<RawValue>) -> Box<RawValue> {
    if !data.get().contains(['\n', '\r']) {
        return data;
    }
    let text = data.get().replace(['\n', '\r'], " ");
    RawValue::from_string(text).unwrap_or(data)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_a_frame_whose_params_are_to_the_letter() {
        let mut out = Vec::new();
        assert!(call(&mut out, "a.b", "{\"n\": 1.50,\n\"n\": 2}", None));
        let body = b"{\"in\":\"a.b\",\"params\":{\"n\": 1.50,\n\"n\": 2}}";
        assert_eq!(out[..4], (body.len() as u32).to_le_bytes());
        assert_eq!(&out[4..], body);
    }

    #[test]
    fn calls_at_once_have_ids() {
        let mut out = Vec::new();
        assert!(call(&mut out, "m", "1", Some(7)) && cancel(&mut out, 7));
        let text = String::from_utf8_lossy(&out);
        assert!(text.contains(r#"{"in":"m","params":1,"id":7}"#), "{text}");
        assert!(
            text.contains(r#"{"in":"rpc.cancel","params":{"id":7}}"#),
            "{text}"
        );
        for (body, found) in [
            (
                r#"{"out": "m", "result": [[1]], "id": 18446744073709551615}"#,
                Some(u64::MAX),
            ),
            (r#"{"id": 3}"#, Some(3)),
            (r#"{"out": "m", "result": 1}"#, None),
            (r#"{"id": -1}"#, None),
            (r#"{"id": "3"}"#, None),
            (r#"{"id": 3, "id": 4}"#, None),
            ("[3]", None),
            ("", None),
        ] {
            assert_eq!(id(body.as_bytes()), found, "{body}");
        }
        assert_eq!(id(b"\xff"), None);
    }

    #[test]
    fn answers_errors_and_the_handshake_are_told_apart() {
        assert!(matches!(read(br#"{"out":"ready"}"#, 9), Ok(Sent::Ready)));
        assert!(matches!(
            read(br#"{"out":"ready","result":null}"#, 9),
            Ok(Sent::Answer(_))
        ));
        let answer = |body: &'static str| match read(body.as_bytes(), 9) {
            Ok(Sent::Answer(answer)) => outcome(answer, "m"),
            other => panic!("{other:?}"),
        };
        let (name, result) = answer("{\"out\": \"m\", \"result\": [1.50,\n 2]}");
        assert_eq!((name, result.unwrap()), (None, b"[1.50,  2]".to_vec()));
        let (name, result) = answer(r#"{"result": null, "out": "pong"}"#);
        assert_eq!(
            (name.as_deref(), result.unwrap()),
            (Some("pong"), b"null".to_vec())
        );
        let (name, result) = answer(
            "{\"out\": \"error\", \"result\": {\"code\": 7, \"message\": \"no\", \"data\": [1,\n2]}}",
        );
        let error = result.unwrap_err();
        assert_eq!(
            (error.code, error.message.as_str(), error.started),
            (7, "no", true)
        );
        assert_eq!(error.data.unwrap().get(), "[1, 2]");
        assert_eq!(name, None);
    }

    #[test]
    fn what_is_no_answer_says_why() {
        for (body, why) in [
            ("", "empty"),
            ("[1, 2]", "not an object"),
            ("{\"out\": \"m\"}", "result"),
            ("{\"result\": 1}", "out"),
            ("{\"out\": 1, \"result\": 1}", "string"),
            ("{\"out\": \"m\", \"result\": 1", "EOF"),
            ("{\"out\": \"error\", \"result\": 1}", "not an object"),
            ("{\"out\": \"error\", \"result\": {}}", "code"),
            ("{\"out\": \"m\", \"result\": [[[[]]]]}", "nested deeper"),
            (
                "{\"out\": \"m\", \"result\": 1, \"result\": 2}",
                "duplicate",
            ),
            ("\u{feff}", "empty"),
            ("\u{feff}[]", "not an object"),
        ] {
            let said = read(body.as_bytes(), 4).unwrap_err();
            assert!(said.contains(why), "{body}: {said}");
        }
        assert!(read(b"\xff", 4).is_err());
    }
}
