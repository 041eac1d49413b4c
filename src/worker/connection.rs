//! Holds the state of one client connection: its unconsumed input, its answers and their order.
//!
//! Only state and its rules, without sockets, calls and clocks. A quiescent connection owns no buffer, so
//! ten thousand of them need little memory.

use std::collections::{TryReserveError, VecDeque};
use std::mem;
use std::net::SocketAddr;

use slab::Slab;

use super::batch::UntakenMembers;
use super::crash::call_record::CallRef;
use super::shares::Source;
use crate::link::metrics_board::layout::{CloseReason, MoveReason};
use crate::protocol::Dialect;
use crate::protocol::body::Form;
use crate::protocol::http::ParseProgress;
use crate::protocol::reply::AnswerFormat;
use crate::sys::event::Token;

/// The bytes of answers that may wait on one connection before no further call is taken from it. A client
/// that never reads can use this much memory, plus one answer.
pub const HIGH_WATER: usize = 256 * 1024;

/// The bytes of params, ids and expected large results of waiting and running calls before no further
/// call is taken. Without it the limit would be limits.pipeline times limits.frame.
pub const HIGH_PENDING: usize = 4 * 1024 * 1024;

/// The phase of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectionPhase {
    /// Calls are taken.
    Open,
    /// No further call is taken. The connection is closed after the last answer.
    Closing,
    /// All is answered and our sending direction is shut down. Input is dropped until the peer closes.
    Lingering,
}

/// How a connection ends, for the metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectionEnd {
    Closed(CloseReason),
    /// Handed to another worker.
    Moved(MoveReason),
}

/// The position of an answer among the others of its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AnswerPosition {
    /// Calls without an id are answered in their order; this is the number of the call.
    InOrder(u64),
    /// A call with an id is answered as soon as it is done.
    Anywhere,
    /// In the answer of a batch; this is the key of the batch in the connection.
    Member(usize),
}

/// The position and form of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PendingAnswer {
    pub place: AnswerPosition,
    pub shape: AnswerFormat,
    pub mark: CallRef,
}

/// A JSON-RPC batch that is not answered yet.
#[derive(Debug)]
pub struct Batch {
    /// The position and form of its whole answer.
    pub reply: PendingAnswer,
    /// The number of calls that are not done.
    pub left: usize,
    /// The answers of done calls.
    pub out: Vec<u8>,
    /// An answer was too long to be added, so no further call of the batch is started.
    is_full: bool,
}

/// The rest of a refused call, which is dropped when it arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Discard {
    /// This many bytes.
    Bytes(usize),
    /// Everything up to the end of the line.
    Line,
}

