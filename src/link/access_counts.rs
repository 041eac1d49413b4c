//! Counts the lines of the access log of a process, in its block of the metrics board.
//!
//! No line is due for a call that is exempt. For each other counted call a line is written or lost. So the lines that a
//! dead process had not written are known: the calls that it counted, less the exempt ones and the lines that are
//! written or lost. A process can also die between write(2) and the count. So it records each batch of lines
//! before it writes them, and the process that follows checks which of them are in the file.

use std::sync::atomic::{AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release};

use crate::sys::shared_memory::shared_record;

shared_record! {
    /// The lines of a process.
    #[derive(Debug)]
    pub struct AccessCounts {
        /// Whether the process writes lines and is the only one that counts here.
        is_on: AtomicU64,
        /// Calls without a line: counted before there was an access log, or left out by its rules.
        exempt: AtomicU64,
        pub written: AtomicU64,
        pub lost: AtomicU64,
        /// The number of lines in the batch that is being written; 0 if there is none.
        batch_lines: AtomicU64,
        /// The value of `written` before the batch.
        batch_base: AtomicU64,
        /// The number of the call of the first line of the batch.
        batch_call: AtomicU64,
        /// The position in the file before the batch.
        batch_position: AtomicU64,
    }
}

/// Lines that a process was writing when it died.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LineBatch {
    /// The number of lines, at least 1.
    pub lines: u64,
    /// The number of the call of the first line.
    pub first_call: u64,
    /// The position in the file before the write.
    pub position: u64,
}

impl AccessCounts {
    /// Begins the counts of a process that is the only one that counts here. `calls` is the number of calls so far.
    pub fn begin(&self, calls: u64) {
        let lines = self.lines();
        self.exempt.store(calls.wrapping_sub(lines), Relaxed);
        self.batch_lines.store(0, Relaxed);
        self.is_on.store(1, Release);
    }

    /// Returns the number of lines that are written or lost. It may wrap: any process can have written garbage here.
    fn lines(&self) -> u64 {
        let lost = self.lost.load(Relaxed);
        self.written.load(Relaxed).wrapping_add(lost)
    }

    /// Counts calls without a line. For the event loop of a process that counts alone.
    #[inline]
    pub fn exempt(&self, calls: u64) {
        let before = self.exempt.load(Relaxed);
        self.exempt.store(before.wrapping_add(calls), Relaxed);
    }

    /// Counts lost lines. Threads and processes may do so side by side.
    pub fn lose(&self, lines: u64) {
        if lines > 0 {
            self.lost.fetch_add(lines, Relaxed);
        }
    }

    /// Records the lines that are about to be written. A process has only one writer.
    pub fn begin_batch(&self, batch: LineBatch) {
        self.batch_base.store(self.written.load(Relaxed), Relaxed);
        self.batch_call.store(batch.first_call, Relaxed);
        self.batch_position.store(batch.position, Relaxed);
        self.batch_lines.store(batch.lines, Release);
    }

    /// Ends the batch: `written` of its lines are in the file.
    pub fn end_batch(&self, written: u64) {
        let base = self.batch_base.load(Relaxed);
        self.written.store(base.wrapping_add(written), Relaxed);
        self.batch_lines.store(0, Release);
    }

    /// Completes the counts of a process that has died. If it was writing lines, asks `find` how many of them are in
    /// the file, and counts these.
    pub fn recover(&self, find: impl FnOnce(LineBatch) -> u64) {
        let lines = self.batch_lines.load(Acquire);
        if lines == 0 {
            return;
        }
        let batch = LineBatch {
            lines,
            first_call: self.batch_call.load(Relaxed),
            position: self.batch_position.load(Relaxed),
        };
        self.end_batch(find(batch).min(lines));
    }

    /// Counts the lines that are still due as lost, because the process has ended, and its keeper too. `calls` returns
    /// the number of counted calls.
    pub fn settle(&self, calls: impl FnOnce() -> u64) {
        if self.is_on.swap(0, Acquire) == 0 {
            return;
        }
        let lines = self.lines();
        let due = calls().wrapping_sub(self.exempt.load(Relaxed));
        // Garbage in the block must not become a large number.
        let missing = due.wrapping_sub(lines);
        self.lose(if missing > u64::MAX / 2 { 0 } else { missing });
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;
    use crate::sys::shared_memory::array;

    fn counts() -> &'static AccessCounts {
        &array::<AccessCounts>(NonZeroUsize::MIN).unwrap().0[0]
    }

    fn lines(counts: &AccessCounts) -> (u64, u64) {
        (counts.written.load(Relaxed), counts.lost.load(Relaxed))
    }

    fn batch(lines: u64) -> LineBatch {
        LineBatch {
            lines,
            first_call: 7,
            position: 100,
        }
    }

    #[test]
    fn what_a_dead_process_had_not_written_is_lost() {
        let counts = counts();
        counts.settle(|| 9);
        assert_eq!(lines(counts), (0, 0));
        counts.begin(9);
        counts.begin_batch(batch(3));
        counts.end_batch(3);
        counts.lose(1);
        counts.exempt(2);
        counts.settle(|| 9 + 20);
        assert_eq!(lines(counts), (3, 20 - 2 - 3));
        // The next one continues, and calls that were counted meanwhile have no line.
        counts.begin(100);
        counts.settle(|| 100);
        assert_eq!(lines(counts), (3, 15));
    }

    #[test]
    fn a_batch_that_the_file_has_is_written_and_counted_once() {
        let counts = counts();
        counts.begin(0);
        counts.begin_batch(batch(3));
        counts.end_batch(3);
        counts.begin_batch(batch(5));
        for _ in 0..2 {
            counts.recover(|found| {
                assert_eq!(found, batch(5));
                4
            });
        }
        counts.settle(|| 8);
        assert_eq!(lines(counts), (7, 1));
    }

    #[test]
    fn garbage_does_not_become_lost_lines() {
        let counts = counts();
        counts.begin(0);
        counts.exempt(5);
        counts.settle(|| 3);
        assert_eq!(lines(counts), (0, 0));
        for cell in [&counts.written, &counts.lost, &counts.exempt, &counts.is_on] {
            cell.store(u64::MAX, Relaxed);
        }
        counts.settle(|| u64::MAX);
        counts.begin(u64::MAX);
    }
}
