use std::num::NonZeroUsize;
use std::sync::atomic::Ordering::Relaxed;

use super::super::claiming::{claim, claimed as claimed_for};
use super::super::claims::QueueMethod;
use super::super::comparison::compare;
use super::super::lost_executors::{executor_ended, pass_time};
use super::*;
use crate::jobs::policy::states::{AttemptCause, EndReason, JobState};
use crate::jobs::record::AttemptOwner;
use crate::jobs::rules::tests::config;
use crate::jobs::store::request::{ClaimedJob, RunningAttempt};
use crate::link::attempt_frame::ExecutorHello;
use crate::link::executor_end::ExecutorEnd;
use crate::sys::shared_memory;

const NOW: u64 = 1_000_000;
/// The monotonic time, and the time of the store.
const BOTH: (u64, u64) = (NOW, NOW + 5_000_000);
const WORKER: u64 = 3;
const PID: i32 = 77;

fn record(idle: u32) -> &'static WorkerRecord {
    let records: &'static [WorkerRecord] =
        shared_memory::array_without_file(NonZeroUsize::MIN).unwrap();
    records[0].heartbeat_ms.store(NOW, Relaxed);
    records[0].idle.store(idle, Relaxed);
    &records[0]
}

/// Returns how many attempts run.
fn running(executors: &Executors) -> usize {
    let executors = executors.all.values();
    executors.map(|executor| executor.attempts.len()).sum()
}

fn id(token: u64) -> AttemptId {
    AttemptId {
        job: [token as u8; 16],
        token,
    }
}

fn claimed(token: u64) -> ClaimedJob {
    ClaimedJob {
        id: JobId(id(token).job),
        token,
        method: "mail".into(),
        params: "[1]".into(),
        attempt: 2,
        max_attempts: 3,
        timeout_ms: 100,
        trace: None,
        due_ms: 0,
    }
}

fn row(token: u64, pid: i32) -> RunningAttempt {
    RunningAttempt {
        id: JobId(id(token).job),
        token,
        method: "mail".into(),
        executor: pid,
        is_cancel_requested: false,
        process: None,
    }
}

fn report(token: u64, kind: AttemptEndKind) -> AttemptFrame<'static> {
    AttemptFrame::End(AttemptReport {
        kind,
        took_us: 5,
        json: Some("1".into()),
        ..AttemptReport::never_begun(id(token))
    })
}

/// Executors without one.
fn executors() -> Executors {
    let method = |lane| QueueMethod {
        lane,
        concurrency: 0,
    };
    let methods = [
        ("mail".to_owned(), method(0)),
        ("pool".to_owned(), method(1)),
    ];
    let plan = ClaimPlan::new(BTreeMap::from(methods));
    let limits = ExecutorLimits {
        places: vec![4, 2],
        generation: 2,
        longest_params: 100,
    };
    Executors::new(JobId([9; 16]), config(), plan, limits)
}

/// Links a worker that has these attempts.
fn link(executors: &mut Executors, link: u64, pid: i32, attempts: Vec<AttemptId>) {
    let hello = AttemptFrame::Executor(ExecutorHello {
        pid,
        lane: 0,
        attempts,
    });
    let actions = executors.receive(link, record(4), hello, NOW);
    assert_eq!(actions, Some(vec![ExecutorAction::ReadRunning]));
}

/// Executors with a worker that has one attempt.
fn with_attempt() -> Executors {
    let mut executors = executors();
    link(&mut executors, WORKER, PID, Vec::new());
    assert_eq!(compare(&mut executors, &[], true, |_| true, NOW), []);
    executors.plan().add_due("mail", NOW, 1);
    let claims = claim(&mut executors, NOW, true);
    assert!(
        matches!(&claims[..], [ExecutorAction::Store(StoreRequest::Claim(claim), Ticket::Claim(WORKER))]
            if claim.most == 4 && claim.owner.executor == PID),
        "{claims:?}"
    );
    let sent = claimed_for(&mut executors, WORKER, vec![claimed(1)], None, BOTH);
    assert!(
        matches!(&sent[..], [ExecutorAction::Send(WORKER, AttemptFrame::Start(start))]
            if start.id == id(1) && start.attempt == 2 && start.timeout_ms == 100),
        "{sent:?}"
    );
    executors
}

