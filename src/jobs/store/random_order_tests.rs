//! Gives the same requests in random orders to the model and to SQLite, and compares all replies and rows.

#![allow(clippy::unwrap_used)]
#![cfg(feature = "jobs-sqlite")]

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;

use proptest::prelude::*;

use super::conformance_tests::{Fixture, LIMITS, START, id, instance_info, job, owner, retention};
use super::request::*;
use crate::jobs::policy::enqueue::{DueTime, NewJob};
use crate::jobs::policy::states::{AttemptCause, AttemptEnd, JobState, RetryRules};
use crate::jobs::policy::turns::QueueShare;
use crate::jobs::record::{JobDetails, ProcessMark};

const METHODS: [&str; 3] = ["a", "b", "kept"];

/// One step of a test.
#[derive(Debug, Clone)]
enum Step {
    Group(Vec<StoreRequest>),
    /// Settles the running attempt at this place, counted modulo their number; or an old token of it.
    Settle {
        place: usize,
        is_old: bool,
        end: AttemptEnd,
    },
    Maintain,
    /// Moves the clock, also backwards.
    Clock(i64),
}

fn any_method() -> impl Strategy<Value = String> {
    prop::sample::select(METHODS.map(str::to_owned).to_vec())
}

fn any_id() -> impl Strategy<Value = u8> {
    1..12_u8
}

fn any_job() -> impl Strategy<Value = NewJob> {
    let due = prop_oneof![
        4 => Just(DueTime::Now),
        2 => (0..3_000_u64).prop_map(DueTime::After),
        1 => (START - 500..START + 3_000).prop_map(DueTime::At),
    ];
    let key = prop::option::weighted(
        0.3,
        prop::sample::select(vec!["k".to_owned(), "l".to_owned()]),
    );
    let expires = prop::option::weighted(0.3, 1..3_000_u64);
    (
        any_id(),
        any_method(),
        due,
        key,
        -1..2_i8,
        expires,
        1..4_u32,
    )
        .prop_map(
            |(number, method, due, key, priority, expires_ms, max_attempts)| NewJob {
                due,
                key,
                priority,
                expires_ms,
                max_attempts,
                ..job(number, &method)
            },
        )
}

fn any_selection() -> impl Strategy<Value = JobSelection> {
    let ids = prop::collection::vec(any_id().prop_map(id), 1..4).prop_map(JobSelection::Ids);
    let state = prop::sample::select(JobState::ALL);
    let ended =
        (state, prop::option::of(any_method()), 1..4_usize).prop_map(|(state, method, most)| {
            JobSelection::Ended {
                state,
                method,
                most,
                after: None,
            }
        });
    prop_oneof![ids, ended]
}

fn any_request() -> impl Strategy<Value = StoreRequest> {
    let share = (any_method(), 0..3_usize).prop_map(|(method, most)| QueueShare { method, most });
    let claim = (1..3_u8, prop::collection::vec(share, 0..4), 0..4_usize).prop_map(
        |(instance, shares, most)| {
            StoreRequest::Claim(ClaimRequest {
                owner: owner(instance),
                shares,
                most,
            })
        },
    );
    let note =
        (any_id(), 0..4_u64, 1..9_i32).prop_map(|(number, token, pid)| StoreRequest::NoteProcess {
            id: id(number),
            token,
            process: ProcessMark { pid, start_time: 7 },
        });
    let pause = (any_method(), any::<bool>())
        .prop_map(|(method, is_paused)| StoreRequest::Pause { method, is_paused });
    prop_oneof![
        8 => any_job().prop_map(|job| StoreRequest::Enqueue(vec![job])),
        2 => prop::collection::vec(any_job(), 0..4).prop_map(StoreRequest::Enqueue),
        8 => claim,
        1 => note,
        3 => any_id().prop_map(|number| StoreRequest::Cancel(id(number))),
        2 => any_selection().prop_map(StoreRequest::Retry),
        1 => any_selection().prop_map(StoreRequest::Purge),
        1 => pause,
        1 => (1..3_u8).prop_map(|number| StoreRequest::Join(instance_info(number))),
    ]
}

