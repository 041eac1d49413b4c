//! `[observe]`: where metrics and status are served over HTTP, to whom, and with which histograms.
//!
//! Refuses a bucket that is no bound of the grid on which durations are counted, because its count would
//! not be exact. Refuses an address that a listener has.

use std::path::Path;
use std::time::Duration;

use super::address::Address;
use super::check::Check;
use super::keys::Word;
use super::raw::RawObserve;
use super::units::DurationValue;
use crate::error::Result;

/// The port of the observer in examples.
pub const USUAL_PORT: u16 = 9180;

/// `[observe]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObserveConfig {
    /// Where the observer listens; `None`: there is no observer.
    pub address: Option<Address>,
    /// The permission bits of a unix socket, 0 to 0o777; `None` leaves them to the umask.
    pub mode: Option<u32>,
    /// The names that a `Host` header may have beside IP addresses and `localhost`, in lower case.
    pub hosts: Vec<String>,
    /// The exported histograms of calls, each once.
    pub histograms: Vec<Histogram>,
    /// The upper bounds of exported buckets, ascending, each on the grid; at least one.
    pub buckets: Vec<Duration>,
    /// Whether `/` is the status page.
    pub page: bool,
}

/// A histogram of the calls of each method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Histogram {
    /// From reading a call to writing its answer.
    Duration,
    /// Waiting for a thread or program.
    Queue,
    /// In the handler.
    Run,
}

impl Word for Histogram {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("duration", Histogram::Duration),
        ("queue", Histogram::Queue),
        ("run", Histogram::Run),
    ];
}

/// The default bounds, in microseconds.
const DEFAULT_BUCKETS: [u64; 17] = [
    100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000,
    1_000_000, 2_500_000, 5_000_000, 10_000_000, 30_000_000,
];
/// More would only make the answer longer.
const MAX_BUCKETS: usize = 64;
/// The lowest and the highest bound of the grid, in nanoseconds.
const GRID: (u128, u128) = (10_000, 100_000_000_000);

impl Default for ObserveConfig {
    fn default() -> Self {
        ObserveConfig {
            address: None,
            mode: None,
            hosts: Vec::new(),
            histograms: vec![Histogram::Duration, Histogram::Queue],
            buckets: DEFAULT_BUCKETS.map(Duration::from_micros).to_vec(),
            page: true,
        }
    }
}

impl ObserveConfig {
    /// Returns whether a histogram is exported.
    pub fn exports(&self, histogram: Histogram) -> bool {
        self.histograms.contains(&histogram)
    }

    /// The path of its unix socket.
    pub(super) fn path(&self) -> Option<&Path> {
        match &self.address {
            Some(Address::Unix(path)) => Some(path),
            Some(Address::Tcp(_)) | None => None,
        }
    }

    /// Returns the warning about an address that other machines can reach.
    pub fn warning(&self) -> Option<String> {
        let address = self.address.as_ref().filter(|it| it.is_public())?;
        let hosts = match self.hosts.is_empty() {
            true => {
                "; a request that names this machine by a host name gets 403 unless observe.hosts has that \
                 name"
            }
            false => "",
        };
        Some(format!(
            "observe.address {address} can be reached from other machines, and there is no password: anyone \
             there sees method names, pids, addresses of clients and error texts; use 127.0.0.1 or a unix \
             socket, or use only a network that you trust{hosts}"
        ))
    }

    /// Returns the table as it is written in the file.
    pub(super) fn to_raw(&self) -> RawObserve {
        RawObserve {
            address: self.address.as_ref().map(Address::to_string),
            mode: self.mode.map(|mode| format!("{mode:04o}")),
            hosts: Some(self.hosts.clone()),
            histograms: Some(self.histograms.iter().map(|it| it.word()).collect()),
            buckets: Some(self.buckets.iter().copied().map(DurationValue).collect()),
            page: Some(self.page),
        }
    }
}

/// Returns the warning about a table that starts nothing. `metrics` has the histograms of a table without an
/// address too.
pub(super) fn idle_warning(raw: &RawObserve) -> Option<String> {
    let is_used = raw.address.is_some() || raw.histograms.is_some() || raw.buckets.is_some();
    (!is_used).then(|| {
        format!(
            "[observe] has no address, so no observer is started; add address = \"127.0.0.1:{USUAL_PORT}\", or \
             take the table out"
        )
    })
}

