//! Holds the state of the master, and carries out the actions of the policy.
//!
//! It makes no decisions, and calls no code of a higher layer. If an action concerns more than the children,
//! `apply_actions` returns an [`ActionOutcome`], which the caller handles before the next action.

use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use super::children::diagnosis;
use super::children::generation_info::{Contexts, GenerationContext};
use super::children::joining;
use super::children::orphans::Orphans;
use super::children::workers::{Children, ForkContext};
use super::endpoints::Endpoints;
use super::endpoints::control_socket::ClientId;
use super::incident_text::{log_line, reload_result, start_result};
use super::policy::action::Action;
use super::policy::crash_counts::CrashCounts;
use super::policy::event::{Event, Millis, PoolStep};
use super::policy::executor_causes::ExecutorEnds;
use super::policy::fleet::Fleet;
use super::policy::rebalancer::Rebalancer;
use super::policy::reload_history::ReloadHistory;
use super::policy::reload_queue::ReloadQueue;
use super::setup::Setup;
use super::upgrade::stage::Upgrade;
use crate::error::Error;
use crate::link::ids::{Generation, Slot};
use crate::link::message::Order;
use crate::logging::{HumanDuration, LogOutput};
use crate::protocol::control::ControlResponse;
use crate::sys::memory;
use crate::sys::process::{self, Pid};
use crate::sys::shared_memory;
use crate::sys::signal::fork_child;
use crate::worker_init::{JobsInstance, ObserverInit};

pub(super) struct Master<'a> {
    pub(super) setup: Setup<'a>,
    pub(super) fleet: Fleet,
    pub(super) actions: VecDeque<Action>,
    pub(super) workers: Children,
    pub(super) orphans: Orphans,
    pub(super) crash_counts: CrashCounts,
    pub(super) executor_ends: ExecutorEnds,
    pub(super) rebalancer: Rebalancer,
    pub(super) contexts: Contexts,
    pub(super) endpoints: Endpoints,
    pub(super) reloads: ReloadQueue<ClientId>,
    pub(super) reload_history: ReloadHistory,
    /// The log output before the reload under way.
    pub(super) previous_log: Option<LogOutput>,
    pub(super) upgrade: Upgrade,
    pub(super) started: Millis,
    /// Whether a stop was ordered, now or for later.
    pub(super) stopping: bool,
    pub(super) failure: Option<Error>,
    pub(super) exit_code: Option<u8>,
    /// Whether more children may have ended than the last round has reaped.
    pub(super) reap_again: bool,
    /// When removed log files are looked for next.
    pub(super) next_log_look: Millis,
}

/// The result of an action that the caller must handle, because it concerns more than the children.
pub(super) enum ActionOutcome {
    Started(Result<(), String>),
    Reloaded(Result<Generation, String>),
    StopDue,
}

impl<'a> Master<'a> {
    /// Makes a master with children that serve `context`, and without a reload or an upgrade.
    pub(super) fn new(
        setup: Setup<'a>,
        (fleet, actions): (Fleet, Vec<Action>),
        (workers, orphans): (Children, Orphans),
        (context, jobs): (GenerationContext, Option<JobsInstance>),
        endpoints: Endpoints,
    ) -> Self {
        Master {
            setup,
            fleet,
            actions: actions.into(),
            workers,
            orphans,
            crash_counts: CrashCounts::new(memory::oom_kill_count()),
            executor_ends: ExecutorEnds::default(),
            rebalancer: Rebalancer::default(),
            contexts: Contexts::new(context, jobs),
            endpoints,
            reloads: ReloadQueue::new(false, Vec::new()),
            reload_history: ReloadHistory::default(),
            previous_log: None,
            upgrade: Upgrade::default(),
            started: now(),
            stopping: false,
            failure: None,
            exit_code: None,
            reap_again: false,
            next_log_look: 0,
        }
    }

    /// Passes an event to the policy and queues the actions that follow.
    pub(super) fn queue_actions(&mut self, event: Event) {
        let actions = self.fleet.handle(event, now());
        self.actions.extend(actions);
    }

