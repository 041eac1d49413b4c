//! The master's one loop: signals, workers' reports, deaths, the control socket, the clock.
//!
//! It reports to `Fleet` what happened and does what `Fleet` answers, in that order, and decides
//! nothing. It never waits but in poll(2), parses no calls, and leaves by order alone. A panic in
//! here is logged by whoever called; the workers notice the closed links and leave by themselves.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::children::generation_info::OldContexts;
use super::children::orphans::Orphans;
use super::children::startup_log::StartupLog;
use super::children::workers::{Children, ForkContext, GenerationContext};
use super::endpoints::control_socket::{ClientId, ControlSocket};
use super::endpoints::listeners::Listener;
use super::endpoints::pid_file::PidFile;
use super::policy::crash_counts::CrashCounts;
use super::policy::event::{Action, Event, Millis};
use super::policy::fleet::Fleet;
use super::policy::rebalancer::Rebalancer;
use super::setup::Setup;
use super::upgrade::Upgrade;
use crate::error::{Error, Result};
use crate::link::ids::{Generation, Slot};
use crate::link::message::{Order, Report};
use crate::logging::{self, pluralize};
use crate::protocol::control::LastReload;
use crate::sys::notify::{Notifier, NotifyState};
use crate::sys::process;
use crate::sys::signal::{self, SignalPipe};
use crate::throttle::limiter::Limiter;

/// Between two tries to tell the service manager what it had no room for.
const NOTIFY_RETRY: Millis = 50;

pub(super) struct Master<'a> {
    pub(super) setup: Setup<'a>,
    pub(super) fleet: Fleet,
    pub(super) workers: Children,
    pub(super) control: ControlSocket,
    pub(super) notifier: Notifier,
    pub(super) signals: SignalPipe,
    pub(super) pid_file: PidFile,
    pub(super) orphans: Orphans,
    pub(super) strikes: CrashCounts,
    /// How often a worker is replaced for want of a keeper.
    pub(super) keepers_lost: Limiter,
    /// What the generation that serves runs on.
    pub(super) serving_context: Rc<GenerationContext>,
    pub(super) old_contexts: OldContexts,
    /// What the generation of a reload under way runs on.
    pub(super) next_context: Option<Rc<GenerationContext>>,
    /// What the workers of a generation that awaits its verdict have logged.
    pub(super) first_words: StartupLog,
    /// When to look whether lasting connections lie evenly.
    pub(super) spread: Rebalancer,
    /// What was passed by the service manager, for life.
    pub(super) passed: Vec<Rc<Listener>>,
    /// A reload was asked for and has not begun; who waits for its verdict.
    pub(super) reload_asked: bool,
    /// It was told that it waits for old generations to leave.
    pub(super) reload_waits: bool,
    pub(super) next_verdict_for: Vec<ClientId>,
    /// Who waits for the verdict of the reload under way.
    pub(super) verdict_for: Vec<ClientId>,
    pub(super) last_reload: Option<LastReload>,
    /// Where the log went before the reload under way.
    pub(super) previous_log: Option<logging::LogOutput>,
    pub(super) stopping: bool,
    pub(super) started: Millis,
    pub(super) next_watchdog: Millis,
    pub(super) shown_status: String,
    pub(super) failure: Option<Error>,
    pub(super) actions: VecDeque<Action>,
    pub(super) exit_code: Option<u8>,
    /// More children may have ended than one look takes.
    pub(super) reap_again: bool,
    pub(super) upgrade: Upgrade,
}

