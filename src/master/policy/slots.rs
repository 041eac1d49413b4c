//! Keeps the table of slots and children: which child is in which slot, and in which stage.
//!
//! A *slot entry* is a slot of one generation. Its holder is the child that starts or serves in it. A
//! draining child holds no slot, so a slot has at most one holder, at most one successor, and any number of
//! children that drain. The table answers questions and keeps its invariants. [`super::fleet`] decides what
//! to do. A report of a child never breaks the table. A pid that is inserted twice is a panic.

use std::collections::{BTreeMap, BTreeSet};

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::event::{Millis, PolicyLimits};
use crate::link::ids::{Generation, Pid, Slot};
use crate::throttle::Throttle;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SlotId {
    pub generation: Generation,
    pub slot: Slot,
}

impl SlotId {
    /// Returns whether it is the slot of a process that workers use: a pool process, or the jobs process.
    pub fn serves_workers(self) -> bool {
        self.slot.pool().is_some() || self.slot.is_jobs()
    }
}

/// What a slot has at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SlotState {
    /// No child, because of the throttle.
    Throttled {
        /// When to fork.
        until: Millis,
    },
    /// No child yet. A fork was ordered and has not been reported.
    Forking,
    /// This child, which is in the table and starting or ready.
    Worker(Pid),
}

impl SlotState {
    /// Returns the state of a slot whose fork is due at the time `at`.
    pub fn due(at: Millis, now: Millis) -> Self {
        match at > now {
            true => SlotState::Throttled { until: at },
            false => SlotState::Forking,
        }
    }
}

/// Whether a child must be recycled, and what was observed for that.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RecycleState {
    /// Why it must be replaced and since when; `None` if it need not be replaced.
    #[serde(rename = "wish")]
    pub(crate) request: Option<RecycleRequest>,
    /// Whether its memory was above the limit at the last check.
    pub(crate) above: bool,
    /// Whether its successor has its slot. Then it drains.
    pub(crate) replaced: bool,
    /// What it was stuck in; `None` if it was not stuck.
    pub(crate) evidence: Option<String>,
}

/// Why a worker must be replaced, and since when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecycleRequest {
    pub(crate) reason: RecycleReason,
    pub(crate) since: Millis,
    /// Whether it does not wait for other recycles.
    pub(crate) urgent: bool,
}

/// Why a worker must be replaced. It is passed on at an upgrade as text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", from = "String")]
pub enum RecycleReason {
    /// It has read this number of calls.
    MaxCalls(u64),
    MaxMemory {
        rss_bytes: u64,
        limit: u64,
    },
    /// It has reached this age.
    MaxLifetime(Millis),
    ThreadsStuck,
    RetireRequested,
    Text(String),
}

/// Why the master ends a child by a signal. Crosses an upgrade as text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", from = "String")]
pub enum KillReason {
    /// It was not ready after this time.
    BootTimeout(Millis),
    EventLoopStuck {
        silent: Millis,
        is_draining: bool,
    },
    /// It was not needed any more before it was ready.
    NotNeeded,
    DrainDeadline,
    /// [`super::event::Event::StopNow`].
    StopNow,
    Text(String),
}

/// The state of a slot.
#[derive(Debug)]
pub(crate) struct SlotEntry {
    pub state: SlotState,
    /// The child that replaces the holder once it is ready. `Some` only beside [`SlotState::Worker`], so
    /// that a slot has at most one fork under way.
    pub successor: Option<SlotState>,
    /// False if the slot was given up while its fork was under way. The new child is then drained.
    pub is_active: bool,
    /// When it may be forked again.
    pub throttle: Throttle,
    /// When `state` or `successor` last changed.
    pub since: Millis,
    /// The oldest generation that it serves. Earlier than its own if it is a pool process that stayed at a
    /// reload.
    pub oldest: Generation,
}

impl SlotEntry {
    /// Returns when the throttle allows the next fork.
    pub fn fork_at(&self) -> Option<Millis> {
        match self.successor.unwrap_or(self.state) {
            SlotState::Throttled { until } => Some(until),
            SlotState::Forking | SlotState::Worker(_) => None,
        }
    }
}

/// The stage of a child's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WorkerStage {
    Starting,
    Ready,
    /// It was ordered to exit, retires by itself, or has survived SIGKILL. It holds no slot.
    Draining {
        /// When the drain must be over.
        deadline: Millis,
    },
}

