//! Evaluates the figures of several rounds, and formats a run.

use super::Failure;
use super::load::Outcome;

/// Returns the middle figure, or the mean of the two in the middle; NaN if there is none.
pub fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => sorted[middle],
        _ => (sorted[middle - 1] + sorted[middle]) / 2.0,
    }
}

/// Returns a quantile of the figures (nearest rank); NaN if there is none. `share` is 0 to 1.
pub fn quantile(figures: &[f64], share: f64) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied().unwrap_or(f64::NAN)
}

/// The bars that were missed.
#[derive(Default)]
pub struct MissedBars(Vec<String>);

impl MissedBars {
    /// Prints a figure with its bar, and records it if it is above.
    #[allow(clippy::print_stdout)]
    pub fn check(&mut self, what: &str, value: f64, bar: f64) {
        let is_missed = value.is_nan() || value > bar;
        let mark = if is_missed { ", missed" } else { "" };
        println!("{what}: {value:.3} (bar {bar}{mark})");
        if is_missed {
            self.0.push(what.trim().to_owned());
        }
    }

    /// Does the same with a figure that must be at least `bar`.
    #[allow(clippy::print_stdout)]
    pub fn check_least(&mut self, what: &str, value: f64, bar: f64) {
        let is_missed = value.is_nan() || value < bar;
        let mark = if is_missed { ", missed" } else { "" };
        println!("{what}: {value:.3} (bar: at least {bar}{mark})");
        if is_missed {
            self.0.push(what.trim().to_owned());
        }
    }

    /// Fails if `fails` is set and a bar was missed.
    pub fn end(self, fails: bool) -> Result<(), Failure> {
        match fails && !self.0.is_empty() {
            true => Err(format!("missed: {}", self.0.join(", ")).into()),
            false => Ok(()),
        }
    }
}

/// Formats a run in one line.
pub fn line(outcome: &Outcome) -> String {
    let Outcome {
        calls,
        elapsed,
        latencies,
    } = outcome;
    let micros = |nanos: u64| nanos as f64 / 1e3;
    format!(
        "{calls} calls, {:.0} calls/s, p50 {:.0} us, p99 {:.0} us, max {:.0} us",
        *calls as f64 / elapsed.as_secs_f64(),
        micros(latencies.value_at_quantile(0.50)),
        micros(latencies.value_at_quantile(0.99)),
        micros(latencies.max()),
    )
}
