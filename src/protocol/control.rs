//! What the control socket speaks: one JSON line that asks, one JSON line that answers.
//!
//! These are the words alone; who may speak, and what a word does, is the master's affair. A reader
//! ignores members that it does not know and has a default for those added later, so that a command
//! and a master of different versions understand each other.

use std::io;

use serde::{Deserialize, Serialize};

/// While so many old generations still drain, a reload waits: each holds its workers' memory.
pub const MOST_DRAINING_GENERATIONS: usize = 4;
/// The longest time until a stop, in milliseconds: a day.
pub const MAX_STOP_DELAY_MS: u64 = 86_400_000;

/// What a command asks the master for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum ControlRequest {
    /// What the server is doing now. Answered at once, without asking any worker.
    Status,
    /// Reads the configuration again. Answered with the verdict, which can take as long as
    /// `workers.boot-timeout` for each of two steps.
    Reload {
        /// The absolute path of the file that the command was given; a server that reads another
        /// one refuses.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        config: Option<String>,
    },
    /// Runs the binary that is installed now in place of the running one. Answered with the verdict:
    /// that of the new binary's reload.
    Upgrade {
        /// As for a reload.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        config: Option<String>,
    },
    /// Sets how many workers there are, until the next reload.
    Scale {
        /// The new count, 1 to 1024.
        count: usize,
    },
    /// Ends the server. Answered at once; that the connection ends tells that the master is gone.
    Stop {
        /// Whether the running calls are given up.
        #[serde(default)]
        now: bool,
        /// For how many milliseconds it serves on, not ready for health checks, before it stops.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after_ms: Option<u64>,
    },
}

/// What the master answers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlResponse {
    /// Whether it was done.
    pub ok: bool,
    /// The answer to [`ControlRequest::Status`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<Status>,
    /// What was done, a sentence or more for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Why it was not done, for people; `Some` iff not `ok`. Further lines may follow the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The exit code that the asking command ends with; `Some` iff not `ok`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<u8>,
}

impl ControlResponse {
    /// It was done, and there is nothing to say.
    pub fn done() -> Self {
        ControlResponse {
            ok: true,
            ..ControlResponse::default()
        }
    }

    /// It was done, and this is worth saying.
    pub fn said(message: impl Into<String>) -> Self {
        ControlResponse {
            message: Some(message.into()),
            ..ControlResponse::done()
        }
    }

    /// The answer to [`ControlRequest::Status`].
    pub fn status(status: Status) -> Self {
        ControlResponse {
            status: Some(status),
            ..ControlResponse::done()
        }
    }

    /// It was not done: why, and the exit code for the command.
    pub fn refused(error: impl Into<String>, code: u8) -> Self {
        ControlResponse {
            error: Some(error.into()),
            code: Some(code),
            ..ControlResponse::default()
        }
    }
}

/// The version of a program of this name: one that is built on the library says whose version it is.
pub fn version_of(name: &str, version: &str) -> String {
    match name {
        "preforkd" => version.to_owned(),
        _ => format!("(preforkd {version})"),
    }
}

/// One message as it goes over the socket: compact JSON, which holds no line feed, and one behind.
///
/// # Errors
/// None that a message of this module can cause.
pub fn to_line(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}

/// What the whole server is doing: `preforkd status --json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub master: MasterStatus,
    /// Each worker that lives, draining ones too, and each slot without one; by slot, then
    /// generation.
    pub workers: Vec<WorkerStatus>,
    /// Each pool process, draining ones too, and each place of one without a process; by pool, then
    /// generation.
    #[serde(default)]
    pub pools: Vec<PoolStatus>,
    /// The last deaths, at most 100, the latest last.
    pub deaths: Vec<DeathStatus>,
    /// Each listener, in the configuration's order.
    pub listeners: Vec<ListenerStatus>,
    /// Calls that are refused, for each time they ran their worker has died; until the next reload.
    #[serde(default)]
    pub quarantine: Vec<Quarantined>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantined {
    pub method: String,
    /// What tells it from the method's other calls; as in the log.
    pub key: String,
    pub refused: u64,
    /// Since when, in seconds since 1970.
    pub at: u64,
}

