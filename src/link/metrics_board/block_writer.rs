//! Adds to the counters of a block, and to those of the header.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed, Ordering::Release, fence};

use super::grid::bucket_of;
use super::layout::{Block, CODES, HistogramCells};

/// A writer of one block.
#[derive(Debug, Clone, Copy)]
pub struct BlockWriter {
    pub block: &'static Block,
    /// Whether others write to the same block: an acceptor and its sessions do. An atomic addition costs
    /// 20 times as much as a load and a store.
    is_shared: bool,
}

impl BlockWriter {
    pub fn new(block: &'static Block, is_shared: bool) -> Self {
        BlockWriter { block, is_shared }
    }

    /// Adds to a counter of the block.
    #[inline]
    pub fn add(&self, counter: &AtomicU64, more: u64) {
        if cfg!(preforkd_uncounted) {
            return;
        }
        if self.is_shared {
            counter.fetch_add(more, Relaxed);
        } else {
            count(counter, more);
        }
    }

    /// Counts calls of a method. Call it after their other counts are added: a reader that finds no further call does
    /// not read the others again.
    #[inline]
    pub fn count_calls(&self, place: usize, calls: u64) {
        fence(Release);
        self.add(&self.block.calls[place], calls);
    }

    /// Adds `count` values of `ns` nanoseconds to a histogram of the block.
    #[inline]
    pub fn observe(&self, cells: &HistogramCells, ns: u64, count: u64) {
        if cfg!(preforkd_uncounted) {
            return;
        }
        self.add(&cells.counts[bucket_of(ns)], count);
        self.add(&cells.sum_ns, ns.wrapping_mul(count));
    }

    /// Raises the longest duration of a method.
    #[inline]
    pub fn raise(&self, longest_ns: &AtomicU64, ns: u64) {
        if cfg!(preforkd_uncounted) || longest_ns.load(Relaxed) >= ns {
            return;
        }
        if self.is_shared {
            longest_ns.fetch_max(ns, Relaxed);
        } else {
            longest_ns.store(ns, Relaxed);
        }
    }

    /// Counts the error of a call. `code` is the place of its code.
    #[cold]
    pub fn count_error(&self, method: usize, code: usize, started: bool) {
        let errors = &self.block.methods[method].errors;
        self.add(&errors[code + CODES * usize::from(started)], 1);
    }
}

/// Adds to a counter that only this process writes.
#[inline]
pub fn count(counter: &AtomicU64, more: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(more), Relaxed);
}
