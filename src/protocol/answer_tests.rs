//! Tests answers that are encoded and decoded.
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
fn a_result_is_encoded_byte_for_byte() {
    let body = written(|out| result(out, "pong", "[1.0, 2]", Some("7")));
    assert_eq!(body, r#"{"out":"pong","result":[1.0, 2],"id":7}"#);
    let body = written(|out| result(out, "a\"\n\u{1}é", "null", None));
    assert_eq!(body, r#"{"out":"a\"\n\u0001é","result":null}"#);
}

#[test]
fn an_error_is_encoded_with_all_its_members() {
    let nope = RpcError::of(Code::MethodNotFound, "no \"nope\" here", false);
    assert_eq!(
        written(|out| error(out, &nope, None, None)),
        r#"{"out":"error","result":{"code":-32601,"name":"method-not-found","message":"no \"nope\" here","started":false}}"#
    );
    let own = RpcError::new(7, "seven").with_data(json!({"more": 1}));
    assert_eq!(
        written(|out| error(out, &own, Some("\"x\""), None)),
        r#"{"out":"error","result":{"code":7,"name":"error","message":"seven","started":true,"data":{"more":1}},"id":"x"}"#
    );
}

#[test]
fn an_error_with_few_members_is_decoded() {
    let body = br#"{"id":null,"more":[],"out":"error","result":{"code":-32001}}"#;
    let answer = read(body, 9).unwrap();
    let error = answer.outcome.unwrap_err();
    assert_eq!((&*error.name, error.started), ("timeout", true));
    assert!(answer.id.is_none());
}

#[test]
fn the_reason_for_an_invalid_answer_names_its_kind() {
    for (body, why) in [
        ("", "an empty body is not JSON"),
        ("[\"pong\",1,2]", "not an object"),
        (
            "{\"out\":\"pong\"}",
            "JSON of the wrong form near byte 13: missing field `result`",
        ),
        (
            "{\"out\":1,\"result\":1}",
            "JSON of the wrong form near byte 7: invalid type: integer `1`, expected a string",
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
            format!("the response is not an answer: {why}"),
            "{body}"
        );
    }
}

proptest! {
    #[test]
    fn encoded_answers_are_decoded_unchanged(
        name in ".{0,9}", text in ".{0,20}", code in any::<i64>(), started: bool, id in "[1-9][0-9]{0,30}",
    ) {
        let value = serde_json::to_string(&text).unwrap();
        let body = written(|out| result(out, &name, &value, Some(&id)));
        let tree: Value = serde_json::from_str(&body).unwrap();
        prop_assert_eq!(&tree["out"], &json!(name));
        prop_assert_eq!(&tree["result"], &json!(text));
        let answer = read(body.as_bytes(), 9).unwrap();
        prop_assert_eq!((&*answer.name, answer.outcome.unwrap().get(), answer.id.unwrap().get()), (&*name, &*value, &*id));

        let sent = RpcError { started, ..RpcError::new(code, text).with_name(name).with_data(&value) };
        let body = written(|out| error(out, &sent, None, None));
        let got = read(body.as_bytes(), 9).unwrap().outcome.unwrap_err();
        prop_assert_eq!((got.code, &got.name, &got.message, got.started), (sent.code, &sent.name, &sent.message, started));
        prop_assert_eq!(got.data.map(|data| data.to_string()), sent.data.map(|data| data.to_string()));
    }

    #[test]
    fn no_bytes_make_the_decoder_panic(body in prop::collection::vec(any::<u8>(), 0..80)) {
        let _ = read(&body, 3);
    }
}

#[test]
fn what_another_process_sends_is_json_on_one_line_or_no_result() {
    let checked = |name, result: &str| check_forwarded(name, Ok(result.as_bytes().to_vec()));
    for good in [
        "1",
        "\"a\\nb\"",
        "[1.50, {\"n\": 1, \"n\": 2}]",
        &"[".repeat(5_000),
    ] {
        let good = match good.starts_with("[[") {
            true => format!("{good}{}", "]".repeat(5_000)),
            false => good.to_owned(),
        };
        assert_eq!(checked(None, &good).unwrap(), good.as_bytes());
    }
    assert_eq!(checked(Some("pong"), "[1,\r\n2]").unwrap(), b"[1,  2]");
    for bad in [
        "",
        "1}",
        "1}\n{\"out\":\"m\",\"result\":1",
        "tru",
        "\"a\nb\"",
        "\u{feff}1",
    ] {
        let error = checked(None, bad).unwrap_err();
        assert_eq!((error.code, error.started), (-32011, true), "{bad}");
    }
    assert!(check_forwarded(None, Ok(b"\"\xff\"".to_vec())).is_err());
    assert!(checked(Some("error"), "1").is_err());
    let data = RawValue::from_string("[1,\n2]".to_owned()).unwrap();
    let error = RpcError {
        data: Some(data),
        ..RpcError::new(7, "no")
    };
    let error = check_forwarded(None, Err(error)).unwrap_err();
    assert_eq!((error.code, error.data.unwrap().get()), (7, "[1, 2]"));
}
