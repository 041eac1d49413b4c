//! Handles signals, requests over the control socket, and the outcomes of what the policy orders.

pub mod reload_driver;
pub(super) mod reopening;
pub mod status_report;
pub mod upgrade_driver;

use std::path::Path;
use std::rc::Rc;

use nix::sys::signal::Signal;

use self::reload_driver::{finish_reload, refuse_next_reload, refuse_waiting};
use self::reopening::reopen_logs;
use self::status_report::status;
use self::upgrade_driver::{ask_upgrade, cancel_upgrade};
use super::children::joining::pass_command;
use super::children::workers::GenerationContext;
use super::core::{ActionOutcome, Master, now};
use super::endpoints::control_socket::ClientId;
use super::policy::event::{Event, MAX_COUNT, Millis};
use super::reports::keep_deaths_of_programs;
use super::session_orders::{note_crashed_sessions, note_serving, order_sessions};
use crate::config;
use crate::error::Error;
use crate::link::message::Order;
use crate::logging::{self, pluralize};
use crate::protocol::control::{ControlRequest, ControlResponse, MAX_STOP_DELAY_MS};
use crate::sys::notify::NotifyState;
use crate::sys::process::is_same_file;

/// Passes an event to the policy, and carries out all that follows.
pub fn handle_event(master: &mut Master<'_>, event: Event) {
    master.queue_actions(event);
    settle(master);
}

/// Carries out all queued actions, and handles their outcomes.
pub fn settle(master: &mut Master<'_>) {
    while let Some(outcome) = master.apply_actions() {
        match outcome {
            ActionOutcome::Started(result) => finish_start(master, result),
            ActionOutcome::Reloaded(result) => finish_reload(master, result),
            ActionOutcome::StopDue => stop(master, Event::Stop),
        }
    }
}

fn finish_start(master: &mut Master<'_>, result: Result<(), String>) {
    let log_lines = master.workers.take_startup_log();
    if let Err(reason) = result {
        // If the log goes to standard error, the lines are there already.
        let log_lines = match master.contexts.serving.settings.log.file {
            Some(_) => log_lines,
            None => String::new(),
        };
        master.failure = Some(Error::NotReady(reason + &log_lines));
        return;
    }
    note_serving(master);
    let listeners = master.contexts.serving.listeners.iter();
    let addresses: Vec<&str> = listeners.map(|one| one.bound.as_str()).collect();
    log::info!(
        "ready: {} {}{}",
        pluralize(master.fleet.ready_count(), "worker serves", "workers serve"),
        addresses.join(" and "),
        master.contexts.serving.observer_text()
    );
    master.endpoints.notifier.notify(&[NotifyState::Ready]);
    if let Some(launcher) = master.setup.launcher.take() {
        launcher.ready();
    }
}

pub fn on_signals(master: &mut Master<'_>) {
    for signal in master.endpoints.signals.take() {
        match signal {
            Signal::SIGTERM => stop(master, Event::Stop),
            Signal::SIGINT | Signal::SIGQUIT => stop(master, Event::StopNow),
            Signal::SIGHUP if master.stopping => {
                log::warn!("reload refused: {}", master.stop_notice());
            }
            Signal::SIGHUP => master.reloads.request(None),
            Signal::SIGUSR1 => reopen_logs(master),
            Signal::SIGUSR2 => ask_upgrade(master, None),
            Signal::SIGTTIN => handle_event(master, Event::ScaleBy { by: 1 }),
            Signal::SIGTTOU => handle_event(master, Event::ScaleBy { by: -1 }),
            // SIGCHLD: the loop reaps at each turn anyway.
            _ => {}
        }
    }
}

/// Schedules the stop. From now on the server reports that it is not ready.
fn stop_after(master: &mut Master<'_>, delay: Millis) {
    will_stop(master);
    handle_event(master, Event::StopAfter { delay });
    // This program must carry out the order, so no upgrade and no rollback may follow.
    cancel_upgrade(master);
    // The clients that have asked for a reload would wait until the stop.
    let reason = master.stop_notice();
    refuse_next_reload(master, &reason);
    for (pid, _) in master.workers.iter() {
        master.workers.order(pid, Order::StopPending, None);
    }
}

fn will_stop(master: &mut Master<'_>) {
    if !master.stopping {
        master.stopping = true;
        master.endpoints.notifier.notify(&[NotifyState::Stopping]);
    }
}

