//! Encodes and decodes the frames of an internal link: calls that one process of a server sends to
//! another, and their answers.
//!
//! Pure. A frame is its length (4 bytes, little-endian, not counting itself), a kind (1 byte), and fields
//! of fixed size in little-endian. Texts have a length. Both ends run one version of the program, so
//! the format has no version. The sender is still not trusted: an invalid frame is an error, and its link is closed.

use std::borrow::Cow;
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};
use std::time::Duration;

use serde_json::value::RawValue;

use super::attempt_frame::{AttemptFrame, FIRST as FIRST_OF_ATTEMPTS};
use super::frame_fields::{FrameFields, put_option, put_trace, put_u32, put_u64, text};
use crate::protocol::call_id::{CallId, CallRunner};
use crate::protocol::code::Code;
use crate::protocol::rpc_error::RpcError;
use crate::protocol::trace_context::TraceContext;

/// The bytes before the fields: the length and the kind.
const HEAD_LEN: usize = 5;
/// The largest number of bytes of a call or an answer besides its params or its result.
const MAX_EXTRA_LEN: usize = 64 * 1024;

const CALL: u8 = 1;
const CANCEL: u8 = 2;
const ANSWER: u8 = 3;
const RETURNED: u8 = 4;
const OFFER: u8 = 5;
const LEAVE: u8 = 6;
const LEAVE_NOTED: u8 = 7;
const ANSWER_WAITS: u8 = 8;

const NO_PEER: u8 = 0;
const IPV4: u8 = 4;
const IPV6: u8 = 6;

/// Where a call came from and how long it has waited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CallOrigin {
    /// The number of the sender's connection from which it came.
    pub client: u32,
    /// How long that connection waited to be accepted, in milliseconds.
    pub accept_wait_ms: u32,
    /// When the call was read, in nanoseconds (CLOCK_MONOTONIC).
    pub read_ns: u64,
}

impl From<(u64, u64)> for CallOrigin {
    /// Makes the origin from the time when a call was read, in nanoseconds, and the time for which its connection
    /// waited, in milliseconds.
    fn from((read_ns, accept_wait_ms): (u64, u64)) -> Self {
        CallOrigin {
            client: 0,
            accept_wait_ms: accept_wait_ms as u32,
            read_ns,
        }
    }
}

/// A call for another process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallFrame<'a> {
    /// The id of the call. Its number identifies it on the link.
    pub id: CallId,
    /// The index of the method in the generation, or the number of a method of jobs.
    pub method: u32,
    /// The key of the call for the quarantine; 0 if it has none.
    pub key: u64,
    /// The deadline in milliseconds (CLOCK_MONOTONIC).
    pub deadline_ms: u64,
    pub origin: CallOrigin,
    /// The id that the client gave, as JSON. In an enqueue: the id that the worker has made for the new job.
    pub client_id: Option<Cow<'a, str>>,
    /// The address of the client; `None` on a unix socket.
    pub peer: Option<SocketAddr>,
    /// Its place in a trace, as its handler passes it on.
    pub trace: Option<Cow<'a, TraceContext>>,
    /// The params as JSON.
    pub params: Cow<'a, str>,
}

/// The answer to a call.
#[derive(Debug)]
pub struct AnswerFrame<'a> {
    /// The number of the call at its home.
    pub id: u64,
    /// The run time in microseconds; 0 if it did not begin.
    pub took_us: u64,
    pub runner: CallRunner,
    /// The `out` of the answer, if it differs from the method's.
    pub name: Option<Cow<'a, str>>,
    /// The result as JSON, or the error.
    pub outcome: Result<Cow<'a, [u8]>, Cow<'a, RpcError>>,
}

