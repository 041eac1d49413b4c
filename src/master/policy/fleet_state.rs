//! Converts the fleet to plain data and back, for the program that follows at an upgrade.
//!
//! Pure. Children and deaths are serialized as they are. Data from another version is checked: a table that
//! contradicts itself is an error, never a panic. The limits on log lines start from zero.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::death_log::{Death, Deaths};
use super::event::{MAX_COUNT, Millis, PolicyLimits};
use super::fleet::{Fleet, ServerPhase};
use super::slots::{ChildRecord, SlotEntry, SlotId, SlotState, SlotTable, slot_id};
use crate::link::ids::{Generation, Pid};
use crate::protocol::control::DeathKind;
use crate::throttle::Throttle;

/// After an upgrade the pool processes of the old program continue to serve without a link to the master. If the
/// reload of the upgrade has not replaced their generation after this time, new pool processes and acceptors are
/// forked.
const OTHERS_AFTER_UPGRADE: Millis = 3_000;

/// The state of the fleet, between two reloads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FleetState {
    pub generation: u32,
    /// The highest generation number that was used.
    pub last_generation: u32,
    /// The limits of the serving generation.
    pub limits: PolicyLimits,
    /// The wanted number of workers.
    pub count: usize,
    /// The slots of the serving generation.
    #[serde(rename = "seats")]
    pub slots: Vec<SlotSnapshot>,
    /// Every child not yet reaped.
    pub children: Vec<ChildState>,
    /// The observers. For a program that does not know this member, their pids are also in `orphans.others`.
    #[serde(default)]
    pub observers: Vec<i32>,
    /// The last deaths of workers, oldest first.
    pub deaths: Vec<Death>,
    /// The last deaths of other children. An older program shows only those of workers.
    #[serde(default)]
    pub other_deaths: Vec<Death>,
    /// The last deaths of jobs processes. They have a member of their own, because an older version cannot
    /// read a death of this kind.
    #[serde(default)]
    pub jobs_deaths: Vec<Death>,
    /// The number of all deaths, including those without a record.
    pub deaths_total: u64,
}

/// A slot and its worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotSnapshot {
    pub slot: u16,
    /// The worker in the slot, if there is one.
    pub worker: Option<i32>,
    /// When a worker will be forked. `Some` only for a slot without a worker.
    pub until: Option<Millis>,
    /// The successor of that worker, if there is one.
    #[serde(default, rename = "coming")]
    pub successor: Option<i32>,
    /// When a successor is forked, if one is needed.
    #[serde(default, rename = "coming_until")]
    pub successor_until: Option<Millis>,
    /// When the slot last changed.
    pub since: Millis,
    pub throttle: Throttle,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChildState {
    pub pid: Pid,
    #[serde(flatten)]
    pub record: ChildRecord,
}

impl Fleet {
    /// Returns all that another program needs to know. Call it only:
    ///
    /// - between two reloads ([`Fleet::can_reload`]) and between two events, when no result and no fork is pending;
    ///   or
    /// - after [`Fleet::abandon_reload`]. Then the other program does the forks that were ordered.
    pub fn export(&self) -> FleetState {
        let SlotTable {
            slots: entries,
            children,
            ..
        } = &self.table;
        let is_wanted = |(slot_id, entry): &(&SlotId, &SlotEntry)| {
            entry.is_active && slot_id.generation == self.serving && slot_id.slot.is_worker()
        };
        // Pool processes and acceptors are in another part of the state (`WorkersState::pools`): a program that does
        // not know them must not end them.
        let is_worker = |(_, child): &(&Pid, &ChildRecord)| child.slot_id.slot.is_worker();
        let is_jobs = |death: &Death| death.kind == DeathKind::Jobs;
        let (jobs_deaths, deaths): (_, Vec<Death>) = self.deaths.iter().cloned().partition(is_jobs);
        let is_worker_death = |death: &Death| death.kind == DeathKind::Worker;
        let (deaths, other_deaths) = deaths.into_iter().partition(is_worker_death);
        let child_state = |(pid, record): (&Pid, &ChildRecord)| ChildState {
            pid: *pid,
            record: record.clone(),
        };
        FleetState {
            generation: self.serving.0,
            last_generation: self.last_generation.0,
            limits: self.limits,
            count: self.count,
            slots: entries
                .iter()
                .filter(is_wanted)
                .map(slot_snapshot)
                .collect(),
            children: children.iter().filter(is_worker).map(child_state).collect(),
            observers: self.observer.pids().map(|pid| pid.0).collect(),
            deaths,
            other_deaths,
            jobs_deaths,
            deaths_total: self.deaths.total(),
        }
    }

