//! Describes a pool as configured: how its programs are started, and the memory that shows their states.

use std::ffi::CString;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::entry::ServingProgram;
use super::life;
use super::program_deaths::{ProgramDeath, ProgramDeaths};
use super::program_record::{ProgramRecord, ProgramState};
use crate::config;
use crate::handler::prepared_program::{PreparedProgram, c_string};
use crate::handler::{Context, Handler, Placement};
use crate::protocol::code::Code;
use crate::protocol::rpc_error::RpcError;
use crate::sys::process::Pid;
use crate::sys::process_tree;
use crate::sys::shared_memory::OwnedArray;

/// The largest number of programs of a pool, including the additional one while they are replaced.
const MOST_PROGRAMS: NonZeroUsize = NonZeroUsize::new(1025).expect("it is above zero");
/// The largest number of programs with `scope = "connection"`: one for each session of a listener. Sessions of further
/// listeners take what is left.
const MOST_SESSION_PROGRAMS: NonZeroUsize = NonZeroUsize::new(4096).expect("it is above zero");

/// A pool as configured.
#[derive(Debug)]
pub struct Pool {
    pub(super) name: String,
    pub(super) program: PreparedProgram,
    pub(super) arguments: Vec<CString>,
    pub(super) settings: config::PoolConfig,
    /// Whether its programs are killed as soon as their process ends, because they may run attempts of jobs.
    pub(super) has_jobs: bool,
    /// `workers.boot-timeout`.
    worker_boot: Duration,
    /// The largest number of bytes of an answer.
    pub(super) limit: usize,
    /// The deepest nesting of an answer.
    pub(super) depth: usize,
    /// The states of its programs, by their numbers; with `scope = "connection"` those of all sessions. `None` if
    /// there was no memory.
    records: Option<Arc<OwnedArray<ProgramRecord>>>,
    /// With `scope = "connection"`, the place of this process's program among them.
    own_record: OnceLock<usize>,
    /// The counters of starts and ends of its programs; set in its pool process, or in an acceptor.
    counts: OnceLock<ProgramCounts>,
    /// The deaths of its programs. `None` if there was no memory.
    deaths: Option<Arc<OwnedArray<ProgramDeaths>>>,
}

/// Counters of the programs of a pool, in shared memory. Several threads of the pool process add to them, or the
/// sessions of an acceptor.
#[derive(Debug, Clone, Copy)]
pub struct ProgramCounts {
    pub starts: &'static AtomicU64,
    /// By `ProgramExit`.
    pub exits: &'static [AtomicU64],
}

/// How a program ended, in the order of the labels of the metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProgramExit {
    Ordered,
    /// It was replaced, because it had reached one of its limits.
    Recycled,
    /// It was ended, because no call came.
    Idle,
    /// By itself, with an exit code.
    Exit,
    Signal,
    /// Killed with its abandoned call.
    Timeout,
    /// It wrote something that is not a valid answer.
    Protocol,
    /// It did not become ready.
    Boot,
}

impl Pool {
    /// Makes the pool with this name in these settings.
    pub fn new(name: &str, pool: &config::PoolConfig, settings: &config::Settings) -> Self {
        let most = match pool.scope {
            config::PoolScope::Connection => MOST_SESSION_PROGRAMS,
            config::PoolScope::Shared => MOST_PROGRAMS,
        };
        Pool {
            name: name.to_owned(),
            program: prepared(pool),
            arguments: arguments(pool),
            settings: pool.clone(),
            has_jobs: settings.jobs.is_some(),
            worker_boot: settings.workers.boot_timeout,
            limit: settings.limits.frame,
            depth: settings.limits.depth,
            records: OwnedArray::new(most).ok().map(Arc::new),
            own_record: OnceLock::new(),
            counts: OnceLock::new(),
            deaths: OwnedArray::new(NonZeroUsize::MIN).ok().map(Arc::new),
        }
    }

    /// Makes the same pool with another table, in the same process.
    pub(super) fn with_config(&self, config: config::PoolConfig) -> Self {
        Pool {
            name: self.name.clone(),
            program: prepared(&config),
            arguments: arguments(&config),
            settings: config,
            has_jobs: self.has_jobs,
            worker_boot: self.worker_boot,
            limit: self.limit,
            depth: self.depth,
            records: self.records.clone(),
            own_record: OnceLock::new(),
            counts: self.counts.clone(),
            deaths: self.deaths.clone(),
        }
    }

