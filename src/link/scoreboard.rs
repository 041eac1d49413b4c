//! The scoreboard: shared memory in which each worker says what it is doing.
//!
//! One record a worker, written by it alone and read by the master without asking: a worker that
//! hangs or has died still shows what it did last. Values are atomics of their own, so a reader
//! may see one newer than its neighbour, and nothing worse.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};

use crate::sys::shared_memory;
use crate::sys::shared_memory::shared_record;

/// Workers that can be alive at once, those of generations that drain included.
pub const RECORDS: usize = 4096;
const LENGTH: NonZeroUsize = NonZeroUsize::new(RECORDS).expect("there are some");

/// Numbers of waiting calls that a worker shows: one for each lane, the last for all further ones.
pub const LANES: usize = 16;

/// Bytes from one record to the next. Fixed, so that workers of one version and a master of the
/// next mean the same by it: a field may be added at the end, none moved or taken away.
pub const STRIDE: usize = 256;
const _: () = assert!(
    size_of::<WorkerRecord>() == STRIDE,
    "a record outgrew its place"
);

shared_record! {
    /// What one worker shows. All zero: nothing yet.
    #[derive(Debug)]
    #[repr(align(256))]
    pub struct WorkerRecord {
        /// Milliseconds (CLOCK_MONOTONIC) at which its event loop last turned; ticks when idle too.
        pub heartbeat_ms: AtomicU64,
        pub connections: AtomicU32,
        /// Calls that run on a handler thread.
        pub running: AtomicU32,
        /// Calls that wait for one.
        pub queued: AtomicU32,
        /// Handler threads that run past their call's deadline.
        pub lost_threads: AtomicU32,
        /// Calls read since it started.
        pub calls: AtomicU64,
        /// Of those, the ones answered with an error.
        pub errors: AtomicU64,
        /// The method that the event loop called last, plus one.
        pub last_method: AtomicU32,
        /// Calls of it that are on the loop right now: 0 or 1.
        pub inline_running: AtomicU32,
        /// The oldest call that runs on a thread: its method plus one, 0 if there is none.
        pub oldest_method: AtomicU32,
        /// Times that it was woken for a connection that a sibling had taken.
        pub spurious_wakes: AtomicU32,
        /// When the oldest call was read, in milliseconds (CLOCK_MONOTONIC).
        pub oldest_since_ms: AtomicU64,
        /// The process that keeps its connections should it die; 0: none.
        pub keeper: AtomicI32,
        /// Connections that were passed on after its death.
        pub kept: AtomicU32,
        /// Calls that were answered with `crashed` for it.
        pub crashed: AtomicU32,
        /// Connections that could not be passed on, or that ended with a worker which left in order.
        pub reset: AtomicU32,
        /// For how long the first bytes of the last new connection had waited, in milliseconds.
        pub last_wait_ms: AtomicU32,
        pub longest_wait_ms: AtomicU32,
        /// Programs of its pools that do not serve.
        pub programs_down: AtomicU32,
        /// Log lines that it could not write, and could not tell of yet.
        pub lost_lines: AtomicU32,
        /// Its generation plus one while it takes part in forwarding; 0: it does not.
        pub generation: AtomicU32,
        /// Counts up whenever one of the two following has been written.
        pub capacity_epoch: AtomicU32,
        /// The lane whose calls it runs.
        pub lane: AtomicU32,
        /// How many calls of that lane it could begin now.
        pub idle: AtomicU32,
        /// By lane, how many of its calls wait that another process could run. The last number is that
        /// of all further lanes together.
        pub waiting: [AtomicU32; LANES],
        /// Calls of its connections that run in other processes.
        pub sent: AtomicU32,
        /// Calls of other workers that it runs.
        pub running_for_others: AtomicU32,
        /// Calls that it has sent to other processes since it started.
        pub forwarded: AtomicU64,
        /// Whether the master takes requests of this worker, see [`WorkerRecord::request`].
        requests: AtomicU32,
        /// The pool process that writes it, for a master after one that did not know of pool processes.
        pub pool_pid: AtomicI32,
    }
}

