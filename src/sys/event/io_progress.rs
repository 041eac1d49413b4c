//! What a reactor was doing, in memory that outlives its process: for a twin that takes its
//! connections over when it has died.
//!
//! A process can die between any two of its instructions, so each store here has its place: what is
//! about to be done is said before it is done, and taken back after what follows from it is said.
//! The stores are `Release` to keep the compiler from moving them; one thread makes them all.

use std::io;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Release};

use super::completion::Token;
use crate::sys::shared_memory;
use crate::sys::shared_memory::shared_record;

/// Bytes read at once, for all connections of a reactor together.
pub const RECEIVE_BUFFER: usize = 64 * 1024;

/// Nothing owed and nobody there: what a zero says in the fields that hold a number plus one.
const NONE: u32 = 0;

shared_record! {
    /// One place of a reactor. All zero: free.
    #[derive(Debug)]
    pub struct ConnectionRecord {
        /// Whose it is: the token's number plus one. Valid while `fd` is not zero.
        pub token: AtomicU64,
        /// Its descriptor plus one; 0 while the place is free. Set last and cleared first.
        pub fd: AtomicU32,
        /// Bytes for it that the kernel did not take, as a number of `UnsentData`.
        pub owed: AtomicU32,
        /// What the floors above know of it.
        pub note: AtomicU32,
        /// Keeps the next field in its place.
        pub spare: AtomicU32,
    }
}

shared_record! {
    /// What the loop is at; at most one connection each at any moment.
    #[derive(Debug)]
    pub struct CurrentIo {
        /// The place plus one of the connection that bytes are received from.
        pub receiving: AtomicU32,
        /// How many have come, plus one; 0 while that is not known.
        pub received: AtomicU32,
        /// Bytes that had been received from it before: where in its stream the buffer begins.
        pub start: AtomicU64,
        /// How far into its stream the floors above have taken what came.
        pub taken: AtomicU64,
        /// The place plus one of the connection that bytes are sent to.
        pub sending: AtomicU32,
        /// How many the kernel took, plus one; 0 while that is not known.
        pub sent: AtomicU32,
        /// Bytes that it had taken before.
        pub before: AtomicU64,
        /// Bytes that it is given.
        pub length: AtomicU64,
        /// A connection is coming in, as a number of `PendingAccept`.
        pub accepting: AtomicU32,
        /// Keeps the size a multiple of eight.
        pub spare: AtomicU32,
    }
}

/// Where bytes are that a connection is still to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnsentData {
    /// There are none.
    Nothing = 0,
    /// In the process.
    Here = 1,
    /// In the room for packets: they came along with it.
    InPacket = 2,
}

impl UnsentData {
    pub fn of(number: u32) -> Self {
        match number {
            0 => UnsentData::Nothing,
            2 => UnsentData::InPacket,
            _ => UnsentData::Here,
        }
    }
}

/// How a connection comes in that has no place yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PendingAccept {
    /// None does.
    Nobody = 0,
    /// A client has connected: nothing was read from it.
    Fresh = 1,
    /// A sibling has passed it on: what came along with it is in the room for packets.
    Used = 2,
}

impl PendingAccept {
    pub fn of(number: u32) -> Self {
        match number {
            0 => PendingAccept::Nobody,
            1 => PendingAccept::Fresh,
            _ => PendingAccept::Used,
        }
    }
}

/// Both, and the buffer that bytes are received into.
#[derive(Debug, Clone, Copy)]
pub struct IoProgress {
    /// What the loop is at.
    pub moment: &'static CurrentIo,
    /// By `Token::index`.
    pub seats: &'static [ConnectionRecord],
}

impl IoProgress {
    /// A witness for so many connections, and the reactor's buffer, with room for a packet of `longest`
    /// bytes at its end. A connection that finds no place is served like any other, and not seen here.
    ///
    /// # Errors
    /// When there is no memory to be had.
    pub fn new(connections: usize, longest: usize) -> io::Result<(Self, &'static mut [u8])> {
        let length = |length| NonZeroUsize::new(length).unwrap_or(NonZeroUsize::MIN);
        let moment = shared_memory::array_without_file::<CurrentIo>(NonZeroUsize::MIN)?;
        Ok((
            IoProgress {
                moment: &moment[0],
                seats: shared_memory::array_without_file(length(connections))?,
            },
            shared_memory::bytes(length(RECEIVE_BUFFER + longest))?,
        ))
    }

    pub fn seat(&self, token: Token) -> Option<&'static ConnectionRecord> {
        self.seats.get(token.index())
    }

    pub(super) fn opened(&self, token: Token, fd: i32, (owed, note): (UnsentData, u32)) {
        if let Some(seat) = self.seat(token) {
            seat.owed.store(owed as u32, Release);
            seat.note.store(note, Release);
            seat.token.store(token.0 + 1, Release);
            seat.fd.store(fd as u32 + 1, Release);
        }
        self.comes(PendingAccept::Nobody);
    }

    pub(super) fn comes(&self, coming: PendingAccept) {
        self.moment.accepting.store(coming as u32, Release);
    }

    /// Before its descriptor is closed, for its number may be another one's at once.
    pub(super) fn closes(&self, token: Token) {
        if let Some(seat) = self.seat(token) {
            seat.fd.store(NONE, Release);
        }
    }

    pub(super) fn begin_recv(&self, token: Token, start: u64) {
        self.moment.received.store(0, Release);
        self.moment.start.store(start, Release);
        self.moment.taken.store(start, Release);
        self.moment
            .receiving
            .store(token.index() as u32 + 1, Release);
    }

    pub(super) fn end_recv(&self, length: usize) {
        self.moment.received.store(length as u32 + 1, Release);
    }

    pub(super) fn clear_recv(&self) {
        self.moment.receiving.store(NONE, Release);
    }

    pub(super) fn begin_send(&self, token: Token, before: u64, length: usize) {
        self.moment.sent.store(0, Release);
        self.moment.before.store(before, Release);
        self.moment.length.store(length as u64, Release);
        self.moment.sending.store(token.index() as u32 + 1, Release);
    }

    pub(super) fn end_send(&self, length: usize) {
        self.moment.sent.store(length as u32 + 1, Release);
    }

    pub(super) fn owes(&self, token: Token, owed: UnsentData) {
        if let Some(seat) = self.seat(token) {
            seat.owed.store(owed as u32, Release);
        }
    }

    /// To be called once what was sent needs no answer any more.
    pub fn clear_send(&self) {
        self.moment.sending.store(NONE, Release);
    }
}