/// Returns the cause with which an attempt is settled.
fn settlement(actions: &[ExecutorAction]) -> Option<(AttemptId, AttemptCause)> {
    actions.iter().find_map(|action| match action {
        ExecutorAction::Store(StoreRequest::Settle(settlement), Ticket::Settle(id)) => {
            assert_eq!((settlement.id.0, settlement.token), (id.job, id.token));
            Some((*id, settlement.end.cause))
        }
        _ => None,
    })
}

#[test]
fn a_report_is_settled_and_answered_after_the_commit() {
    let mut executors = with_attempt();
    let done = report(1, AttemptEndKind::Result);
    let actions = executors.receive(WORKER, record(0), done.clone(), NOW);
    let expected = Some((id(1), AttemptCause::Result));
    assert_eq!(settlement(&actions.unwrap()), expected);
    assert!(!executors.is_settled());
    // It is sent again over a new link, while the first one is on its way.
    let again = executors.receive(WORKER, record(0), done, NOW);
    assert_eq!(again, Some(Vec::new()));
    let end = JobFate::End {
        state: JobState::Done,
        reason: None,
    };
    let actions = executors.settled(id(1), &SettleReply::Stored(end), BOTH);
    let job = JobId(id(1).job);
    assert_eq!(
        actions,
        [
            ExecutorAction::JobEnded {
                job,
                method: "mail".into(),
                end: (JobState::Done, None),
                attempts: Some(2),
            },
            ExecutorAction::Send(WORKER, AttemptFrame::Stored(id(1)))
        ]
    );
    assert!(executors.is_settled() && running(&executors) == 0);
}

#[test]
fn a_retry_is_claimed_when_it_is_due() {
    let mut executors = with_attempt();
    let error = report(1, AttemptEndKind::Error);
    assert!(executors.receive(WORKER, record(0), error, NOW).is_some());
    let wait = JobFate::Wait {
        due_ms: BOTH.1 + 700,
    };
    executors.settled(id(1), &SettleReply::Stored(wait), BOTH);
    assert_eq!(executors.next_ms(), Some(NOW + 700));
    assert_eq!(claim(&mut executors, NOW + 699, true), []);
    assert_eq!(claim(&mut executors, NOW + 700, true).len(), 1);
    let dead = JobFate::End {
        state: JobState::Dead,
        reason: Some(EndReason::Attempts),
    };
    assert_eq!(
        executors.settled(id(9), &SettleReply::Stored(dead), BOTH),
        []
    );
}

#[test]
fn a_late_outcome_is_counted_as_stale() {
    let mut executors = with_attempt();
    let done = report(1, AttemptEndKind::Result);
    executors.receive(WORKER, record(0), done, NOW);
    let stale = SettleReply::Stale { current: Some(2) };
    assert_eq!(
        executors.settled(id(1), &stale, BOTH),
        [
            ExecutorAction::CountStale,
            ExecutorAction::Send(WORKER, AttemptFrame::Stored(id(1)))
        ]
    );
}

#[test]
fn the_attempts_of_a_dead_worker_wait_for_the_cause_and_for_its_last_report() {
    let ended = |cause| ExecutorEnd { pid: PID, cause };
    let named = ExecutorCause::Attempt(attempt_mark(id(1)));
    for (cause, expected) in [
        (named, AttemptCause::Crashed),
        (ExecutorCause::Attempt(0), AttemptCause::OtherCrashed),
        (ExecutorCause::OtherCall, AttemptCause::OtherCrashed),
        (ExecutorCause::Unclear, AttemptCause::Unclear),
        (ExecutorCause::Outside, AttemptCause::Killed),
        (ExecutorCause::Ordered, AttemptCause::Interrupted),
    ] {
        let mut executors = with_attempt();
        assert_eq!(executor_ended(&mut executors, ended(cause), NOW), []);
        let actions = executors.link_ended(WORKER, NOW);
        assert_eq!(settlement(&actions), Some((id(1), expected)));
        let mut executors = with_attempt();
        assert_eq!(executors.link_ended(WORKER, NOW), []);
        let actions = executor_ended(&mut executors, ended(cause), NOW);
        assert_eq!(settlement(&actions), Some((id(1), expected)));
        let wait = SettleReply::Stored(JobFate::Wait { due_ms: BOTH.1 });
        assert_eq!(executors.settled(id(1), &wait, BOTH), []);
        assert!(executors.all.is_empty());
    }
}

