//! Exports what the master knows about its children for an upgrade, and imports it.
//!
//! The state has plain numbers: descriptors, indices, pids. The importing program checks each of them. If there is an
//! error, the old program continues.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::keepers::{DeadWorker, KeeperState, Keepers, claimed_keeper, is_plausible_keeper};
use super::links::Links;
use super::pool_process::PoolHealth;
use super::session_ranges::SessionsState;
use super::sessions::Sessions;
use super::slow_calls;
use super::source_counts::SourceCounts;
use super::startup_log::StartupLog;
use super::workers::{Children, GenerationInfo, WorkerHandle};
use crate::error::{Error, Result};
use crate::link::adoption_queue::AdoptionQueue;
use crate::link::channel::MasterEnd;
use crate::link::ids::{Generation, Pid, Slot};
use crate::link::message::Order;
use crate::link::metrics_board::{BoardTotals, MetricsBoard};
use crate::link::quarantine::Quarantine;
use crate::link::scoreboard::{RECORDS, STRIDE, Scoreboard};
use crate::master::policy::crash_counts::Suspicion;
use crate::sys::process::{self, monotonic};
use crate::sys::shared_memory;

/// How long the master waits for a worker that is sending a request. Sending takes a few microseconds, unless the
/// worker is stopped meanwhile.
const MAX_SENDING: Duration = Duration::from_millis(20);

/// What the master knows about its children, in the state of an upgrade.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkersState {
    /// The scoreboard's descriptor.
    pub board: RawFd,
    /// The number of its records.
    pub records: usize,
    /// The bytes from one record to the next.
    pub stride: usize,
    /// The sending end of the adoption queue.
    pub giving: RawFd,
    /// The receiving end of the adoption queue.
    pub taking: RawFd,
    pub living: Vec<WorkerState>,
    /// What the master reports about the workers: one entry per generation.
    pub known: Vec<GenerationInfo>,
    /// The keepers of dead workers.
    #[serde(default)]
    pub keepers: Vec<KeeperState>,
    /// Pool processes and acceptors. They continue without a master until nothing uses them.
    #[serde(default)]
    pub pools: Option<Vec<PoolState>>,
    /// The metrics board's descriptor.
    #[serde(default)]
    pub metrics: Option<RawFd>,
    /// The totals of the metrics board, for a program that does not know the board's version.
    #[serde(default)]
    pub metrics_totals: BoardTotals,
    /// The sessions of isolated listeners.
    #[serde(default)]
    pub sessions: Option<SessionsState>,
    /// The descriptor of the tables of sources.
    #[serde(default)]
    pub sources: Option<RawFd>,
}

/// A pool process or acceptor that an earlier program has forked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolState {
    pub pid: Pid,
    /// Its record in the scoreboard, which it writes while it lives.
    pub record: usize,
}

/// A living worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerState {
    pub pid: Pid,
    pub generation: Generation,
    pub slot: Slot,
    pub record: usize,
    /// The descriptor of its link, if that is open.
    pub link: Option<RawFd>,
    /// The index of its entry in `known`.
    pub known: usize,
    /// Whether it has a file of the access log.
    #[serde(default)]
    pub has_access_file: bool,
}

impl Children {
    /// Creates the tables on this shared memory, without a child.
    pub(super) fn on(
        board: Scoreboard,
        metrics: MetricsBoard,
        quarantine: Quarantine,
        adoption: AdoptionQueue,
    ) -> Self {
        Children {
            board,
            metrics,
            free: (0..RECORDS).collect(),
            living: HashMap::new(),
            reserved: HashMap::new(),
            links: Links::default(),
            keepers: Keepers::default(),
            quarantine,
            adoption,
            sessions: Sessions::default(),
            sources: SourceCounts::default(),
            startup_log: StartupLog::default(),
            observers: BTreeSet::new(),
            pool_health: PoolHealth::default(),
        }
    }

