//! Writes the two log lines of a slow call, as text and as members of JSON.
//!
//! Texts of clients and programs are used as they are. JSON escapes them, and the log escapes what controls a line or
//! a terminal.

use std::fmt::Write;
use std::net::SocketAddr;
use std::time::Duration;

use serde::Serialize;

use crate::handler::trace::CallIdentity;
use crate::link::call_frame::CallOrigin;
use crate::protocol::call_id::CallId;
use crate::sys::process::unix_time_ms;

/// The facts about a call that only its dispatcher knows, for the slow log.
#[derive(Debug, Clone, Default)]
pub struct ShownCall {
    /// All 0 without a slow log.
    pub origin: CallOrigin,
    peer: Option<SocketAddr>,
    /// The first bytes of its params, as `params` of `[slow-log]` wants.
    params: Option<Box<str>>,
}

impl ShownCall {
    /// `most` is the number of bytes of `params` that are shown.
    pub(super) fn new(
        origin: CallOrigin,
        peer: Option<SocketAddr>,
        (params, most): (&str, usize),
    ) -> Self {
        ShownCall {
            origin,
            peer,
            params: (most > 0).then(|| begin_of(params, most).into()),
        }
    }
}

/// A slow call.
#[derive(Debug)]
pub struct SlowRecord {
    pub call: CallId,
    /// 0 without `[trace]`.
    pub trace_id: u128,
    pub method: String,
    pub kind: &'static str,
    /// The key for the quarantine; 0 if it has none.
    pub params_key: u64,
    pub received_bytes: usize,
    pub shown: ShownCall,
    /// When its handler began, in nanoseconds (CLOCK_MONOTONIC).
    pub began_ns: u64,
    /// When it was found to be slow, in unix milliseconds.
    pub at_ms: u64,
}

/// How a slow call ended.
#[derive(Debug)]
pub struct SlowEnd {
    pub outcome: &'static str,
    pub code: Option<&'static str>,
    pub run_ns: u64,
    /// CPU time, of commands.
    pub cpu: Option<Duration>,
}

/// A line of the log: the text, and the members that JSON has beside it.
#[derive(Debug)]
pub struct SlowLine {
    pub text: String,
    pub members: String,
}

/// The members of both lines.
#[derive(Serialize)]
struct CommonMembers<'a> {
    event: &'static str,
    call: CallId,
    #[serde(skip_serializing_if = "Option::is_none")]
    trace_id: Option<String>,
    method: &'a str,
    kind: &'static str,
}

#[derive(Serialize)]
struct BeginMembers<'a> {
    #[serde(flatten)]
    common: CommonMembers<'a>,
    age_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    accept_wait_us: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    queue_us: Option<u64>,
    received_bytes: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    params_key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    params: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<SocketAddr>,
    evidence: &'a str,
}

#[derive(Serialize)]
struct EndMembers<'a> {
    #[serde(flatten)]
    common: CommonMembers<'a>,
    outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<&'static str>,
    run_us: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu_us: Option<u64>,
}

impl SlowRecord {
    /// Describes a call that has become slow now. The caller adds the rest.
    pub fn new(identity: &CallIdentity, method: &str, kind: &'static str) -> Self {
        SlowRecord {
            call: identity.id(),
            trace_id: (identity.trace()).map_or(0, |trace| trace.into_context().trace_id),
            method: method.to_owned(),
            kind,
            params_key: 0,
            received_bytes: 0,
            shown: ShownCall::default(),
            began_ns: 0,
            at_ms: unix_time_ms(),
        }
    }

