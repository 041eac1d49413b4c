//! Holds the metrics board: shared memory with the counters of all processes.
//!
//! Each worker, pool process and acceptor has a block with the index of its scoreboard record, and writes to it with
//! plain loads and stores. After the death of a worker its keeper, and then the master, continue in its block. Sessions
//! add atomically to the block of their acceptor. Blocks are never cleared, so a total is the sum
//! over all blocks, and it never falls. Names of methods and pools have places in tables that only grow.
//! The file stays in use after an upgrade. A master that does not know its version makes a new one, with the totals of
//! the old one as its base.

mod base;
#[cfg(test)]
mod base_tests;
mod block_writer;
pub mod grid;
pub mod job_cells;
mod job_totals;
pub mod layout;
mod reader;

pub use base::BoardTotals;
pub use block_writer::{BlockWriter, count};
pub use job_totals::JobTotals;
pub use reader::{BoardReader, HistogramCounts, MethodTotals, PoolTotals};

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{Ordering::Relaxed, Ordering::Release};

use crate::link::access_counts::LineBatch;
use crate::link::ids::Pid;
use crate::link::slow_calls::{SlowCall, SlowRing};
use crate::protocol::call::is_reserved;
use crate::sys::process::monotonic_ns;
use crate::sys::shared_memory::{growing_file, make_private, make_read_only, read_only, record_at};
use job_cells::{JobCells, offset_of_jobs};
use layout::{
    Block, BoardHeader, HandlerKind, MAGIC, NAMES, NameTable, OTHER, POOLS, STRIDE, VERSION,
    offset_of_block,
};

/// The master's side of the board.
#[derive(Debug)]
pub struct MetricsBoard {
    file: OwnedFd,
    header: &'static BoardHeader,
    blocks: HashMap<usize, &'static Block>,
    /// The counters of the jobs processes.
    jobs: HashMap<usize, &'static JobCells>,
    methods: NameNumbers,
    pools: NameNumbers,
    has_warned: bool,
}

/// The places of names, as the master knows them.
#[derive(Debug)]
struct NameNumbers {
    table: &'static NameTable,
    most: usize,
    numbers: HashMap<String, u16>,
    is_full: bool,
}

impl NameNumbers {
    fn new(table: &'static NameTable, most: usize) -> Self {
        let names = table.names(most).into_iter().zip(0..);
        NameNumbers {
            table,
            most,
            numbers: names.collect(),
            is_full: false,
        }
    }

    /// Returns the place of a name, which is added if there is room; otherwise the place of all others.
    fn number(&mut self, name: &str) -> u16 {
        if let Some(number) = self.numbers.get(name) {
            return *number;
        }
        let count = self.numbers.len();
        if count >= self.most {
            self.is_full = true;
            return self.most as u16;
        }
        self.table.push(name);
        self.numbers.insert(name.to_owned(), count as u16);
        count as u16
    }
}

/// What a process needs to count: its block, and the places of its methods and pools by their numbers.
#[derive(Debug, Clone)]
pub struct MetricsAccess {
    pub block: &'static Block,
    pub header: &'static BoardHeader,
    /// The master's descriptor. A child has it too, until it closes what belongs to the master.
    file: RawFd,
    pub methods: Box<[u16]>,
    pub pools: Box<[u16]>,
    /// `Some` in a jobs process.
    pub jobs: Option<&'static JobCells>,
}

impl MetricsAccess {
    /// Makes the header read-only in this process, permanently. A child must not write there, because only the master
    /// writes names and the version of the board. Call it while the master's descriptors are open here. Without /proc
    /// the child loses the header, and with it the thresholds of the slow log.
    ///
    /// # Errors
    /// If there is not enough memory.
    pub fn protect_header(&self) -> io::Result<()> {
        let header = std::slice::from_ref(self.header);
        match read_only(&self.file) {
            Ok(file) => make_read_only(header, &file),
            Err(_) => make_private(header),
        }
    }

    /// Returns the place of a pool.
    pub fn pool(&self, number: usize) -> usize {
        self.pools.get(number).map_or(POOLS, |&place| place.into())
    }

