//! Starts a generation at start-up and at a reload, and decides whether the start or reload has succeeded.
//!
//! *Start-up* forks all children at once. If a fork is refused, or a child dies or misses `boot-timeout` before it is
//! ready, the start has failed. The reason is reported, the other children are stopped, and the master exits with
//! code 71. It does not retry, because the person or service manager that starts the daemon must see the error.
//!
//! *Reload* forks the worker of slot 0 (the canary), the pool processes and the acceptors first. When the canary is
//! ready, it forks the other workers. When all are ready, the reload has succeeded, and the old generation drains. A
//! reload fails for the same three reasons as a start (`boot-timeout` counts from the fork of each child). If it fails,
//! the new generation drains. The old generation serves throughout. Its crashed workers are respawned and throttled.
//!
//! A pool process may stay at a reload. Then it serves both generations. The reload waits until the pool process can
//! serve the new one, and fails if the pool process ends before that.

use log::Level;

use super::action::{Action, Incident, NotReady};
use super::death_log;
use super::event::{MAX_COUNT, Millis, PolicyLimits, PoolStep, StopMode};
use super::fleet::{Fleet, PendingPool, PendingReload, ServerPhase};
use super::slots::{SlotId, SlotState};
use crate::link::ids::{Generation, Pid, Slot};

/// The exit code if the first children did not become ready. It is the exit code of `Error::NotReady`.
const NOT_READY: u8 = 71;

impl Fleet {
    /// Starts the next generation with its canary.
    pub(crate) fn start_reload(&mut self, limits: PolicyLimits) {
        if !self.can_reload() {
            // This is a bug of the caller. It gets no result, because the caller would take that for the result of
            // the running reload.
            return self.log(Level::Error, Incident::ReloadIgnored);
        }
        let generation = self.last_generation.next();
        self.last_generation = generation;
        let count = limits.count.clamp(1, MAX_COUNT);
        self.reload = Some(PendingReload {
            generation,
            limits: PolicyLimits { count, ..limits },
            canary_ready: false,
            kept: Vec::new(),
            // Wait for twice boot-timeout: after boot-timeout the pool process itself reports why a program is not
            // ready.
            kept_until: self.now + 2 * limits.boot_timeout,
        });
        // This comes before the forks, because a new worker gets at its fork the list of pool processes that stay.
        let kept = std::mem::take(&mut self.may_stay).into_iter();
        let kept: Vec<Slot> = kept
            .filter_map(|pool| {
                let (generation, slot) = (self.serving, pool.from);
                let pid = self.serving_pid(SlotId { generation, slot })?;
                self.keep_pool(pid, pool.to);
                Some(pool.to)
            })
            .collect();
        self.add_slots(generation, 0, 1);
        for slot in limits.other_slots() {
            if !kept.contains(&slot) {
                self.add_slot(generation, slot);
            }
        }
    }

    /// Returns the child that serves in a slot, unless it has a successor.
    fn serving_pid(&self, slot_id: SlotId) -> Option<Pid> {
        let entry = self.table.slots.get(&slot_id)?;
        let SlotState::Worker(pid) = entry.state else {
            return None;
        };
        let is_alone = entry.is_active && entry.successor.is_none();
        (is_alone && self.table.children[&pid].serves()).then_some(pid)
    }

    /// Keeps a pool process at the reload that has begun.
    fn keep_pool(&mut self, pid: Pid, slot: Slot) {
        if let Some(reload) = &mut self.reload {
            reload.kept.push(PendingPool {
                pid,
                slot,
                is_ready: false,
            });
            let (step, at) = (PoolStep::Update, (slot, reload.generation));
            self.act(Action::Pool { pid, step, at });
        }
    }

    /// Handles the report of a pool process that stays. `outcome` is the reason if it cannot serve the new generation.
    pub(crate) fn pool_updated(
        &mut self,
        pid: Pid,
        generation: Generation,
        outcome: Result<(), String>,
    ) {
        let reload = self.reload.as_mut();
        let Some(reload) = reload.filter(|reload| reload.generation == generation) else {
            return; // The report is for an earlier reload.
        };
        let Some(pool) = reload.kept.iter_mut().find(|pool| pool.pid == pid) else {
            return;
        };
        match outcome {
            Ok(()) => {
                pool.is_ready = true;
                self.finish_if_ready(generation);
            }
            Err(reason) => {
                self.pending_failed(NotReady::PoolRefused(death_log::clean_lines(&reason)))
            }
        }
    }

    /// Handles a child that has lost its slot. If it is a pool process that stays, the reload has failed, and `reason`
    /// returns why.
    pub(crate) fn kept_pool_lost(&mut self, pid: Pid, reason: impl FnOnce() -> NotReady) {
        let Some(reload) = &mut self.reload else {
            return;
        };
        let before = reload.kept.len();
        reload.kept.retain(|pool| pool.pid != pid);
        if reload.kept.len() < before {
            self.pending_failed(reason());
        }
    }

    /// Returns when the reload fails because a pool process that stays is not ready.
    pub(crate) fn kept_pools_deadline(&self) -> Option<Millis> {
        let reload = self.reload.as_ref()?;
        let is_awaited = reload.kept.iter().any(|pool| !pool.is_ready);
        (is_awaited && reload.limits.boot_timeout > 0).then_some(reload.kept_until)
    }

