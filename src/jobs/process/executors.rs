//! Keeps the executors of a jobs process with the attempts that they have, and settles how these ended.
//!
//! An executor is a worker or a pool process with a link. Its reports are settled in the store, and answered after the
//! commit. If its link ends, its attempts wait for what the master says about its death. Pure, except that it reads
//! what executors show in the scoreboard: each function returns what is to be done.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use super::claims::ClaimPlan;
use super::executor::{
    Actions, CAUSE_MS, EndedProcesses, Executor, ExecutorAction, ExecutorLimits, end_of_dead,
    end_of_report, monotonic_of,
};
use super::ticket::Ticket;
use crate::config::JobsConfig;
use crate::jobs::policy::states::{AttemptCause, AttemptEnd, JobFate};
use crate::jobs::record::{InstanceId, ProcessMark};
use crate::jobs::rules;
use crate::jobs::store::request::{CancelReply, SettleReply, Settlement, StoreRequest};
use crate::link::attempt_frame::{AttemptEndKind, AttemptFrame, AttemptId, AttemptReport};
use crate::link::executor_end::{ExecutorCause, attempt_mark};
use crate::link::scoreboard::WorkerRecord;
use crate::protocol::job_id::JobId;
use crate::sys::random::random_bytes;

/// When a failed read is tried again. A store that is open again is read at once.
const READ_AGAIN_MS: u64 = 1_000;

/// The executors of a jobs process.
#[derive(Debug)]
pub struct Executors {
    pub(super) instance: InstanceId,
    pub(super) config: JobsConfig,
    pub(super) plan: ClaimPlan,
    pub(super) limits: ExecutorLimits,
    /// By link. An executor whose link has ended stays until its attempts are settled.
    pub(super) all: BTreeMap<u64, Executor>,
    /// Why processes have ended. Their attempts may be in the store.
    pub(super) ended: EndedProcesses,
    /// Dead processes whose attempts another jobs process must settle, and since when each is known to be dead.
    pub(super) foreign_dead: BTreeMap<i32, u64>,
    /// When the store must be read again.
    pub(super) look_ms: Option<u64>,
    /// How many reads of the store were begun, and how many of them have ended. They end in their order.
    reads_begun: u64,
    reads_ended: u64,
    /// The attempts that were settled while a read was under way.
    settled_meanwhile: BTreeSet<AttemptId>,
    /// The executor that gets the next look, so that all get a turn.
    pub(super) turn: u64,
    /// Whether nothing more is claimed.
    pub(super) is_leaving: bool,
}

impl Executors {
    pub fn new(
        instance: InstanceId,
        config: JobsConfig,
        plan: ClaimPlan,
        limits: ExecutorLimits,
    ) -> Self {
        Executors {
            instance,
            config,
            plan,
            limits,
            all: BTreeMap::new(),
            ended: EndedProcesses::default(),
            foreign_dead: BTreeMap::new(),
            look_ms: None,
            reads_begun: 0,
            reads_ended: 0,
            settled_meanwhile: BTreeSet::new(),
            turn: 0,
            is_leaving: false,
        }
    }

    /// Returns the plan of claims, to record when jobs are due.
    pub fn plan(&mut self) -> &mut ClaimPlan {
        &mut self.plan
    }

    /// Claims nothing more, because this process exits.
    pub fn leave(&mut self) {
        self.is_leaving = true;
    }

    /// Returns whether no attempt is left whose end must be stored.
    pub fn is_settled(&self) -> bool {
        self.all.values().all(|executor| {
            executor.attempts.is_empty()
                && executor.reports.is_empty()
                && executor.claiming.is_none()
        })
    }

    /// Returns when `pass_time` must be called next, in milliseconds (CLOCK_MONOTONIC).
    pub fn next_ms(&self) -> Option<u64> {
        let executors = self.all.values();
        let unexplained = executors.filter(|executor| executor.cause.is_none());
        let lost = unexplained.filter_map(|executor| Some(executor.ended_ms? + CAUSE_MS));
        let claims = self.plan.next_ms().filter(|_| !self.is_leaving);
        lost.chain(claims).chain(self.look_ms).min()
    }

