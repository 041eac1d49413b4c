//! Reads which call each of some processes belongs to, on a thread that may block.
//!
//! The owner of a process can make the read of its environment block for as long as it likes
//! (`sys::bounded`). A caller waits for a sweep, so a sweep must not wait for such a read. A thread reads,
//! and the sweep waits for [`PATIENCE`] at most. Then that process counts as one without a mark, and
//! another thread reads the others. When the read ends after all, what ended calls have left is looked
//! for once more. At most [`MOST_STUCK`] threads wait in such reads; while they do, no mark is read, and
//! what commands leave ends with the worker.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::sys::process::{Pid, monotonic};
use crate::throttle::limiter::SharedLimiter;

/// For what calls of commands can log again and again, such as a program that is gone.
pub(super) static TROUBLE: SharedLimiter = SharedLimiter::new();

/// How long all reads of one thread may take.
const PATIENCE: Duration = Duration::from_secs(1);
/// Threads that may be stuck in a read.
const MOST_STUCK: usize = 4;
/// The stack of a thread that only reads.
const STACK: usize = 256 * 1024;

/// Which worker a process belongs to, and which of its calls.
pub type Mark = (Pid, u64);

#[derive(Debug)]
pub(super) struct Reader {
    /// Processes that a thread is stuck at, and nobody waits for any more.
    stuck: Mutex<BTreeSet<Pid>>,
    patience: Duration,
}

impl Reader {
    pub const fn new() -> Self {
        Reader {
            stuck: Mutex::new(BTreeSet::new()),
            patience: PATIENCE,
        }
    }

    /// Returns the marks of those of `pids` that have one and could be read in time. `read` reads one
    /// mark; `after` is called on the reader's thread when a read has ended that was given up.
    pub fn marks(
        &'static self,
        pids: &[Pid],
        read: fn(Pid) -> Option<Mark>,
        after: fn(),
    ) -> BTreeMap<Pid, Mark> {
        let mut marks = BTreeMap::new();
        let mut left = pids.to_vec();
        loop {
            {
                let stuck = self.stuck();
                left.retain(|pid| !stuck.contains(pid));
                if left.is_empty() || stuck.len() >= MOST_STUCK {
                    return marks;
                }
            }
            if let Err(error) = self.read_in_time(&mut left, &mut marks, read, after) {
                let text = format!(
                    "no thread could be started to look for what commands have left: {error}; the next \
                     call's end looks again"
                );
                TROUBLE.log(log::Level::Warn, text);
                return marks;
            }
        }
    }

    /// Reads the marks of `left` with one thread, until all are read or one is late. Takes out of
    /// `left` what was read.
    fn read_in_time(
        &'static self,
        left: &mut Vec<Pid>,
        marks: &mut BTreeMap<Pid, Mark>,
        read: fn(Pid) -> Option<Mark>,
        after: fn(),
    ) -> io::Result<()> {
        let (tell, told) = channel();
        let pids = left.clone();
        let builder = thread::Builder::new().name("sweep".into());
        builder.stack_size(STACK).spawn(move || {
            for pid in pids {
                let mark = read(pid);
                // Under the lock: either the sweep gets this, or the process is not stuck any more.
                let mut stuck = self.stuck();
                if tell.send((pid, mark)).is_err() {
                    stuck.remove(&pid);
                    drop(stuck);
                    return after();
                }
            }
        })?;
        let end = monotonic().saturating_add(self.patience);
        while !left.is_empty() {
            let answer = match told.recv_timeout(end.saturating_sub(monotonic())) {
                Ok(answer) => answer,
                // It has panicked: what it was at is left out.
                Err(RecvTimeoutError::Disconnected) => {
                    left.clear();
                    return Ok(());
                }
                Err(RecvTimeoutError::Timeout) => {
                    let mut stuck = self.stuck();
                    match told.try_recv() {
                        Ok(answer) => answer,
                        Err(_) => {
                            let pid = left[0];
                            let text = format!(
                                "the environment of process {pid}, which a command has left, could not be \
                                 read within {:?}: it is left alone until it can be read, or the worker \
                                 leaves pid={pid}",
                                self.patience
                            );
                            TROUBLE.log(log::Level::Warn, text);
                            stuck.insert(pid);
                            // Before the lock is let go, so that the thread finds nobody there.
                            drop(told);
                            return Ok(());
                        }
                    }
                }
            };
            let (pid, mark) = answer;
            left.retain(|&other| other != pid);
            marks.extend(mark.map(|mark| (pid, mark)));
        }
        Ok(())
    }

    fn stuck(&self) -> MutexGuard<'_, BTreeSet<Pid>> {
        self.stuck.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Condvar, Mutex};

    /// Whether reads of processes from 100 on may end.
    static OPEN: (Mutex<bool>, Condvar) = (Mutex::new(false), Condvar::new());
    static SWEPT: AtomicUsize = AtomicUsize::new(0);

    fn read(pid: Pid) -> Option<Mark> {
        if pid.0 >= 100 {
            let open = OPEN.0.lock().unwrap();
            drop(OPEN.1.wait_while(open, |open| !*open).unwrap());
        }
        (pid.0 % 2 == 0).then_some((Pid(1), pid.0.unsigned_abs().into()))
    }

    fn after() {
        SWEPT.fetch_add(1, Ordering::Relaxed);
    }

    #[test]
    fn a_read_that_blocks_holds_up_neither_the_sweep_nor_the_other_reads() {
        static READER: Reader = Reader {
            stuck: Mutex::new(BTreeSet::new()),
            patience: Duration::from_millis(100),
        };
        let found = |pids: &[i32]| {
            let pids: Vec<Pid> = pids.iter().copied().map(Pid).collect();
            let marks = READER.marks(&pids, read, after);
            marks.into_keys().map(|pid| pid.0).collect::<Vec<_>>()
        };
        assert_eq!(found(&[1, 2, 3, 4]), [2, 4]);
        let began = monotonic();
        assert_eq!(found(&[2, 100, 4, 102, 6]), [2, 4, 6]);
        assert!(monotonic().saturating_sub(began) >= Duration::from_millis(200));
        // those that are stuck are not asked about again
        assert_eq!(found(&[100, 102, 8]), [8]);
        assert_eq!(READER.stuck().len(), 2);
        assert_eq!(found(&[104, 106, 108, 10]), Vec::<i32>::new(), "too many");
        assert_eq!(READER.stuck().len(), MOST_STUCK);
        *OPEN.0.lock().unwrap() = true;
        OPEN.1.notify_all();
        let end = monotonic() + Duration::from_secs(20);
        while SWEPT.load(Ordering::Relaxed) < MOST_STUCK {
            assert!(monotonic() < end, "{:?}", READER.stuck());
            thread::yield_now();
        }
        assert!(READER.stuck().is_empty());
        assert_eq!(found(&[100, 102, 108]), [100, 102, 108]);
    }
}
