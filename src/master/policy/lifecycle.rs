//! Handles the lifecycle of a child: forked, ready, retiring, dead. Also handles forks that were refused.
//!
//! Children may be broken or hostile. A report that does not fit the state of its sender is logged as a warning
//! and has no other effect.

use log::Level;
use nix::sys::signal::Signal;

use super::action::{AfterDeath, ChildIncident, Incident, NotReady};
use super::death_log;
use super::death_log::{Death, WorkerExit};
use super::event::{Exit, LastCall, Millis, PolicyLimits, StopMode};
use super::fleet::{Fleet, ServerPhase};
use super::keeper_rules::retire;
use super::shutdown::begin_drain;
use super::slots::{
    ChildRecord, KillReason, RecycleReason, RecycleState, SlotEntry, SlotId, SlotState, WorkerStage,
};
use crate::link::ids::Pid;
use crate::protocol::control::DeathKind;

impl Fleet {
    /// Handles a fork that was done.
    pub(crate) fn forked(&mut self, slot_id: SlotId, pid: Pid) {
        let (limits, now) = (self.limits_of(slot_id), self.now);
        let entry = self.forking(slot_id);
        let wanted = entry.is_active;
        entry.throttle.forked(now);
        *Self::forking_in(entry) = SlotState::Worker(pid);
        entry.since = now;
        let boot_deadline = (limits.boot_timeout > 0).then_some(now + limits.boot_timeout);
        let child = ChildRecord {
            slot_id,
            limits,
            forked_at: now,
            ready_at: None,
            stage: WorkerStage::Starting,
            stage_since: now,
            heartbeat: now,
            next_signal: boot_deadline.map(|at| (at, Signal::SIGKILL)),
            is_sigkill_sent: false,
            kill_reason: None,
            recycle: RecycleState::default(),
            retires_when_ready: false,
            has_ended_claims: false,
        };
        self.table.insert(pid, child);
        self.log(Level::Debug, ChildIncident::Started.of(pid, slot_id));
        if wanted {
            return;
        }
        // Its slot was given up during the fork.
        self.table.slots.remove(&slot_id);
        self.order_exit(
            pid,
            match self.phase {
                ServerPhase::Stopping { mode, .. } => mode,
                _ => StopMode::Retire,
            },
        );
    }

    /// Handles a fork that the system refused.
    pub(crate) fn fork_failed(&mut self, slot_id: SlotId, reason: String) {
        let now = self.now;
        let entry = self.forking(slot_id);
        let slot = slot_id.slot;
        if !entry.is_active {
            self.table.slots.remove(&slot_id);
            return;
        }
        let due = entry.throttle.record_refused_fork(now);
        entry.since = now;
        let is_successor = entry.successor.is_some();
        *Self::forking_in(entry) = SlotState::Throttled { until: due };
        if self.is_pending(slot_id) {
            return self.pending_failed(NotReady::ForkRefused(slot, reason));
        }
        if let Some(suppressed) = self.refusals.admit(now) {
            let incident = Incident::ForkRefused {
                slot,
                is_successor,
                reason,
                retry_in: due - now,
            };
            self.log_after(Level::Error, incident, suppressed);
        }
    }

    /// Handles the ready report of a child.
    pub(crate) fn ready(&mut self, pid: Pid) {
        let now = self.now;
        let Some(child) = self.table.children.get_mut(&pid) else {
            return self.warn_unexpected_report(pid, "ready");
        };
        if child.ready_at.is_some() {
            return self.warn_unexpected_report(pid, "ready for a second time");
        }
        child.ready_at = Some(now);
        child.heartbeat = now;
        let (slot_id, after) = (child.slot_id, now - child.forked_at);
        if let WorkerStage::Draining { deadline } = child.stage {
            // The child became ready before it read the order to exit, so it may have calls. These calls get the time
            // of the drain.
            begin_drain(child, deadline, now);
            return;
        }
        if child.kill_reason.is_some() {
            return; // Too late: the KILL is on its way.
        }
        child.stage = WorkerStage::Ready;
        child.stage_since = now;
        child.next_signal = None;
        let retires_when_ready = child.retires_when_ready;
        self.log(Level::Debug, ChildIncident::Ready(after).of(pid, slot_id));
        match self.table.is_successor(pid, slot_id) {
            true => self.promote_successor(pid, slot_id),
            false => self.pending_ready(slot_id),
        }
        if retires_when_ready {
            self.act(retire(pid));
        }
    }

