//! Defines the messages of the control socket: one JSON line as request, one JSON line as answer.
//!
//! The master decides who may send a request and what it does. A decoder ignores unknown members and has
//! defaults for members that were added later. So a command and a master of different versions understand
//! each other.

use std::io;

use serde::{Deserialize, Serialize};

pub use super::death_status::{DeathKind, DeathStatus, LastReload, ReloadStatus};
pub use super::status_parts::{
    CommitTimes, JobsStatus, ProgramPhase, ProgramStatus, QueueStatus, SessionStatus,
};
use crate::error::Error;

/// While this many old generations drain, a reload waits, because the workers of each use memory.
pub const MOST_DRAINING_GENERATIONS: usize = 4;
/// The longest time until a stop, in milliseconds: a day.
pub const MAX_STOP_DELAY_MS: u64 = 86_400_000;

/// The request of a command to the master.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum ControlRequest {
    /// The state of the server. Answered at once, without asking any worker.
    Status,
    /// As `Status`, with read-only descriptors of the metrics board and the scoreboard.
    Metrics,
    /// Reads the configuration again. Answered with the result, which can take up to
    /// `workers.boot-timeout` for each of two steps.
    Reload {
        /// The absolute path of the command's configuration file. A server with another file refuses.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        config: Option<String>,
    },
    /// Replaces the running program by the installed binary. Answered with the result of the new binary's
    /// reload.
    Upgrade {
        /// As for a reload.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        config: Option<String>,
    },
    /// Sets the number of workers until the next reload.
    Scale {
        /// The new count, 1 to 1024.
        count: usize,
    },
    /// Stops the server. Answered at once. The connection ends when the master has exited.
    Stop {
        /// Whether running calls are aborted.
        #[serde(default)]
        now: bool,
        /// The time in milliseconds before the stop. Until then calls are served, and health checks say
        /// "not ready".
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after_ms: Option<u64>,
    },
    /// Passes the connection to the jobs process. [`super::job_control`] has what follows.
    Job {
        /// The name of the command, for the log.
        job: String,
    },
}

/// The answer of the master.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlResponse {
    /// Whether the request succeeded.
    pub ok: bool,
    /// The answer to [`ControlRequest::Status`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<Status>,
    /// What was done: one or more sentences for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Why it failed, for people; `Some` iff not `ok`. It may have more than one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The exit code for the command; `Some` iff not `ok`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<u8>,
}

impl ControlResponse {
    /// Creates a success without a message.
    pub fn done() -> Self {
        ControlResponse {
            ok: true,
            ..ControlResponse::default()
        }
    }

    /// Creates a success with a message.
    pub fn said(message: impl Into<String>) -> Self {
        ControlResponse {
            message: Some(message.into()),
            ..ControlResponse::done()
        }
    }

    /// Creates the answer to [`ControlRequest::Status`].
    pub fn status(status: Status) -> Self {
        ControlResponse {
            status: Some(status),
            ..ControlResponse::done()
        }
    }

    /// Creates a failure with its reason, and the exit code for the command.
    pub fn refused(error: impl Into<String>, code: u8) -> Self {
        ControlResponse {
            error: Some(error.into()),
            code: Some(code),
            ..ControlResponse::default()
        }
    }

    /// Returns the error of a failure, for the command.
    pub fn into_error(self) -> Error {
        let message = self.error;
        let message = message.unwrap_or_else(|| "refused without a reason".into());
        match self.code.unwrap_or(1) {
            1 => Error::Refused(message),
            code => Error::Daemon { code, message },
        }
    }
}

/// Returns the version of a program for display. For a program that is built on the library, it also has the version of
/// preforkd.
pub fn version_of(name: &str, version: &str) -> String {
    match name {
        "preforkd" => version.to_owned(),
        _ => format!("(preforkd {version})"),
    }
}

/// Encodes a message as one line: compact JSON, which contains no line feed, and a line feed.
///
/// # Errors
/// None for the messages of this module.
pub fn to_line(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}