/// Resolves the table.
pub(super) fn resolve(check: &Check<'_>, raw: &RawObserve) -> Result<ObserveConfig> {
    let default = ObserveConfig::default();
    let address = match &raw.address {
        Some(text) => Some(check.address("observe.address", (text, USUAL_PORT))?),
        None => None,
    };
    let mode = match (&raw.mode, &address) {
        (None, _) => None,
        (Some(text), Some(address)) => Some(check.mode("observe.mode", text, address)?),
        (Some(_), None) => {
            let remedy = "set observe.address to a unix socket, or take mode out";
            return Err(check
                .places
                .error("observe.mode", "there is no observe.address", remedy));
        }
    };
    Ok(ObserveConfig {
        address,
        mode,
        hosts: match &raw.hosts {
            None => default.hosts,
            Some(hosts) => self::hosts(check, hosts)?,
        },
        histograms: match &raw.histograms {
            None => default.histograms,
            Some(words) => histograms(check, words)?,
        },
        buckets: match &raw.buckets {
            None => default.buckets,
            Some(bounds) => buckets(check, bounds)?,
        },
        page: raw.page.unwrap_or(default.page),
    })
}

/// Refuses an address that the listeners have, or that could not be bound beside theirs.
pub(super) fn refuse_collisions<'a>(
    check: &Check<'_>,
    observe: &ObserveConfig,
    mut listen: impl Iterator<Item = &'a Address>,
) -> Result<()> {
    let Some(address) = &observe.address else {
        return Ok(());
    };
    let has_port = |it: &Address| matches!(it, Address::Unix(_)) || !it.to_string().ends_with(":0");
    let collides =
        |other: &&Address| *other == address && has_port(other) || other.is_in_the_way_of(address);
    match listen.find(collides) {
        None => Ok(()),
        Some(other) => Err(check.places.error(
            "observe.address",
            format!("{address} can't be bound beside the listener {other}"),
            "give the observer a port or path of its own, such as \"127.0.0.1:9180\"",
        )),
    }
}

/// Names without port, in lower case.
fn hosts(check: &Check<'_>, hosts: &[String]) -> Result<Vec<String>> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    let mut names = Vec::new();
    for (index, host) in hosts.iter().enumerate() {
        if !(1..=253).contains(&host.len()) || !host.bytes().all(is_plain) {
            return Err(check.places.error(
                &format!("observe.hosts[{index}]"),
                format!("{host:?} is not a host name"),
                "write the name alone, without scheme and port, such as \"node1.example.com\"; IP \
                 addresses and localhost are always accepted",
            ));
        }
        names.push(host.to_ascii_lowercase());
    }
    Ok(names)
}

fn histograms(check: &Check<'_>, words: &[String]) -> Result<Vec<Histogram>> {
    let mut found = Vec::new();
    for (index, word) in words.iter().enumerate() {
        let key = format!("observe.histograms[{index}]");
        let histogram = check.word(&key, Some(word), Histogram::Duration)?;
        if found.contains(&histogram) {
            let problem = format!("{word:?} is there twice");
            return Err(check.places.error(&key, problem, "keep one of the two"));
        }
        found.push(histogram);
    }
    Ok(found)
}

fn buckets(check: &Check<'_>, bounds: &[DurationValue]) -> Result<Vec<Duration>> {
    if !(1..=MAX_BUCKETS).contains(&bounds.len()) {
        let problem = format!("{} bounds are out of range", bounds.len());
        let remedy = format!("give 1 to {MAX_BUCKETS}, or take the key out for the default");
        return Err(check.places.error("observe.buckets", problem, remedy));
    }
    let mut before = Duration::ZERO;
    for (index, &DurationValue(bound)) in bounds.iter().enumerate() {
        let error = |problem: &str, remedy: String| {
            let text = format!("{} {problem}", DurationValue(bound));
            let key = format!("observe.buckets[{index}]");
            Err(check.places.error(&key, text, remedy))
        };
        if let Some((below, above)) = beside_grid(bound) {
            let (below, above) = (DurationValue(below), DurationValue(above));
            let nearest = match below == above {
                true => below.to_string(),
                false => format!("{below} or {above}"),
            };
            let remedy = format!("take {nearest}, so that its count is exact");
            return error("is not a bound on which durations are counted", remedy);
        }
        if bound <= before {
            return error("is not above the bound before it", "sort them".into());
        }
        before = bound;
    }
    Ok(bounds.iter().map(|&DurationValue(bound)| bound).collect())
}

