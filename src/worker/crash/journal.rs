//! Records the calls that a worker has taken and not answered, in memory that outlives it. So its keeper
//! can answer them after its death.
//!
//! A call has an entry from the moment it is taken until its answer is sent. Each connection has flags
//! for state that only the worker has. A worker can die between any two stores. So an entry is written
//! before the bytes of its call count as taken, and freed after the kernel has the answer. If the journal
//! is full, the call is served, but its connection is reset if the worker crashes. Nothing else can fail.
//! Without a keeper this module does nothing.

use std::io;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed, Ordering::Release};

use super::call_record::{ANSWERED, CallRecord, CallRef, CurrentCall, ID_WORDS, TAKEN};
use crate::link::adoption_queue;
use crate::link::adoption_queue::AdoptedConnection;
use crate::protocol::body::Form;
use crate::protocol::call_id::CallId;
use crate::protocol::http;
use crate::protocol::reply::{AnswerFormat, Framing};
use crate::sys::event::IoProgress;
use crate::sys::shared_memory;
use crate::sys::shared_memory::{shared_record, store_text};
use crate::sys::signal;
use crate::worker::connection::{AnswerPosition, Connection, ConnectionPhase};

/// The largest number of calls in the journal at once. Only used entries take memory.
const ENTRIES: usize = 16 * 1024;

shared_record! {
    /// The state of the whole worker.
    #[derive(Debug)]
    pub struct JournalHeader {
        /// The worker exits in order, and its connections end with it.
        pub leaves: AtomicU32,
        /// The server stops, so connections are not handed over any more.
        pub stops: AtomicU32,
        /// The number of entries that were ever used.
        pub highest: AtomicU32,
        /// Padding: keeps the size a multiple of eight.
        pub spare: AtomicU32,
    }
}

/// The flags of a connection. The lower bits have its dialect.
pub mod note {
    /// It has received bytes that are not consumed.
    pub const TAIL: u32 = 1 << 8;
    /// It must end with its last answer.
    pub const CLOSING: u32 = 1 << 9;
    /// Our sending direction is shut down.
    pub const SHUT: u32 = 1 << 10;
    /// It has calls that are not in the journal.
    pub const UNKEPT: u32 = 1 << 11;
    /// It is being handed over.
    pub const GIVEN: u32 = 1 << 12;
    /// An HTTP request must name its method in the path.
    pub const NEEDS_PATH: u32 = 1 << 13;
}

/// Returns the flags of a connection that was adopted with this packet. They must be set before it is
/// used.
pub fn note_of(taken: &AdoptedConnection<'_>) -> u32 {
    let flag = |is: bool, flag| if is { flag } else { 0 };
    u32::from(adoption_queue::dialect_code(taken.state.dialect))
        | flag(taken.state.closing, note::CLOSING)
        | flag(taken.state.needs_path, note::NEEDS_PATH)
        | flag(!taken.unread.is_empty(), note::TAIL)
}

#[derive(Debug, Clone, Copy)]
pub struct SharedJournal {
    pub head: &'static JournalHeader,
    pub entries: &'static [CallRecord],
    /// What the threads run: first the event loop, then each handler thread.
    pub running: &'static [CurrentCall],
    /// The records of the connections in the event layer.
    pub progress: IoProgress,
}

/// The worker's side of the journal.
#[derive(Debug, Default)]
pub struct CallJournal {
    /// `None` without a keeper.
    shared: Option<SharedJournal>,
    /// Free entries that were used before.
    free: Vec<&'static CallRecord>,
    next: usize,
    /// The calls whose answers are sent next.
    answered: Vec<CallRef>,
    /// Where the current bytes begin in their stream, if they are those that the reactor has just
    /// received.
    start: Option<u64>,
    end: u64,
}

impl SharedJournal {
    /// Creates an empty journal for this many connections and handler threads, and the buffer for the
    /// reactor.
    ///
    /// # Errors
    /// If there is not enough memory.
    pub fn new(connections: usize, threads: usize) -> io::Result<(Self, &'static mut [u8])> {
        let (progress, buffer) = IoProgress::new(connections, adoption_queue::LONGEST)?;
        let entries = NonZeroUsize::new(ENTRIES).unwrap_or(NonZeroUsize::MIN);
        let head = shared_memory::array_without_file::<JournalHeader>(NonZeroUsize::MIN)?;
        let shared = SharedJournal {
            head: &head[0],
            entries: shared_memory::array_without_file(entries)?,
            running: shared_memory::array_without_file(NonZeroUsize::MIN.saturating_add(threads))?,
            progress,
        };
        Ok((shared, buffer))
    }
}

