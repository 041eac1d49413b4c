//! Defines the frames between the jobs process and the executors of attempts, which are workers and pool
//! processes.
//!
//! Pure. [`Frame`](super::call_frame::Frame) encodes and decodes them with all others of an internal link. The
//! jobs process sends `Start`, `Stored` and `Cancel`, and an executor sends the other ones. A job has 16 bytes
//! as its id, and each of its attempts a token, which grows with each claim of the job.

use std::borrow::Cow;

use super::frame_fields::{FrameFields, put_option, put_trace, put_u32, put_u64, text};
use crate::protocol::trace_context::TraceContext;

/// The kinds of these frames begin here.
pub(super) const FIRST: u8 = 16;
const START: u8 = FIRST;
const END: u8 = FIRST + 1;
const STORED: u8 = FIRST + 2;
const CANCEL: u8 = FIRST + 3;
const PROCESS: u8 = FIRST + 4;
const EXECUTOR: u8 = FIRST + 5;

/// An attempt of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttemptId {
    /// The UUID of the job.
    pub job: [u8; 16],
    /// The number of the claim.
    pub token: u64,
}

impl AttemptId {
    /// Returns the key of the attempt in crash reports. Keys of calls are odd, and those of attempts are
    /// multiples of four, so the two never meet. It is never 0.
    pub fn key(self) -> u64 {
        // FNV-1a is enough: clients choose ids, but without the id and token of another job they cannot choose its key.
        let token = self.token.to_le_bytes();
        let bytes = self.job.iter().chain(&token);
        let hash = bytes.fold(0xCBF2_9CE4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01B3)
        });
        hash << 3 | 4
    }
}

/// Returns whether a key of a crash report is that of an attempt.
pub fn is_attempt_key(key: u64) -> bool {
    key != 0 && key.is_multiple_of(4)
}

/// An attempt that an executor begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttemptStart<'a> {
    pub id: AttemptId,
    /// The number of the attempt, from 1.
    pub attempt: u32,
    pub max_attempts: u32,
    /// The longest time of the attempt.
    pub timeout_ms: u64,
    /// The name of the method. Its number may differ between generations.
    pub method: Cow<'a, str>,
    /// The trace context of the enqueue.
    pub trace: Option<Cow<'a, TraceContext>>,
    /// The params as JSON.
    pub params: Cow<'a, str>,
}

/// How an attempt ended, as its executor knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AttemptEndKind {
    /// The handler returned the result in `json`.
    Result = 1,
    /// The handler returned an error, the attempt timed out, or its command failed. `json` is the error.
    Error = 2,
    /// The program that ran it died by its own fault, and it ran nothing else.
    Crashed = 3,
    /// The program that ran it died by its own fault, and also ran others.
    Unclear = 4,
    /// The program that ran it was killed from outside.
    Killed = 5,
    /// The executor interrupted it, because it exits.
    Interrupted = 6,
    /// It did not begin.
    NeverBegun = 7,
}

impl AttemptEndKind {
    const ALL: [AttemptEndKind; 7] = [
        AttemptEndKind::Result,
        AttemptEndKind::Error,
        AttemptEndKind::Crashed,
        AttemptEndKind::Unclear,
        AttemptEndKind::Killed,
        AttemptEndKind::Interrupted,
        AttemptEndKind::NeverBegun,
    ];

    fn decode(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == number)
    }
}

/// The report that an attempt has ended. The executor keeps it until the answer `Stored`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttemptReport<'a> {
    pub id: AttemptId,
    pub kind: AttemptEndKind,
    /// The run time in microseconds; 0 if it did not begin.
    pub took_us: u64,
    /// The result as JSON, or the error in the form of a call's error.
    pub json: Option<Cow<'a, str>>,
}

impl AttemptReport<'_> {
    /// Returns the report of an attempt that did not begin.
    pub fn never_begun(id: AttemptId) -> AttemptReport<'static> {
        AttemptReport {
            id,
            kind: AttemptEndKind::NeverBegun,
            took_us: 0,
            json: None,
        }
    }
}

/// What an executor says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecutorHello {
    pub pid: i32,
    /// The number of its call queue: 0 in a worker.
    pub lane: u32,
    /// Its attempts that the receiver has not settled.
    pub attempts: Vec<AttemptId>,
}