    /// Fails the reload if the deadline of the pool processes that stay has passed.
    pub(crate) fn expire_kept_pools(&mut self) {
        if self.kept_pools_deadline().is_some_and(|at| at <= self.now) {
            self.pending_failed(NotReady::PoolSilent);
        }
    }

    /// Returns whether the start or reload of the slot's generation has no result yet.
    pub(crate) fn is_pending(&self, slot_id: SlotId) -> bool {
        match &self.reload {
            Some(reload) => reload.generation == slot_id.generation,
            None => self.phase == ServerPhase::StartUp,
        }
    }

    /// Returns whether a start or reload waits for the child that is about to be forked in a slot.
    pub fn awaits(&self, slot: Slot, generation: Generation) -> bool {
        self.is_pending(SlotId { generation, slot })
    }

    /// Handles the ready report of a child: forks the workers behind the canary, or ends the start or
    /// reload.
    pub(crate) fn pending_ready(&mut self, slot_id: SlotId) {
        if !self.is_pending(slot_id) {
            return;
        }
        let generation = slot_id.generation;
        if let Some(reload) = &mut self.reload
            && slot_id.slot.is_worker()
            && !std::mem::replace(&mut reload.canary_ready, true)
        {
            let count = reload.limits.count;
            self.add_slots(generation, 1, count);
        }
        self.finish_if_ready(generation);
    }

    /// Ends the start or reload with success if all its children are ready.
    fn finish_if_ready(&mut self, generation: Generation) {
        let mut kept = self.reload.iter().flat_map(|reload| &reload.kept);
        if kept.any(|pool| !pool.is_ready) || !self.table.all_ready(generation) {
            return;
        }
        let mut kept = self.reload.iter().flat_map(|reload| &reload.kept);
        if kept.any(|pool| !self.table.has_alone(pool.pid)) {
            // Its slot is about to get another process, which does not know the next generation.
            let reason = "a pool process that should stay is being replaced; try again";
            return self.pending_failed(NotReady::PoolRefused(reason.to_owned()));
        }
        match self.reload.take() {
            None => {
                self.phase = ServerPhase::Serving;
                self.act(Action::StartUpDone(Ok(())));
            }
            Some(reload) => {
                for &PendingPool { pid, slot, .. } in &reload.kept {
                    let to = SlotId { generation, slot };
                    self.table.move_pool(pid, to, reload.limits);
                    let (step, at) = (PoolStep::Move, (slot, generation));
                    self.act(Action::Pool { pid, step, at });
                }
                let old = std::mem::replace(&mut self.serving, generation);
                self.limits = reload.limits;
                self.count = reload.limits.count;
                let result = Ok(());
                self.act(Action::ReloadDone { generation, result });
                self.renew_observer();
                self.remove_slots(old, 0, StopMode::Retire);
                if std::mem::take(&mut self.has_foreign_pools) {
                    self.forget_foreign_pools(old);
                }
            }
        }
        self.scale_as_deferred();
    }

    /// Drops the slots for pool processes that the program before an upgrade has forked, because only the workers of
    /// that program use them.
    fn forget_foreign_pools(&mut self, generation: Generation) {
        for slot_id in self.table.slots_of(generation) {
            if slot_id.serves_workers() && self.serving_pid(slot_id).is_none() {
                self.table.remove_slot(slot_id);
            }
        }
    }

    /// Ends the start or reload with a failure.
    pub(crate) fn pending_failed(&mut self, reason: NotReady) {
        if self.phase == ServerPhase::StartUp {
            return self.stop(StopMode::AtOnce, NOT_READY, reason);
        }
        self.refuse_pending(reason);
        self.scale_as_deferred();
    }

    /// Gives up the reload under way, because this program fails and the old program continues with the exported
    /// state. The caller must not carry out any ordered fork after this, because the old program does it.
    pub fn abandon_reload(&mut self, reason: String, now: Millis) -> Vec<Action> {
        self.begin_event(now);
        if self.phase == ServerPhase::Serving {
            self.refuse_pending(NotReady::UpgradeFailed(reason));
            self.scale_as_deferred();
        }
        self.finish_event()
    }

    /// If a start or reload has no result yet, reports its failure.
    pub(crate) fn refuse_pending(&mut self, reason: NotReady) {
        if self.phase == ServerPhase::StartUp {
            self.act(Action::StartUpDone(Err(reason)));
        } else if let Some(PendingReload {
            generation, kept, ..
        }) = self.reload.take()
        {
            for PendingPool { pid, slot, .. } in kept {
                let (step, at) = (PoolStep::Revert, (slot, generation));
                self.act(Action::Pool { pid, step, at });
            }
            let result = Err(reason);
            self.act(Action::ReloadDone { generation, result });
            self.remove_slots(generation, 0, StopMode::Retire);
            // Its pool processes are not replaced, because no worker has used them.
            for slot_id in self.table.slots_of(generation) {
                self.table.remove_slot(slot_id);
            }
        }
    }
}
