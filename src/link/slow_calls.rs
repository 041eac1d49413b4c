//! Holds the slow log in shared memory: what counts as slow, and the last records of each process. Both lie on the
//! metrics board, so they stay after an upgrade, and commands read them without a request.
//!
//! The master writes the rules. A process writes its own ring; connection processes share that of their
//! acceptor. A record is added when its call becomes slow and completed when the call ends. Readers trust
//! nothing: lengths and numbers are bounded here, and what shows a text escapes it.

use std::sync::atomic::{
    AtomicI32, AtomicU32, AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release, fence,
};

use crate::protocol::call_id::CallId;
use crate::sys::shared_memory::{load_text, load_u128, shared_record, store_text, store_u128};

/// The number of records that a process keeps. It is also the largest number that is shown of a server.
pub const KEPT: usize = 128;
/// The largest number of bytes of params in a record.
pub const MOST_PARAMS: u64 = 4096;
/// The largest number of records per second and process.
pub const MOST_LINES: u64 = 10_000;
/// A threshold that no call passes.
pub const NEVER: u64 = u64::MAX;
/// The names of methods on the metrics board, and the place of all others.
const METHODS: usize = 257;
/// The room for texts, in words of eight bytes. A longer text is cut.
const METHOD_WORDS: usize = 16;
const OUTCOME_WORDS: usize = 4;
const EVIDENCE_WORDS: usize = 160;

shared_record! {
    /// The rules of the slow log. All zero: there is no slow log.
    #[derive(Debug)]
    pub struct SlowRules {
        /// How often the rules were written.
        changes: AtomicU64,
        /// The lowest threshold in nanoseconds; 0: no call is slow.
        lowest_ns: AtomicU64,
        /// Whether the configuration has `[slow-log]`.
        is_on: AtomicU64,
        params: AtomicU64,
        lines: AtomicU64,
        /// By the place of a method on the metrics board, in nanoseconds.
        thresholds_ns: [AtomicU64; METHODS],
    }
}

shared_record! {
    /// A slow call, as it lies in shared memory.
    #[derive(Debug)]
    pub struct SlowEntry {
        /// Which record of the ring it is, counted from 1; 0: none, or one that is being written.
        number: AtomicU64,
        /// When it became slow, in unix milliseconds.
        at_ms: AtomicU64,
        /// When its handler began, in nanoseconds (CLOCK_MONOTONIC).
        began_ns: AtomicU64,
        /// How long the handler ran; valid once it is done.
        run_ns: AtomicU64,
        /// The number of the call in the process that has its connection.
        call: AtomicU64,
        trace_id: [AtomicU64; 2],
        method: [AtomicU64; METHOD_WORDS],
        outcome: [AtomicU64; OUTCOME_WORDS],
        evidence: [AtomicU64; EVIDENCE_WORDS],
        method_length: AtomicU32,
        /// How the call ended; 0 while it runs.
        outcome_length: AtomicU32,
        evidence_length: AtomicU32,
        /// The pid of the process that has the connection.
        home: AtomicI32,
        /// The pid of the process that runs it.
        runner: AtomicI32,
        /// The thread about which the master must add facts, because only the master may read them; 0: the record is
        /// complete.
        asks_for: AtomicI32,
    }
}

shared_record! {
    /// The last slow calls of one process.
    #[derive(Debug)]
    pub struct SlowRing {
        /// How many there were.
        count: AtomicU64,
        entries: [SlowEntry; KEPT],
    }
}

/// What the master writes into the rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlowLimits {
    /// The bytes of params in a record, at most [`MOST_PARAMS`].
    pub params: u64,
    /// The records per second and process, at most [`MOST_LINES`].
    pub lines: u64,
    /// The threshold of methods without one of their own, in nanoseconds, or [`NEVER`].
    pub threshold_ns: u64,
    /// The thresholds of methods in nanoseconds, by the places of the methods.
    pub own_ns: Vec<(usize, u64)>,
}