    /// Frees the record of a reaped child that is no worker. `serving` is the serving generation. Returns
    /// whether it had a record.
    pub fn release_record(&mut self, pid: Pid, serving: Generation) -> bool {
        let Some(record) = self.reserved.remove(&pid) else {
            return false;
        };
        self.board.record(record).clear_capacity();
        slow_calls::log_crashed(&self.metrics.clear_gauges(record, pid));
        self.free_record(record);
        self.announce_pool_end(serving);
        true
    }

    /// Returns the metrics board and the scoreboard for a command, read-only; none if no descriptor is left.
    pub fn read_only_boards(&self) -> Vec<OwnedFd> {
        let files = [self.metrics.file(), self.board.file()];
        let copies = files.into_iter().map(shared_memory::read_only);
        copies.collect::<io::Result<_>>().unwrap_or_default()
    }

    /// Frees the record of a child when both the child and its keeper were reaped.
    pub(super) fn free_record(&mut self, record: usize) {
        self.metrics.settle_lines(record);
        self.free.insert(record);
    }

    /// Returns the living worker whose keeper was reaped, and removes the keeper from its record.
    pub fn lose_keeper(&self, keeper: Pid) -> Option<Pid> {
        let mut living = self.living.values();
        let worker = living.find(|worker| claimed_keeper(worker.record) == Some(keeper))?;
        worker.record.keeper.store(0, Relaxed);
        Some(worker.pid)
    }

    /// Tells the workers of the program before that its pool processes have ended, if they ended before
    /// `serving` became the serving generation.
    pub fn announce_ended_pools(&self, serving: Generation) {
        // Acceptors may still be there. They have no lane.
        let mut records = self.reserved.values();
        if records.all(|&record| self.board.record(record).lane.load(Relaxed) == 0) {
            self.announce_pool_end(serving);
        }
    }

    /// Tells the workers of the program before that its pool process has ended. Otherwise their waiting calls would
    /// wait forever.
    fn announce_pool_end(&self, serving: Generation) {
        self.sessions.announce_pool_end(serving);
        for (pid, worker) in &self.living {
            if worker.is_from_before && worker.generation < serving {
                self.order(*pid, Order::PoolEnded, None);
            }
        }
    }

    /// Returns whether pool processes or acceptors of the program before an upgrade are left.
    pub fn has_reserved(&self) -> bool {
        !self.reserved.is_empty()
    }

    /// Sends a signal to the acceptors of the program before an upgrade, which have no link to this one, and
    /// with `all` to its pool processes too.
    pub fn signal_reserved(&self, signal: Signal, all: bool) {
        for (pid, &record) in &self.reserved {
            let is_acceptor = self.board.record(record).lane.load(Relaxed) == 0;
            if (all || is_acceptor) && process::is_child(*pid) {
                process::kill(*pid, signal);
            }
        }
    }

    /// Returns the pool processes, jobs processes, acceptors, adopted sessions and observers, including those of the
    /// program before an upgrade.
    pub fn other_pids(&self) -> impl Iterator<Item = Pid> {
        let living = self.living.iter();
        let others = living.filter(|(_, worker)| !worker.slot.is_worker());
        others
            .map(|(pid, _)| *pid)
            .chain(self.reserved.keys().copied())
            .chain(self.sessions.adopted.pids())
            .chain(self.observers.iter().copied())
    }

    /// Returns whether a child belongs to this server.
    pub fn is_own(&self, pid: Pid) -> bool {
        self.is_other(pid) || self.sessions.is_session(pid)
    }

    /// Returns whether a child belongs to this server and is not a session.
    pub fn is_other(&self, pid: Pid) -> bool {
        let of = |worker: &WorkerHandle| claimed_keeper(worker.record) == Some(pid);
        self.living.contains_key(&pid)
            || self.reserved.contains_key(&pid)
            || self.keepers.contains(pid)
            || self.living.values().any(of)
            || self.observers.contains(&pid)
    }

