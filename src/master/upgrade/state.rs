//! The table that crosses an exec: what the program before knew, as JSON in a file of memory.
//!
//! It is read by the version after the one that wrote it, and by the one before it when an upgrade
//! is taken back. So members are only added, each with a default (`#[serde(default)]`), and what is
//! not known is passed over; what can't be said that way gets a new [`FORMAT`], and a program that
//! does not know the number refuses. `tests/upgrade-state.json` is one that was written once, and
//! is read for ever. Descriptors are in it by their numbers.

use std::collections::BTreeSet;
use std::os::fd::RawFd;

use serde::{Deserialize, Serialize};

use super::super::children::workers::{GenerationInfo, WorkersState};
use super::super::endpoints::control_socket::ControlState;
use super::super::endpoints::listeners::ListenerState;
use super::super::endpoints::owned_path::OwnedPath;
use super::super::policy::event::Millis;
use super::start_params::StartParams;
use crate::error::{Error, Result};
use crate::master::policy::fleet_state::FleetState;
use crate::protocol::control::LastReload;

/// The form of the table; the number is its first member for all time.
pub const FORMAT: u32 = 1;
/// The longest table that is read, in bytes.
pub const LONGEST: u64 = 64 << 20;

/// All that crosses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpgradeState {
    /// Which form this is: [`FORMAT`].
    pub format: u32,
    /// The version of preforkd that wrote it.
    pub version: String,
    pub origin: StartParams,
    /// When, on the clock of all these times (CLOCK_MONOTONIC, in milliseconds).
    pub started: Millis,
    /// The configuration of the generation that serves, as `check` prints it.
    pub settings: String,
    /// The log file's descriptor, where it is not standard error.
    pub log: Option<RawFd>,
    /// The pid file, and the descriptor that its lock belongs to.
    pub pid_file: (OwnedPath, RawFd),
    /// The control socket and its clients.
    pub control: ControlState,
    pub listeners: Vec<ListenerState>,
    /// Those of the generation that serves, by their place in `listeners`.
    pub serving: Vec<usize>,
    /// Those of the service manager's, likewise.
    pub passed: Vec<usize>,
    /// The workers.
    pub fleet: FleetState,
    /// How they are spoken with.
    pub workers: WorkersState,
    /// What is told of the generation that serves.
    pub known: GenerationInfo,
    /// Children that are nobody's business.
    pub orphans: OrphansState,
    /// How the last reload ended.
    pub last_reload: Option<LastReload>,
    /// How the last upgrade ended.
    #[serde(default)]
    pub last_upgrade: Option<LastReload>,
    /// Which clients wait for the upgrade's verdict.
    pub waiting: Vec<u64>,
    /// Whether a reload was asked for beside it, and which clients wait for that.
    pub reload_asked: bool,
    /// Likewise.
    pub reload_waiting: Vec<u64>,
}

/// What the master knows of children that are no workers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrphansState {
    /// Children from before it was a master.
    pub others: Vec<i32>,
    /// Every child there was right before the exec: what the next program finds besides, its own
    /// functions have started. `None` from a version that did not look.
    #[serde(default)]
    pub children: Option<Vec<i32>>,
    /// Whether what a dead worker left may still be there.
    pub hunts: bool,
}

/// What is read before anything else.
#[derive(Deserialize)]
struct StateHeader {
    format: u32,
    #[serde(default)]
    version: String,
}

impl UpgradeState {
    /// The table as it is written.
    ///
    /// # Errors
    /// A path that is not UTF-8.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self).map_err(|error| {
            Error::Refused(format!("what the server knows can't be written: {error}"))
        })
    }

    /// The table, read.
    ///
    /// # Errors
    /// Another form, or none.
    pub fn of_json(bytes: &[u8]) -> Result<Self> {
        let unreadable = |error| {
            Error::Refused(format!(
                "what the running server knows can't be read by version {}: {error}",
                env!("CARGO_PKG_VERSION")
            ))
        };
        let head: StateHeader = serde_json::from_slice(bytes).map_err(unreadable)?;
        if head.format != FORMAT {
            return Err(Error::Refused(format!(
                "version {} of preforkd passes on what it knows in form {}, and version {} reads \
                 form {FORMAT}; restart the server to get from one to the other",
                head.version,
                head.format,
                env!("CARGO_PKG_VERSION"),
            )));
        }
        serde_json::from_slice(bytes).map_err(unreadable)
    }

    /// The numbers of all descriptors in it.
    pub fn descriptors(&self) -> BTreeSet<RawFd> {
        let workers = &self.workers;
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
            .chain(single)
            .collect()
    }
}
