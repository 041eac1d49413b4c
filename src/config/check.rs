//! What every part of `resolve` asks: is it in bounds, is it one of these words, which path is it.
//!
//! A refusal stands at its key's place and says which values would do.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::environment::{Environment, clean};
use super::overrides::Overrides;
use super::source_map::{SourceMap, nearest};
use super::units::DurationValue;
use crate::error::{Error, Result};

/// The shortest duration where zero makes no sense.
pub(super) const MILLISECOND: Duration = Duration::from_millis(1);
/// Where the doubling delay of a respawn begins.
const FIRST_RESPAWN_DELAY: Duration = Duration::from_millis(100);
/// The longest duration: what is meant to be longer is meant to be never.
const LONGEST: Duration = Duration::from_secs(365 * 86_400);

/// What every check needs.
pub(super) struct Check<'a> {
    pub places: &'a SourceMap<'a>,
    pub overrides: &'a Overrides,
    pub here: &'a Environment,
}

impl Check<'_> {
    /// The value of `key` if it is within `range`, `default` if there is none.
    pub fn integer<T>(
        &self,
        key: &str,
        value: Option<i64>,
        default: T,
        range: RangeInclusive<i64>,
        otherwise: &str,
    ) -> Result<T>
    where
        T: TryFrom<i64>,
    {
        let Some(value) = value else {
            return Ok(default);
        };
        match T::try_from(value) {
            Ok(number) if range.contains(&value) => Ok(number),
            _ => Err(self.places.error(
                key,
                format!("{value} is out of range"),
                format!("give {} to {} {otherwise}", range.start(), range.end()).trim_end(),
            )),
        }
    }

    /// The value of `key` if it is `least` to a year, `default` if there is none.
    pub fn duration(
        &self,
        key: &str,
        value: Option<DurationValue>,
        default: Duration,
        least: Duration,
    ) -> Result<Duration> {
        let value = value.map_or(default, |DurationValue(value)| value);
        if value >= least && value <= LONGEST {
            return Ok(value);
        }
        let remedy = format!(
            "give {} to {}",
            DurationValue(least),
            DurationValue(LONGEST)
        );
        Err(self.places.error(
            key,
            format!("{} is out of range", DurationValue(value)),
            remedy,
        ))
    }

    /// Where the delay between deaths ends.
    pub fn respawn_max_delay(&self, key: &str, value: Option<DurationValue>) -> Result<Duration> {
        let delay = self.duration(key, value, Duration::from_secs(30), Duration::ZERO)?;
        if delay.is_zero() || delay >= FIRST_RESPAWN_DELAY {
            return Ok(delay);
        }
        let problem = format!(
            "{} is shorter than the first delay, 100ms",
            DurationValue(delay)
        );
        let remedy = format!(
            "give 100ms to {}, or \"0s\" for no throttle",
            DurationValue(LONGEST)
        );
        Err(self.places.error(key, problem, remedy))
    }

    /// The word of `key`, which must be one of `words`.
    pub fn choice(&self, key: &str, value: &str, words: &[&'static str]) -> Result<&'static str> {
        if let Some(word) = words.iter().find(|word| **word == value) {
            return Ok(word);
        }
        let remedy = match nearest(&value.to_ascii_lowercase(), words) {
            Some(near) => format!("did you mean {near:?}? Known are {}", words.join(", ")),
            None => format!("take one of {}", words.join(", ")),
        };
        Err(self
            .places
            .error(key, format!("{value:?} is not known"), remedy))
    }

    /// The path of `key`, `name` in `directory` if there is none.
    pub fn path_or(
        &self,
        key: &str,
        text: Option<&str>,
        directory: &Path,
        name: &str,
    ) -> Result<PathBuf> {
        text.map_or_else(|| Ok(directory.join(name)), |text| self.path(key, text))
    }

    /// A path of the file, absolute by the directory of the file that sets it.
    pub fn path(&self, key: &str, text: &str) -> Result<PathBuf> {
        if text.is_empty() {
            return Err(self.places.error(
                key,
                "the path is empty",
                "give one, or take the key out",
            ));
        }
        if text.contains('\0') {
            return Err(self
                .places
                .error(key, "a path can't have a NUL byte", "take it out"));
        }
        Ok(self.beside(key, Path::new(text)))
    }

    /// `path` made absolute by the directory of the file that sets `key`.
    pub fn beside(&self, key: &str, path: &Path) -> PathBuf {
        let file = self.places.file_of(key);
        let directory = file.and_then(Path::parent).unwrap_or(&self.here.directory);
        clean(&directory.join(path))
    }
}

/// An error about an option of the command line.
pub(super) fn command_line(option: &str, problem: impl Into<String>, remedy: &str) -> Error {
    Error::Config {
        file: None,
        position: None,
        key: option.to_owned(),
        problem: problem.into(),
        remedy: remedy.to_owned(),
    }
}
