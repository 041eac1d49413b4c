//! How workers leave when the master wants it: a drain with its deadline, the stop, the stop at once.
//!
//! Here the orders are given and the first signal of those who overstay is set; [`super::timeouts`]
//! sends it. What asks for a drain (reload, scale, retire) is decided elsewhere.

use log::Level;
use nix::sys::signal::Signal;

use super::event::{Action, HumanDuration, Millis, StopMode};
use super::fleet::{Fleet, ServerPhase};
use super::slots::{ChildRecord, SlotId, WorkerStage, begin_drain, kill_after};
use crate::link::ids::{Generation, Pid};
use crate::logging::pluralize;

/// Two orders to stop that come so close are one: `timeout` and service managers send TERM to a
/// process and to its group.
const STOP_DEBOUNCE: Millis = 100;

impl Fleet {
    /// Gives up a generation's slots of workers from a slot on: highest first, their workers leave.
    pub(crate) fn remove_slots(&mut self, generation: Generation, from: usize, leave: StopMode) {
        for slot_id in self.table.slots_of(generation).into_iter().rev() {
            if usize::from(slot_id.slot.0) < from || slot_id.is_pool() {
                continue;
            }
            for pid in self.table.remove_slots(slot_id) {
                self.order_exit(pid, leave);
            }
        }
    }

    /// Gives up the slots of pool processes that no worker uses any more: those of a generation whose
    /// last worker is gone, and at a stop all of them behind the last worker. To be asked after every
    /// event. Until then one that dies is replaced: calls wait for it.
    pub(crate) fn release_pools(&mut self) {
        let leave = match self.phase {
            ServerPhase::Stopping { leave, .. } => leave,
            _ => StopMode::Retire,
        };
        let is_stopping = matches!(self.phase, ServerPhase::Stopping { .. });
        let pending = self.reload.as_ref().map(|reload| reload.generation);
        let is_used = |generation: Generation| match is_stopping {
            true => self.table.has_workers(|_| true),
            false => {
                generation == self.serving
                    || Some(generation) == pending
                    || self.table.has_workers(|of| of == generation)
            }
        };
        let unused: Vec<Pid> = (self.table.children.iter())
            .filter(|(_, child)| child.slot_id.is_pool() && !child.drains())
            .filter(|(_, child)| !is_used(child.slot_id.generation))
            .map(|(pid, _)| *pid)
            .collect();
        let slots = self.table.slots.iter();
        let slots: Vec<SlotId> = slots
            .filter(|(id, tenure)| tenure.is_active && id.is_pool() && !is_used(id.generation))
            .map(|(slot_id, _)| *slot_id)
            .collect();
        for slot_id in slots {
            self.table.remove_slots(slot_id);
        }
        for pid in unused {
            self.order_exit(pid, leave);
        }
    }

    /// Tells a worker that holds no slot any more to leave. One that is being ended by force
    /// already needs no order.
    pub(crate) fn order_exit(&mut self, pid: Pid, leave: StopMode) {
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
        if leave != StopMode::AtOnce {
            let stop = leave == StopMode::Stop;
            return self.act(Action::Drain {
                pid,
                deadline,
                stop,
            });
        }
        // Before a worker handles it, QUIT would write a core.
        let signal = match child.ready_at {
            Some(_) => Signal::SIGQUIT,
            None => Signal::SIGTERM,
        };
        child.kill_reason = Some("the server stops now".to_owned());
        child.next_signal = Some((now + kill_after(signal), Signal::SIGKILL));
        self.act(Action::Kill { pid, signal });
    }

    /// Serves on for a while, and stops then. The last word counts.
    pub(crate) fn stop_after(&mut self, delay: Millis) {
        if matches!(self.phase, ServerPhase::Stopping { .. } | ServerPhase::Gone) {
            return;
        }
        self.stop_at = Some(self.now.saturating_add(delay));
        let text = format!(
            "stops in {}: serves until then, and is not ready for who asks",
            HumanDuration(delay)
        );
        self.log(Level::Info, text);
    }

    /// Ends everything, the first time gracefully unless told otherwise. `reason` is for whoever
    /// waits for a verdict.
    pub(crate) fn stop(&mut self, mut leave: StopMode, mut code: u8, reason: &str) {
        match self.phase {
            ServerPhase::Gone
            | ServerPhase::Stopping {
                leave: StopMode::AtOnce,
                ..
            } => return,
            ServerPhase::Stopping { since, .. }
                if leave == StopMode::Stop && self.now < since + STOP_DEBOUNCE =>
            {
                return;
            }
            ServerPhase::Stopping { code: first, .. } => (leave, code) = (StopMode::AtOnce, first),
            ServerPhase::StartUp | ServerPhase::Serving => {}
        }
        self.refuse_newcomers(reason);
        self.stop_at = None;
        let since = self.now;
        self.phase = ServerPhase::Stopping { leave, code, since };
        // Pool processes leave behind the workers that use them.
        let now_leaves =
            |child: &ChildRecord| !child.slot_id.is_pool() || leave == StopMode::AtOnce;
        let pids: Vec<Pid> = (self.table.children.iter())
            .filter(|(_, child)| now_leaves(child))
            .map(|(pid, _)| *pid)
            .collect();
        let how = match leave {
            StopMode::AtOnce => pluralize(pids.len(), "worker leaves now", "workers leave now"),
            StopMode::Stop | StopMode::Retire => {
                let drain = pluralize(pids.len(), "worker drains", "workers drain");
                format!(
                    "{drain} within {}",
                    HumanDuration(self.limits.drain_timeout)
                )
            }
        };
        self.log(Level::Info, format!("stopping: {how}"));
        let slots: Vec<SlotId> = self.table.slots.keys().copied().collect();
        for slot_id in slots {
            self.table.remove_slots(slot_id);
        }
        // Those of older generations too: their connections have nowhere to go any more.
        for pid in pids {
            self.order_exit(pid, leave);
        }
    }
}
