//! Holds the metrics board: shared memory with the counters of all processes.
//!
//! Each worker, pool process and acceptor has a block with the index of its scoreboard record, and only it
//! writes there: plain loads and stores. After the death of a worker its keeper continues in its block.
//! Sessions add atomically to the block of their acceptor. Blocks are never cleared, so a total is the sum
//! over all blocks, and it never falls. Names of methods and pools have places in tables that only grow.
//! The file crosses an upgrade; a program that does not know its version makes a new one, with the totals of the
//! old one as its base.

mod base;
#[cfg(test)]
mod base_tests;
mod block_writer;
pub mod grid;
pub mod layout;
mod reader;

pub use base::BoardTotals;
pub use block_writer::{BlockWriter, count};
pub use reader::{BoardReader, HistogramCounts, MethodTotals, PoolTotals};

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{Ordering::Relaxed, Ordering::Release};

use crate::link::ids::Pid;
use crate::link::slow_calls::{SlowCall, SlowRing};
use crate::sys::process::monotonic_ns;
use crate::sys::shared_memory::{growing_file, make_private, make_read_only, read_only, record_at};
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

    /// Returns the place of a name, which is added if there is room. Otherwise it is that of all others.
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
}

impl MetricsAccess {
    /// Makes the header readable only, for good. For a child, which must not write what only the master writes:
    /// names, and what readers know the board by. Call it while the master's descriptors are open here. Without
    /// /proc the child loses the header, and so what counts as slow.
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
                board.block(index * 64 + bit)?;
            }
        }
        Ok(Some(board))
    }

    fn with(file: OwnedFd, header: &'static BoardHeader) -> Self {
        MetricsBoard {
            file,
            header,
            blocks: HashMap::new(),
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
                    let place = self.methods.number(name);
                    self.header.methods.set_kind(place.into(), kind);
                    place
                })
                .collect(),
            pools: pools.map(|name| self.pools.number(name)).collect(),
        })
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
        BoardTotals::of(self.header, blocks, &self.file)
    }

    /// Begins with the totals of another board. Nothing is counted on this one yet.
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

    /// The process `pid` with a scoreboard record has ended: it runs no calls. Returns its slow calls that it
    /// had not ended.
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

    /// Returns the slow calls of the process with a scoreboard record.
    pub fn slow_ring(&self, record: usize) -> Option<&'static SlowRing> {
        self.blocks.get(&record).map(|block| &block.slow)
    }

    /// Returns the place of a method; that of all others without room.
    pub fn place_of(&mut self, method: &str) -> usize {
        self.methods.number(method).into()
    }
}
