//! Recycling: a worker that has had enough gets its successor first, and drains when that is ready.
//!
//! Enough is a number of calls (the worker tells), an age, resident memory seen above its limit
//! twice, or handler threads of which none comes back. Such a worker has a *wish* to be replaced. A wish is granted while
//! fewer than `max-unavailable` recycles are under way, each from the order to fork the successor until
//! the old worker is gone, and not while a reload's verdict is open, which replaces everybody.
//! One whose threads are all stuck answers next to nothing and does not wait for that.
//!
//! The successor is the slot's `successor` one ([`super::slots::SlotEntry`]). When it fails, it is throttled like
//! any other, and the old worker serves on; when the old one goes first, the slot is the successor's.

use log::Level;

use super::death_log;
use super::death_log::Death;
use super::event::{Action, HumanDuration, Millis, StopMode};
use super::fleet::{Fleet, ServerPhase};
use super::slots::{ChildRecord, RecycleRequest, SlotId, SlotState, log_fields};
use crate::link::ids::Pid;
use crate::logging::pluralize;
use crate::throttle::jitter;
use crate::throttle::limiter::with_suppressed_count;

/// Between two looks at the memory of workers that have a limit.
const SAMPLES_APART: Millis = 1_000;
impl ChildRecord {
    /// Serves, and is not to be replaced yet.
    fn may_recycle(&self) -> bool {
        self.serves() && self.recycle.request.is_none()
    }

    /// When it is old enough.
    fn lifetime_end(&self, pid: Pid) -> Option<Millis> {
        let lifetime = self.limits.max_lifetime;
        let ready_at = self
            .ready_at
            .filter(|_| self.may_recycle() && lifetime > 0 && !self.slot_id.is_pool())?;
        Some(ready_at + jitter::with_jitter(lifetime, u64::from(pid.0.unsigned_abs())))
    }

    fn has_memory_to_watch(&self) -> bool {
        self.may_recycle() && self.limits.max_memory > 0 && !self.slot_id.is_pool()
    }
}

impl Fleet {
    /// The workers whose memory is to be fed with [`crate::master::policy::event::Event::Memory`] before a tick at `now`.
    pub fn to_sample(&self, now: Millis) -> Vec<Pid> {
        let is_due = self.recycling.next_sample <= now;
        let watched =
            (self.table.children.iter()).filter(|(_, child)| is_due && child.has_memory_to_watch());
        watched.map(|(pid, _)| *pid).collect()
    }

    /// How many recycles are under way.
    pub fn recycles(&self) -> usize {
        let slots = self.table.slots.values();
        let leaving = self.table.children.values();
        slots.filter(|tenure| tenure.successor.is_some()).count()
            + leaving
                // One that nothing ends holds up no other.
                .filter(|child| child.recycle.replaced && !child.is_unkillable())
                .count()
    }

    /// A worker says that it has read as many calls as it may.
    pub(crate) fn worn(&mut self, pid: Pid, calls: u64) {
        self.request_recycle(
            pid,
            format!(
                "max-calls is reached with {}",
                pluralize(calls as usize, "call", "calls")
            ),
            false,
        );
    }

    /// Whether a report that a worker's threads don't come back would be news.
    pub fn wants_evidence(&self, pid: Pid) -> bool {
        let child = self.table.children.get(&pid);
        child.is_some_and(|child| child.serves() && child.recycle.evidence.is_none())
    }

    /// None of a worker's threads comes back: it is replaced without waiting for others.
    pub(crate) fn wedged(&mut self, pid: Pid, evidence: &str) {
        let since = self.now;
        if !self.wants_evidence(pid) {
            return;
        }
        let child = self.child_mut(pid);
        child.recycle.request = Some(RecycleRequest {
            reason: "none of its handler threads comes back".to_owned(),
            since,
            urgent: true,
        });
        self.evidence(pid, evidence);
    }

    /// What a worker is stuck in, for the log and for its death record.
    pub(crate) fn evidence(&mut self, pid: Pid, text: &str) {
        let Some(child) = self.table.children.get_mut(&pid) else {
            return;
        };
        let text = death_log::clean_text(text);
        let (slot, pairs) = (child.slot_id.slot, log_fields(pid, child.slot_id));
        child.recycle.evidence = Some(text.clone());
        let role = slot.role();
        self.trouble(
            Level::Warn,
            format!("{role} {pid} (slot {slot}): {text} {pairs}"),
        );
    }

    /// So much memory a worker has.
    pub(crate) fn memory(&mut self, pid: Pid, rss_bytes: u64) {
        let Some(child) = self.table.children.get_mut(&pid) else {
            return;
        };
        let limit = child.limits.max_memory;
        let above = limit > 0 && rss_bytes > limit;
        if std::mem::replace(&mut child.recycle.above, above) && above {
            let text = format!("{rss_bytes} bytes are resident, max-memory is {limit}");
            self.request_recycle(pid, text, false);
        }
    }

    /// A worker is to be replaced; the first reason counts.
    pub(crate) fn request_recycle(&mut self, pid: Pid, reason: String, urgent: bool) {
        let since = self.now;
        if let Some(child) = self.table.children.get_mut(&pid)
            && child.may_recycle()
        {
            child.recycle.request = Some(RecycleRequest {
                reason,
                since,
                urgent,
            });
        }
    }

