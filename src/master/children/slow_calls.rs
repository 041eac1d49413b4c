//! What the master does for the slow log: publishes what counts as slow, reads the threads of workers that
//! dropped from root, and completes the records of processes that have died.

use std::time::Duration;

use crate::config::Settings;
use crate::link::ids::Pid;
use crate::link::metrics_board::MetricsBoard;
use crate::link::metrics_board::layout::NAMES;
use crate::link::slow_calls::{NEVER, SlowCall, SlowLimits};
use crate::logging;
use crate::sys::process::monotonic_ns;
use crate::sys::process_facts;

/// Writes the rules of the generation that serves. They hold at once, also for calls that run.
pub fn publish(board: &mut MetricsBoard, settings: &Settings) {
    let ns = |time: Duration| match time.as_nanos() as u64 {
        0 => NEVER,
        ns => ns,
    };
    let own = settings.methods.iter();
    let own = own.filter_map(|(name, method)| Some((board.place_of(name), ns(method.slow?))));
    // A method without a place of its own has the common threshold.
    let own: Vec<(usize, u64)> = own.filter(|(place, _)| *place < NAMES).collect();
    let limits = settings.slow_log.as_ref().map(|table| SlowLimits {
        params: table.params as u64,
        lines: table.lines as u64,
        threshold_ns: ns(table.threshold),
        own_ns: own,
    });
    board.header().slow.write(limits.as_ref());
}

/// Adds to the records of a child what it may not read of its own threads.
pub fn answer(pid: Pid, record: usize, board: &MetricsBoard) {
    let Some(ring) = board.slow_ring(record) else {
        return;
    };
    // Only threads of that child: the kernel finds no other one below its pid.
    ring.answer(pid.0, |thread, known| {
        process_facts::of_thread(pid, Pid(thread)).map_or(known, |(text, _)| text)
    });
}

/// Logs the end of slow calls whose process has died.
pub fn log_crashed(calls: &[SlowCall]) {
    for call in calls {
        let run = Duration::from_nanos(monotonic_ns().saturating_sub(call.began_ns));
        let members = serde_json::json!({
            "event": "slow-call-end",
            "call": call.call,
            "method": call.method,
            "outcome": "crashed",
            "run_us": run.as_micros() as u64,
        });
        logging::with_members(&members.to_string(), || {
            let (id, method) = (call.call, &call.method);
            log::warn!(
                "slow call {id} {method}: crashed after {:.2} s",
                run.as_secs_f64()
            );
        });
    }
}
