//! Records the current I/O of a reactor in memory that outlives its process. After its death, the keeper
//! uses it to take the connections over.
//!
//! A process can die between any two instructions, so the order of the stores matters. An operation is
//! recorded before it starts, and the record is cleared after its result is recorded. The stores are
//! `Release`, which prevents the compiler from reordering them. Only one thread makes them.

use std::io;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Release};

use super::completion::Token;
use crate::sys::shared_memory::shared_record;
use crate::sys::{memory, shared_memory};

/// The size of the receive buffer, which all connections of a reactor share.
pub const RECEIVE_BUFFER: usize = 64 * 1024;

/// The zero value of fields that hold a number plus one: nothing is recorded.
const NONE: u32 = 0;

shared_record! {
    /// The record of one connection. All zero: it is free.
    #[derive(Debug)]
    pub struct ConnectionRecord {
        /// The connection's token as a number, plus one. Valid while `fd` is not zero.
        pub token: AtomicU64,
        /// Its descriptor plus one; 0 while the record is free. Set last and cleared first.
        pub fd: AtomicU32,
        /// Where the bytes are that the kernel has not taken yet, as a number of `UnsentData`.
        pub owed: AtomicU32,
        /// A note of the layers above.
        pub note: AtomicU32,
        /// Padding: keeps the offset of the next field.
        pub spare: AtomicU32,
    }
}

shared_record! {
    /// The I/O in progress: at most one connection receives and one sends at any time.
    #[derive(Debug)]
    pub struct CurrentIo {
        /// The index plus one of the connection that bytes are received from.
        pub receiving: AtomicU32,
        /// The number of bytes received, plus one; 0 while it is unknown.
        pub received: AtomicU32,
        /// The bytes received from it before: the position in its stream at which the buffer begins.
        pub start: AtomicU64,
        /// The position in its stream up to which the layers above have taken the bytes.
        pub taken: AtomicU64,
        /// The index plus one of the connection that bytes are sent to.
        pub sending: AtomicU32,
        /// The number of bytes that the kernel took, plus one; 0 while it is unknown.
        pub sent: AtomicU32,
        /// The bytes that the kernel had taken before.
        pub before: AtomicU64,
        /// The bytes passed to this send.
        pub length: AtomicU64,
        /// A connection that is being accepted, as a number of `PendingAccept`.
        pub accepting: AtomicU32,
        /// Padding: keeps the size a multiple of eight.
        pub spare: AtomicU32,
    }
}

/// Where the unsent bytes of a connection are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnsentData {
    /// There are none.
    Nothing = 0,
    /// In the memory of the process.
    Here = 1,
    /// In the packet buffer: they came with the connection.
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

/// How a connection is being accepted that has no record yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PendingAccept {
    /// There is none.
    None = 0,
    /// A client has connected. Nothing was read from it.
    Fresh = 1,
    /// A sibling has handed it over. Its packet is in the packet buffer.
    Used = 2,
}

impl PendingAccept {
    pub fn of(number: u32) -> Self {
        match number {
            0 => PendingAccept::None,
            1 => PendingAccept::Fresh,
            _ => PendingAccept::Used,
        }
    }
}

/// The records of all connections and of the current I/O.
#[derive(Debug, Clone, Copy)]
pub struct IoProgress {
    pub moment: &'static CurrentIo,
    /// The records of the connections, by `Token::index`.
    pub records: &'static [ConnectionRecord],
}

fn non_zero(length: usize) -> NonZeroUsize {
    NonZeroUsize::new(length).unwrap_or(NonZeroUsize::MIN)
}

/// Returns a receive buffer.
///
/// # Errors
/// If there is not enough memory.
pub fn receive_buffer() -> io::Result<&'static mut [u8]> {
    memory::zeroed(non_zero(RECEIVE_BUFFER))
}

impl IoProgress {
    /// Creates a record of `connections` connections, and the reactor's receive buffer, which ends with
    /// room for a packet of `longest` bytes. A connection without a record is served like any other, but
    /// the keeper cannot recover it.
    ///
    /// # Errors
    /// If there is not enough memory.
    pub fn new(connections: usize, longest: usize) -> io::Result<(Self, &'static mut [u8])> {
        let moment = shared_memory::array_without_file::<CurrentIo>(NonZeroUsize::MIN)?;
        Ok((
            IoProgress {
                moment: &moment[0],
                records: shared_memory::array_without_file(non_zero(connections))?,
            },
            shared_memory::bytes(non_zero(RECEIVE_BUFFER + longest))?,
        ))
    }

    pub fn record(&self, token: Token) -> Option<&'static ConnectionRecord> {
        self.records.get(token.index())
    }

    pub(super) fn opened(&self, token: Token, fd: i32, (owed, note): (UnsentData, u32)) {
        if let Some(record) = self.record(token) {
            record.owed.store(owed as u32, Release);
            record.note.store(note, Release);
            record.token.store(token.0 + 1, Release);
            record.fd.store(fd as u32 + 1, Release);
        }
        self.comes(PendingAccept::None);
    }

    pub(super) fn comes(&self, coming: PendingAccept) {
        self.moment.accepting.store(coming as u32, Release);
    }

    /// Call it before the descriptor is closed, because its number may be reused at once.
    pub(super) fn closes(&self, token: Token) {
        if let Some(record) = self.record(token) {
            record.fd.store(NONE, Release);
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
        if let Some(record) = self.record(token) {
            record.owed.store(owed as u32, Release);
        }
    }

    /// Call it when the layers above have recorded the result of the send.
    pub fn clear_send(&self) {
        self.moment.sending.store(NONE, Release);
    }
}
