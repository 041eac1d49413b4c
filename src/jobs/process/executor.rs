//! Describes an executor to the jobs process: its attempts, its room, and how its attempts end.
//!
//! Pure, except that it reads what executors show in the scoreboard.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;

use serde_json::json;

use super::ticket::Ticket;
use crate::jobs::policy::states::{AttemptCause, AttemptEnd, EndReason, JobState};
use crate::jobs::store::request::StoreRequest;
use crate::link::attempt_frame::{AttemptEndKind, AttemptFrame, AttemptId, AttemptReport};
use crate::link::executor_end::ExecutorCause;
use crate::link::scoreboard::WorkerRecord;
use crate::protocol::answer::bare_error_text;
use crate::protocol::code::Code;
use crate::protocol::job_id::JobId;
use crate::protocol::rpc_error::RpcError;

/// How long the master may take to say why an executor has ended, in milliseconds. After that, its attempts count as
/// lost, because the master may have ended too.
pub(super) const CAUSE_MS: u64 = 10_000;
/// The largest number of ended processes whose cause is kept.
const MOST_ENDED: usize = 1_000;
/// How late the frames of a process may be read that has ended. No other process gets its pid within this time.
const LATE_MS: u64 = 1_000;

/// What is to be done.
#[derive(Debug, PartialEq)]
pub enum ExecutorAction {
    /// Submit a request to the store.
    Store(StoreRequest, Ticket),
    /// Send a frame over this link.
    Send(u64, AttemptFrame<'static>),
    /// Read which attempts run according to the store, and call `compare`.
    ReadRunning,
    /// A job has ended: answer the calls that wait for it, count it, and log it if it is dead.
    JobEnded {
        job: JobId,
        method: String,
        end: (JobState, Option<EndReason>),
        /// The number of its last attempt, if it is known.
        attempts: Option<u32>,
    },
    /// Count an attempt of a method with this cause and run time.
    Count(String, AttemptCause, u64),
    /// Count an outcome that came too late.
    CountStale,
}

/// What is to be done, in this order.
pub type Actions = Vec<ExecutorAction>;

/// An attempt whose end is not stored.
#[derive(Debug)]
pub struct TrackedAttempt {
    pub method: String,
    /// The number of the attempt, from 1; `None` if this process has not begun it.
    pub number: Option<u32>,
    /// When its timeout is over, in milliseconds (CLOCK_MONOTONIC); `None` likewise.
    pub deadline_ms: Option<u64>,
    /// Whether a settlement is on its way to the store.
    pub is_settling: bool,
    /// Whether its executor has got the cancel that the store shows.
    pub is_cancelled: bool,
}

/// Why processes have ended, by pid. It is kept also if the process had a link, because another jobs process may have
/// claimed jobs for it.
#[derive(Debug, Default)]
pub struct EndedProcesses(BTreeMap<i32, (ExecutorCause, u64)>);

impl EndedProcesses {
    /// Records why a process has ended, as the master says.
    pub fn add(&mut self, pid: i32, cause: ExecutorCause, now_ms: u64) {
        if self.0.len() >= MOST_ENDED {
            let oldest = self.0.iter().min_by_key(|(_, (_, at_ms))| *at_ms);
            let oldest = oldest.map(|(pid, _)| *pid);
            oldest.map(|pid| self.0.remove(&pid));
        }
        self.0.insert(pid, (cause, now_ms));
    }

    /// Returns why a process has ended, if that is known.
    pub fn cause(&self, pid: i32) -> Option<ExecutorCause> {
        self.0.get(&pid).map(|(cause, _)| *cause)
    }