/// A child. It is passed on at an upgrade. There its members have the names of the first version (`rename`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChildRecord {
    /// Its slot. Unchanged while it drains, even though another child then holds that slot.
    #[serde(flatten)]
    pub slot_id: SlotId,
    pub limits: PolicyLimits,
    #[serde(rename = "born")]
    pub forked_at: Millis,
    pub ready_at: Option<Millis>,
    pub stage: WorkerStage,
    #[serde(rename = "since")]
    pub stage_since: Millis,
    /// The last heartbeat of its event loop, or a later time from which to count.
    pub heartbeat: Millis,
    /// Its next signal if nothing changes, and when.
    #[serde(default, rename = "next", with = "signal_number")]
    pub next_signal: Option<(Millis, Signal)>,
    /// Why the master ends it by force. `Some` iff it does.
    #[serde(rename = "doom")]
    pub kill_reason: Option<KillReason>,
    #[serde(default, rename = "wear")]
    pub recycle: RecycleState,
    #[serde(default, rename = "killed")]
    pub is_sigkill_sent: bool,
    /// Whether it is asked to retire when it is ready, because its keeper has died. It is unknown after an upgrade.
    #[serde(skip)]
    pub retires_when_ready: bool,
    /// Whether it is a jobs process that was ordered to claim nothing more.
    #[serde(skip)]
    pub has_ended_claims: bool,
}

/// A signal as its number.
mod signal_number {
    use nix::sys::signal::Signal;
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    use crate::master::policy::event::Millis;

    type Next = Option<(Millis, Signal)>;

    pub fn serialize<S: Serializer>(next: &Next, to: S) -> Result<S::Ok, S::Error> {
        let number = |(at, signal)| (at, signal as i32);
        next.map(number).serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Next, D::Error> {
        let Some((at, number)) = Option::<(Millis, i32)>::deserialize(from)? else {
            return Ok(None);
        };
        let unknown = |_| D::Error::custom(format!("signal {number}"));
        Ok(Some((at, Signal::try_from(number).map_err(unknown)?)))
    }
}

impl ChildRecord {
    /// Returns how long it has been ready; `None` if it never was.
    pub fn ready_for(&self, now: Millis) -> Option<Millis> {
        self.ready_at.map(|at| now - at)
    }

    /// Returns whether it is in the draining stage.
    pub fn drains(&self) -> bool {
        matches!(self.stage, WorkerStage::Draining { .. })
    }

    /// Returns whether it is ready and is not being ended by force.
    pub fn serves(&self) -> bool {
        self.stage == WorkerStage::Ready && self.kill_reason.is_none()
    }

    /// Returns whether SIGKILL did not end it, because the kernel holds it in a system call.
    pub fn is_unkillable(&self) -> bool {
        self.is_sigkill_sent && self.next_signal.is_none()
    }

    /// Returns when its event loop counts as stuck. This also applies while it drains.
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
    /// The slots of the serving generation and, during a reload, those of the next one. Also slots that
    /// were given up and whose fork has not been reported.
    pub slots: BTreeMap<SlotId, SlotEntry>,
    /// Every child that has not been reaped.
    pub children: BTreeMap<Pid, ChildRecord>,
    /// The generations of sessions without an acceptor, whose calls may wait for a pool process.
    pub session_generations: BTreeSet<Generation>,
}

impl SlotTable {
    /// Adds a slot for forking. Returns false if its fork is under way already.
    pub fn add_slot(&mut self, slot_id: SlotId, now: Millis) -> bool {
        if let Some(entry) = self.slots.get_mut(&slot_id) {
            assert!(!entry.is_active, "{slot_id:?} is opened twice");
            entry.is_active = true;
            return false;
        }
        let entry = SlotEntry {
            state: SlotState::Forking,
            successor: None,
            is_active: true,
            throttle: Throttle::default(),
            since: now,
            oldest: slot_id.generation,
        };
        self.slots.insert(slot_id, entry);
        true
    }