/// The state of the whole server: `preforkd status --json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub master: MasterStatus,
    /// Each live worker, including draining ones, and each slot without a worker; by slot, then
    /// generation.
    pub workers: Vec<WorkerStatus>,
    /// Each pool process, including draining ones, and each pool slot without a process; by pool, then
    /// generation.
    #[serde(default)]
    pub pools: Vec<PoolStatus>,
    /// Each acceptor, draining ones too, and each acceptor slot without a process; by listener, then
    /// generation.
    #[serde(default)]
    pub isolated: Vec<IsolatedStatus>,
    /// The last deaths, at most 100 of each kind, the latest last.
    pub deaths: Vec<DeathStatus>,
    /// The last reloads, at most 20, the latest last.
    #[serde(default)]
    pub reloads: Vec<ReloadStatus>,
    /// Each listener, in the order of the configuration.
    pub listeners: Vec<ListenerStatus>,
    /// Calls that are refused until the next reload, because their worker died each time they ran.
    #[serde(default)]
    pub quarantine: Vec<Quarantined>,
    /// The durable jobs; null without `[jobs]`.
    #[serde(default)]
    pub jobs: Option<JobsStatus>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantined {
    pub method: String,
    /// The key that identifies this call among the calls of its method, as in the log.
    pub key: String,
    pub refused: u64,
    /// When it was quarantined, in seconds since 1970.
    pub at: u64,
}

/// The master.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MasterStatus {
    pub pid: i32,
    /// The version of preforkd that is running.
    pub version: String,
    #[serde(default)]
    pub name: String,
    /// The configuration file in use; null if there is none.
    #[serde(default)]
    pub config: Option<String>,
    /// The path of the program, which an upgrade executes again.
    #[serde(default)]
    pub binary: String,
    pub generation: u32,
    /// Seconds since it started.
    pub uptime_s: u64,
    /// The process that serves metrics and status over HTTP; null if there is none.
    #[serde(default)]
    pub observer: Option<ObserverStatus>,
    /// The result of the last reload; null if there was none.
    pub last_reload: Option<LastReload>,
    /// The result of the last upgrade; null if there was none.
    #[serde(default)]
    pub last_upgrade: Option<LastReload>,
    /// The intended number of workers.
    #[serde(default)]
    pub target: usize,
    /// The time until a scheduled stop in milliseconds; null without `stop --after`.
    #[serde(default)]
    pub stops_in_ms: Option<u64>,
    /// Whether a stop is in progress.
    #[serde(default)]
    pub stopping: bool,
    /// Warnings about allowed but risky settings, such as workers that run as root.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// Lost log lines that the log does not report yet, because it cannot be written.
    #[serde(default)]
    pub lost_log_lines: u64,
    /// Lines of the access log that were lost since the start of the server.
    #[serde(default)]
    pub lost_access_lines: u64,
}

/// The observer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObserverStatus {
    pub address: String,
    pub pid: i32,
}

/// A worker, or a slot without one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WorkerStatus {
    pub slot: u16,
    /// The process id; null while the slot has no worker.
    pub pid: Option<i32>,
    pub generation: u32,
    pub state: WorkerPhase,
    /// Seconds since the fork; 0 while the slot has no worker.
    pub uptime_s: u64,
    /// Open client connections.
    pub connections: u64,
    /// Running calls.
    pub running: u64,
    /// Calls of its connections that wait.
    pub queued: u64,
    /// Calls answered since its start, including errors.
    pub calls: u64,
    /// Calls answered with an error since its start.
    pub errors: u64,
    /// Resident memory in bytes.
    pub rss_bytes: u64,
    /// The longest-running call; null if none runs.
    pub oldest_call: Option<OldestCall>,
    /// The time since the last turn of its event loop in milliseconds: up to a second if it is not stuck.
    pub silent_ms: u64,
    pub threads: u64,
    /// How many of its threads run past the deadline of their call.
    pub lost_threads: u64,
    pub programs: u64,
    /// How many of its programs do not serve: they are starting, or wait after too many deaths.
    pub programs_down: u64,
    /// Calls of its connections that run in other processes.
    pub sent: u64,
    /// Calls of other workers' connections that it runs.
    pub running_for_others: u64,
    /// How long the first bytes of new connections waited until they were read.
    pub accept_wait: AcceptWait,
    /// Why the slot is throttled; `Some` iff the state is throttled.
    pub throttle: Option<ThrottleStatus>,
}

