//! Keeps jobs in memory: the model that the tests compare engines with.
//!
//! It is as simple as possible: a list of jobs in the order of their enqueue, searched from the front. It has
//! no durability and no faults.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use super::error::StoreError;
use super::request::*;
use super::{Engine, LIST_PAGE, StoreReader};
use crate::jobs::policy::UnixMs;
use crate::jobs::policy::enqueue::NewJob;
use crate::jobs::policy::retention::RetentionRules;
use crate::jobs::policy::states::{
    self, AttemptCause, AttemptEnd, EndReason, JobCounters, JobFate, JobState, RetryRules,
};
use crate::jobs::policy::turns;
use crate::jobs::record::{AttemptOwner, InstanceId, JobDetails, JobRecord, ProcessMark};
use crate::protocol::job_id::JobId;
use crate::sys::lock::lock;

/// Returns the milliseconds since 1970.
pub type ModelClock = Box<dyn Fn() -> UnixMs + Send>;

#[derive(Debug, Clone)]
struct ModelJob {
    details: JobDetails,
    is_cancel_requested: bool,
}

impl ModelJob {
    fn is_live(&self) -> bool {
        !self.details.record.state.is_ended()
    }
}

#[derive(Debug, Default)]
struct ModelState {
    jobs: BTreeMap<u64, ModelJob>,
    paused: BTreeSet<String>,
}

/// The engine in memory.
pub struct ModelEngine {
    state: Arc<Mutex<ModelState>>,
    clock: ModelClock,
    facts: StoreFacts,
    limits: StoreLimits,
}

impl ModelEngine {
    pub fn new(limits: StoreLimits, clock: ModelClock) -> Self {
        ModelEngine {
            state: Arc::default(),
            clock,
            facts: StoreFacts {
                location: "memory".into(),
                schema: (1, 0),
                is_durable: false,
                waiting: 0,
                running: 0,
            },
            limits,
        }
    }

    fn run(&self, state: &mut ModelState, request: &StoreRequest, now: UnixMs) -> StoreReply {
        match request {
            StoreRequest::Join(instance) => StoreReply::Joined(state.join(instance.id, now)),
            StoreRequest::Leave(_) => StoreReply::Left,
            StoreRequest::Enqueue(jobs) => {
                StoreReply::Enqueued(state.enqueue(jobs, self.limits.max_jobs, now))
            }
            StoreRequest::Claim(request) => StoreReply::Claimed(state.claim(request, now)),
            StoreRequest::NoteProcess { id, token, process } => {
                let attempt = state.by_id(*id).filter(|job| {
                    job.details.record.state == JobState::Running && job.details.token == *token
                });
                StoreReply::Noted(
                    attempt
                        .map(|job| job.details.process = Some(*process))
                        .is_some(),
                )
            }
            StoreRequest::Settle(settlement) => StoreReply::Settled(state.settle(settlement, now)),
            StoreRequest::Cancel(id) => StoreReply::Cancelled(state.cancel(*id, now)),
            StoreRequest::Retry(selection) => {
                let most = self.limits.max_jobs;
                StoreReply::Retried(
                    state.select(selection, |state, seq| state.retry(seq, most, now)),
                )
            }
            StoreRequest::Purge(selection) => {
                StoreReply::Purged(state.select(selection, |state, seq| {
                    let found = state.jobs[&seq].details.record.state;
                    if !found.is_ended() {
                        return Some(LeftAlone::Is(found));
                    }
                    state.jobs.remove(&seq);
                    None
                }))
            }
            StoreRequest::Pause { method, is_paused } => {
                match is_paused {
                    true => state.paused.insert(method.clone()),
                    false => state.paused.remove(method),
                };
                StoreReply::Paused
            }
            StoreRequest::Import(jobs) => {
                let stored = jobs.iter().filter(|job| state.import(job));
                StoreReply::Imported(stored.count())
            }
        }
    }
}

impl ModelState {
    fn by_id(&mut self, id: JobId) -> Option<&mut ModelJob> {
        let mut jobs = self.jobs.values_mut();
        jobs.find(|job| job.details.record.id == id)
    }

    fn live(&self) -> u64 {
        self.jobs.values().filter(|job| job.is_live()).count() as u64
    }

    /// Returns the sequence number of the live job with this key.
    fn live_with_key(&self, method: &str, key: &str) -> Option<u64> {
        let mut jobs = self.jobs.iter();
        let found = jobs.find(|(_, job)| {
            let record = &job.details.record;
            job.is_live() && record.method == method && record.key.as_deref() == Some(key)
        });
        found.map(|(seq, _)| *seq)
    }