#[test]
fn an_attempt_whose_time_was_over_at_an_ordered_end_has_timed_out() {
    let mut executors = with_attempt();
    executors.link_ended(WORKER, NOW);
    let ended = ExecutorEnd {
        pid: PID,
        cause: ExecutorCause::Ordered,
    };
    let actions = executor_ended(&mut executors, ended, NOW + 100);
    assert_eq!(settlement(&actions), Some((id(1), AttemptCause::Timeout)));
}

#[test]
fn without_a_word_of_the_master_a_dead_worker_counts_as_killed() {
    let mut executors = with_attempt();
    executors.link_ended(WORKER, NOW);
    assert_eq!(executors.next_ms(), Some(NOW + CAUSE_MS));
    assert_eq!(pass_time(&mut executors, |_| false, NOW + CAUSE_MS - 1), []);
    let actions = pass_time(&mut executors, |_| false, NOW + CAUSE_MS);
    assert_eq!(settlement(&actions), Some((id(1), AttemptCause::Killed)));
}

#[test]
fn the_end_of_a_worker_may_be_known_before_its_last_frames_are_read() {
    let ended = ExecutorEnd {
        pid: PID,
        cause: ExecutorCause::Ordered,
    };
    let mut executors = executors();
    executor_ended(&mut executors, ended, NOW);
    compare(&mut executors, &[], false, |_| false, NOW);
    link(&mut executors, WORKER, PID, vec![id(1)]);
    let settled = compare(&mut executors, &[row(1, PID)], true, |_| false, NOW);
    assert_eq!(settlement(&settled), None, "a report may follow");
    let actions = executors.link_ended(WORKER, NOW);
    assert_eq!(
        settlement(&actions),
        Some((id(1), AttemptCause::Interrupted))
    );
}

#[test]
fn the_cause_of_an_end_is_kept_for_what_another_jobs_process_has_claimed() {
    let ended = ExecutorEnd {
        pid: PID,
        cause: ExecutorCause::Ordered,
    };
    let mut executors = with_attempt();
    executor_ended(&mut executors, ended, NOW);
    executors.link_ended(WORKER, NOW);
    executors.settled(id(1), &SettleReply::Repeated, BOTH);
    for token in [2, 3] {
        executors.read_running();
        let actions = compare(&mut executors, &[row(token, PID)], true, |_| false, NOW);
        assert_eq!(
            settlement(&actions),
            Some((id(token), AttemptCause::Interrupted))
        );
        executors.settled(id(token), &SettleReply::Repeated, BOTH);
    }
    // Another process has got the pid.
    let hello = AttemptFrame::Executor(ExecutorHello {
        pid: PID,
        lane: 0,
        attempts: Vec::new(),
    });
    executors.receive(WORKER, record(4), hello, NOW + 5_000);
    assert_eq!(executors.ended.cause(PID), None);
}

