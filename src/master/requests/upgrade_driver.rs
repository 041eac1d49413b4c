//! Carries out an upgrade: probes the new program, and goes over to it, or back to the old one.
//! [`crate::master::upgrade`] explains the steps.

use std::mem;
use std::rc::Rc;

use crate::config::secrets_of;
use crate::link::ids::Generation;
use crate::link::metrics_board;
use crate::logging;
use crate::master::core::{Master, now};
use crate::master::endpoints::control_socket::ClientId;
use crate::master::endpoints::listeners::Listener;
use crate::master::policy::event::Millis;
use crate::master::upgrade::exec_attempt;
use crate::master::upgrade::probe::{self, Probe};
use crate::master::upgrade::stage::UpgradeStage;
use crate::master::upgrade::state::{FORMAT, InstanceState, UpgradeState};
use crate::protocol::control::{ControlResponse, LastReload, version_of};
use crate::sys::process::{self, Exit, Pid};

/// A program that must be executed now.
pub enum DueExec {
    New,
    /// The old program, with the reason.
    Old(String),
}

/// Handles a request for an upgrade, from a client or by a signal.
pub fn ask_upgrade(master: &mut Master<'_>, client: Option<ClientId>) {
    let refusal = match &master.upgrade.stage {
        _ if master.stopping => Some(master.stop_notice()),
        UpgradeStage::Idle => None,
        UpgradeStage::Probing(probe) if probe.given_up => {
            Some("the probe of the last upgrade was killed and has not exited yet".into())
        }
        _ => Some("another upgrade is under way".into()),
    };
    match (refusal, client) {
        // Requests that come before the upgrade begins share one upgrade.
        (None, client) => {
            master.upgrade.is_requested = true;
            master.upgrade.waiting.extend(client);
        }
        (Some(reason), Some(client)) => {
            let response = ControlResponse::refused(format!("upgrade refused: {reason}"), 1);
            master.answer(client, &response);
        }
        (Some(reason), None) => log::warn!("upgrade refused: {reason}"),
    }
}

/// Does the next step of an upgrade. Returns the program to execute, if it is time for that. The caller must first
/// handle all that workers have reported.
pub fn advance_upgrade(master: &mut Master<'_>) -> Option<DueExec> {
    match &mut master.upgrade.stage {
        UpgradeStage::Idle
            if master.upgrade.is_requested
                && !master.reloads.is_requested()
                && master.fleet.can_reload() =>
        {
            master.upgrade.is_requested = false;
            start_probe(master);
        }
        UpgradeStage::Probing(probe) if probe.deadline().is_some_and(|at| at <= now()) => {
            let reason = probe.give_up(None);
            refuse_upgrade(master, &format!("{}: {reason}", program(master)));
        }
        UpgradeStage::Passed(file) if probe::identity(&master.setup.origin.path) != *file => {
            let reason = format!("{} has changed since it was probed", program(master));
            refuse_upgrade(master, &reason);
        }
        UpgradeStage::Passed(_) => {
            log::info!("upgrade: executing {}", program(master));
            return Some(DueExec::New);
        }
        UpgradeStage::RollingBack(reason) => {
            log::info!("upgrade: rolling back to the old program");
            return Some(DueExec::Old(mem::take(reason)));
        }
        _ => {}
    }
    None
}

/// Executes another program. If that fails, this program continues with the workers that serve.
pub fn exec(master: &mut Master<'_>, due: DueExec) {
    let state = export(master);
    let signals = &master.endpoints.signals;
    let reason = match due {
        DueExec::New => {
            let error = exec_attempt::exec_new(&state, signals);
            format!("could not execute {}: {error}", program(master))
        }
        DueExec::Old(reason) => {
            let error = match master.setup.trial.take() {
                Some(trial) => trial.exec_old_with_state(&state, signals, &reason),
                None => std::io::Error::other("there is no old program"),
            };
            master.workers.allow_requests();
            return end_upgrade(
                master,
                "upgrade failed, and the old program could not be executed: the new one continues",
                &format!("{reason}; could not execute the old program: {error}"),
            );
        }
    };
    master.workers.allow_requests();
    refuse_upgrade(master, &reason);
}