    fn enqueue(&mut self, jobs: &[NewJob], max_jobs: u64, now: UnixMs) -> EnqueueReply {
        let before = self.jobs.clone();
        let mut stored = Vec::new();
        for (index, job) in jobs.iter().enumerate() {
            match self.enqueue_one(job, max_jobs, now) {
                Ok(job) => stored.push(job),
                Err(refusal) => {
                    self.jobs = before;
                    return match refusal {
                        EnqueueReply::Conflict { id, .. } => EnqueueReply::Conflict { index, id },
                        other => other,
                    };
                }
            }
        }
        EnqueueReply::Stored(stored)
    }

    fn enqueue_one(
        &mut self,
        job: &NewJob,
        max_jobs: u64,
        now: UnixMs,
    ) -> Result<EnqueuedJob, EnqueueReply> {
        let existing = |record: &JobRecord| EnqueuedJob {
            id: record.id,
            state: record.state,
            is_new: false,
            due_ms: record.due_ms,
        };
        if let Some(known) = self.by_id(job.id) {
            let record = &known.details.record;
            let is_same = record.method == job.method && known.details.params == job.params;
            return match is_same {
                true => Ok(existing(record)),
                false => Err(EnqueueReply::Conflict {
                    index: 0,
                    id: job.id,
                }),
            };
        }
        let twin = (job.key.as_ref()).and_then(|key| self.live_with_key(&job.method, key));
        if let Some(seq) = twin {
            return Ok(existing(&self.jobs[&seq].details.record));
        }
        if self.live() >= max_jobs {
            return Err(EnqueueReply::TooMany);
        }
        let record = JobRecord {
            id: job.id,
            method: job.method.clone(),
            state: JobState::Waiting,
            counters: JobCounters {
                max_attempts: job.max_attempts,
                ..JobCounters::default()
            },
            priority: job.priority,
            key: job.key.clone(),
            created_ms: now,
            due_ms: job.due.at(now),
            started_ms: None,
            finished_ms: None,
            expires_ms: job.expires_ms.map(|expires| now + expires),
            reason: None,
            cause: None,
            json: None,
        };
        let mut stored = existing(&record);
        stored.is_new = true;
        self.push(JobDetails {
            record,
            params: job.params.clone(),
            timeout_ms: job.timeout_ms,
            token: 0,
            trace: job.trace.clone(),
            owner: None,
            process: None,
        });
        Ok(stored)
    }

    fn push(&mut self, details: JobDetails) {
        let last = self.jobs.last_key_value().map_or(0, |(seq, _)| *seq);
        let job = ModelJob {
            details,
            is_cancel_requested: false,
        };
        self.jobs.insert(last + 1, job);
    }

    fn claim(&mut self, request: &ClaimRequest, now: UnixMs) -> Vec<ClaimedJob> {
        let claimed = turns::deal(&request.shares, request.most, |method| {
            Ok::<_, std::convert::Infallible>(self.take(method, request.owner, now))
        });
        claimed.unwrap_or_default()
    }

    fn take(&mut self, method: &str, owner: AttemptOwner, now: UnixMs) -> Option<ClaimedJob> {
        if self.paused.contains(method) {
            return None;
        }
        let due = self.jobs.iter().filter(|(_, job)| {
            let record = &job.details.record;
            record.state == JobState::Waiting
                && record.method == method
                && record.due_ms <= now
                && record.expires_ms.is_none_or(|expires| expires > now)
        });
        let first = due.min_by_key(|(seq, job)| {
            let record = &job.details.record;
            (-record.priority, record.due_ms, **seq)
        });
        let seq = *first?.0;
        let details = &mut self.jobs.get_mut(&seq)?.details;
        details.token += 1;
        (details.owner, details.process) = (Some(owner), None);
        let record = &mut details.record;
        record.state = JobState::Running;
        record.counters.attempt += 1;
        record.started_ms = Some(now);
        Some(ClaimedJob {
            id: record.id,
            token: details.token,
            method: method.to_owned(),
            params: details.params.clone(),
            attempt: record.counters.attempt,
            max_attempts: record.counters.max_attempts,
            timeout_ms: details.timeout_ms,
            trace: details.trace.clone(),
            due_ms: record.due_ms,
        })
    }

    fn settle(&mut self, settlement: &Settlement, now: UnixMs) -> SettleReply {
        let Some(job) = self.by_id(settlement.id) else {
            return SettleReply::Stale { current: None };
        };
        let details = &job.details;
        let is_current = details.token == settlement.token;
        if is_current && details.record.state == JobState::Running {
            let chance = (now, settlement.jitter);
            return SettleReply::Stored(job.end_attempt(
                &settlement.end,
                &settlement.rules,
                chance,
            ));
        }
        match is_current && details.record.cause == Some(settlement.end.cause) {
            true => SettleReply::Repeated,
            false => SettleReply::Stale {
                current: Some(details.token),
            },
        }
    }