    /// Those who have reached their age wish to be replaced.
    fn note_ages(&mut self) {
        let now = self.now;
        let old: Vec<(Pid, Millis)> = (self.table.children.iter())
            .filter(|(pid, child)| child.lifetime_end(**pid).is_some_and(|at| at <= now))
            .filter_map(|(pid, child)| Some((*pid, child.ready_for(now)?)))
            .collect();
        for (pid, age) in old {
            let text = format!("max-lifetime is reached at {}", HumanDuration(age));
            self.request_recycle(pid, text, false);
        }
    }

    /// Grants the wishes that may be granted now. To be asked after every event.
    pub(crate) fn start_due_recycles(&mut self) {
        self.note_ages();
        if self.phase != ServerPhase::Serving {
            return;
        }
        let mut wishes: Vec<(bool, Millis, Pid)> = (self.table.children.iter())
            .filter(|(pid, child)| child.serves() && self.may_be_followed(**pid, child.slot_id))
            .filter_map(|(pid, child)| Some((pid, child.recycle.request.as_ref()?)))
            .map(|(pid, wish)| (!wish.urgent, wish.since, *pid))
            .collect();
        wishes.sort_unstable();
        let mut room = (self.limits.max_unavailable).saturating_sub(self.recycles());
        for (waits, _, pid) in wishes {
            if waits && (room == 0 || self.reload.is_some()) {
                break;
            }
            room = room.saturating_sub(1);
            self.recycle(pid);
        }
    }

    /// Whether it holds a slot of the generation that serves, and nobody is to follow there yet.
    fn may_be_followed(&self, pid: Pid, slot_id: SlotId) -> bool {
        slot_id.generation == self.serving
            && self.table.holds(pid, slot_id)
            && self.table.slots[&slot_id].successor.is_none()
    }

    /// Starts the successor of a worker that serves.
    fn recycle(&mut self, pid: Pid) {
        let now = self.now;
        let child = self.child_mut(pid);
        let (slot_id, limits, health) = (child.slot_id, child.limits, child.ready_for(now));
        let Some(wish) = child.recycle.request.clone() else {
            return;
        };
        let due = match wish.urgent {
            true => self
                .tenure(slot_id)
                .throttle
                .death(health, &limits.throttle(), now),
            false => now,
        };
        if let Some(more) = self.recycling.lines.admit(now) {
            let (slot, reason) = (slot_id.slot, wish.reason);
            let role = slot.role();
            let text = format!(
                "{role} {pid} (slot {slot}) is recycled once its successor is ready: {reason} {}",
                log_fields(pid, slot_id)
            );
            self.log(Level::Info, with_suppressed_count(text, more));
        }
        self.spawn_successor(slot_id, due);
    }

    /// The successor in a slot is to be forked, at once or when the throttle allows it.
    pub(crate) fn spawn_successor(&mut self, slot_id: SlotId, due: Millis) {
        let now = self.now;
        let holder = SlotState::due(due, now);
        self.tenure(slot_id).successor = Some(holder);
        if holder == SlotState::Forking {
            let (slot, generation) = (slot_id.slot, slot_id.generation);
            self.act(Action::Fork { slot, generation });
        }
    }

    /// The successor is ready: the slot is its own, and the old worker drains.
    pub(crate) fn promote_successor(&mut self, pid: Pid, slot_id: SlotId) {
        let now = self.now;
        let tenure = self.tenure(slot_id);
        tenure.successor = None;
        tenure.since = now;
        let before = std::mem::replace(&mut tenure.state, SlotState::Worker(pid));
        let SlotState::Worker(old) = before else {
            unreachable!("a successor comes beside a worker only, and {before:?} is none");
        };
        let child = self.child_mut(old);
        child.recycle.replaced = true;
        let health = child.ready_for(now);
        self.tenure(slot_id).throttle.record_ready_time(health);
        self.order_exit(old, StopMode::Retire);
    }

    /// The successor died before it was ready: it is tried again, and the old worker serves on.
    pub(crate) fn successor_died(&mut self, child: &ChildRecord, death: &Death) {
        let (slot_id, now) = (child.slot_id, self.now);
        let tenure = self.tenure(slot_id);
        let due = tenure.throttle.death(None, &child.limits.throttle(), now);
        let young = tenure.throttle.young_deaths();
        let follows = match due - now {
            0 => "another one is started".to_owned(),
            wait => {
                let deaths = pluralize(young as usize, "young death", "young deaths");
                format!("next try in {}: {deaths}", HumanDuration(wait))
            }
        };
        let text = format!(
            "{}; the worker that it was to follow serves on; {follows} {}",
            death.sentence(),
            death.log_fields()
        );
        self.trouble(Level::Error, text);
        self.spawn_successor(slot_id, due);
    }

    /// When recycling wants to be looked at again.
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

    /// What the passing of time brings, apart from wishes.
    pub(crate) fn pass_recycling(&mut self) {
        let now = self.now;
        if self.recycling.next_sample <= now {
            self.recycling.next_sample = now + SAMPLES_APART;
        }
        if let Some(more) = self.recycling.lines.flush(now) {
            let more = pluralize(more as usize, "more worker was", "more workers were");
            let text = format!("{more} recycled, too many for a line each");
            self.log(Level::Info, text);
        }
    }
}
