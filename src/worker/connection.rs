//! One client connection: what it has sent that is not consumed, and whose turn it is.
//!
//! State and its rules alone; sockets, calls and clocks belong to others. A connection at rest
//! owns no buffer, which is what makes ten thousand of them cheap.

use std::collections::{TryReserveError, VecDeque};
use std::mem;
use std::net::SocketAddr;

use slab::Slab;

use super::batch::UntakenMembers;
use super::crash::journal::CallRef;
use super::shares::Source;
use crate::protocol::Dialect;
use crate::protocol::body::Form;
use crate::protocol::http::ParseProgress;
use crate::protocol::reply::AnswerFormat;
use crate::sys::event::Token;

/// Bytes of answers that may wait on one connection before no further call is taken from it: what
/// a client that never reads can cost, besides one answer.
pub const HIGH_WATER: usize = 256 * 1024;

/// Bytes of params, ids and large results to come that may wait for a thread or be with one, before
/// no further call is taken: without it, limits.pipeline times limits.frame.
pub const HIGH_PENDING: usize = 4 * 1024 * 1024;

/// Whether and how a connection goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectionPhase {
    /// Calls are taken.
    Open,
    /// Nothing more is taken: it is closed once all answers are sent.
    Closing,
    /// All is answered and our side is shut; what still comes is dropped until the peer ends.
    Lingering,
}

/// Where an answer belongs among the others of its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AnswerPosition {
    /// Calls without an id are answered in their order: this is the call's number.
    InOrder(u64),
    /// A call with an id is answered as soon as it is done.
    Anywhere,
    /// Within the answer of a batch of the connection, whose key this is.
    Member(usize),
}

/// Where an answer belongs, and what it looks like there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PendingAnswer {
    /// Where.
    pub place: AnswerPosition,
    /// What it looks like.
    pub shape: AnswerFormat,
    pub mark: CallRef,
}

/// A JSON-RPC batch that is not answered yet.
#[derive(Debug)]
pub struct Batch {
    /// Where and how all of it is answered.
    pub reply: PendingAnswer,
    /// Calls that are not done.
    pub left: usize,
    /// The answers of those that are.
    pub out: Vec<u8>,
    /// An answer was too long to be added: no further call of it is started.
    is_full: bool,
}

/// What is still to come of a call for which there was no room: it is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Discard {
    /// So many bytes.
    Bytes(usize),
    /// Whatever there is until a line ends.
    Line,
}

#[derive(Debug)]
pub struct Connection {
    /// Its name on the event layer.
    pub token: Token,
    /// Where it comes from; `None` over a unix socket.
    pub peer: Option<SocketAddr>,
    /// With whom it shares what all clients share.
    pub source: Source,
    /// HTTP requests may name their method in the path alone (`http-methods` of its listener).
    pub needs_http_path: bool,
    /// Whether it goes on.
    pub phase: ConnectionPhase,
    /// The peer will send nothing more.
    pub peer_closed: bool,
    /// The peer has closed the connection: no answer reaches it.
    pub peer_gone: bool,
    /// It is not read, because it may not take another call yet.
    pub is_read_paused: bool,
    /// What it speaks, once its first four bytes have told.
    pub dialect: Option<Dialect>,
    /// Lines: how much of the tail is known to have no newline.
    pub scanned: usize,
    /// HTTP: how far an unfinished request was looked at; `None` between requests.
    pub http: Option<Box<ParseProgress>>,
    /// JSON-RPC batches that are not answered yet.
    pub batches: Slab<Batch>,
    /// What is still to be taken of the newest one.
    pub untaken_members: Option<Box<UntakenMembers>>,
    /// Calls taken and not answered.
    pub unanswered: usize,
    /// Bytes received and not consumed: an unfinished frame, or frames that may not be taken yet.
    pub input: Vec<u8>,
    /// Bytes of the tail that the worker has counted, those that may not be taken yet among them.
    pub accounted_bytes: usize,
    /// Bytes of answers that its client has not taken, as the worker has counted them.
    pub counted_unsent: usize,
    /// What is dropped of what it sends next.
    pub discarding: Option<Discard>,
    /// Answers of calls without an id, from number `first` on; `None` is still to come. The front
    /// one is `None`, or there is none.
    waiting: VecDeque<Option<(Vec<u8>, CallRef)>>,
    first: u64,
    /// Bytes in `waiting` and in the answers of batches.
    queued_bytes: usize,
    /// The weight of the calls that wait or run.
    pub pending: usize,
    /// Some of what is unanswered is not in the ledger.
    pub has_unlogged_calls: bool,
    /// What the ledger says of it.
    pub recorded_flags: u32,
    /// Nothing was received yet: the first bytes may have waited long, while nobody accepted.
    pub is_first_read: bool,
    /// When it last received or was sent something, in milliseconds.
    pub active_ms: u64,
    /// When it came here for the sake of evenness, in milliseconds; 0: it did not.
    pub rebalanced_ms: u64,
    /// The armed deadlines, 0 for none: `Timers::arm` keeps them.
    pub read_deadline: u64,
    /// See `read_deadline`.
    pub write_deadline: u64,
    /// See `read_deadline`; idle before closing, lingering after.
    pub quiet_deadline: u64,
}

