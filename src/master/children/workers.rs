//! Forks children, exchanges messages with them, and removes them when they are reaped. `Fleet` decides
//! which ones are forked.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::generation_info::OldContexts;
use super::keepers::{DeadWorker, Keepers};
use super::links::Links;
use super::metrics_access::{count_start, metrics_access};
use super::pool_process::{PoolHealth, PoolProcess, kept_lanes};
use super::sessions::Sessions;
use super::slow_calls;
use super::source_counts::SourceCounts;
use super::startup_log::{self, StartupLog};
use crate::link::access_counts::LineBatch;
use crate::link::adoption_queue::AdoptionQueue;
use crate::link::channel::{self, MasterEnd, Received};
use crate::link::ids::{Generation, Pid, Slot};
use crate::link::message::{Message, Order, Report};
use crate::link::metrics_board::MetricsBoard;
use crate::link::quarantine::{PLACES, Quarantine};
use crate::link::scoreboard::{Scoreboard, WorkerRecord};
use crate::link::stuck_calls::StuckCalls;
use crate::logging::{self, AccessFile};
use crate::master::policy::crash_counts::{CrashCounts, MAX_CALLS, Suspicion};
use crate::master::policy::event::LastCall;
use crate::sys::process;
use crate::sys::rights::GuardedSocket;
use crate::sys::signal::{SignalPipe, fork_child};
use crate::sys::title::TitleArea;
use crate::throttle::limiter::Limiter;
use crate::worker_init::{JobsInstance, WorkerInit, WorkerMain};
use nix::errno::Errno;
use nix::sys::signal::Signal;

pub use super::generation_info::{GenerationContext, GenerationInfo};

/// The largest number of reports, and of startup log lines, that are read from one child at once.
const MOST_REPORTS: usize = 64;

/// The state of the master that a fork needs.
pub struct ForkContext<'a> {
    /// The signal pipe, which the child closes.
    pub signals: &'a mut SignalPipe,
    /// The pid file, which the child closes.
    pub pid_file: RawFd,
    pub title: Option<TitleArea>,
    pub program: &'a str,
    /// The function that the child runs.
    pub worker_main: WorkerMain,
    /// Whether a start or reload waits for the child. If so, its log lines are kept until it is ready.
    pub awaited: bool,
    /// The oldest generation that the child serves, and the contexts of earlier generations.
    pub oldest: (Generation, &'a OldContexts),
    /// This run of the server, as its job store knows it.
    pub jobs: Option<&'a Arc<JobsInstance>>,
}

#[derive(Debug)]
pub struct WorkerHandle {
    pub(super) pid: Pid,
    pub generation: Generation,
    /// What the master reports about this child, without its configuration, which would keep its listeners open.
    pub known: Rc<GenerationInfo>,
    pub record: &'static WorkerRecord,
    pub record_index: usize,
    /// Where it writes which calls are stuck.
    pub stuck: &'static StuckCalls,
    /// The link to the child; `None` once the child has closed its end.
    pub(super) link: Option<MasterEnd>,
    /// Whether its reports are ignored, because it has sent descriptors with one. It still gets orders.
    pub(super) is_ignored: bool,
    pub slot: Slot,
    /// Whether it has reported ready.
    pub is_ready: bool,
    /// Whether the program before an upgrade has forked it.
    pub(super) is_from_before: bool,
    /// `Some` iff it is a pool process.
    pub pool: Option<PoolProcess>,
    /// Whether it has a file of the access log.
    pub has_access_file: bool,
    /// That file, if `keep-connections` is off. Then there is no keeper, and the master itself finds out which lines
    /// the child was writing when it died.
    pub kept_file: Option<Arc<AccessFile>>,
    /// Limits how many of its threads the master reads for the slow log.
    pub slow_reads: Limiter,
    /// Its log lines until it is ready; `None` if no start or reload waits for it.
    pub(super) startup_log: Option<GuardedSocket>,
}

