//! Turns counts of single processes into rates, and the CPU times of slots into percent. Pure.
//!
//! The master's answers have the counts of workers and pool processes. Rates are those between its last two
//! answers. Workers publish their CPU time once per second, so it is compared over 5 s.

use std::collections::{BTreeMap, VecDeque};

use serde::Serialize;

/// The time over which CPU times are compared, in milliseconds.
const CPU_MS: u64 = 5_000;

/// What a worker or a pool process has counted since its start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProcessCount {
    pub pid: i32,
    pub calls: u64,
    /// 0 for a pool process.
    pub errors: u64,
}

/// The counts of an answer of the master.
#[derive(Debug, Clone, Default)]
pub struct ProcessCounts {
    /// When the answer came.
    pub at_ms: u64,
    pub counts: Vec<ProcessCount>,
}

/// The starts and ends of a pool's programs since the start of the master.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct PoolProgramCounts {
    pub name: String,
    pub starts: u64,
    /// By reason; those without an end are left out.
    pub exits: BTreeMap<&'static str, u64>,
}

/// The rates of a worker or a pool process.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ProcessRate {
    pub pid: i32,
    pub calls_per_s: f64,
    pub errors_per_s: f64,
}

/// The CPU time of a slot's workers, in percent of one CPU.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SlotCpu {
    pub slot: usize,
    pub cpu_percent: f64,
}

/// The readings that rates of processes are made of.
#[derive(Debug, Default)]
pub struct ProcessRates {
    before: ProcessCounts,
    last: ProcessCounts,
    /// The times of readings with the CPU time of each slot in nanoseconds.
    cpu_ns: VecDeque<(u64, Vec<u64>)>,
}

impl ProcessRates {
    /// Adds a reading.
    pub fn add(&mut self, now_ms: u64, cpu_ns: Vec<u64>, counts: Option<ProcessCounts>) {
        if let Some(counts) = counts.filter(|counts| counts.at_ms != self.last.at_ms) {
            self.before = std::mem::replace(&mut self.last, counts);
        }
        self.cpu_ns.push_back((now_ms, cpu_ns));
        // Keep one reading that is at least `CPU_MS` old, to compute the rate over that time.
        while self.cpu_ns.len() > 2 && self.cpu_ns[1].0 + CPU_MS <= now_ms {
            self.cpu_ns.pop_front();
        }
    }

    /// Returns the rates of each process that is in the last two answers.
    pub fn processes(&self) -> Vec<ProcessRate> {
        let interval_ms = self.last.at_ms.saturating_sub(self.before.at_ms);
        let old = |pid| self.before.counts.iter().find(|old| old.pid == pid);
        let rate = |count: &ProcessCount| {
            let old = old(count.pid)?;
            let per_s = |new: u64, old: u64| per_second(new.saturating_sub(old), interval_ms);
            Some(ProcessRate {
                pid: count.pid,
                calls_per_s: per_s(count.calls, old.calls),
                errors_per_s: per_s(count.errors, old.errors),
            })
        };
        self.last.counts.iter().filter_map(rate).collect()
    }

    /// Returns the CPU time of each slot.
    pub fn slots(&self) -> Vec<SlotCpu> {
        let (Some((from_ms, from)), Some((to_ms, to))) = (self.cpu_ns.front(), self.cpu_ns.back())
        else {
            return Vec::new();
        };
        let interval_ms = to_ms.saturating_sub(*from_ms);
        let slots = to.iter().enumerate();
        let percent = |(slot, ns): (usize, &u64)| {
            let old = from.get(slot).copied().unwrap_or_default();
            let micros = ns.saturating_sub(old) / 1_000;
            SlotCpu {
                slot,
                // Microseconds per second are millionths of a CPU.
                cpu_percent: (per_second(micros, interval_ms) / 1_000.0).round() / 10.0,
            }
        };
        slots.map(percent).collect()
    }
}

/// Returns a rate per second, rounded to two decimals. More digits would be noise.
pub fn per_second(count: u64, interval_ms: u64) -> f64 {
    match interval_ms {
        0 => 0.0,
        interval_ms => (count as f64 * 100_000.0 / interval_ms as f64).round() / 100.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(at_ms: u64, counts: &[(i32, u64, u64)]) -> Option<ProcessCounts> {
        let counts = counts
            .iter()
            .map(|&(pid, calls, errors)| ProcessCount { pid, calls, errors });
        Some(ProcessCounts {
            at_ms,
            counts: counts.collect(),
        })
    }

    #[test]
    fn a_process_has_rates_if_two_answers_have_it() {
        let mut rates = ProcessRates::default();
        rates.add(1_000, Vec::new(), counts(990, &[(7, 100, 1), (8, 5, 0)]));
        rates.add(2_000, Vec::new(), counts(2_990, &[(7, 300, 2), (9, 5, 0)]));
        // The same answer again, and none.
        rates.add(3_000, Vec::new(), counts(2_990, &[(7, 300, 2), (9, 5, 0)]));
        rates.add(4_000, Vec::new(), None);
        let expected = ProcessRate {
            pid: 7,
            calls_per_s: 100.0,
            errors_per_s: 0.5,
        };
        assert_eq!(rates.processes(), [expected]);
    }

    #[test]
    fn cpu_time_is_compared_over_five_seconds() {
        let mut rates = ProcessRates::default();
        for second in 0..20 {
            // All of a CPU for the first 10 s, then none.
            let ns = 1_000_000_000 * second.min(10);
            rates.add(second * 1_000, vec![0, ns], None);
            let percent = rates.slots()[1].cpu_percent;
            match second {
                1..=10 => assert_eq!(percent, 100.0),
                12 => assert_eq!(percent, 60.0),
                15.. => assert_eq!(percent, 0.0),
                _ => {}
            }
        }
        assert!(rates.cpu_ns.len() <= 7);
        assert_eq!(rates.slots()[0].cpu_percent, 0.0);
    }
}