    /// Handles the report of a worker that drains without an order. Its slot is filled at once.
    pub(crate) fn retiring(&mut self, pid: Pid) {
        let now = self.now;
        let Some(child) = self.table.children.get_mut(&pid) else {
            return self.warn_unexpected_report(pid, "retiring");
        };
        if child.drains() || child.kill_reason.is_some() {
            return; // Asked for twice, or too late.
        }
        if !child.slot_id.slot.is_worker() {
            // Workers use this process, so it serves until its successor does.
            return self.request_recycle(pid, RecycleReason::RetireRequested);
        }
        let (slot_id, health) = (child.slot_id, child.ready_for(now));
        let deadline = now + child.limits.drain_timeout;
        begin_drain(child, deadline, now);
        if let Some(entry) = self.table.slots.get_mut(&slot_id) {
            entry.throttle.record_ready_time(health);
        }
        self.log_limited(Level::Info, ChildIncident::Retires.of(pid, slot_id));
        match self.table.is_successor(pid, slot_id) {
            true => self.spawn_successor(slot_id, now),
            false => self.respawn(slot_id, now),
        }
    }

    /// Handles the heartbeat of a child's event loop.
    pub(crate) fn heartbeat(&mut self, pid: Pid, at: Millis) {
        // An unknown pid comes from an old scoreboard record. It is not a report.
        if let Some(child) = self.table.children.get_mut(&pid) {
            child.heartbeat = child.heartbeat.max(at.min(self.now));
        }
    }

    /// Handles the death of a child.
    pub(crate) fn died(
        &mut self,
        pid: Pid,
        name: Option<String>,
        how: Exit,
        last: Option<LastCall>,
        rss_bytes: u64,
        at: u64,
    ) {
        let Some(child) = self.table.children.remove(&pid) else {
            // A master that is PID 1 or a subreaper inherits children of other processes.
            return self.log(Level::Debug, Incident::UnknownReaped(pid));
        };
        let last = last.filter(|last| !last.method.is_empty());
        let death = Death {
            kind: match child.slot_id.slot {
                slot if slot.is_worker() => DeathKind::Worker,
                slot if slot.pool().is_some() => DeathKind::Pool,
                slot if slot.is_jobs() => DeathKind::Jobs,
                _ => DeathKind::Acceptor,
            },
            name,
            slot: child.slot_id.slot,
            pid,
            generation: child.slot_id.generation,
            how,
            uptime: self.now - child.forked_at,
            method: last.as_ref().map(|last| death_log::clean(&last.method)),
            call: last.as_ref().and_then(|last| last.call),
            job: last.and_then(|last| last.job),
            rss_bytes,
            reason: death_log::reason(&child, how),
            at,
        };
        if death.kind == DeathKind::Worker {
            self.worker_exits.push(exit_of(&child, how));
        }
        if self.table.holds(pid, child.slot_id) {
            self.died_in_its_slot(&child, &death);
        } else if self.table.is_successor(pid, child.slot_id) {
            self.successor_died(&child, &death);
        } else {
            self.log_ordered_death(&child, &death);
        }
        self.kept_pool_lost(pid, || NotReady::Died(Box::new(death.clone()), None));
        if !has_obeyed(&child, how) || child.recycle.evidence.is_some() {
            self.deaths.keep(death);
        }
    }

