//! What a worker has taken and not answered, in memory that outlives it: so that its keeper can
//! answer for it when it has died.
//!
//! One entry a call, from the moment it is taken until its answer has left; beside it a note for
//! each connection, about what only the worker has of it. A worker can die between any two of the
//! stores here: an entry is there before the bytes of its call count as taken, and goes after the
//! kernel has the answer. What finds no room makes its connection one that can't be kept, which is
//! all that ever fails. Without a keeper nothing here does anything.

use std::io;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::Release};

use crate::link::adoption_queue;
use crate::link::adoption_queue::AdoptedConnection;
use crate::protocol::body::Form;
use crate::protocol::http;
use crate::protocol::reply::{AnswerFormat, Framing};
use crate::sys::event::IoProgress;
use crate::sys::shared_memory;
use crate::sys::shared_memory::shared_record;
use crate::worker::connection::{AnswerPosition, Connection, ConnectionPhase};

/// Calls that can be in the ledger at once. Only what is used takes memory.
const ENTRIES: usize = 16 * 1024;
/// Words of an id: what is longer (a UUID has 38 bytes with its quotes) is not kept.
const ID_WORDS: usize = 11;

/// Where a call is.
pub const TAKEN: u32 = 0;
/// Its answer is among the bytes that are sent next.
pub const ANSWERED: u32 = 1;

shared_record! {
    /// A call that was taken and has no answer yet.
    #[derive(Debug)]
    pub struct CallRecord {
        /// Whose it is: the token's number plus one; 0 while the entry is free. Set last.
        pub of: AtomicU64,
        /// Its place among the answers in order, plus one; 0: anywhere.
        pub order: AtomicU64,
        /// Where its bytes end in the stream of the connection.
        pub end: AtomicU64,
        pub shape: AtomicU32,
        /// `TAKEN` or `ANSWERED`.
        pub stage: AtomicU32,
        /// Whether its handler may have begun.
        pub begun: AtomicU32,
        /// Bytes of its id, plus one; 0: it has none.
        pub id_length: AtomicU32,
        /// What it is known by in quarantine; 0 while that was not asked.
        pub key: AtomicU64,
        pub method: AtomicU32,
        /// Keeps the next field in its place.
        pub spare: AtomicU32,
        pub id: [AtomicU64; ID_WORDS],
    }
}

shared_record! {
    /// What the worker is about as a whole.
    #[derive(Debug)]
    pub struct JournalHeader {
        /// It leaves in order: its connections are to end with it.
        pub leaves: AtomicU32,
        /// The server stops: they go nowhere any more.
        pub stops: AtomicU32,
        /// Entries that were ever used.
        pub highest: AtomicU32,
        /// Keeps the size a multiple of eight.
        pub spare: AtomicU32,
    }
}

/// What the note of a connection says besides its dialect.
pub mod note {
    /// Bytes were received and not consumed.
    pub const TAIL: u32 = 1 << 8;
    /// It is to end with its last answer.
    pub const CLOSING: u32 = 1 << 9;
    /// Our side has ended already.
    pub const SHUT: u32 = 1 << 10;
    /// It has calls that are not in the ledger.
    pub const UNKEPT: u32 = 1 << 11;
    /// It is being passed on.
    pub const GIVEN: u32 = 1 << 12;
}

/// What is to be noted of a connection that comes with this, before anything else is done with it.
pub fn note_of(taken: &AdoptedConnection<'_>) -> u32 {
    let flag = |is: bool, flag| if is { flag } else { 0 };
    u32::from(adoption_queue::dialect_code(taken.state.dialect))
        | flag(taken.state.closing, note::CLOSING)
        | flag(!taken.unread.is_empty(), note::TAIL)
}

#[derive(Debug, Clone, Copy)]
pub struct SharedJournal {
    /// The worker.
    pub head: &'static JournalHeader,
    pub entries: &'static [CallRecord],
    /// The connections, as the event layer has them.
    pub witness: IoProgress,
}

