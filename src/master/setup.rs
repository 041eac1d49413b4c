//! What a master is started from, and what it asks of the program around it.

use std::sync::Arc;

use super::upgrade::{ExecAttempt, StartParams};
use crate::config::Settings;
use crate::error::Result;
use crate::handler::registry::Registry;
use crate::logging::LogOutput;
use crate::sys::daemon::Launcher;
use crate::sys::notify::PassedListener;
use crate::sys::title::TitleArea;
use crate::worker_init::WorkerMain;

/// What the master asks of the program that it runs in: at a start and at each reload.
pub trait Embedder {
    /// Reads and checks the configuration.
    ///
    /// # Errors
    /// What is wrong with it.
    fn load(&self) -> Result<Settings>;
    /// Makes the table of methods of a configuration.
    fn registry(&self, settings: &Settings) -> Arc<Registry>;
    /// Sets level, form and output of the log as a configuration says; returns the old output.
    ///
    /// # Errors
    /// When the log file can't be opened; then nothing has changed.
    fn configure_log(&self, settings: &Settings) -> Result<Option<LogOutput>>;
    /// Sets them back to what an earlier configuration says, with the output of then.
    fn restore_log(&self, settings: &Settings, output: LogOutput);
}

/// What a master is started from.
pub struct Setup<'a> {
    /// The name of the program, for titles.
    pub program: String,
    /// Where the title goes.
    pub title: Option<TitleArea>,
    /// The configuration to start with.
    pub settings: Settings,
    /// What the program around it knows.
    pub host: &'a dyn Embedder,
    /// What a forked child becomes.
    pub worker_main: WorkerMain,
    /// Listeners of the service manager's.
    pub passed: Vec<PassedListener>,
    /// How it was started, for an upgrade.
    pub origin: StartParams,
    /// The upgrade that this program was started by, until its verdict.
    pub trial: &'a mut Option<ExecAttempt>,
    /// The shell that waits for a daemon; taken once it has its answer.
    pub launcher: &'a mut Option<Launcher>,
}
