//! `rpc.cancel`: the call that ends another call of its connection.

use serde::Deserialize;
use serde_json::value::RawValue;

pub const METHOD: &str = "rpc.cancel";

#[derive(Deserialize)]
struct Params<'a> {
    #[serde(borrow)]
    id: &'a RawValue,
}

/// The id of the call to be cancelled, as JSON; `None` when the params name none. Ids are
/// compared as they were written: `1` and `1.0` are two.
pub fn target_id(params: &str) -> Option<&str> {
    // An array would do for serde as well, and is no object.
    if !params.starts_with('{') {
        return None;
    }
    let id = serde_json::from_str::<Params<'_>>(params).ok()?.id.get();
    matches!(id.as_bytes().first()?, b'"' | b'-' | b'0'..=b'9').then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

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