#[test]
fn a_jobs_process_takes_over_the_attempts_of_its_predecessor() {
    let mut executors = executors();
    link(&mut executors, WORKER, PID, vec![id(1), id(2)]);
    // The report of one came before the store was read.
    let early = executors.receive(WORKER, record(0), report(2, AttemptEndKind::Result), NOW);
    assert_eq!(early, Some(vec![ExecutorAction::ReadRunning]));
    let rows = [row(1, PID), row(2, PID), row(3, PID), row(4, 5), row(6, 7)];
    let is_alive = |pid| pid == 5;
    // The first read may be older than the report.
    let actions = compare(&mut executors, &rows, true, is_alive, NOW);
    assert_eq!(settlement(&actions), None);
    let actions = compare(&mut executors, &rows, true, is_alive, NOW);
    let settled: Vec<_> = (actions.chunks(2)).filter_map(settlement).collect();
    // The worker never got the third one.
    assert_eq!(
        settled,
        [
            (id(3), AttemptCause::NeverBegun),
            (id(2), AttemptCause::Result)
        ]
    );
    assert!(executors.all[&WORKER].attempts.contains_key(&id(1)));
    // The executor of the last one is gone.
    let ended = ExecutorEnd {
        pid: 7,
        cause: ExecutorCause::Unclear,
    };
    let actions = executor_ended(&mut executors, ended, NOW);
    assert_eq!(settlement(&actions), Some((id(6), AttemptCause::Unclear)));
}

#[test]
fn what_the_master_says_counts_also_if_another_process_has_the_pid() {
    let mut executors = executors();
    let end = ExecutorEnd {
        pid: 77,
        cause: ExecutorCause::Outside,
    };
    executor_ended(&mut executors, end, NOW);
    let actions = compare(&mut executors, &[row(1, 77)], true, |_| true, NOW);
    assert_eq!(settlement(&actions), Some((id(1), AttemptCause::Killed)));
}

#[test]
fn another_jobs_process_may_have_claimed_what_an_executor_does_not_name() {
    let mut executors = executors();
    link(&mut executors, WORKER, PID, Vec::new());
    let actions = compare(&mut executors, &[row(1, PID)], false, |_| true, NOW);
    assert_eq!(actions, []);
    assert_eq!(running(&executors), 0);
}

#[test]
fn a_row_that_was_read_before_its_settlement_is_left_alone() {
    let mut executors = with_attempt();
    executors.receive(WORKER, record(0), report(1, AttemptEndKind::Result), NOW);
    link(&mut executors, 4, 78, Vec::new());
    executors.settled(id(1), &SettleReply::Repeated, BOTH);
    assert_eq!(
        compare(&mut executors, &[row(1, PID)], true, |_| true, NOW),
        []
    );
}

#[test]
fn jobs_claimed_for_a_worker_that_has_gone_never_began() {
    let mut executors = with_attempt();
    executors.plan().add_due("mail", NOW, 1);
    assert_eq!(claim(&mut executors, NOW, true).len(), 1);
    executors.link_ended(WORKER, NOW);
    let ended = ExecutorEnd {
        pid: PID,
        cause: ExecutorCause::Ordered,
    };
    let actions = executor_ended(&mut executors, ended, NOW);
    assert_eq!(
        settlement(&actions),
        Some((id(1), AttemptCause::Interrupted))
    );
    let actions = claimed_for(&mut executors, WORKER, vec![claimed(2)], None, BOTH);
    assert_eq!(
        settlement(&actions),
        Some((id(2), AttemptCause::NeverBegun))
    );
}

#[test]
fn claims_follow_the_room_of_a_worker() {
    let mut executors = executors();
    link(&mut executors, WORKER, PID, Vec::new());
    compare(&mut executors, &[], true, |_| true, NOW);
    executors.plan().add_due("mail", NOW, 1);
    assert_eq!(claim(&mut executors, NOW, false), [], "the store is away");
    assert_eq!(executors.waiting_in(0), 1);
    executors.offers(WORKER, NOW);
    executors.leaves(WORKER);
    assert_eq!(claim(&mut executors, NOW, true), []);
    let mut executors = with_attempt();
    // The record does not show the attempt yet, and three more may begin.
    executors.plan().add_due("mail", NOW, 9);
    let claims = claim(&mut executors, NOW, true);
    assert!(
        matches!(&claims[..], [ExecutorAction::Store(StoreRequest::Claim(claim), _)] if claim.most == 3),
        "{claims:?}"
    );
    executors.leave();
    assert_eq!(claim(&mut executors, NOW + 1_000, true), []);
    assert_eq!(executors.waiting_in(0), 0);
}