impl Connection {
    /// A fresh one.
    pub fn new(token: Token, peer: Option<SocketAddr>, source: Source, now_ms: u64) -> Self {
        Connection {
            token,
            peer,
            source,
            needs_http_path: false,
            phase: ConnectionPhase::Open,
            peer_closed: false,
            peer_gone: false,
            is_read_paused: false,
            dialect: None,
            scanned: 0,
            http: None,
            batches: Slab::new(),
            untaken_members: None,
            unanswered: 0,
            input: Vec::new(),
            accounted_bytes: 0,
            counted_unsent: 0,
            discarding: None,
            waiting: VecDeque::new(),
            first: 0,
            queued_bytes: 0,
            pending: 0,
            has_unlogged_calls: false,
            recorded_flags: 0,
            is_first_read: true,
            active_ms: now_ms,
            rebalanced_ms: 0,
            read_deadline: 0,
            write_deadline: 0,
            quiet_deadline: 0,
        }
    }

    /// Whether an answer to a call of this form would reach nobody. A notification has none.
    pub fn drops_answer(&self, form: Form) -> bool {
        self.peer_gone && form != Form::Notification
    }

    /// Whether another call may be taken, with `unsent` bytes of answers on their way.
    pub fn takes_calls(&self, pipeline: usize, unsent: usize) -> bool {
        self.phase == ConnectionPhase::Open
            && self.untaken_members.is_none()
            && self.unanswered < pipeline
            && self.pending < HIGH_PENDING
            && self.queued_bytes + unsent < HIGH_WATER
    }

    /// Bytes of answers that stand in the way of one more at `place`, with `unsent` bytes on their
    /// way. None where it is the one that those held back wait for.
    pub fn backlog(&self, place: AnswerPosition, unsent: usize) -> usize {
        match place {
            AnswerPosition::InOrder(_) if self.is_next(place) => unsent,
            // What the others of its batch have answered waits for it, and not the other way round.
            AnswerPosition::Member(key) => {
                let batch = &self.batches[key];
                if self.is_next(batch.reply.place) {
                    unsent
                } else {
                    unsent + self.queued_bytes - batch.out.len()
                }
            }
            _ => unsent + self.queued_bytes,
        }
    }

    /// Bytes of answers that wait for others.
    pub fn queued_bytes(&self) -> usize {
        self.queued_bytes
    }

    /// Whether answers wait for their turn.
    pub fn holds(&self) -> bool {
        self.queued_bytes > 0
    }

    /// Nothing is read, running or waiting: it can be closed without losing anything.
    pub fn is_quiescent(&self) -> bool {
        self.unanswered == 0 && !self.has_partial_input()
    }

    /// Whether something has come of a call that is not taken, and may not be whole.
    pub fn has_partial_input(&self) -> bool {
        !self.input.is_empty() || self.discarding.is_some()
    }

    /// Drops what is to be dropped of `input`; returns how many bytes of it.
    pub fn skip(&mut self, input: &[u8]) -> usize {
        let (dropped, left) = match self.discarding {
            None => (0, None),
            Some(Discard::Bytes(left)) if left > input.len() => {
                (input.len(), Some(Discard::Bytes(left - input.len())))
            }
            Some(Discard::Bytes(left)) => (left, None),
            Some(Discard::Line) => match input.iter().position(|&byte| byte == b'\n') {
                Some(at) => (at + 1, None),
                None => (input.len(), Some(Discard::Line)),
            },
        };
        self.discarding = left;
        dropped
    }

    /// Takes a call; `with_id` tells whether it may be answered out of order.
    pub fn take(&mut self, with_id: bool) -> AnswerPosition {
        self.unanswered += 1;
        if with_id {
            return AnswerPosition::Anywhere;
        }
        let number = self.first + self.waiting.len() as u64;
        self.waiting.push_back(None);
        AnswerPosition::InOrder(number)
    }

    /// Whether an answer at `place` can be written straight to the output.
    pub fn is_next(&self, place: AnswerPosition) -> bool {
        match place {
            AnswerPosition::Anywhere | AnswerPosition::Member(_) => true,
            AnswerPosition::InOrder(number) => number == self.first,
        }
    }

