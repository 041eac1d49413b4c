//! The record of a job as a client reads it.
//!
//! Unknown members are ignored, so that a later server can add some. Result and error stay raw JSON.

use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

/// What the server says about a job. Times are milliseconds since 1970 (UTC).
#[derive(Debug, Clone, Deserialize)]
#[non_exhaustive]
pub struct JobInfo {
    /// The id.
    #[serde(rename = "job")]
    pub id: String,
    /// The method that runs it.
    pub method: String,
    /// `waiting`, `running`, `done`, `dead` or `cancelled`.
    pub state: String,
    /// Whether it is done, dead or cancelled.
    pub ended: bool,
    /// The number of attempts that have begun and count. Interrupted attempts do not count.
    pub attempt: u32,
    /// The job is dead after this many attempts without a result.
    pub max_attempts: u32,
    /// The number of attempts that ended with a crash.
    #[serde(default)]
    pub crashes: u32,
    /// The number of attempts that were interrupted: by the server, or by a crash that another call or job caused.
    /// `attempt` does not include them.
    #[serde(default)]
    pub interruptions: u32,
    /// -9 to 9.
    #[serde(default)]
    pub priority: i8,
    /// The `key` that its enqueue had.
    #[serde(default)]
    pub key: Option<String>,
    /// When it was stored.
    pub created_at_ms: u64,
    /// When its next attempt may begin.
    pub due_at_ms: u64,
    /// When the last attempt began.
    #[serde(default)]
    pub started_at_ms: Option<u64>,
    /// When it ended.
    #[serde(default)]
    pub finished_at_ms: Option<u64>,
    /// When it expires.
    #[serde(default)]
    pub expires_at_ms: Option<u64>,
    /// Why it is dead.
    #[serde(default)]
    pub reason: Option<String>,
    /// The result as JSON, if it is done.
    #[serde(default, deserialize_with = "present")]
    pub result: Option<Box<RawValue>>,
    /// The error of the last attempt that had one, as JSON.
    #[serde(default, deserialize_with = "present")]
    pub error: Option<Box<RawValue>>,
}

/// Reads a member that is there. Null is a value too.
pub(super) fn present<'de, D: Deserializer<'de>>(
    from: D,
) -> Result<Option<Box<RawValue>>, D::Error> {
    Box::<RawValue>::deserialize(from).map(Some)
}

/// The members of an error that people read.
#[derive(Deserialize)]
struct AttemptError {
    #[serde(default)]
    name: String,
    #[serde(default)]
    message: String,
}

impl JobInfo {
    /// Describes the end of a job without a result.
    pub(super) fn describe(&self) -> String {
        let JobInfo {
            id,
            state,
            attempt,
            interruptions,
            ..
        } = self;
        let mut text = format!("job {id} is {state}");
        if let Some(reason) = &self.reason {
            text += &format!(" ({reason})");
        }
        text += &match attempt {
            0 if *interruptions > 0 => " after interrupted attempts only".to_owned(),
            0 => " without an attempt".to_owned(),
            1 => " after 1 attempt".to_owned(),
            _ => format!(" after {attempt} attempts"),
        };
        let error = self.error.as_deref().map(RawValue::get);
        if let Some(AttemptError { name, message }) =
            error.and_then(|json| serde_json::from_str(json).ok())
        {
            text += &format!(": {name}: {message}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn info(members: &str) -> JobInfo {
        let json = format!(
            r#"{{"job":"ID","method":"m","max_attempts":10,"created_at_ms":1,"due_at_ms":2,"later":0,{members}}}"#
        );
        serde_json::from_str(&json).unwrap()
    }

    #[test]
    fn a_result_of_null_is_a_result() {
        let done = info(r#""state":"done","ended":true,"attempt":1,"result":null"#);
        assert_eq!(done.result.unwrap().get(), "null");
        assert!(
            info(r#""state":"running","ended":false,"attempt":1"#)
                .result
                .is_none()
        );
    }

    #[test]
    fn an_end_without_a_result_is_described_with_its_last_error() {
        let dead = info(
            r#""state":"dead","ended":true,"attempt":3,"reason":"attempts","error":{"code":1,"name":"error","message":"no disk"}"#,
        );
        assert_eq!(
            dead.describe(),
            "job ID is dead (attempts) after 3 attempts: error: no disk"
        );
        let cancelled = info(r#""state":"cancelled","ended":true,"attempt":0"#);
        assert_eq!(
            cancelled.describe(),
            "job ID is cancelled without an attempt"
        );
        let odd = info(r#""state":"dead","ended":true,"attempt":1,"error":7"#);
        assert_eq!(odd.describe(), "job ID is dead after 1 attempt");
    }
}
