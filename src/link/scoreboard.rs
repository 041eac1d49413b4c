//! Holds the scoreboard: shared memory in which each worker records its state.
//!
//! The worker writes its record, after its death its keeper, and the master a few fields. The master reads it without
//! asking, so the last state of a stuck or dead worker remains visible. Each value is a separate atomic, so a reader
//! may see one value that is newer than another, but nothing worse.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::sync::atomic::{
    AtomicI32, AtomicU32, AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release,
    Ordering::SeqCst,
};

use super::ids::Generation;
use crate::protocol::call_id::CallId;
use crate::sys::process::Pid;
use crate::sys::shared_memory;
use crate::sys::shared_memory::{load_u128, shared_record, store_u128};

/// The largest number of processes at once, including those of draining generations.
pub const RECORDS: usize = 4096;
const LENGTH: NonZeroUsize = NonZeroUsize::new(RECORDS).expect("there are some");

/// The number of counters of waiting calls: one per lane, and the last one for all further lanes.
pub const LANES: usize = 16;

/// The lane that the jobs process shows.
pub const JOBS_LANE: u32 = u32::MAX;

/// The bytes from one record to the next. It is fixed, because workers of one version and a master of the
/// next share the memory. A field may be added at the end; none may be moved or removed.
pub const STRIDE: usize = 256;
const _: () = assert!(
    size_of::<WorkerRecord>() == STRIDE,
    "a record outgrew its place"
);

shared_record! {
    /// The record of one worker. All zero: nothing is recorded.
    #[derive(Debug)]
    #[repr(align(256))]
    pub struct WorkerRecord {
        /// The time of the last turn of its event loop in milliseconds (CLOCK_MONOTONIC). An idle loop
        /// turns too.
        pub heartbeat_ms: AtomicU64,
        pub connections: AtomicU32,
        /// Calls that run on handler threads.
        pub running: AtomicU32,
        /// Calls of its connections that wait.
        pub queued: AtomicU32,
        /// Handler threads that run past the deadline of their call.
        pub lost_threads: AtomicU32,
        /// Calls read since its start.
        pub calls: AtomicU64,
        /// Calls answered with an error since its start.
        pub errors: AtomicU64,
        /// The index of the method that the event loop ran last, plus one.
        pub last_method: AtomicU32,
        /// Calls of that method that run on the loop now: 0 or 1.
        pub inline_running: AtomicU32,
        /// The method index plus one of the oldest call on a thread; 0 if there is none.
        pub oldest_method: AtomicU32,
        /// Wake-ups for a connection that a sibling had already accepted.
        pub spurious_wakes: AtomicU32,
        /// The time at which the oldest call was read, in milliseconds (CLOCK_MONOTONIC).
        pub oldest_since_ms: AtomicU64,
        /// The pid of its keeper; 0 if it has none.
        pub keeper: AtomicI32,
        /// Connections that the keeper handed over.
        pub kept: AtomicU32,
        /// Calls that the keeper answered with `crashed`.
        pub crashed: AtomicU32,
        /// Connections that were reset, or that ended with an orderly exit of the worker.
        pub reset: AtomicU32,
        /// How long the first bytes of the last new connection waited, in milliseconds.
        pub last_wait_ms: AtomicU32,
        pub longest_wait_ms: AtomicU32,
        /// Programs of its pool that do not serve.
        pub programs_down: AtomicU32,
        /// Lost log lines that the log does not report yet.
        pub lost_lines: AtomicU32,
        /// Its generation plus one while it takes part in forwarding; otherwise 0.
        pub generation: AtomicU32,
        /// Incremented after each write of the next two fields.
        pub capacity_epoch: AtomicU32,
        /// The lane whose calls it runs; [`JOBS_LANE`] in the record of a jobs process.
        pub lane: AtomicU32,
        /// The number of calls of that lane that it could begin now.
        pub idle: AtomicU32,
        /// Its waiting calls that another process could run, by lane. The last number is for all further
        /// lanes together.
        pub waiting: [AtomicU32; LANES],
        /// Calls of its connections that run in other processes.
        pub sent: AtomicU32,
        /// Calls of other workers that it runs.
        pub running_for_others: AtomicU32,
        /// Calls that it has sent to other processes since its start.
        pub forwarded: AtomicU64,
        /// Whether the master accepts requests of this worker; see [`WorkerRecord::request`].
        requests: AtomicU32,
        /// The pid of the pool process that writes this record. A master needs it if the master before the upgrade did
        /// not know pool processes.
        pub pool_pid: AtomicI32,
        /// When a program of the pool was ready last, in milliseconds (CLOCK_MONOTONIC); 0 in a record of another
        /// process, and in that of an older version.
        pub pool_ready_ms: AtomicU64,
        /// The number of the call of `last_method`.
        pub last_call: AtomicU64,
        /// The number of the call of `oldest_method`, in the process that has its connection.
        pub oldest_call: AtomicU64,
        /// The pid of that process; 0: this one.
        pub oldest_home: AtomicI32,
        /// Not about this process. Record N has the generation that serves the isolated listener with range N; 0: none.
        /// It is here because sessions cannot write to the scoreboard.
        serving: AtomicU32,
        /// 1 while it leaves accepting to the other workers for a short time.
        pub has_yielded: AtomicU32,
        /// For a jobs process: whether it opens its store or has it open, and which one.
        pub store: AtomicU32,
        /// The id of the job if `oldest_method` is an attempt, in two halves; otherwise 0.
        oldest_job: [AtomicU64; 2],
    }
}

