//! Adds the metrics that follow from the answer of the master.

use std::collections::BTreeMap;

use super::families::Families;
use crate::protocol::control::{
    LastReload, PoolStatus, ProgramPhase, Status, WorkerPhase, WorkerStatus,
};

const WORKER_STATES: [WorkerPhase; 5] = [
    WorkerPhase::Starting,
    WorkerPhase::Ready,
    WorkerPhase::Draining,
    WorkerPhase::Throttled,
    WorkerPhase::Dead,
];

/// The states of programs by their label.
const PROGRAM_STATES: [(&str, ProgramPhase); 5] = [
    ("idle", ProgramPhase::Idle),
    ("busy", ProgramPhase::Busy),
    ("starting", ProgramPhase::Starting),
    ("asleep", ProgramPhase::Asleep),
    // Ended, and to be started later.
    ("throttled", ProgramPhase::Down),
];

/// The figures of a slot, which can have two workers during a reload.
#[derive(Default)]
struct SlotSum {
    connections: u64,
    rss_bytes: u64,
    silent_ms: u64,
}

/// Adds all of them. `now` is in seconds since 1970, `started_at` the start of the master, if it is known.
pub fn add_facts(families: &mut Families, status: &Status, now: f64, started_at: Option<u64>) {
    let master = &status.master;
    families.add("generation", &[], master.generation.into());
    let stopping = master.stops_in_ms.is_some() || master.stopping;
    families.add("stopping", &[], flag(stopping));
    let last = master.last_reload.as_ref();
    families.add(
        "last_reload_successful",
        &[],
        flag(last.is_none_or(|it| it.ok)),
    );
    if let Some(at) = last.map(|LastReload { at, .. }| *at).or(started_at) {
        families.add("last_reload_timestamp_seconds", &[], at as f64);
    }
    families.add("workers_target", &[], master.target as f64);
    add_workers(families, &status.workers, now);
    for pool in by_name(&status.pools) {
        add_pool(families, &pool);
    }
    for listener in &status.listeners {
        let labels = [listener.address.as_str()];
        if let Some(queue) = listener.queue {
            families.add("listener_queued_connections", &labels, queue.into());
            let backlog = listener.backlog.into();
            families.add("listener_backlog_connections", &labels, backlog);
        }
    }
    add_isolated(families, status);
    if let Some(jobs) = &status.jobs {
        for (state, count) in [
            ("waiting", jobs.waiting),
            ("running", jobs.running),
            ("dead", jobs.dead),
        ] {
            families.add("jobs", &[state], count as f64);
        }
        let oldest = jobs.oldest_due_ms.unwrap_or_default() as f64 / 1000.0;
        families.add("jobs_oldest_due_seconds", &[], oldest);
        families.add("jobs_store_up", &[], flag(jobs.state == "up"));
    }
    let quarantined = status.quarantine.len() as f64;
    families.add("quarantined_calls", &[], quarantined);
}

fn add_workers(families: &mut Families, workers: &[WorkerStatus], now: f64) {
    for state in WORKER_STATES {
        let count = workers
            .iter()
            .filter(|worker| worker.state == state)
            .count();
        families.add("workers", &[state.name()], count as f64);
    }
    let living = || workers.iter().filter(|worker| worker.pid.is_some());
    let sum = |figure: fn(&WorkerStatus) -> u64| living().map(figure).sum::<u64>() as f64;
    families.add("handler_threads", &[], sum(|it| it.threads));
    // `running` does not contain the calls of abandoned threads any more, so these are added.
    families.add(
        "handler_threads_busy",
        &[],
        sum(|it| it.running + it.lost_threads),
    );
    families.add("handler_threads_lost", &[], sum(|it| it.lost_threads));
    let mut slots: BTreeMap<u16, SlotSum> = BTreeMap::new();
    for worker in living() {
        let slot = slots.entry(worker.slot).or_default();
        slot.connections += worker.connections;
        slot.rss_bytes += worker.rss_bytes;
        slot.silent_ms = slot.silent_ms.max(worker.silent_ms);
    }
    for (slot, sum) in slots {
        let label = slot.to_string();
        let labels = [label.as_str()];
        families.add("worker_connections", &labels, sum.connections as f64);
        families.add(
            "worker_resident_memory_bytes",
            &labels,
            sum.rss_bytes as f64,
        );
        let heartbeat = now - sum.silent_ms as f64 / 1000.0;
        families.add("worker_heartbeat_timestamp_seconds", &labels, heartbeat);
    }
}

/// The processes of each pool: two during a reload.
fn by_name(pools: &[PoolStatus]) -> impl Iterator<Item = PoolStatus> {
    let mut merged: BTreeMap<&str, PoolStatus> = BTreeMap::new();
    for pool in pools {
        let sum = merged.entry(&pool.name).or_default();
        sum.name.clone_from(&pool.name);
        sum.queued += pool.queued;
        sum.list.extend(pool.list.iter().cloned());
    }
    merged.into_values()
}

fn add_pool(families: &mut Families, pool: &PoolStatus) {
    for (label, state) in PROGRAM_STATES {
        let count = pool
            .list
            .iter()
            .filter(|program| program.state == state)
            .count();
        families.add("pool_programs", &[&pool.name, label], count as f64);
    }
    families.add("pool_calls_queued", &[&pool.name], pool.queued as f64);
}

/// The figures of an isolated listener, which can have several acceptors.
#[derive(Default)]
struct SessionSum {
    sessions: u64,
    /// The limit of its youngest acceptor, and the generation of that one.
    limit: (u32, u64),
    /// Counted per listener, so each acceptor shows the same number.
    full: u64,
    refused_no_process: u64,
    crashed: u64,
}

fn add_isolated(families: &mut Families, status: &Status) {
    let mut listeners: BTreeMap<&str, SessionSum> = BTreeMap::new();
    let mut refused: BTreeMap<&str, u64> = BTreeMap::new();
    for listener in &status.listeners {
        refused.insert(&listener.address, listener.refused_per_source);
    }
    // The status of an acceptor without a process may have no address any more.
    let known = status.isolated.iter().filter(|it| !it.address.is_empty());
    for isolated in known {
        let sum = listeners.entry(&isolated.address).or_default();
        sum.sessions += isolated.running;
        // An entry for connections whose acceptor has died has no limit.
        if isolated.limit > 0 {
            sum.limit = sum.limit.max((isolated.generation, isolated.limit));
        }
        sum.full = sum.full.max(isolated.full);
        sum.refused_no_process = sum.refused_no_process.max(isolated.refused_no_process);
        sum.crashed = sum.crashed.max(isolated.crashed);
        let per_source = refused.entry(&isolated.address).or_default();
        *per_source = isolated.refused_per_source.max(*per_source);
    }
    for (address, count) in refused {
        let labels = [address, "per_source"];
        families.add("listener_refused_connections_total", &labels, count as f64);
    }
    for (address, sum) in listeners {
        let labels = [address];
        families.add("listener_sessions", &labels, sum.sessions as f64);
        families.add("listener_sessions_limit", &labels, sum.limit.1 as f64);
        families.add("listener_full_total", &labels, sum.full as f64);
        let no_process = sum.refused_no_process as f64;
        let reason = [address, "no_process"];
        families.add("listener_refused_connections_total", &reason, no_process);
        families.add(
            "listener_session_crashes_total",
            &labels,
            sum.crashed as f64,
        );
    }
}

/// Returns a flag as 1 or 0.
pub fn flag(is: bool) -> f64 {
    f64::from(u8::from(is))
}