    /// Lets the attempts be read that run according to the store. Pass them to `comparison::compare`.
    pub fn read_running(&mut self) -> ExecutorAction {
        self.reads_begun += 1;
        ExecutorAction::ReadRunning
    }

    /// Returns whether a read is under way.
    pub fn is_reading(&self) -> bool {
        self.reads_begun > self.reads_ended
    }

    /// Lets the store be read again at this time at the latest.
    pub(super) fn look_at(&mut self, at_ms: u64) {
        self.look_ms = Some(self.look_ms.map_or(at_ms, |before| before.min(at_ms)));
    }

    /// Records that a read has ended. Returns its number, and the attempts that were settled meanwhile.
    pub(super) fn end_read(&mut self) -> (u64, BTreeSet<AttemptId>) {
        self.reads_ended += 1;
        let settled = match self.reads_begun == self.reads_ended {
            true => std::mem::take(&mut self.settled_meanwhile),
            false => self.settled_meanwhile.clone(),
        };
        (self.reads_ended, settled)
    }

    /// Records that a read has failed. The executors that wait for it get the result of the next one. That begins after
    /// a delay, because a read of a store that is away fails at once.
    pub fn read_failed(&mut self, now_ms: u64) {
        let (failed, _) = self.end_read();
        let waiting = self.all.values_mut();
        for executor in waiting.filter(|it| it.needs_read == failed) {
            executor.needs_read = failed + 1;
        }
        self.look_at(now_ms + READ_AGAIN_MS);
    }

    /// Reads the store for an executor that has named attempts, or has sent reports about them.
    fn read_for(&mut self, link: u64) -> Actions {
        let read = self.read_running();
        if let Some(executor) = self.all.get_mut(&link) {
            executor.needs_read = self.reads_begun;
        }
        vec![read]
    }

    /// Returns the link of the executor with this pid: the newest one if it has several.
    pub(super) fn link_of(&self, pid: i32) -> Option<u64> {
        let links = self
            .all_of(pid)
            .max_by_key(|(link, it)| (it.record.is_some(), *link));
        links.map(|(link, _)| link)
    }

    /// Returns the entries of the executor with this pid.
    pub(super) fn all_of(&self, pid: i32) -> impl Iterator<Item = (u64, &Executor)> {
        let all = self.all.iter().map(|(link, executor)| (*link, executor));
        all.filter(move |(_, executor)| executor.pid == pid)
    }

    /// Handles a frame of a link whose process has this record. Returns `None` if it is invalid.
    pub fn receive(
        &mut self,
        link: u64,
        record: &'static WorkerRecord,
        frame: AttemptFrame<'_>,
        now_ms: u64,
    ) -> Option<Actions> {
        if let AttemptFrame::Executor(hello) = frame {
            let cause = self.ended.named(hello.pid, now_ms);
            let (pid, lane) = (hello.pid, hello.lane as usize);
            let before: Vec<u64> = self.all_of(pid).map(|(link, _)| link).collect();
            let (mut kept, mut actions) = (BTreeMap::new(), Actions::new());
            for before in before.into_iter().filter(|before| *before != link) {
                if let Some(executor) = self.all.get_mut(&before) {
                    // It has another link now. If another process had the pid before, its attempts are not named.
                    let named = hello.attempts.iter();
                    kept.extend(named.filter_map(|id| executor.attempts.remove_entry(id)));
                    if executor.record.is_none() {
                        actions.extend(self.retire(before));
                    }
                }
            }
            let executor = self.all.entry(link);
            let executor = executor.or_insert_with(|| Executor::linked((pid, lane), record));
            executor.cause = executor.cause.or(cause);
            executor.attempts.extend(kept);
            // The others are tracked when the store was read, because it has their methods.
            executor.named.extend(hello.attempts);
            self.plan.has_room(lane, now_ms);
            actions.extend(self.read_for(link));
            return Some(actions);
        }
        let executor = self.all.get_mut(&link)?;
        match frame {
            AttemptFrame::End(report) => {
                let report = AttemptReport {
                    json: report.json.map(|json| Cow::Owned(json.into_owned())),
                    ..report
                };
                match executor.attempts.contains_key(&report.id) {
                    true => Some(self.settle_report(link, report, now_ms)),
                    false => {
                        executor.reports.push(report);
                        Some(self.read_for(link))
                    }
                }
            }
            AttemptFrame::Process {
                id,
                pid,
                start_time,
            } => {
                let process = ProcessMark { pid, start_time };
                let request = StoreRequest::NoteProcess {
                    id: JobId(id.job),
                    token: id.token,
                    process,
                };
                Some(vec![ExecutorAction::Store(request, Ticket::Process)])
            }
            AttemptFrame::Start(_)
            | AttemptFrame::Stored(_)
            | AttemptFrame::Cancel(_)
            | AttemptFrame::Executor(_) => None,
        }
    }

