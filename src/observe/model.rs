//! Turns readings of the counters into rates, quantiles and the history of the last 300 s.
//!
//! Pure: the caller reads the board once per second and passes the time. Each reading is compared with the
//! one before. Nothing is recorded until a request asks, and recording stops 300 s after the last request.
//! Only buckets that have counted something are kept, so the history of an idle method takes no memory.

use std::collections::VecDeque;
use std::mem;

use serde::Serialize;
use serde_json::{Map, Value};

use super::board_figures::codes;
use super::process_rates::{
    PoolProgramCounts, ProcessCounts, ProcessRate, ProcessRates, SlotCpu, per_second,
};
use crate::link::metrics_board::grid::{BOUNDS, bound_ns, quantile_ns};
use crate::link::metrics_board::{HistogramCounts, MethodTotals};
use crate::protocol::Code;

/// Readings that are kept.
const KEPT: usize = 300;
/// Readings that `rates` shows the calls of.
const RECENT: usize = 60;
/// How long recording continues after a request, in milliseconds.
const USED_FOR_MS: u64 = 300_000;

/// All counters at one time.
#[derive(Debug, Clone, Default)]
pub struct Reading {
    pub methods: Vec<MethodTotals>,
    /// Connections in the accept queues; `None` without a recent answer of the master.
    pub accept_queue: Option<u64>,
    /// The CPU time of each slot in nanoseconds.
    pub cpu_ns: Vec<u64>,
    pub pools: Vec<PoolProgramCounts>,
    /// The counts in the master's last answer.
    pub processes: Option<ProcessCounts>,
}

/// What happened between two readings.
#[derive(Debug, Clone, Default)]
struct Step {
    /// Seconds since 1970.
    at: u64,
    interval_ms: u64,
    accept_queue: Option<u64>,
    /// The methods that had a call.
    methods: Vec<MethodStep>,
}

#[derive(Debug, Clone, Default)]
struct MethodStep {
    /// The index of the method.
    index: usize,
    calls: u64,
    /// The number of errors by the place of their code.
    errors: Vec<(usize, u64)>,
    /// Calls that were refused before they began (docs/operations.md, "Terms").
    shed: u64,
    /// Counts by bucket, ascending.
    buckets: Vec<(usize, u64)>,
}

/// Figures of a period for one method, or for all methods together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Rates {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    pub calls_per_s: f64,
    /// By the name of the code.
    pub errors: Map<String, Value>,
    pub shed_per_s: f64,
    pub p50_us: Option<u64>,
    pub p99_us: Option<u64>,
    pub max_us: Option<u64>,
    /// The calls of each of the last 60 intervals, the latest last.
    pub recent_calls: Vec<u64>,
}

/// The rates of the last interval.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AllRates {
    /// 0 before the second reading.
    pub interval_ms: u64,
    pub total: Rates,
    pub methods: Vec<Rates>,
    /// Workers and pool processes, between the last two answers of the master.
    pub processes: Vec<ProcessRate>,
    /// The slots of workers, over the last 5 s.
    pub slots: Vec<SlotCpu>,
    /// The programs of pools, since the start of the master.
    pub pools: Vec<PoolProgramCounts>,
}

/// One second of the history.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Second {
    /// Seconds since 1970.
    pub at: u64,
    pub interval_ms: u64,
    pub calls: u64,
    pub errors: u64,
    pub shed: u64,
    pub accept_queue: Option<u64>,
    /// The upper bound in microseconds (null: none) and the count of each bucket that is not empty.
    pub buckets: Vec<(Option<u64>, u64)>,
}

#[derive(Debug)]
pub struct Model {
    /// The shortest time between two readings. Milliseconds.
    pub interval_ms: u64,
    last: Option<(u64, Reading)>,
    processes: ProcessRates,
    /// The names by index; they only grow, so that an index keeps its meaning.
    names: Vec<String>,
    steps: VecDeque<Step>,
    used_until_ms: u64,
}

