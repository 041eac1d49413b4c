//! The child table: which worker is where, and in which stage of its life.
//!
//! A *slot* is a slot as one generation has it. A slot's holder is the worker that starts or serves
//! there; a draining worker holds none any more, so a slot can have one worker and any number that
//! drain. The table answers questions and keeps its own invariants; what to do is decided by
//! [`super::fleet`]. What a child says never breaks it; a pid forked twice does, and is a panic.

use std::collections::{BTreeMap, BTreeSet};

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::event::{Millis, PolicyLimits};
use crate::link::ids::{Generation, Pid, Slot};
use crate::throttle::Throttle;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SlotId {
    pub generation: Generation,
    pub slot: Slot,
}

impl SlotId {
    /// Whether it is the place of a pool process, and not of a worker.
    pub fn is_pool(self) -> bool {
        self.slot.pool().is_some()
    }
}

/// Who sits there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SlotState {
    /// Nobody: throttled until then.
    Throttled {
        /// When to fork.
        until: Millis,
    },
    /// Nobody yet: a fork was ordered and not yet reported.
    Forking,
    /// This worker, which is in the table, and starting or ready.
    Worker(Pid),
}

impl SlotState {
    /// Nobody yet: what follows when a fork is due then.
    pub fn due(at: Millis, now: Millis) -> Self {
        match at > now {
            true => SlotState::Throttled { until: at },
            false => SlotState::Forking,
        }
    }
}

/// What a worker has been through.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RecycleState {
    /// It is to be replaced.
    #[serde(rename = "wish")]
    pub(crate) request: Option<RecycleRequest>,
    /// Its memory was above the limit when last seen.
    pub(crate) above: bool,
    /// Its successor has taken over; `Some` wish, and it drains.
    pub(crate) replaced: bool,
    /// What it was stuck in, if it was.
    pub(crate) evidence: Option<String>,
}

/// Why a worker is to be replaced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecycleRequest {
    pub(crate) reason: String,
    pub(crate) since: Millis,
    /// It can't wait for others.
    pub(crate) urgent: bool,
}

/// What the master knows of a slot.
#[derive(Debug)]
pub(crate) struct SlotEntry {
    /// Who sits there.
    pub state: SlotState,
    /// Who is to follow the holder once it is ready; `Some` only beside [`SlotState::Worker`], so that
    /// a slot has one fork under way at most.
    pub successor: Option<SlotState>,
    /// False for a slot given up while its fork was under way: what comes of it is drained.
    pub is_active: bool,
    /// How soon it may be forked again.
    pub throttle: Throttle,
    /// When it last changed who sits there, or is to.
    pub since: Millis,
}

impl SlotEntry {
    /// When a throttled fork of it is due.
    pub fn fork_at(&self) -> Option<Millis> {
        match self.successor.unwrap_or(self.state) {
            SlotState::Throttled { until } => Some(until),
            SlotState::Forking | SlotState::Worker(_) => None,
        }
    }
}

/// Where a child is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WorkerStage {
    /// Forked, not yet ready.
    Starting,
    /// Serves.
    Ready,
    /// Its end was asked for. It holds no slot.
    Draining {
        /// When it must be done.
        deadline: Millis,
    },
}

#[derive(Debug)]
pub(crate) struct ChildRecord {
    /// Its slot, also once it drains and somebody else sits there.
    pub slot_id: SlotId,
    pub limits: PolicyLimits,
    pub forked_at: Millis,
    pub ready_at: Option<Millis>,
    /// Where it is in its life.
    pub stage: WorkerStage,
    pub stage_since: Millis,
    /// The last sign of its event loop, or a later moment from which to count.
    pub heartbeat: Millis,
    /// The next signal that it gets if nothing changes, and when.
    pub next_signal: Option<(Millis, Signal)>,
    /// It got KILL.
    pub is_sigkill_sent: bool,
    /// `Some` iff the master has begun to end it by force: why.
    pub kill_reason: Option<String>,
    /// What it has been through.
    pub recycle: RecycleState,
}

impl ChildRecord {
    /// For how long it has been ready; `None` if it never was.
    pub fn ready_for(&self, now: Millis) -> Option<Millis> {
        self.ready_at.map(|at| now - at)
    }

    /// Whether its end was asked for.
    pub fn drains(&self) -> bool {
        matches!(self.stage, WorkerStage::Draining { .. })
    }

    /// Whether it is ready, and not being ended.
    pub fn serves(&self) -> bool {
        self.stage == WorkerStage::Ready && self.kill_reason.is_none()
    }

    /// Whether it was killed and does not end: the kernel holds it.
    pub fn is_unkillable(&self) -> bool {
        self.is_sigkill_sent && self.next_signal.is_none()
    }

    /// When its event loop counts as stuck, one that drains no less than one that serves.
    pub fn heartbeat_deadline(&self) -> Option<Millis> {
        let timeout = self.limits.heartbeat_timeout;
        let is_watched = self.ready_at.is_some() && self.kill_reason.is_none() && timeout > 0;
        is_watched.then(|| self.heartbeat + timeout)
    }

    pub fn due_at(&self) -> Option<Millis> {
        let next = self.next_signal.map(|(at, _)| at);
        next.into_iter().chain(self.heartbeat_deadline()).min()
    }
}

/// All slots and children.
#[derive(Debug, Default)]
pub(crate) struct SlotTable {
    /// The slots of the generation that serves and, during a reload, of the next one; and those
    /// given up whose fork has not been reported yet.
    pub slots: BTreeMap<SlotId, SlotEntry>,
    /// Every child not yet reaped.
    pub children: BTreeMap<Pid, ChildRecord>,
}