/// The children of the master and the memory that they share. `living` has neither keeper nor session nor observer.
#[derive(Debug)]
pub struct Children {
    pub board: Scoreboard,
    pub metrics: MetricsBoard,
    pub(super) free: BTreeSet<usize>,
    pub(super) living: HashMap<Pid, WorkerHandle>,
    /// The scoreboard records of other children than workers that the program before an upgrade has forked.
    pub(super) reserved: HashMap<Pid, usize>,
    pub(super) links: Links,
    /// The keepers of dead workers.
    pub keepers: Keepers,
    pub(super) quarantine: Quarantine,
    /// The queue lives as long as the master, because a connection in it may outlive the worker that sent it.
    pub(super) adoption: AdoptionQueue,
    pub sessions: Sessions,
    pub sources: SourceCounts,
    /// The log lines of children for which a start or reload waits.
    pub startup_log: StartupLog,
    /// The observers that were not reaped yet.
    pub observers: BTreeSet<Pid>,
    pub pool_health: PoolHealth,
}

impl Children {
    /// Creates the shared memory, without a child.
    ///
    /// # Errors
    /// If there is no memory or no descriptor.
    pub fn new() -> io::Result<Self> {
        Ok(Children::on(
            Scoreboard::new()?,
            MetricsBoard::new(process::unix_seconds())?,
            Quarantine::new()?,
            AdoptionQueue::new()?,
        ))
    }

    /// Forks a child. Only the parent returns.
    ///
    /// # Errors
    /// If the system refuses the process or a descriptor, or all records are in use.
    pub fn fork(
        &mut self,
        slot: Slot,
        generation: Generation,
        context: &Rc<GenerationContext>,
        parent: ForkContext<'_>,
    ) -> io::Result<Pid> {
        // Other children get the highest free record. An older version may not know that it is in use, and gives the
        // lowest free one to its next worker.
        let first = slot.is_worker().then(|| self.free.pop_first());
        let index = first.unwrap_or_else(|| self.free.pop_last());
        let index = index.ok_or(io::ErrorKind::ResourceBusy)?;
        let forked = self.fork_with(slot, generation, context, parent, index);
        if forked.is_err() {
            self.free.insert(index);
        }
        forked
    }

    fn fork_with(
        &mut self,
        slot: Slot,
        generation: Generation,
        context: &Rc<GenerationContext>,
        parent: ForkContext<'_>,
        record_index: usize,
    ) -> io::Result<Pid> {
        let (master_end, worker_end) = channel::pair()?;
        let (startup_log, startup_log_tx) = startup_log::channel(parent.awaited)?;
        let (isolated, adoption) = match self.sessions.init(slot, context, self.board.file())? {
            Some((isolated, adoption)) => (Some(isolated), adoption),
            None => (None, self.adoption.clone()),
        };
        let sources = self.sources.init(slot, record_index, context)?;
        let metrics = metrics_access(&mut self.metrics, (slot, record_index), context)?;
        let access_file = context.access_file_of(slot)?;
        let record = self.board.record(record_index);
        record.clear();
        record.allow_requests();
        let crash_report = self.quarantine.evidence(record_index);
        crash_report.clear();
        let stuck = self.quarantine.stuck(record_index);
        stuck.clear();
        let master = Pid::current();
        let (oldest, old) = parent.oldest;
        let pool = PoolProcess::new((slot, generation), context, oldest, old);
        let known = match &pool {
            Some(pool) => {
                self.pool_health.begin(pool, record);
                pool.info(&context.known, context)
            }
            None => Rc::clone(&context.known),
        };
        let earlier = self.living.values().filter(|it| it.generation < generation);
        let init = WorkerInit {
            slot,
            generation,
            settings: Rc::clone(&context.settings),
            registry: Arc::clone(&context.registry),
            listeners: context.listeners_of(slot),
            methods: pool.as_ref().map(PoolProcess::methods).unwrap_or_default(),
            kept_lanes: kept_lanes(
                earlier.filter_map(|it| it.pool.as_ref()),
                generation,
                context,
            ),
            adoption,
            link: worker_end,
            startup_log_tx,
            record,
            metrics,
            access_file: access_file.clone(),
            records: (self.board.records(), record_index),
            session_records: self.sessions.records(),
            sources,
            isolated,
            jobs: context.instance_of(slot, parent.jobs),
            quarantine: self.quarantine.clone(),
            crash_report,
            stuck,
            master_signals: parent.signals,
            pid_file: Some(parent.pid_file),
            title: parent.title,
            program: parent.program.to_owned(),
            master,
        };
        let pid = fork_child(init, parent.worker_main)?;
        count_start(&self.metrics, slot);
        let other = if slot.is_worker() { 0 } else { pid.0 };
        record.pool_pid.store(other, Relaxed);
        self.living.insert(
            pid,
            WorkerHandle {
                pid,
                generation,
                known,
                record,
                record_index,
                stuck,
                link: Some(master_end),
                is_ignored: false,
                slot,
                is_ready: false,
                is_from_before: false,
                pool,
                has_access_file: access_file.is_some(),
                kept_file: access_file.filter(|_| !context.settings.workers.keep_connections),
                slow_reads: slow_calls::thread_reads(),
                startup_log,
            },
        );
        Ok(pid)
    }