pub fn stop(master: &mut Master<'_>, event: Event) {
    will_stop(master);
    handle_event(master, event);
    order_sessions(master);
    cancel_upgrade(master);
    // This comes after the orders, because the workers first accept what is in the queue.
    for listener in &master.contexts.serving.listeners {
        listener.remove_path();
    }
    master.contexts.serving = Rc::new(GenerationContext {
        listeners: Vec::new(),
        ..(*master.contexts.serving).clone()
    });
    master.endpoints.passed.clear();
    refuse_waiting(master, "the server stops");
}

/// Passes a connection to the jobs process, which answers it and logs the request.
fn pass_to_jobs(master: &mut Master<'_>, client: ClientId) {
    if master.contexts.serving.settings.jobs.is_none() {
        let text = "this server has no durable jobs; add the table [jobs] to its configuration, and reload";
        return refuse(master, client, text);
    }
    let connection = master.endpoints.control.connection(client);
    if connection.is_some_and(|connection| pass_command(&master.workers, connection)) {
        return master.endpoints.control.forget(client);
    }
    let text = "there is no jobs process now: it is being replaced; try again";
    master.answer(client, &ControlResponse::refused(text, 69));
}

fn refuse(master: &mut Master<'_>, client: ClientId, text: &str) {
    master.answer(client, &ControlResponse::refused(text, 1));
}

/// Returns why a command that names this configuration file is meant for another server; `None` if it
/// is meant for this one.
fn reads_another_file(master: &Master<'_>, named: Option<&str>) -> Option<String> {
    let named = Path::new(named?);
    let own = config::main_file(master.setup.origin.file.as_deref());
    let reads = match &own {
        Some(own) if own == named || is_same_file(own, named) => return None,
        Some(own) => own.display().to_string(),
        None => "no configuration file".into(),
    };
    Some(format!(
        "this server reads {reads}, not {}; name the file that it reads, or restart it with the other file",
        named.display()
    ))
}

pub fn request(master: &mut Master<'_>, client: ClientId, request: ControlRequest) {
    if master.endpoints.control.is_observer(client) && request != ControlRequest::Status {
        return refuse(master, client, "an observer may ask for the status only");
    }
    if request == ControlRequest::Metrics {
        let files = master.workers.read_only_boards();
        master.endpoints.control.attach(client, files);
    }
    match request {
        ControlRequest::Job { .. } => pass_to_jobs(master, client),
        ControlRequest::Status | ControlRequest::Metrics => {
            logging::report_lost_lines();
            keep_deaths_of_programs(master);
            note_crashed_sessions(master);
            settle(master);
            let answer = ControlResponse::status(status(master, now()));
            master.answer(client, &answer);
        }
        ControlRequest::Reload { config } => {
            let refusal = match master.stopping {
                true => Some(master.stop_notice()),
                false => reads_another_file(master, config.as_deref()),
            };
            match refusal {
                Some(reason) => refuse(master, client, &format!("reload refused: {reason}")),
                None => master.reloads.request(Some(client)),
            }
        }
        ControlRequest::Upgrade { config } => match reads_another_file(master, config.as_deref()) {
            Some(reason) => refuse(master, client, &format!("upgrade refused: {reason}")),
            None => ask_upgrade(master, Some(client)),
        },
        ControlRequest::Scale { count } => {
            let answer = if master.stopping && master.fleet.stops_at().is_none() {
                ControlResponse::refused(master.stop_notice(), 1)
            } else if (1..=MAX_COUNT).contains(&count) {
                handle_event(master, Event::Scale { count });
                let is_deferred = master.fleet.has_deferred_scale();
                let wanted = if is_deferred {
                    count
                } else {
                    master.fleet.target_count()
                };
                let text = pluralize(wanted, "worker is wanted", "workers are wanted");
                ControlResponse::said(match is_deferred {
                    true => {
                        format!("{text}; the number changes when the start or the reload has ended")
                    }
                    false => text,
                })
            } else {
                let most = MAX_COUNT;
                ControlResponse::refused(
                    format!("{count} workers: the number must be 1 to {most}"),
                    64,
                )
            };
            master.answer(client, &answer);
        }
        ControlRequest::Stop { after_ms, .. } if after_ms > Some(MAX_STOP_DELAY_MS) => {
            let text = "stop refused: the delay is longer than a day; give 1d at most";
            let answer = ControlResponse::refused(text, 64);
            master.answer(client, &answer);
        }
        ControlRequest::Stop {
            now: at_once,
            after_ms,
        } => {
            // Answered before the stop. The client then waits until the master closes the connection.
            master
                .endpoints
                .control
                .answer_and_keep(client, &ControlResponse::done(), now());
            match after_ms {
                Some(delay) if !at_once => stop_after(master, delay),
                _ => stop(master, if at_once { Event::StopNow } else { Event::Stop }),
            }
        }
    }
}