    /// Carries out the queued actions up to the next outcome, and returns that.
    pub(super) fn apply_actions(&mut self) -> Option<ActionOutcome> {
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
                Action::EndClaims { pid } => self.workers.order(pid, Order::EndClaims, None),
                Action::Pool { pid, step, at } => self.update_pool(pid, step, at),
                Action::Diagnose { pid } => {
                    if let Some(worker) = self.workers.get(pid) {
                        let text = diagnosis::event_loop(pid, worker, now());
                        self.queue_actions(Event::Diagnosed { pid, text });
                    }
                }
                Action::Kill { pid, signal } => {
                    self.workers.read_startup_log(pid);
                    if let Some(worker) = self.workers.get(pid) {
                        worker.kill(signal);
                        self.workers.startup_log.ended(pid);
                    }
                }
                Action::KillKeeper { pid } => self.workers.keepers.kill(pid),
                Action::ForkObserver => self.fork_observer(),
                Action::SignalObserver { pid, signal } => {
                    if self.workers.observers.contains(&pid) {
                        process::kill(pid, signal);
                    }
                }
                Action::StartUpDone(result) => {
                    return Some(ActionOutcome::Started(start_result(result)));
                }
                Action::ReloadDone { generation, result } => {
                    return Some(ActionOutcome::Reloaded(reload_result(generation, result)));
                }
                Action::StopDue => return Some(ActionOutcome::StopDue),
                Action::Log {
                    level,
                    incident,
                    suppressed,
                } => log::log!(level, "{}", log_line(&incident, suppressed)),
                Action::Exit { code } => self.exit_code = Some(code),
            }
        }
        None
    }

    fn fork(&mut self, slot: Slot, generation: Generation) {
        let context = Rc::clone(self.contexts.of(generation, self.fleet.generation()));
        let oldest = self.fleet.oldest_served(slot, generation);
        let parent = ForkContext {
            signals: &mut self.endpoints.signals,
            pid_file: self.endpoints.pid_file.raw_descriptor(),
            title: self.setup.title,
            program: &self.setup.program,
            worker_main: self.setup.worker_main,
            awaited: self.fleet.awaits(slot, generation),
            oldest: (oldest, &self.contexts.old),
            jobs: self.contexts.jobs.as_ref(),
        };
        let event = match self.workers.fork(slot, generation, &context, parent) {
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

    /// Forks the observer of the generation that serves, and reports it to the policy.
    fn fork_observer(&mut self) {
        let event = match self.try_fork_observer() {
            Ok(pid) => {
                self.workers.observers.insert(pid);
                Event::ObserverForked { pid }
            }
            Err(error) => Event::ObserverForkFailed {
                reason: error.to_string(),
            },
        };
        self.queue_actions(event);
    }

    fn try_fork_observer(&mut self) -> io::Result<Pid> {
        let context = &self.contexts.serving;
        let listener = context.observe.first().ok_or(io::ErrorKind::NotFound)?;
        let init = ObserverInit {
            settings: Rc::clone(&context.settings),
            listener: Rc::clone(&listener.fd),
            link: self.endpoints.control.connect_observer()?,
            // Without the board, the observer shows only what the master sends.
            board: shared_memory::read_only(self.workers.metrics.file()).ok(),
            master_signals: &mut self.endpoints.signals,
            pid_file: self.endpoints.pid_file.raw_descriptor(),
            title: self.setup.title,
            program: self.setup.program.clone(),
            master: Pid::current(),
        };
        fork_child(init, self.setup.observer_main)
    }

    /// Carries out a step of a reload with a pool process that stays. `at` is its slot in the new
    /// generation.
    fn update_pool(&mut self, pid: Pid, step: PoolStep, at: (Slot, Generation)) {
        let workers = &mut self.workers;
        let generation = at.1;
        match (step, &self.contexts.next) {
            (PoolStep::Update, Some(context)) => {
                if let Err(reason) = joining::update_pool(workers, pid, at, context) {
                    let reason = format!(
                        "could not send the new configuration to the pool process: {reason}"
                    );
                    self.queue_actions(Event::PoolUpdated {
                        pid,
                        generation,
                        outcome: Err(reason),
                    });
                }
            }
            (PoolStep::Move, Some(context)) => joining::move_pool(workers, pid, at, context),
            (PoolStep::Revert, _) => joining::send_update_result(workers, pid, generation, false),
            (PoolStep::Update | PoolStep::Move, None) => {}
        }
    }

    pub(super) fn answer(&mut self, client: ClientId, response: &ControlResponse) {
        self.endpoints.control.answer(client, response, now());
    }

    /// Returns why a server that stops, or soon will, refuses a reload or an upgrade.
    pub(super) fn stop_notice(&self) -> String {
        match self.fleet.stops_at() {
            Some(at) => format!(
                "the server stops in {} and serves until then",
                HumanDuration(at.saturating_sub(now()))
            ),
            None => "the server stops".into(),
        }
    }

    /// Returns the configuration file and the program of the new generation, for the result of a reload.
    pub(super) fn sources(&self) -> String {
        let config = match &self.contexts.serving.settings.file {
            Some(file) => format!("configuration {}", file.display()),
            None => "no configuration file".into(),
        };
        format!("{config}, binary {}", self.setup.origin.path.display())
    }
}

/// Returns the time of CLOCK_MONOTONIC, which is also the clock of the heartbeats.
pub(super) fn now() -> Millis {
    process::monotonic().as_millis() as Millis
}