    /// Records that an executor begins no further attempt.
    pub fn leaves(&mut self, link: u64) {
        if let Some(executor) = self.all.get_mut(&link) {
            executor.is_leaving = true;
        }
    }

    /// Records that an executor has room for more attempts.
    pub fn offers(&mut self, link: u64, now_ms: u64) {
        if let Some(executor) = self.all.get(&link) {
            self.plan.has_room(executor.lane, now_ms);
        }
    }

    /// Handles the end of a link. All that came over it was handled.
    pub fn link_ended(&mut self, link: u64, now_ms: u64) -> Actions {
        let Some(executor) = self.all.get_mut(&link) else {
            return Actions::new();
        };
        executor.record = None;
        executor.ended_ms = Some(now_ms);
        self.settle_dead(link, now_ms)
    }

    /// Settles the attempts of an ended link that the executor has not named over its next link. All that came over
    /// the ended link was handled, so they never began.
    pub(super) fn retire(&mut self, link: u64) -> Actions {
        let Some(executor) = self.all.get_mut(&link) else {
            return Actions::new();
        };
        // The attempts that a claim under way still brings are handled in the same way.
        executor.cause = Some(ExecutorCause::Ordered);
        (executor.named, executor.reports) = Default::default();
        let ids: Vec<AttemptId> = executor.attempts.keys().copied().collect();
        let end = || AttemptEnd::without_answer(AttemptCause::NeverBegun, None);
        let settled = ids
            .into_iter()
            .flat_map(|id| self.settle(link, id, end(), 0));
        let actions = settled.collect();
        self.forget_settled(link);
        actions
    }

    /// Settles the attempts of an executor, if it has died and the cause is known.
    pub(super) fn settle_dead(&mut self, link: u64, now_ms: u64) -> Actions {
        let executor = self.all.get(&link);
        let Some((executor, cause)) = executor.and_then(|it| Some((it, it.end()?))) else {
            return Actions::new();
        };
        let is_named = |id: &AttemptId| cause == ExecutorCause::Attempt(attempt_mark(*id));
        let dead: Vec<(AttemptId, AttemptEnd)> = (executor.attempts.iter())
            .filter(|(_, attempt)| !attempt.is_settling)
            .map(|(id, attempt)| (*id, end_of_dead(attempt, cause, is_named(id), now_ms)))
            .collect();
        let mut actions = Actions::new();
        for (id, end) in dead {
            actions.extend(self.settle(link, id, end, 0));
        }
        self.forget_settled(link);
        actions
    }

    /// Settles the report of an executor about one of its attempts.
    pub(super) fn settle_report(
        &mut self,
        link: u64,
        report: AttemptReport<'static>,
        now_ms: u64,
    ) -> Actions {
        let Some(executor) = self.all.get(&link) else {
            return Actions::new();
        };
        match executor.attempts.get(&report.id) {
            Some(attempt) if report.kind == AttemptEndKind::NeverBegun => {
                self.plan.refused(executor.pid, &attempt.method, now_ms);
            }
            // Its place is free. The next claim is stored together with this end.
            _ => self.plan.attempt_ended(executor.lane, now_ms),
        }
        let (id, took_us) = (report.id, report.took_us);
        self.settle(link, id, end_of_report(report), took_us)
    }