/// A pool process with its programs, or its slot without a process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolStatus {
    pub name: String,
    /// The process id; null while the slot has no process.
    pub pid: Option<i32>,
    pub generation: u32,
    pub state: WorkerPhase,
    /// Seconds since the fork.
    pub uptime_s: u64,
    /// The configured number of programs.
    pub programs: u64,
    /// Calls that its programs are running.
    pub busy: u64,
    /// Programs that do not serve: they are starting, or wait after too many deaths.
    pub down: u64,
    /// Calls that wait for it in the workers.
    pub queued: u64,
    /// Calls that it received since its start.
    pub calls: u64,
    /// Programs that the pool has started since the start of the master.
    #[serde(default)]
    pub starts: u64,
    /// Whether health checks fail because of it: `health = true`, and no program ready for `boot-timeout`.
    #[serde(default)]
    pub unhealthy: bool,
    /// Its resident memory in bytes, without its programs.
    pub rss_bytes: u64,
    /// The longest-running call; null if none runs.
    pub oldest_call: Option<OldestCall>,
    /// The time since the last turn of its event loop, in milliseconds.
    pub silent_ms: u64,
    /// Why the slot is throttled; `Some` iff the state is throttled.
    pub throttle: Option<ThrottleStatus>,
    /// Its programs; empty while there is no process.
    #[serde(default)]
    pub list: Vec<ProgramStatus>,
}

/// One acceptor with its sessions, or an acceptor slot without a process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct IsolatedStatus {
    /// The address of the listener.
    pub address: String,
    /// The process id of the acceptor; null while the place has no process.
    pub pid: Option<i32>,
    pub generation: u32,
    pub state: WorkerPhase,
    /// Connections, each with a process.
    pub running: u64,
    /// Processes that wait for a connection.
    pub spare: u64,
    /// Connections that may be open at one time, of all generations together.
    pub limit: u64,
    /// Connections of all its acceptors that `per-source` refused.
    pub refused_per_source: u64,
    /// How often the limit was reached.
    pub full: u64,
    /// Connections that were refused because the system gave no process for them.
    pub refused_no_process: u64,
    /// Connection processes of the listener that have crashed.
    pub crashed: u64,
    /// Why the place waits; `Some` iff the state is throttled.
    pub throttle: Option<ThrottleStatus>,
    /// Each connection.
    pub list: Vec<SessionStatus>,
}

/// The state of a worker or its slot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WorkerPhase {
    /// Forked, but not ready.
    Starting,
    /// It serves calls.
    Ready,
    /// It accepts nothing new and finishes its in-flight calls.
    Draining,
    /// The slot has no worker and waits for the next start.
    Throttled,
    /// The slot has no worker.
    #[default]
    Dead,
}

impl Status {
    /// Returns how many workers of the serving generation are ready.
    pub fn ready_workers(&self) -> usize {
        let serves = |worker: &&WorkerStatus| {
            worker.state == WorkerPhase::Ready && worker.generation == self.master.generation
        };
        self.workers.iter().filter(serves).count()
    }
}

impl WorkerPhase {
    /// Returns the name, as in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            WorkerPhase::Starting => "starting",
            WorkerPhase::Ready => "ready",
            WorkerPhase::Draining => "draining",
            WorkerPhase::Throttled => "throttled",
            WorkerPhase::Dead => "dead",
        }
    }
}

/// The longest-running call of a worker.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OldestCall {
    pub method: String,
    /// How long it has been running, in milliseconds.
    pub age_ms: u64,
}

/// How long the first bytes of new TCP connections waited until a worker read them. This time is
/// subtracted from the deadline of their call.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcceptWait {
    /// For the last connection, in milliseconds.
    pub last_ms: u64,
    /// The longest since the start of the worker.
    pub longest_ms: u64,
}