    /// Restores the fleet that another program has left, at `now` of the same clock. Deadlines that passed during the
    /// exec are handled by the first [`Fleet::tick`], after the reports of the workers were read. The reason: a
    /// worker whose boot-timeout passed meanwhile may have reported ready.
    ///
    /// # Errors
    /// A text that names the contradiction in the state.
    pub fn import(state: FleetState, now: Millis) -> Result<Self, String> {
        let FleetState {
            generation,
            last_generation,
            limits,
            count,
            slots,
            children,
            deaths,
            observers,
            other_deaths,
            jobs_deaths,
            deaths_total,
        } = state;
        let serving = Generation(generation);
        if !(1..=MAX_COUNT).contains(&count) || last_generation < generation {
            return Err(format!(
                "invalid numbers: {count} workers, generation {generation}, last generation {last_generation}"
            ));
        }
        let mut fleet = Fleet::empty(limits, now);
        fleet.phase = ServerPhase::Serving;
        fleet.serving = serving;
        fleet.last_generation = Generation(last_generation);
        fleet.count = count;
        let pids: BTreeSet<Pid> = children.iter().map(|child| child.pid).collect();
        if pids.len() != children.len() || pids.first().is_some_and(|pid| pid.0 <= 1) {
            return Err("the table of workers has a pid twice, or an invalid pid".into());
        }
        for state in children {
            // The exported heartbeat is old. This does no harm, because the scoreboard is read before the first tick.
            fleet.table.children.insert(state.pid, state.record);
        }
        for state in slots {
            let at = slot_id(serving, state.slot);
            let is_in_slot = |pid: Pid| {
                let child = fleet.table.children.get(&pid);
                child.is_some_and(|child| child.slot_id == at && !child.drains())
            };
            let slot_state = |worker: Option<i32>, until: Option<Millis>| match worker.map(Pid) {
                Some(pid) if is_in_slot(pid) => Ok(Some(SlotState::Worker(pid))),
                Some(pid) => Err(format!("slot {} has no worker {pid}", state.slot)),
                None => Ok(until.map(|until| SlotState::Throttled { until })),
            };
            let first = slot_state(state.worker, state.until)?;
            let second = slot_state(state.successor, state.successor_until)?;
            if second.is_some() && (state.worker.is_none() || state.worker == state.successor) {
                return Err(format!(
                    "slot {} has a successor without a worker, or its worker as its own successor",
                    state.slot
                ));
            }
            let entry = SlotEntry {
                state: first.unwrap_or(SlotState::Throttled { until: now }),
                successor: second,
                is_active: true,
                throttle: state.throttle,
                since: state.since,
                oldest: serving,
            };
            if usize::from(state.slot) >= count || fleet.table.slots.insert(at, entry).is_some() {
                return Err(format!("slot {} is listed twice or invalid", state.slot));
            }
        }
        if fleet.table.slots.len() != count {
            return Err(format!(
                "{} slots where {count} are wanted",
                fleet.table.slots.len()
            ));
        }
        // The old pool processes serve until no process uses them. The old acceptors accept nothing more:
        // the kernel queues connections until the reload that follows has started new ones.
        for slot in limits.other_slots() {
            let entry = SlotEntry {
                state: SlotState::Throttled {
                    until: now + OTHERS_AFTER_UPGRADE,
                },
                successor: None,
                is_active: true,
                throttle: Throttle::default(),
                since: now,
                oldest: serving,
            };
            let at = SlotId {
                generation: serving,
                slot,
            };
            fleet.table.slots.insert(at, entry);
        }
        fleet.has_foreign_pools = true;
        let before = observers.into_iter().map(Pid).collect();
        fleet.observer.resume(before, &limits, now);
        let mut deaths: Vec<Death> = (deaths.into_iter())
            .chain(other_deaths)
            .chain(jobs_deaths)
            .collect();
        deaths.sort_by_key(|death| death.at);
        fleet.deaths = Deaths::of(deaths.into_iter(), deaths_total);
        fleet.next_tick_at = fleet.earliest();
        Ok(fleet)
    }
}

fn slot_snapshot((slot_id, entry): (&SlotId, &SlotEntry)) -> SlotSnapshot {
    let SlotEntry {
        state,
        successor,
        // Inactive slots are left out.
        is_active: _,
        throttle,
        since,
        // It differs from the slot's generation only for a pool process, and pool processes are left out.
        oldest: _,
    } = entry;
    let parts = |state: SlotState| match state {
        SlotState::Worker(pid) => (Some(pid.0), None),
        SlotState::Throttled { until } => (None, Some(until)),
        SlotState::Forking => (None, None),
    };
    let (worker, until) = parts(*state);
    let (successor, successor_until) = successor.map_or((None, None), parts);
    SlotSnapshot {
        slot: slot_id.slot.0,
        worker,
        until,
        successor,
        successor_until,
        since: *since,
        throttle: throttle.clone(),
    }
}