#[test]
fn an_executor_forgets_an_outcome_that_a_broken_store_cannot_take() {
    let mut executors = with_attempt();
    let record = executors.all[&WORKER].record.unwrap();
    let end = report(1, AttemptEndKind::Result);
    executors.receive(WORKER, record, end, NOW).unwrap();
    assert!(!executors.is_settled());
    let forget = ExecutorAction::Send(WORKER, AttemptFrame::Stored(id(1)));
    assert_eq!(executors.not_settled(id(1)), [forget]);
    assert!(executors.is_settled());
    assert_eq!(executors.not_settled(id(1)), []);
}

#[test]
fn a_cancel_goes_to_the_executor_of_the_attempt() {
    let executors = with_attempt();
    let owner = |pid| AttemptOwner {
        instance: JobId([9; 16]),
        executor: pid,
    };
    let job = JobId(id(1).job);
    let requested = |pid| CancelReply::Requested {
        owner: owner(pid),
        token: 1,
    };
    assert_eq!(
        executors.cancelled(job, &requested(PID)),
        [ExecutorAction::Send(WORKER, AttemptFrame::Cancel(id(1)))]
    );
    assert_eq!(executors.cancelled(job, &requested(5)), []);
    let ended = CancelReply::Ended { method: "a".into() };
    assert_eq!(executors.cancelled(job, &ended), []);
}

#[test]
fn what_an_executor_names_or_reports_is_tracked_although_a_claim_is_under_way() {
    let mut executors = executors();
    link(&mut executors, WORKER, PID, Vec::new());
    assert_eq!(compare(&mut executors, &[], true, |_| true, NOW), []);
    executors.plan().add_due("mail", NOW, 1);
    assert_eq!(claim(&mut executors, NOW, true).len(), 1);
    link(&mut executors, WORKER, PID, vec![id(1)]);
    let done = report(2, AttemptEndKind::Result);
    executors.receive(WORKER, record(4), done, NOW).unwrap();
    let rows = [row(1, PID), row(2, PID), row(3, PID), row(4, PID)];
    assert_eq!(compare(&mut executors, &rows, true, |_| true, NOW), []);
    let actions = compare(&mut executors, &rows, true, |_| true, NOW);
    assert_eq!(
        settlement(&actions),
        Some((id(2), AttemptCause::Result)),
        "it is stored before it is answered"
    );
    assert!(executors.all[&WORKER].attempts.contains_key(&id(1)));
    // The claim brings one of the others. The reply to the claim of the last one was lost.
    let actions = claimed_for(&mut executors, WORKER, vec![claimed(3)], None, BOTH);
    assert!(actions.contains(&ExecutorAction::ReadRunning));
    let actions = compare(&mut executors, &rows, true, |_| true, NOW);
    let lost = Some((id(4), AttemptCause::NeverBegun));
    assert_eq!(settlement(&actions), lost);
}

#[test]
fn a_read_that_fails_is_not_repeated_at_once() {
    let mut executors = executors();
    link(&mut executors, WORKER, PID, vec![id(1)]);
    executors.read_failed(NOW);
    assert_eq!(executors.next_ms(), Some(NOW + READ_AGAIN_MS));
    let none = pass_time(&mut executors, |_| true, NOW + READ_AGAIN_MS - 1);
    assert_eq!(none, []);
    let again = pass_time(&mut executors, |_| true, NOW + READ_AGAIN_MS);
    assert_eq!(again, [ExecutorAction::ReadRunning]);
    compare(&mut executors, &[row(1, PID)], true, |_| true, NOW);
    assert!(executors.all[&WORKER].attempts.contains_key(&id(1)));
    assert_eq!(executors.next_ms(), None);
}