    fn cancel(&mut self, id: JobId, now: UnixMs) -> CancelReply {
        let Some(job) = self.by_id(id) else {
            return CancelReply::NoSuchJob;
        };
        match (job.details.record.state, job.details.owner) {
            (JobState::Waiting, _) => {
                job.end(JobState::Cancelled, None, now);
                let method = job.details.record.method.clone();
                CancelReply::Ended { method }
            }
            (JobState::Running, Some(owner)) => {
                job.is_cancel_requested = true;
                let token = job.details.token;
                CancelReply::Requested { owner, token }
            }
            _ => CancelReply::WasEnded,
        }
    }

    fn join(&mut self, own: InstanceId, now: UnixMs) -> Vec<FreedAttempt> {
        let error = r#"{"code":-32003,"name":"crashed","message":"the server that ran this attempt ended","started":true}"#;
        let end = AttemptEnd::without_answer(AttemptCause::Lost, Some(error.into()));
        let rules = RetryRules {
            backoff_ms: 0,
            max_backoff_ms: 0,
            max_crashes: u32::MAX,
            max_result: usize::MAX,
        };
        let mut freed = Vec::new();
        for job in self.jobs.values_mut() {
            if job.details.owner.is_none_or(|owner| owner.instance == own) {
                continue;
            }
            let fate = job.end_attempt(&end, &rules, (now, 0));
            freed.push(FreedAttempt {
                id: job.details.record.id,
                method: job.details.record.method.clone(),
                token: job.details.token,
                fate,
            });
        }
        freed
    }

    fn retry(&mut self, seq: u64, max_jobs: u64, now: UnixMs) -> Option<LeftAlone> {
        let record = &self.jobs[&seq].details.record;
        if !record.state.may_wait_again() {
            return Some(LeftAlone::Is(record.state));
        }
        if let Some(key) = &record.key
            && self.live_with_key(&record.method, key).is_some()
        {
            return Some(LeftAlone::KeyInUse);
        }
        if self.live() >= max_jobs {
            return Some(LeftAlone::TooMany);
        }
        let job = self.jobs.get_mut(&seq)?;
        job.is_cancel_requested = false;
        let record = &mut job.details.record;
        record.state = JobState::Waiting;
        record.counters = JobCounters {
            max_attempts: record.counters.max_attempts,
            ..JobCounters::default()
        };
        record.due_ms = now;
        (record.finished_ms, record.expires_ms, record.reason) = (None, None, None);
        None
    }

    fn import(&mut self, job: &JobDetails) -> bool {
        let record = &job.record;
        let is_live = !record.state.is_ended();
        let twin = (record.key.as_ref()).filter(|_| is_live);
        let twin = twin.and_then(|key| self.live_with_key(&record.method, key));
        if self.by_id(record.id).is_some() || twin.is_some() {
            return false;
        }
        let mut details = job.clone();
        (details.owner, details.process) = (None, None);
        if details.record.state == JobState::Running {
            details.record.state = JobState::Waiting;
            details.record.cause = Some(AttemptCause::Lost);
        }
        self.push(details);
        true
    }

    fn select(
        &mut self,
        selection: &JobSelection,
        mut act: impl FnMut(&mut Self, u64) -> Option<LeftAlone>,
    ) -> Selected {
        let mut selected = Selected::default();
        let mut unknown = Vec::new();
        let chosen: Vec<(JobId, Option<u64>)> = match selection {
            JobSelection::Ids(ids) => ids.iter().map(|id| (*id, None)).collect(),
            JobSelection::Ended {
                state,
                method,
                most,
                after,
            } => {
                let (chosen, next) = self.ended(*state, method.as_deref(), (*most, *after));
                selected.next = next;
                let id = |seq: u64| self.jobs[&seq].details.record.id;
                chosen.into_iter().map(|seq| (id(seq), Some(seq))).collect()
            }
        };
        for (id, seq) in chosen {
            let found = || {
                let mut jobs = self.jobs.iter();
                jobs.find(|(_, job)| job.details.record.id == id)
                    .map(|(seq, _)| *seq)
            };
            let Some(seq) = seq.or_else(found) else {
                unknown.push((id, LeftAlone::NoSuchJob));
                continue;
            };
            match act(self, seq) {
                None => selected.done.push(id),
                Some(why) => selected.left.push((id, why)),
            }
        }
        selected.left.extend(unknown);
        selected
    }