    /// Lets the end of an attempt be stored.
    pub(super) fn settle(
        &mut self,
        link: u64,
        id: AttemptId,
        end: AttemptEnd,
        took_us: u64,
    ) -> Actions {
        let attempt = self.all.get_mut(&link);
        let Some(attempt) = attempt.and_then(|it| it.attempts.get_mut(&id)) else {
            return Actions::new();
        };
        // The report was sent again. The answer to the first one is the answer to both.
        if std::mem::replace(&mut attempt.is_settling, true) {
            return Actions::new();
        }
        let count = ExecutorAction::Count(attempt.method.clone(), end.cause, took_us);
        let request = StoreRequest::Settle(Settlement {
            id: JobId(id.job),
            token: id.token,
            end,
            rules: rules::retry_rules(&self.config, &attempt.method),
            jitter: random_bytes().map_or(0, u16::from_ne_bytes),
        });
        vec![count, ExecutorAction::Store(request, Ticket::Settle(id))]
    }

    /// Handles a stored end of an attempt. `now` is the monotonic time and the time of the store, in milliseconds.
    pub fn settled(&mut self, id: AttemptId, reply: &SettleReply, now: (u64, u64)) -> Actions {
        let mut actions = Actions::new();
        let found = self.all.iter_mut().find_map(|(link, executor)| {
            let attempt = executor.attempts.remove(&id)?;
            Some((*link, executor.record.is_some(), executor.lane, attempt))
        });
        let Some((link, is_linked, lane, attempt)) = found else {
            return actions;
        };
        if self.is_reading() {
            self.settled_meanwhile.insert(id);
        }
        match reply {
            SettleReply::Stored(JobFate::Wait { due_ms }) => {
                self.plan
                    .add_due(&attempt.method, monotonic_of(*due_ms, now), 1);
            }
            SettleReply::Stored(JobFate::End { state, reason }) => {
                actions.push(ExecutorAction::JobEnded {
                    job: JobId(id.job),
                    method: attempt.method,
                    end: (*state, *reason),
                    attempts: attempt.number,
                });
            }
            SettleReply::Repeated => {}
            SettleReply::Stale { current } => {
                actions.push(ExecutorAction::CountStale);
                let why = match *current == Some(id.token) {
                    true => "the attempt had another end before",
                    false => "the job was claimed again",
                };
                let (job, token) = (JobId(id.job), id.token);
                let current = current.map_or_else(|| "none".to_owned(), |it| it.to_string());
                log::warn!("outcome refused: {why} job={job} token={token} current={current}");
            }
        }
        if is_linked {
            actions.push(ExecutorAction::Send(link, AttemptFrame::Stored(id)));
        }
        self.plan.attempt_ended(lane, now.0);
        self.forget_settled(link);
        actions
    }

    /// Removes an attempt whose end cannot be stored, because the store is broken. Tells its executor, which must not
    /// wait for that: after a restart the attempt counts as lost.
    pub fn not_settled(&mut self, id: AttemptId) -> Actions {
        let told = self.all.iter_mut().filter_map(|(link, executor)| {
            executor.attempts.remove(&id)?;
            let stored = AttemptFrame::Stored(id);
            (executor.record).map(|_| ExecutorAction::Send(*link, stored))
        });
        told.collect()
    }

    /// Removes a dead executor whose attempts are settled.
    pub(super) fn forget_settled(&mut self, link: u64) {
        let is_over = self.all.get(&link).is_some_and(|executor| {
            let is_done = executor.attempts.is_empty() && executor.claiming.is_none();
            is_done && executor.end().is_some()
        });
        if is_over {
            self.all.remove(&link);
        }
    }

    /// Handles the cancel request of a client. If an attempt of the job runs, returns the cancel for its executor.
    pub fn cancelled(&self, job: JobId, reply: &CancelReply) -> Actions {
        let CancelReply::Requested { owner, token } = *reply else {
            return Actions::new();
        };
        let id = AttemptId { job: job.0, token };
        let found = self.all.iter().find(|(_, executor)| {
            let is_owner = executor.pid == owner.executor && self.instance == owner.instance;
            is_owner && executor.record.is_some()
        });
        let cancel = |(link, _): (&u64, _)| ExecutorAction::Send(*link, AttemptFrame::Cancel(id));
        found.map(cancel).into_iter().collect()
    }

    /// Returns how many due jobs of each lane wait for room, as this process shows them in the scoreboard.
    pub fn waiting_in(&self, lane: usize) -> usize {
        match self.is_leaving {
            true => 0,
            false => self.plan.waiting_in(lane),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "executors_tests.rs"]
mod tests;
