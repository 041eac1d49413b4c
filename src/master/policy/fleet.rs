//! The master's policy: one event in, the actions that follow out.
//!
//! [`Fleet`] owns the child table and knows the phase: starting up, serving, stopping. Here are its
//! door and scaling; a worker's life, reloads, leaving and the passing of time are in the files beside
//! it. It leaves every system call, the clock and the configuration to its caller. A child's
//! odd report is a warning; only a report about an order that was never given is a panic.

use log::Level;

use super::death_log::Deaths;
use super::event::{Action, Event, MAX_COUNT, Millis, PolicyLimits, StopMode};
use super::slots::{ChildRecord, SlotEntry, SlotId, SlotState, SlotTable, slot_id};
use crate::link::ids::{Generation, Pid, Slot};
use crate::protocol::control::MOST_DRAINING_GENERATIONS;
use crate::throttle::limiter::{Limiter, with_suppressed_count};

/// Troubles with workers: at most 18 lines in the first minute, 10 in each after that.
const TROUBLES: (u64, Millis) = (8, 6_000);
/// Refused forks come slot by slot and second by second; one line says it all.
const REFUSALS: (u64, Millis) = (1, 5_000);

/// Where the master itself is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ServerPhase {
    /// Not every worker has been ready yet.
    StartUp,
    Serving,
    /// No fork any more; leave when the last child is gone.
    Stopping {
        /// How the workers leave: [`StopMode::Stop`] or [`StopMode::AtOnce`].
        leave: StopMode,
        /// The exit code then.
        code: u8,
        since: Millis,
    },
    /// [`Action::Exit`] was given.
    Gone,
}

/// A wish for another count that came when it could not be met: so many, then this difference.
type Deferred = (Option<usize>, i64);

/// What the fleet knows of recycling, beside each worker's own.
#[derive(Debug)]
pub(crate) struct Recycling {
    pub(crate) next_sample: Millis,
    pub(crate) lines: Limiter,
}

impl Recycling {
    /// Nothing yet.
    pub fn new() -> Self {
        Recycling {
            next_sample: 0,
            lines: Limiter::new(RECYCLE_LINES.0, RECYCLE_LINES.1),
        }
    }
}

/// Lines about recycling: so many at once, then one a period.
const RECYCLE_LINES: (u64, Millis) = (20, 1_000);

/// A reload whose verdict is open.
#[derive(Debug)]
pub(crate) struct PendingReload {
    pub generation: Generation,
    /// Its limits, the count within bounds.
    pub limits: PolicyLimits,
    /// Whether the canary was ready, so that all slots are open.
    pub canary_ready: bool,
}

/// All workers, and what to do about them.
#[derive(Debug)]
pub struct Fleet {
    pub(crate) phase: ServerPhase,
    pub(crate) serving: Generation,
    pub(crate) limits: PolicyLimits,
    /// How many workers it shall have; differs from `limits.count` after a scale.
    pub(crate) count: usize,
    /// The generation after it, while its verdict is open. `Some` only while serving.
    pub(crate) reload: Option<PendingReload>,
    /// The last generation's number given out.
    pub(crate) last_generation: Generation,
    pub(crate) table: SlotTable,
    pub(crate) deaths: Deaths,
    pub(crate) troubles: Limiter,
    pub(crate) refusals: Limiter,
    pub(crate) recycling: Recycling,
    /// When to begin to stop; until then all goes on, but for reloads.
    pub(crate) stop_at: Option<Millis>,
    /// Scales that came during start-up or a reload.
    deferred: Option<Deferred>,
    /// When the caller was to come back at the latest.
    pub(crate) next_tick_at: Option<Millis>,
    /// The time of the call being answered; never goes back.
    pub(crate) now: Millis,
    /// The answer being made; empty between calls.
    actions: Vec<Action>,
}

