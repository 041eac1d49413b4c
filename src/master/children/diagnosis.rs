//! Finds out what a stuck worker is doing, for the log and its death record. It looks from outside, before the worker
//! is ended.
//!
//! The scoreboard names the calls, and /proc shows the state of the threads. Nothing here waits for the worker. If
//! something cannot be read, the text omits it.

use super::slow_calls;
use super::workers::{Children, WorkerHandle};
use crate::link::ids::Pid;
use crate::link::stuck_calls::StuckCall;
use crate::logging::HumanDuration;
use crate::master::policy::event::Millis;
use crate::sys::thread_state;

/// Answers the questions of a child about its threads, for its slow log.
pub fn answer_slow_calls(workers: &mut Children, pid: Pid, now: Millis) {
    if let Some(child) = workers.living.get_mut(&pid)
        && let Some(ring) = workers.metrics.slow_ring(child.record_index)
    {
        slow_calls::answer(pid, ring, (&mut child.slow_reads, now));
    }
}

/// Describes the main thread of the worker, which runs the event loop, and its calls.
pub fn event_loop(pid: Pid, worker: &WorkerHandle, now: Millis) -> String {
    let mut parts = Vec::new();
    if let Some(look) = thread_state::look(pid, pid) {
        parts.push(format!("event loop: {look}"));
    }
    if let Some(method) = worker.inline_method() {
        parts.push(format!("it runs {method}"));
    }
    if let Some((method, since)) = worker.record.oldest() {
        let (name, age) = (worker.known.method(method), now.saturating_sub(since));
        parts.push(format!(
            "oldest call on a thread: {name} for {}",
            HumanDuration(age)
        ));
    }
    parts.join("; ")
}

/// Describes each stuck call and its thread.
pub fn threads(pid: Pid, count: u64, worker: &WorkerHandle) -> String {
    let calls = worker.stuck.read();
    let one = |call: &StuckCall| one_of(pid, call, worker.known.method(call.method));
    let mut parts: Vec<String> = calls.iter().map(one).collect();
    let more = count.saturating_sub(parts.len() as u64);
    if more > 0 {
        parts.push(format!("{more} more"));
    }
    let all = match count {
        1 => "the only handler thread is".to_owned(),
        _ => format!("all {count} handler threads are"),
    };
    format!("{all} stuck: {}", parts.join("; "))
}

fn one_of(pid: Pid, call: &StuckCall, method: &str) -> String {
    let StuckCall {
        thread,
        method: _,
        id,
        age_ms,
    } = call;
    let id = id
        .as_ref()
        .map_or(String::new(), |id| format!(" (id {id})"));
    let age = HumanDuration(*age_ms);
    match thread_state::look(pid, Pid(*thread)) {
        Some(look) => format!("{method}{id} for {age} on {}: {look}", look.name),
        None => format!("{method}{id} for {age}"),
    }
}