    /// Handles that a process has named itself. Returns why it has ended if the master has said that just before: then
    /// its frames were read late. Otherwise it has got the pid of another process.
    pub fn named(&mut self, pid: i32, now_ms: u64) -> Option<ExecutorCause> {
        let (cause, at_ms) = *self.0.get(&pid)?;
        if at_ms.saturating_add(LATE_MS) < now_ms {
            self.0.remove(&pid);
            return None;
        }
        Some(cause)
    }
}

/// What limits the attempts of all executors.
#[derive(Debug, Clone)]
pub struct ExecutorLimits {
    /// The largest numbers of attempts of an executor, by lane.
    pub places: Vec<usize>,
    /// The generation of this process, as records show it.
    pub generation: u32,
    /// The largest number of bytes of params that fit into a frame.
    pub longest_params: usize,
}

/// A worker or pool process, as the jobs process sees it.
#[derive(Debug)]
pub struct Executor {
    pub pid: i32,
    pub lane: usize,
    /// `None` once its link has ended.
    pub record: Option<&'static WorkerRecord>,
    pub attempts: BTreeMap<AttemptId, TrackedAttempt>,
    /// Attempts that it has named over its link, and that were not compared with the store yet.
    pub named: Vec<AttemptId>,
    /// Reports about attempts that this process does not know yet.
    pub reports: Vec<AttemptReport<'static>>,
    /// The number of the read of the store that must end before `named` and `reports` are handled.
    pub needs_read: u64,
    /// The largest number of jobs of a claim that is under way.
    pub claiming: Option<usize>,
    /// Attempts in the store that this claim may have begun.
    pub maybe_claimed: Vec<AttemptId>,
    /// Whether it begins no further attempt.
    pub is_leaving: bool,
    /// The capacity epoch of its record when `sent_since` was zero.
    epoch: u32,
    /// The number of attempts sent that its record may not show yet.
    pub sent_since: u32,
    /// What the master says about its death.
    pub cause: Option<ExecutorCause>,
    /// When its link ended, in milliseconds (CLOCK_MONOTONIC).
    pub ended_ms: Option<u64>,
}

impl TrackedAttempt {
    /// Creates the entry of an attempt that this process has not begun, but found in the store.
    pub fn found(method: &str) -> Self {
        TrackedAttempt {
            method: method.to_owned(),
            number: None,
            deadline_ms: None,
            is_settling: false,
            is_cancelled: false,
        }
    }

    /// Returns whether this process has not begun it, and does not settle it.
    pub fn is_found(&self) -> bool {
        self.number.is_none() && !self.is_settling
    }
}

impl Executor {
    /// Creates the entry of a process that has named itself over a link.
    pub fn linked((pid, lane): (i32, usize), record: &'static WorkerRecord) -> Self {
        Executor {
            record: Some(record),
            lane,
            epoch: record.capacity_epoch.load(Relaxed),
            ended_ms: None,
            ..Executor::dead(pid, 0, None)
        }
    }

    /// Creates the entry of a process that has ended before it was linked. `cause` is what is known about its end.
    pub fn dead(pid: i32, ended_ms: u64, cause: Option<ExecutorCause>) -> Self {
        Executor {
            pid,
            lane: 0,
            record: None,
            attempts: BTreeMap::new(),
            named: Vec::new(),
            reports: Vec::new(),
            needs_read: 0,
            claiming: None,
            maybe_claimed: Vec::new(),
            is_leaving: false,
            epoch: 0,
            sent_since: 0,
            cause,
            ended_ms: Some(ended_ms),
        }
    }

    /// Returns whether it is known why it has ended, and all that it has sent was handled.
    pub fn end(&self) -> Option<ExecutorCause> {
        self.cause.filter(|_| self.ended_ms.is_some())
    }

