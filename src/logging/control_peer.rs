//! The process that sent a request over the control socket, as log lines name it.

use std::fs;

use log::Level;
use serde::{Deserialize, Serialize};

use super::text::escape_unprintable;
use crate::sys::account::effective_ids;

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

    /// Returns whether this is root or the user of this process.
    pub fn is_allowed(&self) -> bool {
        self.uid == 0 || self.uid == effective_ids().0
    }

    /// Logs a request that has succeeded. `what` says what was done, and may be empty. Requests of another user than
    /// that of this process are warnings. `status` and the observer ask every second, so requests that only read are
    /// for debugging.
    pub fn log_done(&self, command: &str, only_reads: bool, what: &str, took_ms: u64) {
        let separator = if what.is_empty() { "" } else { ": " };
        let fields = self.fields(command, "done", took_ms);
        let level = self.level(only_reads);
        log::log!(level, "control {command} done{separator}{what} {fields}");
    }

    /// Logs a request that was refused with this reason.
    pub fn log_refused(&self, command: &str, reason: &str, took_ms: u64) {
        let fields = self.fields(command, "refused", took_ms);
        log::warn!("control {command} refused: {reason} {fields}");
    }

    fn level(&self, only_reads: bool) -> Level {
        match only_reads {
            true => Level::Debug,
            false if self.uid == effective_ids().0 => Level::Info,
            false => Level::Warn,
        }
    }

    /// Returns the fields of a log line. The name can hold any byte, so it is escaped.
    pub fn fields(&self, command: &str, result: &str, took_ms: u64) -> String {
        let ControlPeer { uid, pid, comm } = self;
        let comm = comm.escape_debug().to_string();
        let comm = escape_unprintable(&comm, &[]);
        format!(
            "command={command} result={result} uid={uid} pid={pid} comm=\"{comm}\" took_ms={took_ms}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_logged_by_what_it_does_and_who_sent_it() {
        let (own, _) = effective_ids();
        let peer = ControlPeer::new(own, std::process::id() as i32);
        assert!(peer.is_allowed());
        assert_eq!(
            (peer.level(true), peer.level(false)),
            (Level::Debug, Level::Info)
        );
        let other = ControlPeer {
            uid: own + 1,
            pid: 7,
            comm: "a\"\u{1b}b".into(),
        };
        assert!(!other.is_allowed());
        assert_eq!(other.level(false), Level::Warn);
        let fields = other.fields("job-purge", "done", 3);
        let expected = format!(
            "command=job-purge result=done uid={} pid=7 comm=\"a\\\"\\u{{1b}}b\" took_ms=3",
            own + 1
        );
        assert_eq!(fields, expected);
    }
}