#[test]
fn a_process_that_lives_keeps_its_attempts_until_its_next_link() {
    let mut executors = with_attempt();
    executors.plan().add_due("mail", NOW, 1);
    assert_eq!(claim(&mut executors, NOW, true).len(), 1);
    claimed_for(&mut executors, WORKER, vec![claimed(2)], None, BOTH);
    executors.link_ended(WORKER, NOW);
    let later = NOW + CAUSE_MS;
    assert_eq!(pass_time(&mut executors, |_| true, later), []);
    assert_eq!(executors.next_ms(), Some(later + CAUSE_MS));
    let hello = AttemptFrame::Executor(ExecutorHello {
        pid: PID,
        lane: 0,
        attempts: vec![id(1)],
    });
    let actions = executors.receive(9, record(4), hello, later).unwrap();
    // It has not got the second one.
    let unsent = Some((id(2), AttemptCause::NeverBegun));
    assert_eq!(settlement(&actions), unsent);
    let rows = [row(1, PID), row(2, PID)];
    let actions = compare(&mut executors, &rows, true, |_| true, later);
    assert_eq!(actions, [], "both are known");
    executors.settled(id(2), &SettleReply::Repeated, BOTH);
    assert_eq!((executors.all.len(), running(&executors)), (1, 1));
    let actions = executors.receive(9, record(4), report(1, AttemptEndKind::Result), later);
    let done = Some((id(1), AttemptCause::Result));
    assert_eq!(settlement(&actions.unwrap()), done);
}

#[test]
fn the_attempts_of_a_dead_worker_are_left_to_its_jobs_process_while_that_lives() {
    let mut executors = executors();
    let end = ExecutorEnd {
        pid: 7,
        cause: ExecutorCause::Unclear,
    };
    let read = executor_ended(&mut executors, end, NOW);
    assert_eq!(read, [ExecutorAction::ReadRunning]);
    let look = |executors: &mut Executors, is_alone, now_ms| {
        let actions = compare(executors, &[row(6, 7)], is_alone, |_| false, now_ms);
        settlement(&actions)
    };
    assert_eq!(look(&mut executors, false, NOW), None);
    assert_eq!(executors.next_ms(), Some(NOW + CAUSE_MS));
    let read = pass_time(&mut executors, |_| false, NOW + CAUSE_MS);
    assert_eq!(read, [ExecutorAction::ReadRunning]);
    let unclear = Some((id(6), AttemptCause::Unclear));
    assert_eq!(look(&mut executors, false, NOW + CAUSE_MS), unclear);
}

#[test]
fn a_cancel_of_another_jobs_process_reaches_the_attempt_once() {
    let mut executors = with_attempt();
    let requested = RunningAttempt {
        is_cancel_requested: true,
        ..row(1, PID)
    };
    let rows = [requested];
    let cancel = ExecutorAction::Send(WORKER, AttemptFrame::Cancel(id(1)));
    executors.read_running();
    let actions = compare(&mut executors, &rows, false, |_| true, NOW);
    assert_eq!(actions, [cancel]);
    executors.read_running();
    let actions = compare(&mut executors, &rows, false, |_| true, NOW);
    assert_eq!(actions, []);
}

#[test]
fn an_attempt_that_another_jobs_process_has_settled_is_forgotten() {
    let mut executors = executors();
    link(&mut executors, WORKER, PID, vec![id(1), id(2)]);
    let rows = [row(1, PID), row(2, PID)];
    assert_eq!(compare(&mut executors, &rows, false, |_| true, NOW), []);
    assert_eq!(running(&executors), 2);
    executors.read_running();
    let rows = &rows[1..];
    assert_eq!(compare(&mut executors, rows, false, |_| true, NOW), []);
    assert_eq!(running(&executors), 1);
    executors.read_running();
    compare(&mut executors, &[], false, |_| true, NOW);
    assert!(executors.is_settled());
    // One that was begun here may have been claimed after the read.
    let mut executors = with_attempt();
    executors.read_running();
    compare(&mut executors, &[], true, |_| true, NOW);
    assert_eq!(running(&executors), 1);
}

