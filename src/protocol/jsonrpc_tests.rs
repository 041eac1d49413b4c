#![allow(clippy::unwrap_used)]

use super::*;
use crate::protocol::body::{self, Body, Form};
use proptest::prelude::*;
use serde_json::Value;

fn one(text: &str) -> (Form, Result<Call<'_>, InvalidCall<'_>>) {
    match body::read(text.as_bytes(), 16, 3) {
        Body::One(form, call) => (form, call),
        Body::Batch { .. } => panic!("{text} was taken for a batch"),
    }
}

#[test]
fn the_form_follows_the_members_and_for_invalid_json_the_first_bytes() {
    for (text, form) in [
        (r#"{"in":"ping"}"#, Form::Plain),
        (r#"{"jsonrpc":"2.0","method":"a","id":1}"#, Form::JsonRpc),
        (r#"{"jsonrpc":"2.0","method":"a","id":null}"#, Form::JsonRpc),
        (r#"{"jsonrpc":"2.0","method":"a"}"#, Form::Notification),
        (r#"{"jsonrpc":"2.0"}"#, Form::JsonRpc),
        (r#"{"json\u0072pc":null,"in":"a"}"#, Form::JsonRpc),
        (r#"{"jsonrpc""#, Form::JsonRpc),
        ("[", Form::Plain),
        ("[]", Form::JsonRpc),
        ("[1,2,3,4]", Form::JsonRpc),
        ("7", Form::Plain),
    ] {
        assert_eq!(one(text).0, form, "{text}");
    }
}

#[test]
fn members_are_kept_byte_for_byte() {
    let text =
        r#"{"params": [1.0,1e400], "id":"x\n","timeout_ms":5,"jsonrpc":"2.0","method":"\u0061"}"#;
    let call = one(text).1.unwrap();
    assert_eq!((&*call.method, call.params), ("a", "[1.0,1e400]"));
    assert_eq!((call.id, call.timeout_ms), (Some(r#""x\n""#), Some(5)));
}

#[test]
fn a_batch_keeps_at_most_the_allowed_elements() {
    let found = elements("[1, {\"a\": [2]} ,3, 4]", 2).unwrap();
    assert_eq!((found.first, found.count), (vec!["1", "{\"a\": [2]}"], 4));
    assert!(elements("[1,]", 2).is_err() && elements("[1] 2", 2).is_err());
}

#[test]
fn an_error_has_the_message_of_the_specification_and_our_detail() {
    let mut out = Vec::new();
    let failed = RpcError::of(Code::MethodNotFound, "there is no \"x\"", false);
    error(&mut out, &failed, Some("7"), None);
    assert_eq!(
        String::from_utf8(out).unwrap(),
        r#"{"jsonrpc":"2.0","error":{"code":-32601,"message":"Method not found","data":{"name":"method-not-found","started":false,"detail":"there is no \"x\""}},"id":7}"#
    );
    let mut out = Vec::new();
    error(
        &mut out,
        &RpcError::new(42, "no").with_data([1]),
        None,
        None,
    );
    assert_eq!(
        String::from_utf8(out).unwrap(),
        r#"{"jsonrpc":"2.0","error":{"code":42,"message":"no","data":{"name":"error","started":true,"data":[1]}},"id":null}"#
    );
}

proptest! {
    #[test]
    fn any_body_is_at_most_refused(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
        let _ = body::read(&bytes, 4, 3);
    }

    #[test]
    fn anything_like_a_call_is_decoded_without_a_panic(
        text in r#"[\[{]{0,2}("(jsonrpc|method|id|params|in)":("2.0"|1|null|\[\]|"a"),?){0,5}[}\],1]{0,3}"#
    ) {
        match body::read(text.as_bytes(), 4, 3) {
            Body::One(_, call) => {
                prop_assert!(call.is_err() || serde_json::from_str::<Value>(&text).is_ok());
            }
            Body::Batch { text: whole, members } => {
                prop_assert!(!members.is_empty() && members.len() <= 3);
                for raw in members {
                    let _ = member(whole, raw);
                }
            }
        }
    }
}