/// The entry of a call in the ledger, if it has one.
#[derive(Debug, Clone, Copy, Default)]
pub struct CallRef(Option<&'static CallRecord>);

impl PartialEq for CallRef {
    fn eq(&self, other: &Self) -> bool {
        let address = |mark: &CallRef| mark.0.map(std::ptr::from_ref);
        address(self) == address(other)
    }
}

impl Eq for CallRef {}

impl CallRef {
    /// Where it is to be said that the handler of the call begins.
    #[inline]
    pub fn begun(self) -> Option<&'static AtomicU32> {
        Some(&self.0?.begun)
    }

    /// What the call is known by in quarantine.
    #[inline]
    pub fn is_named(self, key: u64, method: usize) {
        if let Some(entry) = self.0 {
            entry.method.store(method as u32, Relaxed);
            entry.key.store(key, Release);
        }
    }

    /// The same back; 0 where nobody asked.
    #[inline]
    pub fn key(self) -> u64 {
        self.0.map_or(0, |entry| entry.key.load(Relaxed))
    }

    /// The handler of the call begins.
    #[inline]
    pub fn begins(self) {
        if let Some(begun) = self.begun() {
            begun.store(1, Release);
        }
    }
}

/// The worker's side of it.
#[derive(Debug, Default)]
pub struct CallJournal {
    /// `None` without a keeper.
    book: Option<SharedJournal>,
    /// Entries that were used and are free.
    free: Vec<&'static CallRecord>,
    next: usize,
    /// Those whose answers are sent next.
    answered: Vec<CallRef>,
    /// Where the bytes that are being taken begin in their stream, while they are those that the
    /// reactor has just received.
    start: Option<u64>,
    end: u64,
}

impl SharedJournal {
    /// An empty one, for so many connections; and the buffer for the reactor.
    ///
    /// # Errors
    /// When there is no memory to be had.
    pub fn new(connections: usize) -> io::Result<(Self, &'static mut [u8])> {
        let (witness, buffer) = IoProgress::new(connections, adoption_queue::LONGEST)?;
        let entries = NonZeroUsize::new(ENTRIES).unwrap_or(NonZeroUsize::MIN);
        let head = shared_memory::array_without_file::<JournalHeader>(NonZeroUsize::MIN)?;
        let book = SharedJournal {
            head: &head[0],
            entries: shared_memory::array_without_file(entries)?,
            witness,
        };
        Ok((book, buffer))
    }
}

impl CallJournal {
    /// One that writes into this book.
    pub fn new(book: SharedJournal) -> Self {
        CallJournal {
            book: Some(book),
            ..CallJournal::default()
        }
    }

    /// What was just received is taken now, from its first byte on.
    pub fn opens(&mut self) {
        self.start = self
            .book
            .map(|book| book.witness.moment.start.load(Relaxed));
    }

    /// The next call ends at this byte of what is taken.
    #[inline]
    pub fn reaches(&mut self, at: usize) {
        self.end = self.start.map_or(0, |start| start + at as u64);
    }

    /// So many bytes were received, and all are taken or in the tail by now. The tail is shown first:
    /// what is taken from it later has no place in the stream, so a crash must not find it unread.
    pub fn closes(&mut self, connection: &mut Connection, taken: usize) {
        if connection.has_partial_input() {
            self.set_flag(connection, note::TAIL);
        }
        if let (Some(book), Some(start)) = (self.book, self.start.take()) {
            let taken = start + taken as u64;
            book.witness.moment.taken.store(taken, Release);
        }
        self.end = 0;
    }

