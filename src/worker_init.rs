//! What the master hands to a new worker at the fork: everything that the worker starts from.

use std::os::fd::{OwnedFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;

use crate::config::Settings;
use crate::handler::registry::Registry;
use crate::link::adoption_queue::AdoptionQueue;
use crate::link::channel::WorkerEnd;
use crate::link::ids::{Generation, Pid, Slot};
use crate::link::quarantine::{CrashReport, Quarantine};
use crate::link::scoreboard::WorkerRecord;
use crate::link::stuck_calls::StuckCalls;
use crate::sys::signal::SignalPipe;
use crate::sys::title::{self, TitleArea};

/// What a worker gets from the master.
pub struct WorkerInit<'a> {
    /// Where it is; that of a pool process says which pool.
    pub slot: Slot,
    pub generation: Generation,
    /// The configuration of that generation.
    pub settings: Rc<Settings>,
    /// The methods of that generation.
    pub registry: Arc<Registry>,
    pub listeners: Vec<Rc<OwnedFd>>,
    /// Where live connections pass between workers.
    pub adoption: AdoptionQueue,
    /// The way to the master.
    pub link: WorkerEnd,
    /// Where its warnings and errors are told until it is ready, if somebody waits for that.
    pub startup_log_tx: Option<OwnedFd>,
    /// Where it shows what it does.
    pub record: &'static WorkerRecord,
    /// The records of all workers, and the index of its own.
    pub records: (&'static [WorkerRecord], usize),
    /// Calls that it is not to run.
    pub quarantine: Quarantine,
    /// What is known of its end, once it has died.
    pub crash_report: &'static CrashReport,
    /// Where it writes which calls are stuck.
    pub stuck: &'static StuckCalls,
    /// Its copy of the master's signal pipe, to be left.
    pub master_signals: &'a mut SignalPipe,
    /// Its copy of the pid file's descriptor, to be closed.
    pub pid_file: RawFd,
    /// Where the title stands.
    pub title: Option<TitleArea>,
    /// The name of the program, for the title.
    pub program: String,
    /// Who forked it.
    pub master: Pid,
}

impl WorkerInit<'_> {
    /// Lets `ps` say what this process is, in both of its forms.
    pub fn show(&self, role: &str) {
        if let Some(area) = self.title {
            area.set(&format!("{}: {role} {}", self.program, self.name()));
        }
        title::set_comm(&self.program, role);
    }

    /// What the process is, for its title.
    pub fn role(&self) -> &'static str {
        match self.slot.pool() {
            Some(_) => "pool",
            None => "worker",
        }
    }

    /// Which of its kind it is: the name of a pool, or the number of a slot.
    pub fn name(&self) -> String {
        let pool = self
            .slot
            .pool()
            .and_then(|pool| self.registry.pools().get(pool));
        pool.map_or(self.slot.to_string(), |pool| pool.name().to_owned())
    }
}

/// What a forked child becomes: the worker's own code, which the master does not know.
pub type WorkerMain = fn(WorkerInit<'_>) -> !;
