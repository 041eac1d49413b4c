//! What `status` shows of the fleet: read access, no decision.

use super::death_log::Deaths;
use super::event::Millis;
use super::fleet::{Fleet, ServerPhase};
use super::slots::{ChildRecord, SlotEntry, SlotId, SlotState, WorkerStage};
use crate::link::ids::{Generation, Pid, Slot};
use crate::protocol::control::WorkerPhase;
use crate::throttle::HEALTHY_AFTER;

/// One line of `status`: a worker, or a slot without one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerView {
    pub slot: Slot,
    pub generation: Generation,
    /// `None` iff throttled or dead.
    pub pid: Option<Pid>,
    pub state: WorkerPhase,
    /// Since when it is in that state.
    pub since: Millis,
    /// When it was forked; without a worker, as `since`.
    pub born: Millis,
    /// Young deaths of the slot in a row; 0 for one that drains.
    pub young_deaths: u32,
    /// Refused forks of the slot in a row.
    pub refused_forks: u32,
    /// When a throttled slot is forked again.
    pub next_fork: Option<Millis>,
}

impl Fleet {
    /// Every worker and every slot without one; see `views`.
    pub fn workers(&self) -> Vec<WorkerView> {
        let mut views = self.views();
        views.retain(|view| view.slot.pool().is_none());
        views
    }

    /// Every pool process and every place without one; see `views`.
    pub fn pools(&self) -> Vec<WorkerView> {
        let mut views = self.views();
        views.retain(|view| view.slot.pool().is_some());
        for view in &mut views {
            if view.generation < self.serving && view.state == WorkerPhase::Ready {
                // It serves what is left of its generation.
                view.state = WorkerPhase::Draining;
            }
        }
        views
    }

    /// All of them: by slot, the newest generation first, and those
    /// that drain after the one that serves; who is to follow that one stands behind it.
    fn views(&self) -> Vec<WorkerView> {
        let slots = self
            .table
            .slots
            .iter()
            .filter(|(_, tenure)| tenure.is_active);
        let draining = self.table.children.iter().filter(|(pid, child)| {
            child.drains() || child.slot_id.is_pool() && !self.table.holds_any(**pid, child.slot_id)
        });
        let mut views: Vec<_> = slots
            .flat_map(|(slot_id, tenure)| {
                let all = [Some(tenure.state), tenure.successor].into_iter().flatten();
                all.map(|holder| self.view_slot(*slot_id, tenure, holder))
            })
            .chain(draining.map(|(pid, child)| view_draining(*pid, child)))
            .collect();
        views.sort_by_key(|view| {
            let drains = view.state == WorkerPhase::Draining;
            (view.slot, drains, std::cmp::Reverse(view.generation))
        });
        views
    }

    /// Whether a generation before this one has pool processes, or is to get some.
    pub fn has_pools_before(&self, generation: Generation) -> bool {
        let mut slots = self.table.slots.keys();
        slots.any(|slot_id| slot_id.is_pool() && slot_id.generation < generation)
    }

    pub fn generation(&self) -> Generation {
        self.serving
    }

    /// How many workers there shall be.
    pub fn target_count(&self) -> usize {
        self.count
    }

    /// How many workers of the serving generation are ready.
    pub fn ready_count(&self) -> usize {
        let ready = |child: &&ChildRecord| {
            child.serves() && child.slot_id.generation == self.serving && !child.slot_id.is_pool()
        };
        self.table.children.values().filter(ready).count()
    }

    /// The workers that serve, while nothing else is under way that moves connections: none during a
    /// start-up, a reload or a stop.
    pub fn settled(&self) -> impl Iterator<Item = Pid> {
        let settled = self.phase == ServerPhase::Serving && self.reload.is_none();
        let serves = |child: &ChildRecord| {
            child.serves() && child.slot_id.generation == self.serving && !child.slot_id.is_pool()
        };
        let children = self.table.children.iter();
        children
            .filter(move |(_, child)| settled && serves(child))
            .map(|(pid, _)| *pid)
    }

    /// When it begins to stop, if it was told to do so later.
    pub fn stops_at(&self) -> Option<Millis> {
        self.stop_at
    }

    /// Every child not yet reaped.
    pub fn pids(&self) -> impl Iterator<Item = Pid> {
        self.table.children.keys().copied()
    }

    /// The last deaths.
    pub fn deaths(&self) -> &Deaths {
        &self.deaths
    }

    fn view_slot(&self, slot_id: SlotId, tenure: &SlotEntry, holder: SlotState) -> WorkerView {
        let mut view = WorkerView {
            slot: slot_id.slot,
            generation: slot_id.generation,
            pid: None,
            state: WorkerPhase::Dead,
            since: tenure.since,
            born: tenure.since,
            young_deaths: tenure.throttle.young_deaths(),
            refused_forks: tenure.throttle.refused_forks(),
            next_fork: None,
        };
        match holder {
            SlotState::Forking => {}
            SlotState::Throttled { until } => {
                view.state = WorkerPhase::Throttled;
                view.next_fork = Some(until);
            }
            SlotState::Worker(pid) => {
                let child = &self.table.children[&pid];
                view.pid = Some(pid);
                view.since = child.stage_since;
                view.born = child.forked_at;
                view.state = match child.stage {
                    WorkerStage::Starting => WorkerPhase::Starting,
                    WorkerStage::Ready => WorkerPhase::Ready,
                    WorkerStage::Draining { .. } => WorkerPhase::Draining,
                };
                // So much health has cleared the count, though it is only noted at its end.
                if child
                    .ready_for(self.now)
                    .is_some_and(|ms| ms >= HEALTHY_AFTER)
                {
                    view.young_deaths = 0;
                }
            }
        }
        view
    }
}

fn view_draining(pid: Pid, child: &ChildRecord) -> WorkerView {
    WorkerView {
        slot: child.slot_id.slot,
        generation: child.slot_id.generation,
        pid: Some(pid),
        state: WorkerPhase::Draining,
        since: child.stage_since,
        born: child.forked_at,
        young_deaths: 0,
        refused_forks: 0,
        next_fork: None,
    }
}