fn program(master: &Master<'_>) -> String {
    master.setup.origin.path.display().to_string()
}

fn start_probe(master: &mut Master<'_>) {
    log::info!("upgrade: probing {}", program(master));
    let workers = &master.contexts.serving.settings.workers;
    let limit = workers.boot_timeout.as_millis() as Millis;
    let started = export(master)
        .to_json()
        .and_then(|table| Probe::start(&master.setup.origin, &table, now(), limit));
    match started {
        Ok(probe) => master.upgrade.stage = UpgradeStage::Probing(Box::new(probe)),
        Err(error) => refuse_upgrade(master, &error.to_string()),
    }
}

/// Returns whether a child that was reaped is the probe. If so, handles its result.
pub fn probe_ended(master: &mut Master<'_>, pid: Pid, exit: Exit) -> bool {
    match mem::take(&mut master.upgrade.stage) {
        UpgradeStage::Probing(probe) if probe.pid() == pid => {
            let given_up = probe.given_up;
            match probe.result(exit) {
                _ if given_up => {}
                Ok(file) => master.upgrade.stage = UpgradeStage::Passed(file),
                Err(reason) => refuse_upgrade(master, &format!("{}: {reason}", program(master))),
            }
            true
        }
        other => {
            master.upgrade.stage = other;
            false
        }
    }
}

/// Refuses the upgrade: nothing changes, and its clients get the reason.
pub fn refuse_upgrade(master: &mut Master<'_>, reason: &str) {
    let outcome = "upgrade refused, everything stays as it was";
    end_upgrade(master, outcome, reason);
}

/// Ends an upgrade without the program that was wanted. `outcome` says what runs now.
fn end_upgrade(master: &mut Master<'_>, outcome: &str, reason: &str) {
    // Only the first line of the reason: its other lines are already in the log.
    let first = reason.lines().next().unwrap_or_default();
    log::error!("{outcome}: {first}");
    let given_up =
        |stage: &UpgradeStage| matches!(stage, UpgradeStage::Probing(probe) if probe.given_up);
    if !given_up(&master.upgrade.stage) {
        master.upgrade.stage = UpgradeStage::Idle;
    }
    upgrade_ended(master, Err(reason.to_owned()));
}

/// Cancels an upgrade, because the server stops or soon will. If the new program already runs, it keeps running (no
/// rollback).
pub fn cancel_upgrade(master: &mut Master<'_>) {
    let reason = master.stop_notice();
    let under_way = match &master.upgrade.stage {
        UpgradeStage::Idle => mem::take(&mut master.upgrade.is_requested),
        UpgradeStage::Probing(probe) => !probe.given_up,
        UpgradeStage::Passed(_) | UpgradeStage::AwaitingReload | UpgradeStage::RollingBack(_) => {
            true
        }
    };
    if under_way {
        log::warn!("upgrade refused: {reason}");
    }
    *master.setup.trial = None;
    match &mut master.upgrade.stage {
        UpgradeStage::Probing(probe) if !probe.given_up => {
            probe.give_up(Some(&reason));
        }
        UpgradeStage::Probing(_) => {}
        stage => *stage = UpgradeStage::Idle,
    }
    if under_way {
        upgrade_ended(master, Err(reason));
    }
}

fn upgrade_ended(master: &mut Master<'_>, result: Result<String, String>) {
    let response = match &result {
        Ok(text) => ControlResponse::said(text.clone()),
        Err(reason) => ControlResponse::refused(format!("upgrade refused: {reason}"), 1),
    };
    let upgrades = &master.workers.metrics.header().upgrades;
    metrics_board::count(&upgrades[usize::from(result.is_err())], 1);
    master.upgrade.last = Some(LastReload {
        ok: result.is_ok(),
        at: process::unix_seconds(),
        error: result.err(),
    });
    for client in mem::take(&mut master.upgrade.waiting) {
        master.answer(client, &response);
    }
}

