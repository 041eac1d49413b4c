//! The values of single keys as they are written. The type of a key has its default and its bounds.
//!
//! A value out of bounds is no error of serde: [`super::check::KeyValue`] reports it at the position of its
//! key.

use log::{Level, LevelFilter};
use serde::{Deserialize, Serialize};

use super::units::{ByteSize, DurationValue};

/// An integer with its default, its least and its greatest value.
#[derive(Debug, Clone, Copy, Default, Deserialize, Serialize)]
#[serde(transparent)]
pub(super) struct Integer<const DEFAULT: i64, const LEAST: i64, const MOST: i64>(pub Option<i64>);

impl<const DEFAULT: i64, const LEAST: i64, const MOST: i64> Integer<DEFAULT, LEAST, MOST> {
    /// Returns the key with this value, which is within the bounds.
    pub(super) fn of(value: impl TryInto<i64>) -> Self {
        Integer(value.try_into().ok())
    }
}

/// A duration with its default and its least value, both in milliseconds. The greatest is a year.
#[derive(Debug, Clone, Copy, Default, Deserialize, Serialize)]
#[serde(transparent)]
pub(super) struct Time<const DEFAULT: u64, const LEAST: u64>(pub Option<DurationValue>);

/// The age at which a process is replaced: a second at least, or zero for never, which is the default.
#[derive(Debug, Clone, Copy, Default, Deserialize, Serialize)]
#[serde(transparent)]
pub(super) struct Lifetime(pub Option<DurationValue>);

/// The longest delay between respawns: zero for no throttle, or at least the first delay.
#[derive(Debug, Clone, Copy, Default, Deserialize, Serialize)]
#[serde(transparent)]
pub(super) struct RespawnDelay(pub Option<DurationValue>);

/// `max-memory` of workers. Zero, the default, means no limit. A limit below the memory of a new worker would
/// recycle without an end.
#[derive(Debug, Clone, Copy, Default, Deserialize, Serialize)]
#[serde(transparent)]
pub(super) struct WorkerMemory(pub Option<ByteSize>);

/// A value that is written as one of some words.
pub(super) trait Word: Copy + PartialEq + 'static {
    const WORDS: &'static [(&'static str, Self)];

    fn word(self) -> String {
        let mut words = Self::WORDS.iter();
        let own = words.find(|(_, value)| *value == self);
        own.map_or_else(String::new, |(word, _)| (*word).to_owned())
    }
}

impl Word for LevelFilter {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("off", LevelFilter::Off),
        ("error", LevelFilter::Error),
        ("warn", LevelFilter::Warn),
        ("info", LevelFilter::Info),
        ("debug", LevelFilter::Debug),
        ("trace", LevelFilter::Trace),
    ];
}

impl Word for Level {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("error", Level::Error),
        ("warn", Level::Warn),
        ("info", Level::Info),
        ("debug", Level::Debug),
        ("trace", Level::Trace),
    ];
}
