//! Defines the record of a call in the journal, in memory that the keeper shares, and the reference to it that a call
//! has.
//!
//! The journal reserves, fills and frees records. Nothing here fails.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::Release};

use crate::link::quarantine::WITHOUT_KEY;
use crate::sys::shared_memory::{shared_record, store_u128};

/// The words of an id. A longer id is not recorded (a UUID with its quotes has 38 bytes).
pub const ID_WORDS: usize = 11;

/// The call was taken; its answer is not ready.
pub const TAKEN: u32 = 0;
/// Its answer is among the bytes that are sent next.
pub const ANSWERED: u32 = 1;

shared_record! {
    /// A call that was taken and is not answered.
    #[derive(Debug)]
    pub struct CallRecord {
        /// The token's number of its connection, plus one; 0 while the entry is free. Set last.
        pub of: AtomicU64,
        /// Its number in the order of answers, plus one; 0 if it can be answered at any time.
        pub order: AtomicU64,
        /// Where its bytes end in the stream of the connection.
        pub end: AtomicU64,
        pub shape: AtomicU32,
        /// `TAKEN` or `ANSWERED`.
        pub stage: AtomicU32,
        /// Whether its handler may have begun.
        pub begun: AtomicU32,
        /// The bytes of its id, plus one; 0 if it has no id.
        pub id_length: AtomicU32,
        /// Its key for the quarantine; 0 while it has none.
        pub key: AtomicU64,
        /// Its number in the process that has its connection.
        pub number: AtomicU64,
        pub method: AtomicU32,
        /// The pid of that process, if that is another one.
        pub home: AtomicU32,
        pub id: [AtomicU64; ID_WORDS],
        /// For its line in the access log, without which these are not written: when it was read in nanoseconds
        /// (CLOCK_MONOTONIC), the bytes of its body, and the two halves of its trace id.
        pub read_ns: AtomicU64,
        pub received_bytes: AtomicU64,
        pub trace_id: [AtomicU64; 2],
    }
}

shared_record! {
    /// The call that a thread runs now: the event loop, or a handler thread.
    #[derive(Debug)]
    pub struct CurrentCall {
        /// Its key, or `WITHOUT_KEY`; 0 if the thread runs no call.
        pub key: AtomicU64,
        pub method: AtomicU32,
        /// Padding: keeps the size a multiple of eight.
        pub spare: AtomicU32,
    }
}

impl CurrentCall {
    /// Records that the thread begins a call. `key` is 0 if the call has none.
    pub fn begins(&self, key: u64, method: usize) {
        self.method.store(method as u32, Relaxed);
        let key = if key == 0 { WITHOUT_KEY } else { key };
        self.key.store(key, Release);
    }

    /// Records that the call is over.
    pub fn ends(&self) {
        self.key.store(0, Release);
    }
}

/// The entry of a call in the journal, if it has one.
#[derive(Debug, Clone, Copy, Default)]
pub struct CallRef(pub(super) Option<&'static CallRecord>);

impl PartialEq for CallRef {
    fn eq(&self, other: &Self) -> bool {
        let address = |mark: &CallRef| mark.0.map(std::ptr::from_ref);
        address(self) == address(other)
    }
}

impl Eq for CallRef {}

impl CallRef {
    /// Returns where to record that the handler of the call begins.
    #[inline]
    pub fn begun(self) -> Option<&'static AtomicU32> {
        Some(&self.0?.begun)
    }

    /// Records the key and the method of the call.
    #[inline]
    pub fn set_key(self, key: u64, method: usize) {
        if let Some(entry) = self.0 {
            entry.method.store(method as u32, Relaxed);
            entry.key.store(key, Release);
        }
    }

    /// Records what its line in the access log says.
    pub fn set_line(self, read_ns: u64, received_bytes: usize) {
        if let Some(entry) = self.0 {
            entry.read_ns.store(read_ns, Relaxed);
            entry.received_bytes.store(received_bytes as u64, Relaxed);
            store_u128(&entry.trace_id, 0);
        }
    }

    /// Records its trace, likewise.
    pub fn set_trace(self, trace_id: u128) {
        if let Some(entry) = self.0 {
            store_u128(&entry.trace_id, trace_id);
        }
    }

    /// Returns the key; 0 if it was not set.
    #[inline]
    pub fn key(self) -> u64 {
        self.0.map_or(0, |entry| entry.key.load(Relaxed))
    }

    /// Records that the handler of the call begins.
    #[inline]
    pub fn begins(self) {
        if let Some(begun) = self.begun() {
            begun.store(1, Release);
        }
    }
}
