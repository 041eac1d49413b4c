//! What becomes of a connection whose worker has died: pure, it is told what the ledger says and
//! what the kernel has counted, and answers for the worker.
//!
//! A connection is passed on when it is known to the byte what its client has sent and got. What
//! was taken and has no answer is answered with `crashed`; whatever is in doubt is reset, for a
//! client must never get an answer twice, another's, or a part of one.

use std::ops::Range;

use super::journal::note;
use crate::link::adoption_queue;
use crate::link::adoption_queue::HandoffState;
use crate::protocol::code::Code;
use crate::protocol::http::ResponseContext;
use crate::protocol::reply::{AnswerContext, AnswerFormat};
use crate::protocol::rpc_error::RpcError;

/// A call without an answer.
#[derive(Debug, Clone)]
pub struct UnansweredCall {
    pub shape: AnswerFormat,
    /// Its place among those in order; `None`: anywhere.
    pub order: Option<u64>,
    pub id: Option<String>,
    pub begun: bool,
    /// Its answer was among the bytes to be sent.
    pub answered: bool,
    /// Where its bytes end in the connection's stream.
    pub end: u64,
}

/// A connection, as the ledger has it.
#[derive(Debug, Clone, Default)]
pub struct ConnectionSnapshot {
    pub note: u32,
    /// The worker alone had bytes that the kernel had not taken.
    pub owed: bool,
    /// What came along with it to be sent to it first, and was not.
    pub unsent: Vec<u8>,
    pub calls: Vec<UnansweredCall>,
}

/// Bytes were being received from it.
#[derive(Debug, Clone, Copy)]
pub struct Receiving {
    /// Where in the stream the buffer begins.
    pub start: u64,
    /// How far the stream was taken.
    pub taken: u64,
    /// How many bytes are in the buffer, as far as that is known.
    pub length: Option<u64>,
}

/// Answers were being sent to it.
#[derive(Debug, Clone, Copy)]
pub struct Sending {
    /// How many bytes.
    pub length: u64,
    /// How many of them the kernel has, as far as that is known.
    pub sent: Option<u64>,
}

/// What becomes of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recovery {
    /// Another worker goes on with it.
    PassOn {
        state: HandoffState,
        /// Answers that go first.
        unsent: Vec<u8>,
        unread: Range<usize>,
        /// How many calls are answered with `crashed`.
        crashed: usize,
    },
    /// It had ended, or is somebody else's already.
    Close,
    /// In doubt.
    Reset,
}

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
    for (index, call) in left.iter().enumerate() {
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
            .compose(&mut unsent, about, ("", id), |_| Err(error));
    }
    Recovery::PassOn {
        state: HandoffState {
            dialect: adoption_queue::dialect((held.note & 0xFF) as u8),
            idle_ms: 0,
            closing,
        },
        unsent,
        unread,
        crashed: left.len(),
    }
}

fn words(begun: bool) -> &'static str {
    if begun {
        "the worker that ran this call has died"
    } else {
        "the worker that had taken this call died before it began; it can be sent again"
    }
}

/// Which bytes of the buffer nobody has taken; `None` when that can't be told.
fn unread(held: &ConnectionSnapshot, receiving: Option<Receiving>) -> Option<Range<usize>> {
    let Some(receiving) = receiving else {
        return Some(0..0);
    };
    let length = receiving.length?;
    // An entry is there before the worker counts its bytes as taken.
    let ends = held.calls.iter().map(|call| call.end);
    let taken = ends.fold(receiving.taken, u64::max);
    let used = taken.checked_sub(receiving.start)?;
    let range = usize::try_from(used).ok()?..usize::try_from(length).ok()?;
    (range.start <= range.end).then_some(range)
}

#[cfg(test)]
#[path = "recovery_tests.rs"]
mod tests;
