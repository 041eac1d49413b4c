//! Handles deadlines: forks after a throttle, children that exceed their time, event loops that are stuck.
//!
//! Each child has at most one next signal ([`super::slots::ChildRecord::next_signal`]). This file sends it and sets
//! the one after it. A master that was stopped itself (SIGSTOP, a frozen cgroup) finds all deadlines in the past, and
//! unread reports of its children. Then no child is ended, and the deadlines of all children are extended.

use log::Level;
use nix::sys::signal::Signal;

use super::action::{Action, ChildIncident, ChildName, Incident, NotReady};
use super::event::Millis;
use super::fleet::{Fleet, ServerPhase};
use super::slots::{ChildRecord, KillReason, SlotEntry, SlotId, WorkerStage, kill_after};
use crate::link::ids::Pid;

/// If the master handles a deadline later than this, it was stopped.
const PAUSE: Millis = 1_000;
/// The shortest time that each child gets after such a pause.
const GRACE_AFTER_PAUSE: Millis = 1_000;

impl Fleet {
    /// Handles all deadlines that have passed.
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
            // An earlier signal of this loop may have failed a reload, so that this child now has a later deadline.
            if is_due(self.child_mut(pid)) {
                self.signal(pid);
            }
        }
        let due: Vec<SlotId> = (self.table.slots.iter())
            .filter(|(_, entry)| entry.fork_at().is_some_and(|at| at <= now))
            .map(|(slot_id, _)| *slot_id)
            .collect();
        for slot_id in due {
            match self.entry(slot_id).successor {
                Some(_) => self.spawn_successor(slot_id, now),
                None => self.respawn(slot_id, now),
            }
        }
        self.expire_kept_pools();
        self.pass_recycling();
        let mut actions = self.keepers.pass_time(now);
        actions.extend(self.observer.pass_time(now));
        for action in actions {
            self.act(action);
        }
        if let Some(more) = self.problem_lines.flush(now) {
            self.log(Level::Warn, Incident::SuppressedTroubles(more));
        }
        if let Some(more) = self.refusals.flush(now) {
            self.log(Level::Warn, Incident::SuppressedForkRefusals(more));
        }
    }

    /// Returns the earliest deadline.
    pub(crate) fn earliest(&self) -> Option<Millis> {
        let children = self.table.children.values().filter_map(ChildRecord::due_at);
        let slots = self.table.slots.values().filter_map(SlotEntry::fork_at);
        children
            .chain(slots)
            .chain(self.next_recycling())
            .chain(self.keepers.deadline())
            .chain(self.observer.deadline())
            .chain(self.problem_lines.flush_at())
            .chain(self.refusals.flush_at())
            .chain(self.stop_at)
            .chain(self.kept_pools_deadline())
            .min()
    }

    /// Extends the deadlines of all children, and of the reload, if the master was paused.
    pub(crate) fn extend_deadlines_after_pause(&mut self) {
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
                    // A child that got a signal gets time too. It may have died, and is reaped only after this.
                    WorkerStage::Starting if child.kill_reason.is_none() => {
                        now + child.limits.boot_timeout
                    }
                    _ => (*at).max(now + GRACE_AFTER_PAUSE),
                };
            }
        }
        if let Some(reload) = &mut self.reload {
            reload.kept_until = now + 2 * reload.limits.boot_timeout;
        }
        self.keepers.extend_deadlines(late);
        if let Some(until) = self
            .stop_until
            .as_mut()
            .filter(|until| **until > now - late)
        {
            *until = (*until).max(now + GRACE_AFTER_PAUSE);
        }
        self.log_limited(Level::Warn, Incident::MasterPaused(late));
    }

    /// Sends a child the signal that is due, and sets the next.
    fn signal(&mut self, pid: Pid) {
        let now = self.now;
        let child = self.child_mut(pid);
        let stuck = child.heartbeat_deadline().is_some_and(|at| at <= now);
        let signal = match child.next_signal {
            // An event loop that is stuck handles neither orders nor SIGTERM.
            Some((at, signal)) if at <= now && !stuck => signal,
            _ => Signal::SIGABRT,
        };
        if child.is_sigkill_sent {
            return self.survived_kill(pid);
        }
        child.is_sigkill_sent = signal == Signal::SIGKILL;
        child.next_signal = Some((now + kill_after(signal), Signal::SIGKILL));
        let (slot_id, starting) = (child.slot_id, child.stage == WorkerStage::Starting);
        let begins = child.kill_reason.is_none();
        // For a worker that did not complete its drain, find out what it is running.
        let overdue = child.drains() && child.ready_at.is_some();
        let examine = (stuck || starting || overdue) && begins;
        let reason = child
            .kill_reason
            .take()
            .unwrap_or_else(|| match child.stage {
                WorkerStage::Starting => KillReason::BootTimeout(child.limits.boot_timeout),
                WorkerStage::Ready | WorkerStage::Draining { .. } if stuck => {
                    KillReason::EventLoopStuck {
                        silent: now - child.heartbeat,
                        is_draining: child.drains(),
                    }
                }
                WorkerStage::Draining { .. } if child.ready_at.is_none() => KillReason::NotNeeded,
                WorkerStage::Ready | WorkerStage::Draining { .. } => KillReason::DrainDeadline,
            });
        child.kill_reason = Some(reason.clone());
        let unready = child.ready_at.is_none() && child.drains();
        if examine {
            self.act(Action::Diagnose { pid });
        }
        self.act(Action::Kill { pid, signal });
        let incident = ChildIncident::Signalled(signal, reason.clone()).of(pid, slot_id);
        match unready && signal == Signal::SIGTERM {
            true => self.log(Level::Debug, incident),
            false => self.log_limited(Level::Warn, incident),
        }
        if starting && begins && self.is_pending(slot_id) {
            let child = ChildName { pid, slot_id };
            self.pending_failed(NotReady::Killed(child, reason));
        }
    }

    /// Handles a child that SIGKILL did not end. Usually it waits in the kernel for a disk or a file server, without
    /// a time limit. Its slot gets another child at once.
    fn survived_kill(&mut self, pid: Pid) {
        let now = self.now;
        let child = self.child_mut(pid);
        child.next_signal = None;
        let (slot_id, limits, health) = (child.slot_id, child.limits, child.ready_for(now));
        let is_successor = self.table.is_successor(pid, slot_id);
        let is_replaced = is_successor || self.table.holds(pid, slot_id);
        self.act(Action::Diagnose { pid });
        let incident = match is_replaced {
            true => ChildIncident::SurvivedKill,
            false => ChildIncident::SurvivedKillUnneeded,
        };
        self.log_limited(Level::Error, incident.of(pid, slot_id));
        if !is_replaced {
            return;
        }
        let child = self.child_mut(pid);
        child.stage = WorkerStage::Draining { deadline: now };
        child.stage_since = now;
        if self.is_pending(slot_id) && self.phase == ServerPhase::Serving {
            self.table.slots.remove(&slot_id);
            return self.pending_failed(NotReady::SurvivedKill(ChildName { pid, slot_id }));
        }
        let due = self
            .entry(slot_id)
            .throttle
            .death(health, &limits.throttle(), now);
        match is_successor {
            true => self.spawn_successor(slot_id, due),
            false => self.respawn(slot_id, due),
        }
        self.kept_pool_lost(pid, || NotReady::SurvivedKill(ChildName { pid, slot_id }));
    }
}