    fn common(&self, event: &'static str) -> CommonMembers<'_> {
        CommonMembers {
            event,
            call: self.call,
            trace_id: (self.trace_id != 0).then(|| format!("{:032x}", self.trace_id)),
            method: &self.method,
            kind: self.kind,
        }
    }

    /// Returns the line that is written while the call runs. `now_ns` is CLOCK_MONOTONIC.
    pub fn begin_line(&self, now_ns: u64, evidence: &str) -> SlowLine {
        // If the call was read before the slow log was switched on, its origin is not known.
        let origin = Some(self.shown.origin).filter(|origin| origin.read_ns > 0);
        let age_ms = now_ns.saturating_sub(self.began_ns) / 1_000_000;
        let members = BeginMembers {
            common: self.common("slow-call"),
            age_ms,
            accept_wait_us: origin.map(|it| u64::from(it.accept_wait_ms) * 1000),
            queue_us: origin.map(|it| self.began_ns.saturating_sub(it.read_ns) / 1000),
            received_bytes: self.received_bytes,
            params_key: (self.params_key != 0).then(|| format!("{:016x}", self.params_key)),
            params: self.shown.params.as_deref(),
            peer: self.shown.peer,
            evidence,
        };
        let mut text = format!(
            "slow call {} {} {:.2} s: {evidence} kind={}",
            self.call,
            self.method,
            age_ms as f64 / 1e3,
            self.kind
        );
        // Writing to a text cannot fail.
        if let Some(queue_us) = members.queue_us {
            let _ = write!(text, " queue={:.6}s", queue_us as f64 / 1e6);
        }
        let _ = write!(text, " received={}", self.received_bytes);
        if let Some(key) = &members.params_key {
            let _ = write!(text, " params_key={key}");
        }
        if let Some(peer) = self.shown.peer {
            let _ = write!(text, " peer={peer}");
        }
        if let Some(trace) = &members.common.trace_id {
            let _ = write!(text, " trace={trace}");
        }
        if let Some(params) = members.params {
            let _ = write!(text, " params={}", quoted(params));
        }
        SlowLine {
            members: to_json(&members),
            text,
        }
    }

    /// Returns the line that is written at the end of the call.
    pub fn end_line(&self, end: &SlowEnd) -> SlowLine {
        let members = EndMembers {
            common: self.common("slow-call-end"),
            outcome: end.outcome,
            code: end.code,
            run_us: end.run_ns / 1000,
            cpu_us: end.cpu.map(|cpu| cpu.as_micros() as u64),
        };
        let run = end.run_ns as f64 / 1e9;
        let mut text = format!(
            "slow call {} {}: {} after {run:.2} s",
            self.call, self.method, end.outcome
        );
        if let Some(cpu) = end.cpu {
            let _ = write!(text, ", cpu {:.2} s", cpu.as_secs_f64());
        }
        if let Some(code) = end.code.filter(|code| *code != end.outcome) {
            let _ = write!(text, " code={code}");
        }
        SlowLine {
            members: to_json(&members),
            text,
        }
    }
}

/// Returns at most the first `most` bytes of a text, without half a character.
pub fn begin_of(text: &str, most: usize) -> &str {
    let mut end = text.len().min(most);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

fn to_json(members: &impl Serialize) -> String {
    // Plain data cannot fail.
    serde_json::to_string(members).unwrap_or_default()
}

/// Returns a text in quotes, with its quotes and backslashes escaped.
pub(super) fn quoted(text: &str) -> String {
    serde_json::to_string(text).unwrap_or_default()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn record(params: &str, most: usize) -> SlowRecord {
        SlowRecord {
            call: CallId {
                pid: 4712,
                number: 9,
            },
            trace_id: 5,
            method: "score".into(),
            kind: "pool",
            params_key: 0xab,
            received_bytes: 218,
            shown: ShownCall::new((999_188_000, 3).into(), None, (params, most)),
            began_ns: 1_000_000_000,
            at_ms: 0,
        }
    }

    #[test]
    fn both_lines_say_the_same_as_text_and_as_members() {
        let record = record("{\"a\": \"\u{1b}\n€\"}", 9);
        let line = record.begin_line(2_005_000_000, "S asleep");
        assert_eq!(
            line.text,
            "slow call 4712.9 score 1.00 s: S asleep kind=pool queue=0.000812s received=218 \
             params_key=00000000000000ab trace=00000000000000000000000000000005 params=\"{\\\"a\\\": \\\"\\u001b\\n\""
        );
        let members: Value = serde_json::from_str(&line.members).unwrap();
        assert_eq!(members["event"], "slow-call");
        assert_eq!(
            (&members["call"], &members["age_ms"]),
            (&"4712.9".into(), &1005.into())
        );
        assert_eq!(members["accept_wait_us"], 3000);
        assert_eq!(members["params"], "{\"a\": \"\u{1b}\n");
        let end = SlowEnd {
            outcome: "error",
            code: Some("command-failed"),
            run_ns: 5_000_000_000,
            cpu: Some(Duration::from_millis(30)),
        };
        let line = record.end_line(&end);
        assert_eq!(
            line.text,
            "slow call 4712.9 score: error after 5.00 s, cpu 0.03 s code=command-failed"
        );
        let members: Value = serde_json::from_str(&line.members).unwrap();
        assert_eq!(
            (&members["run_us"], &members["cpu_us"]),
            (&5_000_000.into(), &30_000.into())
        );
    }

    #[test]
    fn without_room_for_params_none_are_kept() {
        let line = record("\"secret\"", 0).begin_line(0, "");
        assert!(!line.text.contains("params=") && !line.members.contains("secret"));
    }
}
