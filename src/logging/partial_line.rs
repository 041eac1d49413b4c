//! Records whether the log ends with an incomplete line, for all processes that write to it.
//!
//! A full disk cuts a line. The next process that writes has to end that line first. Otherwise two lines
//! become one, and neither can be parsed. Only one log is recorded, by its identity; another incomplete
//! log replaces it.

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::sys::shared_memory;

/// The bits of a mark that are a count: how often a mark was set.
const TIMES: u64 = 0xff;

/// The identity of the log whose end is incomplete; 0 means none. Processes that are forked after the
/// first output was made share it. Without shared memory each process handles only its own lines.
static TORN: LazyLock<&'static AtomicU64> = LazyLock::new(|| {
    shared_memory::array_without_file(NonZeroUsize::MIN).map_or(&PRIVATE, |shared| &shared[0])
});

/// For a process that must not use that memory.
static PRIVATE: AtomicU64 = AtomicU64::new(0);

/// The state of the end of one log.
#[derive(Debug, Clone, Copy)]
pub(super) struct PartialLine {
    mark: &'static AtomicU64,
    place: u64,
}

impl PartialLine {
    pub(super) fn of(file: &File) -> Self {
        PartialLine::by(&TORN, file)
    }

    /// For a process that handles only its own lines.
    pub(super) fn private(file: &File) -> Self {
        PartialLine::by(&PRIVATE, file)
    }

    pub(super) fn by(mark: &'static AtomicU64, file: &File) -> Self {
        // If fstat(2) fails, lines of this process are still handled.
        let place = file.metadata().map_or(0, |found| {
            (found.ino() ^ found.dev().rotate_left(32)).rotate_left(8)
        });
        let place = (place & !TIMES).max(TIMES + 1);
        PartialLine { mark, place }
    }

    /// Records whether an earlier server has left an incomplete line.
    pub(super) fn look(&self, file: &File) {
        let last = || {
            // Use the type of the descriptor: opening a FIFO could block, and another file may be at the
            // path by now. The descriptor itself is write-only.
            let found = file.metadata().ok().filter(|found| found.is_file())?;
            let file = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
            let mut byte = [0];
            file.read_exact_at(&mut byte, found.len().checked_sub(1)?)
                .ok()?;
            Some(byte[0])
        };
        if last().is_some_and(|byte| byte != b'\n') {
            self.set();
        }
    }

    pub(super) fn set(&self) {
        let times = self.mark.load(Ordering::Relaxed).wrapping_add(1) & TIMES;
        self.mark.store(self.place | times, Ordering::Relaxed);
    }

    /// Returns the mark if the end is incomplete. The caller ends the line if it can.
    pub(super) fn get(&self) -> Option<u64> {
        let mark = self.mark.load(Ordering::Relaxed);
        (mark & !TIMES == self.place).then_some(mark)
    }

    /// Records that the line of this `mark` was ended. Another mark may have been set since.
    pub(super) fn clear(&self, mark: u64) {
        let order = Ordering::Relaxed;
        let _ = self.mark.compare_exchange(mark, 0, order, order);
    }
}
