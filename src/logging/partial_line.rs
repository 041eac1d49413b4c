//! Where the log ends within a line, known to every process that writes to it.
//!
//! A disk that fills up takes the beginning of a line. Whoever writes next, in whichever process, has
//! to end that line first, or two lines are one and neither can be read. One log is remembered, by
//! its identity: another one that is cut short takes its place.

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::sys::shared_memory;

/// In a mark, what is not the place: how often one was set.
const TIMES: u64 = 0xff;

/// The place whose end is torn, 0 for none. Shared with what is forked once the first output was
/// made; without memory for that, each process minds its own lines.
static TORN: LazyLock<&'static AtomicU64> = LazyLock::new(|| {
    static OWN: AtomicU64 = AtomicU64::new(0);
    shared_memory::array_without_file(NonZeroUsize::MIN).map_or(&OWN, |shared| &shared[0])
});

/// What is known of the end of one log.
#[derive(Debug, Clone, Copy)]
pub(super) struct PartialLine {
    mark: &'static AtomicU64,
    place: u64,
}

impl PartialLine {
    pub(super) fn of(file: &File) -> Self {
        PartialLine::by(&TORN, file)
    }

    pub(super) fn by(mark: &'static AtomicU64, file: &File) -> Self {
        // One that can't be looked at still has the lines of this process.
        let place = file.metadata().map_or(0, |found| {
            (found.ino() ^ found.dev().rotate_left(32)).rotate_left(8)
        });
        let place = (place & !TIMES).max(TIMES + 1);
        PartialLine { mark, place }
    }

    /// Notes what an earlier server has left at the end of a file.
    pub(super) fn look(&self, file: &File) {
        let last = || {
            // Looked at first: to open a fifo is to wait. By its descriptor, which is for writing alone:
            // another file may be at its path by now.
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

    /// The mark where the end is torn: the caller mends it, if it can.
    pub(super) fn get(&self) -> Option<u64> {
        let mark = self.mark.load(Ordering::Relaxed);
        (mark & !TIMES == self.place).then_some(mark)
    }

    /// What this mark was for is whole again; another one may have been set since.
    pub(super) fn clear(&self, mark: u64) {
        let order = Ordering::Relaxed;
        let _ = self.mark.compare_exchange(mark, 0, order, order);
    }
}
