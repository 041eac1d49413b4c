//! Decodes `rpc.cancel`, the call that cancels another call of its connection.

use serde::Deserialize;
use serde_json::value::RawValue;

/// Longer ids are compared as they are written, in bytes.
const MAX_DECODED: usize = 128;

#[derive(Deserialize)]
struct Params<'a> {
    #[serde(borrow)]
    id: &'a RawValue,
}

/// Returns the id of the call to be cancelled, as JSON; `None` if the params contain none.
pub fn target_id(params: &str) -> Option<&str> {
    // serde would also accept an array, which is not an object.
    if !params.starts_with('{') {
        return None;
    }
    let id = serde_json::from_str::<Params<'_>>(params).ok()?.id.get();
    matches!(id.as_bytes().first()?, b'"' | b'-' | b'0'..=b'9').then_some(id)
}

/// An id to search for. Ids of up to `MAX_DECODED` bytes are compared by value: `1` and `1.0` are equal, and so are
/// `"a"` and `"\u0061"`. The wanted id is decoded only once, for all comparisons.
#[derive(Debug)]
pub struct WantedId<'a> {
    written: &'a str,
    value: IdValue,
}

#[derive(Debug, PartialEq, Eq)]
enum IdValue {
    Text(String),
    Number(Decimal),
    /// Any other text; it equals only the same bytes.
    Other,
}

impl<'a> WantedId<'a> {
    /// Decodes an id that is written as JSON.
    pub fn new(written: &'a str) -> Self {
        let value = value(written);
        WantedId { written, value }
    }

    /// Returns whether `id`, as JSON, has the same value.
    pub fn is(&self, id: &str) -> bool {
        if id == self.written {
            return true;
        }
        // Strings without escapes can be compared as they are written.
        let is_plain = |id: &str| id.starts_with('"') && !id.contains('\\');
        // Decoding takes time that grows with the length, and one cancel compares all calls of its connection.
        if id.len() > MAX_DECODED || self.written.len() > MAX_DECODED {
            return false;
        }
        match &self.value {
            IdValue::Other => false,
            IdValue::Text(_) if is_plain(id) && is_plain(self.written) => false,
            // Numbers and strings are never equal, and integers are written in one way alone.
            IdValue::Text(_) if !id.starts_with('"') => false,
            IdValue::Number(_) if id.starts_with('"') => false,
            IdValue::Number(_) if is_integer(id) && is_integer(self.written) => false,
            wanted => value(id) == *wanted,
        }
    }
}

/// Returns whether it is a positive integer without point and exponent.
fn is_integer(number: &str) -> bool {
    number.bytes().all(|byte| byte.is_ascii_digit()) && !number.starts_with('0')
}

fn value(id: &str) -> IdValue {
    let value = match id.starts_with('"') {
        true => serde_json::from_str(id).ok().map(IdValue::Text),
        false => decimal(id).map(IdValue::Number),
    };
    value.unwrap_or(IdValue::Other)
}

/// A sign, the significant digits, and the power of ten of the last digit.
type Decimal = (bool, String, i64);

fn decimal(number: &str) -> Option<Decimal> {
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
                WantedId::new(one).is(other) && WantedId::new(other).is(one),
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
                !WantedId::new(one).is(other) && !WantedId::new(other).is(one),
                "{one} {other}"
            );
        }
    }

    #[test]
    fn long_ids_are_compared_as_they_are_written() {
        let long = format!("1{}", "0".repeat(MAX_DECODED));
        let same = format!("{long}.0");
        assert!(WantedId::new(&long).is(&long));
        assert!(!WantedId::new(&long).is(&same) && !WantedId::new("1").is(&long));
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
