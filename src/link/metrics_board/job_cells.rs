//! Lays out the counters of durable jobs, which only a jobs process writes, and the text of its status.
//!
//! They lie behind the block of the process, at the end of its room, so that both can grow. As in the block, fields
//! are only added at the end of a structure.
//!
//! The status is JSON that a reader may find half written. So it has a number that is odd during a write, and a
//! reader tries again. A process that died in a write leaves an odd number: then there is no status until the next
//! process of the record writes one.

use std::sync::atomic::{
    AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release, fence,
};

use super::layout::{Block, HistogramCells, NAMES, STRIDE, offset_of_block};
use crate::sys::shared_memory::{load_text, shared_record, store_text};

/// Where the counters are, from the beginning of the block.
const BEHIND: u64 = STRIDE - (140 << 10);
const _: () = assert!(
    size_of::<Block>() as u64 <= BEHIND
        && BEHIND + size_of::<JobCells>() as u64 <= STRIDE
        && BEHIND.is_multiple_of(4096)
);

/// The number of 8-byte words of the status.
const STATUS_WORDS: usize = 8192;
/// The longest status in bytes.
pub const MOST_STATUS: usize = STATUS_WORDS * 8;
/// How often a reader tries to find a whole status. A write takes some microseconds.
const TRIES: usize = 100;

/// Why attempts ended, by the number of the cause minus one. Values are only added at the end.
pub const OUTCOMES: [&str; 11] = [
    "result",
    "error",
    "timeout",
    "command-failed",
    "crashed",
    "unclear",
    "killed",
    "lost",
    "other-crashed",
    "interrupted",
    "never-begun",
];

/// How jobs ended: state and reason. Values are only added at the end.
pub const ENDS: [(&str, &str); 6] = [
    ("done", ""),
    ("cancelled", ""),
    ("dead", "expired"),
    ("dead", "attempts"),
    ("dead", "refused"),
    ("dead", "crashes"),
];

/// Returns where the counters of the jobs process with a scoreboard record are.
pub fn offset_of_jobs(record: usize) -> u64 {
    offset_of_block(record) + BEHIND
}

shared_record! {
    /// The counters of the jobs of one method.
    #[derive(Debug)]
    pub struct JobMethodCells {
        /// By `OUTCOMES`.
        pub attempts: [AtomicU64; 16],
        /// By `ENDS`.
        pub ended: [AtomicU64; 16],
    }
}

shared_record! {
    /// The counters of all jobs.
    #[derive(Debug)]
    pub struct JobCells {
        pub enqueued: AtomicU64,
        /// Outcomes of attempts that were not the current ones.
        pub stale: AtomicU64,
        /// Room for more fields.
        pub spare: [AtomicU64; 6],
        /// Durations of commits.
        pub commit: HistogramCells,
        /// Times from the due time of a job to its attempt.
        pub wait: HistogramCells,
        /// Run times of attempts.
        pub run: HistogramCells,
        pub methods: [JobMethodCells; NAMES + 1],
        pub status: StatusText,
    }
}

shared_record! {
    /// A text that one process writes and others read.
    #[derive(Debug)]
    pub struct StatusText {
        /// Odd during a write; 0 before the first one.
        writes: AtomicU64,
        length: AtomicU64,
        words: [AtomicU64; STATUS_WORDS],
    }
}

impl StatusText {
    /// Writes a text of at most [`MOST_STATUS`] bytes. Only one thread may write.
    pub fn write(&self, text: &str) {
        let odd = self.writes.load(Relaxed) | 1;
        self.writes.store(odd, Relaxed);
        fence(Release);
        let length = store_text(&self.words, text);
        self.length.store(length.into(), Relaxed);
        self.writes.store(odd.wrapping_add(1), Release);
    }

    /// Returns the text; `None` if there is none, or it is being written all the time.
    pub fn read(&self) -> Option<String> {
        for _ in 0..TRIES {
            let before = self.writes.load(Acquire);
            if before == 0 {
                return None;
            }
            if before & 1 == 1 {
                std::thread::yield_now();
                continue;
            }
            let length = self.length.load(Relaxed).min(MOST_STATUS as u64);
            let text = load_text(&self.words[..(length as usize).div_ceil(8)], length as u32);
            fence(Acquire);
            if self.writes.load(Relaxed) == before {
                return Some(text);
            }
        }
        None
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::sys::shared_memory::array_without_file;
    use std::num::NonZeroUsize;
    use std::thread;

    fn text() -> &'static StatusText {
        &array_without_file::<StatusText>(NonZeroUsize::MIN).unwrap()[0]
    }

    #[test]
    fn a_status_is_read_whole_while_it_is_written() {
        let status = text();
        assert_eq!(status.read(), None);
        status.write("");
        assert_eq!(status.read().as_deref(), Some(""));
        let writer = thread::spawn(move || {
            for round in 0..2_000_usize {
                status.write(&format!("{}.", "x".repeat(round % 500)));
            }
        });
        while !writer.is_finished() {
            if let Some(text) = status.read() {
                let is_whole = text.is_empty() || text.ends_with('.');
                assert!(is_whole && text.matches('.').count() <= 1, "{text}");
            }
        }
        writer.join().unwrap();
        assert_eq!(status.read().map(|text| text.len()), Some(500));
    }

    #[test]
    fn a_write_that_was_cut_off_hides_the_status_until_the_next_one() {
        let status = text();
        status.write("one");
        status.writes.store(3, Relaxed);
        assert_eq!(status.read(), None);
        status.write("two");
        assert_eq!(status.read().as_deref(), Some("two"));
    }
}