/// A frame about attempts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AttemptFrame<'a> {
    /// Begin this attempt.
    Start(AttemptStart<'a>),
    /// It has ended.
    End(AttemptReport<'a>),
    /// The end of this attempt is stored, or changes nothing any more. Forget it.
    Stored(AttemptId),
    /// A client has cancelled the job of this attempt.
    Cancel(AttemptId),
    /// This process runs the attempt. `start_time` is that of proc_pid_stat(5).
    Process {
        id: AttemptId,
        pid: i32,
        start_time: u64,
    },
    /// Says that the sender is an executor. It is the first frame of an executor on a link.
    Executor(ExecutorHello),
}

impl AttemptFrame<'_> {
    /// Appends the fields, and returns the kind.
    pub(super) fn encode(&self, out: &mut Vec<u8>) -> u8 {
        match self {
            AttemptFrame::Start(start) => {
                put_id(out, start.id);
                put_u32(out, start.attempt);
                put_u32(out, start.max_attempts);
                put_u64(out, start.timeout_ms);
                put_option(out, Some(start.method.as_bytes()));
                put_trace(out, start.trace.as_deref());
                out.extend_from_slice(start.params.as_bytes());
                START
            }
            AttemptFrame::End(report) => {
                put_id(out, report.id);
                out.push(report.kind as u8);
                put_u64(out, report.took_us);
                put_option(out, report.json.as_deref().map(str::as_bytes));
                END
            }
            AttemptFrame::Stored(id) => {
                put_id(out, *id);
                STORED
            }
            AttemptFrame::Cancel(id) => {
                put_id(out, *id);
                CANCEL
            }
            AttemptFrame::Process {
                id,
                pid,
                start_time,
            } => {
                put_id(out, *id);
                put_u32(out, *pid as u32);
                put_u64(out, *start_time);
                PROCESS
            }
            AttemptFrame::Executor(hello) => {
                put_u32(out, hello.pid as u32);
                put_u32(out, hello.lane);
                hello.attempts.iter().for_each(|id| put_id(out, *id));
                EXECUTOR
            }
        }
    }

    /// Decodes the fields of a frame of this kind. Returns `None` if they are invalid.
    pub(super) fn decode<'a>(kind: u8, fields: &mut FrameFields<'a>) -> Option<AttemptFrame<'a>> {
        Some(match kind {
            START => AttemptFrame::Start(AttemptStart {
                id: read_id(fields)?,
                attempt: fields.u32()?,
                max_attempts: fields.u32()?,
                timeout_ms: fields.u64()?,
                method: fields.text_option()??,
                trace: fields.trace()?,
                params: text(fields.rest())?,
            }),
            END => AttemptFrame::End(AttemptReport {
                id: read_id(fields)?,
                kind: AttemptEndKind::decode(fields.u8()?)?,
                took_us: fields.u64()?,
                json: fields.text_option()?,
            }),
            STORED => AttemptFrame::Stored(read_id(fields)?),
            CANCEL => AttemptFrame::Cancel(read_id(fields)?),
            PROCESS => AttemptFrame::Process {
                id: read_id(fields)?,
                pid: fields.u32()? as i32,
                start_time: fields.u64()?,
            },
            EXECUTOR => {
                let (pid, lane) = (fields.u32()? as i32, fields.u32()?);
                let mut attempts = Vec::new();
                while !fields.is_empty() {
                    attempts.push(read_id(fields)?);
                }
                AttemptFrame::Executor(ExecutorHello {
                    pid,
                    lane,
                    attempts,
                })
            }
            _ => return None,
        })
    }
}

fn put_id(out: &mut Vec<u8>, id: AttemptId) {
    out.extend_from_slice(&id.job);
    put_u64(out, id.token);
}

fn read_id(fields: &mut FrameFields<'_>) -> Option<AttemptId> {
    Some(AttemptId {
        job: fields.array()?,
        token: fields.u64()?,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_id() -> impl Strategy<Value = AttemptId> {
        any::<([u8; 16], u64)>().prop_map(|(job, token)| AttemptId { job, token })
    }

    fn any_kind() -> impl Strategy<Value = AttemptEndKind> {
        prop::sample::select(&AttemptEndKind::ALL[..])
    }

    /// Any frame about attempts, with a trace from `trace`.
    pub fn any_attempt_frame(
        trace: impl Strategy<Value = Option<TraceContext>>,
    ) -> impl Strategy<Value = AttemptFrame<'static>> {
        let text = || "[a-z\"\\\\é ]{0,40}";
        let numbers = any::<(u32, u32, u64)>();
        let start = (any_id(), numbers, text(), trace, text()).prop_map(
            |(id, (attempt, max_attempts, timeout_ms), method, trace, params)| {
                AttemptFrame::Start(AttemptStart {
                    id,
                    attempt,
                    max_attempts,
                    timeout_ms,
                    method: method.into(),
                    trace: trace.map(Cow::Owned),
                    params: params.into(),
                })
            },
        );
        let json = proptest::option::of(text());
        let end =
            (any_id(), any_kind(), any::<u64>(), json).prop_map(|(id, kind, took_us, json)| {
                AttemptFrame::End(AttemptReport {
                    id,
                    kind,
                    took_us,
                    json: json.map(Cow::Owned),
                })
            });
        prop_oneof![
            start,
            end,
            any_id().prop_map(AttemptFrame::Stored),
            any_id().prop_map(AttemptFrame::Cancel),
            (any_id(), any::<i32>(), any::<u64>()).prop_map(|(id, pid, start_time)| {
                AttemptFrame::Process {
                    id,
                    pid,
                    start_time,
                }
            }),
            (
                any::<i32>(),
                any::<u32>(),
                prop::collection::vec(any_id(), 0..4)
            )
                .prop_map(|(pid, lane, attempts)| AttemptFrame::Executor(
                    ExecutorHello {
                        pid,
                        lane,
                        attempts,
                    }
                )),
        ]
    }

    proptest! {
        #[test]
        fn keys_of_attempts_differ_from_those_of_calls(id in any_id()) {
            prop_assert!(is_attempt_key(id.key()));
            let next = AttemptId { token: id.token.wrapping_add(1), ..id };
            prop_assert_ne!(id.key(), next.key());
        }
    }

    #[test]
    fn keys_of_calls_are_no_keys_of_attempts() {
        for key in [0, 1, 2, 3, u64::MAX] {
            assert!(!is_attempt_key(key), "{key}");
        }
    }
}
