//! Tests which bodies are refused before the grammar is checked, and which are not.
#![allow(clippy::unwrap_used)]
use super::*;
use proptest::prelude::*;

fn refusal(body: &[u8], depth: usize) -> String {
    let error = text(body, depth).unwrap_err();
    assert_eq!((error.code, error.started), (-32700, false));
    error.message
}

#[test]
fn the_first_level_over_the_limit_is_named() {
    assert!(text(b"[[[]]] ", 3).is_ok());
    assert_eq!(
        refusal(b"[ [[]]]", 2),
        "nested deeper than 2 levels at byte 3"
    );
    assert_eq!(
        refusal(b"{\"a\":{\"b\":[]}}", 2),
        "nested deeper than 2 levels at byte 10"
    );
    assert_eq!(
        refusal(&vec![b'['; 1 << 20], 128),
        "nested deeper than 128 levels at byte 128"
    );
}

#[test]
fn brackets_in_strings_do_not_count_as_nesting() {
    for body in [
        r#"["[[[[","]",["{"]]"#,
        r#"["\"[[[",["\\"],"[\\\"["]"#,
        r#"["\\\\\\",["\u005b[[[["]]"#,
    ] {
        assert!(text(body.as_bytes(), 2).is_ok(), "{body}");
    }
}

#[test]
fn surplus_closing_brackets_gain_no_level() {
    assert_eq!(
        refusal(b"]]]][[[", 2),
        "nested deeper than 2 levels at byte 6"
    );
}

#[test]
fn the_position_of_invalid_utf8_is_named() {
    assert_eq!(refusal(b"", 9), "an empty body is not JSON");
    assert_eq!(refusal(b"\"ab\xFF\"", 9), "not UTF-8 at byte 3");
    assert_eq!(refusal(b"\"\xED\xA0\x80\"", 9), "not UTF-8 at byte 1");
}

#[test]
fn the_position_of_a_grammar_error_is_named() {
    for (body, message) in [
        ("[1,\n 2,\n x]", "not JSON near byte 9: expected value"),
        ("[1", "not JSON, ended at byte 2: EOF while parsing a list"),
        ("é", "not JSON near byte 0: expected value"),
    ] {
        let error = serde_json::from_str::<serde_json::Value>(body).unwrap_err();
        assert_eq!(not_json(body, &error).message, message);
    }
}

proptest! {
    #[test]
    fn the_scan_agrees_with_the_depth_of_a_value(levels in 0..40_usize, depth in 0..40_usize, noise in ".{0,8}") {
        let noise = serde_json::to_string(&noise).unwrap();
        let body = format!("{}{noise}{}", "[".repeat(levels), "]".repeat(levels));
        prop_assert_eq!(text(body.as_bytes(), depth).is_ok(), levels <= depth);
    }

    #[test]
    fn no_bytes_make_the_scan_panic(body in prop::collection::vec(any::<u8>(), 0..60), depth in 0..4_usize) {
        let _ = text(&body, depth);
    }

    #[test]
    fn no_text_of_quotes_and_escapes_makes_the_scan_panic(body in r#"[\["\\a\]]{0,40}"#, depth in 0..4_usize) {
        let _ = text(body.as_bytes(), depth);
    }
}
