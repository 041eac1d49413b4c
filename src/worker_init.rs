//! What a new process gets at the fork: a worker, pool process or acceptor from the master, and a session
//! from its acceptor.

use std::os::fd::{OwnedFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::config::{Address, IsolationConfig, Settings};
use crate::handler::pool::pool_table::MethodNumbers;
use crate::handler::registry::Registry;
use crate::link::adoption_queue::AdoptionQueue;
use crate::link::channel::WorkerEnd;
use crate::link::ids::{Generation, Pid, Slot};
use crate::link::metrics_board::MetricsAccess;
use crate::link::quarantine::{CrashReport, Quarantine};
use crate::link::scoreboard::WorkerRecord;
use crate::link::session_table::SessionRecord;
use crate::link::source_table::{SourceLimit, SourceTables};
use crate::link::stuck_calls::StuckCalls;
use crate::sys::account::Account;
use crate::sys::signal::SignalPipe;
use crate::sys::title::{self, TitleArea};

/// What a new process gets at the fork.
pub struct WorkerInit<'a> {
    /// Its slot. The slot of a pool process contains the number of the pool.
    pub slot: Slot,
    pub generation: Generation,
    /// The configuration of its generation.
    pub settings: Rc<Settings>,
    /// The methods of its generation.
    pub registry: Arc<Registry>,
    pub listeners: Vec<Rc<OwnedFd>>,
    /// The numbers of the methods in a pool process.
    pub methods: MethodNumbers,
    /// In a worker, the lanes of pools whose processes are of an earlier generation.
    pub kept_lanes: Vec<usize>,
    /// The queue through which workers hand over connections.
    pub adoption: AdoptionQueue,
    /// The link to the master.
    pub link: WorkerEnd,
    /// Where its warnings and errors go until it is ready. `Some` if a start or reload waits for it.
    pub startup_log_tx: Option<OwnedFd>,
    /// Its scoreboard record.
    pub record: &'static WorkerRecord,
    /// Where it counts.
    pub metrics: MetricsAccess,
    /// All scoreboard records, and the index of its own.
    pub records: (&'static [WorkerRecord], usize),
    /// The records of all sessions; empty if no listener is isolated.
    pub session_records: &'static [SessionRecord],
    /// In a worker or acceptor with a listener that limits the connections of a source.
    pub sources: Option<SourceInit>,
    /// `Some` in acceptors and sessions.
    pub isolated: Option<IsolatedInit>,
    /// The calls that it must refuse.
    pub quarantine: Quarantine,
    /// Where it writes what it was running, for the case of a crash.
    pub crash_report: &'static CrashReport,
    /// Where it writes which calls are stuck.
    pub stuck: &'static StuckCalls,
    /// Its copy of the parent's signal pipe, to be closed.
    pub master_signals: &'a mut SignalPipe,
    /// Its copy of the pid file's descriptor, to be closed; `None` in a session, whose acceptor has closed
    /// it.
    pub pid_file: Option<RawFd>,
    pub title: Option<TitleArea>,
    /// The name of the program, for the title.
    pub program: String,
    pub master: Pid,
}

/// What acceptors and sessions need in addition.
#[derive(Debug, Clone)]
pub struct IsolatedInit {
    /// The index of the listener in the configuration.
    pub listen: usize,
    /// Its address, for titles.
    pub address: String,
    /// The records of the listener's sessions, and the index of the first one in the table.
    pub range: (&'static [SessionRecord], usize),
    /// The reading end of a pipe whose only writer is the master. It ends with the master.
    pub master_life: Rc<OwnedFd>,
    /// The file of the scoreboard, for reading. With it a session gives up the right to write there.
    pub scoreboard: Rc<OwnedFd>,
    /// In a session, where it records that its event loop runs, in milliseconds (CLOCK_MONOTONIC). Only its
    /// acceptor has this memory too.
    pub heartbeat_ms: Option<&'static AtomicU64>,
}

/// How the connections of a source are limited.
#[derive(Debug, Clone)]
pub struct SourceInit {
    pub tables: &'static SourceTables,
    /// The limits of the listeners, in the order of these.
    pub limits: Vec<SourceLimit>,
}

impl WorkerInit<'_> {
    /// Sets the process title and the name of the main thread.
    pub fn show(&self, role: &str) {
        if let Some(area) = self.title {
            area.set(&format!("{}: {role} {}", self.program, self.name()));
        }
        title::set_comm(&self.program, role);
    }

    /// Returns the role of the process, for its title.
    pub fn role(&self) -> &'static str {
        match self.slot {
            slot if slot.is_worker() => "worker",
            slot if slot.pool().is_some() => "pool",
            slot if slot.acceptor().is_some() => "acceptor",
            _ => "connection",
        }
    }

    /// Returns the keys of the isolated listener.
    pub fn isolation(&self) -> Option<&IsolationConfig> {
        let listen = self.settings.listen.get(self.isolated.as_ref()?.listen)?;
        listen.isolation.as_ref()
    }

    /// Returns the account to change to; `None` for no change.
    pub fn account(&self) -> Option<&Account> {
        let own = self.isolation().and_then(|it| it.account.as_ref());
        let account = own.or(self.settings.account.as_ref());
        account.filter(|_| self.slot.session().is_none())
    }

    /// Returns the name of a pool, the address of a listener, or the number of a slot.
    pub fn name(&self) -> String {
        if let Some(isolated) = &self.isolated {
            return match self.slot.session() {
                Some(_) => "(spare)".to_owned(),
                None => isolated.address.clone(),
            };
        }
        let pool = self
            .slot
            .pool()
            .and_then(|pool| self.registry.pools().get(pool));
        pool.map_or(self.slot.to_string(), |pool| pool.name().to_owned())
    }
}

/// What an observer gets from the master.
pub struct ObserverInit<'a> {
    /// The configuration of the generation that serves.
    pub settings: Rc<Settings>,
    pub listener: Rc<OwnedFd>,
    /// A client of the control socket: what only the master knows is asked there.
    pub link: OwnedFd,
    /// The metrics board, opened for reading only.
    pub board: Option<OwnedFd>,
    /// Its copy of the signal pipe of the master, to be left.
    pub master_signals: &'a mut SignalPipe,
    /// Its copy of the pid file's descriptor, to be closed.
    pub pid_file: RawFd,
    pub title: Option<TitleArea>,
    /// The name of the program, for the title.
    pub program: String,
    /// The master.
    pub master: Pid,
}

impl ObserverInit<'_> {
    /// Whether its clients come by a unix socket.
    pub fn is_unix(&self) -> bool {
        matches!(self.settings.observe.address, Some(Address::Unix(_)))
    }
}

/// What a forked observer becomes, which the master does not know.
pub type ObserverMain = fn(ObserverInit<'_>) -> !;

/// What a forked child becomes: the worker's own code, which the master does not know.
pub type WorkerMain = fn(WorkerInit<'_>) -> !;
