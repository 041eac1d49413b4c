//! The upgrade of the running program in place (SIGUSR2, `upgrade`): another binary, the same
//! process.
//!
//! 1. What stands at the path that the server was started from is run beside it as a *probe*, with
//!    the real configuration and all that the master knows. What is missing, broken, hangs or can't
//!    read that, is found here, and nothing has changed.
//! 2. The master becomes that program (execve(2)). Its pid stays, and so do its children; listeners,
//!    the workers' links, the scoreboard, the adoption queue, the lock of the pid file, the control
//!    socket and its clients cross by their descriptors, what they mean in a table.
//! 3. The new program takes them over and reloads: its workers come up beside the old ones, which
//!    then drain. That reload's verdict is the upgrade's.
//! 4. Whatever fails in it until then, its reload included, becomes the old program once more, which
//!    was kept open: the old workers have never stopped serving, and who waits is told why.
//!
//! | file | concern |
//! | --- | --- |
//! | `origin` | how the server was started |
//! | `probe` | the program beside us, and its verdict |
//! | `state`, `fleet` | the table that crosses |
//! | `trial` | the exec, and the way back |
//! | `resume` | a master made of a table |
//! | `retreat` | a panic on trial |

mod exec_attempt;
mod probe;
mod start_params;
pub mod state;

#[cfg(test)]
mod tests;

use std::mem;
use std::os::fd::BorrowedFd;

use super::endpoints::control_socket::ClientId;
use super::main_loop::{Master, now};
use super::policy::event::Millis;
use crate::link::ids::Generation;
use crate::protocol::control::{ControlResponse, LastReload, version_of};
use crate::sys::process::{self, Exit, Pid};

pub use super::requests::rollback::PANICKED;
pub use super::resume::{check_state, take_over};
pub use exec_attempt::{ExecAttempt, StartMode, table_on_stdin};
use probe::Probe;
pub use start_params::StartParams;
use state::{FORMAT, UpgradeState};

/// The variable that tells a program that it is started by an upgrade.
const VARIABLE: &str = "PREFORKD_UPGRADE";
/// The one that says why the program after this one gave up.
const REASON: &str = "PREFORKD_UPGRADE_REASON";
/// What a probe writes on a line of its own when it could take over.
pub const PROBE_PASSED: &str = "preforkd: this program can take the running server over";

#[derive(Debug, Default)]
pub(super) enum UpgradeStage {
    /// There is none.
    #[default]
    Idle,
    /// The probe runs; or it was given up and has not ended yet.
    Probing(Box<Probe>),
    Passed(probe::FileIdentity),
    /// This is the new program, and its reload's verdict is open.
    AwaitingReload,
    /// This is the new program, and it has to go back.
    RollingBack(String),
}

/// The upgrade that is asked for or under way.
#[derive(Debug, Default)]
pub(super) struct Upgrade {
    /// It was asked for and has not begun.
    pub(super) asked: bool,
    pub(super) waiting: Vec<ClientId>,
    pub(super) stage: UpgradeStage,
    /// On trial: a reload was asked for besides, which the upgrade's own takes the place of.
    pub(super) reload_also_requested: bool,
    /// On trial: the old workers' configuration as it came, which this version may not know how to
    /// write.
    pub(super) settings: Option<String>,
    /// How the last one ended.
    pub last: Option<LastReload>,
}

impl Upgrade {
    /// Whether a reload has to wait for it.
    pub fn holds_reload(&self) -> bool {
        match &self.stage {
            UpgradeStage::Probing(probe) => !probe.given_up,
            UpgradeStage::Passed(_) | UpgradeStage::RollingBack(_) => true,
            UpgradeStage::Idle | UpgradeStage::AwaitingReload => false,
        }
    }

    /// Whether this is the new program, and may have to go back to the one before with all that came.
    pub fn is_on_trial(&self) -> bool {
        matches!(self.stage, UpgradeStage::AwaitingReload)
    }

    /// What the probe writes to, to be polled.
    pub fn output(&self) -> Option<BorrowedFd<'_>> {
        match &self.stage {
            UpgradeStage::Probing(probe) => probe.output(),
            _ => None,
        }
    }

    /// The probe has written something.
    pub fn listen(&mut self) {
        if let UpgradeStage::Probing(probe) = &mut self.stage {
            probe.listen();
        }
    }

    /// When the probe is given up.
    pub fn deadline(&self) -> Option<Millis> {
        match &self.stage {
            UpgradeStage::Probing(probe) => probe.deadline(),
            _ => None,
        }
    }
}