/// A message from one process to another.
#[derive(Debug)]
pub enum Frame<'a> {
    Call(CallFrame<'a>),
    /// The caller does not wait for this call any more. No answer follows; one in transit is dropped.
    Cancel {
        id: u64,
    },
    Answer(AnswerFrame<'a>),
    /// The receiver had no capacity left, so the call did not begin.
    Returned {
        id: u64,
    },
    /// The sender could begin `count` calls of this lane now, and within a millisecond `short` more that
    /// take microseconds.
    Offer {
        lane: u16,
        count: u32,
        short: u32,
    },
    /// The sender begins no further call. It exits when it has the answer to this message.
    Leave,
    /// The answer to `Leave`: the sender has sent its last call.
    LeaveNoted,
    /// A message about an attempt of a job.
    Attempt(AttemptFrame<'a>),
    /// From a worker that drains to the jobs process: answer each `rpc.job.wait` of this link now.
    AnswerWaits,
}

/// The result of decoding the beginning of a buffer.
// A frame is decoded where it is used at once, so it costs no copy.
#[allow(clippy::large_enum_variant)]
#[derive(Debug)]
pub enum DecodedCallFrame<'a> {
    /// The frame is incomplete.
    Partial,
    /// A frame and its length in bytes.
    Whole(Frame<'a>, usize),
    /// An invalid frame, or one over the limit.
    Invalid,
}

/// Returns the largest number of bytes of params or of a result that fit into a frame for a process with this
/// `limits.frame`. The other members of such a frame are short.
pub const fn longest_payload(max_body: usize) -> usize {
    max_body.saturating_add(MAX_EXTRA_LEN / 2)
}

impl Frame<'_> {
    /// Appends the frame to `out`. If it has 4 GiB or more, appends nothing and returns false.
    pub fn encode(&self, out: &mut Vec<u8>) -> bool {
        let start = out.len();
        out.extend_from_slice(&[0; HEAD_LEN]);
        out[start + 4] = match self {
            Frame::Call(call) => {
                put_u64(out, call.id.number);
                put_u32(out, call.id.pid as u32);
                put_u32(out, call.method);
                put_u64(out, call.key);
                put_u64(out, call.deadline_ms);
                put_u32(out, call.origin.client);
                put_u32(out, call.origin.accept_wait_ms);
                put_u64(out, call.origin.read_ns);
                put_option(out, call.client_id.as_deref().map(str::as_bytes));
                put_peer(out, call.peer);
                put_trace(out, call.trace.as_deref());
                out.extend_from_slice(call.params.as_bytes());
                CALL
            }
            Frame::Cancel { id } => {
                put_u64(out, *id);
                CANCEL
            }
            Frame::Answer(answer) => {
                put_u64(out, answer.id);
                put_u64(out, answer.took_us);
                put_u32(out, answer.runner.process as u32);
                put_u32(out, answer.runner.program as u32);
                put_u64(out, answer.runner.cpu.as_micros() as u64);
                put_u64(out, answer.runner.max_rss_bytes);
                put_option(out, answer.name.as_deref().map(str::as_bytes));
                match &answer.outcome {
                    Ok(result) => {
                        out.push(1);
                        out.extend_from_slice(result);
                    }
                    Err(error) => {
                        out.push(0);
                        put_u64(out, error.code as u64);
                        out.push(u8::from(error.started));
                        put_option(out, error.data.as_ref().map(|data| data.get().as_bytes()));
                        out.extend_from_slice(error.message.as_bytes());
                    }
                }
                ANSWER
            }
            Frame::Returned { id } => {
                put_u64(out, *id);
                RETURNED
            }
            Frame::Offer { lane, count, short } => {
                put_u32(out, u32::from(*lane));
                put_u32(out, *count);
                put_u32(out, *short);
                OFFER
            }
            Frame::Leave => LEAVE,
            Frame::LeaveNoted => LEAVE_NOTED,
            Frame::Attempt(attempt) => attempt.encode(out),
            Frame::AnswerWaits => ANSWER_WAITS,
        };
        match u32::try_from(out.len() - start - 4) {
            Ok(length) => {
                out[start..start + 4].copy_from_slice(&length.to_le_bytes());
                true
            }
            Err(_) => {
                out.truncate(start);
                false
            }
        }
    }

    /// Decodes the frames in `bytes` and passes each to `handle`, up to the first incomplete one. Returns the number of
    /// decoded bytes, and false if a frame is invalid or `handle` has returned false. `max_body` is as for
    /// [`Self::decode`].
    pub fn decode_each(
        bytes: &[u8],
        max_body: usize,
        mut handle: impl FnMut(Frame<'_>) -> bool,
    ) -> (usize, bool) {
        let mut at = 0;
        loop {
            match Frame::decode(&bytes[at..], max_body) {
                DecodedCallFrame::Partial => return (at, true),
                DecodedCallFrame::Invalid => return (at, false),
                DecodedCallFrame::Whole(frame, used) => {
                    at += used;
                    if !handle(frame) {
                        return (at, false);
                    }
                }
            }
        }
    }

    /// Decodes the frame at the beginning of `bytes`. `max_body` is the largest number of bytes of its params or its
    /// result.
    pub fn decode(bytes: &[u8], max_body: usize) -> DecodedCallFrame<'_> {
        let Some((length, rest)) = bytes.split_first_chunk::<4>() else {
            return DecodedCallFrame::Partial;
        };
        let length = u32::from_le_bytes(*length) as usize;
        if length == 0 || length > max_body.saturating_add(MAX_EXTRA_LEN) {
            return DecodedCallFrame::Invalid;
        }
        let Some(frame) = rest.get(..length) else {
            return DecodedCallFrame::Partial;
        };
        match decode_fields(frame[0], &mut FrameFields::new(&frame[1..])) {
            Some(frame) => DecodedCallFrame::Whole(frame, 4 + length),
            None => DecodedCallFrame::Invalid,
        }
    }
}

fn decode_fields<'a>(kind: u8, fields: &mut FrameFields<'a>) -> Option<Frame<'a>> {
    let frame = match kind {
        CALL => {
            let (number, pid) = (fields.u64()?, fields.u32()? as i32);
            return Some(Frame::Call(CallFrame {
                id: CallId { pid, number },
                method: fields.u32()?,
                key: fields.u64()?,
                deadline_ms: fields.u64()?,
                origin: CallOrigin {
                    client: fields.u32()?,
                    accept_wait_ms: fields.u32()?,
                    read_ns: fields.u64()?,
                },
                client_id: fields.text_option()?,
                peer: decode_peer(fields)?,
                trace: fields.trace()?,
                params: text(fields.rest())?,
            }));
        }
        ANSWER => {
            return Some(Frame::Answer(AnswerFrame {
                id: fields.u64()?,
                took_us: fields.u64()?,
                runner: CallRunner {
                    process: fields.u32()? as i32,
                    program: fields.u32()? as i32,
                    cpu: Duration::from_micros(fields.u64()?),
                    max_rss_bytes: fields.u64()?,
                },
                name: fields.text_option()?,
                outcome: match fields.u8()? {
                    1 => Ok(Cow::Borrowed(fields.rest())),
                    0 => Err(Cow::Owned(decode_error(fields)?)),
                    _ => return None,
                },
            }));
        }
        CANCEL => Frame::Cancel { id: fields.u64()? },
        RETURNED => Frame::Returned { id: fields.u64()? },
        OFFER => Frame::Offer {
            lane: u16::try_from(fields.u32()?).ok()?,
            count: fields.u32()?,
            short: fields.u32()?,
        },
        LEAVE => Frame::Leave,
        LEAVE_NOTED => Frame::LeaveNoted,
        FIRST_OF_ATTEMPTS.. => Frame::Attempt(AttemptFrame::decode(kind, fields)?),
        ANSWER_WAITS => Frame::AnswerWaits,
        _ => return None,
    };
    fields.is_empty().then_some(frame)
}

