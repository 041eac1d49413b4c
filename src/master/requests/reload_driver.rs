//! Carries out a reload: reads and checks the configuration, binds, starts the new generation, and reports
//! the result.
//!
//! Every step that can fail comes before the first change. If the new generation does not become ready, the changes
//! are undone. `Fleet` decides when the reload starts and whether it has succeeded.

use std::rc::Rc;
use std::sync::Arc;

use super::upgrade_driver::finish_upgrade;
use crate::config::{self, JobStore, Settings};
use crate::error::{Error, Result};
use crate::link::ids::Generation;
use crate::link::metrics_board;
use crate::master::children::pool_process::kept_pools;
use crate::master::children::slow_calls;
use crate::master::children::workers::{GenerationContext, GenerationInfo};
use crate::master::core::{Master, now};
use crate::master::endpoints::listeners::{self, Listener};
use crate::master::endpoints::observed;
use crate::master::policy::event::Event;
use crate::master::session_orders::order_sessions;
use crate::master::setup::{limits, open_access_file};
use crate::protocol::control::{ControlResponse, MOST_DRAINING_GENERATIONS};
use crate::sys::notify::NotifyState;
use crate::sys::process;
use crate::worker_init::JobsInstance;

/// `status` shows why a reload failed, with this number of the last lines that its children have logged.
const LAST_LINES: usize = 2;

/// Begins the requested reload if none is under way, and queues the actions that follow.
pub fn reload_if_asked(master: &mut Master<'_>) {
    if !master.reloads.is_requested() || master.upgrade.holds_reload() {
        return;
    }
    if !master.fleet.can_reload() {
        if master.fleet.drains_too_much() && master.reloads.should_log_wait() {
            log::warn!(
                "the reload waits: {MOST_DRAINING_GENERATIONS} older generations still drain; it begins \
                 when one of them has exited"
            );
        }
        return;
    }
    master.reloads.begin();
    master.reload_history.begin(now());
    let mut states = vec![NotifyState::Reloading];
    states.extend(NotifyState::monotonic_usec_now());
    master.endpoints.notifier.notify(&states);
    log::info!("reload: reading the configuration");
    // Do this before anything can fail: commands need these two files to find the master.
    if !master.upgrade.is_on_trial() {
        master.endpoints.pid_file.renew();
        master.endpoints.control.renew(now());
    }
    match prepare(master) {
        Ok(context) => {
            let limits = limits(&context.settings);
            let pools = kept_pools(&master.contexts.serving, &context);
            master.queue_actions(Event::KeepPools { pools });
            master.contexts.next = Some(Rc::new(context));
            master.queue_actions(Event::Reload { limits });
        }
        Err(error) => {
            restore_log(master);
            finish_reload(master, Err(error.to_string()));
        }
    }
}

/// Reads and checks the new configuration and opens what it names.
fn prepare(master: &mut Master<'_>) -> Result<GenerationContext> {
    let settings = config::keep_restart_only_keys(
        master.setup.host.load()?,
        &master.contexts.serving.settings,
    );
    if master.contexts.serving.settings.daemon && settings.log.file.is_none() {
        return Err(Error::Config {
            file: settings.file,
            position: None,
            key: "log.file".into(),
            problem: "it is gone, and a daemon has no terminal to log to".into(),
            remedy: "name a file".into(),
        });
    }
    master.previous_log = master.setup.host.configure_log(&settings)?;
    // These come before the listeners. If they fail, no listener has changed, and no socket file is left.
    let access_file = open_access_file(&settings)?;
    // A reload may add jobs. If the reload then fails, the master keeps the lock, because the processes of the failed
    // generation have it until they end.
    if let Some(config) = &settings.jobs
        && !has_store(master.contexts.jobs.as_ref(), &config.store)
    {
        // Close the lock of a reload that has failed first: the two paths may be names of one store, and closing any
        // descriptor of a lock file ends the mark of the master.
        master.contexts.jobs = None;
        let jobs = master.setup.host.open_jobs(&settings)?;
        master.contexts.jobs = jobs.map(Arc::new);
    }
    let serving = &master.contexts.serving;
    let current = (&*serving.listeners, &*serving.observe);
    let (listeners, observe) = observed::open_all(&settings, current, &master.endpoints.passed)?;
    for warning in new_warnings(&settings, &serving.settings) {
        log::warn!("{warning}");
    }
    let registry = master.setup.host.registry(&settings);
    Ok(GenerationContext {
        known: GenerationInfo::of(&settings, &registry, &listeners),
        registry,
        settings: Rc::new(settings),
        listeners,
        observe,
        access_file,
    })
}

/// Returns the warnings about `settings` that those before did not cause.
fn new_warnings<'a>(
    settings: &'a Settings,
    before: &'a Settings,
) -> impl Iterator<Item = &'a String> {
    let warnings = settings.warnings.iter();
    warnings.filter(|warning| !before.warnings.contains(warning))
}

