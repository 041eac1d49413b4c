//! Defines what `status` shows of events: processes that died without an order, reloads and upgrades.

use serde::{Deserialize, Serialize};

use super::call_id::CallId;

/// What kind of process died.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeathKind {
    #[default]
    Worker,
    /// The pool process of a pool.
    Pool,
    /// A program of a pool.
    Program,
    /// The acceptor of an isolated listener.
    Acceptor,
    /// The process of one connection of an isolated listener.
    Connection,
    /// The jobs process.
    Jobs,
}

impl DeathKind {
    /// Returns the word, as in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            DeathKind::Worker => "worker",
            DeathKind::Pool => "pool",
            DeathKind::Program => "program",
            DeathKind::Acceptor => "acceptor",
            DeathKind::Connection => "connection",
            DeathKind::Jobs => "jobs",
        }
    }
}

/// A process that died without an order.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeathStatus {
    #[serde(default)]
    pub kind: DeathKind,
    /// The name of its pool, the address of its listener or its client; null for a worker.
    #[serde(default)]
    pub name: Option<String>,
    /// Of a worker; null for others.
    pub slot: Option<u16>,
    /// The process id that it had.
    pub pid: i32,
    /// The exit code; null iff a signal ended it.
    pub exit: Option<i32>,
    /// The name of the signal, such as `SIGSEGV`; null iff it exited.
    pub signal: Option<String>,
    /// The uptime in seconds.
    pub uptime_s: u64,
    /// The last method that it began, or that a program ran; null when there was none.
    pub method: Option<String>,
    /// The id of the call of that method, if it is known.
    #[serde(default)]
    pub call: Option<CallId>,
    /// The id of the job if that method ran as an attempt of a job.
    #[serde(default)]
    pub job: Option<String>,
    /// The highest resident memory that it had, in bytes; 0 if it is not known.
    pub rss_bytes: u64,
    /// The known reason.
    pub reason: String,
    /// When it died, in seconds since 1970.
    pub at: u64,
}

impl DeathStatus {
    /// Returns how the process ended: the name of the signal, `exit` and the code, or `-` if that is unknown.
    pub fn end(&self) -> String {
        match (&self.signal, self.exit) {
            (Some(signal), _) => signal.clone(),
            (None, Some(code)) => format!("exit {code}"),
            (None, None) => "-".into(),
        }
    }
}

/// The result of a reload or an upgrade.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastReload {
    /// Whether the new generation or the new binary took over.
    pub ok: bool,
    /// When it ended, in seconds since 1970.
    pub at: u64,
    /// The error; null iff `ok`.
    pub error: Option<String>,
}

/// One of the last reloads.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReloadStatus {
    /// The generation that served after it.
    pub generation: u32,
    /// Whether the new generation took over.
    pub ok: bool,
    /// When it ended, in seconds since 1970.
    pub at: u64,
    /// How long it took, in milliseconds.
    pub took_ms: u64,
    /// The error; null iff `ok`.
    pub error: Option<String>,
}
