//! Logs who asked the master for what, and how it ended: one line for each request over the control socket.

use std::fs;

use log::Level;
use serde::{Deserialize, Serialize};

use crate::logging::escape_unprintable;
use crate::master::policy::event::Millis;
use crate::protocol::control::{ControlRequest, ControlResponse};
use crate::sys::account::effective_ids;
use crate::throttle::limiter::SharedLimiter;

/// What stands for the command of a request that cannot be read.
const UNKNOWN: &str = "unknown";
/// The commands that change nothing.
const STATUS: &str = "status";
const METRICS: &str = "metrics";

/// The process that sent a request. Another program may have got the connection from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlPeer {
    uid: u32,
    pid: i32,
    /// The name that the process has given itself (proc_pid_comm(5)); empty if it has ended.
    comm: String,
}

impl ControlPeer {
    /// `uid` and `pid` are those of SO_PEERCRED (unix(7)).
    pub fn new(uid: u32, pid: i32) -> Self {
        let comm = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
        let comm = String::from_utf8_lossy(&comm)
            .trim_end_matches('\n')
            .to_owned();
        ControlPeer { uid, pid, comm }
    }

    /// Returns whether this is root or the user of the master. Logs others.
    pub fn may_ask(&self) -> bool {
        let is_allowed = self.uid == 0 || self.uid == effective_ids().0;
        if !is_allowed {
            static REFUSED: SharedLimiter = SharedLimiter::new();
            let fields = self.fields(UNKNOWN, "refused", 0);
            let text = "control request refused: only root and the user of the master may send one";
            REFUSED.log(Level::Warn, format!("{text} {fields}"));
        }
        is_allowed
    }

    /// The fields of a log line. The name can hold any byte, so it is escaped.
    fn fields(&self, command: &str, result: &str, took_ms: Millis) -> String {
        let ControlPeer { uid, pid, comm } = self;
        let comm = comm.escape_debug().to_string();
        let comm = escape_unprintable(&comm, &[]);
        format!(
            "command={command} result={result} uid={uid} pid={pid} comm=\"{comm}\" took_ms={took_ms}"
        )
    }
}

/// A request that was not answered yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingRequest {
    peer: ControlPeer,
    command: String,
    /// When it had arrived, by the clock of the master's loop.
    at: Millis,
}

impl PendingRequest {
    /// `request` is `None` if it cannot be read.
    pub fn new(peer: ControlPeer, request: Option<&ControlRequest>, at: Millis) -> Self {
        let command = match request {
            Some(ControlRequest::Status) => STATUS,
            Some(ControlRequest::Metrics) => METRICS,
            Some(ControlRequest::Reload { .. }) => "reload",
            Some(ControlRequest::Upgrade { .. }) => "upgrade",
            Some(ControlRequest::Scale { .. }) => "scale",
            Some(ControlRequest::Stop { .. }) => "stop",
            None => UNKNOWN,
        };
        PendingRequest {
            peer,
            command: command.to_owned(),
            at,
        }
    }

    /// Logs the request with its result. Refusals, and requests of another user than the master's, are
    /// warnings. `status` and the observer ask every second, so requests that only read are for debugging.
    pub fn log(&self, response: &ControlResponse, now: Millis) {
        let command = &self.command;
        let (level, text, result) = match &response.error {
            Some(reason) => {
                let reason = reason.lines().next().unwrap_or_default();
                let reason = reason
                    .strip_prefix(&format!("{command} refused: "))
                    .unwrap_or(reason);
                let text = match &**command {
                    // The request stands in it, and must not look like the fields of this line.
                    UNKNOWN => format!("control request refused: {reason:?}"),
                    _ => format!("control {command} refused: {reason}"),
                };
                (Level::Warn, text, "refused")
            }
            None => {
                let level = if matches!(&**command, STATUS | METRICS) {
                    Level::Debug
                } else if self.peer.uid == effective_ids().0 {
                    Level::Info
                } else {
                    Level::Warn
                };
                (level, format!("control {command} done"), "done")
            }
        };
        let took_ms = now.saturating_sub(self.at);
        log::log!(
            level,
            "{text} {}",
            self.peer.fields(command, result, took_ms)
        );
    }
}
