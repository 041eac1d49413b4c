//! A body of either form, or a batch: every call of it judged, every answer of it JSON.
#![no_main]

use libfuzzer_sys::fuzz_target;
use preforkd::internals::body::{self, Body, Form};
use preforkd::internals::call::{Call, InvalidCall};
use preforkd::internals::jsonrpc;
use preforkd::internals::http::{HttpDate, ResponseContext};
use preforkd::internals::reply::{AnswerContext, AnswerFormat, Framing};
use serde_json::value::RawValue;

const ABOUT: AnswerContext<'static> = AnswerContext {
    last: false,
    closing: false,
    ours: true,
    http: ResponseContext {
        origins: &[],
        date: HttpDate(0),
    },
};

fn answer(out: &mut Vec<u8>, wrap: Framing, form: Form, call: Result<Call<'_>, InvalidCall<'_>>) {
    let shape = AnswerFormat { form, wrap };
    let _ = match call {
        Ok(call) => shape.compose(out, ABOUT, (&call.method, call.id), || None, |out| {
            out.extend_from_slice(call.params.as_bytes());
            Ok(())
        }),
        Err(refusal) => shape.compose(out, ABOUT, ("", refusal.id), || None, |_| Err(refusal.error)),
    };
}

fuzz_target!(|bytes: &[u8]| {
    let mut out = Vec::new();
    match body::read(bytes, 8, 5) {
        Body::One(form, call) => answer(&mut out, Framing::Line, form, call),
        Body::Batch { text, members } => {
            assert!(!members.is_empty() && members.len() <= 5);
            let mut answers = Vec::new();
            for raw in members {
                let call = jsonrpc::member(text, raw);
                answer(&mut answers, Framing::Member, body::request_form(&call), call);
            }
            let shape = AnswerFormat {
                form: Form::JsonRpc,
                wrap: Framing::Line,
            };
            shape.batch(&mut out, ABOUT, &answers);
        }
    }
    if out.is_empty() {
        return;
    }
    let (last, line) = out.split_last().expect("it is not empty");
    assert!(*last == b'\n' && !line.contains(&b'\n'));
    serde_json::from_slice::<&RawValue>(line).expect("an answer is JSON");
});
