//! Counts the calls of a load by their result, and records latencies.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;

use crate::error::{Error, Result};

/// The longest latency that is recorded exactly, in nanoseconds: an hour.
const LONGEST: u64 = 3_600_000_000_000;

#[derive(Debug, Clone)]
pub(super) struct BenchTotals {
    pub(super) sent: u64,
    /// Calls with a result.
    pub(super) ok: u64,
    /// Calls with an error, by the name of its code.
    pub(super) errors: BTreeMap<String, u64>,
    /// Calls without an answer, by the reason.
    pub(super) unanswered: BTreeMap<&'static str, u64>,
    /// Calls that were due but not sent, because no connection had room.
    pub(super) not_sent: u64,
    /// The number of times that a connection was opened again.
    pub(super) reconnects: u64,
    /// The time from the beginning to the last answer, in nanoseconds.
    pub(super) elapsed: u64,
    /// The latency of every answer in nanoseconds. In an open loop it counts from when the call was due.
    pub(super) latencies: Histogram<u64>,
}

impl BenchTotals {
    pub(super) fn new() -> Result<Self> {
        let latencies = Histogram::new_with_bounds(100, LONGEST, 3)
            .map_err(|error| Error::Bug(format!("no histogram: {error}")))?;
        Ok(BenchTotals {
            sent: 0,
            ok: 0,
            errors: BTreeMap::new(),
            unanswered: BTreeMap::new(),
            not_sent: 0,
            reconnects: 0,
            elapsed: 0,
            latencies,
        })
    }

    /// Counts an error with this name.
    #[cold]
    pub(super) fn error(&mut self, name: String) {
        *self.errors.entry(name).or_default() += 1;
    }

    /// Counts calls without an answer.
    pub(super) fn lose(&mut self, reason: &'static str, calls: usize) {
        if calls > 0 {
            *self.unanswered.entry(reason).or_default() += calls as u64;
        }
    }

    /// Adds the counts of another thread.
    pub(super) fn add(&mut self, other: &BenchTotals) -> Result<()> {
        self.sent += other.sent;
        self.ok += other.ok;
        self.not_sent += other.not_sent;
        self.reconnects += other.reconnects;
        self.elapsed = self.elapsed.max(other.elapsed);
        for (name, count) in &other.errors {
            *self.errors.entry(name.clone()).or_default() += count;
        }
        for (reason, count) in &other.unanswered {
            *self.unanswered.entry(reason).or_default() += count;
        }
        self.latencies
            .add(&other.latencies)
            .map_err(|error| Error::Bug(format!("could not add two histograms: {error}")))
    }

    /// Returns the number of calls that were answered with an error.
    pub(super) fn refused(&self) -> u64 {
        self.errors.values().sum()
    }

    /// Returns the number of calls that got no answer or were not sent.
    pub(super) fn lost(&self) -> u64 {
        self.unanswered.values().sum::<u64>() + self.not_sent
    }
}
