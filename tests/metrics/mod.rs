//! Checks what the metrics say: their format, their figures, and that no counter ever falls.

mod board;
mod counters;
mod exposition;
mod pages;
mod prometheus;
mod sessions;
mod tools;

use std::collections::BTreeMap;

use crate::support::{Daemon, PATIENCE, wait_for};

/// Samples by name and labels, as they are written.
type Samples = BTreeMap<String, f64>;

/// Returns the metrics of a daemon as text.
#[track_caller]
fn text(daemon: &Daemon) -> String {
    let done = daemon.command(&["metrics"]);
    assert!(done.status.success(), "{done:?}\n{}", daemon.log());
    assert!(done.stderr.is_empty(), "{done:?}");
    String::from_utf8(done.stdout).unwrap()
}

/// Parses the samples of a text.
#[track_caller]
fn samples(text: &str) -> Samples {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let sample = |line: &str| {
        let (name, value) = line.rsplit_once(' ').unwrap();
        (name.to_owned(), value.parse().unwrap())
    };
    lines.map(sample).collect()
}

/// Returns the samples of a daemon.
#[track_caller]
fn scrape(daemon: &Daemon) -> Samples {
    samples(&text(daemon))
}

/// Returns one sample; its name has no prefix.
#[track_caller]
fn value(samples: &Samples, name: &str) -> f64 {
    let found = samples.get(&format!("preforkd_{name}"));
    *found.unwrap_or_else(|| panic!("no {name} in {samples:#?}"))
}

/// Returns the sum of all samples of a metric.
fn sum(samples: &Samples, name: &str) -> f64 {
    let start = format!("preforkd_{name}");
    let is_one = |(key, _): &(&String, &f64)| {
        let rest = key.strip_prefix(&start);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('{'))
    };
    samples.iter().filter(is_one).map(|(_, value)| value).sum()
}

/// Waits until a sample has a value.
#[track_caller]
fn wait_value(daemon: &Daemon, name: &str, wanted: f64) {
    wait_for(&format!("{name} {wanted}"), PATIENCE, || {
        value(&scrape(daemon), name) == wanted
    });
}

/// Checks that no counter is lower in `after` than in `before`, or has gone.
#[track_caller]
fn assert_no_decrease(before: &Samples, after: &Samples) {
    let is_counter = |name: &str| {
        let name = name.split('{').next().unwrap_or_default();
        ["_total", "_bucket", "_count", "_sum"]
            .iter()
            .any(|end| name.ends_with(end))
    };
    for (name, old) in before.iter().filter(|(name, _)| is_counter(name)) {
        let new = after.get(name);
        assert!(
            new.is_some_and(|new| new >= old),
            "{name}: {old}, then {new:?}"
        );
    }
}
