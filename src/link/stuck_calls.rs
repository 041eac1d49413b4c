//! What a worker knows of its stuck calls and the master can't see: which method, of which id, on which thread.
//!
//! It lies in memory that both share, because a worker can attach nothing to a report. The master
//! reads it with care, for a child is never trusted: numbers that are none of ours are left out.
//! A master of another version sees nothing of it, and names no call then.

use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering::Relaxed};

use crate::sys::shared_memory::shared_record;

/// Calls that are told of; a worker may have more threads.
pub const MOST: usize = 32;
/// Words of eight bytes that an id has room in; of a longer one its beginning is told.
const ID_WORDS: usize = 8;

/// A call that runs past its deadline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StuckCall {
    /// The thread that runs it; 0 if that is not known.
    pub thread: i32,
    pub method: usize,
    /// Its id as JSON, if it has one; a long one is cut.
    pub id: Option<String>,
    /// For how long it has been in the worker, in milliseconds.
    pub age_ms: u64,
}

shared_record! {
    /// A call, as it lies in shared memory.
    #[derive(Debug)]
    pub struct StuckEntry {
        /// See `StuckCall`.
        pub age_ms: AtomicU64,
        /// The bytes of the id.
        pub id: [AtomicU64; ID_WORDS],
        /// Their number plus one; 0: it has no id.
        pub id_length: AtomicU32,
        /// See `StuckCall`.
        pub thread: AtomicI32,
        /// See `StuckCall`.
        pub method: AtomicU32,
        /// Keeps the size a multiple of eight.
        pub spare: AtomicU32,
    }
}

shared_record! {
    /// The stuck calls of one worker. All zero: none.
    #[derive(Debug)]
    pub struct StuckCalls {
        /// The first `count` of them.
        pub entries: [StuckEntry; MOST],
        /// How many there are.
        pub count: AtomicU32,
        /// Keeps the size a multiple of eight.
        pub spare: AtomicU32,
    }
}

impl StuckCalls {
    /// Makes it empty, for the next worker.
    pub fn clear(&self) {
        self.count.store(0, Relaxed);
    }

    /// Writes them down; more than `MOST` are left out. To be called before they are reported: the
    /// report's system call orders one before the other.
    pub fn write(&self, calls: &[StuckCall]) {
        for (entry, call) in self.entries.iter().zip(calls) {
            entry.age_ms.store(call.age_ms, Relaxed);
            entry.thread.store(call.thread, Relaxed);
            entry.method.store(call.method as u32, Relaxed);
            let id = call.id.as_deref().map(|id| {
                let mut end = id.len().min(ID_WORDS * 8);
                while !id.is_char_boundary(end) {
                    end -= 1;
                }
                &id.as_bytes()[..end]
            });
            let length = id.map_or(0, |id| id.len() as u32 + 1);
            entry.id_length.store(length, Relaxed);
            for (word, bytes) in entry.id.iter().zip(id.unwrap_or_default().chunks(8)) {
                let mut value = [0; 8];
                value[..bytes.len()].copy_from_slice(bytes);
                word.store(u64::from_ne_bytes(value), Relaxed);
            }
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
        let words = self.id.iter();
        let mut id: Vec<u8> = words
            .flat_map(|word| word.load(Relaxed).to_ne_bytes())
            .collect();
        let length = self.id_length.load(Relaxed).checked_sub(1);
        StuckCall {
            thread: self.thread.load(Relaxed),
            method: self.method.load(Relaxed) as usize,
            id: length.map(|length| {
                id.truncate(length as usize);
                String::from_utf8_lossy(&id).into_owned()
            }),
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
    fn calls_are_read_as_they_were_written_and_numbers_that_lie_harm_nobody() {
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
