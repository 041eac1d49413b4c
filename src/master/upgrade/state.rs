//! Defines the state that is passed on at an upgrade, as JSON in a memory file.
//!
//! The next version reads it, and the version before reads it after a rollback. So members are only added, each with
//! a default (`#[serde(default)]`), and unknown members are ignored. Any other change needs a new [`FORMAT`], which
//! older programs refuse. `tests/upgrade-state.json` was written once and is read by all versions. Descriptors are
//! given by their numbers.

use std::collections::BTreeSet;
use std::os::fd::RawFd;

use serde::{Deserialize, Serialize};

use super::super::children::generation_info::GenerationInfo;
use super::super::children::orphans::OrphansState;
use super::super::children::workers_state::WorkersState;
use super::super::endpoints::control_socket::ControlState;
use super::super::endpoints::listeners::ListenerState;
use super::super::endpoints::owned_path::OwnedPath;
use super::super::policy::event::Millis;
use super::start_params::StartParams;
use crate::config::KeptVariables;
use crate::error::{Error, Result};
use crate::master::policy::executor_causes::ExecutorEndsState;
use crate::master::policy::fleet_state::FleetState;
use crate::protocol::control::{LastReload, ReloadStatus};

/// The format. Its number stays the first member for ever.
pub const FORMAT: u32 = 1;
/// The longest state that is read, in bytes.
pub const LONGEST: u64 = 64 << 20;

/// The whole state that is passed on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpgradeState {
    /// [`FORMAT`].
    pub format: u32,
    /// The version of preforkd that has written it.
    pub version: String,
    pub origin: StartParams,
    /// When the master was started (CLOCK_MONOTONIC, in milliseconds, like all times in the state).
    pub started: Millis,
    /// The configuration of the serving generation, as `check` prints it.
    pub settings: String,
    /// The values from environment files of programs. They are secrets, so they cross in memory only.
    #[serde(default)]
    pub secrets: KeptVariables,
    /// The descriptor of the log file; `None` for standard error.
    pub log: Option<RawFd>,
    /// The pid file, and the descriptor that holds its lock.
    pub pid_file: (OwnedPath, RawFd),
    pub control: ControlState,
    pub listeners: Vec<ListenerState>,
    /// The listeners of the serving generation, as indices of `listeners`.
    pub serving: Vec<usize>,
    /// The listeners of the service manager, as indices of `listeners`.
    pub passed: Vec<usize>,
    /// The listener of the observer, as an index of `listeners`; empty if there is none.
    #[serde(default)]
    pub observed: Vec<usize>,
    /// The state of the policy: slots, workers and deaths.
    pub fleet: FleetState,
    pub workers: WorkersState,
    /// What the master reports about the serving generation.
    pub known: GenerationInfo,
    pub orphans: OrphansState,
    /// The instance whose jobs are stored.
    #[serde(default)]
    pub jobs: Option<InstanceState>,
    /// How workers and pool processes have ended, for the next jobs process.
    #[serde(default)]
    pub executor_ends: ExecutorEndsState,
    /// The result of the last reload.
    pub last_reload: Option<LastReload>,
    /// The last reloads.
    #[serde(default)]
    pub reloads: Vec<ReloadStatus>,
    /// The result of the last upgrade.
    #[serde(default)]
    pub last_upgrade: Option<LastReload>,
    /// The clients that wait for the upgrade.
    pub waiting: Vec<u64>,
    /// Whether a reload was requested as well.
    pub reload_asked: bool,
    /// The clients that wait for that reload.
    pub reload_waiting: Vec<u64>,
}

/// The instance whose jobs are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceState {
    /// Its UUID.
    pub id: [u8; 16],
    /// The descriptor of its lock.
    pub lock: RawFd,
    /// Whether one of its processes has had the store open.
    #[serde(default)]
    pub was_opened: bool,
}

/// The members that are read first. They show whether the rest can be read.
#[derive(Deserialize)]
struct StateHeader {
    format: u32,
    #[serde(default)]
    version: String,
}

impl UpgradeState {
    /// Returns the state as it is written.
    ///
    /// # Errors
    /// A path that is not UTF-8.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self)
            .map_err(|error| Error::Refused(format!("could not write the server's state: {error}")))
    }

    /// Reads a state.
    ///
    /// # Errors
    /// The text is not a state, or has another format.
    pub fn of_json(bytes: &[u8]) -> Result<Self> {
        let unreadable = |error| {
            Error::Refused(format!(
                "version {} cannot read the running server's state: {error}",
                env!("CARGO_PKG_VERSION")
            ))
        };
        let head: StateHeader = serde_json::from_slice(bytes).map_err(unreadable)?;
        if head.format != FORMAT {
            return Err(Error::Refused(format!(
                "version {} of preforkd writes its state in format {}, but version {} reads format \
                 {FORMAT}; restart the server to change the version",
                head.version,
                head.format,
                env!("CARGO_PKG_VERSION"),
            )));
        }
        serde_json::from_slice(bytes).map_err(unreadable)
    }

    /// Returns the settings of the serving generation, and the values from environment files.
    pub fn served(&self) -> (String, KeptVariables) {
        (self.settings.clone(), self.secrets.clone())
    }

    /// Returns the numbers of all descriptors in the state.
    pub fn descriptors(&self) -> BTreeSet<RawFd> {
        let workers = &self.workers;
        let sessions = workers.sessions.iter().flat_map(|it| it.descriptors());
        let links = workers.living.iter().filter_map(|worker| worker.link);
        let clients = self.control.clients.iter().map(|client| client.fd);
        let listeners = self.listeners.iter().map(|listener| listener.fd);
        let single = [
            self.pid_file.1,
            self.control.fd,
            workers.board,
            workers.giving,
            workers.taking,
        ];
        links
            .chain(clients)
            .chain(listeners)
            .chain(self.log)
            .chain(sessions)
            .chain(workers.sources)
            .chain(workers.metrics)
            .chain(self.jobs.map(|jobs| jobs.lock))
            .chain(single)
            .collect()
    }
}
