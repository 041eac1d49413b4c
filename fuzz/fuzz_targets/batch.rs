//! A batch of JSON-RPC 2.0, held against a slower reading of the same rules: which of its calls are
//! answered, in which order, and with whose id.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use preforkd::internals::Code;
use preforkd::internals::body::{self, Body, Form};
use preforkd::internals::jsonrpc;
use preforkd::internals::http::{HttpDate, ResponseContext};
use preforkd::internals::reply::{AnswerContext, AnswerFormat, Framing};
use serde_json::Value;
use serde_json::value::RawValue;

const DEPTH: usize = 8;
const MOST: usize = 5;
const ABOUT: AnswerContext<'static> = AnswerContext {
    last: false,
    closing: false,
    ours: true,
    http: ResponseContext {
        origins: &[],
        date: HttpDate(0),
    },
};

/// What is asked by one element that is a good call: its id, if it is to be answered. `Err` for what is
/// answered as no call.
fn asked(element: &Value) -> Result<Option<&Value>, ()> {
    let call = element.as_object().ok_or(())?;
    let id = call.get("id");
    let good = call.get("jsonrpc") == Some(&Value::from("2.0"))
        && call.get("method").is_some_and(Value::is_string)
        && !call.contains_key("in")
        && matches!(
            call.get("params"),
            None | Some(Value::Null | Value::Array(_) | Value::Object(_))
        )
        && matches!(
            id,
            None | Some(Value::Null | Value::String(_) | Value::Number(_))
        )
        && call
            .get("timeout_ms")
            .is_none_or(|it| it.is_null() || it.as_u64().is_some());
    if good { Ok(id) } else { Err(()) }
}

fuzz_target!(|bytes: &[u8]| {
    let (text, members) = match body::read(bytes, DEPTH, MOST) {
        Body::Batch { text, members } => (text, members),
        Body::One(form, outcome) => {
            if bytes.trim_ascii_start().first() == Some(&b'[') {
                let refusal = outcome.expect_err("an array is always a batch");
                assert!(refusal.id.is_none() && !refusal.error.started);
                let unreadable = refusal.error.code == Code::ParseError.number();
                assert!(unreadable || form == Form::JsonRpc);
            }
            return;
        }
    };
    assert!((1..=MOST).contains(&members.len()));
    assert_eq!(text.as_bytes().as_ptr(), bytes.as_ptr());
    let shape = |form, wrap| AnswerFormat { form, wrap };
    let mut answers = Vec::new();
    let mut count = 0;
    for raw in &members {
        let call = jsonrpc::member(text, raw);
        let form = body::request_form(&call);
        count += usize::from(form != Form::Notification);
        // An oracle that takes the last of two equal members, or rounds a number, can't judge those.
        if let Ok(element) = serde_json::from_str::<Value>(raw) {
            match (&call, asked(&element)) {
                (Ok(call), asked) => {
                    let id = asked.expect("what is taken for a call is one");
                    assert_eq!(call.id.is_some(), id.is_some());
                }
                (Err(refusal), Err(())) => {
                    assert_eq!(refusal.error.code, Code::InvalidRequest.number());
                }
                // Given twice, or a number that this oracle takes for another.
                (Err(refusal), Ok(_)) => assert!(!refusal.error.started),
            }
        }
        let shape = shape(form, Framing::Member);
        let _ = match call {
            Ok(call) => shape.compose(&mut answers, ABOUT, (&call.method, call.id), || None, |out| {
                out.extend_from_slice(call.params.as_bytes());
                Ok(())
            }),
            Err(refusal) => {
                shape.compose(
                    &mut answers,
                    ABOUT,
                    ("", refusal.id),
                    || None,
                    |_| Err(refusal.error),
                )
            }
        };
    }
    for wrap in [Framing::Frame, Framing::Line] {
        let mut out = Vec::new();
        shape(Form::JsonRpc, wrap).batch(&mut out, ABOUT, &answers);
        let written = match wrap {
            Framing::Frame if !out.is_empty() => &out[4..],
            _ => &out[..],
        };
        if count == 0 {
            assert!(written.is_empty(), "a batch of notifications has no answer");
            continue;
        }
        let all: Vec<BTreeMap<String, &RawValue>> =
            serde_json::from_slice(written).expect("an array of answers");
        assert_eq!(all.len(), count);
        for answer in all {
            assert_eq!(answer["jsonrpc"].get(), "\"2.0\"");
            assert!(answer.contains_key("result") != answer.contains_key("error"));
            if let Some(error) = answer.get("error") {
                let error: Value =
                    serde_json::from_str(error.get()).expect("an error is an object");
                assert!(error["code"].is_i64() && error["message"].is_string());
                assert_eq!(error["data"]["started"], false);
            }
            let id = answer["id"].get().as_bytes()[0];
            assert!(!matches!(id, b'[' | b'{' | b't' | b'f'));
        }
    }
});
