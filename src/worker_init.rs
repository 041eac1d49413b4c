//! What a new process gets at the fork: a worker, pool process or acceptor from the master, and a session
//! from its acceptor.

use std::os::fd::{OwnedFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::config::{Address, IsolationConfig, JobStore, Settings};
use crate::handler::pool::definition::{ProgramCounts, ProgramExit};
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
use crate::logging::AccessFile;
use crate::sys::account::Account;
use crate::sys::instance_lock::InstanceLock;
use crate::sys::shared_memory::SharedFlag;
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
    /// Its block of counters on the metrics board.
    pub metrics: MetricsAccess,
    /// The file of the access log; `None` without one, and in a pool process.
    pub access_file: Option<Arc<AccessFile>>,
    /// All scoreboard records, and the index of its own.
    pub records: (&'static [WorkerRecord], usize),
    /// The records of all sessions; empty if no listener is isolated.
    pub session_records: &'static [SessionRecord],
    /// In a worker or acceptor with a listener that limits the connections of a source.
    pub sources: Option<SourceInit>,
    /// `Some` in acceptors and sessions.
    pub isolated: Option<IsolatedInit>,
    /// `Some` in a worker, pool process or jobs process of a configuration with `[jobs]`.
    pub jobs: Option<Arc<JobsInstance>>,
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

/// One run of a server, from its start to its end, as its job store knows it.
#[derive(Debug)]
pub struct JobsInstance {
    /// Its UUID: new at each start, the same after a reload or an upgrade.
    pub id: [u8; 16],
    /// The lock of the store. It is free when no process of the instance has the descriptor any more.
    pub lock: InstanceLock,
    /// The store; `None` if it is unknown after an upgrade.
    pub store: Option<JobStore>,
    /// Whether a process of the instance has had the store open. All processes share it.
    pub was_opened: SharedFlag,
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
    pub master_pipe: Rc<OwnedFd>,
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
            let title = format!("{}: {role} {}", self.program, self.name());
            area.set(title.trim_end());
        }
        title::set_comm(&self.program, role);
    }

    /// Returns the role of the process, for its title.
    pub fn role(&self) -> &'static str {
        match self.slot {
            slot if slot.is_worker() => "worker",
            slot if slot.pool().is_some() => "pool",
            slot if slot.acceptor().is_some() => "acceptor",
            slot if slot.is_jobs() => "jobs",
            _ => "connection",
        }
    }

    /// Lets the pool with this number count its programs in the block of this process.
    pub fn count_programs(&self, number: usize) {
        if let Some(pool) = self.registry.all_pools().get(number) {
            let (block, place) = (self.metrics.block, self.metrics.pool(number));
            pool.count_in(ProgramCounts {
                starts: &block.program_starts[place],
                exits: &block.program_exits[place],
            });
        }
    }

    /// Lets the pools of connections count their programs in this block too. Sessions, which are forked later, inherit
    /// it.
    pub fn count_programs_of_connections(&self) {
        let pools = self.registry.pools().len()..self.registry.all_pools().len();
        pools.for_each(|number| self.count_programs(number));
    }

    /// Counts the ends of the programs that a dead session has left. `is_crash`: it was not ordered to end.
    pub fn count_left_programs(&self, session: Pid, is_crash: bool) {
        let exit = match is_crash {
            true => ProgramExit::Signal,
            false => ProgramExit::Ordered,
        };
        let pools = self.registry.all_pools().iter();
        pools.for_each(|pool| pool.count_left(session, exit));
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

    /// Returns the name of a pool, the address of a listener, or the number of a slot. It is empty in the jobs
    /// process.
    pub fn name(&self) -> String {
        if self.slot.is_jobs() {
            return String::new();
        }
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
    /// A connection to the control socket. The observer asks the master over it for the facts.
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

/// The function that a forked observer runs. The master does not know its code.
pub type ObserverMain = fn(ObserverInit<'_>) -> !;

/// The function that a forked child runs: the worker's code, which the master does not know.
pub type WorkerMain = fn(WorkerInit<'_>) -> !;
