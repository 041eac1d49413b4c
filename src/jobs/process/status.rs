//! Publishes what `status` and the metrics show of the store: its state, and the counts of each queue.
//!
//! The counts are read once per second. If reading them takes long, or nothing changes, they are read less often.

use super::core::JobsCore;
use super::store_event::{ReadReply, ReadRequest};
use super::ticket::Ticket;
use crate::jobs::policy::UnixMs;
use crate::jobs::store::error::StoreError;
use crate::jobs::store::request::{QueueCounts, StoreCounts};
use crate::protocol::control::{JobsStatus, QueueStatus};
use crate::sys::process::{Pid, unix_time_ms};

/// Reading the counts may take one part in this number of the time of the reading thread.
const COUNT_SHARE: u64 = 20;

/// The time between two reads of counts that this process has not changed. An operator may have changed the store.
/// Milliseconds.
const UNCHANGED_MS: u64 = 10_000;

/// The largest number of queues without a method that the log names.
const MOST_UNSERVED: usize = 100;

/// Reads the counts.
pub fn count(core: &mut JobsCore) {
    // While this process drains, its successor writes the status.
    let is_due = !core.is_counting && core.now_ms >= core.count_times.1;
    // Waiting jobs become due and older. Another jobs process changes the store too.
    let waits = core.counts.queues.iter().any(|queue| queue.waiting > 0);
    let may_differ = core.has_changed
        || waits
        || core.has_other()
        || core.now_ms >= core.count_times.0 + UNCHANGED_MS;
    if core.store.opened.is_some() && !core.is_draining && is_due && may_differ {
        core.is_counting = true;
        core.has_changed = false;
        core.count_times.0 = core.now_ms;
        core.store.read(ReadRequest::Counts, Ticket::Counts);
    }
}

/// Handles the counts.
pub fn counted(core: &mut JobsCore, read: Result<ReadReply, StoreError>) {
    core.is_counting = false;
    let took_ms = core.now_ms.saturating_sub(core.count_times.0);
    core.count_times.1 = core.now_ms + COUNT_SHARE * took_ms;
    match read {
        Ok(ReadReply::Counts(counts)) => {
            core.counts = counts;
            log_unserved(core);
        }
        _ => core.has_changed = true,
    }
    publish(core);
}

/// Logs each queue with jobs whose method this generation does not have, once. No process runs these jobs.
fn log_unserved(core: &mut JobsCore) {
    let is_served = |method: &str| core.registry.find(method, false).is_some();
    let queues = core.counts.queues.iter();
    let unserved = queues.filter(|queue| queue.waiting > 0 && !is_served(&queue.method));
    let unserved: Vec<&QueueCounts> = unserved.take(MOST_UNSERVED).collect();
    for queue in &unserved {
        if !core.unserved.contains(&queue.method) {
            log::warn!(
                "queue has jobs, but no method of this name exists method={} waiting={}",
                queue.method,
                queue.waiting
            );
        }
    }
    core.unserved = unserved.iter().map(|it| it.method.clone()).collect();
}

/// Publishes the last counts and the state of the store.
pub fn publish(core: &JobsCore) {
    let Some(counters) = &core.counters else {
        return;
    };
    let opened = core.store.opened.as_ref();
    let configured = || core.config.path().display().to_string();
    let instance = core.instance.to_string();
    let view = StoreView {
        location: opened.map_or_else(configured, |opened| opened.facts.location.clone()),
        engine: core.config.engine(),
        is_durable: opened.is_some_and(|opened| opened.facts.is_durable),
        state: core.store.state.name(),
        pid: Pid::current().0,
        instance: &instance,
        now: unix_time_ms(),
    };
    let is_served = |method: &str| core.registry.find(method, false).is_some();
    counters.publish(jobs_status(view, &core.counts, is_served));
}

/// What the jobs process knows besides the counts.
#[derive(Debug)]
struct StoreView<'a> {
    location: String,
    engine: &'static str,
    /// False before the store was open.
    is_durable: bool,
    /// up, away, full or broken.
    state: &'static str,
    pid: i32,
    instance: &'a str,
    now: UnixMs,
}

/// Describes the store. `is_served` says whether this generation has a method.
fn jobs_status(
    view: StoreView<'_>,
    counts: &StoreCounts,
    is_served: impl Fn(&str) -> bool,
) -> JobsStatus {
    let age = |due: Option<UnixMs>| due.map(|due| view.now.saturating_sub(due));
    let sum = |count: fn(&QueueCounts) -> u64| counts.queues.iter().map(count).sum();
    let queue = |queue: &QueueCounts| QueueStatus {
        method: queue.method.clone(),
        waiting: queue.waiting,
        due: queue.due,
        running: queue.running,
        dead: queue.dead,
        oldest_due_ms: age(queue.oldest_due_ms),
        paused: queue.is_paused,
        served: is_served(&queue.method),
    };
    let oldest = counts.queues.iter().filter_map(|queue| queue.oldest_due_ms);
    JobsStatus {
        store: view.location,
        engine: view.engine.to_owned(),
        state: view.state.to_owned(),
        durable: view.is_durable,
        pid: Some(view.pid),
        instance: Some(view.instance.to_owned()),
        waiting: sum(|queue| queue.waiting),
        due: sum(|queue| queue.due),
        oldest_due_ms: age(oldest.min()),
        running: sum(|queue| queue.running),
        dead: sum(|queue| queue.dead),
        methods: counts.queues.iter().map(queue).collect(),
        ..JobsStatus::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(queues: Vec<QueueCounts>) -> JobsStatus {
        let view = StoreView {
            location: "/jobs.db".into(),
            engine: "sqlite",
            is_durable: true,
            state: "up",
            pid: 7,
            instance: "ID",
            now: 10_000,
        };
        jobs_status(view, &StoreCounts { queues }, |method| method == "a")
    }

    #[test]
    fn the_status_sums_the_queues_and_names_those_without_a_method() {
        let queue = |method: &str, oldest| QueueCounts {
            method: method.into(),
            waiting: 2,
            due: 1,
            running: 1,
            dead: 3,
            oldest_due_ms: oldest,
            is_paused: method == "b",
        };
        let status = status(vec![
            queue("a", Some(9_000)),
            queue("b", Some(4_000)),
            queue("c", None),
        ]);
        assert_eq!(
            (status.waiting, status.due, status.running, status.dead),
            (6, 3, 3, 9)
        );
        assert_eq!(status.oldest_due_ms, Some(6_000));
        let flags: Vec<_> = status
            .methods
            .iter()
            .map(|it| (it.paused, it.served))
            .collect();
        assert_eq!(flags, [(false, true), (true, false), (false, false)]);
    }
}
