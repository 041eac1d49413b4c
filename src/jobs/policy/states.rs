//! Decides what the end of an attempt does to a job: the state table of docs/jobs.md.
//!
//! [`after_attempt`] takes the counters of a running job and how the attempt ended. It returns the new
//! counters and either the next due time or the final state. The engine stores both in one transaction.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::UnixMs;
use crate::protocol::rpc_error::{RpcError, excerpt};
use crate::protocol::{Code, answer};

/// The longest delay of a job or a retry, in milliseconds: 365 days.
pub const MAX_DELAY_MS: u64 = 365 * 86_400_000;

/// A value of an enumeration with its name in records, and its number in the store. Neither ever changes.
macro_rules! named {
    ($(#[$doc:meta])* $name:ident { $($(#[$row:meta])* $variant:ident = $number:literal $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name { $($(#[$row])* $variant,)* }

        impl $name {
            /// All values in the order of their numbers.
            pub const ALL: &'static [$name] = &[$($name::$variant),*];

            /// Returns the name in records.
            pub const fn name(self) -> &'static str {
                match self { $($name::$variant => $text),* }
            }

            /// Returns the number in the store.
            pub const fn number(self) -> i64 {
                match self { $($name::$variant => $number),* }
            }

            /// Returns the value with this number.
            pub fn from_number(number: i64) -> Option<Self> {
                Self::ALL.iter().copied().find(|value| value.number() == number)
            }

            /// Returns the value with this name.
            pub fn from_name(name: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|value| value.name() == name)
            }
        }
    };
}

named! {
    /// The state of a job.
    JobState {
        /// Stored, and no attempt runs.
        Waiting = 0 "waiting",
        /// An attempt runs.
        Running = 1 "running",
        /// Ended with a result.
        Done = 2 "done",
        /// Ended without a result; [`EndReason`] says why.
        Dead = 3 "dead",
        /// Ended by a cancel request.
        Cancelled = 4 "cancelled",
    }
}

impl JobState {
    /// Returns whether the job has ended.
    pub const fn is_ended(self) -> bool {
        matches!(self, JobState::Done | JobState::Dead | JobState::Cancelled)
    }

    /// Returns whether an operator may let the job wait again.
    pub const fn may_wait_again(self) -> bool {
        matches!(self, JobState::Dead | JobState::Cancelled)
    }
}

named! {
    /// Why a job is dead.
    EndReason {
        /// `expires_ms` was over before an attempt began.
        Expired = 1 "expired",
        /// The last attempt failed.
        Attempts = 2 "attempts",
        /// The handler refused it: `invalid-params`, `data.retry: false`, or a result over `jobs.result`.
        Refused = 3 "refused",
        /// `max-crashes` crashes were counted.
        Crashes = 4 "crashes",
    }
}

named! {
    /// Why an attempt ended.
    AttemptCause {
        /// The handler returned a result.
        Result = 1 "result",
        /// The handler returned an error.
        Error = 2 "error",
        /// The attempt took longer than its timeout.
        Timeout = 3 "timeout",
        /// The command exited with a nonzero code.
        CommandFailed = 4 "command-failed",
        /// Its worker or pool program died by its own fault, and the evidence names this job.
        Crashed = 5 "crashed",
        /// Its worker exited by itself, was stuck, or was killed by the OOM killer. The evidence names no job.
        Unclear = 6 "unclear",
        /// Its worker or pool program was killed by a signal from outside, or its pool process died.
        Killed = 7 "killed",
        /// The machine or the instance that ran it was lost.
        Lost = 8 "lost",
        /// Its worker died, and the evidence names another call or job.
        OtherCrashed = 9 "other-crashed",
        /// Its own server interrupted it: `drain-timeout`, or a lease that was not renewed in time.
        Interrupted = 10 "interrupted",
        /// It was claimed but never began.
        NeverBegun = 11 "never-begun",
    }
}

impl AttemptCause {
    /// Returns whether the attempt counts.
    const fn counts(self) -> bool {
        !matches!(
            self,
            AttemptCause::OtherCrashed | AttemptCause::Interrupted | AttemptCause::NeverBegun
        )
    }

    const fn is_crash(self) -> bool {
        matches!(self, AttemptCause::Crashed | AttemptCause::Unclear)
    }

