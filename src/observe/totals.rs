//! Sums the metrics board for `status --json`: totals of the server, figures of each method, and
//! the last slow calls.

use std::collections::BTreeMap;

use serde::Serialize;

use super::board_figures::codes;
use crate::link::metrics_board::{BoardReader, MethodTotals};
use crate::link::slow_calls::SlowCall;
use crate::protocol::call_id::CallId;
use crate::sys::process::monotonic_ns;

/// The totals since the start of the master.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ServerTotals {
    pub calls: u64,
    /// The number of these calls that were answered with an error.
    pub errors: u64,
    /// Accepted connections.
    pub accepted: u64,
    pub received_bytes: u64,
    pub sent_bytes: u64,
}

/// One method, or all others together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MethodFigures {
    pub name: String,
    /// builtin, function, command or pool; null for all others together.
    pub kind: Option<&'static str>,
    pub calls: u64,
    /// By the name of the code.
    pub errors: BTreeMap<&'static str, u64>,
    pub running: u64,
    pub queued: u64,
    /// Calls over the threshold of the slow log.
    pub slow: u64,
    /// Quantiles of the duration in microseconds; null before the first call.
    pub p50_us: Option<u64>,
    pub p99_us: Option<u64>,
    pub max_us: Option<u64>,
}

/// The members that a command adds to the answer of the master.
#[derive(Debug, Serialize)]
pub struct BoardMembers {
    pub totals: ServerTotals,
    pub methods: Vec<MethodFigures>,
    /// Whether `[slow-log]` is there.
    pub slow_log: bool,
    /// The last slow calls, oldest first.
    pub slow: Vec<SlowFigures>,
}

impl BoardMembers {
    /// Sums all blocks.
    pub fn of(board: &BoardReader) -> Self {
        let methods = board.methods(false);
        let sum = |figure: fn(&MethodTotals) -> u64| {
            let figures = methods.iter().map(figure);
            // A process may have written anything.
            figures.fold(0, u64::wrapping_add)
        };
        BoardMembers {
            totals: ServerTotals {
                calls: sum(|method| method.calls),
                errors: sum(MethodTotals::error_count),
                accepted: board.sum(|block| &block.accepted),
                received_bytes: board.sum_all(|block| &block.received_bytes),
                sent_bytes: board.sum_all(|block| &block.sent_bytes),
            },
            methods: methods.iter().map(MethodFigures::of).collect(),
            slow_log: board.has_slow_log(),
            slow: SlowFigures::all(board),
        }
    }

    /// Adds these members to a JSON object. Its other members stay as they are, byte for byte.
    pub fn add_to(&self, object: &str) -> String {
        let (Some(object), Ok(own)) = (object.strip_suffix('}'), serde_json::to_string(self))
        else {
            return object.to_owned();
        };
        let separator = if object.ends_with('{') { "" } else { "," };
        format!("{object}{separator}{}", own.trim_start_matches('{'))
    }
}

impl MethodFigures {
    fn of(method: &MethodTotals) -> Self {
        let errors = codes().filter_map(|(place, name)| {
            let [waiting, started] = method.errors.get(place)?;
            let count = waiting.wrapping_add(*started);
            (count > 0).then_some((name, count))
        });
        let max_us = method.longest_ns / 1000;
        MethodFigures {
            name: method.name.clone(),
            kind: method.kind,
            calls: method.calls,
            errors: errors.collect(),
            running: method.running,
            queued: method.queued,
            slow: method.slow,
            p50_us: method.duration.quantile_us(0.5),
            p99_us: method.duration.quantile_us(0.99),
            max_us: (method.duration.count() > 0).then_some(max_us),
        }
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_members_are_added_at_the_end() {
        let members = BoardMembers {
            totals: ServerTotals::default(),
            methods: Vec::new(),
            slow_log: false,
            slow: Vec::new(),
        };
        let added = members.add_to(r#"{"z": 1,"a":{}}"#);
        assert!(added.starts_with(r#"{"z": 1,"a":{},"totals":{"calls":0,"#));
        assert!(added.ends_with(r#""methods":[],"slow_log":false,"slow":[]}"#));
        assert!(members.add_to("{}").starts_with(r#"{"totals""#));
    }
}
