//! Reads the metrics board and sums its blocks.
//!
//! Any process can write garbage into its block, so every index, length and name is checked. A wrong value
//! gives a wrong figure and nothing worse.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering::Acquire, Ordering::Relaxed};

use super::grid::{BUCKETS, index_of_bound, quantile_ns};
use super::layout::{
    Block, BoardHeader, CODES, HistogramCells, MAGIC, NAMES, OTHER_NAME, POOLS, SLOTS, VERSION,
    labels::PROGRAM_EXITS, offset_of_block,
};
use crate::link::slow_calls::{KEPT, SlowCall};
use crate::sys::shared_memory::{ReadOnlyMap, SharedRecord};

/// The board, mapped for reading.
#[derive(Debug)]
pub struct BoardReader {
    file: OwnedFd,
    map: ReadOnlyMap,
    /// The counts of each method at its last reading, by its place, and whether run times were read. They are used
    /// again as long as the method has no further call: the counts of all methods in all blocks can be 60 MB.
    last: RefCell<HashMap<usize, (bool, MethodTotals)>>,
}

/// The summed counts of a histogram.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistogramCounts {
    pub counts: Vec<u64>,
    pub sum_ns: u64,
}

impl Default for HistogramCounts {
    fn default() -> Self {
        HistogramCounts {
            counts: vec![0; BUCKETS],
            sum_ns: 0,
        }
    }
}

impl HistogramCounts {
    pub fn add(&mut self, cells: &HistogramCells) {
        for (sum, cell) in self.counts.iter_mut().zip(&cells.counts) {
            *sum = sum.wrapping_add(cell.load(Relaxed));
        }
        self.sum_ns = self.sum_ns.wrapping_add(cells.sum_ns.load(Relaxed));
    }

    /// The number of values.
    pub fn count(&self) -> u64 {
        self.counts
            .iter()
            .fold(0, |sum, count| sum.wrapping_add(*count))
    }

    /// The number of values up to a bound in nanoseconds; `None` if it is not on the grid.
    pub fn up_to(&self, ns: u64) -> Option<u64> {
        let index = index_of_bound(ns)?;
        let counts = self.counts.iter().take(index + 1);
        Some(counts.fold(0, |sum, count| sum.wrapping_add(*count)))
    }

    /// A quantile in microseconds; `None` without values. `share` is 0 to 1.
    pub fn quantile_us(&self, share: f64) -> Option<u64> {
        quantile_ns(&self.counts, share).map(|ns| ns / 1000)
    }
}

/// The summed counters of a method.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MethodTotals {
    pub name: String,
    pub calls: u64,
    /// By the place of the code, then whether the call had begun.
    pub errors: Vec<[u64; 2]>,
    pub duration: HistogramCounts,
    pub queue: HistogramCounts,
    pub run: HistogramCounts,
    pub longest_ns: u64,
    pub command_cpu_ns: u64,
    /// Calls over the threshold of the slow log.
    pub slow: u64,
    /// The kind of handler of the method; `None` for the sum of all other methods.
    pub kind: Option<&'static str>,
    /// Calls that ran, and that waited, at the last tick.
    pub running: u64,
    pub queued: u64,
}

/// The summed counters of a pool's programs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PoolTotals {
    pub name: String,
    pub starts: u64,
    /// By the places of `labels::PROGRAM_EXITS`.
    pub exits: Vec<u64>,
}

impl MethodTotals {
    /// The number of calls that were answered with an error.
    pub fn error_count(&self) -> u64 {
        let errors = self.errors.iter().flatten();
        errors.fold(0, |sum, count| sum.wrapping_add(*count))
    }
}

