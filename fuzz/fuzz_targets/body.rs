//! A body of either form, or a batch: every call of it judged, every answer of it JSON.
#![no_main]

use libfuzzer_sys::fuzz_target;
use preforkd::protocol::body::{self, Body, Form};
use preforkd::protocol::call::{Call, Refusal};
use preforkd::protocol::jsonrpc;
use preforkd::protocol::reply::{About, Shape, Wrap};
use serde_json::value::RawValue;

const ABOUT: About<'static> = About {
    last: false,
    closing: false,
    ours: true,
    origins: &[],
};

fn answer(out: &mut Vec<u8>, wrap: Wrap, form: Form, call: Result<Call<'_>, Refusal<'_>>) {
    let shape = Shape { form, wrap };
    let _ = match call {
        Ok(call) => shape.compose(out, ABOUT, (&call.method, call.id), |out| {
            out.extend_from_slice(call.params.as_bytes());
            Ok(())
        }),
        Err(refusal) => shape.compose(out, ABOUT, ("", refusal.id), |_| Err(refusal.error)),
    };
}

fuzz_target!(|bytes: &[u8]| {
    let mut out = Vec::new();
    match body::read(bytes, 8, 5) {
        Body::One(form, call) => answer(&mut out, Wrap::Line, form, call),
        Body::Batch { text, members } => {
            assert!(!members.is_empty() && members.len() <= 5);
            let mut answers = Vec::new();
            for raw in members {
                let call = jsonrpc::member(text, raw);
                answer(&mut answers, Wrap::Member, body::request_form(&call), call);
            }
            let shape = Shape {
                form: Form::JsonRpc,
                wrap: Wrap::Line,
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