    /// Returns how many attempts it could begin now. `places` are the largest numbers of attempts of an executor, by
    /// lane. `generation` is that of this process, as records show it.
    pub fn room(&mut self, places: &[usize], generation: u32, now_ms: u64) -> usize {
        let Some(record) = self.record.filter(|_| !self.is_leaving) else {
            return 0;
        };
        if !record.is_fresh(now_ms) {
            return 0;
        }
        if self.lane > 0 {
            // A pool process that stays at a reload shows its lane in the newest generation.
            if record.generation.load(Relaxed) != generation {
                return 0;
            }
            self.lane = record.lane.load(Relaxed) as usize;
        }
        let epoch = record.capacity_epoch.load(Relaxed);
        if epoch != self.epoch {
            (self.epoch, self.sent_since) = (epoch, 0);
        }
        let idle = record.idle.load(Relaxed).saturating_sub(self.sent_since) as usize;
        // An attempt leaves its place when its end is stored. A claim is stored after the ends that came before it. A
        // pool process may show more idle capacity than it has places, because it takes short calls ahead.
        let running = self.attempts.values().filter(|it| !it.is_settling);
        let places = places.get(self.lane).copied().unwrap_or(0);
        idle.min(places.saturating_sub(running.count()))
    }
}

/// Returns the end of an attempt from the report of its executor.
pub fn end_of_report(report: AttemptReport<'_>) -> AttemptEnd {
    let json = report.json.map(|json| json.into_owned().into_boxed_str());
    let without = |cause| AttemptEnd::without_answer(cause, json.clone());
    match report.kind {
        AttemptEndKind::Result => AttemptEnd::result(json.unwrap_or_else(|| "null".into())),
        AttemptEndKind::Error => match json {
            Some(json) => AttemptEnd::error(json),
            None => AttemptEnd::without_answer(AttemptCause::Error, None),
        },
        AttemptEndKind::Crashed => without(AttemptCause::Crashed),
        AttemptEndKind::Unclear => without(AttemptCause::Unclear),
        AttemptEndKind::Killed => without(AttemptCause::Killed),
        AttemptEndKind::Interrupted => without(AttemptCause::Interrupted),
        AttemptEndKind::NeverBegun => without(AttemptCause::NeverBegun),
    }
}

/// Returns the end of an attempt whose params do not fit into a frame, because `limits.frame` was lowered.
pub fn end_of_too_long(length: usize) -> AttemptEnd {
    let text = format!(
        "its params have {length} bytes, and limits.frame allows less now; raise it, then use preforkd job retry"
    );
    let error = RpcError::of(Code::InvalidParams, text, false);
    AttemptEnd::error(bare_error_text(&error.with_data(json!({ "retry": false }))))
}

/// Returns how an attempt ended whose executor has died. `is_named` is whether the evidence names it.
pub fn end_of_dead(
    attempt: &TrackedAttempt,
    cause: ExecutorCause,
    is_named: bool,
    now_ms: u64,
) -> AttemptEnd {
    let crashed = |cause, text: &str| {
        let error = RpcError::of(Code::Crashed, text, true);
        AttemptEnd::without_answer(cause, Some(bare_error_text(&error).into()))
    };
    match cause {
        ExecutorCause::Ordered if attempt.deadline_ms.is_some_and(|at| at <= now_ms) => {
            let text = "its timeout passed before it was done";
            AttemptEnd::error(bare_error_text(&RpcError::of(Code::Timeout, text, true)))
        }
        ExecutorCause::Ordered => AttemptEnd::without_answer(AttemptCause::Interrupted, None),
        ExecutorCause::Outside => crashed(
            AttemptCause::Killed,
            "the process that ran it was killed from outside",
        ),
        ExecutorCause::Attempt(_) if is_named => {
            crashed(AttemptCause::Crashed, "it ended the process that ran it")
        }
        ExecutorCause::Attempt(_) | ExecutorCause::OtherCall => crashed(
            AttemptCause::OtherCrashed,
            "another call or job ended the process that ran it",
        ),
        ExecutorCause::Unclear => crashed(
            AttemptCause::Unclear,
            "the process that ran it has died, and the cause is not known",
        ),
    }
}

/// Converts a time of the store to the monotonic clock. `now` are the monotonic time and that of the store.
pub fn monotonic_of(at_ms: u64, (now_ms, store_ms): (u64, u64)) -> u64 {
    now_ms.saturating_add(at_ms.saturating_sub(store_ms))
}
