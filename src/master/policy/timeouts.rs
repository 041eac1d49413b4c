//! What the passing of time brings: throttled slots come due, workers overstay, event loops stick.
//!
//! Each child has at most one next signal ([`super::slots::ChildRecord::next_signal`]); here it is sent and
//! the one after it set. A master that was itself paused (SIGSTOP, a frozen group) finds every
//! deadline long gone, and its workers' reports unread: then nobody is ended, all get a fresh grace.

use log::Level;
use nix::sys::signal::Signal;

use super::event::{Action, HumanDuration, Millis};
use super::fleet::{Fleet, ServerPhase};
use super::slots::{ChildRecord, SlotEntry, SlotId, WorkerStage, kill_after, log_fields};
use crate::link::ids::Pid;
use crate::logging::pluralize;

/// Later than this for a deadline, the master was paused.
const PAUSE: Millis = 1_000;
/// At least so long everybody has after a pause.
const GRACE_AFTER_PAUSE: Millis = 1_000;

impl Fleet {
    /// Does what is due.
    pub(crate) fn pass_time(&mut self) {
        let now = self.now;
        if self.stop_at.is_some_and(|at| at <= now) {
            self.stop_at = None;
            self.act(Action::StopDue);
        }
        let is_due = |child: &ChildRecord| child.due_at().is_some_and(|at| at <= now);
        let due: Vec<Pid> = (self.table.children.iter())
            .filter(|(_, child)| is_due(child))
            .map(|(pid, _)| *pid)
            .collect();
        for pid in due {
            // The one before may have ended a reload, and with it this one's reason to be ended.
            if is_due(self.child_mut(pid)) {
                self.signal(pid);
            }
        }
        let due: Vec<SlotId> = (self.table.slots.iter())
            .filter(|(_, tenure)| tenure.fork_at().is_some_and(|at| at <= now))
            .map(|(slot_id, _)| *slot_id)
            .collect();
        for slot_id in due {
            match self.tenure(slot_id).successor {
                Some(_) => self.spawn_successor(slot_id, now),
                None => self.respawn(slot_id, now),
            }
        }
        self.pass_recycling();
        if let Some(more) = self.troubles.flush(now) {
            let more = pluralize(
                more as usize,
                "more line about workers was",
                "more lines about workers were",
            );
            let text = format!("{more} held back; `status` shows the last deaths");
            self.log(Level::Warn, text);
        }
        if let Some(more) = self.refusals.flush(now) {
            let more = pluralize(more as usize, "more fork was", "more forks were");
            self.log(Level::Warn, format!("{more} refused"));
        }
    }

    /// When the next of these is due.
    pub(crate) fn earliest(&self) -> Option<Millis> {
        let children = self.table.children.values().filter_map(ChildRecord::due_at);
        let slots = self.table.slots.values().filter_map(SlotEntry::fork_at);
        children
            .chain(slots)
            .chain(self.next_recycling())
            .chain(self.troubles.flush_at())
            .chain(self.refusals.flush_at())
            .chain(self.stop_at)
            .min()
    }

    /// If the master comes far later than it had to, everybody's clock starts afresh.
    pub(crate) fn forgive_a_pause(&mut self) {
        let now = self.now;
        let Some(late) = self.next_tick_at.and_then(|at| now.checked_sub(at)) else {
            return;
        };
        if late <= PAUSE {
            return;
        }
        for child in self.table.children.values_mut() {
            child.heartbeat = now;
            if let Some((at, _)) = &mut child.next_signal {
                *at = match child.stage {
                    // Its doom too waits: the death may be in the queue.
                    WorkerStage::Starting if child.kill_reason.is_none() => {
                        now + child.limits.boot_timeout
                    }
                    _ => (*at).max(now + GRACE_AFTER_PAUSE),
                };
            }
        }
        let late = HumanDuration(late);
        let text = format!("the master was paused for {late} or more: all deadlines start afresh");
        self.trouble(Level::Warn, text);
    }