    /// Returns the place of a method.
    #[inline]
    pub fn method(&self, number: usize) -> usize {
        self.methods
            .get(number)
            .map_or(OTHER, |&place| place.into())
    }
}

impl MetricsBoard {
    /// Creates a board with all counters zero. `started_at` is the start of the master in seconds since
    /// 1970.
    ///
    /// # Errors
    /// If there is not enough memory.
    pub fn new(started_at: u64) -> io::Result<Self> {
        let file = growing_file(STRIDE)?;
        let header: &BoardHeader = record_at(&file, 0)?;
        header.version.store(VERSION, Relaxed);
        header.started_at.store(started_at, Relaxed);
        header.magic.store(MAGIC, Release);
        Ok(Self::with(file, header))
    }

    /// Maps the board in a file that another master has made. Returns `None` if its version is unknown.
    ///
    /// # Errors
    /// If there is not enough memory.
    pub fn of(file: OwnedFd) -> io::Result<Option<Self>> {
        let header: &BoardHeader = record_at(&file, 0)?;
        let is_known =
            header.magic.load(Relaxed) == MAGIC && header.version.load(Relaxed) == VERSION;
        if !is_known {
            return Ok(None);
        }
        let mut board = Self::with(file, header);
        for (index, word) in header.used.iter().enumerate() {
            let word = word.load(Relaxed);
            for bit in (0..64).filter(|bit| word >> bit & 1 == 1) {
                let record = index * 64 + bit;
                if board.block(record)?.has_jobs.load(Relaxed) != 0 {
                    board.job_cells(record)?;
                }
            }
        }
        Ok(Some(board))
    }

    fn with(file: OwnedFd, header: &'static BoardHeader) -> Self {
        MetricsBoard {
            file,
            header,
            blocks: HashMap::new(),
            jobs: HashMap::new(),
            methods: NameNumbers::new(&header.methods, NAMES),
            pools: NameNumbers::new(&header.pools, POOLS),
            has_warned: false,
        }
    }

    pub fn file(&self) -> &OwnedFd {
        &self.file
    }

