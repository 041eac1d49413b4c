//! Finds the calls to which processes belong, on a thread that may block.
//!
//! A call's mark is in the environment of its processes. The owner of a process can block the read of its
//! environment for as long as it wants (`sys::bounded`). A caller waits for a sweep, so the sweep must
//! not wait long for such a read. A thread reads, and the sweep waits at most [`PATIENCE`] for it. If a
//! read is late, its process counts as unmarked, and another thread reads the others. When the late read
//! ends, a new sweep looks for leftovers of ended calls. At most [`MOST_STUCK`] threads are in such reads.
//! While there are that many, no mark is read, and all processes count as unmarked (see `sweep`).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use crate::sys::lock::lock;
use crate::sys::process::{Pid, monotonic};
use crate::throttle::limiter::SharedLimiter;

/// Limits warnings that calls of commands can cause repeatedly, such as a missing program.
pub(super) static TROUBLE: SharedLimiter = SharedLimiter::new();

/// The time limit for all reads of one thread.
const PATIENCE: Duration = Duration::from_secs(1);
/// The largest number of threads that may be stuck in a read.
const MOST_STUCK: usize = 4;
/// The stack size of a thread that only reads.
const STACK: usize = 256 * 1024;

/// The worker to which a process belongs, and the call.
pub type Mark = (Pid, u64);

#[derive(Debug)]
pub(super) struct Reader {
    /// The processes at which a thread is stuck, and whose result is not awaited any more.
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

    /// Returns the marks of those `pids` that have one and could be read in time. `read` reads one mark.
    /// `after` is called on the reader thread when a late read has ended.
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
                    "could not start a thread to look for leftovers of commands: {error}; it is tried again \
                     when the next call ends"
                );
                TROUBLE.log(log::Level::Warn, text);
                return marks;
            }
        }
    }

    /// Reads the marks of `left` on one thread, until all are read or one is late. Removes from `left`
    /// what was read.
    fn read_in_time(
        &'static self,
        left: &mut Vec<Pid>,
        marks: &mut BTreeMap<Pid, Mark>,
        read: fn(Pid) -> Option<Mark>,
        after: fn(),
    ) -> io::Result<()> {
        let (sender, receiver) = channel();
        let pids = left.clone();
        let builder = thread::Builder::new().name("sweep".into());
        builder.stack_size(STACK).spawn(move || {
            for pid in pids {
                let mark = read(pid);
                // Hold the lock while sending: either the sweep gets the mark, or the process is no
                // longer stuck.
                let mut stuck = self.stuck();
                if sender.send((pid, mark)).is_err() {
                    stuck.remove(&pid);
                    drop(stuck);
                    return after();
                }
            }
        })?;
        let end = monotonic().saturating_add(self.patience);
        while !left.is_empty() {
            let answer = match receiver.recv_timeout(end.saturating_sub(monotonic())) {
                Ok(answer) => answer,
                // The thread has panicked, so the remaining processes are skipped.
                Err(RecvTimeoutError::Disconnected) => {
                    left.clear();
                    return Ok(());
                }
                Err(RecvTimeoutError::Timeout) => {
                    let mut stuck = self.stuck();
                    match receiver.try_recv() {
                        Ok(answer) => answer,
                        Err(_) => {
                            let pid = left[0];
                            let text = format!(
                                "could not read the environment of process {pid}, which a command may have left \
                                 behind, within {:?}: it is killed when all commands that may have started it \
                                 have ended pid={pid}",
                                self.patience
                            );
                            TROUBLE.log(log::Level::Warn, text);
                            stuck.insert(pid);
                            // Drop the receiver before the lock, so that the send of the thread fails.
                            drop(receiver);
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
        lock(&self.stuck)
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
    fn a_blocking_read_delays_neither_the_sweep_nor_other_reads() {
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
        // Processes whose read is stuck are not read again.
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
