//! Finds the trace context of a call in its body.
//!
//! In the plain form it is in the members `traceparent` and `tracestate` beside `in`. In JSON-RPC it is in
//! `params._meta`, else beside `method`. The text is searched for the name first, and nothing is parsed again
//! without a hit. Params are searched only where the form allows a context in them. A key that is written with
//! escapes is not found.

use std::borrow::Cow;
use std::fmt;

use memchr::memmem::Finder;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::trace_context::{ReceivedTrace, TraceFields};

/// Searches bodies of calls.
#[derive(Debug)]
pub struct TraceSearch(Finder<'static>);

impl Default for TraceSearch {
    fn default() -> Self {
        TraceSearch(Finder::new("traceparent"))
    }
}

impl TraceSearch {
    /// Returns the context of a call. `body` is the JSON of the call, whose grammar is checked, `params` its
    /// params, usually a part of it. `is_rpc` says whether the call has the JSON-RPC form.
    pub fn find(&self, body: &[u8], params: &str, is_rpc: bool) -> ReceivedTrace {
        let (before, after) = around(body, params);
        let is_in_params = is_rpc && params.starts_with('{') && self.occurs(params.as_bytes());
        let is_beside = self.occurs(before) || self.occurs(after);
        if !is_in_params && !is_beside {
            return ReceivedTrace::Absent;
        }
        if is_in_params {
            let found = of_params(params);
            if found != ReceivedTrace::Absent {
                return found;
            }
        }
        // The params are left out, because they may be long.
        let call = [before, b"0", after].concat();
        match std::str::from_utf8(if after.is_empty() { before } else { &call }) {
            Ok(call) if is_beside => members(call).received(),
            _ => ReceivedTrace::Absent,
        }
    }

    #[inline]
    fn occurs(&self, text: &[u8]) -> bool {
        self.0.find(text).is_some()
    }
}

/// Returns what is before and behind the params. If they are no part of the body, all is before them.
fn around<'a>(body: &'a [u8], params: &str) -> (&'a [u8], &'a [u8]) {
    let body = body.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(body);
    let start = params.as_ptr().addr().wrapping_sub(body.as_ptr().addr());
    let parts = start
        .checked_add(params.len())
        .and_then(|end| Some((body.get(..start)?, body.get(end..)?)));
    parts.unwrap_or((body, b""))
}

fn of_params(params: &str) -> ReceivedTrace {
    match members(params).meta[..] {
        [] => ReceivedTrace::Absent,
        [meta] => members(meta.get()).received(),
        // With several `_meta` members it is not known which one is right.
        _ => ReceivedTrace::Invalid,
    }
}

/// The members of an object that have a meaning here.
#[derive(Default)]
struct Members<'a> {
    fields: TraceFields<'a>,
    meta: Vec<&'a RawValue>,
}

impl Members<'_> {
    fn received(self) -> ReceivedTrace {
        self.fields.received()
    }
}

/// Returns the members of an object; none if it cannot be read.
fn members(object: &str) -> Members<'_> {
    let mut reader = serde_json::Deserializer::from_str(object);
    (reader.deserialize_map(MembersVisitor)).unwrap_or_default()
}

struct MembersVisitor;

impl<'de> Visitor<'de> for MembersVisitor {
    type Value = Members<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<'de>, A::Error> {
        let mut members = Members::default();
        while let Some(key) = map.next_key()? {
            match key {
                Key::Parent => members.fields.add_parent(text(map.next_value()?)),
                Key::State => members.fields.add_state(text(map.next_value()?)),
                Key::Meta => members.meta.push(map.next_value()?),
                Key::Other => _ = map.next_value::<IgnoredAny>()?,
            }
        }
        Ok(members)
    }
}

/// Returns a string; `None` for any other value.
fn text(value: &RawValue) -> Option<Cow<'_, str>> {
    let raw = value.get();
    match raw.strip_prefix('"')?.strip_suffix('"')? {
        text if !text.contains('\\') => Some(Cow::Borrowed(text)),
        _ => serde_json::from_str(raw).ok().map(Cow::Owned),
    }
}

