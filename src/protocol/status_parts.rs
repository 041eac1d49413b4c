//! Defines parts of the status: programs, sessions and durable jobs.

use serde::{Deserialize, Serialize};

/// A program of a pool, or the place of a program that does not run now.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramStatus {
    /// The process id; null if there is none.
    pub pid: Option<i32>,
    pub state: ProgramPhase,
    /// Answered calls.
    pub calls: u64,
    /// Resident memory in bytes, without its children.
    pub rss_bytes: u64,
    /// Seconds since its start.
    pub uptime_s: u64,
}

/// The state of a program.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProgramPhase {
    /// There is no program. The next one is started soon, or later if too many died.
    #[default]
    Down,
    /// It is started but not ready.
    Starting,
    /// It is ready and has no call.
    Idle,
    /// It has at least one call.
    Busy,
    /// It was ended because no call came (`idle-timeout`). The next call starts it.
    Asleep,
}

/// One connection with its process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionStatus {
    /// The id of its process.
    pub pid: i32,
    /// The client's address, or `unix`.
    pub peer: String,
    pub generation: u32,
    /// Calls that run.
    pub running: u64,
    /// Calls that were read.
    pub calls: u64,
    /// Seconds since the connection came to this process.
    pub uptime_s: u64,
}

/// The durable jobs and their store.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct JobsStatus {
    /// The store, without a password.
    pub store: String,
    pub engine: String,
    /// up, away, full or broken.
    pub state: String,
    /// Whether acknowledged jobs survive a power failure.
    pub durable: bool,
    /// The jobs process; null if there is none now.
    pub pid: Option<i32>,
    /// The id of this run of the server.
    pub instance: Option<String>,
    pub commit_ms: CommitTimes,
    pub waiting: u64,
    /// Waiting jobs whose due time has come.
    pub due: u64,
    /// How long the due job that waits longest has been due, in milliseconds; null if no job is due.
    pub oldest_due_ms: Option<u64>,
    pub running: u64,
    /// Dead jobs that are still kept.
    pub dead: u64,
    /// Outcomes that were refused, because their attempt was not the current one.
    pub stale: u64,
    /// Each method with jobs, and each paused one.
    pub methods: Vec<QueueStatus>,
}

/// Quantiles of the times of commits in milliseconds; null before the first one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommitTimes {
    #[serde(rename = "p50", default, with = "milliseconds")]
    pub p50_us: Option<u64>,
    #[serde(rename = "p99", default, with = "milliseconds")]
    pub p99_us: Option<u64>,
}

/// The jobs of one method.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct QueueStatus {
    pub method: String,
    pub waiting: u64,
    pub due: u64,
    pub running: u64,
    pub dead: u64,
    pub oldest_due_ms: Option<u64>,
    pub paused: bool,
    /// Whether this server has the method.
    pub served: bool,
}

/// Microseconds, written as milliseconds with a fraction.
mod milliseconds {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[allow(clippy::ref_option, reason = "serde passes the field")]
    pub fn serialize<S: Serializer>(us: &Option<u64>, to: S) -> Result<S::Ok, S::Error> {
        us.map(|us| us as f64 / 1000.0).serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
        let ms = Option::<f64>::deserialize(from)?;
        Ok(ms.map(|ms| (ms * 1000.0).round() as u64))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn times_of_commits_are_milliseconds_with_a_fraction() {
        let times = CommitTimes {
            p50_us: Some(412),
            p99_us: Some(2_000),
        };
        let json = serde_json::to_string(&times).unwrap();
        assert_eq!(json, r#"{"p50":0.412,"p99":2.0}"#);
        assert_eq!(serde_json::from_str::<CommitTimes>(&json).unwrap(), times);
        let none: CommitTimes = serde_json::from_str(r#"{"p50":null}"#).unwrap();
        assert_eq!(none, CommitTimes::default());
    }
}