impl Fleet {
    /// A fleet whose workers are all still to be forked: the actions say so.
    pub fn new(limits: PolicyLimits, now: Millis) -> (Self, Vec<Action>) {
        let mut fleet = Fleet::empty(limits, now);
        let count = fleet.count;
        fleet.add_slots(Generation::FIRST, 0, count);
        fleet.add_pools(Generation::FIRST, limits.pools);
        let actions = fleet.finish_event();
        (fleet, actions)
    }

    /// One without a slot.
    pub(crate) fn empty(limits: PolicyLimits, now: Millis) -> Self {
        let count = limits.count.clamp(1, MAX_COUNT);
        Fleet {
            phase: ServerPhase::StartUp,
            serving: Generation::FIRST,
            limits,
            count,
            reload: None,
            last_generation: Generation::FIRST,
            table: SlotTable::default(),
            deaths: Deaths::default(),
            troubles: Limiter::new(TROUBLES.0, TROUBLES.1),
            refusals: Limiter::new(REFUSALS.0, REFUSALS.1),
            recycling: Recycling::new(),
            stop_at: None,
            deferred: None,
            next_tick_at: None,
            now,
            actions: Vec::new(),
        }
    }

    /// Something happened: what now.
    pub fn handle(&mut self, event: Event, now: Millis) -> Vec<Action> {
        self.begin_event(now);
        if self.phase == ServerPhase::Gone {
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
            } => self.fork_failed(slot_id(generation, slot.0), &reason),
            Event::Ready { pid } => self.ready(pid),
            Event::Retiring { pid } => self.retiring(pid),
            Event::Worn { pid, calls } => self.worn(pid, calls),
            Event::Wedged { pid, evidence } => self.wedged(pid, &evidence),
            Event::Evidence { pid, text } => self.evidence(pid, &text),
            Event::Memory { pid, rss_bytes } => self.memory(pid, rss_bytes),
            Event::Heartbeat { pid, at } => self.heartbeat(pid, at),
            Event::Died {
                pid,
                how,
                method,
                rss_bytes,
                at,
            } => self.died(pid, how, method.as_deref(), rss_bytes, at),
            Event::Reload { limits } => self.start_reload(limits),
            Event::Scale { count } => self.scale((Some(count), 0)),
            Event::ScaleBy { by } => self.scale((None, i64::from(by))),
            Event::Stop => self.stop(StopMode::Stop, 0, "the server stops"),
            Event::StopAfter { delay } => self.stop_after(delay),
            Event::StopNow => self.stop(StopMode::AtOnce, 0, "the server stops now"),
        }
        self.finish_event()
    }

    /// Time has passed: what now. To be called when [`Fleet::next_deadline`] is reached, with the
    /// heartbeats fed first; sooner does no harm.
    pub fn tick(&mut self, now: Millis) -> Vec<Action> {
        self.begin_event(now);
        if self.phase == ServerPhase::Gone {
            return Vec::new();
        }
        self.pass_time();
        self.finish_event()
    }

    /// When the next [`Fleet::tick`] is due; `None` when only an event can change anything.
    pub fn next_deadline(&self) -> Option<Millis> {
        self.next_tick_at
    }

    /// Whether [`Event::Reload`] may come now: not during a start-up, a reload or a stop, nor while
    /// four old generations still drain. Ask again after each event.
    pub fn can_reload(&self) -> bool {
        self.phase == ServerPhase::Serving
            && self.reload.is_none()
            && self.stop_at.is_none()
            && !self.drains_too_much()
    }

    /// Whether a reload would wait until an old generation has left.
    pub fn drains_too_much(&self) -> bool {
        self.table.other_generations(self.serving) >= MOST_DRAINING_GENERATIONS
    }

    pub(crate) fn begin_event(&mut self, now: Millis) {
        self.now = self.now.max(now);
        self.forgive_a_pause();
    }

    pub(crate) fn finish_event(&mut self) -> Vec<Action> {
        self.start_due_recycles();
        self.release_pools();
        if let ServerPhase::Stopping { code, .. } = self.phase
            && self.table.is_empty()
        {
            self.phase = ServerPhase::Gone;
            self.act(Action::Exit { code });
        }
        self.next_tick_at = match self.phase {
            ServerPhase::Gone => None,
            _ => self.earliest(),
        };
        std::mem::take(&mut self.actions)
    }

    pub(crate) fn act(&mut self, action: Action) {
        self.actions.push(action);
    }

    pub(crate) fn log(&mut self, level: Level, text: String) {
        self.act(Action::Log { level, text });
    }

    /// A line about a worker that may come again and again.
    pub(crate) fn trouble(&mut self, level: Level, text: String) {
        if let Some(more) = self.troubles.admit(self.now) {
            self.log(level, with_suppressed_count(text, more));
        }
    }

    /// Opens the slots `from..to` of a generation: all are forked at once.
    pub(crate) fn add_slots(&mut self, generation: Generation, from: usize, to: usize) {
        for slot in from..to {
            let slot = u16::try_from(slot).expect("counts are at most MAX_COUNT");
            self.add_slot(generation, Slot(slot));
        }
    }

    /// Opens the places of a generation's pool processes.
    pub(crate) fn add_pools(&mut self, generation: Generation, count: usize) {
        for number in 0..count {
            self.add_slot(generation, Slot::of_pool(number));
        }
    }

    fn add_slot(&mut self, generation: Generation, slot: Slot) {
        if self.table.add_slots(SlotId { generation, slot }, self.now) {
            self.act(Action::Fork { slot, generation });
        }
    }

    /// A child that the table itself named.
    pub(crate) fn child_mut(&mut self, pid: Pid) -> &mut ChildRecord {
        let child = self.table.children.get_mut(&pid);
        child.expect("the table named this child itself")
    }

    /// Meets a wish for another count, or keeps it for when start-up or reload are over.
    fn scale(&mut self, wish: Deferred) {
        if self.phase == ServerPhase::StartUp || self.reload.is_some() {
            let (set, by) = self.deferred.unwrap_or((None, 0));
            self.deferred = Some(match wish {
                (Some(count), _) => (Some(count), 0),
                (None, more) => (set, by.saturating_add(more)),
            });
            let text = "the count of workers changes once the new ones are ready".to_owned();
            return self.log(Level::Info, text);
        }
        if self.phase != ServerPhase::Serving {
            let text = "the count of workers stays as it is: the server stops".to_owned();
            return self.log(Level::Warn, text);
        }
        let (before, most) = (self.count, MAX_COUNT as i64);
        let base = wish.0.unwrap_or(before).clamp(1, MAX_COUNT) as i64;
        self.count = base.saturating_add(wish.1).clamp(1, most) as usize;
        let text = format!("workers: {before} before, {} from now on", self.count);
        self.log(Level::Info, text);
        if self.count > before {
            self.add_slots(self.serving, before, self.count);
        } else {
            self.remove_slots(self.serving, self.count, StopMode::Retire);
        }
    }

    /// Start-up or a reload is over: now the count may change.
    pub(crate) fn scale_as_deferred(&mut self) {
        if let Some(wish) = self.deferred.take() {
            self.scale(wish);
        }
    }

    /// Nobody sits there any more: whoever was to follow does, else fork at once, or when the
    /// throttle allows it.
    pub(crate) fn respawn(&mut self, slot_id: SlotId, due: Millis) {
        let now = self.now;
        let tenure = self.tenure(slot_id);
        tenure.since = now;
        if let Some(next @ (SlotState::Forking | SlotState::Worker(_))) = tenure.successor.take() {
            tenure.state = next;
            return;
        }
        tenure.state = SlotState::due(due, now);
        if due <= now {
            let (slot, generation) = (slot_id.slot, slot_id.generation);
            self.act(Action::Fork { slot, generation });
        }
    }

    /// A slot that is known to be in the table.
    pub(crate) fn tenure(&mut self, slot_id: SlotId) -> &mut SlotEntry {
        let tenure = self.table.slots.get_mut(&slot_id);
        tenure.expect("the caller saw somebody in this slot")
    }
}
