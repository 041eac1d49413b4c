//! Lays out the metrics board: what is where in its file.
//!
//! Processes of different versions share the file. So fields are only added at the end of a structure,
//! whose places have room left, and none is moved or removed. The first two words are the magic number and
//! the version for all time.

use std::sync::atomic::{AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release};

use super::grid::BUCKETS;
use crate::link::access_counts::AccessCounts;
use crate::link::scoreboard::RECORDS;
use crate::link::slow_calls::{SlowRing, SlowRules};
use crate::sys::shared_memory::{load_text, shared_record, store_text};

/// "preforkd" in the first word.
pub const MAGIC: u64 = u64::from_le_bytes(*b"preforkd");
/// The version of this layout.
pub const VERSION: u64 = 1;

/// The number of methods with counters of their own.
pub const NAMES: usize = 256;
/// The place of all other methods together.
pub const OTHER: usize = NAMES;
/// The label of all others together.
pub const OTHER_NAME: &str = "_OTHER";
/// The number of pools with counters of their own.
pub const POOLS: usize = 64;
/// The number of slots of workers.
pub const SLOTS: usize = 1024;
/// The number of error codes; the last place is for the codes of handlers.
pub const CODES: usize = 32;
/// The place of the codes of handlers.
pub const HANDLER_CODE: usize = CODES - 1;

/// The bytes from one block to the next, and of the header before the first one. A block has room for more
/// fields. Only used pages take memory.
pub const STRIDE: u64 = 2 << 20;
const _: () =
    assert!(size_of::<Block>() as u64 <= STRIDE && size_of::<BoardHeader>() as u64 <= STRIDE);

/// Labels by their place in an array of counters. Values are only added at the end.
pub mod labels {
    pub const DIALECTS: [&str; 4] = ["frame", "line", "http", "unknown"];
    pub const FORMS: [&str; 2] = ["plain", "jsonrpc"];
    pub const MOVED: [&str; 3] = ["drain", "crash", "balance"];
    pub const CLOSED: [&str; 8] = [
        "client",
        "idle",
        "read_timeout",
        "write_timeout",
        "protocol",
        "stop",
        "crash",
        "limit",
    ];
    pub const KINDS: [&str; 4] = ["builtin", "function", "command", "pool"];
    pub const RESULTS: [&str; 2] = ["ok", "refused"];
    pub const WORKER_EXITS: [&str; 7] = [
        "ordered", "recycled", "exit", "signal", "oom", "stuck", "boot",
    ];
    pub const PROGRAM_EXITS: [&str; 8] = [
        "ordered", "recycled", "idle", "exit", "signal", "timeout", "protocol", "boot",
    ];
}

/// What answers a method, by the places of `labels::KINDS`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HandlerKind {
    Builtin,
    Function,
    Command,
    Pool,
}

/// How a connection left a process, by the places of `labels::MOVED`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MoveReason {
    Drain,
    Crash,
    Balance,
}

/// Why a connection was closed, by the places of `labels::CLOSED`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseReason {
    /// The client closed it or it broke.
    Client,
    Idle,
    ReadTimeout,
    WriteTimeout,
    /// The client has violated its dialect.
    Protocol,
    Stop,
    Crash,
    /// The worker has closed it because of one of its limits.
    Limit,
}

shared_record! {
    /// A name of the table. The count of the table is stored after the name.
    #[derive(Debug)]
    pub struct NameCell {
        length: AtomicU64,
        /// What answers a method, as a place of `labels::KINDS`.
        kind: AtomicU64,
        words: [AtomicU64; 16],
    }
}

shared_record! {
    /// A table of names that only grows. A name keeps its place.
    #[derive(Debug)]
    pub struct NameTable {
        count: AtomicU64,
        names: [NameCell; NAMES],
    }
}

impl NameTable {
    /// Returns the names, at most `most`. Control characters, which only garbage has, are replaced: names go to
    /// terminals and to programs that read metrics.
    pub fn names(&self, most: usize) -> Vec<String> {
        let count = usize::try_from(self.count.load(Acquire)).unwrap_or(NAMES);
        let names = self.names.iter().take(count.min(most));
        let name = |cell: &NameCell| {
            let length = cell
                .length
                .load(Relaxed)
                .min(size_of_val(&cell.words) as u64);
            load_text(&cell.words, length as u32).replace(char::is_control, "?")
        };
        names.map(name).collect()
    }

