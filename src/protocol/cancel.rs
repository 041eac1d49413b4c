//! `rpc.cancel`: the call that ends another call of its connection.

use serde::Deserialize;
use serde_json::value::RawValue;

pub const METHOD: &str = "rpc.cancel";

#[derive(Deserialize)]
struct Params<'a> {
    #[serde(borrow)]
    id: &'a RawValue,
}

/// The id of the call to be cancelled, as JSON; `None` when the params name none.
pub fn target_id(params: &str) -> Option<&str> {
    // An array would do for serde as well, and is no object.
    if !params.starts_with('{') {
        return None;
    }
    let id = serde_json::from_str::<Params<'_>>(params).ok()?.id.get();
    matches!(id.as_bytes().first()?, b'"' | b'-' | b'0'..=b'9').then_some(id)
}

/// Whether two ids, as JSON, have the same value: `1` and `1.0` do, and so do `"a"` and `"\u0061"`.
pub fn is_same_id(one: &str, other: &str) -> bool {
    if one == other {
        return true;
    }
    let is_text = |id: &str| id.starts_with('"');
    match (is_text(one), is_text(other)) {
        // Without an escape they differ as they are written.
        (true, true) if one.contains('\\') || other.contains('\\') => {
            match (
                serde_json::from_str::<String>(one),
                serde_json::from_str::<String>(other),
            ) {
                (Ok(one), Ok(other)) => one == other,
                _ => false,
            }
        }
        (false, false) => {
            let value = decimal(one);
            value.is_some() && value == decimal(other)
        }
        _ => false,
    }
}

/// A number as its sign, its significant digits, and the power of ten of the last of them.
fn decimal(number: &str) -> Option<(bool, String, i64)> {
    let digits = number.strip_prefix('-');
    let (is_negative, rest) = (digits.is_some(), digits.unwrap_or(number));
    let (mantissa, exponent) = rest.split_once(['e', 'E']).unwrap_or((rest, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let all = format!("{whole}{fraction}");
    let significant = all.trim_end_matches('0');
    if significant.is_empty() {
        return Some((false, String::new(), 0));
    }
    if !all.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let exponent: i64 = exponent.parse().ok()?;
    let shift = (all.len() - significant.len()) as i64 - fraction.len() as i64;
    let digits = significant.trim_start_matches('0').to_owned();
    Some((is_negative, digits, exponent.checked_add(shift)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_compared_by_value() {
        for (one, other) in [
            ("1", "1.0"),
            ("1", "10e-1"),
            ("1500", "1.5E+3"),
            ("-0", "0.00"),
            ("0.05", "5e-2"),
            ("12345678901234567890123", "12345678901234567890123.0"),
            ("\"a/b\"", "\"\\u0061\\/b\""),
        ] {
            assert!(
                is_same_id(one, other) && is_same_id(other, one),
                "{one} {other}"
            );
        }
        for (one, other) in [
            ("1", "-1"),
            ("1", "\"1\""),
            ("1", "10"),
            ("12345678901234567890123", "12345678901234567890124"),
            ("\"a\"", "\"b\""),
            ("\"\\ud800\"", "\"\\udc00\""),
            ("1", "null"),
        ] {
            assert!(
                !is_same_id(one, other) && !is_same_id(other, one),
                "{one} {other}"
            );
        }
    }

    #[test]
    fn only_an_object_with_an_id_names_a_call() {
        assert_eq!(target_id(r#"{"id": 7}"#), Some("7"));
        assert_eq!(target_id(r#"{"id": "a", "why": null}"#), Some("\"a\""));
        for params in [
            "7",
            "[7]",
            "null",
            "{}",
            r#"{"id": null}"#,
            r#"{"id": [7]}"#,
        ] {
            assert_eq!(target_id(params), None, "{params}");
        }
    }
}