    /// Returns the pool processes to which the result of a reload could not be sent yet.
    pub fn unsent_results(&self) -> impl Iterator<Item = Pid> {
        let is_unsent = |worker: &WorkerHandle| {
            let pool = worker.pool.as_ref();
            pool.is_some_and(|pool| pool.unsent_result.is_some())
        };
        let living = self.living.iter();
        living
            .filter(move |(_, it)| is_unsent(it))
            .map(|(pid, _)| *pid)
    }

    /// Forbids all workers to send requests, and waits for those that are being sent. The caller reads them, because
    /// the next program may be of a version that does not know these requests.
    pub fn forbid_requests(&self) {
        for worker in self.living.values() {
            let end = monotonic() + MAX_SENDING;
            while !worker.record.forbid_requests() && monotonic() < end {
                thread::yield_now();
            }
            worker.record.cut_off_requests();
        }
    }

    /// Lets workers send requests again, after an upgrade or a failed exec.
    pub fn allow_requests(&self) {
        for worker in self.living.values() {
            worker.record.allow_requests();
        }
    }

    /// Returns the state for an upgrade.
    pub fn export(&self) -> WorkersState {
        let mut known: Vec<&Rc<GenerationInfo>> = Vec::new();
        let mut living = Vec::new();
        let mut pools: Vec<PoolState> = (self.reserved.iter())
            .map(|(pid, &record)| PoolState { pid: *pid, record })
            .collect();
        for (pid, worker) in &self.living {
            if !worker.slot.is_worker() {
                pools.push(PoolState {
                    pid: *pid,
                    record: worker.record_index,
                });
                continue;
            }
            let there = known.iter().position(|one| Rc::ptr_eq(one, &worker.known));
            living.push(WorkerState {
                pid: *pid,
                generation: worker.generation,
                slot: worker.slot,
                record: worker.record_index,
                link: worker.link.as_ref().map(AsRawFd::as_raw_fd),
                known: there.unwrap_or(known.len()),
                has_access_file: worker.has_access_file,
            });
            if there.is_none() {
                known.push(&worker.known);
            }
        }
        WorkersState {
            board: self.board.file().as_raw_fd(),
            records: RECORDS,
            stride: STRIDE,
            giving: self.adoption.tx.as_raw_fd(),
            taking: self.adoption.rx.as_raw_fd(),
            living,
            known: known.into_iter().map(|known| (**known).clone()).collect(),
            keepers: self.keepers.export(),
            pools: Some(pools),
            metrics: Some(self.metrics.file().as_raw_fd()),
            metrics_totals: self.metrics.totals(),
            sessions: self.sessions.export(),
            sources: self.sources.export(),
        }
    }

    /// Checks that the scoreboard of the program before has the format of this version.
    ///
    /// # Errors
    /// If the format differs.
    pub fn fits(state: &WorkersState) -> Result<()> {
        if (state.records, state.stride) == (RECORDS, STRIDE) {
            return Ok(());
        }
        Err(Error::Refused(format!(
            "the scoreboard has {} records of {} bytes, but this version needs {RECORDS} of {STRIDE} bytes; \
             restart the server to change the version",
            state.records, state.stride
        )))
    }

