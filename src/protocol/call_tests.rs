//! Tests the decoder of the plain form with valid bodies, hostile bodies and random bytes.
#![allow(clippy::unwrap_used)]

use super::*;
use proptest::prelude::*;

const DEPTH: usize = 128;

fn call(body: &str) -> Call<'_> {
    parse(body.as_bytes(), DEPTH).unwrap_or_else(|refusal| panic!("{body}: {}", refusal.error))
}

/// Returns the code, the message and the echoed id of a refusal.
fn refusal(body: impl AsRef<[u8]>) -> (i64, String, Option<String>) {
    let body = body.as_ref();
    let refusal = parse(body, DEPTH)
        .err()
        .unwrap_or_else(|| panic!("{} was taken for a call", body.escape_ascii()));
    assert!(!refusal.error.started);
    (
        refusal.error.code,
        refusal.error.message,
        refusal.id.map(str::to_owned),
    )
}

fn refused_as_no_call(body: &str, message: &str, id: Option<&str>) {
    let (code, said, echoed) = refusal(body);
    assert_eq!(
        (code, &*said, echoed.as_deref()),
        (-32600, message, id),
        "{body}"
    );
}

#[test]
fn a_whole_call_is_decoded_byte_for_byte() {
    let read = call(
        r#" {"in" : "ping", "params":  [1.0, 1e400 ,"a\u0020b"] , "id":"x\n", "timeout_ms":500, "more":{}} "#,
    );
    assert_eq!(
        read,
        Call {
            method: Cow::Borrowed("ping"),
            params: r#"[1.0, 1e400 ,"a\u0020b"]"#,
            id: Some(r#""x\n""#),
            timeout_ms: Some(500),
        }
    );
    assert!(matches!(read.method, Cow::Borrowed(_)));
}

#[test]
fn all_but_the_method_may_be_absent() {
    for body in [
        r#"{"in":"ping"}"#,
        r#"{"in":"ping","id":null,"params":null}"#,
    ] {
        let read = call(body);
        assert_eq!(
            (read.params, read.id, read.timeout_ms),
            ("null", None, None)
        );
    }
}

#[test]
fn numbers_keep_each_digit_in_ids_and_params() {
    let digits = "1234567890123456789012345678901234567890.10";
    let body = format!(r#"{{"id":{digits},"in":"ping","params":{digits}}}"#);
    let read = call(&body);
    assert_eq!((read.id, read.params), (Some(digits), digits));
    assert_eq!(call(r#"{"in":"ping","id":-0}"#).id, Some("-0"));
}

#[test]
fn escapes_in_a_method_name_are_decoded() {
    assert_eq!(
        call(r#"{"in":"p\u0069n\/g \ud83d\ude00"}"#).method,
        "pin/g 😀"
    );
    assert_eq!(call(r#"{"\u0069n":"ping"}"#).method, "ping");
    let longest = "timeout_ms"
        .bytes()
        .map(|byte| format!("\\u{byte:04X}"))
        .collect::<String>();
    let body = format!(r#"{{"in":"ping","{longest}":7}}"#);
    assert_eq!(call(&body).timeout_ms, Some(7));
}

#[test]
fn timeouts_are_whole_milliseconds_in_plain_digits() {
    assert_eq!(call(r#"{"in":"ping","timeout_ms":0}"#).timeout_ms, Some(0));
    let body = format!(r#"{{"in":"ping","timeout_ms":{}}}"#, u64::MAX);
    assert_eq!(call(&body).timeout_ms, Some(u64::MAX));
    for timeout in [
        "-1",
        "-0",
        "1.0",
        "1e3",
        "18446744073709551616",
        r#""5""#,
        "null",
        "[]",
        "true",
    ] {
        refused_as_no_call(
            &format!(r#"{{"in":"ping","timeout_ms":{timeout},"id":7}}"#),
            "`timeout_ms` at byte 26 is not a whole number of milliseconds in plain digits \
             (0 to 18446744073709551615)",
            Some("7"),
        );
    }
}

#[test]
fn a_member_given_twice_is_refused_however_it_is_spelt() {
    for (member, key, value) in [
        ("in", "in", "\"b\""),
        ("in", r"\u0069n", "\"b\""),
        ("in", r"i\u006E", "\"b\""),
        ("params", "params", "2"),
        ("params", r"p\u0061rams", "1"),
        ("timeout_ms", "timeout_ms", "1"),
        ("method", "method", "1"),
        ("jsonrpc", "jsonrpc", "1"),
    ] {
        let twice = format!(
            r#"{{"id":7,"in":"a","params":1,"timeout_ms":9,"method":"b","jsonrpc":"2.0","{key}":{value}}}"#
        );
        // A duplicate member is reported first, even if the call has other errors.
        let at = twice.len() - 1 - value.len();
        let message = format!("`{member}` is given twice, the second time at byte {at}");
        refused_as_no_call(&twice, &message, Some("7"));
    }
    refused_as_no_call(
        r#"{"in":"a","id":1,"id":1}"#,
        "`id` is given twice, the second time at byte 22",
        None,
    );
    refused_as_no_call(
        r#"{"in":"a","id":null,"id":1}"#,
        "`id` is given twice, the second time at byte 25",
        None,
    );
}

#[test]
fn duplicate_members_elsewhere_are_accepted() {
    let body = r#"{"in":"ping","params":{"in":1,"in":2,"id":3},"x":1,"x":2,"IN":1,"in ":2}"#;
    assert_eq!(call(body).params, r#"{"in":1,"in":2,"id":3}"#);
}

#[test]
fn two_names_for_the_method_are_refused() {
    refused_as_no_call(
        r#"{"in":"a","method":"b","id":7}"#,
        "`in` and `method` (at byte 19) in one call; `in` alone names the method",
        Some("7"),
    );
    refused_as_no_call(
        r#"{"m\u0065thod":"a","in":"a"}"#,
        "`in` and `method` (at byte 15) in one call; `in` alone names the method",
        None,
    );
}

#[test]
fn a_call_without_a_method_is_refused() {
    refused_as_no_call("{}", "`in` is missing; it names the method", None);
    refused_as_no_call(
        r#"{"method":"ping","id":"a"}"#,
        "`in` is missing; it names the method, `method` (at byte 10) does not",
        Some("\"a\""),
    );
    for (value, kind) in [
        ("null", "null"),
        ("1", "a number"),
        ("-1.5", "a number"),
        ("true", "a boolean"),
        ("[\"ping\"]", "an array"),
        ("{}", "an object"),
    ] {
        let message = format!("`in` at byte 6 is {kind}; it takes a string, the method's name");
        refused_as_no_call(&format!(r#"{{"in":{value},"id":7}}"#), &message, Some("7"));
    }
}

#[test]
fn an_id_is_a_string_or_a_number() {
    for (value, kind) in [
        ("true", "a boolean"),
        ("[]", "an array"),
        ("{\"a\":1}", "an object"),
    ] {
        let message = format!("`id` at byte 6 is {kind}; it takes a string or a number");
        refused_as_no_call(&format!(r#"{{"id":{value},"in":"a"}}"#), &message, None);
    }
}

#[test]
fn an_id_is_echoed_from_any_position() {
    for body in [
        r#"{"in":7,"id":"a"}"#,
        r#"{"id":"a","in":7}"#,
        r#"{"in":7,"\u0069d":"a"}"#,
    ] {
        assert_eq!(refusal(body).2.as_deref(), Some("\"a\""));
    }
}

#[test]
fn the_refusal_of_another_form_names_it() {
    refused_as_no_call(
        r#"[{"in":"ping"}]"#,
        "an array is a JSON-RPC 2.0 batch, not a call of the plain form",
        None,
    );
    refused_as_no_call(
        r#"{"jsonrpc":"2.0","method":"ping","id":7}"#,
        "`jsonrpc` at byte 11 makes this JSON-RPC 2.0; the plain form is \
         {\"in\": METHOD, \"params\": …}",
        Some("7"),
    );
    refused_as_no_call("7", "a number is not a call; a call is an object", None);
    refused_as_no_call(" null", "null is not a call; a call is an object", None);
    refused_as_no_call(
        r#""in""#,
        "a string is not a call; a call is an object",
        None,
    );
}

/// Half a surrogate pair is valid JSON but not text: it is accepted in values that are not decoded.
#[test]
fn a_lone_surrogate_is_accepted_only_in_params_id_and_unknown_members() {
    let read = call(r#"{"in":"ping","params":["\ud800"],"id":"\udfaa","\ud800":1}"#);
    assert_eq!(
        (read.params, read.id),
        (r#"["\ud800"]"#, Some(r#""\udfaa""#))
    );
    refused_as_no_call(
        r#"{"in":"\ud800","id":7}"#,
        "`in` at byte 6 contains half a surrogate pair",
        Some("7"),
    );
}

#[test]
fn invalid_json_is_a_parse_error_without_an_id() {
    for body in [
        "",
        " ",
        "{",
        "}",
        "{\"in\"}",
        "{\"in\":}",
        "{in:1}",
        "{'in':1}",
        "[1,]",
        "[,1]",
        "[1 2]",
        "nul",
        "True",
        "\"",
        "\"\u{1}\"",
        "\"\\x\"",
        "\"\\u12\"",
        "01",
        "+1",
        "-",
        "1.",
        ".5",
        "1e",
        "0x1",
        "NaN",
        "-Infinity",
        "1 2",
        "[][]",
        "{}}",
        "\u{FEFF}\u{FEFF}{}",
        "[1]//",
        "[\u{A0}]",
        "\"a\nb\"",
        "[1\u{0}]",
        "{\"a\":1,}",
        "{1:2}",
    ] {
        let inside = format!(r#"{{"id":7,"in":"ping","params":{body}}}"#);
        for body in [body, &inside] {
            let (code, message, id) = refusal(body);
            assert_eq!((code, id), (-32700, None), "{body:?}");
            assert!(message.contains("byte") || body.is_empty(), "{message}");
        }
    }
    for body in [
        &b"{\"in\":\"\xFF\"}"[..],
        b"{\"\xC0\xAF\":1}",
        b"{\"in\":\"a\",\"params\":\"\xED\xA0\x80\"}",
    ] {
        assert!(refusal(body).1.starts_with("not UTF-8 at byte "));
    }
    assert_eq!(
        refusal(r#"{"in": x}"#).1,
        "not JSON near byte 7: expected value"
    );
}

#[test]
fn nesting_is_refused_before_anything_recurses() {
    let nested = |levels| {
        format!(
            r#"{{"in":"ping","params":{}{}}}"#,
            "[".repeat(levels),
            "]".repeat(levels)
        )
    };
    // The call itself is the first level.
    assert!(parse(nested(DEPTH - 1).as_bytes(), DEPTH).is_ok());
    let (code, message, _) = refusal(nested(DEPTH));
    assert_eq!(
        (code, &*message),
        (-32700, "nested deeper than 128 levels at byte 149")
    );
    assert!(refusal(nested(100_000)).1.starts_with("nested deeper"));
    assert!(
        refusal(r#"{"a":"#.repeat(100_000))
            .1
            .starts_with("nested deeper")
    );
    // A limit far above the one of serde_json is still the one that applies.
    assert!(parse(nested(100_000).as_bytes(), 100_001).is_ok());
}

/// Any JSON value as text, in unusual spellings too.
fn json() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        "null|true|false",
        "-?(0|[1-9][0-9]{0,30})(\\.[0-9]{1,9})?([eE][+-]?[0-9]{1,4})?",
        ".{0,8}".prop_map(|text| serde_json::to_string(&text).unwrap()),
        r#""(\\u[0-9a-fA-F]{4}|\\[nrt/"]|[ -!#-\[\]-~]){0,6}""#,
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4)
                .prop_map(|all| format!("[ {}]", all.join(" ,"))),
            prop::collection::vec(inner, 0..4).prop_map(|all| {
                let members: Vec<_> = all
                    .iter()
                    .map(|value| format!("\"id\" :\t{value}"))
                    .collect();
                format!("{{{}}}", members.join(",\n"))
            }),
        ]
    })
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(body in prop::collection::vec(any::<u8>(), 0..80), depth in 0..5_usize) {
        let _ = parse(&body, depth);
    }

    #[test]
    fn no_mutant_of_a_call_makes_it_panic(
        at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<prop::sample::Index>(),
    ) {
        let mut body = br#"{"in":"p\u0069ng","params":[{"a":"\\"}],"id":-1.5e3,"timeout_ms":10}"#.to_vec();
        *at.get_mut(&mut body) = byte;
        let _ = parse(&body, DEPTH);
        let _ = parse(&body[..cut.index(body.len())], DEPTH);
    }

    #[test]
    fn params_and_ids_are_kept_byte_for_byte(
        params in json(), id in r#"-?[1-9][0-9]{0,40}|"[ -!#-\[\]-~]{0,9}""#, name in ".{0,12}",
    ) {
        let mut body = Vec::new();
        let sent = Call { method: Cow::Borrowed(&name), params: &params, id: Some(&id), timeout_ms: Some(9) };
        sent.write(&mut body, |_| {});
        prop_assert_eq!(parse(&body, DEPTH).unwrap(), sent);
    }

    #[test]
    fn the_grammar_is_the_one_of_serde_json(body in r#"[\[\]{}",:\\u01e.\-tn ]{0,24}"#) {
        let refused = parse(body.as_bytes(), DEPTH).err().map(|refusal| refusal.error.code);
        let strict = serde_json::from_str::<Box<serde_json::value::RawValue>>(&body).is_ok();
        prop_assert_eq!(refused != Some(-32700), strict);
    }
}
