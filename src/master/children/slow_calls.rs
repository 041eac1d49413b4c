//! Does the master's part of the slow log. It publishes the thresholds, reads the threads of workers that dropped
//! root privileges, and completes the records of processes that have died.

use std::time::Duration;

use crate::config::Settings;
use crate::link::ids::Pid;
use crate::link::metrics_board::MetricsBoard;
use crate::link::metrics_board::layout::NAMES;
use crate::link::slow_calls::{NEVER, SlowCall, SlowLimits, SlowRing};
use crate::logging;
use crate::master::policy::event::Millis;
use crate::protocol::Code;
use crate::sys::process::monotonic_ns;
use crate::sys::process_facts;
use crate::throttle::limiter::Limiter;

/// Returns the limit of threads that the master reads for a child: 256 at once, then 100 per second.
pub fn thread_reads() -> Limiter {
    Limiter::new(256, 10)
}

/// Writes the rules of the serving generation. They take effect at once, also for running calls.
pub fn publish(board: &mut MetricsBoard, settings: &Settings) {
    let ns = |time: Duration| match time.as_nanos() as u64 {
        0 => NEVER,
        ns => ns,
    };
    let own = settings.methods.iter();
    let own = own.filter_map(|(name, method)| Some((board.place_of(name), ns(method.slow?))));
    // A method without a place of its own on the board gets the common threshold.
    let own: Vec<(usize, u64)> = own.filter(|(place, _)| *place < NAMES).collect();
    let limits = settings.slow_log.as_ref().map(|table| SlowLimits {
        params: table.params as u64,
        lines: table.lines as u64,
        threshold_ns: ns(table.threshold),
        own_ns: own,
    });
    board.header().slow.write(limits.as_ref());
}

/// Answers the questions in the records of a child: the kernel may not show a child its own threads after it has
/// dropped root privileges. `limiter` bounds how much a child can make the master read.
pub fn answer(pid: Pid, ring: &SlowRing, (limiter, now): (&mut Limiter, Millis)) {
    // A child could ask for any thread. /proc/PID/task has only the threads of that child.
    ring.answer(pid.0, |thread, known| match limiter.admit(now) {
        Some(_) => process_facts::of_thread(pid, Pid(thread)).map_or(known, |(text, _)| text),
        None => known,
    });
}

/// Logs the end of slow calls whose process has died.
pub fn log_crashed(calls: &[SlowCall]) {
    for call in calls {
        let run = Duration::from_nanos(monotonic_ns().saturating_sub(call.began_ns));
        let members = serde_json::json!({
            "event": "slow-call-end",
            "call": call.call,
            "trace_id": call.trace_id,
            "method": call.method,
            "outcome": "crashed",
            "code": Code::Crashed.name(),
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