/// The one parent process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MasterStatus {
    /// Its process id.
    pub pid: i32,
    /// The version of preforkd that it runs.
    pub version: String,
    /// The name of the server.
    #[serde(default)]
    pub name: String,
    /// The configuration file that it has read; null if there was none.
    #[serde(default)]
    pub config: Option<String>,
    /// The path of the program that it was started from, which an upgrade starts again.
    #[serde(default)]
    pub binary: String,
    pub generation: u32,
    /// Seconds since it started.
    pub uptime_s: u64,
    /// How the last reload ended; null as long as there was none.
    pub last_reload: Option<LastReload>,
    /// How the last upgrade ended; null as long as there was none.
    #[serde(default)]
    pub last_upgrade: Option<LastReload>,
    /// How many workers there are meant to be.
    #[serde(default)]
    pub target: usize,
    /// In how many milliseconds it begins to stop; null unless it was told to by `stop --after`.
    #[serde(default)]
    pub stops_in_ms: Option<u64>,
    /// What is allowed and yet worth a word, such as workers that run as root.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// Log lines of the master and the workers that are lost, while the log can't be written; 0 once it can
    /// again, and tells of them itself.
    #[serde(default)]
    pub lost_log_lines: u64,
}

/// How a reload, or an upgrade, ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastReload {
    /// Whether the new generation, or the new binary, took over.
    pub ok: bool,
    /// When the verdict was given, in seconds since 1970.
    pub at: u64,
    /// Why it did not; null iff `ok`.
    pub error: Option<String>,
}

/// One worker, or a slot that has none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerStatus {
    pub slot: u16,
    /// Its process id; null while the slot has no worker.
    pub pid: Option<i32>,
    pub generation: u32,
    pub state: WorkerPhase,
    /// Seconds since it was forked; 0 while the slot has no worker.
    pub uptime_s: u64,
    /// Client connections that are open.
    pub connections: u64,
    /// Calls that run.
    pub running: u64,
    /// Calls that wait for a thread.
    pub queued: u64,
    /// Calls answered since its start, errors among them.
    pub calls: u64,
    /// Calls answered with an error since its start.
    pub errors: u64,
    /// Its resident memory in bytes.
    pub rss_bytes: u64,
    /// The call that has been running for longest; null when none runs.
    pub oldest_call: Option<OldestCall>,
    /// How long ago its event loop turned last, in milliseconds: about a second at most, unless it is stopped
    /// or stuck.
    #[serde(default)]
    pub silent_ms: u64,
    #[serde(default)]
    pub threads: u64,
    /// Those of them that run past their deadline.
    #[serde(default)]
    pub lost_threads: u64,
    #[serde(default)]
    pub programs: u64,
    /// Those of them that do not serve: they start, or died too often and wait.
    #[serde(default)]
    pub programs_down: u64,
    /// Calls of its connections that run in other processes.
    #[serde(default)]
    pub sent: u64,
    /// Calls of other workers' connections that it runs.
    #[serde(default)]
    pub running_for_others: u64,
    /// How long new connections had waited with their first bytes until they were read.
    #[serde(default)]
    pub accept_wait: AcceptWait,
    /// Why the slot waits; `Some` iff the state is throttled.
    #[serde(default)]
    pub throttle: Option<ThrottleStatus>,
}

/// One pool process with its programs, or the place of one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolStatus {
    /// The name of the pool.
    pub name: String,
    /// Its process id; null while the place has no process.
    pub pid: Option<i32>,
    pub generation: u32,
    pub state: WorkerPhase,
    /// Seconds since it was forked.
    pub uptime_s: u64,
    /// The programs that it is meant to have.
    pub programs: u64,
    /// Calls that its programs run.
    pub busy: u64,
    /// Programs that do not serve: they start, or died too often and wait.
    pub down: u64,
    /// Calls that wait for it in the workers.
    pub queued: u64,
    /// Calls that it was given since its start.
    pub calls: u64,
    /// Its own resident memory in bytes, without its programs.
    pub rss_bytes: u64,
    /// The call that has been running for longest; null when none runs.
    pub oldest_call: Option<OldestCall>,
    /// How long ago its event loop turned last, in milliseconds.
    pub silent_ms: u64,
    /// Why the place waits; `Some` iff the state is throttled.
    pub throttle: Option<ThrottleStatus>,
    /// Each of its programs; empty while the place has no process.
    #[serde(default)]
    pub list: Vec<ProgramStatus>,
}

