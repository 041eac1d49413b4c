//! Recycles workers: starts the successor of a worker first, and drains the worker when the successor is ready.
//!
//! A child is recycled for one of these reasons:
//!
//! - It has read the configured number of calls. The worker reports this.
//! - It has reached the configured age.
//! - Its memory was above the limit at two checks in a row.
//! - All its handler threads are stuck.
//!
//! At most `max-unavailable` recycles run at one time. A recycle lasts from the order to fork the successor until
//! the old worker has exited. No recycle starts while a reload runs, because the reload replaces all workers. A
//! worker whose threads are all stuck does not wait for other recycles or a reload, because it answers almost no
//! call.
//!
//! The successor is in the `successor` of the slot ([`super::slots::SlotEntry`]). If the successor fails, the next
//! one is throttled like any other fork, and the old worker continues. If the old worker ends first, the successor
//! gets the slot.

use log::Level;

use super::action::{Action, AfterDeath, ChildIncident, Incident};
use super::death_log;
use super::death_log::Death;
use super::event::{Millis, StopMode};
use super::fleet::{Fleet, ServerPhase};
use super::slots::{ChildRecord, RecycleReason, RecycleRequest, SlotId, SlotState};
use crate::link::ids::Pid;
use crate::throttle::jitter;

/// The time between two checks of memory.
const SAMPLES_APART: Millis = 1_000;
impl ChildRecord {
    /// Returns whether the child serves and no recycle was requested for it.
    fn may_recycle(&self) -> bool {
        self.serves() && self.recycle.request.is_none()
    }

    /// Returns when the worker reaches the configured age; `None` if it may not be recycled for its age.
    fn lifetime_end(&self, pid: Pid) -> Option<Millis> {
        let lifetime = self.limits.max_lifetime;
        let ready_at = self
            .ready_at
            .filter(|_| self.may_recycle() && lifetime > 0 && self.slot_id.slot.is_worker())?;
        Some(ready_at + jitter::with_jitter(lifetime, u64::from(pid.0.unsigned_abs())))
    }

    fn has_memory_to_watch(&self) -> bool {
        self.may_recycle() && self.limits.max_memory > 0 && self.slot_id.slot.is_worker()
    }
}

impl Fleet {
    /// Returns the workers whose memory must be reported with [`super::event::Event::Memory`] before a tick
    /// at `now`.
    pub fn to_sample(&self, now: Millis) -> Vec<Pid> {
        let is_due = self.recycling.next_sample <= now;
        let watched =
            (self.table.children.iter()).filter(|(_, child)| is_due && child.has_memory_to_watch());
        watched.map(|(pid, _)| *pid).collect()
    }

    /// Returns the number of recycles under way.
    pub fn recycles(&self) -> usize {
        let slots = self.table.slots.values();
        let leaving = self.table.children.values();
        slots.filter(|entry| entry.successor.is_some()).count()
            + leaving
                // An old worker that SIGKILL does not end must not delay other recycles.
                .filter(|child| child.recycle.replaced && !child.is_unkillable())
                .count()
    }

    /// Handles the report that a worker has read the configured number of calls.
    pub(crate) fn max_calls_reached(&mut self, pid: Pid, calls: u64) {
        self.request_recycle(pid, RecycleReason::MaxCalls(calls));
    }

    /// Returns whether a report that all threads of a worker are stuck is new. A pool process has no
    /// handler threads, so its report is ignored.
    pub fn wants_diagnosis(&self, pid: Pid) -> bool {
        let child = self.table.children.get(&pid);
        child.is_some_and(|child| {
            child.serves() && child.recycle.evidence.is_none() && !child.slot_id.serves_workers()
        })
    }

    /// Handles the report that all threads of a worker are stuck. The worker is replaced without waiting for other
    /// recycles or for a reload.
    pub(crate) fn all_threads_stuck(&mut self, pid: Pid, evidence: &str) {
        let since = self.now;
        if !self.wants_diagnosis(pid) {
            return;
        }
        let child = self.child_mut(pid);
        child.recycle.request = Some(RecycleRequest {
            reason: RecycleReason::ThreadsStuck,
            since,
            urgent: true,
        });
        self.diagnosed(pid, evidence);
    }

    /// Records what a child is stuck in, for the log and its death record.
    pub(crate) fn diagnosed(&mut self, pid: Pid, text: &str) {
        let Some(child) = self.table.children.get_mut(&pid) else {
            return;
        };
        let evidence = death_log::clean_text(text);
        child.recycle.evidence = Some(evidence.clone());
        let incident = ChildIncident::Stuck(evidence).of(pid, child.slot_id);
        self.log_limited(Level::Warn, incident);
    }

    /// Handles the resident memory of a worker, in bytes.
    pub(crate) fn memory(&mut self, pid: Pid, rss_bytes: u64) {
        let Some(child) = self.table.children.get_mut(&pid) else {
            return;
        };
        let limit = child.limits.max_memory;
        let above = limit > 0 && rss_bytes > limit;
        if std::mem::replace(&mut child.recycle.above, above) && above {
            self.request_recycle(pid, RecycleReason::MaxMemory { rss_bytes, limit });
        }
    }