    /// Removes a slot. Returns its holder and its successor.
    pub fn remove_slot(&mut self, slot_id: SlotId) -> Vec<Pid> {
        let Some(entry) = self.slots.get_mut(&slot_id) else {
            return Vec::new();
        };
        let all = [Some(entry.state), entry.successor.take()];
        if all.contains(&Some(SlotState::Forking)) {
            // The report of the fork must find the slot.
            entry.state = SlotState::Forking;
            entry.is_active = false;
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

    /// Adds a new child.
    pub fn insert(&mut self, pid: Pid, child: ChildRecord) {
        let before = self.children.insert(pid, child);
        assert!(
            before.is_none(),
            "pid {pid} was forked twice and never reaped"
        );
    }

    /// Returns the active slots of a generation, lowest slot first.
    pub fn slots_of(&self, generation: Generation) -> Vec<SlotId> {
        let all = slot_id(generation, 0)..=slot_id(generation, u16::MAX);
        self.slots
            .range(all)
            .filter(|(_, entry)| entry.is_active)
            .map(|(slot_id, _)| *slot_id)
            .collect()
    }

    /// Returns whether the child holds the slot.
    pub fn holds(&self, pid: Pid, slot_id: SlotId) -> bool {
        self.slots
            .get(&slot_id)
            .is_some_and(|entry| entry.state == SlotState::Worker(pid))
    }

    /// Returns whether the child is the successor in the slot.
    pub fn is_successor(&self, pid: Pid, slot_id: SlotId) -> bool {
        self.slots
            .get(&slot_id)
            .is_some_and(|entry| entry.successor == Some(SlotState::Worker(pid)))
    }

    /// Returns whether the child holds the slot or is the successor in it.
    pub fn holds_any(&self, pid: Pid, slot_id: SlotId) -> bool {
        self.holds(pid, slot_id) || self.is_successor(pid, slot_id)
    }

    /// Returns whether the child holds its slot and has no successor.
    pub fn has_alone(&self, pid: Pid) -> bool {
        let child = self.children.get(&pid);
        child.is_some_and(|child| {
            self.holds(pid, child.slot_id) && self.slots[&child.slot_id].successor.is_none()
        })
    }

    /// Returns whether each slot of a generation has a child that serves.
    pub fn all_ready(&self, generation: Generation) -> bool {
        self.slots_of(generation).iter().all(|slot_id| {
            let SlotState::Worker(pid) = self.slots[slot_id].state else {
                return false;
            };
            self.children[&pid].serves()
        })
    }

    /// Returns the number of generations other than `serving` that have a child. Children that SIGKILL does
    /// not end are not counted.
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

    /// Returns whether the process of this slot has users in a generation for which `of` returns true. Workers,
    /// acceptors and sessions use pool processes. All these, and pool processes too, use the jobs process.
    pub fn has_users(&self, slot_id: SlotId, of: impl Fn(Generation) -> bool) -> bool {
        let is_jobs = slot_id.slot.is_jobs();
        let pools = self.children.values().map(|child| child.slot_id);
        let pools = pools.filter(|other| is_jobs && other.slot.pool().is_some());
        (self.users_of_pools().chain(pools.map(|it| it.generation))).any(of)
    }

    /// Returns the generations of workers, acceptors, and sessions without an acceptor.
    fn users_of_pools(&self) -> impl Iterator<Item = Generation> {
        let children = self.children.values();
        let workers = children.filter(|child| !child.slot_id.serves_workers());
        let generations = workers.map(|child| child.slot_id.generation);
        generations.chain(self.session_generations.iter().copied())
    }

    /// Moves a pool process and its slot to another generation and slot, with other limits.
    pub fn move_pool(&mut self, pid: Pid, to: SlotId, limits: PolicyLimits) {
        if let Some(child) = self.children.get_mut(&pid)
            && let Some(entry) = self.slots.remove(&child.slot_id)
        {
            (child.slot_id, child.limits) = (to, limits);
            self.slots.insert(to, entry);
        }
    }

    /// Returns the oldest generation that the child of a slot serves.
    pub fn oldest_served(&self, slot_id: SlotId) -> Generation {
        let entry = self.slots.get(&slot_id);
        entry.map_or(slot_id.generation, |entry| entry.oldest)
    }

    /// Updates `oldest` of all slots: a generation whose last worker has gone needs no pool process.
    pub fn note_oldest_served(&mut self) {
        let oldest = self.users_of_pools().min();
        let oldest = oldest.unwrap_or(Generation(u32::MAX));
        for (slot_id, entry) in &mut self.slots {
            entry.oldest = entry.oldest.max(oldest).min(slot_id.generation);
        }
    }

    /// Returns whether there is no child and no fork under way.
    pub fn is_empty(&self) -> bool {
        self.children.is_empty() && self.slots.is_empty()
    }
}

pub(crate) fn slot_id(generation: Generation, slot: u16) -> SlotId {
    SlotId {
        generation,
        slot: Slot(slot),
    }
}

/// Returns the time from a signal to the SIGKILL that follows, or from SIGKILL until the child counts as
/// unkillable.
pub(crate) fn kill_after(signal: Signal) -> Millis {
    match signal {
        // `shutdown::AFTER_DRAIN` (100) plus this is less than 500 ms after the drain deadline.
        Signal::SIGTERM => 300,
        // The kernel frees the memory, which takes long if there is much.
        Signal::SIGKILL => 3_000,
        _ => 500,
    }
}