impl BoardReader {
    /// Maps a board.
    ///
    /// # Errors
    /// If there is not enough memory, or the file is no board of this version (EINVAL).
    pub fn new(file: OwnedFd) -> io::Result<Self> {
        let map = ReadOnlyMap::new(&file)?;
        let last = RefCell::default();
        let reader = BoardReader { file, map, last };
        let is_board = reader.map.record::<BoardHeader>(0).is_some_and(|header| {
            header.magic.load(Acquire) == MAGIC && header.version.load(Relaxed) == VERSION
        });
        is_board
            .then_some(reader)
            .ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    /// Maps blocks that were added since. Call it before each reading.
    ///
    /// # Errors
    /// If there is not enough memory; then the blocks before are read.
    pub fn refresh(&mut self) -> io::Result<()> {
        let length = std::fs::File::from(self.file.try_clone()?)
            .metadata()?
            .len();
        if length > self.map.length() as u64 {
            self.map = ReadOnlyMap::new(&self.file)?;
        }
        Ok(())
    }

    /// The header.
    ///
    /// # Panics
    /// Never: `new` has checked the length.
    pub fn header(&self) -> &BoardHeader {
        let header = self.map.record(0);
        header.expect("a file that never shrinks has its header")
    }

    /// All blocks that were ever used.
    pub fn blocks(&self) -> impl Iterator<Item = &Block> {
        self.numbered_blocks().map(|(_, block)| block)
    }

    /// Returns a part of the file; `None` if the file ends before it.
    pub(super) fn record<T: SharedRecord>(&self, offset: u64) -> Option<&T> {
        self.map.record(usize::try_from(offset).ok()?)
    }

    /// The same with their scoreboard records.
    pub(super) fn numbered_blocks(&self) -> impl Iterator<Item = (usize, &Block)> {
        let words = self.header().used.iter().enumerate();
        let records = words.flat_map(|(index, word)| {
            let word = word.load(Acquire);
            let bits = (0..64).filter(move |bit| word >> bit & 1 == 1);
            bits.map(move |bit| index * 64 + bit)
        });
        records.filter_map(|record| Some((record, self.record(offset_of_block(record))?)))
    }

    /// The sum of a counter over all blocks.
    pub fn sum(&self, counter: impl Fn(&Block) -> &AtomicU64) -> u64 {
        let values = self.blocks().map(|block| counter(block).load(Relaxed));
        values.fold(0, u64::wrapping_add)
    }

    /// The sum of several counters over all blocks.
    pub fn sum_all(&self, counters: impl Fn(&Block) -> &[AtomicU64]) -> u64 {
        let values = self.blocks().flat_map(counters);
        values.fold(0, |sum, value| sum.wrapping_add(value.load(Relaxed)))
    }

    /// The names of methods with counters of their own, in the order of their places.
    pub fn method_names(&self) -> Vec<String> {
        self.header().methods.names(NAMES)
    }

    /// The names of pools with counters of their own, in the order of their places.
    pub fn pool_names(&self) -> Vec<String> {
        self.header().pools.names(POOLS)
    }

    /// The CPU time of each slot in nanoseconds.
    pub fn cpu_ns(&self) -> Vec<u64> {
        let slots = self.header().slots.load(Relaxed) as usize;
        let slots = 0..slots.min(SLOTS);
        slots
            .map(|slot| self.sum(|block| &block.cpu_ns[slot]))
            .collect()
    }

    /// The starts and ends of each pool's programs.
    pub fn pool_programs(&self) -> Vec<PoolTotals> {
        let exits = |pool: usize, reason: usize| {
            self.sum(|block: &Block| &block.program_exits[pool][reason])
        };
        let pools = self.pool_names().into_iter().enumerate();
        pools
            .map(|(place, name)| PoolTotals {
                name,
                starts: self.sum(|block| &block.program_starts[place]),
                exits: (0..PROGRAM_EXITS.len())
                    .map(|reason| exits(place, reason))
                    .collect(),
            })
            .collect()
    }

    /// The totals of each method. The last one has those of all others. `with_runs` says whether the run
    /// times are read.
    pub fn methods(&self, with_runs: bool) -> Vec<MethodTotals> {
        let kinds = self.header().methods.kinds(NAMES);
        let names = self.method_names().into_iter().enumerate();
        let others = std::iter::once((NAMES, OTHER_NAME.to_owned()));
        names
            .chain(others)
            .map(|(place, name)| MethodTotals {
                kind: kinds.get(place).copied().flatten(),
                ..self.method(place, name, with_runs)
            })
            .collect()
    }

    fn method(&self, place: usize, name: String, with_runs: bool) -> MethodTotals {
        let mut totals = MethodTotals {
            name,
            ..self.counts(place, with_runs)
        };
        for block in self.blocks() {
            let gauge = |gauge: &AtomicU64| u64::from(gauge.load(Relaxed) as u32);
            totals.running += gauge(&block.running[place]);
            totals.queued += gauge(&block.queued[place]);
            // The process that runs a call counts it as slow, also a pool process, which answers none.
            if block.slow_calls.load(Relaxed) > 0 {
                let slow = block.methods[place].slow.load(Relaxed);
                totals.slow = totals.slow.wrapping_add(slow);
            }
            // The process that runs a command counts its CPU time, also if another process answers the call. These
            // counters share pages with those of calls, so reading them touches no unused page.
            let cpu = block.command_cpu_ns[place].load(Relaxed);
            totals.command_cpu_ns = totals.command_cpu_ns.wrapping_add(cpu);
        }
        totals
    }

    /// Returns what changes only with the calls of a method.
    fn counts(&self, place: usize, with_runs: bool) -> MethodTotals {
        let calls = self.sum(|block| &block.calls[place]);
        let mut last = self.last.borrow_mut();
        match last.get(&place) {
            Some((has_runs, totals)) if totals.calls == calls && (*has_runs || !with_runs) => {
                return totals.clone();
            }
            _ => {}
        }
        let mut totals = MethodTotals {
            errors: vec![[0; 2]; CODES],
            ..MethodTotals::default()
        };
        for block in self.blocks() {
            let calls = block.calls[place].load(Acquire);
            // Unused counters take no memory as long as they are not read.
            if calls > 0 {
                totals.add(block, place, calls);
                if with_runs {
                    totals.run.add(&block.runs[place]);
                }
            }
        }
        last.insert(place, (with_runs, totals.clone()));
        totals
    }

    /// The last slow calls of the server, oldest first.
    pub fn slow_calls(&self) -> Vec<SlowCall> {
        let used = (self.blocks()).filter(|block| block.slow_calls.load(Relaxed) > 0);
        let mut calls: Vec<SlowCall> = used.flat_map(|block| block.slow.read()).collect();
        calls.sort_by_key(|call| call.at_ms);
        calls.split_off(calls.len().saturating_sub(KEPT))
    }

    /// Returns whether the configuration has `[slow-log]`.
    pub fn has_slow_log(&self) -> bool {
        self.header().slow.is_on()
    }

    /// The histogram of times in the accept queue.
    pub fn accept_wait(&self) -> HistogramCounts {
        let mut sum = HistogramCounts::default();
        self.blocks().for_each(|block| sum.add(&block.accept_wait));
        sum
    }
}

impl MethodTotals {
    fn add(&mut self, block: &Block, place: usize, calls: u64) {
        let cells = &block.methods[place];
        self.calls = self.calls.wrapping_add(calls);
        for (code, sums) in self.errors.iter_mut().enumerate() {
            for (started, sum) in sums.iter_mut().enumerate() {
                let errors = cells.errors[code + CODES * started].load(Relaxed);
                *sum = sum.wrapping_add(errors);
            }
        }
        self.duration.add(&cells.duration);
        self.queue.add(&cells.queue);
        self.longest_ns = self.longest_ns.max(cells.longest_ns.load(Relaxed));
    }
}