/// Returns the bounds of the grid around a duration; `None` if it is a bound itself. The grid has 36 bounds
/// per decade from 10 µs to 100 s: 1.0, 1.25, 1.5, ….
fn beside_grid(bound: Duration) -> Option<(Duration, Duration)> {
    let (lowest, highest) = GRID;
    let nanoseconds = bound.as_nanos();
    let inside = nanoseconds.clamp(lowest, highest);
    let mut step = lowest / 4;
    while inside >= step * 40 {
        step *= 10;
    }
    if inside == nanoseconds && inside.is_multiple_of(step) {
        return None;
    }
    let below = inside / step * step;
    let above = if inside == nanoseconds {
        below + step
    } else {
        below
    };
    let duration = |nanoseconds: u128| {
        Duration::from_nanos(u64::try_from(nanoseconds.min(highest)).unwrap_or(u64::MAX))
    };
    Some((duration(below), duration(above)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::config::tests::{root, settings};

    #[test]
    fn the_grid_has_36_bounds_per_decade() {
        let count = |decade: u64| {
            let steps = 0..36 * decade;
            let bounds = steps.map(|step| 10_000 * decade + 2_500 * step);
            let on_grid = |&bound: &u64| beside_grid(Duration::from_nanos(bound)).is_none();
            bounds.filter(on_grid).count()
        };
        assert_eq!(count(1), 36);
        assert_eq!(count(10), 36);
        for bound in ObserveConfig::default().buckets {
            assert_eq!(beside_grid(bound), None, "{bound:?}");
        }
        let of = |nanoseconds| beside_grid(Duration::from_nanos(nanoseconds));
        let around =
            |below, above| Some((Duration::from_nanos(below), Duration::from_nanos(above)));
        assert_eq!(of(10_000), None);
        assert_eq!(of(9_999), around(10_000, 10_000));
        assert_eq!(of(12_000), around(10_000, 12_500));
        assert_eq!(of(99_000), around(97_500, 100_000));
        assert_eq!(of(100_000_000_000), None);
        assert_eq!(
            of(100_000_000_001),
            around(100_000_000_000, 100_000_000_000)
        );
    }

    #[test]
    fn an_address_that_others_can_reach_is_warned_of_with_hosts() {
        let warnings = |text: &str| settings(&root(), text).unwrap().warnings;
        let about = |text: &str| {
            let all = warnings(text);
            all.into_iter().find(|it| it.starts_with("observe.address"))
        };
        assert_eq!(about("[observe]\naddress = '127.0.0.1:9180'"), None);
        assert_eq!(about("[observe]\naddress = 'unix:/x'\nmode = '0660'"), None);
        let public = about("[observe]\naddress = '0.0.0.0:9180'").unwrap();
        assert!(public.contains("observe.hosts"), "{public}");
        let named = about("[observe]\naddress = '[::]:9180'\nhosts = ['Node1']").unwrap();
        assert!(!named.contains("observe.hosts"), "{named}");
    }

    #[test]
    fn a_table_without_an_address_is_warned_of() {
        for (text, is_told) in [
            ("", false),
            ("[observe]", true),
            ("[observe]\nhosts = ['node1']", true),
            ("[observe]\nhistograms = ['run']", false),
            ("[observe]\naddress = '127.0.0.1:9180'", false),
        ] {
            let warnings = settings(&root(), text).unwrap().warnings;
            let told = warnings
                .iter()
                .any(|it| it.contains("no observer is started"));
            assert_eq!(told, is_told, "{text}: {warnings:?}");
        }
    }

    #[test]
    fn an_address_without_a_port_gets_the_one_of_the_observer() {
        let fault = settings(&root(), "observe.address = '127.0.0.1'").unwrap_err();
        assert!(fault.to_string().contains("\"127.0.0.1:9180\""), "{fault}");
    }

    #[test]
    fn names_of_hosts_are_compared_in_lower_case() {
        let found = settings(&root(), "observe.hosts = ['Node1.Example.COM']").unwrap();
        assert_eq!(found.observe.hosts, ["node1.example.com"]);
    }
}