    /// Requests that a child is replaced. If it was requested before, the first reason is kept.
    pub(crate) fn request_recycle(&mut self, pid: Pid, reason: RecycleReason) {
        let since = self.now;
        if let Some(child) = self.table.children.get_mut(&pid)
            && child.may_recycle()
        {
            child.recycle.request = Some(RecycleRequest {
                reason,
                since,
                urgent: false,
            });
        }
    }

    /// Requests that the workers that have reached their age are replaced.
    fn note_ages(&mut self) {
        let now = self.now;
        let old: Vec<(Pid, Millis)> = (self.table.children.iter())
            .filter(|(pid, child)| child.lifetime_end(**pid).is_some_and(|at| at <= now))
            .filter_map(|(pid, child)| Some((*pid, child.ready_for(now)?)))
            .collect();
        for (pid, age) in old {
            self.request_recycle(pid, RecycleReason::MaxLifetime(age));
        }
    }

    /// Starts the recycles that may start now. Call it after each event.
    pub(crate) fn start_due_recycles(&mut self) {
        self.note_ages();
        if self.phase != ServerPhase::Serving {
            return;
        }
        let mut requests: Vec<(bool, Millis, Pid)> = (self.table.children.iter())
            .filter(|(pid, child)| child.serves() && self.may_be_followed(**pid, child.slot_id))
            .filter_map(|(pid, child)| Some((pid, child.recycle.request.as_ref()?)))
            .map(|(pid, request)| (!request.urgent, request.since, *pid))
            .collect();
        requests.sort_unstable();
        let mut room = (self.limits.max_unavailable).saturating_sub(self.recycles());
        for (waits, _, pid) in requests {
            if waits && (room == 0 || self.reload.is_some()) {
                break;
            }
            room = room.saturating_sub(1);
            self.recycle(pid);
        }
    }

    /// Returns whether a child holds a slot of the serving generation, and that slot has no successor yet.
    fn may_be_followed(&self, pid: Pid, slot_id: SlotId) -> bool {
        slot_id.generation == self.serving
            && self.table.holds(pid, slot_id)
            && self.table.slots[&slot_id].successor.is_none()
    }

    /// Starts the successor of a child that serves.
    fn recycle(&mut self, pid: Pid) {
        let now = self.now;
        let child = self.child_mut(pid);
        let (slot_id, limits, health) = (child.slot_id, child.limits, child.ready_for(now));
        let Some(request) = child.recycle.request.clone() else {
            return;
        };
        let due = match request.urgent {
            true => self
                .entry(slot_id)
                .throttle
                .death(health, &limits.throttle(), now),
            false => now,
        };
        if let Some(suppressed) = self.recycling.lines.admit(now) {
            let incident = ChildIncident::Recycled(request.reason).of(pid, slot_id);
            self.log_after(Level::Info, incident, suppressed);
        }
        self.spawn_successor(slot_id, due);
    }

    /// Forks the successor in a slot, at once or when the throttle allows it.
    pub(crate) fn spawn_successor(&mut self, slot_id: SlotId, due: Millis) {
        let now = self.now;
        let state = SlotState::due(due, now);
        self.entry(slot_id).successor = Some(state);
        if state == SlotState::Forking {
            let (slot, generation) = (slot_id.slot, slot_id.generation);
            self.act(Action::Fork { slot, generation });
        }
    }

    /// Gives the slot to the successor, because it is ready, and drains the old child.
    pub(crate) fn promote_successor(&mut self, pid: Pid, slot_id: SlotId) {
        let now = self.now;
        let entry = self.entry(slot_id);
        entry.successor = None;
        entry.since = now;
        let before = std::mem::replace(&mut entry.state, SlotState::Worker(pid));
        let SlotState::Worker(old) = before else {
            unreachable!("a slot with a successor has a worker, but it has {before:?}");
        };
        let child = self.child_mut(old);
        child.recycle.replaced = true;
        let health = child.ready_for(now);
        self.entry(slot_id).throttle.record_ready_time(health);
        self.order_exit(old, StopMode::Retire);
    }

    /// Handles the death of a successor before it was ready: another one is tried, and the old child
    /// continues.
    pub(crate) fn successor_died(&mut self, child: &ChildRecord, death: &Death) {
        let (slot_id, now) = (child.slot_id, self.now);
        let entry = self.entry(slot_id);
        let due = entry.throttle.death(None, &child.limits.throttle(), now);
        let young = entry.throttle.young_deaths();
        let follows = AfterDeath::NextSuccessor(due - now, young);
        self.log_limited(
            Level::Error,
            Incident::Died(Box::new(death.clone()), follows),
        );
        self.spawn_successor(slot_id, due);
    }

    /// Returns when the next age, memory check or suppressed log line is due.
    pub(crate) fn next_recycling(&self) -> Option<Millis> {
        let children = self.table.children.iter();
        let samples = self
            .table
            .children
            .values()
            .any(ChildRecord::has_memory_to_watch);
        children
            .filter_map(|(pid, child)| child.lifetime_end(*pid))
            .chain(samples.then_some(self.recycling.next_sample))
            .chain(self.recycling.lines.flush_at())
            .min()
    }

    /// Handles what is due, except the start of recycles.
    pub(crate) fn pass_recycling(&mut self) {
        let now = self.now;
        if self.recycling.next_sample <= now {
            self.recycling.next_sample = now + SAMPLES_APART;
        }
        if let Some(more) = self.recycling.lines.flush(now) {
            self.log(Level::Info, Incident::SuppressedRecycles(more));
        }
    }
}
