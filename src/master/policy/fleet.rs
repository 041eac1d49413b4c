//! Takes one event and returns the actions that follow from it.
//!
//! [`Fleet`] owns the child table and knows the phase: start-up, serving, stopping. This file has its entry points
//! and scaling. The lifecycle of a child, reloads, shutdown and timeouts are in the files beside it. The caller makes
//! the system calls, reads the clock and knows the configuration. An unexpected report of a child is only logged,
//! because a child is never trusted. The result of a fork that was not ordered is a bug of the master, so it panics.

use std::collections::BTreeSet;

use log::Level;

use super::action::{Action, AfterDeath, Incident, NotReady};
use super::death_log::{Death, Deaths, WorkerExit};
use super::event::{Event, KeptPool, MAX_COUNT, Millis, PolicyLimits, StopMode};
use super::keeper_rules::KeeperRules;
use super::observer_rules::ObserverRules;
use super::slots::{ChildRecord, SlotEntry, SlotId, SlotState, SlotTable, slot_id};
use crate::link::ids::{Generation, Pid, Slot};
use crate::protocol::control::MOST_DRAINING_GENERATIONS;
use crate::throttle::limiter::Limiter;

/// The limit on lines about problems of children: at most 18 in the first minute, then 10 a minute.
const PROBLEM_LINES: (u64, Millis) = (8, 6_000);
/// The limit on log lines about refused forks: every slot tries again each second, and one line is enough for all.
const REFUSALS: (u64, Millis) = (1, 5_000);

/// The limit on log lines about crashed sessions. It is separate, so that they do not suppress lines about workers.
const SESSION_CRASH_LINES: (u64, Millis) = (8, 6_000);

/// The phase of the whole server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ServerPhase {
    /// Not all workers have been ready yet.
    StartUp,
    Serving,
    /// Forks nothing. Exits when the last child has been reaped.
    Stopping {
        /// How the children exit: [`StopMode::Stop`] or [`StopMode::AtOnce`].
        mode: StopMode,
        /// The exit code of the master.
        code: u8,
        since: Millis,
    },
    /// [`Action::Exit`] was given.
    Gone,
}

/// A change of the number of workers that has to wait: set the number if it is `Some`, then add the difference.
type Deferred = (Option<usize>, i64);

/// The state of recycling that all workers share.
#[derive(Debug)]
pub(crate) struct Recycling {
    pub(crate) next_sample: Millis,
    pub(crate) lines: Limiter,
}

impl Recycling {
    pub fn new() -> Self {
        Recycling {
            next_sample: 0,
            lines: Limiter::new(RECYCLE_LINES.0, RECYCLE_LINES.1),
        }
    }
}

/// The limit on lines about recycling: the number of lines at once, then one for each period.
const RECYCLE_LINES: (u64, Millis) = (20, 1_000);

/// A reload that has no result yet.
#[derive(Debug)]
pub(crate) struct PendingReload {
    pub generation: Generation,
    /// Its limits, with the count clamped.
    pub limits: PolicyLimits,
    /// Whether the canary (the first worker of the generation) has been ready. Then all other slots have been added.
    pub canary_ready: bool,
    /// The pool processes that stay.
    pub kept: Vec<PendingPool>,
    /// When the pool processes that stay must be ready.
    pub kept_until: Millis,
}

/// A pool process that stays at a reload that has no result yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PendingPool {
    pub pid: Pid,
    /// Its slot in the next generation.
    pub slot: Slot,
    /// Whether it can serve the next generation.
    pub is_ready: bool,
}