/// The offset of each field, because another version reads and writes the same memory.
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
    assert!(offset_of!(WorkerRecord, pool_ready_ms) == 200);
    assert!(offset_of!(WorkerRecord, last_call) == 208);
    assert!(offset_of!(WorkerRecord, oldest_call) == 216);
    assert!(offset_of!(WorkerRecord, oldest_home) == 224);
    assert!(offset_of!(WorkerRecord, serving) == 228);
    assert!(offset_of!(WorkerRecord, has_yielded) == 232);
    assert!(offset_of!(WorkerRecord, store) == 236);
    assert!(offset_of!(WorkerRecord, oldest_job) == 240);
};

/// For the master: sets the generation that serves the isolated listener with this range; `None` if the listener is
/// not isolated in it. `range` is below `session_table::RANGES`.
pub fn set_serving(records: &[WorkerRecord], range: usize, generation: Option<Generation>) {
    let number = generation.map_or(0, |generation| generation.0);
    records[range].serving.store(number, Release);
}

/// Returns the generation that serves; `None` if the listener is not isolated in it.
pub fn serving(records: &[WorkerRecord], range: usize) -> Option<Generation> {
    let number = (records.get(range)).map_or(0, |record| record.serving.load(Acquire));
    (number != 0).then_some(Generation(number))
}

/// The records of all workers. Only the master knows which record belongs to which worker.
#[derive(Debug)]
pub struct Scoreboard {
    records: &'static [WorkerRecord],
    /// The memory file of the records.
    file: OwnedFd,
}

impl Scoreboard {
    /// Creates a scoreboard with all records zero.
    ///
    /// # Errors
    /// If there is not enough memory.
    pub fn new() -> io::Result<Self> {
        let (records, file) = shared_memory::array(LENGTH)?;
        Ok(Scoreboard { records, file })
    }

    /// Maps the scoreboard in a file that another master has made.
    ///
    /// # Errors
    /// If there is not enough memory, or the file is not a scoreboard.
    pub fn of(file: OwnedFd) -> io::Result<Self> {
        let records = shared_memory::array_in(&file, LENGTH)?;
        Ok(Scoreboard { records, file })
    }

    pub fn file(&self) -> &OwnedFd {
        &self.file
    }

    pub fn records(&self) -> &'static [WorkerRecord] {
        self.records
    }

    /// Returns one record.
    ///
    /// # Panics
    /// If `index` is not below `RECORDS`.
    pub fn record(&self, index: usize) -> &'static WorkerRecord {
        &self.records[index]
    }
}

/// A call that a death record names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordedCall {
    /// The index of its method.
    pub method: usize,
    pub call: Option<CallId>,
    /// The id of the job if it is an attempt; otherwise 0.
    pub job: u128,
}

/// An event loop that has not run for this long counts as stopped or stuck, in milliseconds. An idle one runs once per
/// second.
const STALE_MS: u64 = 2_000;

/// The states of `WorkerRecord::requests`.
const REFUSED: u32 = 0;
const ALLOWED: u32 = 1;
const SENDING: u32 = 2;

impl WorkerRecord {
    /// Returns whether the event loop has run recently. `now_ms` is the time of CLOCK_MONOTONIC.
    pub fn is_fresh(&self, now_ms: u64) -> bool {
        now_ms.saturating_sub(self.heartbeat_ms.load(Relaxed)) < STALE_MS
    }

    /// Sends a report that a master of an older version would not understand, unless the master has
    /// forbidden it. The master cannot be replaced by another version between the check and the send. Returns what
    /// `send` returns, and `None` if the master has forbidden it.
    pub fn request<T>(&self, send: impl FnOnce() -> T) -> Option<T> {
        let state = &self.requests;
        let allowed = state.compare_exchange(ALLOWED, SENDING, SeqCst, Relaxed);
        allowed.ok()?;
        let sent = send();
        // The exchange fails if the master has forbidden requests meanwhile.
        let _ = state.compare_exchange(SENDING, ALLOWED, SeqCst, Relaxed);
        Some(sent)
    }

    /// For the master: accepts requests.
    pub fn allow_requests(&self) {
        self.requests.store(ALLOWED, SeqCst);
    }

    /// For the master: accepts no more requests. Returns false while one is being sent; then try again.
    pub fn forbid_requests(&self) -> bool {
        let state = &self.requests;
        let before = state.compare_exchange(ALLOWED, REFUSED, SeqCst, SeqCst);
        before != Err(SENDING)
    }

    /// For the master: forbids requests even if one seems to be in progress, because the worker is
    /// stopped.
    pub fn cut_off_requests(&self) {
        self.requests.store(REFUSED, SeqCst);
    }