/// Why a slot is throttled.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThrottleStatus {
    /// Consecutive early deaths and failed forks.
    pub failures: u32,
    /// Milliseconds until the next start.
    pub retry_in_ms: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenerStatus {
    /// The configured address, with the actual port.
    pub address: String,
    /// Connections in the accept queue (tcp(7), `TCP_INFO`); null if unknown.
    pub queue: Option<u32>,
    /// The limit of the accept queue.
    pub backlog: u32,
    /// Connections that `per-source` refused.
    #[serde(default)]
    pub refused_per_source: u64,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::{Value, json, to_value};

    #[test]
    fn requests_are_encoded_as_documented() {
        for (request, written) in [
            (ControlRequest::Status, json!({"command": "status"})),
            (
                ControlRequest::Reload { config: None },
                json!({"command": "reload"}),
            ),
            (
                ControlRequest::Upgrade {
                    config: Some("/a.toml".into()),
                },
                json!({"command": "upgrade", "config": "/a.toml"}),
            ),
            (
                ControlRequest::Scale { count: 4 },
                json!({"command": "scale", "count": 4}),
            ),
            (
                ControlRequest::Stop {
                    now: false,
                    after_ms: None,
                },
                json!({"command": "stop", "now": false}),
            ),
            (
                ControlRequest::Stop {
                    now: false,
                    after_ms: Some(5),
                },
                json!({"command": "stop", "now": false, "after_ms": 5}),
            ),
        ] {
            assert_eq!(to_value(&request).unwrap(), written);
            assert_eq!(
                serde_json::from_value::<ControlRequest>(written).unwrap(),
                request
            );
        }
        let short: ControlRequest = serde_json::from_str(r#"{"command": "stop"}"#).unwrap();
        let plain = ControlRequest::Stop {
            now: false,
            after_ms: None,
        };
        assert_eq!(short, plain);
    }

    #[test]
    fn responses_have_no_empty_members() {
        for (response, written) in [
            (ControlResponse::done(), json!({"ok": true})),
            (
                ControlResponse::said("two"),
                json!({"ok": true, "message": "two"}),
            ),
            (
                ControlResponse::refused("no", 1),
                json!({"ok": false, "error": "no", "code": 1}),
            ),
        ] {
            assert_eq!(to_value(&response).unwrap(), written);
            assert_eq!(
                serde_json::from_value::<ControlResponse>(written).unwrap(),
                response
            );
        }
    }

    #[test]
    fn a_status_has_each_documented_member_even_if_null() {
        let status = Status {
            workers: vec![WorkerStatus::default()],
            deaths: vec![DeathStatus::default()],
            listeners: vec![ListenerStatus::default()],
            ..Status::default()
        };
        let value = to_value(&status).unwrap();
        let has = |value: &Value, names: &str| {
            for name in names.split(' ') {
                assert!(value.get(name).is_some(), "{name} in {value}");
            }
        };
        has(
            &value["master"],
            "pid version generation uptime_s last_reload",
        );
        has(
            &value["workers"][0],
            "slot pid generation state uptime_s connections running queued calls errors rss_bytes \
             oldest_call",
        );
        has(
            &value["deaths"][0],
            "kind name slot pid exit signal uptime_s method rss_bytes reason at",
        );
        has(&value["listeners"][0], "address queue backlog");
    }

    #[test]
    fn every_message_is_one_line() {
        let line = to_line(&ControlResponse::refused("first\nsecond", 1)).unwrap();
        let ends: Vec<_> = line.iter().filter(|byte| **byte == b'\n').collect();
        assert_eq!((ends.len(), line.last()), (1, Some(&b'\n')));
    }

    #[test]
    fn unknown_members_are_ignored_and_missing_later_ones_have_a_default() {
        let status: Status = serde_json::from_value(json!({
            "master": {"pid": 1, "version": "9", "generation": 2, "uptime_s": 3,
                       "last_reload": {"ok": true, "at": 5, "error": null}, "mood": "fine"},
            "workers": [], "deaths": [], "listeners": []
        }))
        .unwrap();
        assert_eq!((status.master.target, status.master.warnings.len()), (0, 0));
    }
}