/// The state of all children, and what to do about them.
#[derive(Debug)]
pub struct Fleet {
    pub(crate) phase: ServerPhase,
    pub(crate) serving: Generation,
    pub(crate) limits: PolicyLimits,
    /// The wanted number of workers. Differs from `limits.count` after a scale.
    pub(crate) count: usize,
    /// The generation that a reload starts. `Some` only while serving.
    pub(crate) reload: Option<PendingReload>,
    /// Whether the program before an upgrade has forked the pool processes of the serving generation.
    pub(crate) has_foreign_pools: bool,
    /// The pool processes that may stay at the next reload.
    pub(crate) may_stay: Vec<KeptPool>,
    /// The highest generation number that was used.
    pub(crate) last_generation: Generation,
    pub(crate) table: SlotTable,
    pub(crate) deaths: Deaths,
    /// The ends of workers that the metrics do not count yet.
    pub(crate) worker_exits: Vec<WorkerExit>,
    pub(crate) problem_lines: Limiter,
    pub(crate) refusals: Limiter,
    session_crash_lines: Limiter,
    pub(crate) recycling: Recycling,
    pub(crate) keepers: KeeperRules,
    pub(crate) observer: ObserverRules,
    /// When the stop begins. Until then everything except reloads continues.
    pub(crate) stop_at: Option<Millis>,
    /// When the stop under way kills the remaining children.
    pub(crate) stop_until: Option<Millis>,
    /// Scale requests that came during start-up or a reload.
    pub(super) deferred: Option<Deferred>,
    /// When the caller must call [`Fleet::tick`] at the latest.
    pub(crate) next_tick_at: Option<Millis>,
    /// The time of the current event. Never goes back.
    pub(crate) now: Millis,
    /// The actions of the current event. Empty between events.
    actions: Vec<Action>,
}

impl Fleet {
    /// Starts the first generation. The actions fork its children.
    pub fn new(limits: PolicyLimits, now: Millis) -> (Self, Vec<Action>) {
        let mut fleet = Fleet::empty(limits, now);
        let count = fleet.count;
        fleet.add_slots(Generation::FIRST, 0, count);
        for slot in limits.other_slots() {
            fleet.add_slot(Generation::FIRST, slot);
        }
        if limits.has_observer {
            fleet.renew_observer();
        }
        let actions = fleet.finish_event();
        (fleet, actions)
    }

    /// Makes a fleet without slots.
    pub(crate) fn empty(limits: PolicyLimits, now: Millis) -> Self {
        let count = limits.count.clamp(1, MAX_COUNT);
        Fleet {
            phase: ServerPhase::StartUp,
            serving: Generation::FIRST,
            limits,
            count,
            reload: None,
            has_foreign_pools: false,
            may_stay: Vec::new(),
            last_generation: Generation::FIRST,
            table: SlotTable::default(),
            deaths: Deaths::default(),
            worker_exits: Vec::new(),
            problem_lines: Limiter::new(PROBLEM_LINES.0, PROBLEM_LINES.1),
            refusals: Limiter::new(REFUSALS.0, REFUSALS.1),
            session_crash_lines: Limiter::new(SESSION_CRASH_LINES.0, SESSION_CRASH_LINES.1),
            recycling: Recycling::new(),
            keepers: KeeperRules::new(),
            observer: ObserverRules::new(),
            stop_at: None,
            stop_until: None,
            deferred: None,
            next_tick_at: None,
            now,
            actions: Vec::new(),
        }
    }

    /// Handles an event, and returns the actions that follow.
    pub fn handle(&mut self, event: Event, now: Millis) -> Vec<Action> {
        self.begin_event(now);
        if self.phase == ServerPhase::Gone {
            self.shorten_stop(&event);
            return Vec::new();
        }
        match event {
            Event::Forked {
                slot,
                generation,
                pid,
            } => self.forked(slot_id(generation, slot.0), pid),
            Event::ForkFailed {
                slot,
                generation,
                reason,
            } => self.fork_failed(slot_id(generation, slot.0), reason),
            Event::Ready { pid } => self.ready(pid),
            Event::Retiring { pid } => self.retiring(pid),
            Event::MaxCallsReached { pid, calls } => self.max_calls_reached(pid, calls),
            Event::AllThreadsStuck { pid, evidence } => self.all_threads_stuck(pid, &evidence),
            Event::Diagnosed { pid, text } => self.diagnosed(pid, &text),
            Event::Memory { pid, rss_bytes } => self.memory(pid, rss_bytes),
            Event::Heartbeat { pid, at } => self.heartbeat(pid, at),
            Event::Died {
                pid,
                name,
                how,
                last,
                rss_bytes,
                at,
            } => self.died(pid, name, how, last, rss_bytes, at),
            Event::KeepPools { pools } => self.may_stay = pools,
            Event::PoolUpdated {
                pid,
                generation,
                outcome,
            } => self.pool_updated(pid, generation, outcome),
            Event::KeeperLost { pid } => {
                if let Some(child) = self.table.children.get_mut(&pid) {
                    let actions = self.keepers.lost(pid, child, self.now);
                    self.actions.extend(actions);
                }
            }
            Event::KeeperProgress {
                keeper,
                worker,
                done,
            } => {
                // Twice the heartbeat timeout: the keeper may wait for a stuck worker, if only that worker takes
                // connections from the adoption queue.
                let limit = self.limits.heartbeat_timeout.saturating_mul(2);
                let keeper = (keeper, worker);
                self.keepers.progress(keeper, done, limit, self.now);
            }
            Event::KeeperEnded { keeper } => self.keepers.ended(keeper),
            Event::ObserverForked { pid } => {
                let actions = self.observer.forked(pid, self.now);
                self.actions.extend(actions);
            }
            Event::ObserverForkFailed { reason } => {
                let actions = self.observer.fork_failed(reason, self.now);
                self.actions.extend(actions);
            }
            Event::ObserverDied { pid, how } => {
                let actions = self.observer.died(pid, how, self.now);
                self.actions.extend(actions);
            }
            Event::ObserverStopped { pid, is_stopped } => {
                self.observer.note_stopped(pid, is_stopped, self.now);
            }
            Event::Reload { limits } => self.start_reload(limits),
            Event::Scale { count } => self.scale((Some(count), 0)),
            Event::ScaleBy { by } => self.scale((None, i64::from(by))),
            Event::Stop => self.stop(StopMode::Stop, 0, NotReady::Stopped(StopMode::Stop)),
            Event::StopAfter { delay } => self.stop_after(delay),
            Event::StopNow => self.stop(StopMode::AtOnce, 0, NotReady::Stopped(StopMode::AtOnce)),
        }
        self.finish_event()
    }

