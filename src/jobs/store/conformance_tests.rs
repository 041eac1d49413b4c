//! Each invariant of docs/jobs.md that is the store's, and each known race, on every engine.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::model_world::ModelEngine;
use super::request::*;
use super::{Engine, StoreReader};
use crate::jobs::policy::enqueue::{DueTime, NewJob};
use crate::jobs::policy::retention::{Retention, RetentionRules};
use crate::jobs::policy::states::{
    AttemptCause, AttemptEnd, EndReason, JobFate, JobState, RetryRules,
};
use crate::jobs::policy::turns::QueueShare;
use crate::jobs::record::{AttemptOwner, JobDetails, JobRecord, ProcessMark};
use crate::protocol::job_id::JobId;

/// The time at which each test begins.
pub const START: u64 = 1_800_000_000_000;

pub const LIMITS: StoreLimits = StoreLimits {
    max_jobs: 6,
    max_size: u64::MAX,
};

const RULES: RetryRules = RetryRules {
    backoff_ms: 5_000,
    max_backoff_ms: 60_000,
    max_crashes: 2,
    max_result: 64,
};

/// An engine with a clock that the test sets.
pub struct Fixture {
    pub engine: Box<dyn Engine>,
    pub reader: Box<dyn StoreReader>,
    pub clock: Arc<AtomicU64>,
    /// The directory of its file. It is removed at the end.
    _directory: Option<tempfile::TempDir>,
}

impl Fixture {
    pub fn model() -> Self {
        let clock = Arc::new(AtomicU64::new(START));
        let own = Arc::clone(&clock);
        let engine = ModelEngine::new(LIMITS, Box::new(move || own.load(Relaxed)));
        Fixture {
            reader: engine.reader().unwrap(),
            engine: Box::new(engine),
            clock,
            _directory: None,
        }
    }

    #[cfg(feature = "jobs-sqlite")]
    pub fn sqlite() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let clock = Arc::new(AtomicU64::new(START));
        let own = Arc::clone(&clock);
        let engine = super::sqlite::open(
            &directory.path().join("jobs.db"),
            LIMITS,
            Box::new(move || own.load(Relaxed)),
            (super::Opening::First, [7; 32]),
        );
        let engine = engine.unwrap();
        Fixture {
            reader: engine.reader().unwrap(),
            engine: Box::new(engine),
            clock,
            _directory: Some(directory),
        }
    }

    pub fn advance(&self, milliseconds: u64) {
        self.clock.fetch_add(milliseconds, Relaxed);
    }

    pub fn one(&mut self, request: StoreRequest) -> StoreReply {
        let mut replies = self.engine.execute(&[request]).unwrap();
        assert_eq!(replies.len(), 1);
        replies.remove(0)
    }

    fn enqueue(&mut self, jobs: Vec<NewJob>) -> EnqueueReply {
        match self.one(StoreRequest::Enqueue(jobs)) {
            StoreReply::Enqueued(reply) => reply,
            other => panic!("{other:?}"),
        }
    }

    /// Stores a job that must be new.
    fn stored(&mut self, job: NewJob) -> JobId {
        let id = job.id;
        match self.enqueue(vec![job]) {
            EnqueueReply::Stored(jobs) if jobs[0].is_new && jobs[0].id == id => id,
            other => panic!("{other:?}"),
        }
    }

    fn claim(&mut self, methods: &[&str], most: usize) -> Vec<ClaimedJob> {
        let shares = methods.iter().map(|method| QueueShare {
            method: (*method).to_owned(),
            most,
        });
        let request = ClaimRequest {
            owner: owner(1),
            shares: shares.collect(),
            most,
        };
        match self.one(StoreRequest::Claim(request)) {
            StoreReply::Claimed(jobs) => jobs,
            other => panic!("{other:?}"),
        }
    }

    /// Claims one job, which must be due.
    fn claimed(&mut self, method: &str) -> (JobId, u64) {
        let jobs = self.claim(&[method], 1);
        assert_eq!(jobs.len(), 1, "a job of {method} is due");
        (jobs[0].id, jobs[0].token)
    }

    fn settle(&mut self, attempt: (JobId, u64), end: AttemptEnd) -> SettleReply {
        let (id, token) = attempt;
        let settlement = Settlement {
            id,
            token,
            end,
            rules: RULES,
            jitter: 0,
        };
        match self.one(StoreRequest::Settle(settlement)) {
            StoreReply::Settled(reply) => reply,
            other => panic!("{other:?}"),
        }
    }

    fn cancel(&mut self, id: JobId) -> CancelReply {
        match self.one(StoreRequest::Cancel(id)) {
            StoreReply::Cancelled(reply) => reply,
            other => panic!("{other:?}"),
        }
    }

    fn retry(&mut self, ids: &[JobId]) -> Selected {
        match self.one(StoreRequest::Retry(JobSelection::Ids(ids.to_vec()))) {
            StoreReply::Retried(selected) => selected,
            other => panic!("{other:?}"),
        }
    }

    fn purge(&mut self, ids: &[JobId]) -> Selected {
        match self.one(StoreRequest::Purge(JobSelection::Ids(ids.to_vec()))) {
            StoreReply::Purged(selected) => selected,
            other => panic!("{other:?}"),
        }
    }

    fn pause(&mut self, method: &str, is_paused: bool) {
        let method = method.to_owned();
        let reply = self.one(StoreRequest::Pause { method, is_paused });
        assert_eq!(reply, StoreReply::Paused);
    }

    fn join(&mut self, instance: u8) -> Vec<FreedAttempt> {
        match self.one(StoreRequest::Join(instance_info(instance))) {
            StoreReply::Joined(freed) => freed,
            other => panic!("{other:?}"),
        }
    }

    fn maintain(&mut self) -> Maintained {
        self.engine.maintain(&retention()).unwrap()
    }

    fn record(&mut self, id: JobId) -> JobRecord {
        self.reader.record(id).unwrap().unwrap()
    }

    fn state(&mut self, id: JobId) -> JobState {
        self.record(id).state
    }
}

