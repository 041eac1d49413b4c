//! What `status` answers: put together from the fleet, the scoreboard and /proc, asking nobody.

use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;

use crate::handler::pool::program_record::{ProgramRecord, ProgramState};
use crate::logging;
use crate::master::children::workers::Children;
use crate::master::endpoints::listeners::Listener;
use crate::master::policy::crash_counts::CrashCounts;
use crate::master::policy::event::Millis;
use crate::master::policy::fleet::Fleet;
use crate::master::policy::status_view::WorkerView;
use crate::protocol::control::{
    self, AcceptWait, DeathStatus, LastReload, OldestCall, PoolStatus, ProgramPhase, ProgramStatus,
    Quarantined, Status, ThrottleStatus, WorkerStatus,
};
use crate::sys::process::{Pid, resident_bytes};

/// What the master itself adds.
#[derive(Debug)]
pub struct About<'a> {
    /// The configuration file of the generation that serves.
    pub config: Option<&'a Path>,
    /// The path of the program.
    pub binary: &'a Path,
    /// The name of the server.
    pub name: &'a str,
    pub started: Millis,
    /// How the last reload ended.
    pub last_reload: Option<&'a LastReload>,
    /// How the last upgrade ended.
    pub last_upgrade: Option<&'a LastReload>,
    /// What is worth a word.
    pub warnings: &'a [String],
    /// The listeners of the generation that serves.
    pub listeners: &'a [std::rc::Rc<Listener>],
    /// Who is in quarantine.
    pub strikes: &'a CrashCounts,
}

/// The whole status, at `now`.
pub fn status(fleet: &Fleet, workers: &Children, about: &About<'_>, now: Millis) -> Status {
    Status {
        master: control::MasterStatus {
            pid: Pid::current().0,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            name: about.name.to_owned(),
            config: about.config.map(|file| file.display().to_string()),
            binary: about.binary.display().to_string(),
            generation: fleet.generation().0,
            uptime_s: now.saturating_sub(about.started) / 1000,
            last_reload: about.last_reload.cloned(),
            last_upgrade: about.last_upgrade.cloned(),
            target: fleet.target_count(),
            stops_in_ms: fleet.stops_at().map(|at| at.saturating_sub(now)),
            warnings: about.warnings.to_vec(),
            lost_log_lines: lost_log_lines(workers),
        },
        workers: fleet
            .workers()
            .iter()
            .map(|view| worker(view, workers, now))
            .collect(),
        pools: fleet
            .pools()
            .iter()
            .map(|view| pool(view, workers, now))
            .collect(),
        deaths: fleet.deaths().iter().map(death).collect(),
        listeners: about
            .listeners
            .iter()
            .map(|listener| {
                let (queue, backlog) = listener.queue();
                control::ListenerStatus {
                    address: listener.bound.clone(),
                    queue,
                    backlog,
                }
            })
            .collect(),
        quarantine: about
            .strikes
            .quarantined(workers.quarantine())
            .map(|(prisoner, refused)| Quarantined {
                method: prisoner.method.clone(),
                key: format!("{:016x}", prisoner.key),
                refused,
                at: prisoner.at,
            })
            .collect(),
    }
}

/// Of the master and all workers together.
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
        throttle: view.next_fork.map(|at| ThrottleStatus {
            failures: view.young_deaths + view.refused_forks,
            retry_in_ms: at.saturating_sub(now),
        }),
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

/// A pool process is shown by what a worker with its record would be.
fn pool(view: &WorkerView, workers: &Children, now: Millis) -> PoolStatus {
    let shown = worker(view, workers, now);
    let number = view.slot.pool().unwrap_or_default();
    // Without a process of its own, any of its generation knows its name.
    let handles = || workers.iter().map(|(_, handle)| handle);
    let of_generation = || handles().filter(|handle| handle.generation == view.generation);
    let info = of_generation().find_map(|handle| handle.known.pools.get(number).cloned());
    let (name, programs) = info.unwrap_or_default();
    let queued = of_generation().map(|handle| {
        let waiting = &handle.record.waiting;
        u64::from(waiting[(number + 1).min(waiting.len() - 1)].load(Relaxed))
    });
    PoolStatus {
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
        rss_bytes: shown.rss_bytes,
        oldest_call: shown.oldest_call,
        silent_ms: shown.silent_ms,
        throttle: shown.throttle,
        list: programs_of(view, workers, now),
    }
}

/// Each program of a pool process.
fn programs_of(view: &WorkerView, workers: &Children, now: Millis) -> Vec<ProgramStatus> {
    let handle = view.pid.and_then(|pid| workers.get(pid));
    let pool = handle.and_then(|handle| handle.pool.as_ref());
    let records = pool.map(|pool| pool.records()).unwrap_or_default();
    let program = |record: &ProgramRecord| {
        let view = record.view();
        let age = view.pid.map(|_| now.saturating_sub(view.started_ms));
        ProgramStatus {
            pid: view.pid,
            state: match view.state {
                ProgramState::Down => ProgramPhase::Down,
                ProgramState::Starting => ProgramPhase::Starting,
                ProgramState::Idle => ProgramPhase::Idle,
                ProgramState::Busy => ProgramPhase::Busy,
                ProgramState::Asleep => ProgramPhase::Asleep,
            },
            calls: view.calls,
            rss_bytes: view.pid.map_or(0, |pid| resident_bytes(Pid(pid))),
            uptime_s: age.unwrap_or_default() / 1000,
        }
    };
    records.iter().map(program).collect()
}

fn death(death: &crate::master::policy::death_log::Death) -> DeathStatus {
    DeathStatus {
        slot: death.slot.0,
        pid: death.pid.0,
        exit: death.how.code(),
        signal: death.how.signal_name(),
        uptime_s: death.uptime / 1000,
        method: death.method.clone(),
        rss_bytes: death.rss_bytes,
        reason: death.reason.clone(),
        at: death.at,
    }
}