/// Where each field lies: another version reads and writes the same memory.
const _: () = {
    use std::mem::offset_of;
    assert!(RECORDS == 4096 && STRIDE == 256);
    assert!(offset_of!(WorkerRecord, heartbeat_ms) == 0);
    assert!(offset_of!(WorkerRecord, connections) == 8);
    assert!(offset_of!(WorkerRecord, running) == 12);
    assert!(offset_of!(WorkerRecord, queued) == 16);
    assert!(offset_of!(WorkerRecord, lost_threads) == 20);
    assert!(offset_of!(WorkerRecord, calls) == 24);
    assert!(offset_of!(WorkerRecord, errors) == 32);
    assert!(offset_of!(WorkerRecord, last_method) == 40);
    assert!(offset_of!(WorkerRecord, inline_running) == 44);
    assert!(offset_of!(WorkerRecord, oldest_method) == 48);
    assert!(offset_of!(WorkerRecord, spurious_wakes) == 52);
    assert!(offset_of!(WorkerRecord, oldest_since_ms) == 56);
    assert!(offset_of!(WorkerRecord, keeper) == 64);
    assert!(offset_of!(WorkerRecord, kept) == 68);
    assert!(offset_of!(WorkerRecord, crashed) == 72);
    assert!(offset_of!(WorkerRecord, reset) == 76);
    assert!(offset_of!(WorkerRecord, last_wait_ms) == 80);
    assert!(offset_of!(WorkerRecord, longest_wait_ms) == 84);
    assert!(offset_of!(WorkerRecord, programs_down) == 88);
    assert!(offset_of!(WorkerRecord, lost_lines) == 92);
    assert!(offset_of!(WorkerRecord, generation) == 96);
    assert!(offset_of!(WorkerRecord, capacity_epoch) == 100);
    assert!(offset_of!(WorkerRecord, lane) == 104);
    assert!(offset_of!(WorkerRecord, idle) == 108);
    assert!(offset_of!(WorkerRecord, waiting) == 112);
    assert!(offset_of!(WorkerRecord, sent) == 176);
    assert!(offset_of!(WorkerRecord, running_for_others) == 180);
    assert!(offset_of!(WorkerRecord, forwarded) == 184);
    assert!(offset_of!(WorkerRecord, requests) == 192);
    assert!(offset_of!(WorkerRecord, pool_pid) == 196);
};

/// The records of all workers; which is whose is the master's knowledge.
#[derive(Debug)]
pub struct Scoreboard {
    records: &'static [WorkerRecord],
    /// What they lie in.
    file: OwnedFd,
}

impl Scoreboard {
    /// A scoreboard with every record zero.
    ///
    /// # Errors
    /// When there is no memory to be had.
    pub fn new() -> io::Result<Self> {
        let (records, file) = shared_memory::array(LENGTH)?;
        Ok(Scoreboard { records, file })
    }

    /// The scoreboard in a file that another master has made.
    ///
    /// # Errors
    /// When there is no memory to be had, or the file is none.
    pub fn of(file: OwnedFd) -> io::Result<Self> {
        let records = shared_memory::array_in(&file, LENGTH)?;
        Ok(Scoreboard { records, file })
    }

    pub fn file(&self) -> &OwnedFd {
        &self.file
    }

    /// All records.
    pub fn records(&self) -> &'static [WorkerRecord] {
        self.records
    }

    /// One record.
    ///
    /// # Panics
    /// When `index` is not below `RECORDS`.
    pub fn record(&self, index: usize) -> &'static WorkerRecord {
        &self.records[index]
    }
}

/// States of `WorkerRecord::requests`.
const REFUSED: u32 = 0;
const ALLOWED: u32 = 1;
const SENDING: u32 = 2;

impl WorkerRecord {
    /// Sends a report that a master of an older version would not understand, unless the master has
    /// forbidden it. Between the question and the sending the master does not become another program.
    pub fn request(&self, send: impl FnOnce()) {
        let state = &self.requests;
        if state
            .compare_exchange(ALLOWED, SENDING, SeqCst, Relaxed)
            .is_ok()
        {
            send();
            // Unless the master did not want to wait any longer.
            let _ = state.compare_exchange(SENDING, ALLOWED, SeqCst, Relaxed);
        }
    }

    /// For the master: it takes requests.
    pub fn allow_requests(&self) {
        self.requests.store(ALLOWED, SeqCst);
    }