impl Model {
    /// Creates a model with this least time between two readings, in milliseconds.
    pub fn new(interval_ms: u64) -> Self {
        Model {
            interval_ms,
            last: None,
            processes: ProcessRates::default(),
            names: Vec::new(),
            steps: VecDeque::new(),
            used_until_ms: 0,
        }
    }

    /// Starts recording, or continues it, because a request asks for figures.
    pub fn use_at(&mut self, now_ms: u64) {
        self.used_until_ms = now_ms + USED_FOR_MS;
    }

    /// Returns when the next reading is due; `None` if none is needed.
    pub fn next_reading_ms(&self, now_ms: u64) -> Option<u64> {
        if now_ms >= self.used_until_ms {
            return None;
        }
        let last = self.last.as_ref();
        Some(last.map_or(now_ms, |(at_ms, _)| at_ms + self.interval_ms))
    }

    /// Forgets everything if there was no request for a long time.
    pub fn expire(&mut self, now_ms: u64) {
        if self.last.is_some() && now_ms >= self.used_until_ms {
            *self = Model::new(self.interval_ms);
        }
    }

    /// Adds a reading. `at` is in seconds since 1970.
    pub fn add(&mut self, mut reading: Reading, now_ms: u64, at: u64) {
        let (cpu_ns, processes) = (mem::take(&mut reading.cpu_ns), reading.processes.take());
        self.processes.add(now_ms, cpu_ns, processes);
        if let Some((before_ms, before)) = &self.last {
            let step = Step {
                at,
                interval_ms: now_ms.saturating_sub(*before_ms).max(1),
                accept_queue: reading.accept_queue,
                methods: method_steps(&mut self.names, &before.methods, &reading.methods),
            };
            self.steps.push_back(step);
            if self.steps.len() > KEPT {
                self.steps.pop_front();
            }
        }
        self.last = Some((now_ms, reading));
    }

    /// Returns the rates of the last interval.
    pub fn rates(&self) -> AllRates {
        let none = Step::default();
        let step = self.steps.back().unwrap_or(&none);
        let methods = self.names.iter().enumerate();
        let pools = self.last.as_ref().map(|(_, reading)| &reading.pools);
        AllRates {
            processes: self.processes.processes(),
            slots: self.processes.slots(),
            pools: pools.cloned().unwrap_or_default(),
            interval_ms: step.interval_ms,
            total: self.rates_of(step, None),
            methods: methods
                .map(|(index, name)| Rates {
                    name: Some(name.clone()),
                    ..self.rates_of(step, Some(index))
                })
                .collect(),
        }
    }

    /// Returns the rates of a method, or of all together, between two readings.
    fn rates_of(&self, step: &Step, index: Option<usize>) -> Rates {
        let first = self.steps.len().saturating_sub(RECENT);
        let recent = self.steps.range(first..);
        Rates {
            recent_calls: recent.map(|step| step.sum(index).calls).collect(),
            ..step.sum(index).rates(step.interval_ms)
        }
    }

    /// Returns the last 300 s of a method, or of all together; `None` if no method of that name had a call.
    pub fn history(&self, method: Option<&str>) -> Option<Vec<Second>> {
        let index = match method {
            None => None,
            Some(name) => Some(self.names.iter().position(|known| known == name)?),
        };
        let second = |step: &Step| {
            let sum = step.sum(index);
            Second {
                at: step.at,
                interval_ms: step.interval_ms,
                calls: sum.calls,
                errors: total(sum.errors.iter().map(|(_, count)| *count)),
                shed: sum.shed,
                accept_queue: step.accept_queue,
                buckets: (sum.buckets.iter())
                    .map(|(bucket, count)| (bound_us(*bucket), *count))
                    .collect(),
            }
        };
        Some(self.steps.iter().map(second).collect())
    }
}

