//! Creates a master from the state that the old program has passed on, instead of a start.
//!
//! Nothing is bound, locked or forked, because everything exists. After an error the caller executes the old program,
//! which continues as before. After a panic before the upgrade has succeeded, this file executes the old program with
//! the current state, so that no event is lost. If that fails too, the panic continues to the caller, which executes
//! the old program with the state that the old program had written.

use std::mem;
use std::os::fd::{OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;

use nix::sys::signal::Signal;

use super::children::keepers::is_plausible_keeper;
use super::children::orphans::Orphans;
use super::children::workers::{Children, GenerationContext};
use super::core::{Master, now};
use super::endpoints::Endpoints;
use super::endpoints::control_socket::{ClientId, ControlSocket};
use super::endpoints::listeners::Listener;
use super::endpoints::pid_file::PidFile;
use super::main_loop::{finish, serve};
use super::policy::action::Action;
use super::policy::crash_counts::Suspicion;
use super::policy::event::{Event, Exit};
use super::policy::executor_causes::ExecutorEnds;
use super::policy::fleet::Fleet;
use super::policy::reload_history::ReloadHistory;
use super::policy::reload_queue::ReloadQueue;
use super::reaping::act_except;
use super::reports::queue_last_requests;
use super::requests::settle;
use super::requests::upgrade_driver::{export, mark_master, refuse_upgrade};
use super::setup::{Setup, open_access_file, show_title};
use super::upgrade::exec_attempt::ExecAttempt;
use super::upgrade::stage::UpgradeStage;
use super::upgrade::state::UpgradeState;
use crate::config::Settings;
use crate::error::{Error, Result};
use crate::link::ids::Pid;
use crate::sys::instance_lock::InstanceLock;
use crate::sys::notify::{Notifier, NotifyState};
use crate::sys::process;
use crate::sys::shared_memory::SharedFlag;
use crate::sys::signal;
use crate::worker_init::JobsInstance;

/// Runs the master of a server that another program has started, until it exits. `setup` holds the exec
/// attempt that the state came with.
///
/// # Errors
/// The reason why this program could not take over.
pub fn take_over(setup: Setup<'_>, state: UpgradeState) -> Result<()> {
    signal::block_all();
    signal::install_fault_handlers();
    // A function given to on_master_start may have set SIGPIPE to its default. Then the master would end when the
    // reader of its log ends.
    signal::ignore(&[Signal::SIGXFSZ, Signal::SIGPIPE]);
    let reason = setup.trial.as_ref().and_then(|trial| trial.reason());
    let reason = reason.map(str::to_owned);
    let mut master = resume(setup, state)?;
    match reason {
        Some(reason) => {
            // This is the old program again. It needs nothing more of what was passed to it.
            *master.setup.trial = None;
            mark_master(&master);
            master.upgrade.settings = None;
            master.endpoints.notifier.notify(&[NotifyState::Ready]);
            refuse_upgrade(&mut master, &reason);
        }
        None => {
            master.upgrade.stage = UpgradeStage::AwaitingReload;
            master.upgrade.reload_also_requested = master.reloads.is_requested();
            master.reloads.request(None);
        }
    }
    if let Err(panic) = serve_until_confirmed(&mut master) {
        resume_unwind(panic);
    }
    finish(master)
}

/// Checks that this version can create a master from the state. The descriptors are not checked.
///
/// # Errors
/// The part of the state that cannot be read, or that contradicts another part.
pub fn check_state(state: UpgradeState) -> Result<()> {
    Fleet::import(state.fleet, now()).map_err(contradiction)?;
    Children::fits(&state.workers)
}

fn contradiction(text: String) -> Error {
    Error::Refused(format!("the state contradicts itself: {text}"))
}

/// Logs that `processes` has another meaning now: the version before ran that number for each worker.
fn explain_processes(settings: &Settings) {
    let workers = settings.workers.count;
    for (name, pool) in &settings.pools {
        let (count, before) = (pool.processes, pool.processes * workers);
        log::info!(
            "upgrade: processes = {count} of the pool {name} is now the number for all workers; before, it \
             was the number for each of {workers} workers; to keep the total, set processes = {before}"
        );
    }
}

fn resume(setup: Setup<'_>, state: UpgradeState) -> Result<Master<'_>> {
    let missing = || Error::Bug("a take-over without its state".into());
    let through = setup.trial.as_ref().ok_or_else(missing)?.through();
    let take = |number: RawFd| -> Result<OwnedFd> {
        let what = || format!("take over descriptor {number}");
        through
            .take(number)
            .map_err(|error| Error::system(what(), error))
    };
    let mut listeners = Vec::new();
    for listener in state.listeners {
        let fd = take(listener.fd)?;
        listeners.push(Rc::new(Listener::import(listener, fd)?));
    }
    let pick = |places: &[usize]| -> Result<Vec<Rc<Listener>>> {
        let one = |&place: &usize| listeners.get(place).cloned();
        let some: Option<_> = places.iter().map(one).collect();
        some.ok_or_else(|| contradiction("it names a listener that does not exist".into()))
    };
    let now = now();
    let mut table = state.fleet;
    // After a failed upgrade the table may name observers that the new program has already reaped.
    table.observers.retain(|pid| process::is_child(Pid(*pid)));
    let fleet = Fleet::import(table, now).map_err(contradiction)?;
    let is_on_trial = setup.trial.as_ref().is_some_and(ExecAttempt::can_go_back);
    if is_on_trial && state.workers.pools.is_none() {
        explain_processes(&setup.settings);
    }
    let uptime_s = now.saturating_sub(state.started) / 1000;
    let started_at = process::unix_seconds().saturating_sub(uptime_s);
    let mut workers = Children::import(state.workers, started_at, take)?;
    workers.observers.extend(fleet.observers());
    let same = fleet.pids().count() == workers.iter().count();
    if !same || fleet.pids().any(|pid| workers.get(pid).is_none()) {
        return Err(contradiction("the workers of its two lists differ".into()));
    }
    let orphans = Orphans::import(state.orphans, &workers);
    let (path, fd) = state.pid_file;
    let settings = Rc::new(setup.settings.clone());
    // The failure is only logged: at an upgrade a reload follows, which opens the file again. After a rollback this
    // program continues without the access log.
    let access_file = open_access_file(&settings).unwrap_or_else(|error| {
        log::error!("{error}");
        None
    });
    let context = GenerationContext {
        access_file,
        registry: setup.host.registry(&settings),
        settings,
        listeners: pick(&state.serving)?,
        observe: pick(&state.observed)?,
        known: Rc::new(state.known),
    };
    process::become_subreaper().map_err(|error| Error::system("become a subreaper", error))?;
    let control = ControlSocket::import(state.control, take)?;
    let pid_file = PidFile::import(path, take(fd)?)?;
    let jobs = match state.jobs {
        Some(instance) => Some(JobsInstance {
            id: instance.id,
            lock: InstanceLock::import(take(instance.lock)?),
            store: context
                .settings
                .jobs
                .as_ref()
                .map(|jobs| jobs.store.clone()),
            was_opened: SharedFlag::new(instance.was_opened)
                .map_err(|error| Error::system("allocate shared memory", error))?,
        }),
        None => None,
    };
    let passed = pick(&state.passed)?;
    // This is the last step that can fail: after a later failure, signals that were received meanwhile would be lost
    // with the pipe.
    let signals = setup.trial.as_mut().and_then(ExecAttempt::take_signals);
    let endpoints = Endpoints {
        control,
        notifier: Notifier::from_environment(),
        signals: signals.ok_or_else(missing)?,
        pid_file,
        passed,
    };
    show_title(&setup);
    workers.allow_requests();
    let is_upgrade = setup.trial.is_some();
    let fleet = (fleet, Vec::new());
    let mut master = Master::new(setup, fleet, (workers, orphans), (context, jobs), endpoints);
    let clients = |numbers: Vec<u64>| numbers.into_iter().map(ClientId).collect();
    master.reloads = ReloadQueue::new(state.reload_asked, clients(state.reload_waiting));
    master.reload_history = ReloadHistory::new(state.last_reload, state.reloads);
    master.executor_ends = ExecutorEnds::import(state.executor_ends);
    master.started = state.started;
    // A SIGCHLD may have been merged with one that was read before the exec.
    master.reap_again = true;
    master.upgrade.waiting = clients(state.waiting);
    master.upgrade.settings = is_upgrade.then_some((state.settings, state.secrets));
    master.upgrade.last = state.last_upgrade;
    Ok(master)
}

/// The reason for the rollback that clients get.
pub const PANICKED: &str = "the new program panicked; the log says where";

/// Runs the loop until the master exits. Rolls back after a panic before the upgrade has succeeded.
/// Returns the panic if that is not possible.
fn serve_until_confirmed(master: &mut Master<'_>) -> std::thread::Result<()> {
    let lived = catch_unwind(AssertUnwindSafe(|| {
        report_vanished_workers(master);
        serve(master);
    }));
    let is_on_trial = master
        .setup
        .trial
        .as_ref()
        .is_some_and(|it| it.can_go_back());
    if lived.is_err() && is_on_trial {
        // A second panic is possible, because the state may be damaged. Then the caller rolls back with the state
        // from before the exec.
        let _ = catch_unwind(AssertUnwindSafe(|| roll_back_after_panic(master)));
        // The program that continues must get the signals that were not handled.
        signal::block_all();
        master.endpoints.signals.requeue_pending();
    }
    lived
}

/// Goes back to the old program. Returns only if that is not possible.
fn roll_back_after_panic(master: &mut Master<'_>) {
    queue_last_requests(master);
    let given_up = master.fleet.abandon_reload(PANICKED.to_owned(), now());
    let left = mem::take(&mut master.actions);
    // The old program does these forks, because this one may have panicked in a fork.
    let is_fork = |action: &Action| matches!(action, Action::Fork { .. } | Action::ForkObserver);
    master.actions = left
        .into_iter()
        .chain(given_up)
        .filter(|it| !is_fork(it))
        .collect();
    settle(master);
    let reason = match mem::take(&mut master.upgrade.stage) {
        UpgradeStage::RollingBack(reason) => reason,
        // The reload of the upgrade had not begun, so there is no other reason.
        _ => PANICKED.to_owned(),
    };
    let table = export(master);
    let pids = |fleet: &Fleet| fleet.pids().all(|pid| master.workers.get(pid).is_some());
    let is_whole = table.workers.living.len() == table.fleet.children.len()
        && Fleet::import(table.fleet.clone(), now()).is_ok_and(|fleet| pids(&fleet));
    let Some(trial) = master.setup.trial.as_ref().filter(|_| is_whole) else {
        return log::error!(
            "upgrade: the new program's state is inconsistent; rolling back to the state saved before the exec"
        );
    };
    log::info!("upgrade: rolling back to the old program");
    let error = trial.exec_old_with_state(&table, &master.endpoints.signals, &reason);
    master.workers.allow_requests();
    log::error!("upgrade: could not execute the old program: {error}");
}

/// Handles workers that are not children any more: a program whose upgrade failed has reaped them, and only that
/// program knew how they ended.
fn report_vanished_workers(master: &mut Master<'_>) {
    let gone = |pid: &Pid| !process::is_child(*pid);
    let lost: Vec<Pid> = master.fleet.pids().filter(gone).collect();
    for &pid in &lost {
        log::warn!("worker {pid} ended during the upgrade; its exit status is not known");
        let worker = master
            .workers
            .remove(pid, Suspicion::Nothing, is_plausible_keeper);
        master.queue_actions(Event::Died {
            pid,
            // Only workers are in this table, so there is no name of a pool.
            name: None,
            how: Exit::Code(0),
            last: worker.and_then(|worker| worker.last_call()),
            rss_bytes: 0,
            at: process::unix_seconds(),
        });
    }
    for progress in master.workers.keepers.progress() {
        master.queue_actions(progress);
    }
    // This comes last, because a new worker may get the pid of one that is removed here.
    act_except(master, &lost);
}
