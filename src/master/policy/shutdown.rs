//! Orders children to exit: a drain with its deadline, a graceful stop, an immediate stop.
//!
//! This file gives the orders, and sets the first signal for a child that does not obey in time. [`super::timeouts`]
//! sends the signal. Other files decide when a child has to drain (reload, scale, retire).

use log::Level;
use nix::sys::signal::Signal;

use super::action::{Action, Incident, NotReady};
use super::event::{Event, Millis, StopMode};
use super::fleet::{Fleet, ServerPhase};
use super::slots::{ChildRecord, KillReason, SlotId, WorkerStage, kill_after};
use crate::link::ids::{Generation, Pid};

/// A second order to stop within this time is ignored: `timeout` and service managers send SIGTERM to a
/// process and to its group.
const STOP_DEBOUNCE: Millis = 100;

/// The time from the drain deadline to SIGTERM. A worker ends its drain itself at the deadline, and this
/// gives it the time to exit.
const AFTER_DRAIN: Millis = 100;

/// The least time that a process which serves workers has to exit after the last worker at a stop. It covers the end of
/// its programs, and the last commit of a jobs process.
pub(crate) const AFTER_WORKERS: Millis = 3_000;

/// How long the ready report of a child may still be on its way when the child is ordered to exit.
const STARTING_GRACE: Millis = 500;

impl Fleet {
    /// Gives up the worker slots of a generation from the slot `from` on, highest first, and orders their workers to
    /// exit. If `from` is 0, the acceptors are ordered to exit too.
    pub(crate) fn remove_slots(&mut self, generation: Generation, from: usize, mode: StopMode) {
        for slot_id in self.table.slots_of(generation).into_iter().rev() {
            let stays = match slot_id.slot.is_worker() {
                true => usize::from(slot_id.slot.0) < from,
                false => from > 0 || slot_id.serves_workers(),
            };
            if stays {
                continue;
            }
            for pid in self.table.remove_slot(slot_id) {
                self.order_exit(pid, mode);
            }
        }
    }

    /// Gives up the slots of pool processes that no worker uses any more, and then the slot of the jobs process. Call
    /// it after each event. The pool processes of a generation exit after its last worker. At a stop they exit after
    /// the last worker of all generations. If a pool process dies before that, it is replaced, because calls wait for
    /// it.
    pub(crate) fn release_pools(&mut self) {
        let mode = match self.phase {
            ServerPhase::Stopping { mode, .. } => mode,
            _ => StopMode::Retire,
        };
        self.table.note_oldest_served();
        let is_stopping = matches!(self.phase, ServerPhase::Stopping { .. });
        let pending = self.reload.as_ref().map(|reload| reload.generation);
        let serving = self.serving;
        let stays = |generation| generation == serving || Some(generation) == pending;
        self.end_claims(|generation| is_stopping || !stays(generation));
        let is_used = |slot_id: SlotId| match is_stopping {
            true => self.table.has_users(slot_id, |_| true),
            false => {
                let generation = slot_id.generation;
                let oldest = self.table.oldest_served(slot_id);
                stays(generation)
                    || self
                        .table
                        .has_users(slot_id, |of| (oldest..=generation).contains(&of))
            }
        };
        let unused: Vec<Pid> = (self.table.children.iter())
            .filter(|(_, child)| child.slot_id.serves_workers() && !child.drains())
            .filter(|(_, child)| !is_used(child.slot_id))
            .map(|(pid, _)| *pid)
            .collect();
        let slots = self.table.slots.iter();
        let slots: Vec<SlotId> = slots
            .filter(|(id, entry)| entry.is_active && id.serves_workers() && !is_used(**id))
            .map(|(slot_id, _)| *slot_id)
            .collect();
        for slot_id in slots {
            self.table.remove_slot(slot_id);
        }
        for pid in unused {
            self.order_exit(pid, mode);
        }
    }

    /// Orders the jobs processes of generations that leave to claim nothing more. Otherwise pool processes, which serve
    /// until the last worker has exited, would begin attempts that have no time left.
    fn end_claims(&mut self, leaves: impl Fn(Generation) -> bool) {
        let children = self.table.children.iter_mut();
        let claiming: Vec<Pid> = children
            .filter(|(_, child)| child.slot_id.slot.is_jobs() && !child.has_ended_claims)
            .filter(|(_, child)| leaves(child.slot_id.generation))
            .map(|(pid, child)| {
                child.has_ended_claims = true;
                *pid
            })
            .collect();
        for pid in claiming {
            self.act(Action::EndClaims { pid });
        }
    }

    /// Orders a child to exit. Its slot was given up before. A child that is being ended by force needs no order.
    pub(crate) fn order_exit(&mut self, pid: Pid, mode: StopMode) {
        let now = self.now;
        let stopping_since = match self.phase {
            ServerPhase::Stopping { since, .. } => Some(since),
            _ => None,
        };
        let child = self.child_mut(pid);
        let stopping_since = stopping_since.filter(|_| child.slot_id.serves_workers());
        let mut deadline = now + child.limits.drain_timeout;
        if let Some(since) = stopping_since {
            // It exits after the workers, but the time of its attempts began with the stop.
            let of_stop = since + child.limits.drain_timeout;
            deadline = deadline.min(of_stop.max(now + AFTER_WORKERS));
        }
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
        // A child that is not ready may not handle SIGQUIT yet, and would dump a core.
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

    /// Returns when the stop under way kills the remaining children; `None` if there is no stop.
    pub fn stop_deadline(&self) -> Option<Millis> {
        self.stop_until
    }

    /// Handles a further order to stop when the policy has no children left. Sessions without an acceptor may still
    /// run, which the policy does not know. A second order to stop ends their time now.
    pub(crate) fn shorten_stop(&mut self, event: &Event) {
        let until = self.stop_until.unwrap_or(self.now);
        let debounced = (until + STOP_DEBOUNCE).saturating_sub(self.limits.drain_timeout);
        if *event == Event::StopNow || *event == Event::Stop && self.now >= debounced {
            self.stop_until = Some(until.min(self.now));
        }
    }

    /// Stops the server: as `mode` says the first time, and at once the second time. `code` is the exit code. If a
    /// start or reload has no result yet, it fails with `reason`.
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
        let exits_now =
            |child: &ChildRecord| !child.slot_id.serves_workers() || mode == StopMode::AtOnce;
        let pids: Vec<Pid> = (self.table.children.iter())
            .filter(|(_, child)| exits_now(child))
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
            self.table.remove_slot(slot_id);
        }
        // Workers of older generations must exit too, because no worker will adopt their connections.
        for pid in pids {
            self.order_exit(pid, mode);
        }
    }
}

/// Puts a child into the draining stage, and sets the signal that it gets if it has not exited after the deadline.
pub(crate) fn begin_drain(child: &mut ChildRecord, deadline: Millis, now: Millis) {
    if !child.drains() {
        child.stage_since = now;
    }
    child.stage = WorkerStage::Draining { deadline };
    if child.kill_reason.is_some() {
        return; // It is being ended by force, which is sooner.
    }
    child.next_signal = Some(match child.ready_at {
        Some(_) => (deadline + AFTER_DRAIN, Signal::SIGTERM),
        // A child that is not ready has no call to finish, and may not read orders for a long time. If its ready
        // report is in transit, it arrives within this time.
        None => (deadline.min(now + STARTING_GRACE), Signal::SIGTERM),
    });
}
