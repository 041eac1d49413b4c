//! Logs who asked the master for what, and how it ended: one line for each request over the control socket.

use log::Level;
use serde::{Deserialize, Serialize};

use crate::logging::ControlPeer;
use crate::master::policy::event::Millis;
use crate::protocol::control::{ControlRequest, ControlResponse};
use crate::throttle::limiter::SharedLimiter;

/// What stands for the command of a request that cannot be read.
const UNKNOWN: &str = "unknown";
/// The commands that change nothing.
const STATUS: &str = "status";
const METRICS: &str = "metrics";

/// Returns whether this is root or the user of the master. Logs others.
pub fn may_ask(peer: &ControlPeer) -> bool {
    let is_allowed = peer.is_allowed();
    if !is_allowed {
        static REFUSED: SharedLimiter = SharedLimiter::new();
        let fields = peer.fields(UNKNOWN, "refused", 0);
        let text = "control request refused: only root and the user of the master may send one";
        REFUSED.log(Level::Warn, format!("{text} {fields}"));
    }
    is_allowed
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
            Some(ControlRequest::Job { .. }) => "job",
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
        let command = &*self.command;
        let took_ms = now.saturating_sub(self.at);
        let Some(reason) = &response.error else {
            let only_reads = matches!(command, STATUS | METRICS);
            return self.peer.log_done(command, only_reads, "", took_ms);
        };
        let reason = reason.lines().next().unwrap_or_default();
        let reason = reason
            .strip_prefix(&format!("{command} refused: "))
            .unwrap_or(reason);
        match command {
            // The reason contains a part of the request. It is quoted, so that it cannot look like fields of this
            // line.
            UNKNOWN => {
                let fields = self.peer.fields(command, "refused", took_ms);
                log::warn!("control request refused: {reason:?} {fields}");
            }
            _ => self.peer.log_refused(command, reason, took_ms),
        }
    }
}
