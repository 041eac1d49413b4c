//! Holds the stage of an upgrade: requested, probing, probed, executed and waiting for its reload, or rolling back.
//!
//! This file only keeps the state. The main loop polls the probe, and `requests/upgrade_driver.rs` carries out the
//! steps.

use std::os::fd::BorrowedFd;

use super::probe::{FileIdentity, Probe};
use crate::config::KeptVariables;
use crate::master::endpoints::control_socket::ClientId;
use crate::master::policy::event::Millis;
use crate::protocol::control::LastReload;

#[derive(Debug, Default)]
pub enum UpgradeStage {
    #[default]
    Idle,
    /// The probe runs, or it was killed and has not ended yet.
    Probing(Box<Probe>),
    Passed(FileIdentity),
    /// This is the new program, and its reload has no result yet.
    AwaitingReload,
    /// This is the new program. It must roll back, for this reason.
    RollingBack(String),
}

/// The upgrade that is requested or under way.
#[derive(Debug, Default)]
pub struct Upgrade {
    /// Whether it was requested and has not begun.
    pub is_requested: bool,
    pub waiting: Vec<ClientId>,
    pub stage: UpgradeStage,
    /// Whether a reload was requested as well. The reload of the upgrade answers that request.
    pub reload_also_requested: bool,
    /// The configuration and the secrets of the old workers, as the old program has passed them on. `Some` while this
    /// is the new program. They are kept unchanged for a rollback, because this version may not know all keys.
    pub settings: Option<(String, KeptVariables)>,
    /// The result of the last upgrade.
    pub last: Option<LastReload>,
}

impl Upgrade {
    /// Returns whether a reload has to wait for the upgrade.
    pub fn holds_reload(&self) -> bool {
        match &self.stage {
            UpgradeStage::Probing(probe) => !probe.given_up,
            UpgradeStage::Passed(_) | UpgradeStage::RollingBack(_) => true,
            UpgradeStage::Idle | UpgradeStage::AwaitingReload => false,
        }
    }

    /// Returns whether this is the new program and its reload has no result, so that a rollback is possible.
    pub fn is_on_trial(&self) -> bool {
        matches!(self.stage, UpgradeStage::AwaitingReload)
    }

    /// Returns the probe's output for poll(2).
    pub fn output(&self) -> Option<BorrowedFd<'_>> {
        match &self.stage {
            UpgradeStage::Probing(probe) => probe.output(),
            _ => None,
        }
    }

    /// Reads the output of the probe.
    pub fn listen(&mut self) {
        if let UpgradeStage::Probing(probe) = &mut self.stage {
            probe.listen();
        }
    }

    /// Returns when the probe is given up.
    pub fn deadline(&self) -> Option<Millis> {
        match &self.stage {
            UpgradeStage::Probing(probe) => probe.deadline(),
            _ => None,
        }
    }
}
