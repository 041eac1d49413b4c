//! Builds the answer to `status` from the fleet, the scoreboard and /proc, without asking a child.

use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;

use crate::config::{PoolConfig, Settings};
use crate::handler::pool::program_record::{ProgramRecord, ProgramState, ProgramView};
use crate::logging;
use crate::master::children::joining::latest_jobs_process;
use crate::master::children::own_programs::PoolOfConnections;
use crate::master::children::workers::{Children, GenerationContext};
use crate::master::core::Master;
use crate::master::endpoints::listeners::Listener;
use crate::master::policy::death_log::Death;
use crate::master::policy::event::Millis;
use crate::master::policy::fleet::Fleet;
use crate::master::policy::status_view::WorkerView;
use crate::protocol::control::{
    self, AcceptWait, DeathKind, DeathStatus, IsolatedStatus, JobsStatus, ListenerStatus,
    ObserverStatus, OldestCall, PoolStatus, ProgramPhase, ProgramStatus, Quarantined, Status,
    ThrottleStatus, WorkerPhase, WorkerStatus,
};
use crate::sys::process::{Pid, resident_bytes};

/// Returns the whole status at `now`.
pub fn status(master: &Master<'_>, now: Millis) -> Status {
    let (fleet, workers) = (&master.fleet, &master.workers);
    let context = &master.contexts.serving;
    let listeners = listeners(workers, context);
    Status {
        master: control::MasterStatus {
            pid: Pid::current().0,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            name: master.setup.program.clone(),
            config: (context.settings.file.as_ref()).map(|file| file.display().to_string()),
            binary: master.setup.origin.path.display().to_string(),
            generation: fleet.generation().0,
            uptime_s: now.saturating_sub(master.started) / 1000,
            observer: context.observe.first().and_then(|listener| {
                Some(ObserverStatus {
                    address: listener.bound.clone(),
                    pid: fleet.observer()?.0,
                })
            }),
            last_reload: master.reload_history.last().cloned(),
            last_upgrade: master.upgrade.last.clone(),
            target: fleet.target_count(),
            stops_in_ms: fleet.stops_at().map(|at| at.saturating_sub(now)),
            stopping: master.stopping,
            warnings: context.settings.warnings.clone(),
            lost_log_lines: lost_log_lines(workers),
            lost_access_lines: workers.metrics.lost_access_lines(),
        },
        workers: fleet
            .workers()
            .iter()
            .map(|view| worker(view, workers, now))
            .collect(),
        pools: fleet
            .pools()
            .iter()
            .map(|view| pool(view, workers, &context.settings, now))
            .chain(pools_of_connections(workers, now))
            .collect(),
        isolated: isolated(master, &listeners, now),
        deaths: deaths(fleet),
        reloads: master.reload_history.all(),
        listeners,
        quarantine: master
            .crash_counts
            .quarantined()
            .iter()
            .map(|call| Quarantined {
                method: call.method.clone(),
                key: format!("{:016x}", call.key),
                refused: workers.quarantine().refusals(call.key),
                at: call.at,
            })
            .collect(),
        jobs: jobs(workers, &context.settings, now),
    }
}

/// Returns what the jobs process has written last. `None` without `[jobs]`.
fn jobs(workers: &Children, settings: &Settings, now: Millis) -> Option<JobsStatus> {
    let config = settings.jobs.as_ref()?;
    let latest = latest_jobs_process(workers);
    let written = latest.and_then(|(pid, handle)| {
        let text = workers.metrics.job_status(handle.record_index)?;
        let mut status: JobsStatus = serde_json::from_str(&text).ok()?;
        if status.state == "up" && !handle.record.is_fresh(now) {
            // Nothing reaches the store while its process does not run.
            status.state = "away".into();
        }
        // A process before it may have had the same record.
        (status.pid == Some(pid.0)).then_some(status)
    });
    Some(written.unwrap_or_else(|| JobsStatus {
        store: config.path().display().to_string(),
        engine: config.engine().to_owned(),
        state: "away".into(),
        pid: latest.map(|(pid, _)| pid.0),
        ..JobsStatus::default()
    }))
}

fn listeners(workers: &Children, context: &GenerationContext) -> Vec<ListenerStatus> {
    let describe = |listener: &Rc<Listener>| {
        let (queue, backlog) = listener.queue();
        ListenerStatus {
            address: listener.bound.clone(),
            queue,
            backlog,
            refused_per_source: workers.sources.refusals_of(&listener.bound),
        }
    };
    context.listeners.iter().map(describe).collect()
}

/// Returns the number of log lines that the master and all workers have lost.
fn lost_log_lines(workers: &Children) -> u64 {
    let of_workers = workers.iter().map(|(_, worker)| &worker.record.lost_lines);
    let of_workers: u64 = of_workers.map(|lines| u64::from(lines.load(Relaxed))).sum();
    logging::lost_lines() + of_workers
}

