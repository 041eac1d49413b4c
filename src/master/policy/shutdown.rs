//! Orders children to exit: a drain with its deadline, a graceful stop, an immediate stop.
//!
//! This file gives the orders and sets the first signal for children that do not obey in time.
//! [`super::timeouts`] sends it. Other files decide when a child has to drain (reload, scale, retire).

use log::Level;
use nix::sys::signal::Signal;

use super::action::{Action, Incident, NotReady};
use super::event::{Event, Millis, StopMode};
use super::fleet::{Fleet, ServerPhase};
use super::slots::{ChildRecord, KillReason, SlotId, WorkerStage, begin_drain, kill_after};
use crate::link::ids::{Generation, Pid};

/// A second order to stop within this time is ignored: `timeout` and service managers send SIGTERM to a
/// process and to its group.
const STOP_DEBOUNCE: Millis = 100;

impl Fleet {
    /// Gives up the slots of a generation's workers from the slot `from` on, highest first, and orders
    /// their workers to exit. With slot 0 the acceptors are ordered to exit too.
    pub(crate) fn remove_slots(&mut self, generation: Generation, from: usize, mode: StopMode) {
        for slot_id in self.table.slots_of(generation).into_iter().rev() {
            let stays = match slot_id.slot.is_worker() {
                true => usize::from(slot_id.slot.0) < from,
                false => from > 0 || slot_id.is_pool(),
            };
            if stays {
                continue;
            }
            for pid in self.table.remove_slots(slot_id) {
                self.order_exit(pid, mode);
            }
        }
    }

    /// Gives up the slots of pool processes that no worker uses any more. Call it after each event. A
    /// generation's pool processes exit after its last worker; at a stop, after the last worker of all.
    /// Until then a pool process that dies is replaced, because calls wait for it.
    pub(crate) fn release_pools(&mut self) {
        let mode = match self.phase {
            ServerPhase::Stopping { mode, .. } => mode,
            _ => StopMode::Retire,
        };
        self.table.note_oldest_served();
        let is_stopping = matches!(self.phase, ServerPhase::Stopping { .. });
        let pending = self.reload.as_ref().map(|reload| reload.generation);
        let is_used = |slot_id: SlotId| match is_stopping {
            true => self.table.has_workers(|_| true),
            false => {
                let generation = slot_id.generation;
                let oldest = self.table.oldest_served(slot_id);
                generation == self.serving
                    || Some(generation) == pending
                    || self
                        .table
                        .has_workers(|of| (oldest..=generation).contains(&of))
            }
        };
        let unused: Vec<Pid> = (self.table.children.iter())
            .filter(|(_, child)| child.slot_id.is_pool() && !child.drains())
            .filter(|(_, child)| !is_used(child.slot_id))
            .map(|(pid, _)| *pid)
            .collect();
        let slots = self.table.slots.iter();
        let slots: Vec<SlotId> = slots
            .filter(|(id, entry)| entry.is_active && id.is_pool() && !is_used(**id))
            .map(|(slot_id, _)| *slot_id)
            .collect();
        for slot_id in slots {
            self.table.remove_slots(slot_id);
        }
        for pid in unused {
            self.order_exit(pid, mode);
        }
    }

    /// Orders a child that has no slot to exit. A child that is being ended by force needs no order.
    pub(crate) fn order_exit(&mut self, pid: Pid, mode: StopMode) {
        let now = self.now;
        let child = self.child_mut(pid);
        let mut deadline = now + child.limits.drain_timeout;
        if let WorkerStage::Draining { deadline: earlier } = child.stage {
            deadline = deadline.min(earlier);
        }
        begin_drain(child, deadline, now);
        if child.kill_reason.is_some() {
            return;
        }
        if mode != StopMode::AtOnce {
            let stop = mode == StopMode::Stop;
            return self.act(Action::Drain {
                pid,
                deadline,
                stop,
            });
        }
        // A child that does not handle SIGQUIT yet would dump a core.
        let signal = match child.ready_at {
            Some(_) => Signal::SIGQUIT,
            None => Signal::SIGTERM,
        };
        child.kill_reason = Some(KillReason::StopNow);
        child.next_signal = Some((now + kill_after(signal), Signal::SIGKILL));
        self.act(Action::Kill { pid, signal });
    }

    /// Schedules the stop. A later order replaces the earlier one.
    pub(crate) fn stop_after(&mut self, delay: Millis) {
        if matches!(self.phase, ServerPhase::Stopping { .. } | ServerPhase::Gone) {
            return;
        }
        self.stop_at = Some(self.now.saturating_add(delay));
        self.log(Level::Info, Incident::StopScheduled(delay));
    }

    /// Returns when the stop under way ends by force; `None` if there is none.
    pub fn stop_deadline(&self) -> Option<Millis> {
        self.stop_until
    }

    /// Handles a further order to stop when all children have left, but sessions without an acceptor may be
    /// there.
    pub(crate) fn hurry(&mut self, event: &Event) {
        let until = self.stop_until.unwrap_or(self.now);
        let debounced = (until + STOP_DEBOUNCE).saturating_sub(self.limits.drain_timeout);
        if *event == Event::StopNow || *event == Event::Stop && self.now >= debounced {
            self.stop_until = Some(until.min(self.now));
        }
    }

    /// Stops the server: gracefully the first time, unless `mode` says otherwise, and at once the second
    /// time. `reason` is the result of a start or reload that is still open.
    pub(crate) fn stop(&mut self, mut mode: StopMode, mut code: u8, reason: NotReady) {
        match self.phase {
            ServerPhase::Gone
            | ServerPhase::Stopping {
                mode: StopMode::AtOnce,
                ..
            } => return,
            ServerPhase::Stopping { since, .. }
                if mode == StopMode::Stop && self.now < since + STOP_DEBOUNCE =>
            {
                return;
            }
            ServerPhase::Stopping { code: first, .. } => (mode, code) = (StopMode::AtOnce, first),
            ServerPhase::StartUp | ServerPhase::Serving => {}
        }
        self.refuse_pending(reason);
        self.stop_at = None;
        let since = self.now;
        self.phase = ServerPhase::Stopping { mode, code, since };
        self.stop_until = Some(match mode {
            StopMode::AtOnce => since,
            _ => since + self.limits.drain_timeout,
        });
        // Pool processes exit after the workers that use them.
        let now_leaves = |child: &ChildRecord| !child.slot_id.is_pool() || mode == StopMode::AtOnce;
        let pids: Vec<Pid> = (self.table.children.iter())
            .filter(|(_, child)| now_leaves(child))
            .map(|(pid, _)| *pid)
            .collect();
        let is_worker = |pid: &&Pid| self.table.children[*pid].slot_id.slot.is_worker();
        let count = pids.iter().filter(is_worker).count();
        let incident = match mode {
            StopMode::AtOnce => Incident::StopsNow(count),
            _ => Incident::Stops(count, self.limits.drain_timeout),
        };
        self.log(Level::Info, incident);
        let slots: Vec<SlotId> = self.table.slots.keys().copied().collect();
        for slot_id in slots {
            self.table.remove_slots(slot_id);
        }
        // Workers of older generations too, because their connections have nowhere to go.
        for pid in pids {
            self.order_exit(pid, mode);
        }
    }
}
