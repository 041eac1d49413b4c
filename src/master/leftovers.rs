//! Handles what dead workers leave behind: the results of their keepers, the calls that may have caused a
//! crash, and processes that they have started.
//!
//! [`super::policy::crash_counts`] decides which calls are quarantined. Nothing here waits or fails.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use super::children::keepers::DeadWorker;
use super::children::mark_reader::ReaderTitle;
use super::core::{Master, now};
use super::policy::crash_counts::{MAX_CALLS, MAX_CRASHES, QuarantinedCall};
use super::policy::event::Event;
use crate::link::attempt_frame::is_attempt_key;
use crate::link::message::Order;
use crate::logging::pluralize;
use crate::sys::process::{self, Pid};

/// Handles the end of a child that is no worker.
pub fn other_child_ended(master: &mut Master<'_>, pid: Pid) {
    if let Some(left) = master.workers.keeper_ended(pid) {
        log_result(&left);
        master.queue_actions(Event::KeeperEnded { keeper: pid });
        master.executor_ends.complete(left.worker, &left.evidence());
        return blame(master, &left);
    }
    if let Some(pid) = master.workers.lose_keeper(pid) {
        master.queue_actions(Event::KeeperLost { pid });
    }
}

/// Counts the crash for the call that caused it, if that call is known. Logs a new quarantine.
fn blame(master: &mut Master<'_>, left: &DeadWorker) {
    let evidence = left.evidence();
    // An attempt of a job is counted in its job, and not in the quarantine of calls.
    let cause = evidence.cause(left.suspicion);
    let Some(cause) = cause.filter(|(key, _)| !is_attempt_key(*key)) else {
        return;
    };
    let when = (now(), process::unix_seconds());
    let quarantine = master.workers.quarantine();
    (master.crash_counts).forget(|key| quarantine.is_suspected(key), when.0);
    let refusals = |key| quarantine.refusals(key);
    let found = master.crash_counts.count(cause, when, refusals);
    let refused = |call: QuarantinedCall| (quarantine.refusals(call.key), call);
    let found = found.map(|(caught, evicted)| (caught, evicted.map(refused)));
    master.workers.publish_quarantine(&master.crash_counts);
    if let Some((caught, evicted)) = found {
        log::warn!(
            "quarantined a call to {method}: {MAX_CRASHES} workers crashed while running it; it is \
             refused until the next reload; fix the handler method={method} key={key:016x}",
            method = caught.method,
            key = caught.key,
        );
        if let Some((refused, evicted)) = evicted {
            log::warn!(
                "the quarantine is full ({MAX_CALLS} calls): the call that was refused least often is allowed \
                 again; fix the handlers, then reload method={} key={:016x} refused={refused}",
                evicted.method,
                evicted.key,
            );
        }
    }
}

/// Sends the jobs processes the causes of ends of executors.
pub fn send_executor_ends(master: &mut Master<'_>) {
    let living = master.workers.iter();
    let jobs: Vec<Pid> = living
        .filter(|(_, worker)| worker.slot.is_jobs())
        .map(|(pid, _)| pid)
        .collect();
    for end in master.executor_ends.take_unsent(!jobs.is_empty(), now()) {
        for pid in &jobs {
            master.workers.order(*pid, Order::ExecutorEnded(end), None);
        }
    }
}

/// Sends a new jobs process the causes of recent ends of executors.
pub fn send_recent_ends(master: &mut Master<'_>, pid: Pid) {
    let process = master.workers.get(pid);
    if process.is_some_and(|process| process.slot.is_jobs()) {
        for end in master.executor_ends.recent(now()) {
            master.workers.order(pid, Order::ExecutorEnded(end), None);
        }
    }
}

/// Kills the leftovers of dead workers.
pub fn end_orphans(master: &mut Master<'_>) {
    let reader_title = ReaderTitle {
        title: master.setup.title,
        program: &master.setup.program,
    };
    master
        .orphans
        .kill_leftovers(now(), reader_title, &master.workers);
}

/// Logs what a keeper has done.
fn log_result(left: &DeadWorker) {
    let DeadWorker { worker, record, .. } = left;
    let number = |number: &AtomicU32| number.load(Relaxed);
    let (kept, crashed) = (number(&record.kept), number(&record.crashed));
    let reset = number(&record.reset);
    if kept + reset == 0 {
        return;
    }
    log::info!(
        "worker {worker} crashed: {} handed over, {reset} reset, {} answered with crashed \
         pid={worker} kept={kept} crashed={crashed} reset={reset}",
        pluralize(kept as usize, "connection", "connections"),
        pluralize(crashed as usize, "call", "calls"),
    );
}