    /// Keeps the death record of a program. The pool process, and not the policy, decides when the next program is
    /// started.
    pub fn keep_death_of_program(&mut self, death: Death) {
        self.deaths.keep(death);
    }

    /// Records which generations have sessions without an acceptor. The pool processes of these generations must
    /// stay.
    pub fn note_sessions(&mut self, of: BTreeSet<Generation>, now: Millis) -> Vec<Action> {
        if of == self.table.session_generations {
            return Vec::new();
        }
        self.begin_event(now);
        self.table.session_generations = of;
        self.finish_event()
    }

    /// Handles the crash of a session. No process replaces it.
    pub fn session_died(&mut self, death: Death, now: Millis) -> Vec<Action> {
        self.begin_event(now);
        if let Some(suppressed) = self.session_crash_lines.admit(self.now) {
            let incident = Incident::Died(Box::new(death.clone()), AfterDeath::ConnectionLost);
            self.log_after(Level::Warn, incident, suppressed);
        }
        self.deaths.keep(death);
        self.finish_event()
    }

    /// Handles what is due at `now`. Call it when [`Fleet::next_deadline`] is reached, after the heartbeats
    /// were reported. Calling it earlier does no harm.
    pub fn tick(&mut self, now: Millis) -> Vec<Action> {
        self.begin_event(now);
        if self.phase == ServerPhase::Gone {
            return Vec::new();
        }
        self.pass_time();
        self.finish_event()
    }

    /// Returns when [`Fleet::tick`] is due; `None` if only an event can change anything.
    pub fn next_deadline(&self) -> Option<Millis> {
        self.next_tick_at
    }

    /// Returns whether [`Event::Reload`] may come now: not during a start-up, a reload or a stop, and not
    /// while four old generations still drain.
    pub fn can_reload(&self) -> bool {
        self.phase == ServerPhase::Serving
            && self.reload.is_none()
            && self.stop_at.is_none()
            && !self.drains_too_much()
    }

    /// Returns whether a reload has to wait until an old generation has exited.
    pub fn drains_too_much(&self) -> bool {
        self.table.other_generations(self.serving) >= MOST_DRAINING_GENERATIONS
    }

    pub(crate) fn begin_event(&mut self, now: Millis) {
        self.now = self.now.max(now);
        self.extend_deadlines_after_pause();
    }

    pub(crate) fn finish_event(&mut self) -> Vec<Action> {
        self.start_due_recycles();
        self.release_pools();
        if let ServerPhase::Stopping { code, mode, .. } = self.phase {
            // The observer shows the stop until the last worker has exited.
            if mode == StopMode::AtOnce || self.table.is_empty() {
                let actions = self.observer.stop(self.now);
                self.actions.extend(actions);
            }
            if self.table.is_empty() && self.observer.pids().next().is_none() {
                self.phase = ServerPhase::Gone;
                self.act(Action::Exit { code });
            }
        }
        self.next_tick_at = match self.phase {
            ServerPhase::Gone => None,
            _ => self.earliest(),
        };
        std::mem::take(&mut self.actions)
    }

