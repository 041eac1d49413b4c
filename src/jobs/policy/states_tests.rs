#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::states::*;

const RULES: RetryRules = RetryRules {
    backoff_ms: 5_000,
    max_backoff_ms: 3_600_000,
    max_crashes: 3,
    max_result: 64,
};

const NOW: u64 = 1_000_000;

fn counters(attempt: u32) -> JobCounters {
    JobCounters {
        attempt,
        max_attempts: 10,
        crashes: 0,
        interruptions: 0,
    }
}

fn lost(cause: AttemptCause) -> AttemptEnd {
    AttemptEnd::without_answer(cause, None)
}

fn failed(data: &str) -> AttemptEnd {
    AttemptEnd::error(format!(
        r#"{{"code":7,"name":"error","message":"no","started":true,"data":{data}}}"#
    ))
}

/// What happens after an attempt without jitter and without a cancel request.
fn after(counters: JobCounters, end: &AttemptEnd) -> (JobCounters, JobFate) {
    after_attempt(counters, false, end, &RULES, (NOW, 0))
}

fn waits(delay: u64) -> JobFate {
    JobFate::Wait {
        due_ms: NOW + delay,
    }
}

fn ends(state: JobState, reason: Option<EndReason>) -> JobFate {
    JobFate::End { state, reason }
}

/// What each cause of an end changes: whether the attempt counts, crashes, interruptions, and whether the next
/// attempt waits for the backoff.
const CAUSES: [(AttemptCause, bool, u32, u32, bool); 10] = [
    (AttemptCause::Error, true, 0, 0, true),
    (AttemptCause::Timeout, true, 0, 0, true),
    (AttemptCause::CommandFailed, true, 0, 0, true),
    (AttemptCause::Crashed, true, 1, 0, true),
    (AttemptCause::Unclear, true, 1, 0, true),
    (AttemptCause::Killed, true, 0, 0, false),
    (AttemptCause::Lost, true, 0, 0, false),
    (AttemptCause::OtherCrashed, false, 0, 1, false),
    (AttemptCause::Interrupted, false, 0, 1, false),
    (AttemptCause::NeverBegun, false, 0, 0, false),
];