fn worker(view: &WorkerView, workers: &Children, now: Millis) -> WorkerStatus {
    let mut shown = WorkerStatus {
        slot: view.slot.0,
        pid: view.pid.map(|pid| pid.0),
        generation: view.generation.0,
        state: view.state,
        throttle: throttle(view, now),
        ..WorkerStatus::default()
    };
    let Some((pid, living)) = view.pid.and_then(|pid| Some((pid, workers.get(pid)?))) else {
        return shown;
    };
    let record = living.record;
    let number = |value: &std::sync::atomic::AtomicU32| u64::from(value.load(Relaxed));
    shown.uptime_s = now.saturating_sub(view.born) / 1000;
    shown.connections = number(&record.connections);
    shown.running = number(&record.running);
    shown.queued = number(&record.queued);
    shown.lost_threads = number(&record.lost_threads);
    shown.calls = record.calls.load(Relaxed);
    shown.errors = record.errors.load(Relaxed);
    shown.accept_wait = AcceptWait {
        last_ms: number(&record.last_wait_ms),
        longest_ms: number(&record.longest_wait_ms),
    };
    shown.silent_ms = living.heartbeat().map_or(0, |at| now.saturating_sub(at));
    shown.threads = living.known.threads as u64;
    shown.programs = living.known.programs as u64;
    shown.programs_down = number(&record.programs_down);
    shown.sent = number(&record.sent);
    shown.running_for_others = number(&record.running_for_others);
    shown.rss_bytes = resident_bytes(pid);
    shown.oldest_call = record.oldest().map(|(method, since)| OldestCall {
        method: living.known.method(method).to_owned(),
        age_ms: now.saturating_sub(since),
    });
    shown
}

/// Describes a pool process, which has a record like a worker.
fn pool(view: &WorkerView, workers: &Children, settings: &Settings, now: Millis) -> PoolStatus {
    let shown = worker(view, workers, now);
    let number = view.slot.pool().unwrap_or_default();
    // If the pool has no process now, another process of its generation knows the pool's name.
    let handles = || workers.iter().map(|(_, handle)| handle);
    let of_generation = || handles().filter(|handle| handle.generation == view.generation);
    let info = of_generation().find_map(|handle| handle.known.pools.get(number).cloned());
    let (name, programs) = info.unwrap_or_default();
    let queued = of_generation().map(|handle| {
        let waiting = &handle.record.waiting;
        u64::from(waiting[(number + 1).min(waiting.len() - 1)].load(Relaxed))
    });
    let starts = workers.metrics.program_starts(&name);
    PoolStatus {
        unhealthy: is_unhealthy(&name, workers, settings, now),
        name,
        pid: shown.pid,
        generation: shown.generation,
        state: shown.state,
        uptime_s: shown.uptime_s,
        programs: programs as u64,
        busy: shown.running,
        down: shown.programs_down,
        queued: queued.sum(),
        calls: shown.calls,
        starts,
        rss_bytes: shown.rss_bytes,
        oldest_call: shown.oldest_call,
        silent_ms: shown.silent_ms,
        throttle: shown.throttle,
        list: programs_of(view, workers, now),
    }
}

/// Returns whether health checks fail because a pool has had no ready program for too long.
fn is_unhealthy(name: &str, workers: &Children, settings: &Settings, now: Millis) -> bool {
    let limit = settings.pools.get(name);
    let Some(limit_ms) = limit.and_then(PoolConfig::health_limit_ms) else {
        return false;
    };
    let processes = workers.iter().map(|(_, handle)| handle);
    let own = processes.filter(|handle| {
        handle
            .pool
            .as_ref()
            .is_some_and(|it| it.pool.name() == name)
    });
    let times = own.map(|handle| handle.record.pool_ready_ms.load(Relaxed));
    let ready = times.chain(workers.pool_health.last(name)).max();
    now.saturating_sub(ready.unwrap_or(now)) > limit_ms
}

/// Describes each program of a pool process.
fn programs_of(view: &WorkerView, workers: &Children, now: Millis) -> Vec<ProgramStatus> {
    let handle = view.pid.and_then(|pid| workers.get(pid));
    let pool = handle.and_then(|handle| handle.pool.as_ref());
    let records = pool.map(|pool| pool.pool.records()).unwrap_or_default();
    let there = |view: &ProgramView| view.state != ProgramState::Vacant;
    let views = records.iter().map(ProgramRecord::view).filter(there);
    views.map(|view| program(&view, now)).collect()
}

fn program(view: &ProgramView, now: Millis) -> ProgramStatus {
    let age = view.pid.map(|_| now.saturating_sub(view.started_ms));
    ProgramStatus {
        pid: view.pid,
        state: match view.state {
            ProgramState::Down | ProgramState::Vacant => ProgramPhase::Down,
            ProgramState::Starting => ProgramPhase::Starting,
            ProgramState::Idle => ProgramPhase::Idle,
            ProgramState::Busy => ProgramPhase::Busy,
            ProgramState::Asleep => ProgramPhase::Asleep,
        },
        calls: view.calls,
        rss_bytes: view.pid.map_or(0, |pid| resident_bytes(Pid(pid))),
        uptime_s: age.unwrap_or_default() / 1000,
    }
}