pub fn id(number: u8) -> JobId {
    JobId([number; 16])
}

pub fn owner(instance: u8) -> AttemptOwner {
    AttemptOwner {
        instance: id(instance),
        executor: 100 + i32::from(instance),
    }
}

pub fn instance_info(instance: u8) -> InstanceInfo {
    InstanceInfo {
        id: id(instance),
        host: "host".into(),
        pid: 10,
        version: "1".into(),
    }
}

/// Done and cancelled jobs are kept for 1 s, dead ones for 10 s. Those of `kept` are kept longer.
pub fn retention() -> RetentionRules {
    let kept = |done_ms| Retention {
        done_ms,
        dead_ms: 10_000,
        cancelled_ms: 1_000,
    };
    RetentionRules {
        default: kept(1_000),
        methods: BTreeMap::from([("kept".to_owned(), kept(5_000))]),
    }
}

pub fn job(number: u8, method: &str) -> NewJob {
    NewJob {
        id: id(number),
        method: method.into(),
        params: format!("[{number}]").into(),
        key: None,
        due: DueTime::Now,
        priority: 0,
        max_attempts: 3,
        timeout_ms: 1_000,
        expires_ms: None,
        trace: None,
    }
}

fn with_key(number: u8, method: &str, key: &str) -> NewJob {
    NewJob {
        key: Some(key.to_owned()),
        ..job(number, method)
    }
}