impl Master<'_> {
    /// Somebody wants an upgrade: a client that waits, or a signal.
    pub(super) fn ask_upgrade(&mut self, client: Option<ClientId>) {
        let refusal = match &self.upgrade.stage {
            _ if self.stopping => Some(self.end_in_words()),
            UpgradeStage::Idle => None,
            UpgradeStage::Probing(probe) if probe.given_up => {
                Some("the probe of the one before was killed and has not ended yet".into())
            }
            _ => Some("another one is under way".into()),
        };
        match (refusal, client) {
            // Before it begins, many are one.
            (None, client) => {
                self.upgrade.asked = true;
                self.upgrade.waiting.extend(client);
            }
            (Some(reason), Some(client)) => {
                let response = ControlResponse::refused(format!("upgrade refused: {reason}"), 1);
                self.control.answer(client, &response, now());
            }
            (Some(reason), None) => log::warn!("upgrade refused: {reason}"),
        }
    }

    /// Does what is next for an upgrade, between two turns of the loop.
    pub(super) fn advance_upgrade(&mut self) {
        match &mut self.upgrade.stage {
            UpgradeStage::Idle
                if self.upgrade.asked && !self.reload_asked && self.fleet.can_reload() =>
            {
                self.upgrade.asked = false;
                self.probe();
            }
            UpgradeStage::Probing(probe) if probe.deadline().is_some_and(|at| at <= now()) => {
                let reason = probe.give_up(None);
                self.refuse_upgrade(&format!("{}: {reason}", self.program()));
            }
            UpgradeStage::Passed(file) => {
                let file = *file;
                self.become_next(file);
            }
            UpgradeStage::RollingBack(reason) => {
                let reason = mem::take(reason);
                self.exec_old(&reason);
            }
            _ => {}
        }
    }

    fn program(&self) -> String {
        self.setup.origin.path.display().to_string()
    }

    fn probe(&mut self) {
        log::info!("upgrade: tries {}", self.program());
        let limit = self
            .serving_context
            .settings
            .workers
            .boot_timeout
            .as_millis() as Millis;
        let started = self
            .export()
            .to_json()
            .and_then(|table| Probe::start(&self.setup.origin, &table, now(), limit));
        match started {
            Ok(probe) => self.upgrade.stage = UpgradeStage::Probing(Box::new(probe)),
            Err(error) => self.refuse_upgrade(&error.to_string()),
        }
    }

    /// A child was reaped: whether it was the probe.
    pub(super) fn probe_ended(&mut self, pid: Pid, exit: Exit) -> bool {
        match mem::take(&mut self.upgrade.stage) {
            UpgradeStage::Probing(probe) if probe.pid() == pid => {
                let given_up = probe.given_up;
                match probe.verdict(exit) {
                    _ if given_up => {}
                    Ok(file) => self.upgrade.stage = UpgradeStage::Passed(file),
                    Err(reason) => self.refuse_upgrade(&format!("{}: {reason}", self.program())),
                }
                true
            }
            other => {
                self.upgrade.stage = other;
                false
            }
        }
    }

    /// Becomes the program that the probe has found good.
    fn become_next(&mut self, file: probe::FileIdentity) {
        if probe::identity(&self.setup.origin.path) != file {
            let reason = format!("{} has changed since it was tried", self.program());
            return self.refuse_upgrade(&reason);
        }
        log::info!("upgrade: becomes {}", self.program());
        self.queue_last_requests();
        self.apply_actions();
        let error = exec_attempt::exec_new(&self.export(), &self.signals);
        self.workers.allow_requests();
        self.refuse_upgrade(&format!("{} can't be executed: {error}", self.program()));
    }

    /// Everything stays as it was; tells who waits.
    pub(super) fn refuse_upgrade(&mut self, reason: &str) {
        // What follows the first line stands in the log already.
        let first = reason.lines().next().unwrap_or_default();
        log::error!("upgrade refused, everything stays as it was: {first}");
        let given_up =
            |stage: &UpgradeStage| matches!(stage, UpgradeStage::Probing(probe) if probe.given_up);
        if !given_up(&self.upgrade.stage) {
            self.upgrade.stage = UpgradeStage::Idle;
        }
        self.upgrade_ended(Err(reason.to_owned()));
    }

    /// The server stops, now or later, and with it what is under way of an upgrade: a program that is
    /// on trial stays.
    pub(super) fn cancel_upgrade(&mut self) {
        let reason = self.end_in_words();
        let under_way = match &self.upgrade.stage {
            UpgradeStage::Idle => mem::take(&mut self.upgrade.asked),
            UpgradeStage::Probing(probe) => !probe.given_up,
            UpgradeStage::Passed(_)
            | UpgradeStage::AwaitingReload
            | UpgradeStage::RollingBack(_) => true,
        };
        if under_way {
            log::warn!("upgrade refused: {reason}");
        }
        *self.setup.trial = None;
        match &mut self.upgrade.stage {
            UpgradeStage::Probing(probe) if !probe.given_up => {
                probe.give_up(Some(&reason));
            }
            UpgradeStage::Probing(_) => {}
            stage => *stage = UpgradeStage::Idle,
        }
        if under_way {
            self.upgrade_ended(Err(reason));
        }
    }

    fn upgrade_ended(&mut self, verdict: Result<String, String>) {
        let response = match &verdict {
            Ok(text) => ControlResponse::said(text.clone()),
            Err(reason) => ControlResponse::refused(format!("upgrade refused: {reason}"), 1),
        };
        self.upgrade.last = Some(LastReload {
            ok: verdict.is_ok(),
            at: process::unix_seconds(),
            error: verdict.err(),
        });
        for client in mem::take(&mut self.upgrade.waiting) {
            self.control.answer(client, &response, now());
        }
    }

    /// A reload's verdict was given: if it is that of an upgrade on trial, it is this one's too.
    /// `words` are what its workers logged. Says whether the program goes back, and the verdict is
    /// therefore not for telling.
    pub(super) fn upgrade_judged(
        &mut self,
        verdict: &Result<Generation, String>,
        words: &str,
    ) -> bool {
        if !self.upgrade.is_on_trial() || self.stopping {
            return false;
        }
        match verdict {
            Ok(generation) => {
                // What it came with is closed here, and the program before.
                *self.setup.trial = None;
                self.upgrade.stage = UpgradeStage::Idle;
                self.upgrade.settings = None;
                let name = &self.setup.program;
                let version = version_of(name, env!("CARGO_PKG_VERSION"));
                let sources = self.sources();
                let text = format!(
                    "{name} {version} runs, generation {generation} serves ({sources}){words}"
                );
                log::info!("upgrade: {text}");
                self.upgrade_ended(Ok(text));
                false
            }
            Err(reason) => {
                self.upgrade.stage = UpgradeStage::RollingBack(format!("{reason}{words}"));
                // They are told of a reload by the program that does it.
                self.next_verdict_for.append(&mut self.verdict_for);
                self.reload_asked |= self.upgrade.reload_also_requested;
                true
            }
        }
    }

    /// Becomes the program before, whose workers have served all along.
    fn exec_old(&mut self, reason: &str) {
        log::info!("upgrade: goes back to the program before");
        self.queue_last_requests();
        self.apply_actions();
        let error = match self.setup.trial.take() {
            Some(trial) => trial.exec_old_with_state(&self.export(), &self.signals, reason),
            None => std::io::Error::other("there is none"),
        };
        // This one goes on then: what is old are its workers, and they serve.
        self.workers.allow_requests();
        self.refuse_upgrade(&format!(
            "{reason}; and the program before can't be executed again ({error}), so this one goes on"
        ));
    }

    /// Reads what the workers have sent that the next program may not understand. They send no more of it.
    pub(super) fn queue_last_requests(&mut self) {
        self.workers.forbid_requests();
        let pids: Vec<_> = self.workers.iter().map(|(pid, _)| pid).collect();
        for pid in pids {
            self.queue_reports(pid);
        }
    }

    /// All that the next program has to know. To be asked between two turns of the loop.
    pub(super) fn export(&self) -> UpgradeState {
        let mut listeners = self.serving_context.listeners.clone();
        for passed in &self.passed {
            if !listeners.iter().any(|one| std::rc::Rc::ptr_eq(one, passed)) {
                listeners.push(passed.clone());
            }
        }
        let places = |some: &[std::rc::Rc<super::endpoints::listeners::Listener>]| {
            let place = |one| {
                listeners
                    .iter()
                    .position(|other| std::rc::Rc::ptr_eq(one, other))
            };
            some.iter().filter_map(place).collect()
        };
        let numbers = |clients: &[ClientId]| clients.iter().map(|client| client.0).collect();
        UpgradeState {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            origin: self.setup.origin.clone(),
            started: self.started,
            settings: match &self.upgrade.settings {
                Some(settings) => settings.clone(),
                None => self.serving_context.settings.to_toml(),
            },
            log: match self.serving_context.settings.log.file {
                Some(_) => crate::logging::output_descriptor(),
                None => None,
            },
            pid_file: self.pid_file.export(),
            control: self.control.export(),
            listeners: listeners.iter().map(|one| one.export()).collect(),
            serving: places(&self.serving_context.listeners),
            passed: places(&self.passed),
            fleet: self.fleet.export(),
            workers: self.workers.export(),
            known: (*self.serving_context.known).clone(),
            orphans: self.orphans.export(self.workers.pool_pids()),
            last_reload: self.last_reload.clone(),
            last_upgrade: self.upgrade.last.clone(),
            waiting: numbers(&self.upgrade.waiting),
            reload_asked: self.reload_asked,
            reload_waiting: numbers(&self.next_verdict_for),
        }
    }
}