    /// For the master: it takes no more requests. Returns false while one is being sent: ask again.
    pub fn forbid_requests(&self) -> bool {
        let state = &self.requests;
        let before = state.compare_exchange(ALLOWED, REFUSED, SeqCst, SeqCst);
        before != Err(SENDING)
    }

    /// For the master: forbids them although one seems to be sent, for the worker is stopped.
    pub fn cut_off_requests(&self) {
        self.requests.store(REFUSED, SeqCst);
    }

    /// Makes it zero again, for the next worker.
    pub fn clear(&self) {
        for number in [
            &self.connections,
            &self.running,
            &self.queued,
            &self.lost_threads,
            &self.last_method,
            &self.inline_running,
            &self.oldest_method,
            &self.spurious_wakes,
            &self.kept,
            &self.crashed,
            &self.reset,
            &self.last_wait_ms,
            &self.longest_wait_ms,
            &self.programs_down,
            &self.lost_lines,
            &self.sent,
            &self.running_for_others,
        ] {
            number.store(0, Relaxed);
        }
        self.clear_capacity();
        self.cut_off_requests();
        self.keeper.store(0, Relaxed);
        self.pool_pid.store(0, Relaxed);
        for number in [
            &self.heartbeat_ms,
            &self.calls,
            &self.errors,
            &self.oldest_since_ms,
            &self.forwarded,
        ] {
            number.store(0, Relaxed);
        }
    }

    /// Takes it out of forwarding: it has no capacity, and nothing of it waits.
    pub fn clear_capacity(&self) {
        self.generation.store(0, Relaxed);
        self.idle.store(0, Relaxed);
        for number in &self.waiting {
            number.store(0, Relaxed);
        }
    }

    /// The number of the oldest running method and since when, if one runs.
    pub fn oldest(&self) -> Option<(usize, u64)> {
        let method = self.oldest_method.load(Relaxed).checked_sub(1)?;
        Some((method as usize, self.oldest_since_ms.load(Relaxed)))
    }

    /// The number of the method that is on the loop right now, if one is.
    pub fn inline_method(&self) -> Option<usize> {
        let is_running = self.inline_running.load(Relaxed) > 0;
        let method = self.last_method.load(Relaxed).checked_sub(1);
        method.filter(|_| is_running).map(|method| method as usize)
    }

    /// The method to name when this worker has died: the one on the loop, else the oldest on a
    /// thread, else the last that the loop called.
    pub fn last_method(&self) -> Option<usize> {
        let on_loop = self.last_method.load(Relaxed);
        let method = match (self.inline_running.load(Relaxed), self.oldest()) {
            (0, Some((method, _))) => return Some(method),
            _ => on_loop,
        };
        method.checked_sub(1).map(|method| method as usize)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_record_names_the_method_to_blame() {
        let board = Scoreboard::new().unwrap();
        let record = board.record(RECORDS - 1);
        assert_eq!(record.last_method(), None);
        record.last_method.store(3, Relaxed);
        assert_eq!(record.last_method(), Some(2));
        record.oldest_method.store(5, Relaxed);
        record.oldest_since_ms.store(77, Relaxed);
        assert_eq!(record.last_method(), Some(4));
        record.inline_running.store(1, Relaxed);
        assert_eq!(record.last_method(), Some(2));
        assert_eq!(record.oldest(), Some((4, 77)));
        record.clear();
        assert_eq!((record.last_method(), record.oldest()), (None, None));
    }

    #[test]
    fn a_request_is_sent_only_while_the_master_takes_requests() {
        let board = Scoreboard::new().unwrap();
        let record = board.record(0);
        let sent = std::cell::Cell::new(0);
        let send = || sent.set(sent.get() + 1);
        record.request(send);
        assert_eq!(sent.get(), 0, "a master that says nothing is an older one");
        record.allow_requests();
        record.request(|| {
            send();
            assert!(!record.forbid_requests(), "it is not done yet");
        });
        assert!(record.forbid_requests());
        record.request(send);
        assert_eq!(sent.get(), 1);
        record.allow_requests();
        record.request(|| record.cut_off_requests());
        record.request(send);
        assert_eq!(
            sent.get(),
            1,
            "a worker that took too long does not undo it"
        );
    }
}