impl SlotTable {
    /// Opens a slot for forking. False if its fork is under way already.
    pub fn add_slots(&mut self, slot_id: SlotId, now: Millis) -> bool {
        if let Some(tenure) = self.slots.get_mut(&slot_id) {
            assert!(!tenure.is_active, "{slot_id:?} is opened twice");
            tenure.is_active = true;
            return false;
        }
        let tenure = SlotEntry {
            state: SlotState::Forking,
            successor: None,
            is_active: true,
            throttle: Throttle::default(),
            since: now,
        };
        self.slots.insert(slot_id, tenure);
        true
    }

    /// Gives a slot up, and says which workers sat there or were to: two at most.
    pub fn remove_slots(&mut self, slot_id: SlotId) -> Vec<Pid> {
        let Some(tenure) = self.slots.get_mut(&slot_id) else {
            return Vec::new();
        };
        let all = [Some(tenure.state), tenure.successor.take()];
        if all.contains(&Some(SlotState::Forking)) {
            // The fork's report must find it.
            tenure.state = SlotState::Forking;
            tenure.is_active = false;
        } else {
            self.slots.remove(&slot_id);
        }
        let workers = all.into_iter().flatten();
        workers
            .filter_map(|holder| match holder {
                SlotState::Worker(pid) => Some(pid),
                SlotState::Forking | SlotState::Throttled { .. } => None,
            })
            .collect()
    }

    /// Puts a new child into the table.
    pub fn insert(&mut self, pid: Pid, child: ChildRecord) {
        let before = self.children.insert(pid, child);
        assert!(
            before.is_none(),
            "pid {pid} was forked twice and never reaped"
        );
    }

    /// The wanted slots of a generation, lowest slot first.
    pub fn slots_of(&self, generation: Generation) -> Vec<SlotId> {
        let all = slot_id(generation, 0)..=slot_id(generation, u16::MAX);
        self.slots
            .range(all)
            .filter(|(_, tenure)| tenure.is_active)
            .map(|(slot_id, _)| *slot_id)
            .collect()
    }

    /// Whether the worker sits there (and not, draining, beside its successor).
    pub fn holds(&self, pid: Pid, slot_id: SlotId) -> bool {
        self.slots
            .get(&slot_id)
            .is_some_and(|tenure| tenure.state == SlotState::Worker(pid))
    }

    /// Whether the worker is to follow the one that sits there.
    pub fn is_coming(&self, pid: Pid, slot_id: SlotId) -> bool {
        self.slots
            .get(&slot_id)
            .is_some_and(|tenure| tenure.successor == Some(SlotState::Worker(pid)))
    }

    /// Whether the worker sits there, or is to follow the one that does.
    pub fn holds_any(&self, pid: Pid, slot_id: SlotId) -> bool {
        self.holds(pid, slot_id) || self.is_coming(pid, slot_id)
    }

    /// Whether each of a generation's slots has a worker that is ready.
    pub fn all_ready(&self, generation: Generation) -> bool {
        self.slots_of(generation).iter().all(|slot_id| {
            let SlotState::Worker(pid) = self.slots[slot_id].state else {
                return false;
            };
            self.children[&pid].serves()
        })
    }

    /// Generations other than this one that still have a child, but for those that nothing ends.
    pub fn other_generations(&self, serving: Generation) -> usize {
        let others: BTreeSet<_> = self
            .children
            .values()
            .filter(|child| !child.is_unkillable())
            .map(|child| child.slot_id.generation)
            .filter(|generation| *generation != serving)
            .collect();
        others.len()
    }

    /// Whether a worker lives that uses the pools of a generation.
    pub fn has_workers(&self, of: impl Fn(Generation) -> bool) -> bool {
        let mut children = self.children.values();
        children.any(|child| !child.slot_id.is_pool() && of(child.slot_id.generation))
    }

    /// Whether nothing lives and nothing is about to.
    pub fn is_empty(&self) -> bool {
        self.children.is_empty() && self.slots.is_empty()
    }
}

/// The slot of a slot's number in a generation.
pub(crate) fn slot_id(generation: Generation, slot: u16) -> SlotId {
    SlotId {
        generation,
        slot: Slot(slot),
    }
}

/// From the drain deadline to TERM: a worker ends its drain by itself, and is given the time to.
pub(crate) const AFTER_DRAIN: Millis = 100;

/// For a worker whose end is asked for before it is ready: so long its ready may be on the way.
pub(crate) const STARTING_GRACE: Millis = 500;

/// How long a signal is given to work before KILL.
pub(crate) fn kill_after(signal: Signal) -> Millis {
    match signal {
        // With AFTER_DRAIN within half a second of the drain deadline.
        Signal::SIGTERM => 300,
        // Its end is the kernel's affair then, and takes a while where there is much memory.
        Signal::SIGKILL => 3_000,
        _ => 500,
    }
}

/// Puts a child into the draining stage, with the signals that await it if it overstays.
pub(crate) fn begin_drain(child: &mut ChildRecord, deadline: Millis, now: Millis) {
    if !child.drains() {
        child.stage_since = now;
    }
    child.stage = WorkerStage::Draining { deadline };
    if child.kill_reason.is_some() {
        return; // Its end is under way already, and sooner.
    }
    child.next_signal = Some(match child.ready_at {
        Some(_) => (deadline + AFTER_DRAIN, Signal::SIGTERM),
        // It has no call to finish, and may not read orders for long. If its ready is on the way,
        // it comes in time.
        None => (deadline.min(now + STARTING_GRACE), Signal::SIGTERM),
    });
}

/// The key=value pairs that end a line about a worker.
pub(crate) fn log_fields(pid: Pid, slot_id: SlotId) -> String {
    format!(
        "slot={} pid={pid} generation={}",
        slot_id.slot, slot_id.generation
    )
}
