//! Encodes and decodes the messages between a worker and a pool program: frames on its descriptor 3.
//!
//! A call has the plain form. It has no id if the program runs one call at a time. The answer may have
//! its own name, as an answer of a handler may. What is not an answer becomes an error message for the
//! log and the caller.

use serde::Deserialize;
use std::borrow::Cow;

use super::answer::{self, Answer};
use super::call::{CANCEL, Call};
use super::call_id::CallId;
use super::code::Code;
use super::rpc_error::RpcError;
use super::trace_context::TraceContext;
use super::{frame, json};
use crate::error::Error;

/// The `out` of the message that a program sends when it is ready: `{"out": "ready"}`, without a result.
const READY: &str = "ready";
/// The largest number of bytes of the ready message. It may have other members.
const LONGEST_READY: usize = 4096;

#[derive(Debug)]
pub enum Sent<'a> {
    /// The program is ready for calls.
    Ready,
    Answer(Answer<'a>),
}

/// The id of a call and its place in a trace, for its program.
pub type CallTrace<'a> = (CallId, &'a TraceContext);

/// The attempt of a job, for its program.
#[derive(Debug, Clone, Copy)]
pub struct JobMember<'a> {
    pub id: &'a str,
    pub attempt: u32,
    pub max_attempts: u32,
}

/// What the frame of a call has besides its method and params.
#[derive(Debug, Clone, Copy, Default)]
pub struct CallExtras<'a> {
    /// For a program with several calls at once. It is the last member.
    pub id: Option<u64>,
    pub trace: Option<CallTrace<'a>>,
    pub job: Option<JobMember<'a>>,
}

/// Appends the frame of a call. `params` must be JSON and stays unchanged.
pub fn call(out: &mut Vec<u8>, method: &str, params: &str, extras: CallExtras<'_>) -> bool {
    let CallExtras { id, trace, job } = extras;
    let mark = frame::begin(out);
    let id = id.map(|id| id.to_string());
    let call = Call {
        method: Cow::Borrowed(method),
        params,
        id: id.as_deref(),
        timeout_ms: None,
    };
    call.write(out, |out| {
        if let Some(job) = job {
            let (attempt, max_attempts) = (job.attempt, job.max_attempts);
            out.extend_from_slice(b",\"job\":{\"id\":");
            answer::string(out, job.id);
            let rest = format!(",\"attempt\":{attempt},\"max_attempts\":{max_attempts}}}");
            out.extend_from_slice(rest.as_bytes());
        }
        let Some((call, context)) = trace else {
            return;
        };
        let parent = context.traceparent();
        out.extend_from_slice(
            format!(",\"call\":\"{call}\",\"traceparent\":\"{parent}\"").as_bytes(),
        );
        if let Some(state) = &context.state {
            out.extend_from_slice(b",\"tracestate\":");
            answer::string(out, state);
        }
    });
    frame::finish(out, mark)
}

/// Appends the frame that cancels the call with this id.
pub fn cancel(out: &mut Vec<u8>, id: u64) -> bool {
    let params = format!("{{\"id\":{id}}}");
    call(out, CANCEL, &params, CallExtras::default())
}

/// Returns the id of an answer of a program with several calls at once, even if the rest of the answer is
/// invalid.
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

/// Decodes the body of a program's frame, nested at most `depth` levels.
///
/// # Errors
/// Why it is invalid, in words.
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

/// Returns an answer for its caller: its name, if it is not `method`, and its result or error, each on
/// one line.
pub fn outcome(answer: Answer<'_>, method: &str) -> (Option<Box<str>>, Result<Vec<u8>, RpcError>) {
    match answer.outcome {
        Ok(result) => {
            let mut line = result.get().as_bytes().to_vec();
            json::flatten_to_one_line(&mut line);
            let name = (answer.name != method).then(|| answer.name.into());
            (name, Ok(line))
        }
        Err(mut error) => {
            // Ignore what the program says about `started`: a client may repeat a call that did not start. The same
            // rule holds for all handlers ([`RpcError::new`]).
            error.started = !error.table_code().is_some_and(Code::is_refusal);
            if let Some(data) = error.data.take() {
                error.data = Some(answer::unbroken(data));
            }
            (None, Err(error))
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_a_frame_with_params_byte_for_byte() {
        let mut out = Vec::new();
        let params = "{\"n\": 1.50,\n\"n\": 2}";
        assert!(call(&mut out, "a.b", params, CallExtras::default()));
        let body = b"{\"in\":\"a.b\",\"params\":{\"n\": 1.50,\n\"n\": 2}}";
        assert_eq!(out[..4], (body.len() as u32).to_le_bytes());
        assert_eq!(&out[4..], body);
    }

    #[test]
    fn a_trace_stands_before_the_id() {
        let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let mut context = TraceContext::decode(parent.as_bytes()).unwrap();
        let id = "4712.9".parse().unwrap();
        let sent = |context: &TraceContext, number| {
            let mut out = Vec::new();
            let extras = CallExtras {
                id: number,
                trace: Some((id, context)),
                job: None,
            };
            assert!(call(&mut out, "m", "1", extras));
            String::from_utf8(out.split_off(4)).unwrap()
        };
        assert_eq!(
            sent(&context, None),
            format!(r#"{{"in":"m","params":1,"call":"4712.9","traceparent":"{parent}"}}"#)
        );
        context.state = Some(r#"a="\"#.into());
        assert_eq!(
            sent(&context, Some(7)),
            format!(
                r#"{{"in":"m","params":1,"call":"4712.9","traceparent":"{parent}","tracestate":"a=\"\\","id":7}}"#
            )
        );
    }

    #[test]
    fn the_frame_of_an_attempt_names_its_job() {
        let mut out = Vec::new();
        let extras = CallExtras {
            id: Some(7),
            job: Some(JobMember {
                id: "0-1",
                attempt: 2,
                max_attempts: 3,
            }),
            ..CallExtras::default()
        };
        assert!(call(&mut out, "m", "1", extras));
        let body =
            r#"{"in":"m","params":1,"job":{"id":"0-1","attempt":2,"max_attempts":3},"id":7}"#;
        assert_eq!(&out[4..], body.as_bytes());
    }

    #[test]
    fn concurrent_calls_have_ids() {
        let mut out = Vec::new();
        let extras = CallExtras {
            id: Some(7),
            ..CallExtras::default()
        };
        assert!(call(&mut out, "m", "1", extras) && cancel(&mut out, 7));
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
    fn answers_errors_and_the_ready_message_are_distinguished() {
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
        for (body, started) in [
            (
                r#"{"out":"error","result":{"code":-32005,"message":"","started":false}}"#,
                true,
            ),
            (
                r#"{"out":"error","result":{"code":-32602,"message":"","started":true}}"#,
                false,
            ),
            (
                r#"{"out":"error","result":{"code":-32601,"message":""}}"#,
                false,
            ),
        ] {
            let error = answer(body).1.unwrap_err();
            assert_eq!(error.started, started, "{body}");
        }
    }

    #[test]
    fn an_invalid_answer_gives_the_reason() {
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
