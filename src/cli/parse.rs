//! Parses values of options: durations, JSON and ids.

use std::convert::Infallible;
use std::time::Duration;

use serde_json::value::RawValue;

use crate::config::server_name;
use crate::error::{Error, Result};
use crate::protocol::control::MAX_STOP_DELAY_MS;

/// The longest name in bytes. The path of a socket has at most 107 bytes.
const LONGEST_NAME: usize = 40;

/// Parses a duration. A number without a unit is in seconds.
pub(super) fn duration(text: &str) -> std::result::Result<Duration, String> {
    if let Ok(seconds) = text.parse() {
        return Ok(Duration::from_secs(seconds));
    }
    humantime::parse_duration(text)
        .map_err(|error| format!("{error}; write it as in 500ms, 30s or 5m"))
}

/// Checks the name of a server, which is a part of paths and titles.
pub(super) fn name(text: &str) -> std::result::Result<String, String> {
    if server_name(text) == text && text.len() <= LONGEST_NAME {
        return Ok(text.to_owned());
    }
    Err(format!(
        "a name has 1 to {LONGEST_NAME} letters, digits and _ . -, and begins with a letter, a digit or _"
    ))
}

/// Parses the time between two readings of `top`.
pub(super) fn reading_interval(text: &str) -> std::result::Result<Duration, String> {
    match duration(text)? {
        interval if interval >= Duration::from_millis(100) => Ok(interval),
        _ => Err("it is shorter than 100ms; give 100ms or more".into()),
    }
}

/// Parses the time until a stop. It is limited, because after a typing mistake the server would never stop
/// and would never be ready.
pub(super) fn stop_delay(text: &str) -> std::result::Result<Duration, String> {
    let most = Duration::from_millis(MAX_STOP_DELAY_MS);
    match duration(text)? {
        delay if delay <= most => Ok(delay),
        _ => Err("it is longer than a day; give 1d at most".into()),
    }
}

/// Checks that a text is JSON. `what` names its source.
pub(super) fn json(text: &str, what: &str) -> Result<()> {
    let hint = match text.trim_start().starts_with(['[', '{']) {
        true => "",
        false => "; a string needs quotes of its own, as in '\"hello\"'",
    };
    match serde_json::from_str::<&RawValue>(text) {
        Ok(_) => Ok(()),
        Err(error) => Err(Error::Usage(format!("{what} is not JSON: {error}{hint}"))),
    }
}

/// Converts an id to JSON: a number, or else a string, so that it needs no second pair of quotes.
pub(super) fn id_as_json(text: &str) -> std::result::Result<String, Infallible> {
    let is_number = serde_json::from_str::<serde_json::Number>(text).is_ok();
    let is_string = serde_json::from_str::<String>(text).is_ok();
    Ok(match is_number || is_string {
        true => text.to_owned(),
        false => serde_json::Value::from(text).to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_alone_is_seconds() {
        for (text, milliseconds) in [
            ("5", 5_000),
            ("0", 0),
            ("5s", 5_000),
            ("1m 30s", 90_000),
            ("7ms", 7),
        ] {
            assert_eq!(
                duration(text),
                Ok(Duration::from_millis(milliseconds)),
                "{text}"
            );
        }
        for text in ["", "-5", "5.5", "five", "5 parsecs"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn only_text_that_may_be_a_string_is_told_to_be_quoted() {
        for (text, is_told) in [
            ("hello", true),
            ("", true),
            ("[1", false),
            (" {a: 1}", false),
        ] {
            let told = json(text, "PARAMS").err().map(|error| error.to_string());
            let is_quoted = told.as_ref().map(|told| told.contains("quotes of its own"));
            assert_eq!(is_quoted, Some(is_told), "{told:?}");
        }
    }

    #[test]
    fn a_name_is_a_part_of_paths() {
        for good in ["second", "a", "v1.2_x-y"] {
            assert_eq!(name(good).as_deref(), Ok(good));
        }
        for bad in ["", ".", "..", "-x", "a/b", "a b", "\u{e9}", &"x".repeat(41)] {
            assert!(name(bad).is_err(), "{bad}");
        }
    }
}