fn decode_error(fields: &mut FrameFields<'_>) -> Option<RpcError> {
    let code = fields.u64()? as i64;
    let started = fields.u8()? != 0;
    let data = match fields.text_option()? {
        Some(data) => Some(RawValue::from_string(data.into_owned()).ok()?),
        None => None,
    };
    let name = Code::from_number(code).map_or("error", Code::name);
    Some(RpcError {
        code,
        name: Cow::Borrowed(name),
        message: text(fields.rest())?.into_owned(),
        started,
        data,
    })
}

/// Appends the family of an address, the address and its port.
fn put_peer(out: &mut Vec<u8>, peer: Option<SocketAddr>) {
    match peer {
        None => out.push(NO_PEER),
        Some(SocketAddr::V4(peer)) => {
            out.push(IPV4);
            out.extend_from_slice(&peer.ip().octets());
            put_u32(out, peer.port().into());
        }
        Some(SocketAddr::V6(peer)) => {
            out.push(IPV6);
            out.extend_from_slice(&peer.ip().octets());
            put_u32(out, peer.port().into());
            put_u32(out, peer.flowinfo());
            put_u32(out, peer.scope_id());
        }
    }
}

/// Decodes what `put_peer` has written.
fn decode_peer(fields: &mut FrameFields<'_>) -> Option<Option<SocketAddr>> {
    let port = |fields: &mut FrameFields<'_>| u16::try_from(fields.u32()?).ok();
    Some(match fields.u8()? {
        NO_PEER => None,
        IPV4 => {
            let ip = fields.array::<4>()?.into();
            Some(SocketAddrV4::new(ip, port(fields)?).into())
        }
        IPV6 => {
            let ip = fields.array::<16>()?.into();
            Some(SocketAddrV6::new(ip, port(fields)?, fields.u32()?, fields.u32()?).into())
        }
        _ => return None,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "call_frame_tests.rs"]
mod tests;