    const fn is_interruption(self) -> bool {
        matches!(self, AttemptCause::OtherCrashed | AttemptCause::Interrupted)
    }

    /// Returns whether the next attempt begins only after the backoff.
    const fn backs_off(self) -> bool {
        matches!(
            self,
            AttemptCause::Error
                | AttemptCause::Timeout
                | AttemptCause::CommandFailed
                | AttemptCause::Crashed
                | AttemptCause::Unclear
        )
    }
}

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttemptEnd {
    /// Why it ended.
    pub cause: AttemptCause,
    /// The result as JSON, or the error in the form of a call's error. `None` if there is neither.
    pub json: Option<Box<str>>,
    /// `data.retry` of the handler's error.
    pub retry: Option<bool>,
    /// `data.retry_after_ms` of the handler's error.
    pub retry_after_ms: Option<u64>,
    /// Whether the handler refused the params.
    pub is_invalid_params: bool,
}

/// An error in the form of a call's error. Only `code` is required.
#[derive(Deserialize)]
struct ErrorForm<'a> {
    code: i64,
    #[serde(borrow, default)]
    message: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    data: Option<&'a RawValue>,
}

impl AttemptEnd {
    /// The end of an attempt whose handler returned a result. `json` is the result.
    pub fn result(json: impl Into<Box<str>>) -> Self {
        AttemptEnd::new(AttemptCause::Result, Some(json.into()))
    }

    /// The end of an attempt with an error of the handler, a timeout or a failed command. `json` has the form
    /// of a call's error. Its code gives the cause, and its data may control the retry.
    pub fn error(json: impl Into<Box<str>>) -> Self {
        let json = json.into();
        let form = serde_json::from_str::<ErrorForm<'_>>(&json).ok();
        let code = form.as_ref().and_then(|form| Code::from_number(form.code));
        let data = form.and_then(|form| form.data);
        let data: Option<Value> = data.and_then(|data| serde_json::from_str(data.get()).ok());
        let member = |name| data.as_ref().and_then(|data| data.get(name));
        // A handler may compute the delay as a float. A negative one says nothing.
        let delay = member("retry_after_ms").and_then(Value::as_f64);
        let delay = delay.filter(|delay| *delay >= 0.0);
        AttemptEnd {
            retry: member("retry").and_then(Value::as_bool),
            retry_after_ms: delay.map(|delay| delay as u64),
            is_invalid_params: code == Some(Code::InvalidParams),
            ..AttemptEnd::new(
                match code {
                    Some(Code::Timeout) => AttemptCause::Timeout,
                    Some(Code::CommandFailed) => AttemptCause::CommandFailed,
                    _ => AttemptCause::Error,
                },
                Some(json),
            )
        }
    }

    /// The end of an attempt that was lost or interrupted. `json` is the error that the record keeps, if
    /// there is one.
    pub fn without_answer(cause: AttemptCause, json: Option<Box<str>>) -> Self {
        AttemptEnd::new(cause, json)
    }

    fn new(cause: AttemptCause, json: Option<Box<str>>) -> Self {
        AttemptEnd {
            cause,
            json,
            retry: None,
            retry_after_ms: None,
            is_invalid_params: false,
        }
    }
}

/// The counters of a job. The record shows all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct JobCounters {
    /// Attempts that began and count. A claim adds one at once.
    pub attempt: u32,
    pub max_attempts: u32,
    pub crashes: u32,
    pub interruptions: u32,
}

/// The rules of a method for retries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryRules {
    /// The delay after the first failed attempt, in milliseconds.
    pub backoff_ms: u64,
    /// The longest delay, without the random part.
    pub max_backoff_ms: u64,
    /// The number of counted crashes that end a job; at least 1.
    pub max_crashes: u32,
    /// The largest number of bytes of a result.
    pub max_result: usize,
}

/// What happens to a job after an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobFate {
    /// It waits for the next attempt.
    Wait { due_ms: UnixMs },
    /// It has ended.
    End {
        state: JobState,
        reason: Option<EndReason>,
    },
}