    /// Handles a death that was not ordered: the slot is filled again, or the start or reload fails.
    fn died_in_its_slot(&mut self, child: &ChildRecord, death: &Death) {
        let (slot_id, now) = (child.slot_id, self.now);
        let is_pending = self.is_pending(slot_id);
        let starting = child.ready_at.is_none();
        if is_pending && (starting || self.phase == ServerPhase::Serving) {
            // The table must forget the slot first, because the failure gives up all slots of the
            // generation.
            self.table.slots.remove(&slot_id);
            let death = Box::new(death.clone());
            let incident = Incident::Died(death.clone(), AfterDeath::Nothing);
            self.log_limited(Level::Warn, incident);
            // The deaths of its programs were recorded before its own death.
            let is_its = |it: &&Death| {
                (it.kind, &it.name) == (DeathKind::Program, &death.name)
                    && it.generation == death.generation
            };
            let program = self.deaths.iter().rev().find(is_its);
            let program = program.filter(|_| death.kind == DeathKind::Pool);
            let program = program.map(|it| (it.pid, it.reason.clone()));
            return self.pending_failed(NotReady::Died(death, program));
        }
        let limits = self.limits_of(slot_id);
        let entry = self.table.slots.get_mut(&slot_id);
        let entry = entry.expect("the caller has found this slot in the table");
        let due = entry
            .throttle
            .death(child.ready_for(now), &limits.throttle(), now);
        let young = entry.throttle.young_deaths();
        let follows = AfterDeath::Replacement(due - now, young);
        let incident = Incident::Died(Box::new(death.clone()), follows);
        match limits.respawn_max_delay {
            // If deaths are not throttled, log lines about them are not either.
            0 => self.log(Level::Error, incident),
            _ => self.log_limited(Level::Error, incident),
        }
        self.respawn(slot_id, due);
    }

    /// Logs a death that was ordered. It is a warning if the child did not end as ordered.
    fn log_ordered_death(&mut self, child: &ChildRecord, death: &Death) {
        let incident = Incident::Died(Box::new(death.clone()), AfterDeath::Nothing);
        match has_obeyed(child, death.how) {
            true => self.log(Level::Debug, incident),
            false => self.log_limited(Level::Warn, incident),
        }
    }

    fn warn_unexpected_report(&mut self, pid: Pid, report: &'static str) {
        self.log_limited(Level::Warn, Incident::ReportIgnored(pid, report));
    }

    fn forking(&mut self, slot_id: SlotId) -> &mut SlotEntry {
        let entry = self.table.slots.get_mut(&slot_id);
        let is_forking = |entry: &&mut SlotEntry| {
            entry.state == SlotState::Forking || entry.successor == Some(SlotState::Forking)
        };
        let entry = entry.filter(is_forking);
        entry.expect("a fork is reported once for each order")
    }

    /// Returns the state that the fork under way in a slot fills: the successor's, if there is one.
    fn forking_in(entry: &mut SlotEntry) -> &mut SlotState {
        entry.successor.as_mut().unwrap_or(&mut entry.state)
    }

    /// Returns the limits of a slot's generation; those of the serving one if its reload has failed.
    fn limits_of(&self, slot_id: SlotId) -> PolicyLimits {
        match &self.reload {
            Some(reload) if reload.generation == slot_id.generation => reload.limits,
            _ => self.limits,
        }
    }
}

/// Returns how the end of a worker is counted.
fn exit_of(child: &ChildRecord, how: Exit) -> WorkerExit {
    let is_stuck = child.recycle.evidence.is_some();
    match (&child.kill_reason, how) {
        (Some(KillReason::EventLoopStuck { .. }), _) => WorkerExit::Stuck,
        _ if is_stuck => WorkerExit::Stuck,
        (Some(KillReason::BootTimeout(_)), _) => WorkerExit::Boot,
        _ if has_obeyed(child, how) && child.recycle.request.is_some() => WorkerExit::Recycled,
        (Some(KillReason::NotNeeded | KillReason::DrainDeadline | KillReason::StopNow), _) => {
            WorkerExit::Ordered
        }
        _ if has_obeyed(child, how) => WorkerExit::Ordered,
        _ if child.ready_at.is_none() => WorkerExit::Boot,
        (_, Exit::Code(_)) => WorkerExit::Exit,
        (_, Exit::Signal { .. }) => WorkerExit::Signal,
    }
}

/// Returns whether a child ended as ordered, so that it gets no death record. A draining worker may end by
/// SIGTERM, because a service manager may send it to all processes.
fn has_obeyed(child: &ChildRecord, how: Exit) -> bool {
    let by_order =
        child.ready_at.is_some() && child.kill_reason.is_some() && how.is_signal(Signal::SIGQUIT);
    child.drains() && (how == Exit::Code(0) || how.is_signal(Signal::SIGTERM) || by_order)
}