fn failed() -> AttemptEnd {
    AttemptEnd::error(r#"{"code":7,"name":"error","message":"no","started":true}"#)
}

fn lost(cause: AttemptCause) -> AttemptEnd {
    AttemptEnd::without_answer(cause, None)
}

fn ends(state: JobState, reason: Option<EndReason>) -> SettleReply {
    SettleReply::Stored(JobFate::End { state, reason })
}

fn waits(due_ms: u64) -> SettleReply {
    SettleReply::Stored(JobFate::Wait { due_ms })
}

macro_rules! conformance {
    ($($name:ident,)*) => {
        mod model {
            $(#[test] fn $name() { super::$name(&mut super::Fixture::model()); })*
        }
        #[cfg(feature = "jobs-sqlite")]
        mod sqlite {
            $(#[test] fn $name() { super::$name(&mut super::Fixture::sqlite()); })*
        }
    };
}

conformance! {
    i1_readers_see_a_group_after_its_commit,
    i2_a_job_ends_once_and_only_retention_or_an_operator_removes_it,
    i3_a_settlement_needs_id_token_and_a_running_attempt,
    i4_a_claim_needs_a_due_job_of_a_named_method_that_is_not_paused,
    i5_attempts_that_never_began_or_were_interrupted_are_not_counted,
    i6_max_crashes_end_a_job,
    i7_due_times_follow_the_clock_of_the_engine,
    i8_a_method_has_one_live_job_with_a_key,
    i9_the_same_id_is_the_same_job_or_a_conflict,
    i10_a_full_store_answers_and_long_results_are_refused,
    i12_no_queue_prevents_the_claims_of_another,
    jobs_begin_by_priority_then_due_time_then_enqueue,
    an_array_is_stored_whole_or_not_at_all,
    an_expired_job_is_dead_unless_it_runs,
    a_retry_waits_again_with_new_counters_and_the_old_token,
    a_job_keeps_the_error_of_its_last_attempt,
    attempts_of_an_instance_that_is_gone_are_freed_once,
    processes_of_another_instance_are_found,
    race_finish_after_rescue,
    race_cancel_against_finish,
    race_key_against_retry,
    race_two_maintenance_passes,
    race_claim_against_pause,
    race_clock_set_back,
    race_the_same_outcome_twice,
    lists_have_pages_in_their_order,
    operators_select_ended_jobs_by_state_and_method,
    counts_add_up,
    an_export_is_imported_once,
}

fn i1_readers_see_a_group_after_its_commit(it: &mut Fixture) {
    let requests = [
        StoreRequest::Enqueue(vec![job(1, "a")]),
        StoreRequest::Enqueue(vec![job(1, "b")]),
        StoreRequest::Enqueue(vec![job(2, "a")]),
    ];
    assert_eq!(it.reader.record(id(1)).unwrap(), None);
    let replies = it.engine.execute(&requests).unwrap();
    let conflict = EnqueueReply::Conflict {
        index: 0,
        id: id(1),
    };
    assert_eq!(replies[1], StoreReply::Enqueued(conflict));
    let details = it.reader.details(id(1)).unwrap().unwrap();
    assert_eq!(
        (&*details.params, details.record.method.as_str()),
        ("[1]", "a")
    );
    assert_eq!(it.state(id(2)), JobState::Waiting);
    it.engine.after_commit().unwrap();
}

fn i2_a_job_ends_once_and_only_retention_or_an_operator_removes_it(it: &mut Fixture) {
    let done = it.stored(job(1, "a"));
    let attempt = it.claimed("a");
    assert_eq!(
        it.settle(attempt, AttemptEnd::result("1")),
        ends(JobState::Done, None)
    );
    let record = it.record(done);
    assert_eq!(record.json.as_deref(), Some("1"));
    assert_eq!(record.finished_ms, Some(START));
    assert_eq!(it.cancel(done), CancelReply::WasEnded);
    it.settle(attempt, failed());
    assert_eq!(it.claim(&["a"], 9), []);
    assert_eq!(
        it.retry(&[done]).left,
        [(done, LeftAlone::Is(JobState::Done))]
    );
    assert_eq!(it.record(done), record);
    it.advance(1_000);
    assert_eq!(it.maintain().removed, 0);
    it.advance(1);
    assert_eq!(it.maintain().removed, 1);
    assert_eq!(it.reader.record(done).unwrap(), None);
    assert_eq!(it.cancel(done), CancelReply::NoSuchJob);
    // Live jobs are never removed.
    let live = it.stored(job(2, "a"));
    it.advance(1_000_000);
    it.maintain();
    assert_eq!(
        it.purge(&[live]).left,
        [(live, LeftAlone::Is(JobState::Waiting))]
    );
    assert_eq!(it.state(live), JobState::Waiting);
}

fn i3_a_settlement_needs_id_token_and_a_running_attempt(it: &mut Fixture) {
    it.stored(job(1, "a"));
    let none = SettleReply::Stale { current: None };
    assert_eq!(it.settle((id(9), 1), AttemptEnd::result("1")), none);
    let stale = |current| SettleReply::Stale {
        current: Some(current),
    };
    assert_eq!(it.settle((id(1), 0), AttemptEnd::result("1")), stale(0));
    let (job, token) = it.claimed("a");
    assert_eq!(token, 1);
    for wrong in [0, 2, u64::MAX] {
        assert_eq!(it.settle((job, wrong), AttemptEnd::result("1")), stale(1));
    }
    assert_eq!(it.state(job), JobState::Running);
    assert_eq!(
        it.settle((job, token), lost(AttemptCause::Killed)),
        waits(START)
    );
    let again = it.claimed("a");
    assert_eq!(again, (job, 2));
    assert_eq!(it.settle((job, token), AttemptEnd::result("1")), stale(2));
    assert_eq!(
        it.settle(again, AttemptEnd::result("2")),
        ends(JobState::Done, None)
    );
    assert_eq!(it.settle((job, token), AttemptEnd::result("1")), stale(2));
    assert_eq!(it.record(job).json.as_deref(), Some("2"));
}

fn i4_a_claim_needs_a_due_job_of_a_named_method_that_is_not_paused(it: &mut Fixture) {
    let later = NewJob {
        due: DueTime::After(10),
        ..job(1, "a")
    };
    it.stored(later);
    it.stored(job(2, "b"));
    assert_eq!(it.claim(&["a"], 9), []);
    assert_eq!(it.claim(&["b"], 0), []);
    assert_eq!(it.claim(&[], 9), []);
    it.pause("b", true);
    assert_eq!(it.claim(&["a", "b"], 9), []);
    it.pause("b", false);
    let expected = ClaimedJob {
        id: id(2),
        token: 1,
        method: "b".into(),
        params: "[2]".into(),
        attempt: 1,
        max_attempts: 3,
        timeout_ms: 1_000,
        trace: None,
        due_ms: START,
    };
    assert_eq!(it.claim(&["a", "b"], 9), [expected]);
    assert_eq!(it.claim(&["a", "b"], 9), [], "it runs");
    it.advance(10);
    assert_eq!(it.claimed("a"), (id(1), 1));
}

fn i5_attempts_that_never_began_or_were_interrupted_are_not_counted(it: &mut Fixture) {
    it.stored(job(1, "a"));
    let mut interruptions = 0;
    for cause in [
        AttemptCause::NeverBegun,
        AttemptCause::Interrupted,
        AttemptCause::OtherCrashed,
        AttemptCause::Interrupted,
    ] {
        let attempt = it.claimed("a");
        assert_eq!(it.record(id(1)).counters.attempt, 1);
        assert_eq!(it.settle(attempt, lost(cause)), waits(START));
        interruptions += u32::from(cause != AttemptCause::NeverBegun);
        let counters = it.record(id(1)).counters;
        assert_eq!(
            (counters.attempt, counters.interruptions),
            (0, interruptions)
        );
    }
    for counted in 1..=2 {
        let attempt = it.claimed("a");
        assert_eq!(it.settle(attempt, lost(AttemptCause::Killed)), waits(START));
        assert_eq!(it.record(id(1)).counters.attempt, counted);
    }
    let attempt = it.claimed("a");
    assert_eq!(attempt.1, 7, "each claim has a token");
    let dead = ends(JobState::Dead, Some(EndReason::Attempts));
    assert_eq!(it.settle(attempt, lost(AttemptCause::Killed)), dead);
    assert_eq!(it.record(id(1)).counters.attempt, 3);
}

fn i6_max_crashes_end_a_job(it: &mut Fixture) {
    it.stored(job(1, "a"));
    let attempt = it.claimed("a");
    assert_eq!(
        it.settle(attempt, lost(AttemptCause::Crashed)),
        waits(START + 5_000)
    );
    it.advance(5_000);
    let attempt = it.claimed("a");
    let evidence = r#"{"code":-32003,"name":"crashed","message":"SIGSEGV","started":true}"#;
    let end = AttemptEnd::without_answer(AttemptCause::Unclear, Some(evidence.into()));
    assert_eq!(
        it.settle(attempt, end),
        ends(JobState::Dead, Some(EndReason::Crashes))
    );
    let record = it.record(id(1));
    assert_eq!((record.counters.crashes, record.counters.attempt), (2, 2));
    assert_eq!(record.reason, Some(EndReason::Crashes));
    assert_eq!(record.cause, Some(AttemptCause::Unclear));
    assert_eq!(record.json.as_deref(), Some(evidence));
}

fn i7_due_times_follow_the_clock_of_the_engine(it: &mut Fixture) {
    let jobs = [
        NewJob {
            due: DueTime::At(START + 50),
            ..job(1, "a")
        },
        NewJob {
            due: DueTime::After(20),
            expires_ms: Some(25),
            ..job(2, "a")
        },
        NewJob {
            due: DueTime::At(1),
            ..job(3, "b")
        },
    ];
    it.enqueue(jobs.to_vec());
    let due = |it: &mut Fixture, number| it.record(id(number)).due_ms;
    assert_eq!(
        (due(it, 1), due(it, 2), due(it, 3)),
        (START + 50, START + 20, START)
    );
    let next = |it: &mut Fixture, methods: &[&str]| it.engine.next_event_ms(methods).unwrap();
    assert_eq!(next(it, &["a", "b"]), Some(START));
    assert_eq!(next(it, &["a"]), Some(START + 20));
    assert_eq!(next(it, &[]), Some(START + 25), "the expiry");
    it.pause("a", true);
    assert_eq!(next(it, &["a"]), Some(START + 25));
    it.pause("a", false);
    it.advance(19);
    assert_eq!(it.claim(&["a"], 9), []);
    it.advance(1);
    assert_eq!(it.claimed("a").0, id(2));
    assert_eq!(next(it, &["a"]), Some(START + 50));
    assert_eq!(it.engine.now_ms().unwrap(), START + 20);
}

fn i8_a_method_has_one_live_job_with_a_key(it: &mut Fixture) {
    it.stored(with_key(1, "a", "k"));
    let existing = |state| {
        EnqueueReply::Stored(vec![EnqueuedJob {
            id: id(1),
            state,
            is_new: false,
            due_ms: START,
        }])
    };
    assert_eq!(
        it.enqueue(vec![with_key(2, "a", "k")]),
        existing(JobState::Waiting)
    );
    assert_eq!(it.reader.record(id(2)).unwrap(), None);
    it.stored(with_key(3, "b", "k"));
    it.stored(with_key(4, "a", "other"));
    let attempt = it.claimed("a");
    assert_eq!(
        it.enqueue(vec![with_key(2, "a", "k")]),
        existing(JobState::Running)
    );
    it.settle(attempt, AttemptEnd::result("1"));
    it.stored(with_key(2, "a", "k"));
    // In one array, the first job of two with one key is stored.
    let pair = vec![with_key(5, "c", "k"), with_key(6, "c", "k")];
    let EnqueueReply::Stored(stored) = it.enqueue(pair) else {
        panic!("both are answered");
    };
    let ids: Vec<_> = stored.iter().map(|job| (job.id, job.is_new)).collect();
    assert_eq!(ids, [(id(5), true), (id(5), false)]);
}

fn i9_the_same_id_is_the_same_job_or_a_conflict(it: &mut Fixture) {
    it.stored(job(1, "a"));
    let conflict = EnqueueReply::Conflict {
        index: 0,
        id: id(1),
    };
    let other_params = NewJob {
        params: "[1 ]".into(),
        ..job(1, "a")
    };
    // Only method and params are the content.
    let other_options = NewJob {
        priority: 5,
        due: DueTime::After(7),
        key: Some("k".into()),
        ..job(1, "a")
    };
    for is_ended in [false, true] {
        if is_ended {
            let attempt = it.claimed("a");
            it.settle(attempt, AttemptEnd::result("1"));
        }
        for repeated in [job(1, "a"), other_options.clone()] {
            let EnqueueReply::Stored(stored) = it.enqueue(vec![repeated]) else {
                panic!("it exists");
            };
            assert!(!stored[0].is_new);
            assert_eq!(stored[0].state.is_ended(), is_ended);
        }
        for other in [job(1, "b"), other_params.clone()] {
            assert_eq!(it.enqueue(vec![other]), conflict);
        }
    }
    it.purge(&[id(1)]);
    it.stored(job(1, "b"));
}

fn i10_a_full_store_answers_and_long_results_are_refused(it: &mut Fixture) {
    for number in 1..=6 {
        it.stored(job(number, "a"));
    }
    assert_eq!(it.enqueue(vec![job(7, "a")]), EnqueueReply::TooMany);
    let EnqueueReply::Stored(known) = it.enqueue(vec![job(1, "a")]) else {
        panic!("it exists, so it needs no room");
    };
    assert!(!known[0].is_new);
    let attempt = it.claimed("a");
    let refused = ends(JobState::Dead, Some(EndReason::Refused));
    assert_eq!(
        it.settle(attempt, AttemptEnd::result("1".repeat(65))),
        refused
    );
    let error = it.record(id(1)).json.unwrap();
    assert!(
        error.contains("bad-output") && error.contains("jobs.result"),
        "{error}"
    );
    it.stored(job(7, "a"));
    assert_eq!(it.retry(&[id(1)]).left, [(id(1), LeftAlone::TooMany)]);
    it.engine.set_limits(StoreLimits {
        max_jobs: 7,
        ..LIMITS
    });
    assert_eq!(it.retry(&[id(1)]).done, [id(1)]);
}

fn i12_no_queue_prevents_the_claims_of_another(it: &mut Fixture) {
    for number in 1..=4 {
        it.stored(job(number, "long"));
    }
    it.stored(job(5, "short"));
    it.stored(job(6, "other"));
    let claimed = it.claim(&["long", "short", "other"], 4);
    let methods: Vec<_> = claimed.iter().map(|job| job.method.as_str()).collect();
    assert_eq!(methods, ["long", "short", "other", "long"]);
}

fn jobs_begin_by_priority_then_due_time_then_enqueue(it: &mut Fixture) {
    let with = |number, priority, delay| NewJob {
        priority,
        due: DueTime::After(delay),
        ..job(number, "a")
    };
    let jobs = vec![
        with(1, 0, 5),
        with(2, -9, 0),
        with(3, 0, 2),
        with(4, 9, 8),
        with(5, 0, 2),
        with(6, 9, 100),
    ];
    it.enqueue(jobs);
    it.advance(10);
    let order: Vec<u8> = it.claim(&["a"], 9).iter().map(|job| job.id.0[0]).collect();
    assert_eq!(order, [4, 3, 5, 1, 2]);
}

fn an_array_is_stored_whole_or_not_at_all(it: &mut Fixture) {
    it.stored(job(3, "a"));
    let array = vec![job(1, "a"), job(2, "a"), job(3, "b")];
    let conflict = EnqueueReply::Conflict {
        index: 2,
        id: id(3),
    };
    assert_eq!(it.enqueue(array), conflict);
    let array = (4..=9).map(|number| job(number, "a")).collect();
    assert_eq!(it.enqueue(array), EnqueueReply::TooMany);
    // The array that was refused left no trace, and the others of its group are stored.
    let requests = [
        StoreRequest::Enqueue(vec![job(4, "a")]),
        StoreRequest::Enqueue(vec![job(5, "a"), job(4, "b")]),
        StoreRequest::Enqueue((5..=8).map(|number| job(number, "a")).collect()),
    ];
    let replies = it.engine.execute(&requests).unwrap();
    assert!(matches!(
        &replies[2],
        StoreReply::Enqueued(EnqueueReply::Stored(_))
    ));
    let page = it.reader.list(&ListFilter::default(), 99).unwrap();
    let ids: Vec<u8> = page.jobs.iter().map(|job| job.id.0[0]).collect();
    assert_eq!(ids, [3, 4, 5, 6, 7, 8]);
    assert_eq!(it.enqueue(vec![job(9, "a")]), EnqueueReply::TooMany);
}

fn an_expired_job_is_dead_unless_it_runs(it: &mut Fixture) {
    let expiring = |number, method: &str| NewJob {
        expires_ms: Some(100),
        ..job(number, method)
    };
    it.enqueue(vec![expiring(1, "a"), expiring(2, "b"), job(3, "a")]);
    let running = it.claimed("b");
    it.advance(100);
    assert_eq!(it.claimed("a").0, id(3), "an expired job is not claimed");
    let dead = EndedJob {
        id: id(1),
        method: "a".into(),
        state: JobState::Dead,
        reason: Some(EndReason::Expired),
    };
    assert_eq!(it.maintain().expired, [dead]);
    assert_eq!(it.record(id(1)).counters.attempt, 0);
    // Between two attempts it expires too.
    it.settle(running, failed());
    assert_eq!(it.claim(&["b"], 9), []);
    let expired = it.maintain().expired;
    assert_eq!(expired[0].id, id(2));
    let record = it.record(id(2));
    assert_eq!(record.reason, Some(EndReason::Expired));
    assert_eq!(record.cause, Some(AttemptCause::Error));
    assert!(
        record.json.unwrap().contains("\"no\""),
        "the last error is kept"
    );
}

fn a_retry_waits_again_with_new_counters_and_the_old_token(it: &mut Fixture) {
    let refusal = r#"{"code":-32602,"name":"invalid-params","message":"","started":false}"#;
    let expiring = NewJob {
        expires_ms: Some(100),
        ..job(1, "a")
    };
    it.enqueue(vec![expiring, job(2, "a")]);
    let attempt = it.claimed("a");
    it.settle(attempt, AttemptEnd::error(refusal));
    let ended = CancelReply::Ended { method: "a".into() };
    assert_eq!(it.cancel(id(2)), ended);
    it.advance(500);
    let selected = it.retry(&[id(1), id(1), id(2), id(9)]);
    assert_eq!(selected.done, [id(1), id(2)]);
    let left = [
        (id(1), LeftAlone::Is(JobState::Waiting)),
        (id(9), LeftAlone::NoSuchJob),
    ];
    assert_eq!(selected.left, left);
    let record = it.record(id(1));
    assert_eq!((record.counters.attempt, record.due_ms), (0, START + 500));
    assert_eq!((record.expires_ms, record.finished_ms), (None, None));
    assert_eq!(record.reason, None);
    assert_eq!(it.claimed("a"), (id(1), 2));
}

fn a_job_keeps_the_error_of_its_last_attempt(it: &mut Fixture) {
    it.stored(job(1, "a"));
    let attempt = it.claimed("a");
    assert_eq!(it.settle(attempt, failed()), waits(START + 5_000));
    let record = it.record(id(1));
    assert_eq!(
        (record.state, record.cause),
        (JobState::Waiting, Some(AttemptCause::Error))
    );
    let error = record.json.unwrap();
    it.advance(5_000);
    let attempt = it.claimed("a");
    assert_eq!(it.record(id(1)).json.as_ref(), Some(&error));
    assert_eq!(
        it.settle(attempt, lost(AttemptCause::Interrupted)),
        waits(START + 5_000)
    );
    assert_eq!(it.record(id(1)).json.as_ref(), Some(&error));
    let attempt = it.claimed("a");
    it.settle(attempt, AttemptEnd::result("null"));
    assert_eq!(it.record(id(1)).json.as_deref(), Some("null"));
}

fn attempts_of_an_instance_that_is_gone_are_freed_once(it: &mut Fixture) {
    let last = NewJob {
        max_attempts: 1,
        ..job(2, "a")
    };
    it.enqueue(vec![job(1, "a"), last, job(3, "a"), job(4, "a")]);
    assert_eq!(it.claim(&["a"], 3).len(), 3);
    assert!(matches!(
        it.cancel(id(3)),
        CancelReply::Requested { token: 1, .. }
    ));
    assert_eq!(it.join(1), [], "its own attempts run on");
    let fates: Vec<_> = it
        .join(2)
        .into_iter()
        .map(|freed| (freed.id, freed.token, freed.fate))
        .collect();
    let dead = JobFate::End {
        state: JobState::Dead,
        reason: Some(EndReason::Attempts),
    };
    let cancelled = JobFate::End {
        state: JobState::Cancelled,
        reason: None,
    };
    let due_ms = START;
    let expected = [
        (id(1), 1, JobFate::Wait { due_ms }),
        (id(2), 1, dead),
        (id(3), 1, cancelled),
    ];
    assert_eq!(fates, expected);
    assert_eq!(it.join(2), []);
    let record = it.record(id(1));
    assert_eq!(
        (record.counters.attempt, record.cause),
        (1, Some(AttemptCause::Lost))
    );
    assert_eq!(it.reader.running(id(1)).unwrap(), []);
    assert_eq!(it.one(StoreRequest::Leave(id(2))), StoreReply::Left);
}

fn processes_of_another_instance_are_found(it: &mut Fixture) {
    it.enqueue(vec![job(1, "a"), job(2, "a")]);
    it.claim(&["a"], 2);
    let process = ProcessMark {
        pid: 77,
        start_time: 12_345,
    };
    let note = |token| StoreRequest::NoteProcess {
        id: id(1),
        token,
        process,
    };
    assert_eq!(it.one(note(2)), StoreReply::Noted(false));
    assert_eq!(it.one(note(1)), StoreReply::Noted(true));
    assert_eq!(it.reader.running(id(1)).unwrap()[0].process, Some(process));
    assert_eq!(it.engine.leftovers(id(1)).unwrap(), []);
    assert_eq!(it.engine.leftovers(id(2)).unwrap(), [process]);
    it.join(2);
    assert_eq!(it.engine.leftovers(id(2)).unwrap(), []);
    assert_eq!(it.one(note(1)), StoreReply::Noted(false));
}

/// The attempt was given up as lost, and then its outcome arrives.
fn race_finish_after_rescue(it: &mut Fixture) {
    it.stored(job(1, "a"));
    let attempt = it.claimed("a");
    it.join(2);
    let stale = |current| SettleReply::Stale {
        current: Some(current),
    };
    assert_eq!(
        it.settle(attempt, AttemptEnd::result("1")),
        stale(1),
        "it waits"
    );
    let again = it.claimed("a");
    assert_eq!(
        it.settle(attempt, AttemptEnd::result("1")),
        stale(2),
        "it runs again"
    );
    it.settle(again, AttemptEnd::result("2"));
    assert_eq!(
        it.settle(attempt, AttemptEnd::result("1")),
        stale(2),
        "it has ended"
    );
    assert_eq!(it.record(id(1)).json.as_deref(), Some("2"));
}

fn race_cancel_against_finish(it: &mut Fixture) {
    it.enqueue(vec![job(1, "a"), job(2, "a"), job(3, "a")]);
    let attempts = [it.claimed("a"), it.claimed("a"), it.claimed("a")];
    // The finish is first.
    it.settle(attempts[0], AttemptEnd::result("1"));
    assert_eq!(it.cancel(id(1)), CancelReply::WasEnded);
    assert_eq!(it.state(id(1)), JobState::Done);
    // The request is first, and the handler has a result all the same.
    let requested = CancelReply::Requested {
        owner: owner(1),
        token: 1,
    };
    assert_eq!(it.cancel(id(2)), requested);
    assert_eq!(it.cancel(id(2)), requested, "a repeat is harmless");
    assert_eq!(it.state(id(2)), JobState::Running);
    assert_eq!(
        it.settle(attempts[1], AttemptEnd::result("1")),
        ends(JobState::Done, None)
    );
    // The request is first, and the handler gives up.
    it.cancel(id(3));
    assert_eq!(
        it.settle(attempts[2], failed()),
        ends(JobState::Cancelled, None)
    );
    assert_eq!(it.claim(&["a"], 9), []);
}

fn race_key_against_retry(it: &mut Fixture) {
    it.stored(with_key(1, "a", "k"));
    it.cancel(id(1));
    // The enqueue is first.
    it.stored(with_key(2, "a", "k"));
    assert_eq!(it.retry(&[id(1)]).left, [(id(1), LeftAlone::KeyInUse)]);
    assert_eq!(it.state(id(1)), JobState::Cancelled);
    // The retry is first.
    it.cancel(id(2));
    assert_eq!(
        it.retry(&[id(1), id(2)]).left,
        [(id(2), LeftAlone::KeyInUse)]
    );
    let EnqueueReply::Stored(stored) = it.enqueue(vec![with_key(3, "a", "k")]) else {
        panic!("the live job is the answer");
    };
    assert_eq!((stored[0].id, stored[0].is_new), (id(1), false));
}

fn race_two_maintenance_passes(it: &mut Fixture) {
    let expiring = NewJob {
        expires_ms: Some(10),
        ..job(1, "a")
    };
    it.enqueue(vec![expiring, job(2, "kept"), job(3, "b")]);
    for method in ["kept", "b"] {
        let attempt = it.claimed(method);
        it.settle(attempt, AttemptEnd::result("1"));
    }
    it.advance(1_001);
    let first = it.maintain();
    assert_eq!((first.expired.len(), first.removed), (1, 1));
    let second = it.maintain();
    assert_eq!((second.expired.len(), second.removed), (0, 0));
    assert!(second.is_complete);
    it.advance(4_000);
    assert_eq!(
        it.maintain().removed,
        1,
        "the longer retention of its method"
    );
    it.advance(6_001);
    assert_eq!(it.maintain().removed, 1, "the dead one");
    assert_eq!(
        it.reader.list(&ListFilter::default(), 9).unwrap(),
        ListPage::default()
    );
}

fn race_claim_against_pause(it: &mut Fixture) {
    it.enqueue(vec![job(1, "a"), job(2, "a")]);
    let claim = StoreRequest::Claim(ClaimRequest {
        owner: owner(1),
        shares: vec![QueueShare {
            method: "a".into(),
            most: 1,
        }],
        most: 1,
    });
    let pause = StoreRequest::Pause {
        method: "a".into(),
        is_paused: true,
    };
    let replies = it.engine.execute(&[claim.clone(), pause, claim]).unwrap();
    let claimed = |reply: &StoreReply| match reply {
        StoreReply::Claimed(jobs) => jobs.len(),
        other => panic!("{other:?}"),
    };
    assert_eq!((claimed(&replies[0]), claimed(&replies[2])), (1, 0));
    // The running attempt is not affected.
    assert_eq!(
        it.settle((id(1), 1), AttemptEnd::result("1")),
        ends(JobState::Done, None)
    );
    it.pause("a", false);
    assert_eq!(it.claimed("a").0, id(2));
}

fn race_clock_set_back(it: &mut Fixture) {
    it.enqueue(vec![job(1, "a"), job(2, "b")]);
    let attempt = it.claimed("b");
    it.settle(attempt, AttemptEnd::result("1"));
    it.advance(600);
    it.maintain();
    it.clock.store(START - 1_000_000, Relaxed);
    assert_eq!(it.claim(&["a"], 9), [], "its due time has not come");
    let pass = it.maintain();
    assert_eq!((pass.expired.len(), pass.removed), (0, 0));
    it.stored(job(3, "b"));
    let attempt = it.claimed("b");
    it.settle(attempt, AttemptEnd::result("1"));
    it.advance(1_001);
    assert_eq!(
        it.maintain().removed,
        1,
        "the job that ended after the clock was set"
    );
    it.clock.store(START + 1_001, Relaxed);
    assert_eq!(it.maintain().removed, 1);
    assert_eq!(it.claimed("a"), (id(1), 1), "nothing is lost or repeated");
}

/// An executor has no answer to its settlement, and sends it again.
fn race_the_same_outcome_twice(it: &mut Fixture) {
    it.stored(job(1, "a"));
    let attempt = it.claimed("a");
    it.settle(attempt, failed());
    assert_eq!(it.settle(attempt, failed()), SettleReply::Repeated);
    assert_eq!(it.record(id(1)).counters.attempt, 1);
    it.advance(5_000);
    let attempt = it.claimed("a");
    it.settle(attempt, AttemptEnd::result("1"));
    assert_eq!(
        it.settle(attempt, AttemptEnd::result("1")),
        SettleReply::Repeated
    );
    let stale = SettleReply::Stale { current: Some(2) };
    assert_eq!(it.settle(attempt, failed()), stale);
}

fn lists_have_pages_in_their_order(it: &mut Fixture) {
    for number in 1..=5 {
        it.stored(job(number, if number == 3 { "b" } else { "a" }));
    }
    let attempt = it.claimed("b");
    for number in [4, 2] {
        it.cancel(id(number));
        it.advance(1);
    }
    let pages = |it: &mut Fixture, state, method: Option<&str>| {
        let mut filter = ListFilter {
            state,
            method: method.map(str::to_owned),
            after: None,
        };
        let mut ids = Vec::new();
        loop {
            let page = it.reader.list(&filter, 2).unwrap();
            assert!(page.jobs.len() <= 2);
            ids.extend(page.jobs.iter().map(|job| job.id.0[0]));
            match page.next {
                Some(next) => filter.after = Some(next),
                None => return ids,
            }
        }
    };
    assert_eq!(pages(it, None, None), [1, 2, 3, 4, 5]);
    assert_eq!(pages(it, Some(JobState::Waiting), None), [1, 5]);
    assert_eq!(pages(it, Some(JobState::Running), None), [3]);
    assert_eq!(pages(it, Some(JobState::Cancelled), None), [4, 2]);
    assert_eq!(pages(it, Some(JobState::Done), None), [0_u8; 0]);
    assert_eq!(pages(it, None, Some("a")), [1, 2, 4, 5]);
    it.settle(attempt, AttemptEnd::result("1"));
    assert_eq!(pages(it, Some(JobState::Done), Some("b")), [3]);
    assert_eq!(pages(it, Some(JobState::Done), Some("a")), [0_u8; 0]);
}

fn operators_select_ended_jobs_by_state_and_method(it: &mut Fixture) {
    for number in 1..=5 {
        it.stored(job(number, if number == 3 { "b" } else { "a" }));
        it.cancel(id(number));
        it.advance(1);
    }
    it.stored(job(6, "a"));
    let select = |state, after| JobSelection::Ended {
        state,
        method: Some("a".into()),
        most: 2,
        after,
    };
    let StoreReply::Retried(first) = it.one(StoreRequest::Retry(select(JobState::Cancelled, None)))
    else {
        panic!("a retry");
    };
    assert_eq!(first.done, [id(1), id(2)]);
    let rest = select(JobState::Cancelled, first.next);
    let StoreReply::Purged(second) = it.one(StoreRequest::Purge(rest)) else {
        panic!("a purge");
    };
    assert_eq!(second.done, [id(4), id(5)]);
    let rest = select(JobState::Cancelled, second.next);
    assert_eq!(
        it.one(StoreRequest::Purge(rest)),
        StoreReply::Purged(Selected::default())
    );
    let live = select(JobState::Waiting, None);
    assert_eq!(
        it.one(StoreRequest::Purge(live)),
        StoreReply::Purged(Selected::default())
    );
    let page = it.reader.list(&ListFilter::default(), 9).unwrap();
    let ids: Vec<u8> = page.jobs.iter().map(|job| job.id.0[0]).collect();
    assert_eq!(ids, [1, 2, 3, 6]);
}

fn counts_add_up(it: &mut Fixture) {
    let later = NewJob {
        due: DueTime::After(10),
        ..job(1, "a")
    };
    it.enqueue(vec![
        later,
        job(2, "a"),
        job(3, "a"),
        job(4, "b"),
        job(5, "c"),
    ]);
    it.advance(5);
    it.claimed("a");
    let attempt = it.claimed("b");
    let refusal = r#"{"code":7,"message":"","data":{"retry":false}}"#;
    it.settle(attempt, AttemptEnd::error(refusal));
    let attempt = it.claimed("c");
    it.settle(attempt, AttemptEnd::result("1"));
    it.pause("d", true);
    it.pause("c", true);
    it.pause("c", false);
    let queue = |method: &str| QueueCounts {
        method: method.into(),
        ..QueueCounts::default()
    };
    let expected = [
        QueueCounts {
            waiting: 2,
            due: 1,
            running: 1,
            oldest_due_ms: Some(START),
            ..queue("a")
        },
        QueueCounts {
            dead: 1,
            ..queue("b")
        },
        QueueCounts {
            is_paused: true,
            ..queue("d")
        },
    ];
    assert_eq!(it.reader.counts(START + 5).unwrap().queues, expected);
    let later = it.reader.counts(START + 10).unwrap();
    assert_eq!(later.queues[0].due, 2);
}

fn an_export_is_imported_once(it: &mut Fixture) {
    let full = NewJob {
        key: Some("k\"ey".into()),
        priority: -3,
        expires_ms: Some(1_000_000),
        trace: Some("00-trace".into()),
        ..job(1, "a")
    };
    it.enqueue(vec![full, job(2, "a"), job(3, "b"), job(4, "c")]);
    let done = it.claimed("b");
    it.settle(done, AttemptEnd::result(r#"{"x": 1e0}"#));
    let retried = it.claimed("c");
    it.settle(retried, failed());
    it.claimed("a");
    it.advance(1);
    let (mut lines, mut after) = (Vec::new(), 0);
    loop {
        let (jobs, last) = it.reader.export(after).unwrap();
        if jobs.is_empty() {
            break;
        }
        assert!(last > after);
        after = last;
        lines.extend(jobs.iter().map(|job| {
            let mut line = Vec::new();
            job.write(&mut line);
            String::from_utf8(line).unwrap()
        }));
    }
    assert_eq!(lines.len(), 4);
    let read: Vec<JobDetails> = lines
        .iter()
        .map(|line| JobDetails::read(line).unwrap())
        .collect();
    let mut other = Fixture::model();
    let import = || StoreRequest::Import(read.clone());
    assert_eq!(other.one(import()), StoreReply::Imported(4));
    assert_eq!(other.one(import()), StoreReply::Imported(0));
    let before: Vec<JobRecord> = (1..=4).map(|number| it.record(id(number))).collect();
    // Into the same kind of store: all are known, and then none.
    assert_eq!(it.one(import()), StoreReply::Imported(0));
    it.engine.set_limits(LIMITS);
    for (record, number) in before.into_iter().zip(1..) {
        let mut expected = record;
        if expected.state == JobState::Running {
            expected.state = JobState::Waiting;
            expected.cause = Some(AttemptCause::Lost);
        }
        assert_eq!(other.record(id(number)), expected);
    }
    assert_eq!(other.claimed("a"), (id(2), 2), "the token continues");
    for number in 1..=4 {
        it.cancel(id(number));
    }
    let running = it.reader.running(id(1)).unwrap();
    for attempt in running {
        it.settle((attempt.id, attempt.token), failed());
    }
    assert_eq!(it.purge(&[id(1), id(2), id(3), id(4)]).done.len(), 4);
    assert_eq!(it.one(import()), StoreReply::Imported(4));
    let mut again = Vec::new();
    it.reader.details(id(3)).unwrap().unwrap().write(&mut again);
    assert_eq!(String::from_utf8(again).unwrap(), lines[2]);
}