    /// Whether nothing that is taken is to be answered behind `place`.
    pub fn is_last(&self, place: AnswerPosition) -> bool {
        match place {
            AnswerPosition::InOrder(number) => number + 1 == self.first + self.waiting.len() as u64,
            AnswerPosition::Anywhere | AnswerPosition::Member(_) => false,
        }
    }

    /// Begins a batch of so many calls; each is to be answered as a member of the key returned.
    pub fn begin_batch(&mut self, reply: PendingAnswer, left: usize) -> usize {
        self.batches.insert(Batch {
            reply,
            left,
            out: Vec::new(),
            is_full: false,
        })
    }

    /// Whether no answer can be added to the batch with this place.
    pub fn is_batch_full(&self, place: AnswerPosition) -> bool {
        matches!(place, AnswerPosition::Member(key) if self.batches[key].is_full)
    }

    /// Remembers that. Returns whether it is new, and the batch is not answered yet.
    pub fn set_batch_full(&mut self, place: AnswerPosition) -> bool {
        let AnswerPosition::Member(key) = place else {
            return false;
        };
        let batch = self.batches.get_mut(key);
        batch.is_some_and(|batch| !mem::replace(&mut batch.is_full, true))
    }

    /// One call of a batch is answered, by what `write` appends to the answers of the others.
    /// Returns the batch when it was the last one.
    pub fn member(&mut self, key: usize, write: impl FnOnce(&mut Vec<u8>)) -> Option<Batch> {
        let batch = &mut self.batches[key];
        self.queued_bytes -= batch.out.len();
        write(&mut batch.out);
        batch.left -= 1;
        if batch.left > 0 {
            self.queued_bytes += batch.out.len();
            return None;
        }
        let batch = self.batches.remove(key);
        if self.batches.is_empty() {
            self.batches = Slab::new();
        }
        Some(batch)
    }

    /// An answer that was next has been written to `out`; those that waited for it follow, and
    /// `follows` is told of each.
    pub fn answered(
        &mut self,
        place: AnswerPosition,
        out: &mut Vec<u8>,
        mut follows: impl FnMut(CallRef),
    ) {
        self.unanswered -= 1;
        if place == AnswerPosition::Anywhere {
            return;
        }
        self.waiting.pop_front();
        self.first += 1;
        while let Some(Some(_)) = self.waiting.front() {
            if let Some(Some((answer, mark))) = self.waiting.pop_front() {
                follows(mark);
                self.first += 1;
                self.unanswered -= 1;
                self.queued_bytes -= answer.len();
                out.extend_from_slice(&answer);
            }
        }
        if self.waiting.is_empty() && self.waiting.capacity() > 16 {
            self.waiting = VecDeque::new();
        }
    }

    /// Keeps an answer until those before it are there.
    pub fn queue_answer(&mut self, place: AnswerPosition, answer: Vec<u8>, mark: CallRef) {
        let AnswerPosition::InOrder(number) = place else {
            unreachable!("only answers in order wait for others");
        };
        self.queued_bytes += answer.len();
        let index = usize::try_from(number - self.first).expect("it was counted in memory");
        self.waiting[index] = Some((answer, mark));
    }

    /// The calls whose answers are held back, and the batches: whatever is unanswered and neither
    /// waits for a thread nor runs on one.
    pub fn marks(&self) -> impl Iterator<Item = CallRef> {
        let held = self.waiting.iter().flatten().map(|(_, mark)| *mark);
        held.chain(self.batches.iter().map(|(_, batch)| batch.reply.mark))
    }

    /// Keeps what was received and not consumed.
    ///
    /// # Errors
    /// When there is no memory for it; then nothing of it is kept.
    pub fn keep(&mut self, rest: &[u8]) -> Result<(), TryReserveError> {
        self.input.try_reserve(rest.len())?;
        self.input.extend_from_slice(rest);
        Ok(())
    }

    /// Drops what was consumed of the tail, and its memory when that was all.
    pub fn consume(&mut self, length: usize) {
        if length == self.input.len() {
            self.input = Vec::new();
        } else if length > 0 {
            self.input.drain(..length);
            // A large frame has passed: what follows it need not keep its room.
            if self.input.len() < self.input.capacity() / 8 {
                self.input.shrink_to_fit();
            }
        }
    }

    /// Takes the tail out, to be consumed; what is left of it has to be put back.
    pub fn take_tail(&mut self) -> Vec<u8> {
        mem::take(&mut self.input)
    }
}

#[cfg(test)]
#[path = "connection_tests.rs"]
mod tests;