impl Master<'_> {
    pub(super) fn serve(&mut self) {
        self.apply_actions();
        signal::unblock_all();
        // After an upgrade its reload has begun, or failed, before anything else comes.
        self.reload_if_asked();
        self.advance_upgrade();
        while self.exit_code.is_none() {
            let ready = self.wait();
            self.on_signals();
            for pid in ready.links {
                self.queue_reports(pid);
                self.apply_actions();
            }
            if ready.probe {
                self.upgrade.listen();
            }
            self.reap();
            if ready.control {
                self.control.accept(now());
            }
            for client in ready.clients {
                if let Some(request) = self.control.serve(client, now()) {
                    self.request(client, request);
                }
            }
            self.control.expire(now());
            self.pass_time();
            self.spread();
            self.reload_if_asked();
            self.advance_upgrade();
            // Again: an upgrade that has failed lets one begin that has waited for it.
            self.reload_if_asked();
            self.show_status();
        }
    }

    /// Waits until something is ready or due.
    fn wait(&mut self) -> Ready {
        let mut fds = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        let links: Vec<_> = self.workers.links().collect();
        let clients: Vec<_> = self.control.clients().collect();
        let listener = self.control.listener(now());
        fds.extend(
            links
                .iter()
                .map(|(_, fd)| PollFd::new(*fd, PollFlags::POLLIN)),
        );
        fds.extend(
            clients
                .iter()
                .map(|(_, fd, wanted)| PollFd::new(*fd, *wanted)),
        );
        let probe = self.upgrade.output();
        let marks = self.orphans.output();
        fds.extend(listener.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        fds.extend(probe.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        fds.extend(marks.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        match poll(&mut fds, self.timeout()) {
            Ok(_) | Err(Errno::EINTR) => {}
            // Out of memory for a moment: signals and the clock are looked at all the same.
            Err(error) => log::error!("poll failed: {error}; the master goes on"),
        }
        let is_ready = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
        let (links_at, clients_at) = (1, 1 + links.len());
        let control_at = clients_at + clients.len();
        let probe_at = control_at + usize::from(listener.is_some());
        Ready {
            links: links
                .iter()
                .zip(&fds[links_at..])
                .filter(|(_, fd)| is_ready(fd))
                .map(|((pid, _), _)| *pid)
                .collect(),
            clients: clients
                .iter()
                .zip(&fds[clients_at..])
                .filter(|(_, fd)| is_ready(fd))
                .map(|((id, _, _), _)| *id)
                .collect(),
            control: listener.is_some() && is_ready(&fds[control_at]),
            probe: probe.is_some() && is_ready(&fds[probe_at]),
        }
    }

    fn timeout(&self) -> PollTimeout {
        if self.reap_again {
            return PollTimeout::ZERO;
        }
        let watchdog = self.notifier.watchdog().map(|_| self.next_watchdog);
        let next = [
            self.fleet.next_deadline(),
            self.control.next_deadline(now()),
            watchdog,
            self.spread.next(),
            self.upgrade.deadline(),
            self.orphans.deadline(),
            self.workers.next_keeper(),
            self.notifier
                .has_unsent_states()
                .then(|| now() + NOTIFY_RETRY),
        ]
        .into_iter()
        .flatten()
        .min();
        match next {
            // One more millisecond: poll(2) rounds down, and waking early is waking twice.
            Some(at) => {
                let wait = at.saturating_sub(now()).saturating_add(1).min(3_600_000);
                PollTimeout::try_from(Duration::from_millis(wait)).unwrap_or(PollTimeout::MAX)
            }
            None => PollTimeout::NONE,
        }
    }

    /// What an awaited worker has logged comes before what it reports or how it ends.
    fn read_startup_log(&mut self, pid: process::Pid) {
        let first_words = &mut self.first_words;
        self.workers
            .read_startup_log(pid, |slot, line| first_words.push(pid, slot, line));
    }

    /// Passes what a worker has reported to the policy, and queues the actions that follow.
    pub(super) fn queue_reports(&mut self, pid: process::Pid) {
        self.read_startup_log(pid);
        for report in self.workers.read_reports(pid) {
            let event = match report {
                Report::Ready => Event::Ready { pid },
                Report::Retiring => Event::Retiring { pid },
                Report::MaxCallsReached(calls) => Event::Worn { pid, calls },
                Report::AllThreadsStuck(threads) => match self.diagnose_threads(pid, threads) {
                    Some(event) => event,
                    None => continue,
                },
                Report::Uneven => {
                    self.spread.look_soon(now());
                    continue;
                }
                Report::LinkWanted(record) => {
                    self.workers.link(pid, record as usize);
                    continue;
                }
            };
            self.queue_actions(event);
            if report == Report::Ready {
                self.workers.link_pools(pid);
                self.retire_without_keeper(pid);
            }
        }
    }

    fn pass_time(&mut self) {
        self.watch_keepers();
        let now = now();
        if self.fleet.next_deadline().is_some_and(|at| at <= now) {
            let beats: Vec<_> = self
                .workers
                .iter()
                .filter_map(|(pid, worker)| {
                    Some(Event::Heartbeat {
                        pid,
                        at: worker.heartbeat()?,
                    })
                })
                .collect();
            let samples = self.fleet.to_sample(now).into_iter().map(|pid| {
                let rss_bytes = process::resident_bytes(pid);
                Event::Memory { pid, rss_bytes }
            });
            for seen in beats.into_iter().chain(samples) {
                self.handle_event(seen);
            }
            let actions = self.fleet.tick(now);
            self.actions.extend(actions);
            self.apply_actions();
        }
        if let Some(interval) = self.notifier.watchdog()
            && now >= self.next_watchdog
        {
            // Without one healthy worker it is the service that hangs, however well we are.
            if self.fleet.ready_count() > 0 {
                self.notifier.tell(&[NotifyState::Watchdog]);
            }
            self.next_watchdog = now + (interval.as_millis() / 2) as Millis;
        }
        self.notifier.retry();
    }

    /// Reports to the policy, and does what it says.
    pub(super) fn handle_event(&mut self, event: Event) {
        self.queue_actions(event);
        self.apply_actions();
    }

    /// Passes an event to the policy and queues the actions that follow.
    pub(super) fn queue_actions(&mut self, event: Event) {
        let actions = self.fleet.handle(event, now());
        self.actions.extend(actions);
    }

    pub(super) fn apply_actions(&mut self) {
        while let Some(action) = self.actions.pop_front() {
            match action {
                Action::Fork { slot, generation } => self.fork(slot, generation),
                Action::Drain {
                    pid,
                    deadline,
                    stop,
                } => {
                    let limit = Duration::from_millis(deadline.saturating_sub(now()));
                    let order = if stop {
                        Order::Stop(limit)
                    } else {
                        Order::Drain(limit)
                    };
                    self.workers.order(pid, order, None);
                }
                Action::Diagnose { pid } => self.diagnose(pid),
                Action::Kill { pid, signal } => {
                    // Only what was not reaped: no pid of anybody else's.
                    if self.workers.get(pid).is_some() && process::is_forked(pid) {
                        self.read_startup_log(pid);
                        self.first_words.ended(pid);
                        process::kill(pid, signal);
                    }
                }
                Action::StartUpDone(outcome) => self.finish_start(outcome),
                Action::ReloadDone(verdict) => self.finish_reload(verdict),
                Action::StopDue => self.stop(Event::Stop),
                Action::Log { level, text } => log::log!(level, "{text}"),
                Action::Exit { code } => self.exit_code = Some(code),
            }
        }
    }

    fn fork(&mut self, slot: Slot, generation: Generation) {
        let of_reload = self.next_context.as_ref();
        let ground = of_reload.filter(|_| generation > self.fleet.generation());
        let ground = ground.or_else(|| self.old_contexts.of(generation));
        let ground = Rc::clone(ground.unwrap_or(&self.serving_context));
        let parent = ForkContext {
            signals: &mut self.signals,
            pid_file: self.pid_file.raw_descriptor(),
            title: self.setup.title,
            program: &self.setup.program,
            worker_main: self.setup.worker_main,
            awaited: self.fleet.awaits(slot, generation),
        };
        let event = match self.workers.fork(slot, generation, &ground, parent) {
            Ok(pid) => Event::Forked {
                slot,
                generation,
                pid,
            },
            Err(error) => Event::ForkFailed {
                slot,
                generation,
                reason: error.to_string(),
            },
        };
        if let Event::Forked { pid, .. } = event
            && self.stopping
        {
            self.workers.order(pid, Order::StopPending, None);
        }
        self.queue_actions(event);
    }

    fn finish_start(&mut self, outcome: std::result::Result<(), String>) {
        self.workers.forget_words();
        let words = self.first_words.take();
        match outcome {
            Ok(()) => {
                let addresses: Vec<&str> = self
                    .serving_context
                    .listeners
                    .iter()
                    .map(|one| one.bound.as_str())
                    .collect();
                log::info!(
                    "ready: {} {}",
                    pluralize(self.fleet.ready_count(), "worker serves", "workers serve"),
                    addresses.join(" and ")
                );
                self.notifier.tell(&[NotifyState::Ready]);
                if let Some(launcher) = self.setup.launcher.take() {
                    launcher.ready();
                }
            }
            Err(reason) => {
                // Where the log goes to standard error, it stands there already.
                let words = match self.serving_context.settings.log.file {
                    Some(_) => words,
                    None => String::new(),
                };
                self.failure = Some(Error::NotReady(reason + &words));
            }
        }
    }

    /// What `systemctl status` shows.
    fn show_status(&mut self) {
        let text = if self.fleet.stops_at().is_some() {
            "about to stop, serving until then".to_owned()
        } else if self.stopping {
            let left = pluralize(
                self.workers.iter().count(),
                "worker is left",
                "workers are left",
            );
            format!("stopping, {left}")
        } else {
            format!(
                "{} of {} ready, generation {}",
                self.fleet.ready_count(),
                pluralize(self.fleet.target_count(), "worker", "workers"),
                self.fleet.generation()
            )
        };
        if text != self.shown_status {
            self.notifier.tell(&[NotifyState::Status(&text)]);
            self.shown_status = text;
        }
    }

    pub(super) fn finish(mut self) -> Result<()> {
        self.workers.end_keepers();
        for listener in &self.serving_context.listeners {
            listener.remove_path();
        }
        self.control.remove();
        self.pid_file.remove();
        // Only now, when nothing is left: its next try may begin at once.
        if let (Some(error), Some(launcher)) = (&self.failure, self.setup.launcher.take()) {
            launcher.failed(error.exit_code(), &error.to_string());
        }
        log::info!("left");
        match (self.exit_code, self.failure) {
            // A start that was stopped by order has not failed.
            (None | Some(0), _) => Ok(()),
            (Some(_), Some(error)) => Err(error),
            (Some(code), None) => Err(Error::Bug(format!("the master left with code {code}"))),
        }
    }
}

/// What poll(2) has found.
struct Ready {
    links: Vec<process::Pid>,
    clients: Vec<ClientId>,
    control: bool,
    probe: bool,
}

/// The clock of all deadlines: CLOCK_MONOTONIC, which the workers' heartbeats are written in too.
pub(super) fn now() -> Millis {
    process::monotonic().as_millis() as Millis
}
