//! Returns what `status` shows of the fleet. Reads only.

use super::crash_counts::Suspicion;
use super::death_log::Deaths;
use super::event::Millis;
use super::fleet::{Fleet, ServerPhase};
use super::slots::{ChildRecord, KillReason, SlotEntry, SlotId, SlotState, WorkerStage};
use crate::link::ids::{Generation, Pid, Slot};
use crate::protocol::control::WorkerPhase;
use crate::throttle::HEALTHY_AFTER;

/// One line of `status`: a child, or a slot without one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerView {
    pub slot: Slot,
    pub generation: Generation,
    /// `None` iff throttled or dead.
    pub pid: Option<Pid>,
    pub state: WorkerPhase,
    /// When it entered that state.
    pub since: Millis,
    /// When it was forked; if there is no child, the same as `since`.
    pub born: Millis,
    /// The number of young deaths of the slot in a row; 0 for a draining child.
    pub young_deaths: u32,
    /// The number of refused forks of the slot in a row.
    pub refused_forks: u32,
    /// When a throttled slot is forked again.
    pub next_fork: Option<Millis>,
}

impl Fleet {
    /// Returns every worker and every slot without one, in the order of `views`.
    pub fn workers(&self) -> Vec<WorkerView> {
        let mut views = self.views();
        views.retain(|view| view.slot.is_worker());
        views
    }

    /// Returns every pool process and every slot without one, in the order of `views`.
    pub fn pools(&self) -> Vec<WorkerView> {
        let mut views = self.views();
        views.retain(|view| view.slot.pool().is_some());
        for view in &mut views {
            if view.generation < self.serving && view.state == WorkerPhase::Ready {
                // It serves only workers of older generations.
                view.state = WorkerPhase::Draining;
            }
        }
        views
    }

    /// Returns every acceptor and every slot without one, in the order of `views`.
    pub fn acceptors(&self) -> Vec<WorkerView> {
        let mut views = self.views();
        views.retain(|view| view.slot.acceptor().is_some());
        views
    }

    /// Returns all children and empty slots, by slot. In a slot those that do not drain come first, then the newest
    /// generation. A successor comes directly after the holder of its slot.
    fn views(&self) -> Vec<WorkerView> {
        let slots = self.table.slots.iter().filter(|(_, entry)| entry.is_active);
        let draining = self.table.children.iter().filter(|(pid, child)| {
            child.drains()
                || child.slot_id.serves_workers() && !self.table.holds_any(**pid, child.slot_id)
        });
        let mut views: Vec<_> = slots
            .flat_map(|(slot_id, entry)| {
                let all = [Some(entry.state), entry.successor].into_iter().flatten();
                all.map(|state| self.view_slot(*slot_id, entry, state))
            })
            .chain(draining.map(|(pid, child)| view_draining(*pid, child)))
            .collect();
        views.sort_by_key(|view| {
            let drains = view.state == WorkerPhase::Draining;
            (view.slot, drains, std::cmp::Reverse(view.generation))
        });
        views
    }

    /// Returns whether a generation before this one has pool processes, will get some, or has workers that
    /// use those of a later one.
    pub fn has_pools_before(&self, generation: Generation) -> bool {
        let slots = self.table.slots.iter();
        let mut pools = slots.filter(|(slot_id, _)| slot_id.serves_workers());
        pools.any(|(_, entry)| entry.oldest < generation)
    }

    /// Returns the oldest generation that the child of a slot serves.
    pub fn oldest_served(&self, slot: Slot, generation: Generation) -> Generation {
        self.table.oldest_served(SlotId { generation, slot })
    }

    pub fn generation(&self) -> Generation {
        self.serving
    }

    /// Returns whether a change of the number of workers waits for the end of a start-up or reload.
    pub fn has_deferred_scale(&self) -> bool {
        self.deferred.is_some()
    }

    /// Returns the wanted number of workers.
    pub fn target_count(&self) -> usize {
        self.count
    }

    /// Returns the number of workers of the serving generation that are ready.
    pub fn ready_count(&self) -> usize {
        let ready = |child: &&ChildRecord| {
            child.serves()
                && child.slot_id.generation == self.serving
                && child.slot_id.slot.is_worker()
        };
        self.table.children.values().filter(ready).count()
    }

    /// Returns whether the master may send WATCHDOG=1 to the service manager. Without a ready worker no call is
    /// answered, even if the master works.
    pub fn is_healthy(&self) -> bool {
        self.ready_count() > 0
    }

    /// Returns which call may have caused the end of a child. No call is suspected if the child was not a serving
    /// worker, or if the master has killed it for another reason than a stuck event loop.
    pub fn suspicion(&self, pid: Pid) -> Suspicion {
        let child = self.table.children.get(&pid);
        match child.filter(|it| it.slot_id.slot.is_worker() && it.stage == WorkerStage::Ready) {
            Some(child) => match child.kill_reason {
                None => Suspicion::Reported,
                Some(KillReason::EventLoopStuck { .. }) => Suspicion::EventLoop,
                Some(_) => Suspicion::Nothing,
            },
            None => Suspicion::Nothing,
        }
    }

    /// If the master has killed a child, returns which call may have been the reason. Returns `None` if the master has
    /// not killed it.
    pub fn suspicion_of_kill(&self, pid: Pid) -> Option<Suspicion> {
        let child = self.table.children.get(&pid)?;
        Some(match child.kill_reason.as_ref()? {
            KillReason::EventLoopStuck { .. } => Suspicion::EventLoop,
            _ => Suspicion::Nothing,
        })
    }

    /// Returns whether a child was ordered to exit.
    pub fn drains(&self, pid: Pid) -> bool {
        self.table
            .children
            .get(&pid)
            .is_some_and(ChildRecord::drains)
    }

    /// Returns the workers that serve; none during a start-up, a reload or a stop, when connections move
    /// anyway.
    pub fn settled(&self) -> impl Iterator<Item = Pid> {
        let settled = self.phase == ServerPhase::Serving && self.reload.is_none();
        let serves = |child: &ChildRecord| {
            child.serves()
                && child.slot_id.generation == self.serving
                && child.slot_id.slot.is_worker()
        };
        let children = self.table.children.iter();
        children
            .filter(move |(_, child)| settled && serves(child))
            .map(|(pid, _)| *pid)
    }

    /// Returns when a scheduled stop begins.
    pub fn stops_at(&self) -> Option<Millis> {
        self.stop_at
    }

    /// Returns every child that has not been reaped.
    pub fn pids(&self) -> impl Iterator<Item = Pid> {
        self.table.children.keys().copied()
    }

    /// Returns the observer that serves.
    pub fn observer(&self) -> Option<Pid> {
        self.observer.pid()
    }

    /// Returns every observer that was not reaped yet.
    pub fn observers(&self) -> impl Iterator<Item = Pid> {
        self.observer.pids()
    }

    /// Returns the last deaths.
    pub fn deaths(&self) -> &Deaths {
        &self.deaths
    }

    fn view_slot(&self, slot_id: SlotId, entry: &SlotEntry, state: SlotState) -> WorkerView {
        let mut view = WorkerView {
            slot: slot_id.slot,
            generation: slot_id.generation,
            pid: None,
            state: WorkerPhase::Dead,
            since: entry.since,
            born: entry.since,
            young_deaths: entry.throttle.young_deaths(),
            refused_forks: entry.throttle.refused_forks(),
            next_fork: None,
        };
        match state {
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
                // After this time without a death the count of young deaths is zero. The policy resets it only at the
                // end of the child.
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
