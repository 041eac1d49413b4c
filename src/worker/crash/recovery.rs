//! Decides what to do with a connection whose worker has died. Pure: it gets the journal's records and
//! the kernel's counters, and returns the answers to send.
//!
//! A connection is handed over if it is known to the byte what its client has sent and received. Taken
//! calls without an answer are answered with `crashed`. If anything is in doubt, the connection is reset,
//! because a client must never get an answer twice, an answer to another call, or a part of one.

use std::ops::Range;

use super::journal::note;
use crate::link::adoption_queue;
use crate::link::adoption_queue::HandoffState;
use crate::protocol::call_id::CallId;
use crate::protocol::code::Code;
use crate::protocol::http::ResponseContext;
use crate::protocol::reply::{AnswerContext, AnswerFormat};
use crate::protocol::rpc_error::RpcError;
use crate::worker::access_log::line::body_bytes;

/// An unanswered call.
#[derive(Debug, Clone)]
pub struct UnansweredCall {
    pub shape: AnswerFormat,
    /// Its number in the order of answers; `None` if it can be answered at any time.
    pub order: Option<u64>,
    pub id: Option<String>,
    pub begun: bool,
    /// The number of its method, if it was known.
    pub method: Option<usize>,
    /// Whether its answer was among the bytes to be sent.
    pub answered: bool,
    /// Where its bytes end in the stream of the connection.
    pub end: u64,
    /// The id that its error names.
    pub call: Option<CallId>,
    /// Its number in the worker, and what its line in the access log says.
    pub number: u64,
    pub read_ns: u64,
    pub received_bytes: usize,
    pub trace_id: u128,
}

/// A call that is answered with `crashed`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CrashedCall {
    /// The number of its method, if it was known.
    pub method: Option<usize>,
    /// Whether it had begun.
    pub begun: bool,
    pub number: u64,
    pub shape: AnswerFormat,
    pub read_ns: u64,
    pub received_bytes: usize,
    pub trace_id: u128,
    /// The bytes of its answer.
    pub sent_bytes: usize,
}

/// The recorded state of a connection.
#[derive(Debug, Clone, Default)]
pub struct ConnectionSnapshot {
    /// Its flags; see `journal::note`.
    pub note: u32,
    /// Whether the worker had unsent bytes, which are lost with its memory.
    pub owed: bool,
    /// Bytes that were adopted with it to be sent first, and were not sent.
    pub unsent: Vec<u8>,
    pub calls: Vec<UnansweredCall>,
}

/// A receive that was in progress.
#[derive(Debug, Clone, Copy)]
pub struct Receiving {
    /// Where the buffer begins in the stream.
    pub start: u64,
    /// The position up to which the stream was taken.
    pub taken: u64,
    /// The number of bytes in the buffer, if it is known.
    pub length: Option<u64>,
}

/// A send that was in progress.
#[derive(Debug, Clone, Copy)]
pub struct Sending {
    /// The number of bytes to send.
    pub length: u64,
    /// How many of them the kernel has, if it is known.
    pub sent: Option<u64>,
}

/// The decision for a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recovery {
    /// Hand it over to another worker.
    PassOn {
        state: HandoffState,
        /// The answers that are sent first.
        unsent: Vec<u8>,
        unread: Range<usize>,
        /// The calls that are answered with `crashed`.
        crashed: Vec<CrashedCall>,
    },
    /// Close it: it had ended, or was already handed over.
    Close,
    /// Reset it, because its state is in doubt.
    Reset,
}

/// Decides about the connection `held`. `receiving` and `sending` are its system calls that were in progress; `None`:
/// there was none. `http` is for the answers of calls over HTTP.
pub fn decide(
    held: &ConnectionSnapshot,
    receiving: Option<Receiving>,
    sending: Option<Sending>,
    http: ResponseContext<'_>,
) -> Recovery {
    if held.note & (note::SHUT | note::GIVEN) != 0 {
        return Recovery::Close;
    }
    if held.owed || held.note & (note::TAIL | note::UNKEPT) != 0 {
        return Recovery::Reset;
    }
    let sent = match sending {
        None => false,
        Some(Sending { length, sent }) => match sent {
            Some(0) => false,
            Some(sent) if sent == length => true,
            _ => return Recovery::Reset,
        },
    };
    let Some(unread) = unread(held, receiving) else {
        return Recovery::Reset;
    };
    let mut left: Vec<&UnansweredCall> = held
        .calls
        .iter()
        .filter(|call| !(sent && call.answered))
        .collect();
    left.sort_by_key(|call| call.order);
    let closing = held.note & note::CLOSING != 0;
    let mut unsent = match sent {
        true => Vec::new(),
        false => held.unsent.clone(),
    };
    let mut crashed = Vec::new();
    for (index, call) in left.iter().enumerate() {
        let start = unsent.len();
        let about = AnswerContext {
            last: index + 1 == left.len(),
            closing,
            ours: true,
            http,
        };
        let error = RpcError::of(Code::Crashed, words(call.begun), call.begun);
        let id = call.id.as_deref();
        let _ = call
            .shape
            .compose(&mut unsent, about, ("", id), || call.call, |_| Err(error));
        crashed.push(CrashedCall {
            method: call.method,
            begun: call.begun,
            number: call.number,
            shape: call.shape,
            read_ns: call.read_ns,
            received_bytes: call.received_bytes,
            trace_id: call.trace_id,
            sent_bytes: body_bytes(&unsent[start..], call.shape.wrap),
        });
    }
    Recovery::PassOn {
        state: HandoffState {
            dialect: adoption_queue::dialect((held.note & 0xFF) as u8),
            idle_ms: 0,
            closing,
            needs_path: held.note & note::NEEDS_PATH != 0,
        },
        unsent,
        unread,
        crashed,
    }
}

fn words(begun: bool) -> &'static str {
    if begun {
        "the worker that ran this call has died"
    } else {
        "the worker that had taken this call died before it began; it can be sent again"
    }
}

/// Returns which bytes of the buffer were not taken; `None` if that is unknown.
fn unread(held: &ConnectionSnapshot, receiving: Option<Receiving>) -> Option<Range<usize>> {
    let Some(receiving) = receiving else {
        return Some(0..0);
    };
    let length = receiving.length?;
    // An entry is written before the worker counts its bytes as taken.
    let ends = held.calls.iter().map(|call| call.end);
    let taken = ends.fold(receiving.taken, u64::max);
    let used = taken.checked_sub(receiving.start)?;
    let range = usize::try_from(used).ok()?..usize::try_from(length).ok()?;
    (range.start <= range.end).then_some(range)
}

#[cfg(test)]
#[path = "recovery_tests.rs"]
mod tests;
