//! Defines what a master needs to start, and what it asks of the host program.

use std::sync::Arc;
use std::time::Duration;

use super::policy::event::{Millis, PolicyLimits};
use super::upgrade::exec_attempt::ExecAttempt;
use super::upgrade::start_params::StartParams;
use crate::config::Settings;
use crate::error::{Error, Result};
use crate::handler::registry::Registry;
use crate::logging::{AccessFile, LogOutput};
use crate::sys::daemon::Launcher;
use crate::sys::notify::PassedListener;
use crate::sys::title::{self, TitleArea};
use crate::worker_init::{JobsInstance, ObserverMain, WorkerMain};

/// What the master asks of the program around it, at a start and at each reload.
pub trait Embedder {
    /// Reads and checks the configuration.
    ///
    /// # Errors
    /// The fault in the configuration.
    fn load(&self) -> Result<Settings>;
    /// Opens the lock of the job store, and marks this process as its master. Returns `None` without `[jobs]`.
    ///
    /// # Errors
    /// If another server uses the store, or its lock cannot be opened.
    fn open_jobs(&self, settings: &Settings) -> Result<Option<JobsInstance>>;
    /// Makes the table of methods for a configuration.
    fn registry(&self, settings: &Settings) -> Arc<Registry>;
    /// Sets level, format and output of the log for a configuration. Returns the previous output.
    ///
    /// # Errors
    /// If the log file cannot be opened. Then nothing has changed.
    fn configure_log(&self, settings: &Settings) -> Result<Option<LogOutput>>;
    /// Sets the log back to an earlier configuration and its output.
    fn restore_log(&self, settings: &Settings, output: LogOutput);
}

/// What a master needs to start.
pub struct Setup<'a> {
    /// The name of the program, for titles.
    pub program: String,
    pub title: Option<TitleArea>,
    /// The configuration of the first generation.
    pub settings: Settings,
    /// The program around the master.
    pub host: &'a dyn Embedder,
    /// The function that a forked child runs.
    pub worker_main: WorkerMain,
    /// What a forked observer becomes.
    pub observer_main: ObserverMain,
    /// Sockets that the service manager has passed.
    pub passed: Vec<PassedListener>,
    /// How the program was started, for an upgrade.
    pub origin: StartParams,
    /// The upgrade that has started this program. `Some` until it has a result.
    pub trial: &'a mut Option<ExecAttempt>,
    /// The process that waits for a daemon. Taken when it gets the result of the start.
    pub launcher: &'a mut Option<Launcher>,
}

/// Returns what the policy needs of a configuration.
pub fn limits(settings: &Settings) -> PolicyLimits {
    let workers = &settings.workers;
    let millis = |duration: Duration| duration.as_millis() as Millis;
    PolicyLimits {
        pools: settings.pool_processes(),
        acceptors: settings.isolated().count(),
        has_observer: settings.observe.address.is_some(),
        has_jobs: settings.jobs.is_some(),
        count: workers.count,
        boot_timeout: millis(workers.boot_timeout),
        drain_timeout: millis(settings.longest_drain()),
        heartbeat_timeout: millis(workers.heartbeat_timeout),
        respawn_burst: workers.respawn_burst,
        respawn_max_delay: millis(workers.respawn_max_delay),
        max_memory: workers.max_memory,
        max_lifetime: millis(workers.max_lifetime),
        max_unavailable: workers.max_unavailable,
    }
}

/// Opens the file of the access log; `None` if the configuration names none.
///
/// # Errors
/// If it cannot be opened.
pub fn open_access_file(settings: &Settings) -> Result<Option<Arc<AccessFile>>> {
    let config = settings.access_log.as_ref();
    let Some(file) = config.and_then(|config| config.file.as_deref()) else {
        return Ok(None);
    };
    match AccessFile::open(file) {
        Ok(opened) => Ok(Some(Arc::new(opened))),
        Err(error) => Err(Error::system_with(
            format!("open the access log {}", file.display()),
            error,
            "set access-log.file to a path that this user may write",
        )),
    }
}

/// Sets the process title and the name of the thread.
pub fn show_title(setup: &Setup<'_>) {
    if let Some(area) = setup.title {
        area.set(&master_title(&setup.program, &setup.settings));
    }
    title::set_comm(&setup.program, "master");
}

fn master_title(program: &str, settings: &Settings) -> String {
    match &settings.file {
        Some(file) => format!("{program}: master {}", file.display()),
        None => format!("{program}: master"),
    }
}