    /// Returns ended jobs in the order of their end, and where to continue.
    fn ended(
        &self,
        state: JobState,
        method: Option<&str>,
        (most, after): (usize, Option<ListCursor>),
    ) -> (Vec<u64>, Option<ListCursor>) {
        let after = after.unwrap_or_default();
        let mut places: Vec<ListCursor> = (self.jobs.iter())
            .filter(|(_, job)| state.is_ended() && job.details.record.state == state)
            .map(|(seq, job)| ListCursor {
                end_ms: job.details.record.finished_ms.unwrap_or_default(),
                seq: *seq,
            })
            .filter(|place| *place > after)
            .collect();
        places.sort_unstable();
        let (mut chosen, mut last) = (Vec::new(), None);
        for place in places {
            if chosen.len() == most {
                return (chosen, last);
            }
            last = Some(place);
            let own = &self.jobs[&place.seq].details.record.method;
            if method.is_none_or(|method| method == own) {
                chosen.push(place.seq);
            }
        }
        let next = last.filter(|_| chosen.len() == most);
        (chosen, next)
    }
}

impl ModelJob {
    fn end_attempt(
        &mut self,
        end: &AttemptEnd,
        rules: &RetryRules,
        chance: (UnixMs, u16),
    ) -> JobFate {
        let record = &mut self.details.record;
        let (counters, fate) = states::after_attempt(
            record.counters,
            self.is_cancel_requested,
            end,
            rules,
            chance,
        );
        record.counters = counters;
        record.cause = Some(end.cause);
        if let Some(json) = states::kept_json(end, rules) {
            record.json = Some(json.into());
        }
        match fate {
            JobFate::Wait { due_ms } => {
                (record.state, record.due_ms) = (JobState::Waiting, due_ms);
                self.is_cancel_requested = false;
            }
            JobFate::End { state, reason } => self.end(state, reason, chance.0),
        }
        (self.details.owner, self.details.process) = (None, None);
        fate
    }

    fn end(&mut self, state: JobState, reason: Option<EndReason>, now: UnixMs) {
        let record = &mut self.details.record;
        (record.state, record.reason) = (state, reason);
        record.finished_ms = Some(now);
    }
}

impl Engine for ModelEngine {
    fn now_ms(&mut self) -> Result<UnixMs, StoreError> {
        Ok((self.clock)())
    }

    fn facts(&self) -> &StoreFacts {
        &self.facts
    }

    fn secret(&self) -> &[u8] {
        b"model"
    }

    fn set_limits(&mut self, limits: StoreLimits) {
        self.limits = limits;
    }

    fn execute(&mut self, requests: &[StoreRequest]) -> Result<Vec<StoreReply>, StoreError> {
        let now = (self.clock)();
        let mut state = lock(&self.state);
        let replies = requests
            .iter()
            .map(|request| self.run(&mut state, request, now));
        Ok(replies.collect())
    }

    fn after_commit(&mut self) -> Result<(), StoreError> {
        Ok(())
    }

    fn maintain(&mut self, rules: &RetentionRules) -> Result<Maintained, StoreError> {
        let now = (self.clock)();
        let mut state = lock(&self.state);
        let mut expired: Vec<(UnixMs, EndedJob)> = Vec::new();
        for job in state.jobs.values_mut() {
            let record = &job.details.record;
            let Some(expires) = record.expires_ms.filter(|expires| *expires <= now) else {
                continue;
            };
            if record.state != JobState::Waiting {
                continue;
            }
            let ended = EndedJob {
                id: record.id,
                method: record.method.clone(),
                state: JobState::Dead,
                reason: Some(EndReason::Expired),
            };
            job.end(ended.state, ended.reason, now);
            expired.push((expires, ended));
        }
        expired.sort_by_key(|(expires, _)| *expires);
        let before = state.jobs.len();
        state.jobs.retain(|_, job| {
            let record = &job.details.record;
            let end = record.finished_ms;
            !end.is_some_and(|end| rules.is_over(&record.method, record.state, end, now))
        });
        Ok(Maintained {
            expired: expired.into_iter().map(|(_, ended)| ended).collect(),
            removed: (before - state.jobs.len()) as u64,
            size: 0,
            is_full: false,
            is_complete: true,
        })
    }

