//! Reads and writes durations and sizes: "30s", "16MiB".
//!
//! Each is written as one whole number, which is read as the same value.
//! Bounds are checked elsewhere. The error for another text says how to write one.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DurationValue(pub Duration);

/// A size in the file, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ByteSize(pub u64);

impl DurationValue {
    fn parse(text: &str) -> Result<Self, String> {
        if text.trim_start().starts_with('-') {
            return Err(format!(
                "{text:?} is negative; give a duration of 0s or more"
            ));
        }
        humantime::parse_duration(text)
            .map(DurationValue)
            .map_err(|problem| {
                format!(
                    "{text:?} is not a duration ({problem}); write it as in \"30s\" or \"1m 30s\""
                )
            })
    }
}

impl fmt::Display for DurationValue {
    /// Writes one number in the largest unit in which it is whole, and above seconds at least 2.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SECOND: u128 = 1_000_000_000;
        const UNITS: [(u128, &str); 7] = [
            (86_400 * SECOND, "d"),
            (3_600 * SECOND, "h"),
            (60 * SECOND, "m"),
            (SECOND, "s"),
            (SECOND / 1_000, "ms"),
            (SECOND / 1_000_000, "us"),
            (1, "ns"),
        ];
        let nanoseconds = self.0.as_nanos();
        if nanoseconds == 0 {
            return f.write_str("0s");
        }
        // 90s and 60s are easier to read than 1m 30s and 1m.
        let fitting = UNITS
            .iter()
            .filter(|(unit, _)| nanoseconds / unit >= 2 || *unit <= SECOND)
            .find(|(unit, _)| nanoseconds.is_multiple_of(*unit));
        let (unit, suffix) = fitting.unwrap_or(&(1, "ns"));
        write!(f, "{}{suffix}", nanoseconds / unit)
    }
}

impl ByteSize {
    fn parse(text: &str) -> Result<Self, String> {
        if text.trim_start().starts_with('-') {
            return Err(format!("{text:?} is negative; give a size of 0 or more"));
        }
        text.trim()
            .parse::<bytesize::ByteSize>()
            .map(|size| ByteSize(size.as_u64()))
            .map_err(|_| {
                format!(
                    "{text:?} is not a size; write bytes as in \"65536\", or a unit as in \"16MiB\""
                )
            })
    }
}

impl fmt::Display for ByteSize {
    /// Writes one number in the largest binary unit in which it is whole.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, suffix) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
            if self.0 != 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{}{suffix}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

/// The common part of both visitors for serde: it accepts a string, and its error says how to write one.
struct Text<T> {
    expecting: &'static str,
    parse: fn(&str) -> Result<T, String>,
}

impl<T> de::Visitor<'_> for Text<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expecting)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        (self.parse)(text).map_err(E::custom)
    }
}

impl<'de> Deserialize<'de> for DurationValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(Text {
            expecting: "a duration such as \"30s\"",
            parse: DurationValue::parse,
        })
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(Text {
            expecting: "a size such as \"16MiB\"",
            parse: ByteSize::parse,
        })
    }
}

impl Serialize for DurationValue {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn durations_read_and_write() {
        for (text, milliseconds, written) in [
            ("0s", 0, "0s"),
            ("30s", 30_000, "30s"),
            ("1m 30s", 90_000, "90s"),
            ("1m", 60_000, "60s"),
            ("10m", 600_000, "10m"),
            ("48h", 172_800_000, "2d"),
            ("1500ms", 1_500, "1500ms"),
            ("1.5s", 1_500, "1500ms"),
        ] {
            let span = DurationValue::parse(text).unwrap();
            assert_eq!(span.0, Duration::from_millis(milliseconds), "{text}");
            assert_eq!(span.to_string(), written, "{text}");
        }
        for text in ["", "5", "s", "-1s", "3 parsecs", "99999999999999999999s"] {
            assert!(DurationValue::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_read_and_write() {
        for (text, bytes, written) in [
            ("0", 0, "0"),
            ("1000", 1000, "1000"),
            ("64kB", 64_000, "64000"),
            ("64KiB", 65_536, "64KiB"),
            ("16MiB", 16 << 20, "16MiB"),
            ("1.5 GiB", 3 << 29, "1536MiB"),
        ] {
            let size = ByteSize::parse(text).unwrap();
            assert_eq!(size.0, bytes, "{text}");
            assert_eq!(size.to_string(), written, "{text}");
        }
        for text in ["", "-1", "MiB", "12 parsecs", "1..5kB"] {
            assert!(ByteSize::parse(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_reads_to_the_same(
            nanoseconds in 0..u64::MAX, seconds in 0..40_000_000u64, size in any::<u64>(),
        ) {
            for span in [Duration::from_nanos(nanoseconds), Duration::from_secs(seconds)] {
                prop_assert_eq!(DurationValue::parse(&DurationValue(span).to_string()).unwrap().0, span);
            }
            prop_assert_eq!(ByteSize::parse(&ByteSize(size).to_string()).unwrap().0, size);
        }
    }
}