/// A copy of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlowCall {
    pub call: CallId,
    /// 32 hexadecimal digits.
    pub trace_id: Option<String>,
    pub method: String,
    /// The pid of the process that runs it.
    pub runner: i32,
    /// When it became slow, in unix milliseconds.
    pub at_ms: u64,
    /// When its handler began, in nanoseconds (CLOCK_MONOTONIC).
    pub began_ns: u64,
    /// How it ended, and how long it ran in nanoseconds; `None` while it runs.
    pub end: Option<(String, u64)>,
    pub evidence: String,
}

impl SlowRules {
    /// Writes the rules; `None` switches the slow log off. Only the master calls it.
    pub fn write(&self, limits: Option<&SlowLimits>) {
        let threshold_ns = limits.map_or(NEVER, |limits| limits.threshold_ns);
        let own = limits.map_or(&[][..], |limits| &limits.own_ns);
        for cell in &self.thresholds_ns {
            cell.store(threshold_ns, Relaxed);
        }
        for (place, own_ns) in own {
            if let Some(cell) = self.thresholds_ns.get(*place) {
                cell.store(*own_ns, Relaxed);
            }
        }
        let lowest = own.iter().map(|(_, own_ns)| *own_ns).chain([threshold_ns]);
        let lowest = lowest.min().filter(|lowest| *lowest != NEVER);
        self.params
            .store(limits.map_or(0, |limits| limits.params), Relaxed);
        self.lines
            .store(limits.map_or(0, |limits| limits.lines), Relaxed);
        self.is_on.store(u64::from(limits.is_some()), Relaxed);
        self.lowest_ns.store(lowest.unwrap_or(0), Relaxed);
        self.changes.fetch_add(1, Release);
    }

    /// Returns whether the configuration has `[slow-log]`.
    pub fn is_on(&self) -> bool {
        self.is_on.load(Relaxed) != 0
    }

    /// Returns how often the rules were written.
    pub fn changes(&self) -> u64 {
        self.changes.load(Acquire)
    }

    /// Returns the lowest threshold in nanoseconds; `None` if no call is slow.
    #[inline]
    pub fn lowest_ns(&self) -> Option<u64> {
        Some(self.lowest_ns.load(Relaxed)).filter(|lowest| *lowest > 0)
    }

    /// Returns the threshold of the method at this place, in nanoseconds.
    pub fn threshold_ns(&self, place: usize) -> u64 {
        let cell = self.thresholds_ns.get(place);
        match cell.map_or(NEVER, |cell| cell.load(Relaxed)) {
            0 => NEVER,
            threshold => threshold,
        }
    }

    /// Returns the bytes of params in a record.
    pub fn params(&self) -> usize {
        self.params.load(Relaxed).min(MOST_PARAMS) as usize
    }

    /// Returns the records per second.
    pub fn lines(&self) -> u64 {
        self.lines.load(Relaxed).min(MOST_LINES)
    }
}

impl SlowRing {
    /// Adds a record, and replaces the oldest if the ring is full. If `asks_for` is not 0, the master must add what
    /// it can read about that thread of the runner. Returns the number of the record.
    pub fn add(&self, call: &SlowCall, trace_id: u128, asks_for: i32) -> u64 {
        let before = self.count.fetch_add(1, Relaxed);
        let entry = &self.entries[before as usize % KEPT];
        entry.number.store(0, Relaxed);
        // A reader must not mistake the fields that are written now for those of the replaced record.
        fence(Release);
        entry.at_ms.store(call.at_ms, Relaxed);
        entry.began_ns.store(call.began_ns, Relaxed);
        entry.call.store(call.call.number, Relaxed);
        entry.home.store(call.call.pid, Relaxed);
        entry.runner.store(call.runner, Relaxed);
        store_u128(&entry.trace_id, trace_id);
        let length = store_text(&entry.method, &call.method);
        entry.method_length.store(length, Relaxed);
        entry.outcome_length.store(0, Relaxed);
        entry.show(&call.evidence);
        entry.asks_for.store(asks_for, Relaxed);
        let number = before.wrapping_add(1);
        entry.number.store(number, Release);
        number
    }

    fn entry(&self, number: u64) -> Option<&SlowEntry> {
        let entry = &self.entries[number.wrapping_sub(1) as usize % KEPT];
        (entry.number.load(Acquire) == number).then_some(entry)
    }