#[test]
fn params_that_do_not_fit_into_a_frame_end_their_job() {
    let mut executors = with_attempt();
    executors.plan().add_due("mail", NOW, 1);
    assert_eq!(claim(&mut executors, NOW, true).len(), 1);
    let long = ClaimedJob {
        params: "1".repeat(101).into(),
        ..claimed(2)
    };
    let actions = claimed_for(&mut executors, WORKER, vec![long, claimed(3)], None, BOTH);
    assert_eq!(settlement(&actions), Some((id(2), AttemptCause::Error)));
    let starts = actions.iter().filter_map(|action| match action {
        ExecutorAction::Send(_, AttemptFrame::Start(start)) => Some(start.id),
        _ => None,
    });
    assert_eq!(starts.collect::<Vec<_>>(), [id(3)]);
    let ends_the_job = |action: &ExecutorAction| matches!(action, ExecutorAction::Store(StoreRequest::Settle(it), _) if it.end.retry == Some(false));
    assert!(actions.iter().any(ends_the_job));
}

#[test]
fn a_pool_process_that_shows_the_lanes_of_another_generation_gets_no_job() {
    let mut executors = executors();
    let pool = record(3);
    let hello = AttemptFrame::Executor(ExecutorHello {
        pid: PID,
        lane: 2,
        attempts: Vec::new(),
    });
    executors.receive(WORKER, pool, hello, NOW);
    pool.lane.store(1, Relaxed);
    pool.generation.store(3, Relaxed);
    executors.plan().add_due("pool", NOW, 1);
    assert_eq!(claim(&mut executors, NOW, true), []);
    pool.generation.store(2, Relaxed);
    executors.plan().has_room(1, NOW);
    assert_eq!(claim(&mut executors, NOW, true).len(), 1);
}

#[test]
fn the_next_claim_is_stored_together_with_the_end_of_an_attempt() {
    let mut executors = with_attempt();
    executors.limits.places = vec![1];
    executors.plan().add_due("mail", NOW, 9);
    assert_eq!(claim(&mut executors, NOW, true), []);
    let record = executors.all[&WORKER].record.unwrap();
    record.capacity_epoch.fetch_add(1, Relaxed);
    let end = report(1, AttemptEndKind::Result);
    let actions = executors.receive(WORKER, record, end, NOW).unwrap();
    assert_eq!(settlement(&actions).unwrap().0, id(1));
    let claims = claim(&mut executors, NOW, true);
    assert!(
        matches!(&claims[..], [ExecutorAction::Store(StoreRequest::Claim(claim), _)] if claim.most == 1),
        "{claims:?}"
    );
}

#[test]
fn a_pool_gets_no_more_jobs_than_it_has_places() {
    let mut executors = executors();
    let hello = AttemptFrame::Executor(ExecutorHello {
        pid: PID,
        lane: 1,
        attempts: Vec::new(),
    });
    // It takes short calls ahead.
    let shown = record(34);
    shown.lane.store(1, Relaxed);
    shown.generation.store(2, Relaxed);
    executors.receive(WORKER, shown, hello, NOW).unwrap();
    assert_eq!(compare(&mut executors, &[], true, |_| true, NOW), []);
    executors.plan().add_due("pool", NOW, 9);
    let claims = claim(&mut executors, NOW, true);
    assert!(
        matches!(&claims[..], [ExecutorAction::Store(StoreRequest::Claim(claim), _)] if claim.most == 2),
        "{claims:?}"
    );
}

#[test]
fn nothing_is_claimed_for_an_executor_before_its_attempts_are_known() {
    let mut executors = executors();
    link(&mut executors, WORKER, PID, vec![id(1), id(2)]);
    executors.plan().add_due("mail", NOW, 9);
    assert_eq!(claim(&mut executors, NOW, true), []);
    let rows = [row(1, PID), row(2, PID)];
    assert_eq!(compare(&mut executors, &rows, true, |_| true, NOW), []);
    let claims = claim(&mut executors, NOW, true);
    assert!(
        matches!(&claims[..], [ExecutorAction::Store(StoreRequest::Claim(claim), _)] if claim.most == 2),
        "{claims:?}"
    );
}