    /// A call is taken.
    #[inline]
    pub fn take(
        &mut self,
        connection: &mut Connection,
        shape: AnswerFormat,
        place: AnswerPosition,
        id: Option<&str>,
    ) -> CallRef {
        let Some(book) = self.book else {
            return CallRef::default();
        };
        let fits = id.is_none_or(|id| id.len() <= ID_WORDS * 8);
        let Some(entry) = fits.then(|| self.room(book)).flatten() else {
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
        let id = id.unwrap_or_default().as_bytes();
        for (word, bytes) in entry.id.iter().zip(id.chunks(8)) {
            let mut whole = [0; 8];
            whole[..bytes.len()].copy_from_slice(bytes);
            word.store(u64::from_ne_bytes(whole), Relaxed);
        }
        let length = if id.is_empty() {
            0
        } else {
            id.len() as u32 + 1
        };
        entry.id_length.store(length, Relaxed);
        entry.of.store(connection.token.number() + 1, Release);
        CallRef(Some(entry))
    }

    /// A call of another worker begins here. No connection of this worker has it, so the keeper sends
    /// no answer for it. It may be what this worker dies of.
    pub fn take_for_peer(&mut self, key: u64, method: usize) -> CallRef {
        let Some(entry) = self.book.and_then(|book| self.room(book)) else {
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
        // No connection has this number: it is larger than any token.
        entry.of.store(u64::MAX, Release);
        CallRef(Some(entry))
    }

    fn room(&mut self, book: SharedJournal) -> Option<&'static CallRecord> {
        if let Some(entry) = self.free.pop() {
            return Some(entry);
        }
        let entry = book.entries.get(self.next)?;
        self.next += 1;
        book.head.highest.store(self.next as u32, Release);
        Some(entry)
    }

    /// A connection has something that is not in here: it can't be kept until all is answered.
    pub fn mark_unlogged(&self, connection: &mut Connection) {
        connection.has_unlogged_calls = true;
        self.update_flags(connection);
    }

    /// Its answer is among the bytes that are sent next.
    #[inline]
    pub fn answers(&mut self, mark: CallRef) {
        if let Some(entry) = mark.0 {
            entry.stage.store(ANSWERED, Release);
            self.answered.push(mark);
        }
    }

    /// They were sent, or will be: they are in the kernel, or owed by the reactor, which says so.
    #[inline]
    pub fn sent(&mut self) {
        let Some(book) = self.book else { return };
        while let Some(mark) = self.answered.pop() {
            self.forget(mark);
        }
        book.witness.clear_send();
    }

    /// It needs no answer any more.
    pub fn forget(&mut self, mark: CallRef) {
        if let Some(entry) = mark.0 {
            entry.of.store(0, Release);
            self.free.push(entry);
        }
    }

    /// Says what is to be known of a connection. To be called before what it says is relied on.
    #[inline]
    pub fn update_flags(&self, connection: &mut Connection) {
        let Some(book) = self.book else { return };
        connection.has_unlogged_calls &= connection.unanswered > 0;
        let flag = |is: bool, flag| if is { flag } else { 0 };
        let note = u32::from(adoption_queue::dialect_code(connection.dialect))
            | flag(connection.has_partial_input(), note::TAIL)
            | flag(connection.phase == ConnectionPhase::Closing, note::CLOSING)
            | flag(connection.phase == ConnectionPhase::Lingering, note::SHUT)
            | flag(connection.has_unlogged_calls, note::UNKEPT);
        if note != connection.recorded_flags {
            connection.recorded_flags = note;
            if let Some(seat) = book.witness.seat(connection.token) {
                seat.note.store(note, Release);
            }
        }
    }

    /// It is to end with the answers to what was taken: whatever it has sent behind that is for nobody.
    pub fn mark_closing(&self, connection: &mut Connection) {
        self.set_flag(connection, note::CLOSING);
    }

    /// Says one thing more of a connection, and takes nothing back.
    fn set_flag(&self, connection: &mut Connection, flag: u32) {
        if let Some(book) = self.book
            && connection.recorded_flags & flag == 0
        {
            connection.recorded_flags |= flag;
            if let Some(seat) = book.witness.seat(connection.token) {
                seat.note.store(connection.recorded_flags, Release);
            }
        }
    }

    /// It is about to be passed on, or was not after all.
    pub fn set_handed_off(&self, connection: &Connection, given: bool) {
        if let Some(book) = self.book
            && let Some(seat) = book.witness.seat(connection.token)
        {
            let flag = if given { note::GIVEN } else { 0 };
            seat.note.store(connection.recorded_flags | flag, Release);
        }
    }

    pub fn stops(&self) {
        if let Some(book) = self.book {
            book.head.stops.store(1, Release);
        }
    }

    /// The worker leaves in order, and so many connections end with it, which is counted in
    /// `ended`: but for a stop of the server nobody has told their clients so.
    pub fn record_exit(&self, connections: usize, ended: &AtomicU32) {
        if let Some(book) = self.book {
            if book.head.stops.load(Relaxed) == 0 {
                ended.store(connections as u32, Relaxed);
            }
            book.head.leaves.store(1, Release);
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
            3 | u32::from(reply.old) << 2 | u32::from(reply.bodiless) << 3 | origin << 4
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
            origin: (rest >> 4)
                .checked_sub(1)
                .and_then(|origin| u16::try_from(origin).ok()),
        }),
    };
    AnswerFormat { form, wrap }
}

#[cfg(test)]
#[path = "journal_tests.rs"]
mod tests;