/// One program of a pool, or the place of one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramStatus {
    /// Its process id; null while there is none.
    pub pid: Option<i32>,
    pub state: ProgramPhase,
    /// Calls that it has answered.
    pub calls: u64,
    /// Its resident memory in bytes, without that of its children.
    pub rss_bytes: u64,
    /// Seconds since it was started.
    pub uptime_s: u64,
}

/// What a program, or its place, is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProgramPhase {
    /// There is none; the next one is started soon, or after a while if they died too often.
    #[default]
    Down,
    /// It is not ready yet.
    Starting,
    /// It serves and has no call.
    Idle,
    /// It has at least one call.
    Busy,
    /// It was ended because no call came (`idle-timeout`), and is started for the next one.
    Asleep,
}

/// What a worker, or its slot, is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WorkerPhase {
    /// Forked, and not ready yet.
    Starting,
    /// It serves.
    Ready,
    /// It takes nothing new and finishes what runs.
    Draining,
    /// The slot has no worker and waits for its next try.
    Throttled,
    /// The slot has no worker.
    #[default]
    Dead,
}

impl WorkerPhase {
    /// The word, as in JSON.
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

/// The call of a worker that has been running for longest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OldestCall {
    pub method: String,
    /// How long it has been running, in milliseconds.
    pub age_ms: u64,
}

/// For how long the first bytes of new TCP connections waited, while nobody accepted or read them. The
/// call that they are has so much less time.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcceptWait {
    /// Of the last connection, in milliseconds.
    pub last_ms: u64,
    /// The longest since the worker started.
    pub longest_ms: u64,
}

/// Why a slot waits.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThrottleStatus {
    /// Its young deaths and failed forks in a row.
    pub failures: u32,
    /// Milliseconds until the next try.
    pub retry_in_ms: u64,
}

/// A worker that died.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeathStatus {
    pub slot: u16,
    /// Its process id then.
    pub pid: i32,
    /// Its exit code; null iff a signal ended it.
    pub exit: Option<i32>,
    /// The name of the signal that ended it, such as `SIGSEGV`; null iff it exited.
    pub signal: Option<String>,
    /// How many seconds it lived.
    pub uptime_s: u64,
    /// The last method that it began; null when there was none.
    pub method: Option<String>,
    /// Its last known resident memory in bytes.
    pub rss_bytes: u64,
    /// What is known of why.
    pub reason: String,
    /// When, in seconds since 1970.
    pub at: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenerStatus {
    /// Its address as in the configuration, with the port that it really has.
    pub address: String,
    /// Connections that wait to be accepted (tcp(7), `TCP_INFO`); null where that can't be told.
    pub queue: Option<u32>,
    /// How many may wait at most.
    pub backlog: u32,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::{Value, json, to_value};

    #[test]
    fn requests_are_written_as_the_contract_says() {
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
    fn responses_hold_no_member_that_says_nothing() {
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
    fn a_status_has_each_member_of_the_contract_even_when_null() {
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
            "slot pid exit signal uptime_s method rss_bytes reason at",
        );
        has(&value["listeners"][0], "address queue backlog");
    }

    #[test]
    fn a_message_is_one_line_whatever_it_says() {
        let line = to_line(&ControlResponse::refused("first\nsecond", 1)).unwrap();
        let ends: Vec<_> = line.iter().filter(|byte| **byte == b'\n').collect();
        assert_eq!((ends.len(), line.last()), (1, Some(&b'\n')));
    }

    #[test]
    fn members_of_a_later_version_are_ignored_and_missing_additions_have_a_default() {
        let status: Status = serde_json::from_value(json!({
            "master": {"pid": 1, "version": "9", "generation": 2, "uptime_s": 3,
                       "last_reload": {"ok": true, "at": 5, "error": null}, "mood": "fine"},
            "workers": [], "deaths": [], "listeners": []
        }))
        .unwrap();
        assert_eq!((status.master.target, status.master.warnings.len()), (0, 0));
    }
}