/// Describes each pool whose programs belong to connections. Such a pool has no pool process: sessions run its
/// programs.
fn pools_of_connections(workers: &Children, now: Millis) -> Vec<PoolStatus> {
    let (own, sessions) = workers.sessions.own_programs();
    let pool = |pool: PoolOfConnections<'_>| {
        let list = pool.programs.iter().map(|view| program(view, now));
        let list: Vec<ProgramStatus> = list.collect();
        let count = |state| list.iter().filter(|it| it.state == state).count() as u64;
        PoolStatus {
            name: pool.name.to_owned(),
            generation: pool.generation.0,
            state: WorkerPhase::Ready,
            programs: list.len() as u64,
            busy: count(ProgramPhase::Busy),
            down: count(ProgramPhase::Starting),
            calls: list.iter().map(|it| it.calls).sum(),
            starts: workers.metrics.program_starts(pool.name),
            list,
            ..PoolStatus::default()
        }
    };
    let described = own.pools(&sessions).map(pool);
    // Pools of older generations are shown only while they have a program.
    let serving = own.latest();
    described
        .filter(|it| Some(it.generation) == serving.map(|it| it.0) || !it.list.is_empty())
        .collect()
}

/// Returns the deaths sorted by time, because a pool process reports the deaths of its programs late.
fn deaths(fleet: &Fleet) -> Vec<DeathStatus> {
    let mut deaths: Vec<_> = fleet.deaths().iter().map(death).collect();
    deaths.sort_by_key(|death| death.at);
    deaths
}

/// Describes each acceptor with its sessions, and the sessions whose acceptor has died.
fn isolated(master: &Master<'_>, listeners: &[ListenerStatus], now: Millis) -> Vec<IsolatedStatus> {
    let (fleet, workers) = (&master.fleet, &master.workers);
    let context = &master.contexts.serving;
    let views = fleet.acceptors();
    let describe = |view: &WorkerView| {
        let handle = view.pid.and_then(|pid| workers.get(pid));
        let configured = |number: usize| {
            let (index, isolation) = context.settings.isolated().nth(number)?;
            Some((
                context.listeners.get(index)?.bound.clone(),
                isolation.processes,
            ))
        };
        let number = view.slot.acceptor().unwrap_or_default();
        let known = handle.and_then(|handle| handle.known.isolated.get(number).cloned());
        let (address, limit) = known.or_else(|| configured(number)).unwrap_or_default();
        let mut shown = IsolatedStatus {
            address,
            pid: view.pid.map(|pid| pid.0),
            generation: view.generation.0,
            state: view.state,
            limit: limit as u64,
            throttle: throttle(view, now),
            ..IsolatedStatus::default()
        };
        // Also without a process: the counts are those of the listener, and must not fall.
        let is_its = |acceptor| view.pid == Some(acceptor);
        workers.sessions.describe(is_its, &mut shown);
        shown
    };
    let mut all: Vec<IsolatedStatus> = views.iter().map(describe).collect();
    for shown in &mut all {
        // Take the number from the list of listeners: workers may count while the report is built, and both lists
        // must agree.
        let listener = listeners.iter().find(|it| it.address == shown.address);
        shown.refused_per_source = listener.map_or_else(
            || workers.sources.refusals_of(&shown.address),
            |it| it.refused_per_source,
        );
    }
    let living: Vec<Option<Pid>> = views.iter().map(|view| view.pid).collect();
    for address in workers.sessions.addresses() {
        let mut shown = IsolatedStatus {
            address,
            state: WorkerPhase::Dead,
            ..IsolatedStatus::default()
        };
        let is_gone = |acceptor| !living.contains(&Some(acceptor));
        workers.sessions.describe(is_gone, &mut shown);
        if shown.running > 0 {
            shown.generation = shown.list[0].generation;
            all.push(shown);
        }
    }
    all
}

fn throttle(view: &WorkerView, now: Millis) -> Option<ThrottleStatus> {
    view.next_fork.map(|at| ThrottleStatus {
        failures: view.young_deaths + view.refused_forks,
        retry_in_ms: at.saturating_sub(now),
    })
}

fn death(death: &Death) -> DeathStatus {
    DeathStatus {
        kind: death.kind,
        name: death.name.clone(),
        slot: (death.kind == DeathKind::Worker).then_some(death.slot.0),
        pid: death.pid.0,
        exit: death.how.code(),
        signal: death.how.signal_name(),
        uptime_s: death.uptime / 1000,
        method: death.method.clone(),
        call: death.call,
        job: death.job.clone(),
        rss_bytes: death.rss_bytes,
        reason: death.reason.to_string(),
        at: death.at,
    }
}