    /// Returns a child that was not reaped.
    pub fn get(&self, pid: Pid) -> Option<&WorkerHandle> {
        self.living.get(&pid)
    }

    pub fn iter(&self) -> impl Iterator<Item = (Pid, &WorkerHandle)> {
        self.living.iter().map(|(pid, worker)| (*pid, worker))
    }

    /// Returns the descriptors to poll, with the pid of each child.
    pub fn links(&self) -> impl Iterator<Item = (Pid, BorrowedFd<'_>)> {
        self.living.iter().flat_map(|(pid, worker)| {
            let link = worker.link.as_ref().filter(|_| !worker.is_ignored);
            let link = link.map(AsFd::as_fd);
            let log = worker.startup_log.as_ref().map(AsFd::as_fd);
            link.into_iter().chain(log).map(|fd| (*pid, fd))
        })
    }

    /// Reads the log lines of a child for which a start or reload waits. Call it before its reports and its
    /// death are handled.
    pub fn read_startup_log(&mut self, pid: Pid) {
        let Some(worker) = self.living.get_mut(&pid) else {
            return;
        };
        let mut line = [0; logging::LONGEST_FORWARDED];
        for _ in 0..MOST_REPORTS {
            let Some(lines) = &worker.startup_log else {
                return;
            };
            match lines.receive(&mut line) {
                Ok(0) => worker.startup_log = None,
                Ok(length) => self.startup_log.push(pid, worker.slot, &line[..length]),
                Err(Errno::EAGAIN) => return,
                // This includes EBADMSG (descriptors are attached): a child has no reason to send descriptors here.
                Err(_) => worker.startup_log = None,
            }
        }
    }

    /// Takes the log lines that explain the result of a start or reload. Later lines of these children are not kept.
    pub fn take_startup_log(&mut self) -> String {
        for worker in self.living.values_mut() {
            worker.startup_log = None;
        }
        self.startup_log.take()
    }

    /// Reads the reports of a child.
    pub fn read_reports(&mut self, pid: Pid) -> Vec<Report> {
        let mut reports = Vec::new();
        let Some(worker) = self.living.get_mut(&pid) else {
            return reports;
        };
        // The number of reports is limited, so that one child cannot keep the master from the others.
        let role = worker.slot.role();
        while reports.len() < MOST_REPORTS
            && !worker.is_ignored
            && let Some(link) = &worker.link
        {
            match link.receive() {
                // A child is never trusted: a message with another pid is refused.
                Received::Message(message, _) if message.pid == pid => {
                    reports.push(message.body);
                }
                // The sender is a worker of an older version, which reports nothing more, or an attacker.
                Received::WithDescriptors(message) if message.pid == pid => {
                    worker.is_ignored = true;
                    reports.push(message.body);
                    if !matches!(message.body, Report::AllThreadsStuck(_)) {
                        log_ignored(role, pid, "descriptors with a report");
                    }
                }
                Received::Message(..) | Received::WithDescriptors(_) | Received::Garbage => {
                    log_ignored(role, pid, "an invalid report");
                    worker.link = None;
                }
                Received::Empty => break,
                Received::End => worker.link = None,
            }
        }
        reports
    }