    /// Returns the kinds of the names, at most `most`.
    pub fn kinds(&self, most: usize) -> Vec<Option<&'static str>> {
        let kinds = self.names.iter().take(most);
        let kind = |cell: &NameCell| {
            let place = usize::try_from(cell.kind.load(Relaxed)).ok()?;
            labels::KINDS.get(place).copied()
        };
        kinds.map(kind).collect()
    }

    /// For the master: sets the kind of a name.
    pub fn set_kind(&self, place: usize, kind: HandlerKind) {
        if let Some(cell) = self.names.get(place) {
            cell.kind.store(kind as u64, Relaxed);
        }
    }

    /// For the master: adds a name at the end.
    pub fn push(&self, name: &str) {
        let count = self.count.load(Relaxed);
        if let Some(cell) = self.names.get(count as usize) {
            let length = store_text(&cell.words, name);
            cell.length.store(length.into(), Relaxed);
            self.count.store(count + 1, Release);
        }
    }
}

shared_record! {
    /// The counts of a histogram.
    #[derive(Debug)]
    pub struct HistogramCells {
        pub counts: [AtomicU64; BUCKETS],
        pub sum_ns: AtomicU64,
    }
}

shared_record! {
    /// The beginning of the file. Only the master writes it, so there is one writer at a time. Its children can only
    /// read it.
    #[derive(Debug)]
    #[repr(align(4096))]
    pub struct BoardHeader {
        pub magic: AtomicU64,
        pub version: AtomicU64,
        /// Start of the master in seconds since 1970.
        pub started_at: AtomicU64,
        /// A bit for each block that was ever used.
        pub used: [AtomicU64; RECORDS / 64],
        pub methods: NameTable,
        pub pools: NameTable,
        /// By `labels::RESULTS`.
        pub reloads: [AtomicU64; 4],
        pub upgrades: [AtomicU64; 4],
        pub worker_starts: AtomicU64,
        /// By `labels::WORKER_EXITS`.
        pub worker_exits: [AtomicU64; 16],
        /// Lost lines of the master's log.
        pub lost_lines: AtomicU64,
        /// The highest slot that was ever used, plus one.
        pub slots: AtomicU64,
        /// What counts as slow.
        pub slow: SlowRules,
        /// Lines of the access log that sessions without an acceptor have lost.
        pub lost_access_lines: AtomicU64,
        /// Connections of sessions without an acceptor that ended with a crash.
        pub lost_connections: AtomicU64,
    }
}

shared_record! {
    /// The counters of one method. 4,608 bytes.
    #[derive(Debug)]
    pub struct MethodCells {
        pub duration: HistogramCells,
        pub queue: HistogramCells,
        /// The longest duration.
        pub longest_ns: AtomicU64,
        /// By code: first of calls that did not begin, then by code again of calls that had begun.
        pub errors: [AtomicU64; 2 * CODES],
        /// Calls over the threshold of the slow log.
        pub slow: AtomicU64,
    }
}
const _: () = assert!(size_of::<MethodCells>() == 4608);

shared_record! {
    /// The counters of a worker, pool process, acceptor or jobs process. They are never cleared: the next process of
    /// the record continues.
    #[derive(Debug)]
    #[repr(align(4096))]
    pub struct Block {
        pub accepted: AtomicU64,
        /// By `labels::MOVED`.
        pub moved: [AtomicU64; 8],
        /// By `labels::CLOSED`.
        pub closed: [AtomicU64; 16],
        /// By `labels::DIALECTS`.
        pub received_bytes: [AtomicU64; 8],
        pub sent_bytes: [AtomicU64; 8],
        /// By dialect, then `labels::FORMS`.
        pub requests: [[AtomicU64; 4]; 8],
        pub forwarded: AtomicU64,
        pub returned: AtomicU64,
        pub quarantine_refusals: AtomicU64,
        pub lost_lines: AtomicU64,
        /// Calls over the threshold of the slow log, of all methods. If it is 0, nothing of the slow log was used.
        pub slow_calls: AtomicU64,
        /// Lines of the access log.
        pub access: AccessCounts,
        /// Whether the process is or was a jobs process, which has more counters (`job_cells`).
        pub has_jobs: AtomicU64,
        /// Room for more fields.
        pub spare: [AtomicU64; 6],
        pub accept_wait: HistogramCells,
        /// The CPU time of processes in nanoseconds, by their slots.
        pub cpu_ns: [AtomicU64; SLOTS],
        /// Answered calls by method; the last place is `OTHER`.
        pub calls: [AtomicU64; NAMES + 1],
        /// CPU time of commands in nanoseconds, by method.
        pub command_cpu_ns: [AtomicU64; NAMES + 1],
        /// Calls by method that run, and that wait, at the last tick. These are no counters.
        pub running: [AtomicU64; NAMES + 1],
        pub queued: [AtomicU64; NAMES + 1],
        /// By pool; the last place is for all others.
        pub program_starts: [AtomicU64; POOLS + 1],
        /// By pool, then `labels::PROGRAM_EXITS`.
        pub program_exits: [[AtomicU64; 16]; POOLS + 1],
        pub methods: [MethodCells; NAMES + 1],
        /// The run times of methods, if they are recorded.
        pub runs: [HistogramCells; NAMES + 1],
        /// The last slow calls of this process.
        pub slow: SlowRing,
    }
}