    pub fn header(&self) -> &'static BoardHeader {
        self.header
    }

    /// Returns what the process with a scoreboard record needs. `methods` and `pools` are the names by
    /// number. Names without room count as the others.
    ///
    /// # Errors
    /// If there is not enough memory.
    ///
    /// # Panics
    /// If `record` is not below `RECORDS`.
    pub fn access<'a>(
        &mut self,
        record: usize,
        methods: impl Iterator<Item = (&'a str, HandlerKind)>,
        pools: impl Iterator<Item = &'a str>,
    ) -> io::Result<MetricsAccess> {
        let block = self.block(record)?;
        let word = &self.header.used[record / 64];
        word.store(word.load(Relaxed) | 1 << (record % 64), Release);
        Ok(MetricsAccess {
            block,
            header: self.header,
            file: self.file.as_raw_fd(),
            methods: methods
                .map(|(name, kind)| {
                    // The methods of the server itself belong to all others.
                    if is_reserved(name) {
                        return OTHER as u16;
                    }
                    let place = self.methods.number(name);
                    self.header.methods.set_kind(place.into(), kind);
                    place
                })
                .collect(),
            pools: pools.map(|name| self.pools.number(name)).collect(),
            jobs: None,
        })
    }

    /// Returns the counters of a jobs process with this record. Its block must be in use.
    ///
    /// # Errors
    /// If there is not enough memory.
    pub fn job_cells(&mut self, record: usize) -> io::Result<&'static JobCells> {
        if let Some(cells) = self.jobs.get(&record) {
            return Ok(cells);
        }
        let cells = record_at(&self.file, offset_of_jobs(record))?;
        self.block(record)?.has_jobs.store(1, Release);
        self.jobs.insert(record, cells);
        Ok(cells)
    }

    /// Returns what the jobs process with a record has written last about the store.
    pub fn job_status(&self, record: usize) -> Option<String> {
        self.jobs.get(&record)?.status.read()
    }

    fn block(&mut self, record: usize) -> io::Result<&'static Block> {
        if let Some(block) = self.blocks.get(&record) {
            return Ok(block);
        }
        let block = record_at(&self.file, offset_of_block(record))?;
        self.blocks.insert(record, block);
        Ok(block)
    }

    /// Returns the totals of all blocks, for a program that does not know this layout.
    pub fn totals(&self) -> BoardTotals {
        let blocks = self.blocks.iter();
        let blocks = blocks.map(|(record, block)| (*record, *block));
        let mut totals = BoardTotals::of(self.header, blocks, &self.file);
        totals.add_jobs(self.jobs.values().copied());
        totals
    }

    /// Starts from the totals of another board. Nothing is counted on this one yet.
    ///
    /// # Errors
    /// If there is not enough memory.
    pub fn add_base(&mut self, base: &BoardTotals) -> io::Result<()> {
        // Names first, so that they have their places.
        for (name, kind) in base.methods() {
            let place = self.methods.number(name);
            if let Some(kind) = kind {
                self.header.methods.set_kind(place.into(), kind);
            }
        }
        for name in base.pools() {
            self.pools.number(name);
        }
        // Any block will do: it is continued by the process that gets its record.
        let block = self.block(0)?;
        self.header.used[0].fetch_or(1, Release);
        base.write_to(self.header, block);
        if base.has_jobs() {
            base.write_jobs(self.job_cells(0)?);
        }
        Ok(())
    }

    /// Returns the number of programs that a pool has started.
    pub fn program_starts(&self, pool: &str) -> u64 {
        let Some(place) = self.pools.numbers.get(pool) else {
            return 0;
        };
        let blocks = self.blocks.values();
        let starts = blocks.map(|block| block.program_starts[usize::from(*place)].load(Relaxed));
        starts.fold(0, u64::wrapping_add)
    }

    /// Returns whether a method has no room for its name. True once only.
    pub fn take_overflow(&mut self) -> bool {
        let is_new = self.methods.is_full && !self.has_warned;
        self.has_warned |= is_new;
        is_new
    }

    /// Records that the process `pid` with a scoreboard record has ended and runs no calls. Returns the slow calls
    /// that it was running.
    pub fn clear_gauges(&mut self, record: usize, pid: Pid) -> Vec<SlowCall> {
        let Ok(block) = self.block(record) else {
            return Vec::new();
        };
        let gauges = block.running.iter().chain(&block.queued);
        gauges.for_each(|gauge| gauge.store(0, Relaxed));
        if block.slow_calls.load(Relaxed) == 0 {
            return Vec::new();
        }
        block.slow.close(pid.0, monotonic_ns())
    }

    /// Completes the slow calls of a session that has ended after its acceptor. Returns those that were open.
    pub fn close_slow(&self, pid: Pid) -> Vec<SlowCall> {
        let used = (self.blocks.values()).filter(|block| block.slow_calls.load(Relaxed) > 0);
        used.flat_map(|block| block.slow.close(pid.0, monotonic_ns()))
            .collect()
    }

    /// Completes the counts of access log lines of a process that has died without a keeper. `find` returns how many
    /// of the lines that it was writing are in the file.
    pub fn recover_lines(&self, record: usize, find: impl FnOnce(LineBatch) -> u64) {
        if let Some(block) = self.blocks.get(&record) {
            block.access.recover(find);
        }
    }

    /// Counts the access log lines that are still due as lost, because the process with a scoreboard record has ended,
    /// and its keeper too.
    pub fn settle_lines(&self, record: usize) {
        if let Some(block) = self.blocks.get(&record) {
            block.access.settle(|| block.all_calls());
        }
    }

    /// Returns the lost lines of all access logs.
    pub fn lost_access_lines(&self) -> u64 {
        let blocks = self.blocks.values();
        let lost = blocks.map(|block| block.access.lost.load(Relaxed));
        let of_sessions = self.header.lost_access_lines.load(Relaxed);
        lost.fold(of_sessions, u64::wrapping_add)
    }

    /// Returns the slow calls of the process with a scoreboard record.
    pub fn slow_ring(&self, record: usize) -> Option<&'static SlowRing> {
        self.blocks.get(&record).map(|block| &block.slow)
    }

    /// Returns the place of a method; that of all others without room.
    pub fn place_of(&mut self, method: &str) -> usize {
        self.methods.number(method).into()
    }
}