impl Step {
    /// Returns what a method, or all together, counted between two readings.
    fn sum(&self, index: Option<usize>) -> MethodStep {
        let wanted = |method: &&MethodStep| index.is_none_or(|index| index == method.index);
        let methods = self.methods.iter().filter(wanted);
        methods.fold(MethodStep::default(), |sum, method| sum.plus(method))
    }
}

/// Returns the upper bound of a bucket in microseconds; `None` for times above all bounds.
fn bound_us(bucket: usize) -> Option<u64> {
    (bucket < BOUNDS).then(|| bound_ns(bucket) / 1_000)
}

/// Adds counts, which may be garbage.
fn total(counts: impl IntoIterator<Item = u64>) -> u64 {
    counts.into_iter().fold(0, u64::saturating_add)
}

/// Returns what has changed for each method. A counter that has fallen, because it is garbage, counts as unchanged.
fn method_steps(
    names: &mut Vec<String>,
    before: &[MethodTotals],
    after: &[MethodTotals],
) -> Vec<MethodStep> {
    let mut steps = Vec::new();
    for totals in after {
        let none = MethodTotals::default();
        let old = before.iter().find(|old| old.name == totals.name);
        let old = old.unwrap_or(&none);
        let calls = totals.calls.saturating_sub(old.calls);
        if calls == 0 {
            continue;
        }
        let known = names.iter().position(|name| *name == totals.name);
        let index = known.unwrap_or_else(|| {
            names.push(totals.name.clone());
            names.len() - 1
        });
        let grown = |place: usize, started: usize| {
            let count = |totals: &MethodTotals| {
                let counts = totals.errors.get(place);
                counts.map_or(0, |counts| counts[started])
            };
            count(totals).saturating_sub(count(old))
        };
        let both = |place| grown(place, 0).saturating_add(grown(place, 1));
        let errors = codes().map(|(place, _)| (place, both(place)));
        let (overloaded, stopping) = (Code::Overloaded as usize, Code::Stopping as usize);
        let shed = [overloaded, stopping, Code::Timeout as usize].map(|place| grown(place, 0));
        steps.push(MethodStep {
            index,
            calls,
            errors: errors.filter(|(_, count)| *count > 0).collect(),
            shed: total(shed),
            buckets: bucket_steps(&old.duration, &totals.duration),
        });
    }
    steps
}

fn bucket_steps(before: &HistogramCounts, after: &HistogramCounts) -> Vec<(usize, u64)> {
    let pairs = before.counts.iter().zip(&after.counts).enumerate();
    let grown = pairs.map(|(bucket, (before, after))| (bucket, after.saturating_sub(*before)));
    grown.filter(|(_, count)| *count > 0).collect()
}

impl MethodStep {
    fn plus(mut self, other: &MethodStep) -> Self {
        self.calls = self.calls.saturating_add(other.calls);
        self.shed = self.shed.saturating_add(other.shed);
        add_sorted(&mut self.errors, &other.errors);
        add_sorted(&mut self.buckets, &other.buckets);
        self
    }

    fn rates(&self, interval_ms: u64) -> Rates {
        let per_s = |count| per_second(count, interval_ms);
        let mut counts = vec![0; BOUNDS + 1];
        for &(bucket, count) in &self.buckets {
            counts[bucket.min(BOUNDS)] = count;
        }
        let quantile = |share| quantile_ns(&counts, share).map(|ns| ns / 1_000);
        let label = |place: usize| codes().find(|(known, _)| *known == place);
        let errors = self.errors.iter().filter_map(|&(place, count)| {
            Some((label(place)?.1.to_owned(), Value::from(per_s(count))))
        });
        let highest = self.buckets.last();
        let longest = bound_ns(BOUNDS - 1) / 1_000;
        Rates {
            name: None,
            calls_per_s: per_s(self.calls),
            errors: errors.collect(),
            shed_per_s: per_s(self.shed),
            p50_us: quantile(0.5),
            p99_us: quantile(0.99),
            max_us: highest.map(|(bucket, _)| bound_us(*bucket).unwrap_or(longest)),
            recent_calls: Vec::new(),
        }
    }
}

