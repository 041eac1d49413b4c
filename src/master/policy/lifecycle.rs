//! A worker's life: forked, ready, retiring, dead; and a fork that was refused.
//!
//! Reports come from processes that may be broken: one that fits nothing is a warning, never more.

use log::Level;
use nix::sys::signal::Signal;

use super::death_log;
use super::death_log::Death;
use super::event::{Exit, HumanDuration, Millis, PolicyLimits, StopMode};
use super::fleet::{Fleet, ServerPhase};
use super::slots::{
    ChildRecord, RecycleState, SlotEntry, SlotId, SlotState, WorkerStage, begin_drain, log_fields,
};
use crate::link::ids::Pid;
use crate::logging::pluralize;
use crate::throttle::limiter::with_suppressed_count;

impl Fleet {
    /// A fork that was ordered was done.
    pub(crate) fn forked(&mut self, slot_id: SlotId, pid: Pid) {
        let (limits, now) = (self.limits_of(slot_id), self.now);
        let tenure = self.forking(slot_id);
        let wanted = tenure.is_active;
        tenure.throttle.forked(now);
        *Self::forking_in(tenure) = SlotState::Worker(pid);
        tenure.since = now;
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
        };
        self.table.insert(pid, child);
        self.log(
            Level::Debug,
            format!(
                "{} {pid} starts {}",
                slot_id.slot.role(),
                log_fields(pid, slot_id)
            ),
        );
        if wanted {
            return;
        }
        // Its slot was given up while it was forked.
        self.table.slots.remove(&slot_id);
        self.order_exit(
            pid,
            match self.phase {
                ServerPhase::Stopping { leave, .. } => leave,
                _ => StopMode::Retire,
            },
        );
    }

    /// A fork that was ordered was refused.
    pub(crate) fn fork_failed(&mut self, slot_id: SlotId, reason: &str) {
        let now = self.now;
        let tenure = self.forking(slot_id);
        let slot = slot_id.slot;
        if !tenure.is_active {
            self.table.slots.remove(&slot_id);
            return;
        }
        let due = tenure.throttle.record_refused_fork(now);
        tenure.since = now;
        let is_successor = tenure.successor.is_some();
        *Self::forking_in(tenure) = SlotState::Throttled { until: due };
        if self.is_newcomer(slot_id) {
            return self.newcomer_failed(&format!("slot {slot} could not be forked: {reason}"));
        }
        if let Some(more) = self.refusals.admit(now) {
            let lack = if is_successor { "successor" } else { "worker" };
            let text = format!(
                "slot {slot} has no {lack}: fork was refused ({reason}); next try in {}; if it goes \
                 on, raise the limit on processes (ulimit -u, pids.max, TasksMax) slot={slot}",
                HumanDuration(due - now),
            );
            self.log(Level::Error, with_suppressed_count(text, more));
        }
    }

    /// A worker says that it serves.
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
        let (slot_id, took) = (child.slot_id, HumanDuration(now - child.forked_at));
        if let WorkerStage::Draining { deadline } = child.stage {
            // It was ready before it read the order, so it may have calls: they get their time.
            begin_drain(child, deadline, now);
            return;
        }
        if child.kill_reason.is_some() {
            return; // Too late: the KILL is on its way.
        }
        child.stage = WorkerStage::Ready;
        child.stage_since = now;
        child.next_signal = None;
        let text = format!(
            "{} {pid} is ready after {took} {}",
            slot_id.slot.role(),
            log_fields(pid, slot_id)
        );
        self.log(Level::Debug, text);
        if self.table.is_coming(pid, slot_id) {
            return self.promote_successor(pid, slot_id);
        }
        self.newcomer_ready(slot_id);
    }

    /// A worker says that it drains by itself: a fresh one takes its slot at once.
    pub(crate) fn retiring(&mut self, pid: Pid) {
        let now = self.now;
        let Some(child) = self.table.children.get_mut(&pid) else {
            return self.warn_unexpected_report(pid, "retiring");
        };
        if child.drains() || child.kill_reason.is_some() {
            return; // Asked for twice, or too late.
        }
        if child.slot_id.is_pool() {
            // Workers use it: it serves until its successor does.
            return self.request_recycle(pid, "it was asked to retire".to_owned(), false);
        }
        let (slot_id, health) = (child.slot_id, child.ready_for(now));
        let deadline = now + child.limits.drain_timeout;
        begin_drain(child, deadline, now);
        if let Some(tenure) = self.table.slots.get_mut(&slot_id) {
            tenure.throttle.record_ready_time(health);
        }
        let (slot, pairs) = (slot_id.slot, log_fields(pid, slot_id));
        let text = format!("worker {pid} retires, slot {slot} gets a fresh one {pairs}");
        self.trouble(Level::Info, text);
        match self.table.is_coming(pid, slot_id) {
            true => self.spawn_successor(slot_id, now),
            false => self.respawn(slot_id, now),
        }
    }

    /// A worker's event loop was alive at that moment.
    pub(crate) fn heartbeat(&mut self, pid: Pid, at: Millis) {
        // An unknown pid is a scoreboard record that nobody uses: no report at all.
        if let Some(child) = self.table.children.get_mut(&pid) {
            child.heartbeat = child.heartbeat.max(at.min(self.now));
        }
    }

    /// A child is gone.
    pub(crate) fn died(
        &mut self,
        pid: Pid,
        how: Exit,
        method: Option<&str>,
        rss_bytes: u64,
        at: u64,
    ) {
        let Some(child) = self.table.children.remove(&pid) else {
            // As PID 1 or subreaper the master inherits other people's children.
            return self.log(Level::Debug, format!("reaped {pid}, which was no worker"));
        };
        let death = Death {
            slot: child.slot_id.slot,
            pid,
            generation: child.slot_id.generation,
            how,
            uptime: self.now - child.forked_at,
            method: method.filter(|name| !name.is_empty()).map(death_log::clean),
            rss_bytes,
            reason: death_log::reason(&child, how),
            at,
        };
        if self.table.holds(pid, child.slot_id) {
            self.died_in_its_slot(&child, &death);
        } else if self.table.is_coming(pid, child.slot_id) {
            self.successor_died(&child, &death);
        } else {
            self.left(&child, &death);
        }
        if !as_asked(&child, how) || child.recycle.evidence.is_some() {
            self.deaths.keep(death);
        }
    }

    /// Nobody asked for this end.
    fn died_in_its_slot(&mut self, child: &ChildRecord, death: &Death) {
        let (slot_id, now) = (child.slot_id, self.now);
        let newcomer = self.is_newcomer(slot_id);
        let starting = child.ready_at.is_none();
        if newcomer && (starting || self.phase == ServerPhase::Serving) {
            // The table must forget it first: the verdict closes all slots of its generation.
            self.table.slots.remove(&slot_id);
            let text = format!("{} {}", death.sentence(), death.log_fields());
            self.trouble(Level::Warn, text);
            return self.newcomer_failed(&death.sentence());
        }
        let limits = self.limits_of(slot_id);
        let tenure = self.table.slots.get_mut(&slot_id);
        let tenure = tenure.expect("the caller saw the worker in this slot_id");
        let due = tenure
            .throttle
            .death(child.ready_for(now), &limits.throttle(), now);
        let young = tenure.throttle.young_deaths();
        let follows = match due - now {
            0 => "replaced at once".to_owned(),
            wait => {
                let deaths = pluralize(young as usize, "young death", "young deaths");
                format!("next try in {}: {deaths}", HumanDuration(wait))
            }
        };
        let text = format!("{}; {follows} {}", death.sentence(), death.log_fields());
        match limits.respawn_max_delay {
            // No throttle was asked for, so none on the log either.
            0 => self.log(Level::Error, text),
            _ => self.trouble(Level::Error, text),
        }
        self.respawn(slot_id, due);
    }

    /// Its end was asked for; only one out of order is worth a line.
    fn left(&mut self, child: &ChildRecord, death: &Death) {
        let text = format!("{} {}", death.sentence(), death.log_fields());
        match as_asked(child, death.how) {
            true => self.log(Level::Debug, text),
            false => self.trouble(Level::Warn, text),
        }
    }

    fn warn_unexpected_report(&mut self, pid: Pid, report: &str) {
        let text = format!("a report that fits no worker is ignored: {report} pid={pid}");
        self.trouble(Level::Warn, text);
    }

    fn forking(&mut self, slot_id: SlotId) -> &mut SlotEntry {
        let tenure = self.table.slots.get_mut(&slot_id);
        let is_forking = |tenure: &&mut SlotEntry| {
            tenure.state == SlotState::Forking || tenure.successor == Some(SlotState::Forking)
        };
        let tenure = tenure.filter(is_forking);
        tenure.expect("a fork is reported once for each order")
    }

    /// Whom the fork under way in a slot is for: the successor, if there is to be one.
    fn forking_in(tenure: &mut SlotEntry) -> &mut SlotState {
        tenure.successor.as_mut().unwrap_or(&mut tenure.state)
    }

    /// The limits of a slot's generation; one that was given up lives by the serving ones.
    fn limits_of(&self, slot_id: SlotId) -> PolicyLimits {
        match &self.reload {
            Some(reload) if reload.generation == slot_id.generation => reload.limits,
            _ => self.limits,
        }
    }
}

/// Whether a worker ended the way it was told to: no death record, no alarm. TERM to one that drains only
/// hurries it: a service manager may send it to all processes.
fn as_asked(child: &ChildRecord, how: Exit) -> bool {
    let by_order =
        child.ready_at.is_some() && child.kill_reason.is_some() && how.is_signal(Signal::SIGQUIT);
    child.drains() && (how == Exit::Code(0) || how.is_signal(Signal::SIGTERM) || by_order)
}
