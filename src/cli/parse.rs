//! Parses values of options: durations, JSON and ids.

use std::time::Duration;

use serde_json::value::RawValue;

use crate::error::{Error, Result};
use crate::protocol::control::MAX_STOP_DELAY_MS;

/// A length of time, as people write it.
pub(super) fn duration(text: &str) -> std::result::Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|error| format!("{error}; write it as in 500ms, 30s or 5m"))
}

/// The time until a stop, which has a limit: a slip of the pen would leave a server that never stops and is
/// never ready.
pub(super) fn stop_delay(text: &str) -> std::result::Result<Duration, String> {
    let most = Duration::from_millis(MAX_STOP_DELAY_MS);
    match duration(text)? {
        delay if delay <= most => Ok(delay),
        _ => Err("it is longer than a day; give 1d at most".into()),
    }
}

/// Checks that a text is JSON; `what` is where it stood.
pub(super) fn json(text: String, what: &str) -> Result<String> {
    match serde_json::from_str::<&RawValue>(&text) {
        Ok(_) => Ok(text),
        Err(error) => Err(Error::Usage(format!(
            "{what} is not JSON: {error}; a string needs quotes of its own, as in '\"hello\"'"
        ))),
    }
}

/// An id is a number or a string; what is no number in JSON's eyes is taken for a string, so that
/// nobody has to quote twice.
pub(super) fn id_as_json(text: String) -> String {
    let is_number = serde_json::from_str::<serde_json::Number>(&text).is_ok();
    let is_string = serde_json::from_str::<String>(&text).is_ok();
    if is_number || is_string {
        text
    } else {
        serde_json::Value::from(text).to_string()
    }
}
