//! What can be seen of a worker that is stuck, from outside and before it is ended: for the log and
//! its death record.
//!
//! The scoreboard names the calls, /proc the state of threads. Nothing here waits for the worker, and what
//! can't be read is left out.

use super::workers::WorkerHandle;
use crate::link::ids::Pid;
use crate::link::stuck_calls::StuckCall;
use crate::master::main_loop::{Master, now};
use crate::master::policy::event::{Event, HumanDuration};
use crate::sys::thread_state;

impl Master<'_> {
    /// The policy wants to know what an event loop is at before it is ended.
    pub(crate) fn diagnose(&mut self, pid: Pid) {
        let Some(worker) = self.workers.get(pid) else {
            return;
        };
        let text = event_loop(pid, worker);
        let actions = self.fleet.handle(Event::Evidence { pid, text }, now());
        self.actions.extend(actions);
    }

    /// A worker says that none of its threads comes back, and which calls they run. That it says so
    /// again is no reason to look again: one that repeats itself would keep the master busy.
    pub(crate) fn diagnose_threads(&self, pid: Pid, threads: u64) -> Option<Event> {
        if !self.fleet.wants_evidence(pid) {
            return None;
        }
        let worker = self.workers.get(pid)?;
        let evidence = threads_of(pid, threads, worker);
        Some(Event::Wedged { pid, evidence })
    }
}

/// The thread of the event loop, which is the process's first, and what it was to do.
fn event_loop(pid: Pid, worker: &WorkerHandle) -> String {
    let mut parts = Vec::new();
    if let Some(look) = thread_state::look(pid, pid) {
        parts.push(format!("event loop: {look}"));
    }
    if let Some(method) = worker.inline_method() {
        parts.push(format!("it runs {method}"));
    }
    if let Some((method, since)) = worker.record.oldest() {
        let (name, age) = (worker.known.method(method), now().saturating_sub(since));
        parts.push(format!(
            "oldest call on a thread: {name} for {}",
            HumanDuration(age)
        ));
    }
    parts.join("; ")
}

/// Each call that is stuck, and its thread.
fn threads_of(pid: Pid, threads: u64, worker: &WorkerHandle) -> String {
    let calls = worker.stuck.read();
    let one = |call: &StuckCall| one_of(pid, call, worker.known.method(call.method));
    let mut parts: Vec<String> = calls.iter().map(one).collect();
    let more = threads.saturating_sub(parts.len() as u64);
    if more > 0 {
        parts.push(format!("{more} more"));
    }
    let all = match threads {
        1 => "the only handler thread is".to_owned(),
        _ => format!("all {threads} handler threads are"),
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
