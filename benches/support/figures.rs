//! Evaluates the figures of several rounds, and formats a run.

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
