//! Encodes and decodes the frames of an internal link: calls that one process of a server sends to
//! another, and what comes back.
//!
//! Pure. A frame is its length (4 bytes, little-endian, without itself), a kind (1 byte), and fields of
//! fixed size in little-endian; texts carry their length. Both ends are of one generation, so the
//! format has no version. A sender is not trusted all the same: what is no frame is an error, and its
//! link is closed.

use std::borrow::Cow;
use std::net::SocketAddr;

use serde_json::value::RawValue;

use crate::protocol::code::Code;
use crate::protocol::rpc_error::RpcError;

/// Bytes before the fields: the length and the kind.
const HEAD_LEN: usize = 5;
/// What a call or an answer may have beside its params or its result, in bytes.
const MAX_EXTRA_LEN: usize = 64 * 1024;

const CALL: u8 = 1;
const CANCEL: u8 = 2;
const ANSWER: u8 = 3;
const RETURNED: u8 = 4;
const OFFER: u8 = 5;
const LEAVE: u8 = 6;
const LEAVE_NOTED: u8 = 7;

/// A call for another process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallFrame<'a> {
    /// Names the call on its link. The sender chooses it.
    pub id: u64,
    /// The number of the method in the generation.
    pub method: u32,
    /// What the call is known by in quarantine; 0 if it has none.
    pub key: u64,
    /// When it must be answered, in milliseconds (CLOCK_MONOTONIC).
    pub deadline_ms: u64,
    /// Which connection of the sender it came over.
    pub client: u32,
    /// The caller's id, as JSON.
    pub client_id: Option<Cow<'a, str>>,
    /// Where the caller's connection comes from; `None` over a unix socket.
    pub peer: Option<SocketAddr>,
    /// JSON.
    pub params: Cow<'a, str>,
}

/// The answer to a call.
#[derive(Debug)]
pub struct AnswerFrame<'a> {
    /// Its id on the link.
    pub id: u64,
    /// For how long it ran, in microseconds; 0 if it did not begin.
    pub took_us: u64,
    /// What stands in `out` instead of the name that the answers of the method have.
    pub name: Option<Cow<'a, str>>,
    /// The result as JSON, or the error.
    pub outcome: Result<Cow<'a, [u8]>, Cow<'a, RpcError>>,
}

/// What one process says to another.
#[derive(Debug)]
pub enum Frame<'a> {
    Call(CallFrame<'a>),
    /// The caller does not wait for this call any more. No answer follows; one that is on its way is
    /// dropped.
    Cancel {
        id: u64,
    },
    Answer(AnswerFrame<'a>),
    /// The receiver had no capacity left: the call did not begin.
    Returned {
        id: u64,
    },
    /// The sender could begin `count` calls of this lane now, and `short` more that take microseconds within a
    /// millisecond.
    Offer {
        lane: u16,
        count: u32,
        short: u32,
    },
    /// The sender begins no further call. It leaves when it has the answer to this.
    Leave,
    /// The answer to `Leave`: the sender has sent its last call.
    LeaveNoted,
}

/// What stands at the head of a buffer.
#[derive(Debug)]
pub enum DecodedCallFrame<'a> {
    /// Not all of it is there.
    Partial,
    /// A frame, and its length in bytes.
    Whole(Frame<'a>, usize),
    /// No frame, or one of more bytes than are allowed.
    Invalid,
}

impl Frame<'_> {
    /// Appends the frame to `out`. Returns false, and appends nothing, if it has 4 GiB or more.
    pub fn encode(&self, out: &mut Vec<u8>) -> bool {
        let start = out.len();
        out.extend_from_slice(&[0; HEAD_LEN]);
        out[start + 4] = match self {
            Frame::Call(call) => {
                put_u64(out, call.id);
                put_u32(out, call.method);
                put_u64(out, call.key);
                put_u64(out, call.deadline_ms);
                put_u32(out, call.client);
                put_option(out, call.client_id.as_deref().map(str::as_bytes));
                let peer = call.peer.map(|peer| peer.to_string());
                put_option(out, peer.as_deref().map(str::as_bytes));
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

    /// Decodes the frame at the head of `bytes`. `max_body` is the most bytes that its params or its
    /// result may have.
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
        match decode_fields(frame[0], &mut Fields(&frame[1..])) {
            Some(frame) => DecodedCallFrame::Whole(frame, 4 + length),
            None => DecodedCallFrame::Invalid,
        }
    }
}

fn decode_fields<'a>(kind: u8, fields: &mut Fields<'a>) -> Option<Frame<'a>> {
    let frame = match kind {
        CALL => {
            return Some(Frame::Call(CallFrame {
                id: fields.u64()?,
                method: fields.u32()?,
                key: fields.u64()?,
                deadline_ms: fields.u64()?,
                client: fields.u32()?,
                client_id: fields.text_option()?,
                peer: match fields.text_option()? {
                    Some(peer) => Some(peer.parse().ok()?),
                    None => None,
                },
                params: text(fields.rest())?,
            }));
        }
        ANSWER => {
            return Some(Frame::Answer(AnswerFrame {
                id: fields.u64()?,
                took_us: fields.u64()?,
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
        _ => return None,
    };
    fields.0.is_empty().then_some(frame)
}

fn decode_error(fields: &mut Fields<'_>) -> Option<RpcError> {
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

fn text(bytes: &[u8]) -> Option<Cow<'_, str>> {
    std::str::from_utf8(bytes).ok().map(Cow::Borrowed)
}

fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

/// The length plus one, then the bytes; a length of 0: there are none.
fn put_option(out: &mut Vec<u8>, bytes: Option<&[u8]>) {
    match bytes {
        // More than four gigabytes make the whole frame too long, which `encode` finds.
        Some(bytes) => {
            put_u32(out, bytes.len() as u32 + 1);
            out.extend_from_slice(bytes);
        }
        None => put_u32(out, 0),
    }
}

/// The fields of a frame that are not read yet.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn u8(&mut self) -> Option<u8> {
        let (&value, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(value)
    }

    fn u32(&mut self) -> Option<u32> {
        let (value, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_le_bytes(*value))
    }

    fn u64(&mut self) -> Option<u64> {
        let (value, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*value))
    }

    fn option(&mut self) -> Option<Option<&'a [u8]>> {
        let Some(length) = self.u32()?.checked_sub(1) else {
            return Some(None);
        };
        let (value, rest) = self.0.split_at_checked(length as usize)?;
        self.0 = rest;
        Some(Some(value))
    }

    fn text_option(&mut self) -> Option<Option<Cow<'a, str>>> {
        match self.option()? {
            Some(bytes) => text(bytes).map(Some),
            None => Some(None),
        }
    }

    /// All that is left.
    fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "call_frame_tests.rs"]
mod tests;
