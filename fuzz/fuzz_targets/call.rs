//! The plain form out of any body, held against a slower reading of the same rules.
#![no_main]

use libfuzzer_sys::fuzz_target;
use preforkd::internals::{Code, answer, call};
use serde_json::value::RawValue;

const DEPTH: usize = 8;

fn is_json(text: &str) -> bool {
    serde_json::from_str::<&RawValue>(text).is_ok()
}

/// The deepest nesting of some JSON, counted without any of the scan's short cuts.
fn deepest(json: &str) -> usize {
    let (mut level, mut deepest, mut in_string, mut escaped) = (0_usize, 0, false, false);
    for byte in json.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = in_string,
            b'"' => in_string = !in_string,
            b'[' | b'{' if !in_string => level += 1,
            b']' | b'}' if !in_string => level -= 1,
            _ => {}
        }
        deepest = deepest.max(level);
    }
    deepest
}

fuzz_target!(|body: &[u8]| {
    let readable =
        std::str::from_utf8(body).is_ok_and(|text| is_json(text) && deepest(text) <= DEPTH);
    match call::parse(body, DEPTH) {
        Ok(read) => {
            assert!(readable && is_json(read.params) && read.id.is_none_or(is_json));
            let mut written = Vec::new();
            read.write(&mut written, |_| {});
            let again = call::parse(&written, DEPTH).expect("what was read is a call");
            assert_eq!(again, read);

            let mut out = Vec::new();
            answer::result(&mut out, "pong", read.params, read.id);
            let answer = answer::read(&out, DEPTH).expect("what is written is an answer");
            assert_eq!(answer.outcome.expect("not an error").get(), read.params);
            assert_eq!(answer.id.map(|id| id.get()), read.id);
        }
        Err(refusal) => {
            let unreadable = refusal.error.code == Code::ParseError.number();
            assert_eq!(unreadable, !readable, "{}", refusal.error);
            assert!(unreadable || refusal.error.code == Code::InvalidRequest.number());
            assert!(!(unreadable && refusal.id.is_some()) && !refusal.error.started);

            let mut out = Vec::new();
            answer::error(&mut out, &refusal.error, refusal.id, None);
            let answer = answer::read(&out, DEPTH).expect("what is written is an answer");
            assert_eq!(
                answer.outcome.expect_err("an error").message,
                refusal.error.message
            );
            assert_eq!(answer.id.map(|id| id.get()), refusal.id);
        }
    }
    let _ = answer::read(body, DEPTH);
});