#[test]
fn a_long_error_keeps_its_code_and_the_beginning_of_its_message() {
    let data = format!("\"{}\"", "x".repeat(5_000));
    let end = failed(&data);
    let kept = kept_json(&end, &RULES).unwrap();
    assert!(
        kept.starts_with(r#"{"code":7,"name":"error","message":"no (shortened: the error had 5"#),
        "{kept}"
    );
    assert!(kept.len() < 200, "{kept}");
    let short = failed("1");
    assert_eq!(kept_json(&short, &RULES).as_deref(), short.json.as_deref());
    let result = AttemptEnd::result("x".repeat(65));
    assert!(kept_json(&result, &RULES).unwrap().contains("bad-output"));
    assert_eq!(kept_json(&lost(AttemptCause::Killed), &RULES), None);
}

#[test]
fn a_handler_that_forbids_a_retry_may_give_any_delay() {
    for delay in ["1500.0", "-1", "null", "\"soon\""] {
        let end = failed(&format!(r#"{{"retry":false,"retry_after_ms":{delay}}}"#));
        assert_eq!(
            after(counters(1), &end).1,
            ends(JobState::Dead, Some(EndReason::Refused)),
            "{delay}"
        );
    }
    let end = failed(r#"{"retry_after_ms":1500.9}"#);
    assert_eq!(after(counters(1), &end).1, waits(1500));
}

#[test]
fn each_cause_counts_as_the_table_says() {
    for (cause, counts, crashes, interruptions, backs_off) in CAUSES {
        let (after, fate) = after(counters(2), &lost(cause));
        assert_eq!(after.attempt, if counts { 2 } else { 1 }, "{cause:?}");
        assert_eq!(after.crashes, crashes, "{cause:?}");
        assert_eq!(after.interruptions, interruptions, "{cause:?}");
        assert_eq!(fate, waits(if backs_off { 10_000 } else { 0 }), "{cause:?}");
    }
}

#[test]
fn the_last_attempt_ends_the_job_if_it_counts() {
    for (cause, counts, ..) in CAUSES {
        let (_, fate) = after(counters(10), &lost(cause));
        let dead = ends(JobState::Dead, Some(EndReason::Attempts));
        assert_eq!(fate, if counts { dead } else { waits(0) }, "{cause:?}");
    }
}

#[test]
fn max_crashes_end_the_job_before_the_attempts_are_used_up() {
    let before = JobCounters {
        crashes: 2,
        ..counters(3)
    };
    for cause in [AttemptCause::Crashed, AttemptCause::Unclear] {
        let (after, fate) = after(before, &lost(cause));
        assert_eq!(after.crashes, 3);
        assert_eq!(fate, ends(JobState::Dead, Some(EndReason::Crashes)));
    }
    let (_, fate) = after(before, &lost(AttemptCause::Killed));
    assert_eq!(fate, waits(0));
}

#[test]
fn a_result_is_kept_even_after_a_cancel_request() {
    let end = AttemptEnd::result("[1]");
    for is_cancel_requested in [false, true] {
        let (_, fate) = after_attempt(counters(10), is_cancel_requested, &end, &RULES, (NOW, 0));
        assert_eq!(fate, ends(JobState::Done, None));
    }
}

#[test]
fn a_cancel_request_ends_an_attempt_without_a_result() {
    let too_long = AttemptEnd::result("1".repeat(65));
    let causes = CAUSES.map(|(cause, ..)| lost(cause));
    for end in causes.iter().chain([&too_long, &failed("null")]) {
        let (_, fate) = after_attempt(counters(10), true, end, &RULES, (NOW, 0));
        assert_eq!(fate, ends(JobState::Cancelled, None), "{end:?}");
    }
}

#[test]
fn a_refusal_ends_the_job_at_once() {
    let invalid = AttemptEnd::error(
        r#"{"code":-32602,"name":"invalid-params","message":"","started":false}"#,
    );
    let too_long = AttemptEnd::result("1".repeat(65));
    for end in [invalid, too_long, failed(r#"{"retry":false}"#)] {
        let (after, fate) = after(counters(1), &end);
        assert_eq!(after, counters(1));
        assert_eq!(
            fate,
            ends(JobState::Dead, Some(EndReason::Refused)),
            "{end:?}"
        );
    }
    let exact = AttemptEnd::result("1".repeat(64));
    assert_eq!(after(counters(1), &exact).1, ends(JobState::Done, None));
}

#[test]
fn the_handler_controls_the_retry() {
    let own = failed(r#"{"retry":true,"retry_after_ms":7,"more":[1]}"#);
    assert_eq!(after(counters(5), &own).1, waits(7));
    let invalid = AttemptEnd::error(r#"{"code":-32602,"message":"","data":{"retry":true}}"#);
    assert_eq!(after(counters(1), &invalid).1, waits(5_000));
    let huge = failed(&format!(r#"{{"retry_after_ms":{}}}"#, u64::MAX));
    assert_eq!(after(counters(1), &huge).1, waits(MAX_DELAY_MS));
    // Data of another form is the handler's own.
    for data in [
        "[1]",
        "\"x\"",
        r#"{"retry":"no"}"#,
        r#"{"retry_after_ms":-1}"#,
    ] {
        assert_eq!(after(counters(1), &failed(data)).1, waits(5_000), "{data}");
    }
}

#[test]
fn the_code_of_an_error_gives_the_cause() {
    for (json, cause) in [
        (r#"{"code":-32001,"message":""}"#, AttemptCause::Timeout),
        (
            r#"{"code":-32010,"message":""}"#,
            AttemptCause::CommandFailed,
        ),
        (r#"{"code":-32603,"message":""}"#, AttemptCause::Error),
        (r#"{"code":42}"#, AttemptCause::Error),
        ("not JSON", AttemptCause::Error),
    ] {
        assert_eq!(AttemptEnd::error(json).cause, cause, "{json}");
    }
}

#[test]
fn the_backoff_doubles_up_to_its_limit_and_jitter_adds_a_quarter() {
    let delays: Vec<u64> = (1..=12)
        .map(|attempt| backoff_ms(attempt, &RULES, 0))
        .collect();
    assert_eq!(delays[..4], [5_000, 10_000, 20_000, 40_000]);
    assert_eq!(delays[9..], [2_560_000, 3_600_000, 3_600_000]);
    // Ten attempts: nine delays, about 45 minutes with the mean jitter.
    let minutes = delays[..9].iter().sum::<u64>() as f64 * 1.125 / 60_000.0;
    assert!((44.0..50.0).contains(&minutes), "{minutes}");
    assert_eq!(backoff_ms(1, &RULES, u16::MAX), 6_250);
    assert_eq!(backoff_ms(u32::MAX, &RULES, u16::MAX), 4_500_000);
}

#[test]
fn names_and_numbers_of_the_store_never_change() {
    let states = JobState::ALL.iter().map(|it| (it.number(), it.name()));
    let expected = [
        (0, "waiting"),
        (1, "running"),
        (2, "done"),
        (3, "dead"),
        (4, "cancelled"),
    ];
    assert!(states.eq(expected));
    let reasons = EndReason::ALL.iter().map(|it| (it.number(), it.name()));
    let expected = [
        (1, "expired"),
        (2, "attempts"),
        (3, "refused"),
        (4, "crashes"),
    ];
    assert!(reasons.eq(expected));
    let causes = AttemptCause::ALL.iter().map(|it| (it.number(), it.name()));
    let expected = [
        (1, "result"),
        (2, "error"),
        (3, "timeout"),
        (4, "command-failed"),
        (5, "crashed"),
        (6, "unclear"),
        (7, "killed"),
        (8, "lost"),
        (9, "other-crashed"),
        (10, "interrupted"),
        (11, "never-begun"),
    ];
    assert!(causes.eq(expected));
    for state in JobState::ALL {
        assert_eq!(JobState::from_number(state.number()), Some(*state));
        assert_eq!(JobState::from_name(state.name()), Some(*state));
    }
    assert_eq!(JobState::from_number(5), None);
}

fn any_end() -> impl Strategy<Value = AttemptEnd> {
    let cause = prop::sample::select(AttemptCause::ALL);
    let retry = prop::option::of(any::<bool>());
    (cause, retry, prop::option::of(any::<u64>()), 0..80_usize).prop_map(
        |(cause, retry, retry_after_ms, length)| AttemptEnd {
            cause,
            json: Some("1".repeat(length).into()),
            retry,
            retry_after_ms,
            is_invalid_params: false,
        },
    )
}

proptest! {
    /// Each run of ends terminates: every counted attempt and crash comes closer to the end.
    #[test]
    fn counters_never_exceed_their_limits(
        ends in prop::collection::vec(any_end(), 1..200),
        max_attempts in 1..20_u32,
        jitter: u16,
    ) {
        let mut counters = JobCounters { max_attempts, ..JobCounters::default() };
        for end in &ends {
            counters.attempt += 1;
            prop_assert!(counters.attempt <= max_attempts);
            let (after, fate) = after_attempt(counters, false, end, &RULES, (NOW, jitter));
            prop_assert!(after.attempt + 1 >= counters.attempt && after.attempt <= counters.attempt);
            prop_assert!(after.crashes <= RULES.max_crashes);
            match fate {
                JobFate::End { state, reason } => {
                    prop_assert!(state.is_ended());
                    prop_assert_eq!(state == JobState::Dead, reason.is_some());
                    return Ok(());
                }
                JobFate::Wait { due_ms } => {
                    prop_assert!((NOW..=NOW + MAX_DELAY_MS).contains(&due_ms));
                    prop_assert!(after.attempt < max_attempts);
                }
            }
            counters = after;
        }
    }
}
