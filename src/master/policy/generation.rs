//! A generation on its way: start-up and reload, up to the verdict.
//!
//! *Start-up* forks all workers at once. A worker that can't be forked, dies before it is ready or
//! misses boot-timeout fails the start: the verdict says why, the rest is stopped, exit code 71. A
//! daemon that can't start must say so, not loop.
//!
//! *Reload* forks slot 0 first, the canary, and the pool processes; then the rest; when all are ready the verdict is given,
//! and only then the old generation drains. Any death before that, any refused fork, any missed
//! boot-timeout (which counts for each worker from its own fork) fails it: the new generation
//! drains, and the old one, which was replaced and throttled all the while as ever, goes on.

use log::Level;

use super::event::{Action, MAX_COUNT, Millis, PolicyLimits, StopMode};
use super::fleet::{Fleet, PendingReload, ServerPhase};
use super::slots::SlotId;
use crate::link::ids::{Generation, Slot};

/// The exit code when the first workers did not come up: as `Error::NotReady`.
const NOT_READY: u8 = 71;

impl Fleet {
    /// Starts the next generation with its canary.
    pub(crate) fn start_reload(&mut self, limits: PolicyLimits) {
        if !self.can_reload() {
            // The caller's own mistake; a verdict here would be taken for the running reload's.
            let text = "a reload came out of turn and is ignored".to_owned();
            return self.log(Level::Error, text);
        }
        let generation = self.last_generation.next();
        self.last_generation = generation;
        let count = limits.count.clamp(1, MAX_COUNT);
        self.reload = Some(PendingReload {
            generation,
            limits: PolicyLimits { count, ..limits },
            canary_ready: false,
        });
        self.add_slots(generation, 0, 1);
        self.add_pools(generation, limits.pools);
    }

    /// Whether the slot's generation still awaits its verdict.
    pub(crate) fn is_newcomer(&self, slot_id: SlotId) -> bool {
        match &self.reload {
            Some(reload) => reload.generation == slot_id.generation,
            None => self.phase == ServerPhase::StartUp,
        }
    }

    /// Whether somebody waits for the workers of a slot that is about to be forked.
    pub fn awaits(&self, slot: Slot, generation: Generation) -> bool {
        self.is_newcomer(SlotId { generation, slot })
    }

    /// A worker became ready: is it the one that was waited for?
    pub(crate) fn newcomer_ready(&mut self, slot_id: SlotId) {
        if !self.is_newcomer(slot_id) {
            return;
        }
        let generation = slot_id.generation;
        if let Some(reload) = &mut self.reload
            && !slot_id.is_pool()
            && !std::mem::replace(&mut reload.canary_ready, true)
        {
            let count = reload.limits.count;
            self.add_slots(generation, 1, count);
        }
        if !self.table.all_ready(generation) {
            return;
        }
        match self.reload.take() {
            None => {
                self.phase = ServerPhase::Serving;
                self.act(Action::StartUpDone(Ok(())));
            }
            Some(reload) => {
                let old = std::mem::replace(&mut self.serving, generation);
                self.limits = reload.limits;
                self.count = reload.limits.count;
                self.act(Action::ReloadDone(Ok(generation)));
                self.remove_slots(old, 0, StopMode::Retire);
            }
        }
        self.scale_as_deferred();
    }

    /// A worker whose generation awaits its verdict did not come up: this is the verdict.
    pub(crate) fn newcomer_failed(&mut self, reason: &str) {
        if self.phase == ServerPhase::StartUp {
            return self.stop(StopMode::AtOnce, NOT_READY, reason);
        }
        self.refuse_newcomers(reason);
        self.scale_as_deferred();
    }

    /// This program can't go on, and another one will with what it exports then: the reload under
    /// way is refused, what waited for its end is done. Forks that this orders, and those ordered
    /// before and not reported, are not to be done here.
    pub fn abandon_reload(&mut self, reason: &str, now: Millis) -> Vec<Action> {
        self.begin_event(now);
        if self.phase == ServerPhase::Serving {
            self.refuse_newcomers(reason);
            self.scale_as_deferred();
        }
        self.finish_event()
    }

    /// Gives the verdict that is still open, if any: no.
    pub(crate) fn refuse_newcomers(&mut self, reason: &str) {
        if self.phase == ServerPhase::StartUp {
            let text = format!("not every worker became ready: {reason}");
            self.act(Action::StartUpDone(Err(text)));
        }
        if let Some(PendingReload { generation, .. }) = self.reload.take() {
            let text = format!("generation {generation} did not become ready: {reason}");
            self.act(Action::ReloadDone(Err(text)));
            self.remove_slots(generation, 0, StopMode::Retire);
            // Its pool processes are not replaced: it has served nobody.
            for slot_id in self.table.slots_of(generation) {
                self.table.remove_slots(slot_id);
            }
        }
    }
}