    /// Sends a worker the signal that is due, and sets the next.
    fn signal(&mut self, pid: Pid) {
        let now = self.now;
        let child = self.child_mut(pid);
        let stuck = child.heartbeat_deadline().is_some_and(|at| at <= now);
        let signal = match child.next_signal {
            // A loop that is stuck hears of no order, and of TERM neither.
            Some((at, signal)) if at <= now && !stuck => signal,
            _ => Signal::SIGABRT,
        };
        if child.is_sigkill_sent {
            return self.outlived(pid);
        }
        child.is_sigkill_sent = signal == Signal::SIGKILL;
        child.next_signal = Some((now + kill_after(signal), Signal::SIGKILL));
        let (slot_id, starting) = (child.slot_id, child.stage == WorkerStage::Starting);
        let begins = child.kill_reason.is_none();
        // What is under way is told at a drain's deadline, as the worker could have ended it by itself.
        let overdue = child.drains() && child.ready_at.is_some();
        let examine = (stuck || starting || overdue) && begins;
        let reason = child
            .kill_reason
            .take()
            .unwrap_or_else(|| match child.stage {
                WorkerStage::Starting => {
                    let timeout = HumanDuration(child.limits.boot_timeout);
                    format!("not ready within boot-timeout ({timeout})")
                }
                WorkerStage::Ready | WorkerStage::Draining { .. } if stuck => {
                    let silent = HumanDuration(now - child.heartbeat);
                    let when = if child.drains() {
                        " while it drained"
                    } else {
                        ""
                    };
                    format!("event loop stuck for {silent}{when}")
                }
                WorkerStage::Draining { .. } if child.ready_at.is_none() => {
                    "not needed any more before it was ready".to_owned()
                }
                WorkerStage::Ready | WorkerStage::Draining { .. } => {
                    "not done by its drain deadline".to_owned()
                }
            });
        child.kill_reason = Some(reason.clone());
        let unready = child.ready_at.is_none() && child.drains();
        if examine {
            self.act(Action::Diagnose { pid });
        }
        self.act(Action::Kill { pid, signal });
        let (slot, pairs) = (slot_id.slot, log_fields(pid, slot_id));
        let role = slot.role();
        let text = format!("{role} {pid} (slot {slot}) gets {signal}: {reason} {pairs}");
        match unready && signal == Signal::SIGTERM {
            true => self.log(Level::Debug, text),
            false => self.trouble(Level::Warn, text),
        }
        if starting && begins && self.is_newcomer(slot_id) {
            self.newcomer_failed(&format!("{role} {pid} (slot {slot}): {reason}"));
        }
    }

    /// KILL has not ended it: the kernel holds it, for want of a disk or a file server mostly, and
    /// nobody can say for how long. Its slot is not kept empty for it.
    fn outlived(&mut self, pid: Pid) {
        let now = self.now;
        let child = self.child_mut(pid);
        child.next_signal = None;
        let (slot_id, limits, health) = (child.slot_id, child.limits, child.ready_for(now));
        let coming = self.table.is_coming(pid, slot_id);
        let follows = match coming || self.table.holds(pid, slot_id) {
            true => "its slot gets another one",
            false => "nothing waits for it",
        };
        self.act(Action::Diagnose { pid });
        let (slot, pairs) = (slot_id.slot, log_fields(pid, slot_id));
        let role = slot.role();
        let text = format!(
            "{role} {pid} (slot {slot}) is held by the kernel and does not end, though it was killed: \
             {follows} {pairs}"
        );
        self.trouble(Level::Error, text);
        if !coming && !self.table.holds(pid, slot_id) {
            return;
        }
        let child = self.child_mut(pid);
        child.stage = WorkerStage::Draining { deadline: now };
        child.stage_since = now;
        if self.is_newcomer(slot_id) && self.phase == ServerPhase::Serving {
            self.table.slots.remove(&slot_id);
            return self
                .newcomer_failed(&format!("{role} {pid} (slot {slot}) is held by the kernel"));
        }
        let due = self
            .tenure(slot_id)
            .throttle
            .death(health, &limits.throttle(), now);
        match coming {
            true => self.spawn_successor(slot_id, due),
            false => self.respawn(slot_id, due),
        }
    }
}
