//! Formats the result of a load: as text with a histogram, or as JSON. Pure.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::options::BenchOptions;
use super::totals::BenchTotals;
use crate::cli::output::printable;
use crate::cli::table::Style;
use crate::cli::units::{count, plural};
use crate::error::{Error, Result};

const PERCENTILES: [f64; 6] = [50.0, 75.0, 90.0, 99.0, 99.9, 99.99];
/// The widest bar of the histogram, in characters.
const WIDTH: usize = 40;
/// The end of a bar, in eighths of a character.
const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];

/// A load that has ended.
pub(super) struct BenchReport<'a> {
    pub(super) options: &'a BenchOptions,
    pub(super) address: &'a str,
    pub(super) tally: &'a BenchTotals,
    /// The CPU time that the load itself has used.
    pub(super) cpu: Duration,
}

impl BenchReport<'_> {
    fn answered(&self) -> u64 {
        self.tally.ok + self.tally.refused()
    }

    fn seconds(&self) -> f64 {
        self.tally.elapsed as f64 / 1e9
    }

    fn calls_per_second(&self) -> f64 {
        ratio(self.answered() as f64, self.seconds())
    }

    fn calls_per_cpu_second(&self) -> f64 {
        ratio(self.answered() as f64, self.cpu.as_secs_f64())
    }

    /// Returns the error for the exit code, if calls have no result.
    pub(super) fn failure(&self) -> Option<String> {
        let (refused, lost) = (self.tally.refused(), self.tally.lost());
        if refused + lost == 0 {
            return None;
        }
        let all = self.answered() + lost;
        Some(format!(
            "of {}, {} answered with an error and {} not answered",
            plural(all, "call"),
            count(refused),
            count(lost)
        ))
    }

    /// Returns a warning if the load itself was the bottleneck.
    pub(super) fn warning(&self) -> Option<String> {
        let threads = f64::from(self.options.threads);
        let busy = ratio(self.cpu.as_secs_f64(), self.seconds() * threads);
        // The cost of connecting is included, and would be most of a short load.
        (busy > 0.95 && self.seconds() > 1.0 && self.options.rate.is_none()).then(|| {
            format!(
                "the benchmark itself was busy {:.0} % of the time, so the server may be faster; try more --threads",
                busy * 100.0
            )
        })
    }

    /// Formats one object on one line.
    pub(super) fn to_json(&self) -> Result<String> {
        let (options, tally) = (self.options, self.tally);
        let latencies = &tally.latencies;
        let microseconds = |nanos: u64| nanos as f64 / 1e3;
        let mut latency = Map::new();
        latency.insert("min".into(), json!(microseconds(latencies.min())));
        latency.insert("mean".into(), json!(latencies.mean() / 1e3));
        for percentile in PERCENTILES {
            let value = latencies.value_at_percentile(percentile);
            latency.insert(format!("p{percentile}"), json!(microseconds(value)));
        }
        latency.insert("max".into(), json!(microseconds(latencies.max())));
        let histogram: Vec<Value> = self
            .buckets()
            .into_iter()
            .map(|(below, calls)| json!({"below_us": microseconds(below), "calls": calls}))
            .collect();
        let report = json!({
            "method": options.method,
            "address": self.address,
            "dialect": options.dialect.name(),
            "connections": options.connections,
            "depth": options.depth,
            "threads": options.threads,
            "rate": options.rate,
            "elapsed_s": self.seconds(),
            "calls": tally.sent,
            "ok": tally.ok,
            "errors": tally.errors,
            "unanswered": tally.unanswered,
            "not_sent": tally.not_sent,
            "reconnects": tally.reconnects,
            "calls_per_s": self.calls_per_second(),
            "latency_us": latency,
            "histogram": histogram,
            "load": {
                "cpu_s": self.cpu.as_secs_f64(),
                "calls_per_cpu_s": self.calls_per_cpu_second(),
            },
        });
        let mut text = serde_json::to_string(&report)
            .map_err(|error| Error::Bug(format!("a report that is no JSON: {error}")))?;
        text.push('\n');
        Ok(text)
    }

    /// Formats text.
    pub(super) fn to_text(&self, colours: bool) -> String {
        let (options, tally) = (self.options, self.tally);
        let pace = match options.rate {
            Some(rate) => format!("open loop at {} calls/s", count(rate.get())),
            None => "closed loop".into(),
        };
        let mut text = format!(
            "{} at {} ({}): {}, depth {}, {pace}\n\n",
            options.method,
            self.address,
            options.dialect.name(),
            plural(options.connections.get().into(), "connection"),
            options.depth,
        );
        let rate = format!("{} calls/s", count(self.calls_per_second().round() as u64));
        text += &format!(
            "{}   {} in {:.2} s\n",
            Style::Bold.on(&rate, colours),
            plural(self.answered(), "answer"),
            self.seconds()
        );
        text += &format!(
            "load: {:.2} s of CPU time, {} calls per CPU second\n",
            self.cpu.as_secs_f64(),
            count(self.calls_per_cpu_second().round() as u64)
        );
        if !tally.latencies.is_empty() {
            text += &self.percentiles(colours);
            text += &self.picture(colours);
        }
        text += &self.faults(colours);
        text
    }

    fn percentiles(&self, colours: bool) -> String {
        let latencies = &self.tally.latencies;
        let since = if self.options.rate.is_some() {
            " (from when the call was due)"
        } else {
            ""
        };
        let head = Style::Bold.on("latency", colours);
        let mut text = format!("\n{head}{since}\n");
        for percentile in PERCENTILES {
            let name = format!("{percentile} %");
            let value = latencies.value_at_percentile(percentile);
            text += &format!("  {name:>8}  {:>9}\n", time(value));
        }
        text += &format!("  {:>8}  {:>9}\n", "longest", time(latencies.max()));
        text
    }

    /// Draws a bar for each doubling of the latency.
    fn picture(&self, colours: bool) -> String {
        let buckets = self.buckets();
        let most = buckets.iter().map(|(_, calls)| *calls).max().unwrap_or(1);
        let mut text = String::from("\n");
        for (below, calls) in buckets {
            let bar = Style::Cyan.on(&bar(calls, most), colours);
            let line = format!("  < {:>8}  {:>12}  {bar}", time(below), count(calls));
            text += line.trim_end();
            text.push('\n');
        }
        text
    }

    /// Counts the answers below each power of two of microseconds, from the first one with answers to the
    /// last.
    fn buckets(&self) -> Vec<(u64, u64)> {
        let latencies = &self.tally.latencies;
        let mut buckets = Vec::new();
        let mut below = 2_000;
        while below / 2 <= latencies.max() && !latencies.is_empty() {
            let from = if below == 2_000 { 0 } else { below / 2 };
            let calls = latencies.count_between(from, below - 1);
            if calls > 0 || !buckets.is_empty() {
                buckets.push((below, calls));
            }
            below *= 2;
        }
        while buckets.last().is_some_and(|(_, calls)| *calls == 0) {
            buckets.pop();
        }
        buckets
    }

    fn faults(&self, colours: bool) -> String {
        let tally = self.tally;
        let errors = tally
            .errors
            .iter()
            .map(|(name, calls)| (name.as_str(), *calls));
        let lost = tally.unanswered.iter().map(|(name, calls)| (*name, *calls));
        let unsent = (tally.not_sent > 0).then_some(("due, and never sent", tally.not_sent));
        let faults: Vec<(&str, u64)> = errors.chain(lost).chain(unsent).collect();
        if faults.is_empty() {
            return String::new();
        }
        let head = Style::Red.on("without a result", colours);
        let mut text = format!("\n{head}\n");
        for (name, calls) in faults {
            text += &format!("  {:>12}  {}\n", count(calls), printable(name));
        }
        if tally.reconnects > 0 {
            let made = plural(tally.reconnects, "connection");
            text += &format!("  {made} opened again\n");
        }
        text
    }
}

/// Divides; returns 0 if `whole` is 0.
fn ratio(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

/// Formats nanoseconds.
fn time(nanos: u64) -> String {
    match nanos {
        0..1_000_000 => format!("{:.0} us", nanos as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.2} ms", nanos as f64 / 1e6),
        _ => format!("{:.2} s", nanos as f64 / 1e9),
    }
}

/// Draws a bar of `part`, if the widest bar is `whole`.
fn bar(part: u64, whole: u64) -> String {
    let eighths = (u128::from(part) * WIDTH as u128 * 8).div_ceil(u128::from(whole.max(1)));
    let eighths = eighths as usize;
    "█".repeat(eighths / 8) + EIGHTHS[eighths % 8]
}
