//! Records the stuck calls of a worker for the master: their methods, ids and threads.
//!
//! The record is in shared memory, because a worker cannot attach anything to a report. The master skips invalid
//! numbers, because a child is never trusted. A master of another version does not read it and names no
//! call.

use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering::Relaxed};

use crate::sys::shared_memory::{load_text, shared_record, store_text};

/// The largest number of calls that are recorded; a worker may have more threads.
pub const MOST: usize = 32;
/// The size of an id in words of eight bytes; a longer id is cut.
const ID_WORDS: usize = 8;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StuckCall {
    /// The id of the thread that runs it; 0 if unknown.
    pub thread: i32,
    pub method: usize,
    /// The call id as JSON, if it has one; a long one is cut.
    pub id: Option<String>,
    /// The time since the call arrived in the worker, in milliseconds.
    pub age_ms: u64,
}

shared_record! {
    /// A call in shared memory.
    #[derive(Debug)]
    pub struct StuckEntry {
        /// See `StuckCall`.
        pub age_ms: AtomicU64,
        pub id: [AtomicU64; ID_WORDS],
        /// The number of bytes plus one; 0 means that it has no id.
        pub id_length: AtomicU32,
        /// See `StuckCall`.
        pub thread: AtomicI32,
        /// See `StuckCall`.
        pub method: AtomicU32,
        /// Padding: keeps the size a multiple of eight.
        pub spare: AtomicU32,
    }
}

shared_record! {
    /// The stuck calls of one worker. All zero: none.
    #[derive(Debug)]
    pub struct StuckCalls {
        /// Only the first `count` are valid.
        pub entries: [StuckEntry; MOST],
        pub count: AtomicU32,
        /// Padding: keeps the size a multiple of eight.
        pub spare: AtomicU32,
    }
}

impl StuckCalls {
    /// Empties the record for the next worker.
    pub fn clear(&self) {
        self.count.store(0, Relaxed);
    }

    /// Records the calls; more than `MOST` are left out. Call it before they are reported, because the
    /// system call of the report orders the writes before it.
    pub fn write(&self, calls: &[StuckCall]) {
        for (entry, call) in self.entries.iter().zip(calls) {
            entry.age_ms.store(call.age_ms, Relaxed);
            entry.thread.store(call.thread, Relaxed);
            entry.method.store(call.method as u32, Relaxed);
            let id = call.id.as_deref();
            let length = id.map_or(0, |id| store_text(&entry.id, id) + 1);
            entry.id_length.store(length, Relaxed);
        }
        self.count.store(calls.len().min(MOST) as u32, Relaxed);
    }

    pub fn read(&self) -> Vec<StuckCall> {
        let count = (self.count.load(Relaxed) as usize).min(MOST);
        self.entries[..count].iter().map(StuckEntry::read).collect()
    }
}

impl StuckEntry {
    fn read(&self) -> StuckCall {
        let length = self.id_length.load(Relaxed).checked_sub(1);
        StuckCall {
            thread: self.thread.load(Relaxed),
            method: self.method.load(Relaxed) as usize,
            id: length.map(|length| load_text(&self.id, length)),
            age_ms: self.age_ms.load(Relaxed),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;
    use crate::sys::shared_memory;

    #[test]
    fn calls_are_read_as_written_and_invalid_numbers_are_harmless() {
        let calls: &StuckCalls = &shared_memory::array_without_file(NonZeroUsize::MIN).unwrap()[0];
        assert_eq!(calls.read(), []);
        let call = StuckCall {
            thread: 42,
            method: 3,
            id: Some("\"é\"".into()),
            age_ms: 1_250,
        };
        let nameless = StuckCall {
            id: None,
            ..call.clone()
        };
        calls.write(&[call.clone(), nameless.clone()]);
        assert_eq!(calls.read(), [call.clone(), nameless]);
        let long = StuckCall {
            id: Some("é".repeat(5_000)),
            ..call
        };
        calls.write(&vec![long; 1_000]);
        let back = calls.read();
        assert_eq!(
            (back.len(), back[0].id.clone().unwrap()),
            (MOST, "é".repeat(32))
        );
        calls.count.store(u32::MAX, Relaxed);
        calls.entries[0].id_length.store(u32::MAX, Relaxed);
        calls.entries[0].id[0].store(u64::MAX, Relaxed);
        assert_eq!(calls.read().len(), MOST);
        calls.clear();
        assert_eq!(calls.read(), []);
    }
}