    /// Starts an observer for the serving generation, if its configuration has one, and ends the observer before it.
    pub(crate) fn renew_observer(&mut self) {
        let actions = self.observer.renew(&self.limits, self.now);
        self.actions.extend(actions);
    }

    pub(crate) fn act(&mut self, action: Action) {
        self.actions.push(action);
    }

    pub(crate) fn log(&mut self, level: Level, incident: Incident) {
        self.log_after(level, incident, 0);
    }

    /// Logs an incident, and how many similar ones were suppressed before it.
    pub(crate) fn log_after(&mut self, level: Level, incident: Incident, suppressed: u32) {
        self.act(Action::Log {
            level,
            incident,
            suppressed,
        });
    }

    /// Logs an incident that may occur often, at a limited rate.
    pub(crate) fn log_limited(&mut self, level: Level, incident: Incident) {
        if let Some(suppressed) = self.problem_lines.admit(self.now) {
            self.log_after(level, incident, suppressed);
        }
    }

    /// Adds the slots `from..to` of a generation, and forks their workers.
    pub(crate) fn add_slots(&mut self, generation: Generation, from: usize, to: usize) {
        for slot in from..to {
            let slot = u16::try_from(slot).expect("counts are at most MAX_COUNT");
            self.add_slot(generation, Slot(slot));
        }
    }

    pub(crate) fn add_slot(&mut self, generation: Generation, slot: Slot) {
        if self.table.add_slot(SlotId { generation, slot }, self.now) {
            self.act(Action::Fork { slot, generation });
        }
    }

    /// Returns a child that is known to be in the table.
    pub(crate) fn child_mut(&mut self, pid: Pid) -> &mut ChildRecord {
        let child = self.table.children.get_mut(&pid);
        child.expect("the caller has found this child in the table")
    }

    /// Changes the number of workers. During a start-up or reload the change is kept until that is over.
    fn scale(&mut self, change: Deferred) {
        if self.phase == ServerPhase::StartUp || self.reload.is_some() {
            let (set, by) = self.deferred.unwrap_or((None, 0));
            self.deferred = Some(match change {
                (Some(count), _) => (Some(count), 0),
                (None, more) => (set, by.saturating_add(more)),
            });
            return self.log(Level::Info, Incident::ScaleDeferred);
        }
        if self.phase != ServerPhase::Serving {
            return self.log(Level::Warn, Incident::ScaleRefused);
        }
        let (before, most) = (self.count, MAX_COUNT as i64);
        let base = change.0.unwrap_or(before).clamp(1, MAX_COUNT) as i64;
        self.count = base.saturating_add(change.1).clamp(1, most) as usize;
        self.log(Level::Info, Incident::Scaled(before, self.count));
        if self.count > before {
            self.add_slots(self.serving, before, self.count);
        } else {
            self.remove_slots(self.serving, self.count, StopMode::Retire);
        }
    }

    /// Carries out the scale requests that had to wait.
    pub(crate) fn scale_as_deferred(&mut self) {
        if let Some(change) = self.deferred.take() {
            self.scale(change);
        }
    }

    /// Fills a slot that has become empty: with its successor if that runs, or else with a fork when the throttle
    /// allows it.
    pub(crate) fn respawn(&mut self, slot_id: SlotId, due: Millis) {
        let now = self.now;
        let entry = self.entry(slot_id);
        entry.since = now;
        if let Some(next @ (SlotState::Forking | SlotState::Worker(_))) = entry.successor.take() {
            entry.state = next;
            return;
        }
        entry.state = SlotState::due(due, now);
        if due <= now {
            let (slot, generation) = (slot_id.slot, slot_id.generation);
            self.act(Action::Fork { slot, generation });
        }
    }

    /// Returns a slot that is known to be in the table.
    pub(crate) fn entry(&mut self, slot_id: SlotId) -> &mut SlotEntry {
        let entry = self.table.slots.get_mut(&slot_id);
        entry.expect("the caller has found this slot in the table")
    }
}