fn any_end() -> impl Strategy<Value = AttemptEnd> {
    let error = r#"{"code":7,"name":"error","message":"no","started":true}"#;
    prop_oneof![
        3 => Just(AttemptEnd::result("[1]")),
        1 => Just(AttemptEnd::result("1".repeat(80))),
        3 => Just(AttemptEnd::error(error)),
        1 => Just(AttemptEnd::error(r#"{"code":-32602,"message":""}"#)),
        4 => prop::sample::select(&AttemptCause::ALL[4..])
            .prop_map(|cause| AttemptEnd::without_answer(cause, None)),
    ]
}

fn any_step() -> impl Strategy<Value = Step> {
    let settle = (any::<usize>(), prop::bool::weighted(0.1), any_end())
        .prop_map(|(place, is_old, end)| Step::Settle { place, is_old, end });
    prop_oneof![
        6 => prop::collection::vec(any_request(), 1..4).prop_map(Step::Group),
        6 => settle,
        1 => Just(Step::Maintain),
        2 => (0..2_000_i64).prop_map(Step::Clock),
        1 => (-3_000..0_i64).prop_map(Step::Clock),
    ]
}

/// Returns all that a store has, in the order of the export.
fn content(it: &mut Fixture) -> (Vec<JobDetails>, StoreCounts, Vec<RunningAttempt>) {
    let jobs = it.reader.export(0).unwrap().0;
    let counts = it.reader.counts(it.clock.load(Relaxed)).unwrap();
    let mut running = it.reader.running(id(1)).unwrap();
    running.extend(it.reader.running(id(2)).unwrap());
    (jobs, counts, running)
}

/// What a correct history keeps of each job.
#[derive(Default)]
struct History {
    token: u64,
    is_ended: bool,
}

fn check(jobs: &[JobDetails], history: &mut BTreeMap<u8, History>) {
    let mut keys = Vec::new();
    for job in jobs {
        let (record, number) = (&job.record, job.record.id.0[0]);
        let before = history.entry(number).or_default();
        assert!(job.token >= before.token, "a token never falls");
        before.token = job.token;
        before.is_ended = record.state.is_ended();
        assert!(record.counters.attempt <= record.counters.max_attempts);
        assert!(u64::from(record.counters.attempt) <= job.token);
        assert_eq!(record.finished_ms.is_some(), record.state.is_ended());
        assert_eq!(record.reason.is_some(), record.state == JobState::Dead);
        assert_eq!(job.owner.is_some(), record.state == JobState::Running);
        if let Some(key) = record.key.as_ref().filter(|_| !record.state.is_ended()) {
            let own = (&record.method, key);
            assert!(!keys.contains(&own), "two live jobs with {own:?}");
            keys.push(own);
        }
    }
    let kept: Vec<u8> = jobs.iter().map(|job| job.record.id.0[0]).collect();
    history.retain(|number, before| {
        assert!(
            kept.contains(number) || before.is_ended,
            "live job {number} is gone"
        );
        kept.contains(number)
    });
    let live = jobs.iter().filter(|job| !job.record.state.is_ended());
    assert!(live.count() as u64 <= LIMITS.max_jobs);
}

fn run(steps: &[Step]) {
    let (mut model, mut sqlite) = (Fixture::model(), Fixture::sqlite());
    let mut history = BTreeMap::new();
    for step in steps {
        let requests = match step {
            Step::Group(requests) => requests.clone(),
            Step::Settle { place, is_old, end } => {
                let running = content(&mut model).2;
                if running.is_empty() {
                    continue;
                }
                let attempt = &running[place % running.len()];
                vec![StoreRequest::Settle(Settlement {
                    id: attempt.id,
                    token: attempt.token - u64::from(*is_old),
                    end: end.clone(),
                    rules: RetryRules {
                        backoff_ms: 300,
                        max_backoff_ms: 1_000,
                        max_crashes: 2,
                        max_result: 64,
                    },
                    jitter: 9,
                })]
            }
            Step::Maintain => {
                let expected = model.engine.maintain(&retention()).unwrap();
                let found = sqlite.engine.maintain(&retention()).unwrap();
                let of = |it: &Maintained| {
                    let mut expired: Vec<_> = it.expired.iter().map(|job| job.id).collect();
                    expired.sort();
                    (expired, it.removed)
                };
                assert_eq!(of(&found), of(&expected));
                check(&content(&mut model).0, &mut history);
                continue;
            }
            Step::Clock(milliseconds) => {
                for it in [&model, &sqlite] {
                    it.clock.store(
                        it.clock.load(Relaxed).saturating_add_signed(*milliseconds),
                        Relaxed,
                    );
                }
                continue;
            }
        };
        // The model gets one request at a time: within a group a job may end, be purged and come again.
        let mut expected = Vec::new();
        for request in &requests {
            expected.extend(model.engine.execute(std::slice::from_ref(request)).unwrap());
            check(&content(&mut model).0, &mut history);
        }
        let found = sqlite.engine.execute(&requests).unwrap();
        assert_eq!(found, expected, "replies to {requests:?}");
        let (expected, found) = (content(&mut model), content(&mut sqlite));
        assert_eq!(found, expected, "after {requests:?}");
        let next = |it: &mut Fixture| it.engine.next_event_ms(&METHODS).unwrap();
        assert_eq!(next(&mut sqlite), next(&mut model));
        let leftovers = |it: &mut Fixture| it.engine.leftovers(id(1)).unwrap();
        assert_eq!(leftovers(&mut sqlite), leftovers(&mut model));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn sqlite_answers_as_the_model_does(steps in prop::collection::vec(any_step(), 1..60)) {
        run(&steps);
    }
}