impl CallJournal {
    /// Creates a journal that writes into `shared`.
    pub fn new(shared: SharedJournal) -> Self {
        CallJournal {
            shared: Some(shared),
            ..CallJournal::default()
        }
    }

    /// Begins the parsing of received bytes.
    pub fn opens(&mut self) {
        self.start = self
            .shared
            .map(|shared| shared.progress.moment.start.load(Relaxed));
    }

    /// Records where the next call ends in the received bytes.
    #[inline]
    pub fn reaches(&mut self, at: usize) {
        self.end = self.start.map_or(0, |start| start + at as u64);
    }

    /// Records that all received bytes (`taken`) are consumed or kept. If bytes are kept, it sets the flag first:
    /// calls that are taken from them later have no position in the stream, so the keeper must not count these bytes
    /// as unread.
    pub fn closes(&mut self, connection: &mut Connection, taken: usize) {
        if connection.has_partial_input() {
            self.set_flag(connection, note::TAIL);
        }
        if let (Some(shared), Some(start)) = (self.shared, self.start.take()) {
            let taken = start + taken as u64;
            shared.progress.moment.taken.store(taken, Release);
        }
        self.end = 0;
    }

    /// Records a call that was taken, with its id and its number in this process.
    #[inline]
    pub fn take(
        &mut self,
        connection: &mut Connection,
        shape: AnswerFormat,
        place: AnswerPosition,
        (id, call): (Option<&str>, u64),
    ) -> CallRef {
        let Some(shared) = self.shared else {
            return CallRef::default();
        };
        let fits = id.is_none_or(|id| id.len() <= ID_WORDS * 8);
        let Some(entry) = fits.then(|| self.room(shared)).flatten() else {
            self.mark_unlogged(connection);
            return CallRef::default();
        };
        let order = match place {
            AnswerPosition::InOrder(number) => number + 1,
            AnswerPosition::Anywhere | AnswerPosition::Member(_) => 0,
        };
        entry.order.store(order, Relaxed);
        entry.end.store(self.end, Relaxed);
        entry.shape.store(number(shape), Relaxed);
        entry.stage.store(TAKEN, Relaxed);
        entry.begun.store(0, Relaxed);
        entry.key.store(0, Relaxed);
        entry.number.store(call, Relaxed);
        let length = id.map_or(0, |id| store_text(&entry.id, id) + 1);
        entry.id_length.store(length, Relaxed);
        entry.of.store(connection.token.number() + 1, Release);
        CallRef(Some(entry))
    }

    /// Records the call `home` of another worker that begins here. No connection of this worker has it, so the keeper
    /// sends no answer for it. If it completes, it is not suspected any more, like a call of this worker.
    pub fn take_for_peer(&mut self, home: CallId, key: u64, method: usize) -> CallRef {
        let Some(entry) = self.shared.and_then(|shared| self.room(shared)) else {
            return CallRef::default();
        };
        entry.order.store(0, Relaxed);
        entry.end.store(0, Relaxed);
        entry.shape.store(0, Relaxed);
        entry.stage.store(TAKEN, Relaxed);
        entry.begun.store(0, Relaxed);
        entry.id_length.store(0, Relaxed);
        entry.method.store(method as u32, Relaxed);
        entry.key.store(key, Relaxed);
        entry.number.store(home.number, Relaxed);
        entry.home.store(home.pid.unsigned_abs(), Relaxed);
        // No connection has this number, because it is larger than any token.
        entry.of.store(u64::MAX, Release);
        CallRef(Some(entry))
    }

