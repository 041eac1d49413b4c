//! Parses values of options: durations, JSON and ids.

use std::convert::Infallible;
use std::time::{Duration, UNIX_EPOCH};

use serde_json::value::RawValue;

use crate::config::server_name;
use crate::error::{Error, Result};
use crate::jobs::policy::states::JobState;
use crate::protocol::control::MAX_STOP_DELAY_MS;
use crate::protocol::job_id::JobId;

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

/// Checks the id of a job.
pub(super) fn job_id(text: &str) -> std::result::Result<String, String> {
    match JobId::parse(text) {
        Some(id) => Ok(id.to_string()),
        None => Err("an id is a UUID of 36 characters".into()),
    }
}

/// Checks the state of a job.
pub(super) fn job_state(text: &str) -> std::result::Result<String, String> {
    match JobState::from_name(text) {
        Some(state) => Ok(state.name().to_owned()),
        None => {
            let names: Vec<_> = JobState::ALL.iter().map(|state| state.name()).collect();
            Err(format!("the states are {}", names.join(", ")))
        }
    }
}

/// Parses a time in UTC. Returns milliseconds since 1970.
pub(super) fn utc_time(text: &str) -> std::result::Result<u64, String> {
    let time = humantime::parse_rfc3339_weak(text)
        .map_err(|error| format!("{error}; write it in UTC, as in 2026-12-01T08:00:00Z"))?;
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
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
    #![allow(clippy::unwrap_used)]
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
    fn a_time_is_in_utc() {
        for (text, expected) in [
            ("1970-01-01T00:00:01Z", 1_000),
            ("1970-01-01 00:01:00", 60_000),
            ("1970-01-01T00:00:00.25Z", 250),
        ] {
            assert_eq!(utc_time(text), Ok(expected), "{text}");
        }
        for text in ["", "now", "1970-01-01T00:00:00+02:00", "08:00"] {
            let told = utc_time(text).unwrap_err();
            assert!(told.contains("2026-12-01T08:00:00Z"), "{told}");
        }
    }

    #[test]
    fn ids_and_states_of_jobs_are_checked() {
        let id = "017F22E2-79b0-7cc3-98c4-dc0c0c07398f";
        assert_eq!(job_id(id), Ok(id.to_lowercase()));
        assert!(job_id("7").is_err());
        assert_eq!(job_state("dead").as_deref(), Ok("dead"));
        let told = job_state("died").unwrap_err();
        assert_eq!(
            told,
            "the states are waiting, running, done, dead, cancelled"
        );
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