#[derive(Debug)]
pub struct Connection {
    /// Its token in the event layer.
    pub token: Token,
    /// The address of the client; `None` on a unix socket.
    pub peer: Option<SocketAddr>,
    /// The source to which its use of shared limits counts.
    pub source: Source,
    /// Its key among the connections that `per-source` limits; 0: it does not count.
    pub source_key: u64,
    /// HTTP requests must name their method in the path (`http-methods` of its listener).
    pub needs_http_path: bool,
    pub phase: ConnectionPhase,
    /// How it ends, if it ends now.
    pub end: ConnectionEnd,
    /// The peer sends no more.
    pub peer_closed: bool,
    /// The peer has closed the connection, so no answer reaches it.
    pub peer_gone: bool,
    /// It is not read, because no further call may be taken from it now.
    pub is_read_paused: bool,
    /// The dialect, once the first four bytes are known.
    pub dialect: Option<Dialect>,
    /// Lines: how much of the input is known to have no line feed.
    pub scanned: usize,
    /// HTTP: how far an unfinished request was parsed; `None` between requests.
    pub http: Option<Box<ParseProgress>>,
    /// JSON-RPC batches that are not answered yet.
    pub batches: Slab<Batch>,
    /// The calls of the newest batch that are not taken yet.
    pub untaken_members: Option<Box<UntakenMembers>>,
    /// The number of calls that were taken and not answered.
    pub unanswered: usize,
    /// Received bytes that are not consumed: an unfinished frame, or frames that may not be taken yet.
    pub input: Vec<u8>,
    /// The bytes of `input` that the worker has counted, including those that may not be taken yet.
    pub accounted_bytes: usize,
    /// The bytes of untaken answers that the worker has counted.
    pub counted_unsent: usize,
    /// Input to be dropped.
    pub discarding: Option<Discard>,
    /// The answers of calls without an id, from number `first` on; `None` is not done yet. The first
    /// element is `None` if there is one.
    waiting: VecDeque<Option<(Vec<u8>, CallRef)>>,
    first: u64,
    /// The bytes in `waiting` and in the answers of batches.
    queued_bytes: usize,
    /// The bytes that count for waiting and running calls.
    pub pending: usize,
    /// The journal does not have all its unanswered calls.
    pub has_unlogged_calls: bool,
    /// The flags that the journal has.
    pub recorded_flags: u32,
    /// Nothing was received yet. The first bytes may have waited long before the accept.
    pub is_first_read: bool,
    /// When it came here, in milliseconds, as long as it never had a call: `UnusedConnections` keeps it.
    pub unused_since_ms: Option<u64>,
    /// When it last received or was sent something, in milliseconds.
    pub active_ms: u64,
    /// When it was moved here by rebalancing, in milliseconds; 0 if it was not.
    pub rebalanced_ms: u64,
    /// The armed deadlines, 0 for none; kept by `Timers::arm`.
    pub read_deadline: u64,
    /// See `read_deadline`.
    pub write_deadline: u64,
    /// See `read_deadline`; for idleness before closing, and for lingering afterwards.
    pub quiet_deadline: u64,
}

impl Connection {
    /// Creates a new connection.
    pub fn new(token: Token, peer: Option<SocketAddr>, source: Source, now_ms: u64) -> Self {
        Connection {
            token,
            peer,
            source,
            source_key: 0,
            needs_http_path: false,
            phase: ConnectionPhase::Open,
            end: ConnectionEnd::Closed(CloseReason::Client),
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
            unused_since_ms: None,
            active_ms: now_ms,
            rebalanced_ms: 0,
            read_deadline: 0,
            write_deadline: 0,
            quiet_deadline: 0,
        }
    }

    /// Returns whether an answer to a call of this form would not be sent. A notification has none.
    pub fn drops_answer(&self, form: Form) -> bool {
        self.peer_gone && form != Form::Notification
    }

    /// Returns whether another call may be taken while `unsent` bytes of answers are unsent.
    pub fn takes_calls(&self, pipeline: usize, unsent: usize) -> bool {
        self.phase == ConnectionPhase::Open
            && self.untaken_members.is_none()
            && self.unanswered < pipeline
            && self.pending < HIGH_PENDING
            && self.queued_bytes + unsent < HIGH_WATER
    }

