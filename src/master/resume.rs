//! A master made of the table that the program before it left, in place of a start.
//!
//! Nothing is bound, locked or forked: all of it is there. What fails here is returned, and whoever
//! called goes back to the program before, which finds everything as it left it.

use std::collections::VecDeque;
use std::os::fd::{OwnedFd, RawFd};
use std::panic::resume_unwind;
use std::rc::Rc;

use nix::sys::signal::Signal;

use super::children::generation_info::OldContexts;
use super::children::keepers::{is_plausible_keeper, keepers_lost};
use super::children::orphans::Orphans;
use super::children::startup_log::StartupLog;
use super::children::workers::{Children, GenerationContext};
use super::endpoints::control_socket::{ClientId, ControlSocket};
use super::endpoints::listeners::Listener;
use super::endpoints::pid_file::PidFile;
use super::main_loop::{Master, now};
use super::policy::crash_counts::CrashCounts;
use super::policy::event::{Event, Exit};
use super::policy::fleet::Fleet;
use super::policy::rebalancer::Rebalancer;
use super::setup::Setup;
use super::start::show_title;
use super::upgrade::state::UpgradeState;
use super::upgrade::{ExecAttempt, Upgrade, UpgradeStage};
use crate::config::Settings;
use crate::error::{Error, Result};
use crate::link::ids::Pid;
use crate::sys::memory;
use crate::sys::notify::{Notifier, NotifyState};
use crate::sys::process;
use crate::sys::signal;

/// Is the master that another program was, until it has to leave. `setup` holds the trial that
/// the table came with.
///
/// # Errors
/// What kept it from taking over.
pub fn take_over(setup: Setup<'_>, state: UpgradeState) -> Result<()> {
    signal::block_all();
    signal::install_fault_handlers();
    // SIGPIPE: the program's on_master_start may have set its default, which would end the master when
    // the log loses its reader.
    signal::ignore(&[Signal::SIGXFSZ, Signal::SIGPIPE]);
    let reason = setup.trial.as_ref().and_then(|trial| trial.reason());
    let reason = reason.map(str::to_owned);
    let mut master = resume(setup, state)?;
    match reason {
        Some(reason) => {
            // Back again: nothing more can go wrong with what came along.
            *master.setup.trial = None;
            master.upgrade.settings = None;
            master.notifier.tell(&[NotifyState::Ready]);
            master.refuse_upgrade(&reason);
        }
        None => {
            master.upgrade.stage = UpgradeStage::AwaitingReload;
            master.upgrade.reload_also_requested =
                std::mem::replace(&mut master.reload_asked, true);
        }
    }
    if let Err(panic) = master.serve_until_confirmed() {
        resume_unwind(panic);
    }
    master.finish()
}

/// Whether this version can make a master of the table: all but its descriptors is tried.
///
/// # Errors
/// What can't be read, or contradicts itself.
pub fn check_state(state: UpgradeState) -> Result<()> {
    Fleet::import(state.fleet, now()).map_err(contradiction)?;
    Children::fits(&state.workers)
}

fn contradiction(text: String) -> Error {
    Error::Refused(format!("the table contradicts itself: {text}"))
}

/// Tells what `processes` means now: the version before ran so many programs of a pool for each worker.
fn explain_processes(settings: &Settings) {
    let workers = settings.workers.count;
    for (name, pool) in &settings.pools {
        let (count, before) = (pool.processes, pool.processes * workers);
        log::info!(
            "upgrade: processes = {count} of the pool {name} is the number for all workers now, and was \
             that for each of {workers} workers; to keep the total, set processes = {before}"
        );
    }
}

fn resume(setup: Setup<'_>, state: UpgradeState) -> Result<Master<'_>> {
    let missing = || Error::Bug("a take-over without what it came with".into());
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
        some.ok_or_else(|| contradiction("it names a listener that is not there".into()))
    };
    let now = now();
    let fleet = Fleet::import(state.fleet, now).map_err(contradiction)?;
    // First: none of them is anybody's keeper.
    fleet.pids().for_each(process::has_forked);
    let is_on_trial = setup.trial.as_ref().is_some_and(ExecAttempt::can_go_back);
    if is_on_trial && state.workers.pools.is_none() {
        explain_processes(&setup.settings);
    }
    let workers = Children::import(state.workers, take)?;
    let same = fleet.pids().count() == workers.iter().count();
    if !same || fleet.pids().any(|pid| workers.get(pid).is_none()) {
        return Err(contradiction("the workers of its two lists differ".into()));
    }
    let orphans = Orphans::import(state.orphans, |pid| workers.is_keeper(pid));
    let (path, fd) = state.pid_file;
    let settings = Rc::new(setup.settings.clone());
    let ground = Rc::new(GenerationContext {
        registry: setup.host.registry(&settings),
        settings,
        listeners: pick(&state.serving)?,
        known: Rc::new(state.known),
    });
    let clients = |numbers: Vec<u64>| numbers.into_iter().map(ClientId).collect();
    process::become_subreaper().map_err(|error| Error::system("become a subreaper", error))?;
    let control = ControlSocket::import(state.control, take)?;
    let pid_file = PidFile::import(path, take(fd)?)?;
    let passed = pick(&state.passed)?;
    // The last that can fail: what was heard until here would be lost with them.
    let signals = setup.trial.as_mut().and_then(ExecAttempt::take_signals);
    let signals = signals.ok_or_else(missing)?;
    show_title(&setup);
    workers.allow_requests();
    Ok(Master {
        fleet,
        workers,
        control,
        notifier: Notifier::from_environment(),
        signals,
        pid_file,
        orphans,
        serving_context: ground,
        old_contexts: OldContexts::default(),
        next_context: None,
        first_words: StartupLog::default(),
        strikes: CrashCounts::new(memory::oom_kill_count()),
        keepers_lost: keepers_lost(),
        spread: Rebalancer::default(),
        passed,
        reload_asked: state.reload_asked,
        reload_waits: false,
        next_verdict_for: clients(state.reload_waiting),
        verdict_for: Vec::new(),
        last_reload: state.last_reload,
        previous_log: None,
        stopping: false,
        started: state.started,
        next_watchdog: now,
        shown_status: String::new(),
        failure: None,
        actions: VecDeque::new(),
        exit_code: None,
        // A SIGCHLD may have been merged with one that was taken before the exec.
        reap_again: true,
        upgrade: Upgrade {
            waiting: clients(state.waiting),
            settings: setup.trial.is_some().then_some(state.settings),
            last: state.last_upgrade,
            ..Upgrade::default()
        },
        setup,
    })
}

impl Master<'_> {
    /// Takes note of workers that are no children any more: a program after this one has reaped
    /// them before it gave up, and how they ended went with it.
    pub(crate) fn report_vanished_workers(&mut self) {
        let gone = |pid: &Pid| !process::is_child(*pid);
        let lost: Vec<Pid> = self.fleet.pids().filter(gone).collect();
        for &pid in &lost {
            log::warn!("worker {pid} ended while the upgrade was tried, and how is not known");
            process::forget_forked(pid);
            let worker = self.workers.remove(pid, false, is_plausible_keeper);
            self.queue_actions(Event::Died {
                pid,
                how: Exit::Code(0),
                method: worker.and_then(|worker| worker.last_method()),
                rss_bytes: 0,
                at: process::unix_seconds(),
            });
        }
        // Only now: a new worker may get the pid of one that is removed here.
        self.act_except(&lost);
    }
}
