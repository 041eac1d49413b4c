//! The last slow calls of a server, as `status --json`, `/status.json`, `top` and `slow` show them.

use serde::Serialize;

use crate::link::metrics_board::BoardReader;
use crate::link::slow_calls::SlowCall;
use crate::protocol::call_id::CallId;
use crate::sys::process::monotonic_ns;

/// One slow call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SlowFigures {
    pub call: CallId,
    /// Null without `[trace]`.
    pub trace_id: Option<String>,
    pub method: String,
    /// When it became slow, in seconds since 1970.
    pub at: u64,
    /// How long its handler has run, or ran.
    pub age_ms: u64,
    pub done: bool,
    /// Null while it runs.
    pub outcome: Option<String>,
    pub evidence: String,
}

impl SlowFigures {
    fn of(call: SlowCall, now_ns: u64) -> Self {
        let (outcome, run_ns) = call.end.unzip();
        let run_ns = run_ns.unwrap_or_else(|| now_ns.saturating_sub(call.began_ns));
        SlowFigures {
            call: call.call,
            trace_id: call.trace_id,
            method: call.method,
            at: call.at_ms / 1000,
            age_ms: run_ns / 1_000_000,
            done: outcome.is_some(),
            outcome,
            evidence: call.evidence,
        }
    }

    /// Returns the last slow calls, oldest first.
    pub fn all(board: &BoardReader) -> Vec<Self> {
        let now_ns = monotonic_ns();
        let calls = board.slow_calls().into_iter();
        calls.map(|call| SlowFigures::of(call, now_ns)).collect()
    }
}