    /// Completes a record, unless it was replaced.
    pub fn end(&self, number: u64, outcome: &str, run_ns: u64) {
        if let Some(entry) = self.entry(number) {
            entry.end(outcome, run_ns);
        }
    }

    /// Returns the evidence of a record once the master has added to it; also if the record was replaced.
    pub fn answered(&self, number: u64) -> Option<String> {
        let Some(entry) = self.entry(number) else {
            return Some(String::new());
        };
        (entry.asks_for.load(Acquire) == 0).then(|| entry.evidence())
    }

    /// For the master: writes the evidence of the records that ask for it. `look` gets the thread of the process
    /// `runner`, and the evidence so far.
    pub fn answer(&self, runner: i32, mut look: impl FnMut(i32, String) -> String) {
        for entry in &self.entries {
            let (number, thread) = (entry.number.load(Acquire), entry.asks_for.load(Acquire));
            if thread != 0 && entry.runner.load(Relaxed) == runner {
                let evidence = look(thread, entry.evidence());
                // Meanwhile the record may have been replaced.
                if entry.number.load(Acquire) == number {
                    entry.show(&evidence);
                    entry.asks_for.store(0, Release);
                }
            }
        }
    }

    /// Replaces the evidence of a record.
    pub fn correct(&self, number: u64, evidence: &str) {
        if let Some(entry) = self.entry(number) {
            entry.show(evidence);
        }
    }

    /// Completes the records of a process that has died. Returns the calls that were open.
    pub fn close(&self, runner: i32, now_ns: u64) -> Vec<SlowCall> {
        let mut closed = Vec::new();
        for entry in &self.entries {
            let is_open = entry.outcome_length.load(Relaxed) == 0;
            if is_open
                && entry.runner.load(Relaxed) == runner
                && let Some((_, call)) = entry.read()
            {
                let run_ns = now_ns.saturating_sub(call.began_ns);
                entry.end("crashed", run_ns);
                closed.push(call);
            }
        }
        closed
    }

    /// Returns the records, in no order.
    pub fn read(&self) -> impl Iterator<Item = SlowCall> {
        // Most rings are empty.
        let count = usize::try_from(self.count.load(Relaxed)).unwrap_or(KEPT);
        let entries = self.entries.iter().take(count.min(KEPT));
        entries.filter_map(SlowEntry::read).map(|(_, call)| call)
    }
}

impl SlowEntry {
    fn show(&self, evidence: &str) {
        let length = store_text(&self.evidence, evidence);
        self.evidence_length.store(length, Relaxed);
    }

    fn evidence(&self) -> String {
        load_text(&self.evidence, self.evidence_length.load(Relaxed))
    }

    fn end(&self, outcome: &str, run_ns: u64) {
        self.run_ns.store(run_ns, Relaxed);
        let length = store_text(&self.outcome, outcome);
        self.outcome_length.store(length, Release);
    }

    fn read(&self) -> Option<(u64, SlowCall)> {
        let number = self.number.load(Acquire);
        if number == 0 {
            return None;
        }
        let trace_id = load_u128(&self.trace_id);
        let length = self.outcome_length.load(Acquire);
        let outcome = (length > 0).then(|| load_text(&self.outcome, length));
        let call = SlowCall {
            call: CallId {
                pid: self.home.load(Relaxed),
                number: self.call.load(Relaxed),
            },
            trace_id: (trace_id != 0).then(|| format!("{trace_id:032x}")),
            method: load_text(&self.method, self.method_length.load(Relaxed)),
            runner: self.runner.load(Relaxed),
            at_ms: self.at_ms.load(Relaxed),
            began_ns: self.began_ns.load(Relaxed),
            end: outcome.map(|outcome| (outcome, self.run_ns.load(Relaxed))),
            evidence: self.evidence(),
        };
        // If the number has changed, another record was written meanwhile.
        fence(Acquire);
        (self.number.load(Relaxed) == number).then_some((number, call))
    }
}

#[cfg(test)]
#[path = "slow_calls_tests.rs"]
mod tests;