impl Block {
    /// Returns the answered calls of all methods.
    pub fn all_calls(&self) -> u64 {
        let calls = self.calls.iter().map(|calls| calls.load(Relaxed));
        calls.fold(0, u64::wrapping_add)
    }
}

/// Checks the offsets of fields, because another version reads and writes the same memory.
const _: () = {
    use std::mem::offset_of;
    assert!(offset_of!(BoardHeader, used) == 24);
    assert!(offset_of!(BoardHeader, methods) == 536);
    assert!(offset_of!(BoardHeader, pools) == 37_408);
    assert!(offset_of!(BoardHeader, reloads) == 74_280);
    assert!(offset_of!(BoardHeader, lost_lines) == 74_480);
    assert!(offset_of!(BoardHeader, slots) == 74_488);
    assert!(offset_of!(BoardHeader, slow) == 74_496);
    assert!(offset_of!(Block, access) == 624);
    assert!(offset_of!(Block, accept_wait) == 744);
    assert!(offset_of!(Block, cpu_ns) == 2784);
    assert!(offset_of!(Block, calls) == 10_976);
    assert!(offset_of!(Block, running) == 15_088);
    assert!(offset_of!(Block, program_exits) == 19_720);
    assert!(offset_of!(Block, methods) == 28_040);
    assert!(offset_of!(Block, runs) == 1_212_296);
};

/// Returns where the block of a scoreboard record is. Workers have the lowest records and others the
/// highest, so the file stays short.
///
/// # Panics
/// If `record` is not below `RECORDS`.
pub fn offset_of_block(record: usize) -> u64 {
    let place = match record < RECORDS / 2 {
        true => 2 * record,
        false => 2 * (RECORDS - 1 - record) + 1,
    };
    (1 + place as u64) * STRIDE
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::protocol::code::Code;
    use crate::sys::shared_memory::array;
    use std::collections::BTreeSet;
    use std::num::NonZeroUsize;

    #[test]
    fn each_record_has_a_block_of_its_own() {
        let places: BTreeSet<u64> = (0..RECORDS).map(offset_of_block).collect();
        assert_eq!(places.len(), RECORDS);
        assert_eq!(places.first(), Some(&STRIDE));
        assert_eq!(offset_of_block(RECORDS - 1), 2 * STRIDE);
    }

    #[test]
    fn the_place_of_a_code_never_changes() {
        let names = Code::ALL.map(|code| (code as usize, code.name()));
        let known = [
            "parse-error",
            "invalid-request",
            "method-not-found",
            "invalid-params",
            "internal",
            "timeout",
            "overloaded",
            "crashed",
            "too-large",
            "stopping",
            "cancelled",
            "command-failed",
            "bad-output",
            "unavailable",
            "conflict",
            "no-such-job",
        ];
        let expected: Vec<(usize, &str)> = known.into_iter().enumerate().collect();
        assert_eq!(names.to_vec(), expected);
        assert!(names.len() <= HANDLER_CODE);
    }

    #[test]
    fn a_name_has_no_control_characters() {
        let (tables, _file) = array::<NameTable>(NonZeroUsize::MIN).unwrap();
        tables[0].push("a\u{1b}[2Jb\u{9b}c\nd");
        tables[0].push("résumé");
        assert_eq!(tables[0].names(NAMES), ["a?[2Jb?c?d", "résumé"]);
    }
}
