//! Checks that the steps of `resolve` share: bounds, words, paths.
//!
//! Each error is at the position of its key and says which values are valid.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::address::{Address, absolute_address};
use super::environment::{Environment, clean};
use super::keys::{Integer, Lifetime, RespawnDelay, Time, Word, WorkerMemory};
use super::overrides::Overrides;
use super::raw::Count;
use super::remedies::nearest;
use super::source_map::{SourceMap, join};
use super::units::{ByteSize, DurationValue};
use crate::error::{Error, Result};
use crate::sys::account::{Account, AccountError};

/// The shortest duration of keys that cannot be zero.
pub(super) const MILLISECOND: Duration = Duration::from_millis(1);
/// The shortest age at which a process is replaced. With less it would be replaced all the time.
const SHORTEST_LIFETIME: Duration = Duration::from_secs(1);
/// The longest duration.
const LONGEST: Duration = Duration::from_secs(365 * 86_400);

/// What every check needs.
pub(super) struct Check<'a> {
    pub places: &'a SourceMap<'a>,
    pub overrides: &'a Overrides,
    pub here: &'a Environment,
}

impl Check<'_> {
    /// Returns the value of `key` if it is in `range`. `otherwise` is what else is valid.
    pub fn integer<T: TryFrom<i64>>(
        &self,
        key: &str,
        value: i64,
        range: RangeInclusive<i64>,
        otherwise: &str,
    ) -> Result<T> {
        match T::try_from(value) {
            Ok(number) if range.contains(&value) => Ok(number),
            _ => Err(self.places.error(
                key,
                format!("{value} is out of range"),
                format!("give {} to {} {otherwise}", range.start(), range.end()).trim_end(),
            )),
        }
    }

    /// Returns the value of `key` if it is between `least` and a year.
    pub fn duration(&self, key: &str, value: DurationValue, least: Duration) -> Result<Duration> {
        if (least..=LONGEST).contains(&value.0) {
            return Ok(value.0);
        }
        let (least, most) = (DurationValue(least), DurationValue(LONGEST));
        let problem = format!("{value} is out of range");
        let remedy = format!("give {least} to {most}");
        Err(self.places.error(key, problem, remedy))
    }

    /// Returns the value of `key` if it is between `least` and `most`. `otherwise` is what else is valid.
    pub fn size(
        &self,
        key: &str,
        value: ByteSize,
        least: u64,
        most: u64,
        otherwise: &str,
    ) -> Result<u64> {
        if (least..=most).contains(&value.0) {
            return Ok(value.0);
        }
        let (least, most) = (ByteSize(least), ByteSize(most));
        let problem = format!("{value} is out of range");
        let remedy = format!("give {least} to {most}{otherwise}");
        Err(self.places.error(key, problem, remedy))
    }

    /// Returns a number of processes, 1 to 1024. `"auto"` is the number of CPUs.
    pub fn count(&self, key: &str, value: Count) -> Result<usize> {
        match value {
            Count::Number(number) => self.integer(key, number, 1..=1024, "or \"auto\""),
            Count::Auto => Ok(self.here.cpus.clamp(1, 1024)),
        }
    }

    /// Returns the value of `key`, which must be one of the words of its type; `default` if it is not set.
    pub fn word<T: Word>(&self, key: &str, text: Option<&String>, default: T) -> Result<T> {
        let Some(text) = text else { return Ok(default) };
        let words: Vec<&str> = T::WORDS.iter().map(|(word, _)| *word).collect();
        let found = self.choice(key, text, &words)?;
        let known = T::WORDS.iter().find(|(word, _)| *word == found);
        Ok(known.map_or(default, |(_, value)| *value))
    }

    /// Returns the account of the keys `user` and `group` in the table `key`; `None` if none is set.
    pub fn account(
        &self,
        key: &str,
        user: Option<&String>,
        group: Option<&String>,
    ) -> Result<Option<Account>> {
        let error = |name: &str, problem: String, remedy: &str| {
            Err(self.places.error(&join(key, name), problem, remedy))
        };
        let Some(user) = user else {
            let remedy = "set user beside it, or remove it";
            return match group {
                None => Ok(None),
                Some(_) => error("group", "it is set without a user".into(), remedy),
            };
        };
        Account::lookup(user, group.map(String::as_str))
            .map(Some)
            .or_else(|problem| {
                let (name, remedy) = match problem {
                    AccountError::NoUser(_) => ("user", "create it, or name one that exists"),
                    AccountError::NoGroup(_) => ("group", "create it, or name one that exists"),
                    AccountError::GroupUnknown(_) => ("user", "set group beside it"),
                    AccountError::System(_) => ("user", ""),
                };
                error(name, problem.to_string(), remedy)
            })
    }

    /// Returns the word of `key`, which must be one of `words`.
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

    /// The address of `key`. A path is made absolute by the directory of the file that sets it. An error
    /// suggests this port.
    pub fn address(&self, key: &str, (text, port): (&str, u16)) -> Result<Address> {
        if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            self.path(key, path)?;
        }
        absolute_address((text, port), |path| self.beside(key, path))
            .map_err(|problem| self.places.error(key, problem, ""))
    }

    /// The permission bits of the unix socket at `address`.
    pub fn mode(&self, key: &str, text: &str, address: &Address) -> Result<u32> {
        if !matches!(address, Address::Unix(_)) {
            let problem = format!("{address} is not a unix socket, and only those have a mode");
            return Err(self.places.error(key, problem, "remove it"));
        }
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        match u32::from_str_radix(text, 8) {
            Ok(mode) if digits && mode <= 0o777 => Ok(mode),
            _ => Err(self.places.error(
                key,
                format!("{text:?} is not a mode"),
                "write permission bits in octal, as in \"0660\"",
            )),
        }
    }

    /// Returns the path of `key`; `name` in `directory` if the key is not set.
    pub fn path_or(
        &self,
        key: &str,
        text: Option<&str>,
        directory: &Path,
        name: &str,
    ) -> Result<PathBuf> {
        text.map_or_else(|| Ok(directory.join(name)), |text| self.path(key, text))
    }

    /// Returns the absolute path of a key. A relative path begins at the directory of the file that sets the key.
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
                .error(key, "a path can't have a NUL byte", "remove it"));
        }
        Ok(self.beside(key, Path::new(text)))
    }

    /// Returns the path of a log file. The file is created, but its directory is not: if that is missing, it is
    /// most likely misspelled.
    pub fn log_file(&self, key: &str, text: &str) -> Result<PathBuf> {
        let path = self.path(key, text)?;
        if path.is_dir() {
            let problem = format!("{} is a directory", path.display());
            return Err(self.places.error(key, problem, "name a file in it"));
        }
        match path.parent() {
            Some(parent) if !parent.is_dir() => Err(self.places.error(
                key,
                format!("there is no directory {}", parent.display()),
                "create it, or log elsewhere",
            )),
            _ => Ok(path),
        }
    }

    /// Makes `path` absolute by the directory of the file that sets `key`.
    pub fn beside(&self, key: &str, path: &Path) -> PathBuf {
        let file = self.places.file_of(key);
        let directory = file.and_then(Path::parent).unwrap_or(&self.here.directory);
        clean(&directory.join(path))
    }
}