#[derive(Deserialize)]
#[serde(field_identifier)]
enum Key {
    #[serde(rename = "traceparent")]
    Parent,
    #[serde(rename = "tracestate")]
    State,
    #[serde(rename = "_meta")]
    Meta,
    #[serde(other)]
    Other,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::trace_context::TraceContext;

    const ONE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    const TWO: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";

    fn found(body: &str, params: &str, is_rpc: bool) -> ReceivedTrace {
        let at = body.find(params).map(|at| &body[at..at + params.len()]);
        TraceSearch::default().find(body.as_bytes(), at.unwrap_or(params), is_rpc)
    }

    fn valid(parent: &str, state: Option<&str>) -> ReceivedTrace {
        let context = TraceContext::decode(parent.as_bytes()).map(|context| TraceContext {
            state: state.map(Into::into),
            ..context
        });
        context.map_or(ReceivedTrace::Invalid, |it| {
            ReceivedTrace::Valid(Box::new(it))
        })
    }

    #[test]
    fn members_beside_the_method_are_found_on_both_sides_of_the_params() {
        let before = format!(r#"{{"traceparent": "{ONE}", "in": "a", "params": [1]}}"#);
        assert_eq!(found(&before, "[1]", false), valid(ONE, None));
        let after = format!(
            r#"{{"in": "a", "params": [1], "tracestate": "a=\"1", "traceparent": "{ONE}"}}"#
        );
        assert_eq!(found(&after, "[1]", false), valid(ONE, Some("a=\"1")));
        let without = format!("\u{feff}{{\"in\": \"a\", \"traceparent\": \"{ONE}\"}}");
        assert_eq!(found(&without, "null", false), valid(ONE, None));
        let inside = format!(r#"{{"in": "a", "params": {{"_meta": {{"traceparent": "{ONE}"}}}}}}"#);
        let params = &inside[22..inside.len() - 1];
        assert_eq!(found(&inside, params, false), ReceivedTrace::Absent);
        assert_eq!(found(&inside, params, true), valid(ONE, None));
    }

    #[test]
    fn in_json_rpc_the_metadata_of_the_params_win() {
        let meta = format!(r#"{{"_meta": {{"traceparent": "{ONE}"}}}}"#);
        for (params, expected) in [
            (meta.as_str(), valid(ONE, None)),
            (r#"{"_meta": {"traceparent": 7}}"#, ReceivedTrace::Invalid),
            (r#"{"_meta": {"other": "traceparent"}}"#, valid(TWO, None)),
            (r#"{"_meta": ["traceparent"]}"#, valid(TWO, None)),
            (r#"{"traceparent": "x"}"#, valid(TWO, None)),
            (r#"["traceparent"]"#, valid(TWO, None)),
            (
                r#"{"_meta": {}, "_meta": {"traceparent": ""}}"#,
                ReceivedTrace::Invalid,
            ),
        ] {
            let body = format!(r#"{{"method": "a", "params": {params}, "traceparent": "{TWO}"}}"#);
            assert_eq!(found(&body, params, true), expected, "{params}");
        }
    }

    #[test]
    fn what_is_repeated_or_no_string_is_invalid() {
        for (members, expected) in [
            (
                format!(r#""traceparent": "{ONE}", "traceparent": "{ONE}""#),
                ReceivedTrace::Invalid,
            ),
            (r#""traceparent": null"#.to_owned(), ReceivedTrace::Invalid),
            (
                r#""tracestate": "a=1", "x": "traceparent""#.to_owned(),
                ReceivedTrace::Absent,
            ),
            (
                format!(r#""traceparent": "{ONE}", "tracestate": 1"#),
                valid(ONE, None),
            ),
            (
                format!(r#""traceparent": "{ONE}", "tracestate": "a=1", "tracestate": "b=1""#),
                valid(ONE, None),
            ),
        ] {
            let body = format!(r#"{{"in": "a", {members}}}"#);
            assert_eq!(found(&body, "null", false), expected, "{members}");
        }
    }
}
