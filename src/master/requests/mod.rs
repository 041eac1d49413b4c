//! What people ask of the master, by signal or by command, and what it answers.

pub mod reload_driver;
pub mod rollback;
pub mod status_report;

use std::os::fd::AsFd;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use nix::sys::signal::Signal;

use self::status_report::{About, status};
use super::children::workers::{GenerationContext, WorkerHandle};
use super::endpoints::control_socket::ClientId;
use super::main_loop::{Master, now};
use super::policy::event::{Event, HumanDuration, MAX_COUNT, Millis};
use crate::config;
use crate::link::ids::Generation;
use crate::link::message::Order;
use crate::logging::{self, LogOutput, pluralize};
use crate::protocol::control::{ControlRequest, ControlResponse, MAX_STOP_DELAY_MS};
use crate::sys::notify::NotifyState;
use crate::sys::process::is_same_file;

impl Master<'_> {
    pub(super) fn on_signals(&mut self) {
        for signal in self.signals.take() {
            match signal {
                Signal::SIGTERM => self.stop(Event::Stop),
                Signal::SIGINT | Signal::SIGQUIT => self.stop(Event::StopNow),
                Signal::SIGHUP if self.stopping => {
                    log::warn!("reload refused: {}", self.end_in_words());
                }
                Signal::SIGHUP => self.reload_asked = true,
                Signal::SIGUSR1 => self.reopen_log(),
                Signal::SIGUSR2 => self.ask_upgrade(None),
                Signal::SIGTTIN => self.handle_event(Event::ScaleBy { by: 1 }),
                Signal::SIGTTOU => self.handle_event(Event::ScaleBy { by: -1 }),
                // SIGCHLD: every wake-up reaps.
                _ => {}
            }
        }
    }

    /// Serves on for a while, and says to who asks that it will stop.
    fn stop_after(&mut self, delay: Millis) {
        self.will_stop();
        self.handle_event(Event::StopAfter { delay });
        // No other program takes over any more, forth or back: the order is this one's to obey.
        self.cancel_upgrade();
        // Else it would be waited for until the end.
        let reason = self.end_in_words();
        self.refuse_next_reload(&reason);
        for (pid, _) in self.workers.iter() {
            self.workers.order(pid, Order::StopPending, None);
        }
    }

    /// Why a server that stops, or is about to, changes to nothing new any more.
    pub(super) fn end_in_words(&self) -> String {
        match self.fleet.stops_at() {
            Some(at) => format!(
                "the server is about to stop, in {}, and serves until then",
                HumanDuration(at.saturating_sub(now()))
            ),
            None => "the server stops".into(),
        }
    }

    fn will_stop(&mut self) {
        if !self.stopping {
            self.stopping = true;
            self.notifier.tell(&[NotifyState::Stopping]);
            log::info!("stops");
        }
    }

    pub(super) fn stop(&mut self, event: Event) {
        self.will_stop();
        self.handle_event(event);
        self.cancel_upgrade();
        // Closed after the workers were told, who first take in what is in the queue.
        for listener in &self.serving_context.listeners {
            listener.remove_path();
        }
        self.serving_context = Rc::new(GenerationContext {
            settings: Rc::clone(&self.serving_context.settings),
            registry: Arc::clone(&self.serving_context.registry),
            listeners: Vec::new(),
            known: Rc::clone(&self.serving_context.known),
        });
        self.passed.clear();
        self.refuse_waiting("the server stops");
    }

    fn reopen_log(&mut self) {
        let serving = self.fleet.generation();
        let (new, old) = match &self.next_context {
            None => (self.reopen_log_of(&self.serving_context, |_| true), None),
            // This process logs where the newcomers do, until the verdict is no.
            Some(upcoming) => (
                self.reopen_log_of(upcoming, |generation| generation > serving),
                self.reopen_log_of(&self.serving_context, |generation| generation <= serving),
            ),
        };
        if new.is_some() || old.is_some() {
            if let Some(output) = new {
                logging::set_output(output);
            }
            self.previous_log = old.or(self.previous_log.take());
            log::info!("log file reopened");
        } else if self.serving_context.settings.log.file.is_none() {
            log::info!("SIGUSR1: the log goes to standard error, nothing to reopen");
        }
    }

    /// Opens a log file anew, and passes it to the workers of these generations. `None` where there is no
    /// file, or it can't be opened.
    fn reopen_log_of(
        &self,
        ground: &GenerationContext,
        is_theirs: impl Fn(Generation) -> bool,
    ) -> Option<LogOutput> {
        let file = ground.settings.log.file.as_ref()?;
        match logging::open(Some(file)) {
            Ok(output) => {
                let theirs = |worker: &WorkerHandle| is_theirs(worker.generation);
                for (pid, _) in self.workers.iter().filter(|(_, worker)| theirs(worker)) {
                    self.workers
                        .order(pid, Order::ReopenLog, Some(output.as_fd()));
                }
                Some(output)
            }
            Err(error) => {
                log::error!(
                    "{} can't be reopened: {error}; the log goes on where it was",
                    file.display()
                );
                None
            }
        }
    }

    fn refuse(&mut self, client: ClientId, text: &str) {
        self.control
            .answer(client, &ControlResponse::refused(text, 1), now());
    }

    /// Why a command that was given this configuration file means another server; `None`: it means
    /// this one, which reads that file, or no file was given.
    fn reads_another_file(&self, named: Option<&str>) -> Option<String> {
        let named = Path::new(named?);
        let own = config::main_file(self.setup.origin.file.as_deref());
        let reads = match &own {
            Some(own) if own == named || is_same_file(own, named) => return None,
            Some(own) => own.display().to_string(),
            None => "no configuration file".into(),
        };
        Some(format!(
            "this server reads {reads}, not {}; name the file that it reads, or restart it with the other one",
            named.display()
        ))
    }

    /// What a new generation runs on, for the result of a reload or an upgrade.
    pub(super) fn sources(&self) -> String {
        let config = match &self.serving_context.settings.file {
            Some(file) => format!("configuration {}", file.display()),
            None => "no configuration file".into(),
        };
        format!("{config}, binary {}", self.setup.origin.path.display())
    }

    pub(super) fn request(&mut self, client: ClientId, request: ControlRequest) {
        match request {
            ControlRequest::Status => {
                logging::report_lost_lines();
                let about = About {
                    config: self.serving_context.settings.file.as_deref(),
                    binary: &self.setup.origin.path,
                    name: &self.setup.program,
                    started: self.started,
                    last_reload: self.last_reload.as_ref(),
                    last_upgrade: self.upgrade.last.as_ref(),
                    warnings: &self.serving_context.settings.warnings,
                    listeners: &self.serving_context.listeners,
                    strikes: &self.strikes,
                };
                let answer = status(&self.fleet, &self.workers, &about, now());
                self.control
                    .answer(client, &ControlResponse::status(answer), now());
            }
            ControlRequest::Reload { config } => {
                let refusal = match self.stopping {
                    true => Some(self.end_in_words()),
                    false => self.reads_another_file(config.as_deref()),
                };
                match refusal {
                    Some(reason) => self.refuse(client, &format!("reload refused: {reason}")),
                    None => {
                        self.reload_asked = true;
                        self.next_verdict_for.push(client);
                    }
                }
            }
            ControlRequest::Upgrade { config } => {
                match self.reads_another_file(config.as_deref()) {
                    Some(reason) => self.refuse(client, &format!("upgrade refused: {reason}")),
                    None => self.ask_upgrade(Some(client)),
                }
            }
            ControlRequest::Scale { count } => {
                let answer = if self.stopping && self.fleet.stops_at().is_none() {
                    ControlResponse::refused(self.end_in_words(), 1)
                } else if (1..=MAX_COUNT).contains(&count) {
                    self.handle_event(Event::Scale { count });
                    let count = self.fleet.target_count();
                    ControlResponse::said(pluralize(
                        count,
                        "worker is wanted",
                        "workers are wanted",
                    ))
                } else {
                    let most = MAX_COUNT;
                    ControlResponse::refused(format!("{count} workers: 1 to {most} can be had"), 64)
                };
                self.control.answer(client, &answer, now());
            }
            ControlRequest::Stop { after_ms, .. } if after_ms > Some(MAX_STOP_DELAY_MS) => {
                let text = "stop refused: it would come after more than a day; give 1d at most";
                let answer = ControlResponse::refused(text, 64);
                self.control.answer(client, &answer, now());
            }
            ControlRequest::Stop {
                now: at_once,
                after_ms,
            } => {
                // Answered before anything else: the end of the connection is the rest.
                self.control
                    .answer_and_keep(client, &ControlResponse::done(), now());
                match after_ms {
                    Some(delay) if !at_once => self.stop_after(delay),
                    _ => self.stop(if at_once { Event::StopNow } else { Event::Stop }),
                }
            }
        }
    }
}
