//! `[slow-log]`: from which run time on a call is recorded, and how much of it.
//!
//! Without the table there is no slow log, and `slow` of a method is refused, because it would have no effect.

use std::time::Duration;

use super::check::{Check, KeyValue, MILLISECOND};
use super::keys::{Integer, Time, Word};
use super::methods::Methods;
use super::raw::{Raw, RawMethod, RawSlowLog};
use super::source_map::join;
use super::units::DurationValue;
use crate::error::Result;

/// `[slow-log]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlowLogConfig {
    /// The run time from which on a call is slow, at least 1 ms; zero: only methods with a threshold of their
    /// own.
    pub threshold: Duration,
    /// The bytes of params in a record, 0 to 4096.
    pub params: usize,
    /// The records per second and worker, 1 to 10,000.
    pub lines: usize,
}

/// A signal for the programs of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum StackSignal {
    Usr1,
    Usr2,
}

impl Word for StackSignal {
    const WORDS: &'static [(&'static str, Self)] =
        &[("USR1", StackSignal::Usr1), ("USR2", StackSignal::Usr2)];
}

impl StackSignal {
    /// The name of the signal, as in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            StackSignal::Usr1 => "USR1",
            StackSignal::Usr2 => "USR2",
        }
    }
}

impl SlowLogConfig {
    /// Returns the table as it is written in the file.
    pub(super) fn to_raw(&self) -> RawSlowLog {
        RawSlowLog {
            threshold: Time(Some(DurationValue(self.threshold))),
            params: Integer::of(self.params),
            lines: Integer::of(self.lines),
        }
    }
}

/// Resolves the table, and sets the thresholds of methods.
pub(super) fn resolve(
    check: &Check<'_>,
    raw: &Raw,
    methods: &mut Methods,
) -> Result<Option<SlowLogConfig>> {
    let table = match &raw.slow_log {
        None => None,
        Some(table) => Some(SlowLogConfig {
            threshold: (table.threshold).value(check, "slow-log.threshold")?,
            params: table.params.value(check, "slow-log.params")?,
            lines: table.lines.value(check, "slow-log.lines")?,
        }),
    };
    for (name, raw) in &raw.methods {
        let slow = own_threshold(check, &join(&join("methods", name), "slow"), raw)?;
        if let Some(method) = methods.get_mut(name) {
            method.slow = slow;
        }
        if slow.is_some() && table.is_none() {
            return Err(check.places.error(
                &join(&join("methods", name), "slow"),
                "there is no [slow-log], so it has no effect",
                "add the table [slow-log], or take slow out",
            ));
        }
    }
    Ok(table)
}

fn own_threshold(check: &Check<'_>, key: &str, raw: &RawMethod) -> Result<Option<Duration>> {
    let slow = raw.slow.map(|slow| check.duration(key, slow, MILLISECOND));
    slow.transpose()
}