/// Adds sorted counts to sorted counts.
fn add_sorted(sums: &mut Vec<(usize, u64)>, more: &[(usize, u64)]) {
    for &(place, count) in more {
        match sums.binary_search_by_key(&place, |(place, _)| *place) {
            Ok(at) => sums[at].1 = sums[at].1.saturating_add(count),
            Err(at) => sums.insert(at, (place, count)),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::link::metrics_board::grid::bucket_of;
    use crate::link::metrics_board::layout::CODES;

    fn totals(name: &str, calls: u64, duration_ns: u64) -> MethodTotals {
        let mut totals = MethodTotals {
            name: name.into(),
            calls,
            errors: vec![[0; 2]; CODES],
            ..MethodTotals::default()
        };
        totals.duration.counts[bucket_of(duration_ns)] = calls;
        totals
    }

    fn reading(methods: Vec<MethodTotals>) -> Reading {
        Reading {
            methods,
            accept_queue: Some(3),
            ..Reading::default()
        }
    }

    #[test]
    fn rates_are_those_between_the_last_two_readings() {
        let mut model = Model::new(1_000);
        model.use_at(0);
        assert_eq!(model.rates().interval_ms, 0);
        model.add(reading(vec![totals("a", 100, 1_000_000)]), 0, 50);
        let mut after = totals("a", 300, 1_000_000);
        after.errors[Code::Overloaded as usize] = [10, 0];
        model.add(reading(vec![after, totals("b", 4, 50_000)]), 2_000, 52);
        let rates = model.rates();
        assert_eq!((rates.interval_ms, rates.total.calls_per_s), (2_000, 102.0));
        assert_eq!(rates.methods[0].name.as_deref(), Some("a"));
        assert_eq!(rates.methods[0].errors["overloaded"], 5.0);
        assert_eq!(rates.methods[0].shed_per_s, 5.0);
        assert_eq!(rates.methods[0].max_us, Some(1_000));
        assert_eq!(rates.methods[1].p50_us, Some(48));
        assert_eq!(rates.methods[1].recent_calls, [4]);
        let history = model.history(Some("b")).unwrap();
        assert_eq!((history[0].at, history[0].calls), (52, 4));
        assert_eq!(history[0].buckets, [(Some(50), 4)]);
        assert_eq!(model.history(None).unwrap()[0].calls, 204);
        assert_eq!(model.history(Some("c")), None);
    }

    #[test]
    fn recording_stops_300_s_after_the_last_request() {
        let mut model = Model::new(1_000);
        assert_eq!(model.next_reading_ms(5), None);
        model.use_at(10);
        assert_eq!(model.next_reading_ms(10), Some(10));
        model.add(reading(Vec::new()), 10, 0);
        assert_eq!(model.next_reading_ms(11), Some(1_010));
        model.add(reading(Vec::new()), 1_010, 1);
        model.expire(300_009);
        assert_eq!(model.history(None).unwrap().len(), 1);
        model.expire(300_010);
        assert_eq!(model.next_reading_ms(300_010), None);
        assert_eq!(model.history(None).unwrap(), []);
    }

    #[test]
    fn the_history_has_300_readings_and_garbage_breaks_nothing() {
        let mut model = Model::new(1_000);
        for second in 0..400 {
            let calls = if second % 2 == 0 { u64::MAX } else { second };
            model.use_at(second * 1_000);
            let garbage = ["a", "b"].map(|name| {
                let mut garbage = totals(name, calls, u64::MAX);
                garbage.errors.fill([calls; 2]);
                garbage
            });
            model.add(reading(garbage.to_vec()), second * 1_000, second);
        }
        assert_eq!(model.history(Some("a")).unwrap().len(), KEPT);
        let all = model.history(None).unwrap();
        let most = all.iter().map(|second| (second.calls, second.errors)).max();
        assert_eq!(most, Some((u64::MAX, u64::MAX)));
        assert_eq!(model.rates().interval_ms, 1_000);
    }
}