fn has_store(instance: Option<&Arc<JobsInstance>>, store: &JobStore) -> bool {
    instance.is_some_and(|instance| instance.store.as_ref() == Some(store))
}

/// Ends the reload: switches to the new generation, or undoes the changes. Reports the result.
pub fn finish_reload(master: &mut Master<'_>, result: std::result::Result<Generation, String>) {
    let next = master.contexts.next.take();
    let mut details = master.workers.take_startup_log();
    let before = Rc::clone(&master.contexts.serving);
    let response = match &result {
        Ok(generation) => {
            if let Some(context) = next {
                remove_paths(&before, &context);
                // Set the options only now, because a failed reload must not change the listeners.
                listeners::tune(&context.settings, &context.listeners);
                observed::tune(&context.settings, &context.observe);
                master.contexts.serving = context;
                slow_calls::publish(
                    &mut master.workers.metrics,
                    &master.contexts.serving.settings,
                );
                let fleet = &master.fleet;
                let is_used = |after| fleet.has_pools_before(after);
                master.contexts.old.add(*generation, &before, is_used);
            }
            master.workers.announce_ended_pools(*generation);
            master.previous_log = None;
            master.crash_counts.reset();
            master.workers.publish_quarantine(&master.crash_counts);
            details = master.contexts.serving.observer_text();
            if details == before.observer_text() {
                details.clear();
            }
            log::info!("reload: generation {generation} serves, the one before drains{details}");
            order_sessions(master);
            let serving = &master.contexts.serving;
            let gone = [
                serving.known.removed_methods(&before.known),
                serving.closed_listeners(&before),
            ];
            for gone in gone.iter().flatten() {
                log::warn!("reload: {gone}");
            }
            let restart = serving.settings.restart_warning();
            for detail in gone.iter().flatten().chain(&restart) {
                details += &format!("; {detail}");
            }
            let new = new_warnings(&serving.settings, &before.settings);
            // The details have the one about keys that need a restart.
            for warning in new.filter(|it| Some(*it) != restart.as_ref()) {
                details += &format!("; warning: {warning}");
            }
            let sources = master.sources();
            ControlResponse::said(format!(
                "generation {generation} serves ({sources}){details}"
            ))
        }
        Err(reason) => {
            if let Some(context) = next {
                remove_paths(&context, &before);
                restore_log(master);
            }
            log::error!("reload refused, everything stays as it was: {reason}");
            // The log already has the lines of the new workers, but a client gets only this answer.
            ControlResponse::refused(format!("reload refused: {reason}{details}"), 1)
        }
    };
    if finish_upgrade(master, &result, &details) {
        return;
    }
    let reloads = &master.workers.metrics.header().reloads;
    metrics_board::count(&reloads[usize::from(result.is_err())], 1);
    // Add the last lines that the new children have logged, because a program logs the reason before it exits.
    let error = result.err().map(|reason| {
        let lines: Vec<&str> = details.trim().lines().collect();
        let last = &lines[lines.len().saturating_sub(LAST_LINES)..];
        let last = last.iter().map(|line| format!("; {}", line.trim()));
        reason + &last.collect::<String>()
    });
    let serving = master.fleet.generation();
    let at = process::unix_seconds();
    master.reload_history.end(serving, error, now(), at);
    for client in master.reloads.end() {
        master.answer(client, &response);
    }
    if !master.stopping {
        master.endpoints.notifier.notify(&[NotifyState::Ready]);
    }
}

/// Refuses all reloads for whose result clients wait.
pub fn refuse_waiting(master: &mut Master<'_>, reason: &str) {
    master.reloads.requeue();
    refuse_next_reload(master, reason);
}

/// Cancels the reload that has not begun, and tells its clients.
pub fn refuse_next_reload(master: &mut Master<'_>, reason: &str) {
    let (was_requested, clients) = master.reloads.cancel();
    if was_requested && clients.is_empty() {
        log::warn!("reload refused: {reason}");
    }
    for client in clients {
        let response = ControlResponse::refused(format!("reload refused: {reason}"), 1);
        master.answer(client, &response);
    }
}

/// Sets the log back to its previous output, if the reload had changed it. Opens no file.
fn restore_log(master: &mut Master<'_>) {
    if let Some(output) = master.previous_log.take() {
        master
            .setup
            .host
            .restore_log(&master.contexts.serving.settings, output);
    }
}

/// Removes the paths of the unix sockets that `old` has and `new` does not have.
fn remove_paths(old: &GenerationContext, new: &GenerationContext) {
    let all = |context: &'_ GenerationContext| -> Vec<Rc<Listener>> {
        let listeners = context.listeners.iter().chain(&context.observe);
        listeners.cloned().collect()
    };
    let kept = all(new);
    for listener in all(old) {
        if !kept.iter().any(|other| Rc::ptr_eq(other, &listener)) {
            listener.remove_path();
        }
    }
}