    fn room(&mut self, shared: SharedJournal) -> Option<&'static CallRecord> {
        if let Some(entry) = self.free.pop() {
            return Some(entry);
        }
        let entry = shared.entries.get(self.next)?;
        self.next += 1;
        shared.head.highest.store(self.next as u32, Release);
        Some(entry)
    }

    /// Records that a connection has a call that is not in the journal. So it cannot be recovered until
    /// all is answered.
    pub fn mark_unlogged(&self, connection: &mut Connection) {
        connection.has_unlogged_calls = true;
        self.update_flags(connection);
    }

    /// Records that the answer of a call is among the bytes that are sent next.
    #[inline]
    pub fn answers(&mut self, mark: CallRef) {
        if let Some(entry) = mark.0 {
            entry.stage.store(ANSWERED, Release);
            self.answered.push(mark);
        }
    }

    /// Records that these bytes were sent or will be: the kernel has them, or the I/O record says that
    /// the reactor has them.
    #[inline]
    pub fn sent(&mut self) {
        let Some(shared) = self.shared else { return };
        while let Some(mark) = self.answered.pop() {
            self.forget(mark);
        }
        shared.progress.clear_send();
    }

    /// Frees the entry of a call that needs no answer any more.
    pub fn forget(&mut self, mark: CallRef) {
        if let Some(entry) = mark.0 {
            entry.of.store(0, Release);
            self.free.push(entry);
        }
    }

    /// Records the flags of a connection. Call it before anything relies on them.
    #[inline]
    pub fn update_flags(&self, connection: &mut Connection) {
        let Some(shared) = self.shared else { return };
        connection.has_unlogged_calls &= connection.unanswered > 0;
        let flag = |is: bool, flag| if is { flag } else { 0 };
        let note = u32::from(adoption_queue::dialect_code(connection.dialect))
            | flag(connection.has_partial_input(), note::TAIL)
            | flag(connection.phase == ConnectionPhase::Closing, note::CLOSING)
            | flag(connection.phase == ConnectionPhase::Lingering, note::SHUT)
            | flag(connection.has_unlogged_calls, note::UNKEPT)
            | flag(connection.needs_http_path, note::NEEDS_PATH);
        if note != connection.recorded_flags {
            connection.recorded_flags = note;
            if let Some(record) = shared.progress.record(connection.token) {
                record.note.store(note, Release);
            }
        }
    }

    /// Records that the connection ends with the answers to the taken calls. Later input is ignored.
    pub fn mark_closing(&self, connection: &mut Connection) {
        self.set_flag(connection, note::CLOSING);
    }

    /// Sets a flag of a connection. The other flags stay as they are.
    fn set_flag(&self, connection: &mut Connection, flag: u32) {
        if let Some(shared) = self.shared
            && connection.recorded_flags & flag == 0
        {
            connection.recorded_flags |= flag;
            if let Some(record) = shared.progress.record(connection.token) {
                record.note.store(connection.recorded_flags, Release);
            }
        }
    }

    /// Records that the connection is about to be handed over, or that this has failed.
    pub fn set_handed_off(&self, connection: &Connection, given: bool) {
        if let Some(shared) = self.shared
            && let Some(record) = shared.progress.record(connection.token)
        {
            let flag = if given { note::GIVEN } else { 0 };
            record.note.store(connection.recorded_flags | flag, Release);
        }
    }

    /// Records that the event loop itself begins to run a call.
    #[inline]
    pub fn begins_inline(&self, mark: CallRef, method: usize) {
        mark.begins();
        if let Some(shared) = self.shared {
            shared.running[0].begins(mark.key(), method);
        }
        signal::set_current_call(mark.key());
    }

    /// Records that this call is over.
    #[inline]
    pub fn ends_inline(&self) {
        signal::set_current_call(0);
        if let Some(shared) = self.shared {
            shared.running[0].ends();
        }
    }

    pub fn stops(&self) {
        if let Some(shared) = self.shared {
            shared.head.stops.store(1, Release);
        }
    }

    /// Records that the worker exits as ordered, and that `connections` connections end with it. If the server does
    /// not stop, their clients do not expect this, so `ended` counts these connections.
    pub fn record_exit(&self, connections: usize, ended: &AtomicU32) {
        if let Some(shared) = self.shared {
            if shared.head.stops.load(Relaxed) == 0 {
                ended.store(connections as u32, Relaxed);
            }
            shared.head.leaves.store(1, Release);
        }
    }
}

fn number(shape: AnswerFormat) -> u32 {
    let form = match shape.form {
        Form::Plain => 0,
        Form::JsonRpc => 1,
        Form::Notification => 2,
        Form::ParamsOnly => 3,
    };
    let wrap = match shape.wrap {
        Framing::Frame => 0,
        Framing::Line => 1,
        Framing::Member => 2,
        Framing::Http(reply) => {
            let origin = reply.origin.map_or(0, |origin| u32::from(origin) + 1);
            let flags = u32::from(reply.old) << 2 | u32::from(reply.bodiless) << 3;
            3 | flags | origin << 4 | u32::from(reply.is_async) << 24
        }
    };
    form | wrap << 2
}

pub fn shape(number: u32) -> AnswerFormat {
    let form = match number & 3 {
        0 => Form::Plain,
        1 => Form::JsonRpc,
        2 => Form::Notification,
        _ => Form::ParamsOnly,
    };
    let rest = number >> 2;
    let wrap = match rest & 3 {
        0 => Framing::Frame,
        1 => Framing::Line,
        2 => Framing::Member,
        _ => Framing::Http(http::ResponseOptions {
            old: rest & 4 != 0,
            bodiless: rest & 8 != 0,
            is_async: rest >> 24 & 1 != 0,
            origin: (rest >> 4 & 0xF_FFFF)
                .checked_sub(1)
                .and_then(|origin| u16::try_from(origin).ok()),
        }),
    };
    AnswerFormat { form, wrap }
}

#[cfg(test)]
#[path = "journal_tests.rs"]
mod tests;