/// What is written for a key, if it is set.
pub(super) trait KeyValue<T> {
    /// Returns the value of `key`, or its default.
    ///
    /// # Errors
    /// A value that is out of bounds.
    fn value(self, check: &Check<'_>, key: &str) -> Result<T>;
}

impl<T: TryFrom<i64>, const DEFAULT: i64, const LEAST: i64, const MOST: i64> KeyValue<T>
    for Integer<DEFAULT, LEAST, MOST>
{
    fn value(self, check: &Check<'_>, key: &str) -> Result<T> {
        check.integer(key, self.0.unwrap_or(DEFAULT), LEAST..=MOST, "")
    }
}

impl<const DEFAULT: u64, const LEAST: u64> KeyValue<Duration> for Time<DEFAULT, LEAST> {
    fn value(self, check: &Check<'_>, key: &str) -> Result<Duration> {
        let default = DurationValue(Duration::from_millis(DEFAULT));
        let value = self.0.unwrap_or(default);
        check.duration(key, value, Duration::from_millis(LEAST))
    }
}

impl KeyValue<Duration> for Lifetime {
    fn value(self, check: &Check<'_>, key: &str) -> Result<Duration> {
        match self.0 {
            Some(age) if !age.0.is_zero() => check.duration(key, age, SHORTEST_LIFETIME),
            _ => Ok(Duration::ZERO),
        }
    }
}

impl KeyValue<Duration> for RespawnDelay {
    fn value(self, check: &Check<'_>, key: &str) -> Result<Duration> {
        /// It doubles.
        const FIRST: Duration = Duration::from_millis(100);
        let delay = Time::<30_000, 0>(self.0).value(check, key)?;
        if delay.is_zero() || delay >= FIRST {
            return Ok(delay);
        }
        let delay = DurationValue(delay);
        Err(check.places.error(
            key,
            format!("{delay} is shorter than the first delay, 100ms"),
            "give 100ms to 365d, or \"0s\" for no throttle",
        ))
    }
}

impl KeyValue<u64> for WorkerMemory {
    fn value(self, check: &Check<'_>, key: &str) -> Result<u64> {
        match self.0 {
            None | Some(ByteSize(0)) => Ok(0),
            Some(bytes) => check.size(key, bytes, 1 << 20, 1 << 50, ", or \"0\" for no limit"),
        }
    }
}

/// Makes an error about an option of the command line.
pub(super) fn command_line(option: &str, problem: impl Into<String>, remedy: &str) -> Error {
    Error::Config {
        file: None,
        position: None,
        key: option.to_owned(),
        problem: problem.into(),
        remedy: remedy.to_owned(),
    }
}