    /// Returns the longest time for the first start of each program in milliseconds. A start or a reload waits
    /// for it.
    pub(super) fn first_boot(&self) -> u64 {
        // Earlier than the master's timeout, so that the reason is known.
        let worker = self.worker_boot;
        life::millis(self.settings.boot_timeout.min(worker - worker / 10))
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the states of its programs, as the pool process publishes them.
    pub fn records(&self) -> &[ProgramRecord] {
        self.records.as_deref().map_or(&[], |records| records)
    }

    /// Returns where the state of the program with this number is shown.
    pub(super) fn record(&self, number: usize) -> Option<&ProgramRecord> {
        let own = self.own_record.get().copied();
        let place = if self.is_of_connection() {
            own
        } else {
            Some(number)
        };
        self.records().get(place?)
    }

    /// Takes a record for the program of this session, if one is free.
    pub(super) fn claim_record(&self) {
        let lives = |pid| process_tree::start_ticks(Pid(pid)).is_some();
        let claim = |lives: &dyn Fn(i32) -> bool| {
            let mut records = self.records().iter();
            records.position(|record| record.claim(Pid::current().0, lives))
        };
        // Whether an owner lives takes a read of /proc. So those are asked only if no record is without an owner.
        let found = claim(&|_| true).or_else(|| claim(&lives));
        if let Some(place) = found {
            // A session starts one program of the pool in its life.
            let _ = self.own_record.set(place);
        }
    }

    /// Counts starts and ends of its programs from now on.
    pub fn count_in(&self, counts: ProgramCounts) {
        // Each process has one block, and sets it once.
        let _ = self.counts.set(counts);
    }

    pub(super) fn count_start(&self) {
        if let Some(counts) = self.counts.get() {
            counts.starts.fetch_add(1, Relaxed);
        }
    }

    pub(super) fn count_exit(&self, exit: ProgramExit) {
        if let Some(counts) = self.counts.get() {
            counts.exits[exit as usize].fetch_add(1, Relaxed);
        }
    }

    /// Counts the end of the program that a dead session has left, because the session itself could not count it.
    pub fn count_left(&self, session: Pid, exit: ProgramExit) {
        let has_left = |record: &&ProgramRecord| {
            let view = record.view();
            view.owner == session.0 && view.pid.is_some()
        };
        for record in self.records().iter().filter(has_left) {
            record.show(0, ProgramState::Vacant, 0);
            self.count_exit(exit);
        }
    }

    /// Records how a program died, for the master.
    pub(super) fn add_death(&self, death: &ProgramDeath) {
        self.deaths.iter().for_each(|deaths| deaths[0].add(death));
    }

    /// For the master: returns the deaths of programs since the last call, as the pool process has reported them.
    pub fn take_deaths(&self) -> Vec<ProgramDeath> {
        let deaths = self.deaths.as_ref();
        deaths.map_or_else(Vec::new, |deaths| deaths[0].take())
    }

    /// Returns whether each program belongs to one connection. Such a program is not replaced when it ends.
    pub(super) fn is_of_connection(&self) -> bool {
        self.settings.scope == config::PoolScope::Connection
    }

    /// Returns the largest number of calls that its programs may have at once.
    pub fn capacity(&self) -> usize {
        self.settings.processes * self.settings.concurrency
    }

    /// Returns the largest number of calls that one program may have at once.
    pub fn concurrency(&self) -> usize {
        self.settings.concurrency
    }

    /// Describes a program of this pool that serves.
    pub(super) fn program(&self, pid: Pid) -> ServingProgram {
        ServingProgram {
            pid,
            stack_signal: self.settings.stack_signal,
        }
    }

    /// Returns the number of programs.
    pub fn processes(&self) -> usize {
        self.settings.processes
    }
}

/// The variable with the signal that a program gets when its call is slow.
const STACK_SIGNAL: &str = "PREFORKD_STACK_SIGNAL";

fn prepared(pool: &config::PoolConfig) -> PreparedProgram {
    let program = PreparedProgram::new(&pool.program);
    match pool.stack_signal {
        Some(signal) => program.with_variable(STACK_SIGNAL, signal.name()),
        None => program,
    }
}

fn arguments(pool: &config::PoolConfig) -> Vec<CString> {
    let arguments = pool.program.arguments.iter();
    arguments.map(|one| c_string(one.as_str())).collect()
}

/// The handler of a method with a pool.
#[derive(Debug)]
pub struct Pooled {
    /// The number of the pool in the registry.
    pub number: usize,
}

impl Handler for Pooled {
    fn call(&self, _: &str, _: &Context<'_>, _: &mut Vec<u8>) -> Result<(), RpcError> {
        let text = "this method is answered by a program, and not by a thread";
        Err(RpcError::of(Code::Internal, text, false))
    }

    fn placement(&self) -> Placement {
        Placement::Pool(self.number)
    }
}
