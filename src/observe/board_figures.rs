//! Adds the metrics of processes and methods that follow from the metrics board.
//!
//! Series exist at 0 from the start. Of the errors only timeout, overloaded and crashed do; other codes
//! appear with the first error.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::families::{Families, HistogramSample};
use crate::config::{Histogram, ObserveConfig};
use crate::link::metrics_board::job_cells::{ENDS, OUTCOMES};
use crate::link::metrics_board::layout::{Block, CloseReason, HANDLER_CODE, HandlerKind, labels};
use crate::link::metrics_board::{BoardReader, HistogramCounts, JobTotals, MethodTotals};
use crate::protocol::Code;

/// Codes whose series exist from the start.
const ALWAYS: [Code; 3] = [Code::Timeout, Code::Overloaded, Code::Crashed];
/// The kind of the methods of pools.
const POOL: &str = labels::KINDS[HandlerKind::Pool as usize];
/// The label of the codes of handlers.
const HANDLER: &str = "handler";

/// Adds the figures of processes and methods.
pub fn add_board(families: &mut Families, board: &BoardReader, config: &ObserveConfig) {
    add_processes(families, board, config);
    let mut queued = 0;
    for method in board.methods(config.exports(Histogram::Run)) {
        // Calls that wait for a program have a metric of their own. Those without a kind wait for the jobs process.
        if method.kind.is_some_and(|kind| kind != POOL) {
            queued += method.queued;
        }
        add_method(families, &method, config);
    }
    families.add("calls_queued", &[], queued as f64);
    if let Some(jobs) = JobTotals::of(board) {
        add_jobs(families, &jobs, config);
    }
}

fn add_jobs(families: &mut Families, jobs: &JobTotals, config: &ObserveConfig) {
    families.add("jobs_enqueued_total", &[], jobs.enqueued as f64);
    families.add("jobs_stale_total", &[], jobs.stale as f64);
    for (metric, counts) in [
        ("jobs_commit_seconds", &jobs.commit),
        ("jobs_wait_seconds", &jobs.wait),
        ("jobs_run_seconds", &jobs.run),
    ] {
        families.add_histogram(metric, &[], &histogram(counts, config));
    }
    for method in &jobs.methods {
        let name = method.name.as_str();
        for (outcome, count) in OUTCOMES.into_iter().zip(method.attempts) {
            let labels = [name, outcome];
            families.add("jobs_attempts_total", &labels, count as f64);
        }
        for ((state, reason), count) in ENDS.into_iter().zip(method.ended) {
            let labels = [name, state, reason];
            families.add("jobs_ended_total", &labels, count as f64);
        }
    }
}

/// Returns the value of a counter.
pub fn value(counter: &AtomicU64) -> f64 {
    counter.load(Relaxed) as f64
}

/// Converts nanoseconds to seconds.
pub fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

fn add_processes(families: &mut Families, board: &BoardReader, config: &ObserveConfig) {
    let sum = |counter: fn(&Block) -> &AtomicU64| board.sum(counter) as f64;
    families.add("connections_accepted_total", &[], sum(|it| &it.accepted));
    for (place, label) in labels::MOVED.iter().enumerate() {
        let moved = board.sum(|block| &block.moved[place]);
        families.add("connections_moved_total", &[label], moved as f64);
    }
    for (place, label) in labels::CLOSED.iter().enumerate() {
        let mut closed = board.sum(|block| &block.closed[place]);
        if place == CloseReason::Crash as usize {
            // A process may have filled its block with anything.
            closed = closed.wrapping_add(board.header().lost_connections.load(Relaxed));
        }
        families.add("connections_closed_total", &[label], closed as f64);
    }
    let wait = histogram(&board.accept_wait(), config);
    families.add_histogram("accept_wait_seconds", &[], &wait);
    for (place, dialect) in labels::DIALECTS.iter().enumerate() {
        let bytes = board.sum(|block| &block.received_bytes[place]);
        families.add("received_bytes_total", &[dialect], bytes as f64);
        let bytes = board.sum(|block| &block.sent_bytes[place]);
        families.add("sent_bytes_total", &[dialect], bytes as f64);
        for (form_place, form) in labels::FORMS.iter().enumerate() {
            let requests = board.sum(|block| &block.requests[place][form_place]);
            families.add("requests_total", &[dialect, form], requests as f64);
        }
    }
    families.add("calls_forwarded_total", &[], sum(|it| &it.forwarded));
    families.add("calls_returned_total", &[], sum(|it| &it.returned));
    let refusals = sum(|it| &it.quarantine_refusals);
    families.add("quarantine_refusals_total", &[], refusals);
    let lost = sum(|it| &it.lost_lines) + value(&board.header().lost_lines);
    families.add("log_lines_lost_total", &["main"], lost);
    let lost = sum(|it| &it.access.lost) + value(&board.header().lost_access_lines);
    families.add("log_lines_lost_total", &["access"], lost);
    let written = sum(|it| &it.access.written);
    families.add("access_log_lines_total", &[], written);
}

fn add_method(families: &mut Families, method: &MethodTotals, config: &ObserveConfig) {
    let name = method.name.as_str();
    families.add("calls_total", &[name], method.calls as f64);
    for (place, code) in codes() {
        let is_shown = ALWAYS.iter().any(|always| always.name() == code);
        let counts = method.errors.get(place).copied().unwrap_or_default();
        for (count, started) in counts.into_iter().zip(["false", "true"]) {
            if is_shown || count > 0 {
                families.add("call_errors_total", &[name, code, started], count as f64);
            }
        }
    }
    let cpu = seconds(method.command_cpu_ns);
    families.add("command_cpu_seconds_total", &[name], cpu);
    families.add("slow_calls_total", &[name], method.slow as f64);
    for (kind, metric, counts) in [
        (
            Histogram::Duration,
            "call_duration_seconds",
            &method.duration,
        ),
        (Histogram::Queue, "call_queue_seconds", &method.queue),
        (Histogram::Run, "call_run_seconds", &method.run),
    ] {
        if config.exports(kind) {
            families.add_histogram(metric, &[name], &histogram(counts, config));
        }
    }
}

/// Returns the label of each place of a code.
pub fn codes() -> impl Iterator<Item = (usize, &'static str)> {
    let table = Code::ALL.map(|code| (code as usize, code.name()));
    table.into_iter().chain([(HANDLER_CODE, HANDLER)])
}

fn histogram(counts: &HistogramCounts, config: &ObserveConfig) -> HistogramSample {
    let bound = |bound: &std::time::Duration| {
        let ns = u64::try_from(bound.as_nanos()).unwrap_or(u64::MAX);
        // A bound that is not on the grid is not exported.
        counts.up_to(ns).map(|count| (bound.as_secs_f64(), count))
    };
    HistogramSample {
        buckets: config.buckets.iter().filter_map(bound).collect(),
        count: counts.count(),
        sum: seconds(counts.sum_ns),
    }
}