    fn next_event_ms(&mut self, methods: &[&str]) -> Result<Option<UnixMs>, StoreError> {
        let state = lock(&self.state);
        let waiting = state.jobs.values().map(|job| &job.details.record);
        let waiting = waiting.filter(|record| record.state == JobState::Waiting);
        let events = waiting.flat_map(|record| {
            let is_due =
                methods.contains(&&*record.method) && !state.paused.contains(&record.method);
            [Some(record.due_ms).filter(|_| is_due), record.expires_ms]
        });
        Ok(events.flatten().min())
    }

    fn leftovers(&mut self, own: InstanceId) -> Result<Vec<ProcessMark>, StoreError> {
        let state = lock(&self.state);
        let jobs = state.jobs.values().map(|job| &job.details);
        let foreign = jobs.filter(|job| job.owner.is_some_and(|owner| owner.instance != own));
        Ok(foreign.filter_map(|job| job.process).collect())
    }

    fn reader(&self) -> Result<Box<dyn StoreReader>, StoreError> {
        Ok(Box::new(ModelReader(Arc::clone(&self.state))))
    }

    fn close(self: Box<Self>) -> Result<(), StoreError> {
        Ok(())
    }
}

struct ModelReader(Arc<Mutex<ModelState>>);

impl StoreReader for ModelReader {
    fn record(&mut self, id: JobId) -> Result<Option<JobRecord>, StoreError> {
        Ok(self.details(id)?.map(|job| job.record))
    }

    fn details(&mut self, id: JobId) -> Result<Option<JobDetails>, StoreError> {
        Ok(lock(&self.0).by_id(id).map(|job| job.details.clone()))
    }

    fn list(&mut self, filter: &ListFilter, most: usize) -> Result<ListPage, StoreError> {
        let (state, most) = (lock(&self.0), most.min(LIST_PAGE));
        let method = filter.method.as_deref();
        if let Some(ended) = filter.state.filter(|state| state.is_ended()) {
            let (chosen, next) = state.ended(ended, method, (most, filter.after));
            let record = |seq: &u64| state.jobs[seq].details.record.clone();
            return Ok(ListPage {
                jobs: chosen.iter().map(record).collect(),
                next,
            });
        }
        let after = filter.after.unwrap_or_default().seq;
        let mut page = ListPage::default();
        for (seq, job) in state.jobs.range(after + 1..) {
            let record = &job.details.record;
            let is_listed = filter.state.is_none_or(|state| state == record.state)
                && method.is_none_or(|method| method == record.method);
            if is_listed {
                page.jobs.push(record.clone());
            }
            if page.jobs.len() == most {
                page.next = Some(ListCursor {
                    end_ms: 0,
                    seq: *seq,
                });
                break;
            }
        }
        Ok(page)
    }

    fn counts(&mut self, now: UnixMs) -> Result<StoreCounts, StoreError> {
        let state = lock(&self.0);
        let mut queues: BTreeMap<&str, QueueCounts> = BTreeMap::new();
        for record in state.jobs.values().map(|job| &job.details.record) {
            if matches!(record.state, JobState::Done | JobState::Cancelled) {
                continue;
            }
            let counts = queues.entry(&record.method).or_default();
            match record.state {
                JobState::Waiting => counts.waiting += 1,
                JobState::Running => counts.running += 1,
                _ => counts.dead += 1,
            }
            if record.state == JobState::Waiting && record.due_ms <= now {
                counts.due += 1;
                let oldest = counts.oldest_due_ms.get_or_insert(record.due_ms);
                *oldest = record.due_ms.min(*oldest);
            }
        }
        for method in &state.paused {
            queues.entry(method).or_default().is_paused = true;
        }
        let named = queues.into_iter().map(|(method, counts)| QueueCounts {
            method: method.to_owned(),
            ..counts
        });
        Ok(StoreCounts {
            queues: named.collect(),
        })
    }

    fn running(&mut self, owner: InstanceId) -> Result<Vec<RunningAttempt>, StoreError> {
        let state = lock(&self.0);
        let own = state.jobs.values().filter_map(|job| {
            let details = &job.details;
            let attempt = details.owner.filter(|it| it.instance == owner)?;
            Some(RunningAttempt {
                id: details.record.id,
                token: details.token,
                method: details.record.method.clone(),
                executor: attempt.executor,
                is_cancel_requested: job.is_cancel_requested,
                process: details.process,
            })
        });
        Ok(own.collect())
    }

    fn export(&mut self, after: u64) -> Result<(Vec<JobDetails>, u64), StoreError> {
        let state = lock(&self.0);
        let rest = state.jobs.range(after + 1..);
        let last = rest.clone().next_back().map_or(after, |(seq, _)| *seq);
        Ok((rest.map(|(_, job)| job.details.clone()).collect(), last))
    }
}