/// Decides what happens to a running job after its attempt. `counters` include this attempt. `jitter` is
/// random: all of its values are equally likely.
pub fn after_attempt(
    counters: JobCounters,
    is_cancel_requested: bool,
    end: &AttemptEnd,
    rules: &RetryRules,
    (now, jitter): (UnixMs, u16),
) -> (JobCounters, JobFate) {
    let after = counted(counters, end.cause);
    let dead = |reason| JobFate::End {
        state: JobState::Dead,
        reason: Some(reason),
    };
    let is_result = end.cause == AttemptCause::Result;
    let is_too_long = is_over(end, rules);
    let fate = if is_result && !is_too_long {
        // Also after a cancel request: the work is done, and its result must not be lost.
        JobFate::End {
            state: JobState::Done,
            reason: None,
        }
    } else if is_cancel_requested {
        JobFate::End {
            state: JobState::Cancelled,
            reason: None,
        }
    } else if is_too_long || !may_retry(end) {
        dead(EndReason::Refused)
    } else if end.cause.is_crash() && after.crashes >= rules.max_crashes {
        dead(EndReason::Crashes)
    } else if end.cause.counts() && after.attempt >= after.max_attempts {
        dead(EndReason::Attempts)
    } else {
        let delay = match end.retry_after_ms {
            Some(delay) => delay.min(MAX_DELAY_MS),
            None if end.cause.backs_off() => backoff_ms(after.attempt, rules, jitter),
            None => 0,
        };
        JobFate::Wait {
            due_ms: now.saturating_add(delay),
        }
    };
    (after, fate)
}

/// The error of an attempt whose result is too long.
const TOO_LONG: &str = r#"{"code":-32011,"name":"bad-output","message":"the result is longer than jobs.result","started":true}"#;

/// The largest number of bytes of an error that a job keeps, if `jobs.result` is less.
const MAX_ERROR: usize = 4096;

/// Returns whether an attempt has a result that is longer than a method's jobs may keep.
fn is_over(end: &AttemptEnd, rules: &RetryRules) -> bool {
    let length = end.json.as_ref().map_or(0, |json| json.len());
    end.cause == AttemptCause::Result && length > rules.max_result
}

/// Returns the result or the error that the job keeps. A result that is too long becomes an error, and an error that is
/// too long keeps its code and the beginning of its message.
pub fn kept_json<'a>(end: &'a AttemptEnd, rules: &RetryRules) -> Option<Cow<'a, str>> {
    let json = end.json.as_deref()?;
    if end.cause == AttemptCause::Result {
        return Some(Cow::Borrowed(if is_over(end, rules) {
            TOO_LONG
        } else {
            json
        }));
    }
    if json.len() <= rules.max_result.max(MAX_ERROR) {
        return Some(Cow::Borrowed(json));
    }
    let form = serde_json::from_str::<ErrorForm<'_>>(json).ok();
    let code = form
        .as_ref()
        .map_or(Code::Internal.number(), |form| form.code);
    let message = form.and_then(|form| form.message).unwrap_or_default();
    let message = excerpt(&message);
    let error = RpcError::new(
        code,
        format!("{message} (shortened: the error had {} bytes)", json.len()),
    );
    Some(Cow::Owned(answer::bare_error_text(&error)))
}

/// Returns the counters after an attempt that ended for this cause.
fn counted(before: JobCounters, cause: AttemptCause) -> JobCounters {
    JobCounters {
        attempt: before.attempt.saturating_sub(u32::from(!cause.counts())),
        max_attempts: before.max_attempts,
        crashes: before.crashes.saturating_add(u32::from(cause.is_crash())),
        interruptions: (before.interruptions).saturating_add(u32::from(cause.is_interruption())),
    }
}

/// Returns whether an error permits another attempt. `data.retry` decides, if the handler has set it.
fn may_retry(end: &AttemptEnd) -> bool {
    end.retry.unwrap_or(!end.is_invalid_params)
}

/// Returns the delay after the failed attempt with this number (from 1): it doubles with each attempt up to
/// the longest delay, and `jitter` adds 0 to 25 %.
pub fn backoff_ms(attempt: u32, rules: &RetryRules, jitter: u16) -> u64 {
    let doublings = attempt.saturating_sub(1).min(63);
    let delay = u128::from(rules.backoff_ms) << doublings;
    let delay = delay.min(u128::from(rules.max_backoff_ms)) as u64;
    let quarter = u128::from(delay / 4) * u128::from(jitter) / u128::from(u16::MAX);
    delay.saturating_add(quarter as u64)
}
