//! Prints the last slow calls of a server and what they were doing.

use super::args::ServerSelector;
use super::metrics::observe;
use super::{output, units};
use crate::error::{Error, Result};
use crate::observe::totals::SlowFigures;

/// Returns the text or JSON that `slow` prints. `now` is the time in seconds since 1970.
pub(super) fn slow(place: &ServerSelector, is_json: bool, now: u64) -> Result<String> {
    let board = observe(place)?.board.map_err(Error::Refused)?;
    let calls = SlowFigures::all(&board);
    if is_json {
        // Plain data cannot fail.
        return Ok(serde_json::to_string(&calls).unwrap_or_default());
    }
    Ok(render(&calls, board.has_slow_log(), now))
}

fn render(calls: &[SlowFigures], is_on: bool, now: u64) -> String {
    let mut text = String::new();
    for call in calls {
        let run = units::milliseconds(call.age_ms);
        let state = match &call.outcome {
            Some(outcome) => format!("{} after {run}", output::printable(outcome)),
            None => format!("runs for {run}"),
        };
        let ago = units::seconds(now.saturating_sub(call.at));
        let (method, evidence) = (&call.method, &call.evidence);
        let line = format!("{ago} ago  {}  {method}  {state}\n", call.call);
        // Output of a program in the evidence must not look like another record.
        text += &output::printable(line.trim_end()).replace('\n', "\\n");
        let evidence = output::printable(evidence).replace('\n', "\n    ");
        text += &format!("\n    {evidence}\n");
    }
    match (is_on, calls.is_empty()) {
        (false, _) => text += "slow log off: add [slow-log] to the configuration, and reload\n",
        (true, true) => text += "no slow call\n",
        (true, false) => {}
    }
    text
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_shown_with_their_evidence_and_escaped() {
        let call = SlowFigures {
            call: "4712.9".parse().unwrap(),
            trace_id: None,
            method: "score".into(),
            at: 100,
            age_ms: 1_500,
            done: false,
            outcome: None,
            evidence: "command \u{1b}[2J S asleep\n5s ago".into(),
        };
        let done = SlowFigures {
            done: true,
            outcome: Some("timeout".into()),
            ..call.clone()
        };
        assert_eq!(
            render(&[call, done], true, 105),
            "5s ago  4712.9  score  runs for 1.5s\n    command \\u{1b}[2J S asleep\n    5s ago\n\
             5s ago  4712.9  score  timeout after 1.5s\n    command \\u{1b}[2J S asleep\n    5s ago\n"
        );
        assert_eq!(render(&[], true, 0), "no slow call\n");
        assert!(render(&[], false, 0).starts_with("slow log off"));
    }
}