    /// Restores the state after an upgrade. `started_at` is the start of the master in seconds since 1970, and
    /// `take` returns the descriptors. Call it when it is known which children are workers.
    ///
    /// # Errors
    /// The errors of `take`; a scoreboard of another format; a record that does not exist or has two owners.
    pub fn import(
        state: WorkersState,
        started_at: u64,
        mut take: impl FnMut(RawFd) -> Result<OwnedFd>,
    ) -> Result<Self> {
        let refuse = |text: String| Error::Refused(text);
        Children::fits(&state)?;
        let board = Scoreboard::of(take(state.board)?)
            .map_err(|error| Error::system("map the scoreboard", error))?;
        let known: Vec<Rc<GenerationInfo>> = state.known.into_iter().map(Rc::new).collect();
        let mut free: BTreeSet<usize> = (0..RECORDS).collect();
        let mut claim = |index: usize| free.take(&index);
        let quarantine = Quarantine::new().map_err(|error| Error::system("share memory", error))?;
        let mut keepers = Keepers::default();
        for keeper in state.keepers {
            let pid = keeper.pid;
            let is_worker = state.living.iter().any(|worker| worker.pid == pid);
            // If it is not a child any more, a program whose upgrade failed has reaped it.
            if !is_worker && is_plausible_keeper(pid) && claim(keeper.record).is_some() {
                // Its worker's calls were counted before, or are not counted at all: the reload after an
                // upgrade releases all quarantined calls.
                let left = DeadWorker {
                    worker: keeper.worker,
                    record: board.record(keeper.record),
                    record_index: keeper.record,
                    crash_report: quarantine.evidence(keeper.record),
                    known: Rc::default(),
                    suspicion: Suspicion::Nothing,
                };
                keepers.import(pid, left);
            }
        }
        let mut reserved = HashMap::new();
        for pool in state.pools.into_iter().flatten() {
            // If it is not a child any more, its record is free, because no other process writes to it.
            if process::is_child(pool.pid) && claim(pool.record).is_some() {
                reserved.insert(pool.pid, pool.record);
            }
        }
        let mut living = HashMap::new();
        for worker in state.living {
            let pid = worker.pid;
            let (Some(_), Some(known)) = (claim(worker.record), known.get(worker.known)) else {
                return Err(refuse(format!("worker {pid} has no record of its own")));
            };
            let link = match worker.link {
                Some(number) => Some(MasterEnd::of(take(number)?)),
                None => None,
            };
            let before = living.insert(
                pid,
                WorkerHandle {
                    pid,
                    generation: worker.generation,
                    known: Rc::clone(known),
                    record: board.record(worker.record),
                    record_index: worker.record,
                    // The worker writes its stuck calls to other memory, which is not passed on at an upgrade.
                    stuck: quarantine.stuck(worker.record),
                    link,
                    is_ignored: false,
                    slot: worker.slot,
                    // The pool processes of its generation have no link to this program.
                    is_ready: true,
                    is_from_before: true,
                    pool: None,
                    has_access_file: worker.has_access_file,
                    kept_file: None,
                    slow_reads: slow_calls::thread_reads(),
                    // No start or reload waits for it.
                    startup_log: None,
                },
            );
            if before.is_some() {
                return Err(refuse(format!("worker {pid} is listed twice")));
            }
        }
        // Pool processes and acceptors that the program before did not know.
        for (index, record) in board.records().iter().enumerate() {
            let pid = Pid(record.pool_pid.load(Relaxed));
            let is_pool = pid.0 > 0 && !living.contains_key(&pid) && process::is_child(pid);
            if is_pool && claim(index).is_some() {
                reserved.insert(pid, index);
            }
        }
        let metrics = state.metrics.map(&mut take).transpose()?;
        let metrics = import_metrics(metrics, &state.metrics_totals, started_at)
            .map_err(|error| Error::system("map the metrics board", error))?;
        let adoption = AdoptionQueue {
            tx: Rc::new(take(state.giving)?),
            rx: Rc::new(take(state.taking)?),
        };
        let sources = state.sources.map(&mut take).transpose()?;
        let mut children = Children {
            sources: SourceCounts::import(sources),
            free,
            living,
            reserved,
            keepers,
            ..Children::on(board, metrics, quarantine, adoption)
        };
        children.sessions =
            Sessions::import(state.sessions, &mut take, |pid| children.is_other(pid))?;
        Ok(children)
    }
}

/// Uses the metrics board of the program before if this program knows its version. Otherwise the old totals become
/// the base of a new board.
fn import_metrics(
    file: Option<OwnedFd>,
    totals: &BoardTotals,
    started_at: u64,
) -> io::Result<MetricsBoard> {
    let has_file = file.is_some();
    if let Some(board) = file.map(MetricsBoard::of).transpose()?.flatten() {
        return Ok(board);
    }
    if has_file {
        log::warn!(
            "the metrics board of the old program has another format: a new board takes over its totals; \
             later counts of the old program's processes are lost"
        );
    }
    let mut board = MetricsBoard::new(started_at)?;
    board.add_base(totals)?;
    Ok(board)
}