    /// Sends an order, with a descriptor if the order needs one. If the child has closed its link, it is about to be
    /// reaped, so this is not an error.
    pub fn order(&self, pid: Pid, body: Order, descriptor: Option<BorrowedFd<'_>>) {
        if let Err(error) = self.send(pid, body, descriptor) {
            log::warn!("could not send the order {body:?} to process {pid}: {error}");
        }
    }

    /// Sends an order without logging a failure.
    ///
    /// # Errors
    /// If the order was not sent, unless the child has closed its link.
    pub(super) fn send(
        &self,
        pid: Pid,
        body: Order,
        descriptor: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        let worker = self.living.get(&pid);
        let Some((worker, link)) = worker.and_then(|it| Some((it, it.link.as_ref()?))) else {
            return Ok(());
        };
        let message = Message {
            pid,
            generation: worker.generation,
            body,
        };
        match link.send(message, descriptor) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
            _ => Ok(()),
        }
    }

    /// Removes a child that was reaped. `suspicion` says which of its calls may have caused its death.
    /// `may_be_keeper` says whether a pid may be its keeper.
    pub fn remove(
        &mut self,
        pid: Pid,
        suspicion: Suspicion,
        may_be_keeper: impl Fn(Pid) -> bool,
    ) -> Option<WorkerHandle> {
        let worker = self.living.remove(&pid)?;
        self.pool_health.end(worker.pool.as_ref(), worker.record);
        worker.record.clear_capacity();
        self.sources.clear(worker.record_index);
        if let Some(file) = &worker.kept_file {
            let find = |batch: LineBatch| file.recover(pid.0, batch.first_call, batch.position);
            self.metrics.recover_lines(worker.record_index, find);
        }
        slow_calls::log_crashed(&self.metrics.clear_gauges(worker.record_index, pid));
        self.links.forget(pid);
        let left = DeadWorker {
            worker: pid,
            record: worker.record,
            record_index: worker.record_index,
            crash_report: self.quarantine.evidence(worker.record_index),
            known: Rc::clone(&worker.known),
            suspicion,
        };
        let may_be_keeper = |keeper| !self.living.contains_key(&keeper) && may_be_keeper(keeper);
        if let Some(record) = self.keepers.worker_died(left, may_be_keeper) {
            self.free_record(record);
        }
        Some(worker)
    }

    /// Removes a keeper that was reaped. Returns what is known of its worker.
    pub fn keeper_ended(&mut self, keeper: Pid) -> Option<DeadWorker> {
        let left = self.keepers.ended(keeper)?;
        self.free_record(left.record_index);
        Some(left)
    }

    /// Returns the table of quarantined calls.
    pub fn quarantine(&self) -> &Quarantine {
        &self.quarantine
    }

    /// Publishes which calls are quarantined and which are suspected.
    pub fn publish_quarantine(&self, counts: &CrashCounts) {
        const { assert!(MAX_CALLS == PLACES) };
        let quarantined: Vec<u64> = counts.quarantined().iter().map(|call| call.key).collect();
        let suspects: Vec<u64> = counts.suspects().collect();
        self.quarantine.publish(&quarantined, &suspects);
    }
}

impl WorkerHandle {
    /// Sends the child a signal. The pid is valid, because [`Children`] drops a child as soon as it is reaped.
    pub fn kill(&self, signal: Signal) {
        process::kill(self.pid, signal);
    }

    /// Returns the method and the call that it last ran, for its death record.
    pub fn last_call(&self) -> Option<LastCall> {
        let last = self.record.last_call(self.pid)?;
        Some(self.known.last_call(last))
    }

    /// Returns the method that its event loop runs now.
    pub fn inline_method(&self) -> Option<&str> {
        let method = self.record.inline_method()?;
        Some(self.known.method(method))
    }

    /// Returns the last heartbeat of its event loop in milliseconds (CLOCK_MONOTONIC); `None` if there was
    /// none.
    pub fn heartbeat(&self) -> Option<u64> {
        Some(self.record.heartbeat_ms.load(Relaxed)).filter(|&at| at > 0)
    }
}

fn log_ignored(role: &str, pid: Pid, what: &str) {
    log::warn!("{role} {pid} sent {what}: its reports are ignored from now on");
}