    /// Returns the bytes of answers that delay one more answer at `place`, with `unsent` bytes unsent.
    /// Returns 0 if the other answers wait for this one.
    pub fn backlog(&self, place: AnswerPosition, unsent: usize) -> usize {
        match place {
            AnswerPosition::InOrder(_) if self.is_next(place) => unsent,
            // The other answers of its batch wait for it, and not the other way round.
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

    /// Returns the bytes of answers that wait for others.
    pub fn queued_bytes(&self) -> usize {
        self.queued_bytes
    }

    /// Returns whether answers wait for their turn.
    pub fn holds(&self) -> bool {
        self.queued_bytes > 0
    }

    /// Records why it is closed.
    pub fn ends_by(&mut self, reason: CloseReason) {
        self.end = ConnectionEnd::Closed(reason);
    }

    /// Returns whether it has no partial input and no unanswered call. Unsent answers are not considered: the reactor
    /// has them.
    pub fn is_quiescent(&self) -> bool {
        self.unanswered == 0 && !self.has_partial_input()
    }

    /// Returns whether it has received part of a call that is not taken yet.
    pub fn has_partial_input(&self) -> bool {
        !self.input.is_empty() || self.discarding.is_some()
    }

    /// Drops the part of `input` that must be dropped. Returns its length in bytes.
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

    /// Takes a call. `with_id` says whether it may be answered out of order.
    pub fn take(&mut self, with_id: bool) -> AnswerPosition {
        self.unanswered += 1;
        if with_id {
            return AnswerPosition::Anywhere;
        }
        let number = self.first + self.waiting.len() as u64;
        self.waiting.push_back(None);
        AnswerPosition::InOrder(number)
    }

    /// Returns whether an answer at `place` can be written to the output now.
    pub fn is_next(&self, place: AnswerPosition) -> bool {
        match place {
            AnswerPosition::Anywhere | AnswerPosition::Member(_) => true,
            AnswerPosition::InOrder(number) => number == self.first,
        }
    }

    /// Returns whether no taken call is answered after `place`.
    pub fn is_last(&self, place: AnswerPosition) -> bool {
        match place {
            AnswerPosition::InOrder(number) => number + 1 == self.first + self.waiting.len() as u64,
            AnswerPosition::Anywhere | AnswerPosition::Member(_) => false,
        }
    }

    /// Begins a batch of `left` calls. Returns its key, for `AnswerPosition::Member` of each call.
    pub fn begin_batch(&mut self, reply: PendingAnswer, left: usize) -> usize {
        self.batches.insert(Batch {
            reply,
            left,
            out: Vec::new(),
            is_full: false,
        })
    }

    /// Returns whether no answer can be added to the batch at this position.
    pub fn is_batch_full(&self, place: AnswerPosition) -> bool {
        matches!(place, AnswerPosition::Member(key) if self.batches[key].is_full)
    }

    /// Records that the batch of `place` is full. Returns whether that is new and the batch is not answered yet.
    pub fn set_batch_full(&mut self, place: AnswerPosition) -> bool {
        let AnswerPosition::Member(key) = place else {
            return false;
        };
        let batch = self.batches.get_mut(key);
        batch.is_some_and(|batch| !mem::replace(&mut batch.is_full, true))
    }

    /// Answers one call of a batch: `write` appends its answer. Returns the batch if it was the last
    /// call.
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

    /// An answer that was next has been written to `out`. Appends those that waited for it, and calls
    /// `follows` for each.
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

    /// Keeps an answer until those before it are done.
    pub fn queue_answer(&mut self, place: AnswerPosition, answer: Vec<u8>, mark: CallRef) {
        let AnswerPosition::InOrder(number) = place else {
            unreachable!("only answers in order wait for others");
        };
        self.queued_bytes += answer.len();
        let index = usize::try_from(number - self.first).expect("it was counted in memory");
        self.waiting[index] = Some((answer, mark));
    }

    /// Returns the calls whose answers are held back, and the batches: everything that is unanswered and
    /// neither waits for a thread nor runs.
    pub fn marks(&self) -> impl Iterator<Item = CallRef> {
        let held = self.waiting.iter().flatten().map(|(_, mark)| *mark);
        held.chain(self.batches.iter().map(|(_, batch)| batch.reply.mark))
    }

    /// Keeps received bytes that are not consumed.
    ///
    /// # Errors
    /// If there is no memory; then none of them are kept.
    pub fn keep(&mut self, rest: &[u8]) -> Result<(), TryReserveError> {
        self.input.try_reserve(rest.len())?;
        self.input.extend_from_slice(rest);
        Ok(())
    }

    /// Drops consumed bytes of the input, and its memory if nothing is left.
    pub fn consume(&mut self, length: usize) {
        if length == self.input.len() {
            self.input = Vec::new();
        } else if length > 0 {
            self.input.drain(..length);
            // After a large frame, the following input does not need that much memory.
            if self.input.len() < self.input.capacity() / 8 {
                self.input.shrink_to_fit();
            }
        }
    }

    /// Takes the input out to be consumed. Put the rest back afterwards.
    pub fn take_tail(&mut self) -> Vec<u8> {
        mem::take(&mut self.input)
    }
}

#[cfg(test)]
#[path = "connection_tests.rs"]
mod tests;