/// Handles the result of a reload if it belongs to an upgrade. `details` are added to the text of the result. Returns
/// whether this program rolls back: then the old program reports the result.
pub fn finish_upgrade(
    master: &mut Master<'_>,
    result: &Result<Generation, String>,
    details: &str,
) -> bool {
    if !master.upgrade.is_on_trial() || master.stopping {
        return false;
    }
    match result {
        Ok(generation) => {
            // Closes what was passed on, and the old program.
            *master.setup.trial = None;
            mark_master(master);
            master.upgrade.stage = UpgradeStage::Idle;
            master.upgrade.settings = None;
            let name = &master.setup.program;
            let version = version_of(name, env!("CARGO_PKG_VERSION"));
            let sources = master.sources();
            let text = format!(
                "{name} {version} runs, generation {generation} serves ({sources}){details}"
            );
            log::info!("upgrade: {text}");
            upgrade_ended(master, Ok(text));
            false
        }
        Err(reason) => {
            master.upgrade.stage = UpgradeStage::RollingBack(format!("{reason}{details}"));
            // The program that does the next reload answers these clients.
            master.reloads.requeue();
            if master.upgrade.reload_also_requested {
                master.reloads.request(None);
            }
            true
        }
    }
}

/// Marks this process again as the master of the job store. The kernel drops the mark when any descriptor of the lock
/// file is closed, such as the one that was passed on.
pub fn mark_master(master: &Master<'_>) {
    if let Some(jobs) = &master.contexts.jobs
        && let Err(error) = jobs.lock.mark_master()
    {
        log::error!(
            "could not mark the lock of the job store: {error}; `preforkd job check` may say that no server uses the store"
        );
    }
}

/// Returns all that the next program has to know. Call it between two turns of the loop.
pub fn export(master: &Master<'_>) -> UpgradeState {
    let mut listeners = master.contexts.serving.listeners.clone();
    for more in master
        .endpoints
        .passed
        .iter()
        .chain(&master.contexts.serving.observe)
    {
        if !listeners.iter().any(|one| Rc::ptr_eq(one, more)) {
            listeners.push(more.clone());
        }
    }
    let places = |some: &[Rc<Listener>]| {
        let place = |one| listeners.iter().position(|other| Rc::ptr_eq(one, other));
        some.iter().filter_map(place).collect()
    };
    let numbers = |clients: &[ClientId]| clients.iter().map(|client| client.0).collect();
    let (settings, secrets) = match &master.upgrade.settings {
        Some(received) => received.clone(),
        None => {
            let settings = &master.contexts.serving.settings;
            (settings.to_toml(), secrets_of(settings))
        }
    };
    UpgradeState {
        format: FORMAT,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        origin: master.setup.origin.clone(),
        started: master.started,
        settings,
        secrets,
        log: match master.contexts.serving.settings.log.file {
            Some(_) => logging::output_descriptor(),
            None => None,
        },
        pid_file: master.endpoints.pid_file.export(),
        control: master.endpoints.control.export(),
        listeners: listeners.iter().map(|one| one.export()).collect(),
        serving: places(&master.contexts.serving.listeners),
        passed: places(&master.endpoints.passed),
        observed: places(&master.contexts.serving.observe),
        fleet: master.fleet.export(),
        workers: master.workers.export(),
        known: (*master.contexts.serving.known).clone(),
        orphans: master.orphans.export(master.workers.other_pids()),
        jobs: master.contexts.jobs.as_ref().map(|jobs| InstanceState {
            id: jobs.id,
            lock: jobs.lock.raw_descriptor(),
            was_opened: jobs.was_opened.is_set(),
        }),
        executor_ends: master.executor_ends.export(now()),
        last_reload: master.reload_history.last().cloned(),
        reloads: master.reload_history.all(),
        last_upgrade: master.upgrade.last.clone(),
        waiting: numbers(&master.upgrade.waiting),
        reload_asked: master.reloads.is_requested(),
        reload_waiting: numbers(master.reloads.queued()),
    }
}
