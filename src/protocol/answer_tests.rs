//! Answers written, and read back.
#![allow(clippy::unwrap_used)]
use super::*;
use crate::protocol::Code;
use proptest::prelude::*;
use serde_json::{Value, json};

fn written(write: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut out = b"|".to_vec();
    write(&mut out);
    String::from_utf8(out.split_off(1)).unwrap()
}

#[test]
fn a_result_is_written_to_the_letter() {
    let body = written(|out| result(out, "pong", "[1.0, 2]", Some("7")));
    assert_eq!(body, r#"{"out":"pong","result":[1.0, 2],"id":7}"#);
    let body = written(|out| result(out, "a\"\n\u{1}é", "null", None));
    assert_eq!(body, r#"{"out":"a\"\n\u0001é","result":null}"#);
}

#[test]
fn an_error_is_written_with_all_its_members() {
    let nope = RpcError::of(Code::MethodNotFound, "no \"nope\" here", false);
    assert_eq!(
        written(|out| error(out, &nope, None)),
        r#"{"out":"error","result":{"code":-32601,"name":"method-not-found","message":"no \"nope\" here","started":false}}"#
    );
    let own = RpcError::new(7, "seven").with_data(json!({"more": 1}));
    assert_eq!(
        written(|out| error(out, &own, Some("\"x\""))),
        r#"{"out":"error","result":{"code":7,"name":"error","message":"seven","started":true,"data":{"more":1}},"id":"x"}"#
    );
}

#[test]
fn an_error_of_few_words_is_read_with_care() {
    let body = br#"{"id":null,"more":[],"out":"error","result":{"code":-32001}}"#;
    let answer = read(body, 9).unwrap();
    let error = answer.outcome.unwrap_err();
    assert_eq!((&*error.name, error.started), ("timeout", true));
    assert_eq!(answer.id, None);
}

#[test]
fn what_is_no_answer_is_told_by_what_it_is() {
    for (body, why) in [
        ("", "an empty body is not JSON"),
        ("[\"pong\",1,2]", "not an object"),
        (
            "{\"out\":\"pong\"}",
            "not JSON near byte 13: missing field `result`",
        ),
        (
            "{\"out\":1,\"result\":1}",
            "not JSON near byte 7: invalid type: integer `1`, expected a string",
        ),
        (
            "{\"out\":\"error\",\"result\":[1]}",
            "the result of an error is not an object",
        ),
        ("[[[]]]", "nested deeper than 2 levels at byte 2"),
    ] {
        let said = read(body.as_bytes(), 2).unwrap_err().to_string();
        assert_eq!(
            said,
            format!("what came back is no answer: {why}"),
            "{body}"
        );
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(
        name in ".{0,9}", text in ".{0,20}", code in any::<i64>(), started: bool, id in "[1-9][0-9]{0,30}",
    ) {
        let value = serde_json::to_string(&text).unwrap();
        let body = written(|out| result(out, &name, &value, Some(&id)));
        let tree: Value = serde_json::from_str(&body).unwrap();
        prop_assert_eq!(&tree["out"], &json!(name));
        prop_assert_eq!(&tree["result"], &json!(text));
        let answer = read(body.as_bytes(), 9).unwrap();
        prop_assert_eq!((&*answer.name, answer.outcome.unwrap(), answer.id), (&*name, &*value, Some(&*id)));

        let sent = RpcError { started, ..RpcError::new(code, text).with_name(name).with_data(&value) };
        let body = written(|out| error(out, &sent, None));
        let got = read(body.as_bytes(), 9).unwrap().outcome.unwrap_err();
        prop_assert_eq!((got.code, &got.name, &got.message, got.started), (sent.code, &sent.name, &sent.message, started));
        prop_assert_eq!(got.data.map(|data| data.to_string()), sent.data.map(|data| data.to_string()));
    }

    #[test]
    fn no_bytes_make_reading_panic(body in prop::collection::vec(any::<u8>(), 0..80)) {
        let _ = read(&body, 3);
    }
}