    /// Sets all fields to zero for the next worker.
    pub fn clear(&self) {
        for number in [
            &self.lane,
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
            &self.has_yielded,
        ] {
            number.store(0, Relaxed);
        }
        self.set_oldest_job(0);
        self.clear_capacity();
        self.cut_off_requests();
        self.keeper.store(0, Relaxed);
        self.pool_pid.store(0, Relaxed);
        self.oldest_home.store(0, Relaxed);
        for number in [
            &self.heartbeat_ms,
            &self.calls,
            &self.errors,
            &self.oldest_since_ms,
            &self.forwarded,
            &self.pool_ready_ms,
            &self.last_call,
            &self.oldest_call,
        ] {
            number.store(0, Relaxed);
        }
    }

    /// Removes the worker from forwarding: it has no capacity, no waiting calls and no store.
    pub fn clear_capacity(&self) {
        self.store.store(0, SeqCst);
        self.generation.store(0, Relaxed);
        self.idle.store(0, Relaxed);
        for number in &self.waiting {
            number.store(0, Relaxed);
        }
    }

    /// Returns the method index of the oldest running call and when it was read, if a call runs.
    pub fn oldest(&self) -> Option<(usize, u64)> {
        let method = self.oldest_method.load(Relaxed).checked_sub(1)?;
        Some((method as usize, self.oldest_since_ms.load(Relaxed)))
    }

    /// Returns the index of the method that runs on the loop now, if there is one.
    pub fn inline_method(&self) -> Option<usize> {
        let is_running = self.inline_running.load(Relaxed) > 0;
        let method = self.last_method.load(Relaxed).checked_sub(1);
        method.filter(|_| is_running).map(|method| method as usize)
    }

    /// Sets the job of the oldest call; 0 if it is no attempt.
    pub fn set_oldest_job(&self, job: u128) {
        store_u128(&self.oldest_job, job);
    }

    /// Returns the method and the call that a death record names, if the process `own` of this record has died. It is
    /// the call on the event loop, otherwise the oldest call on a thread, otherwise the last call that the loop ran.
    pub fn last_call(&self, own: Pid) -> Option<RecordedCall> {
        if let (0, Some((method, _))) = (self.inline_running.load(Relaxed), self.oldest()) {
            let home = match self.oldest_home.load(Relaxed) {
                0 => own.0,
                home => home,
            };
            let call = CallId::recorded(home, self.oldest_call.load(Relaxed));
            let job = load_u128(&self.oldest_job);
            return Some(RecordedCall { method, call, job });
        }
        let method = self.last_method.load(Relaxed).checked_sub(1)?;
        let call = CallId::recorded(own.0, self.last_call.load(Relaxed));
        let method = method as usize;
        Some(RecordedCall {
            method,
            call,
            job: 0,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_record_names_the_method_of_a_death() {
        let board = Scoreboard::new().unwrap();
        let record = board.record(RECORDS - 1);
        let call = |pid, number| Some(CallId { pid, number });
        let recorded = || record.last_call(Pid(9));
        let last = || recorded().map(|it| (it.method, it.call));
        assert_eq!(last(), None);
        record.last_method.store(3, Relaxed);
        assert_eq!(last(), Some((2, None)), "a worker of an older version");
        record.last_call.store(11, Relaxed);
        assert_eq!(last(), Some((2, call(9, 11))));
        record.oldest_method.store(5, Relaxed);
        record.oldest_since_ms.store(77, Relaxed);
        record.oldest_call.store(12, Relaxed);
        assert_eq!(last(), Some((4, call(9, 12))));
        record.oldest_home.store(8, Relaxed);
        assert_eq!(last(), Some((4, call(8, 12))));
        record.set_oldest_job(5 << 64 | 6);
        assert_eq!(recorded().unwrap().job, 5 << 64 | 6);
        record.inline_running.store(1, Relaxed);
        assert_eq!(last(), Some((2, call(9, 11))));
        assert_eq!(record.oldest(), Some((4, 77)));
        record.clear();
        assert_eq!((last(), record.oldest()), (None, None));
        record.oldest_method.store(1, Relaxed);
        assert_eq!(last(), Some((0, None)));
        assert_eq!(recorded().unwrap().job, 0);
    }

    #[test]
    fn the_generation_that_serves_stays_when_the_record_gets_another_process() {
        let board = Scoreboard::new().unwrap();
        assert_eq!(serving(board.records(), 3), None);
        set_serving(board.records(), 3, Some(Generation(2)));
        board.record(3).clear();
        assert_eq!(serving(board.records(), 3), Some(Generation(2)));
        assert_eq!(serving(board.records(), 4), None);
        set_serving(board.records(), 3, None);
        assert_eq!(serving(board.records(), 3), None);
    }

    #[test]
    fn a_request_is_sent_only_while_the_master_takes_requests() {
        let board = Scoreboard::new().unwrap();
        let record = board.record(0);
        let sent = std::cell::Cell::new(0);
        let send = || sent.set(sent.get() + 1);
        assert!(record.request(send).is_none());
        assert_eq!(sent.get(), 0, "a master that says nothing is an older one");
        record.allow_requests();
        assert_eq!(record.request(|| "sent"), Some("sent"));
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
