//! The master's hold on its living workers: the link, the scoreboard record, the generation.
//!
//! Forks them, speaks with them, and forgets them when they are reaped. `Fleet` decides who is forked.

use std::cell::Cell;
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::keepers::{DeadWorker, Keepers, claimed_keeper};
use super::links::Links;
use crate::handler::pool::Pool;
use crate::link::adoption_queue::AdoptionQueue;
use crate::link::call_link;
use crate::link::channel::{self, MasterEnd, Received};
use crate::link::ids::{Generation, Pid, Slot};
use crate::link::message::{Message, Order, Report};
use crate::link::quarantine::Quarantine;
use crate::link::scoreboard::{RECORDS, Scoreboard, WorkerRecord};
use crate::link::stuck_calls::StuckCalls;
use crate::logging;
use crate::master::policy::event::Millis;
use crate::sys::closer::close_in_child;
use crate::sys::process::{Fork, fork, monotonic};
use crate::sys::rights::{self, GuardedSocket};
use crate::sys::signal::{self, SignalPipe};
use crate::sys::socket;
use crate::sys::title::TitleArea;
use crate::worker_init::{WorkerInit, WorkerMain};
use nix::errno::Errno;

pub use super::generation_info::{GenerationContext, GenerationInfo};
pub use super::workers_state::WorkersState;

/// Reports taken from one worker at once.
const MOST_REPORTS: usize = 64;

/// What every fork needs of the master.
pub struct ForkContext<'a> {
    /// The signal pipe, which the child leaves.
    pub signals: &'a mut SignalPipe,
    /// The pid file, which the child closes.
    pub pid_file: RawFd,
    /// Where the child's title goes.
    pub title: Option<TitleArea>,
    /// The program's name.
    pub program: &'a str,
    /// What the child becomes.
    pub worker_main: WorkerMain,
    /// Whether somebody waits for it to become ready, and is to hear what it logs until then.
    pub awaited: bool,
}

#[derive(Debug)]
pub struct WorkerHandle {
    pub generation: Generation,
    /// What is told of it. Not its configuration with the listeners, which the master closes before
    /// it has ended.
    pub known: Rc<GenerationInfo>,
    /// What it shows.
    pub record: &'static WorkerRecord,
    pub(super) record_index: usize,
    /// Where it writes which calls are stuck.
    pub stuck: &'static StuckCalls,
    /// `None` once it has closed its end.
    pub(super) link: Option<MasterEnd>,
    /// It has attached descriptors to a report, so nothing more is read from its link.
    pub(super) is_unheard: bool,
    pub(super) slot: Slot,
    /// It has said that it is ready.
    pub(super) is_ready: bool,
    /// The pool, of a pool process.
    pub pool: Option<Arc<Pool>>,
    /// What it logs before it is ready; `None` where nobody waits for that.
    pub(super) startup_log: Option<GuardedSocket>,
    /// Its keeper has died, and it is to retire for that, at once or when it is ready.
    pub keeper_is_lost: Cell<bool>,
}

/// All living workers.
#[derive(Debug)]
pub struct Children {
    pub(super) board: Scoreboard,
    pub(super) free: BTreeSet<usize>,
    pub(super) living: HashMap<Pid, WorkerHandle>,
    /// The records of pool processes that the program before an upgrade has forked.
    pub(super) reserved: HashMap<Pid, usize>,
    pub(super) links: Links,
    pub(super) keepers: Keepers,
    pub(super) quarantine: Quarantine,
    /// For life: connections on their way outlive any worker.
    pub(super) adoption: AdoptionQueue,
}

impl Children {
    /// None yet.
    ///
    /// # Errors
    /// When there is no memory for the scoreboard, or no descriptor.
    pub fn new() -> io::Result<Self> {
        Ok(Children {
            board: Scoreboard::new()?,
            free: (0..RECORDS).collect(),
            living: HashMap::new(),
            reserved: HashMap::new(),
            links: Links::default(),
            keepers: Keepers::default(),
            quarantine: Quarantine::new()?,
            adoption: AdoptionQueue::new()?,
        })
    }

    /// Forks a worker. Only the parent returns.
    ///
    /// # Errors
    /// When the system gives no process, no descriptor, or all records are taken.
    pub fn fork(
        &mut self,
        slot: Slot,
        generation: Generation,
        ground: &Rc<GenerationContext>,
        parent: ForkContext<'_>,
    ) -> io::Result<Pid> {
        // Pool processes have the highest: an older version gives the lowest to its next worker.
        let index = match slot.pool() {
            Some(_) => self.free.pop_last(),
            None => self.free.pop_first(),
        }
        .ok_or(io::ErrorKind::ResourceBusy)?;
        let forked = self.fork_with(slot, generation, ground, parent, index);
        if forked.is_err() {
            self.free.insert(index);
        }
        forked
    }

    fn fork_with(
        &mut self,
        slot: Slot,
        generation: Generation,
        ground: &Rc<GenerationContext>,
        parent: ForkContext<'_>,
        record_index: usize,
    ) -> io::Result<Pid> {
        let (master_end, worker_end) = channel::pair()?;
        let (words, witness) = match parent.awaited {
            true => {
                let (ours, its) = socket::packet_pair()?;
                rights::refuse(&ours);
                (Some(GuardedSocket::new(ours, close_in_child)), Some(its))
            }
            false => (None, None),
        };
        let record = self.board.record(record_index);
        record.clear();
        record.allow_requests();
        let evidence = self.quarantine.evidence(record_index);
        evidence.clear();
        let stuck = self.quarantine.stuck(record_index);
        stuck.clear();
        let master = Pid::current();
        // A signal between fork and the child's own handlers would wake the master, or be lost.
        signal::block_all();
        let forked = match fork() {
            Ok(Fork::Child) => (parent.worker_main)(WorkerInit {
                slot,
                generation,
                settings: Rc::clone(&ground.settings),
                registry: Arc::clone(&ground.registry),
                listeners: ground
                    .listeners
                    .iter()
                    .filter(|_| slot.pool().is_none())
                    .map(|one| Rc::clone(&one.fd))
                    .collect(),
                adoption: self.adoption.clone(),
                link: worker_end,
                startup_log_tx: witness,
                record,
                records: (self.board.records(), record_index),
                quarantine: self.quarantine.clone(),
                crash_report: evidence,
                stuck,
                master_signals: parent.signals,
                pid_file: parent.pid_file,
                title: parent.title,
                program: parent.program.to_owned(),
                master,
            }),
            Ok(Fork::Parent(pid)) => Ok(pid),
            Err(error) => Err(error),
        };
        signal::unblock_all();
        let pid = forked?;
        let pool_pid = slot.pool().map_or(0, |_| pid.0);
        record.pool_pid.store(pool_pid, Relaxed);
        self.living.insert(
            pid,
            WorkerHandle {
                generation,
                known: Rc::clone(&ground.known),
                record,
                record_index,
                stuck,
                link: Some(master_end),
                is_unheard: false,
                slot,
                is_ready: false,
                pool: (slot.pool()).and_then(|pool| ground.registry.pools().get(pool).cloned()),
                startup_log: words,
                keeper_is_lost: Cell::new(false),
            },
        );
        Ok(pid)
    }

    /// A worker that lives, or has not been reaped yet.
    pub fn get(&self, pid: Pid) -> Option<&WorkerHandle> {
        self.living.get(&pid)
    }

    pub fn iter(&self) -> impl Iterator<Item = (Pid, &WorkerHandle)> {
        self.living.iter().map(|(pid, worker)| (*pid, worker))
    }

    /// What workers may be heard on, to be polled.
    pub fn links(&self) -> impl Iterator<Item = (Pid, BorrowedFd<'_>)> {
        self.living.iter().flat_map(|(pid, worker)| {
            let link = worker.link.as_ref().filter(|_| !worker.is_unheard);
            let link = link.map(AsFd::as_fd);
            let words = worker.startup_log.as_ref().map(AsFd::as_fd);
            link.into_iter().chain(words).map(|fd| (*pid, fd))
        })
    }

    /// What a worker that is awaited has logged since the last look.
    pub fn read_startup_log(&mut self, pid: Pid, mut heard: impl FnMut(Slot, &[u8])) {
        let Some(worker) = self.living.get_mut(&pid) else {
            return;
        };
        let mut line = [0; logging::LONGEST_TOLD];
        for _ in 0..MOST_REPORTS {
            let Some(words) = &worker.startup_log else {
                return;
            };
            match words.receive(&mut line) {
                Ok(0) => worker.startup_log = None,
                Ok(length) => heard(worker.slot, &line[..length]),
                Err(Errno::EAGAIN) => return,
                // EBADMSG among them: a worker has no descriptors to send.
                Err(_) => worker.startup_log = None,
            }
        }
    }

    /// The verdict is given: what they log is the log's alone.
    pub fn forget_words(&mut self) {
        for worker in self.living.values_mut() {
            worker.startup_log = None;
        }
    }

    /// What a worker has reported since the last look.
    pub fn read_reports(&mut self, pid: Pid) -> Vec<Report> {
        let mut reports = Vec::new();
        let Some(worker) = self.living.get_mut(&pid) else {
            return reports;
        };
        // A bounded number: a child that floods us must not keep us from the others.
        while reports.len() < MOST_REPORTS
            && !worker.is_unheard
            && let Some(link) = &worker.link
        {
            match link.receive() {
                // A child is never trusted: what does not speak for itself is not heard.
                Received::Message(message, _) if message.pid == pid => {
                    reports.push(message.body);
                }
                // A worker of an older version has nothing more to say after that, or an attacker
                // has it. It gets its orders all the same.
                Received::WithDescriptors(message) if message.pid == pid => {
                    worker.is_unheard = true;
                    reports.push(message.body);
                    if !matches!(message.body, Report::AllThreadsStuck(_)) {
                        log::warn!(
                            "worker {pid} sent descriptors with a report: it is not listened to any \
                             more"
                        );
                    }
                }
                Received::Message(..) | Received::WithDescriptors(_) | Received::Garbage => {
                    log::warn!(
                        "worker {pid} sent something that is no report of its own: it is not \
                         listened to any more"
                    );
                    worker.link = None;
                }
                Received::Empty => break,
                Received::End => worker.link = None,
            }
        }
        reports
    }

    /// Gives a worker an order, with a descriptor if it needs one. One that has closed its link
    /// is about to be reaped.
    pub fn order(&self, pid: Pid, body: Order, descriptor: Option<BorrowedFd<'_>>) {
        let Some(worker) = self.living.get(&pid) else {
            return;
        };
        let message = Message {
            pid,
            generation: worker.generation,
            body,
        };
        if let Some(link) = &worker.link
            && let Err(error) = link.send(message, descriptor)
            // it is leaving already
            && error.kind() != io::ErrorKind::BrokenPipe
        {
            log::warn!("worker {pid} could not be told {body:?}: {error}");
        }
    }

    /// Links a process that is ready with the pool processes of its generation, or a pool process with the
    /// workers.
    pub fn link_pools(&mut self, pid: Pid) {
        let Some(ready) = self.living.get_mut(&pid) else {
            return;
        };
        ready.is_ready = true;
        let (generation, is_pool) = (ready.generation, ready.slot.pool().is_some());
        let others: Vec<usize> = (self.living.values())
            .filter(|other| other.is_ready && other.generation == generation)
            .filter(|other| other.slot.pool().is_some() != is_pool)
            .map(|other| other.record_index)
            .collect();
        for record in others {
            self.link(pid, record);
        }
    }

    /// Links two processes of one generation. One that asks for another generation's gets nothing.
    pub fn link(&mut self, pid: Pid, record_index: usize) {
        let Some(asking) = self.living.get(&pid) else {
            return;
        };
        let mut others = self.living.iter().filter(|(other, worker)| {
            worker.record_index == record_index
                && worker.generation == asking.generation
                && **other != pid
        });
        let Some((&other, worker)) = others.next() else {
            return;
        };
        let own_index = asking.record_index;
        let is_pool = asking.slot.pool().is_some() || worker.slot.pool().is_some();
        let now = monotonic().as_millis() as Millis;
        if !self.links.begin(pid, other, is_pool, now) {
            return;
        }
        let (one_end, other_end) = match call_link::pair() {
            Ok(ends) => ends,
            Err(error) => return log::warn!("{pid} and {other} could not be linked: {error}"),
        };
        self.order(pid, Order::Link(record_index as u32), Some(one_end.as_fd()));
        self.order(
            other,
            Order::Link(own_index as u32),
            Some(other_end.as_fd()),
        );
    }

    /// Forgets a worker that was reaped. `suspicious` tells whether what it ran may have been what it
    /// died of, and `believes` whether a process may be the keeper that it claims to have.
    pub fn remove(
        &mut self,
        pid: Pid,
        suspicious: bool,
        believes: impl Fn(Pid) -> bool,
    ) -> Option<WorkerHandle> {
        let worker = self.living.remove(&pid)?;
        worker.record.clear_capacity();
        self.links.forget(pid);
        let left = DeadWorker::new(
            pid,
            (worker.record, worker.record_index),
            self.quarantine.evidence(worker.record_index),
            Rc::clone(&worker.known),
            suspicious,
        );
        self.free.extend(self.keepers.left(left, believes));
        Some(worker)
    }

    /// A child was reaped: what it had of its worker, if it was the keeper of one that is gone.
    pub fn keeper_ended(&mut self, keeper: Pid) -> Option<DeadWorker> {
        let left = self.keepers.ended(keeper)?;
        self.free.insert(left.record_index);
        Some(left)
    }

    /// Calls that are not run any more.
    pub fn quarantine(&self) -> &Quarantine {
        &self.quarantine
    }

    /// Whether a child is the keeper of a worker, gone or not.
    pub fn is_keeper(&self, pid: Pid) -> bool {
        let of = |worker: &WorkerHandle| claimed_keeper(worker.record) == Some(pid);
        self.keepers.contains(pid) || self.living.values().any(of)
    }

    /// See [`Keepers::stalled`].
    pub fn overdue_keepers(&mut self, now: Millis, limit: Millis) -> Vec<(Pid, Pid)> {
        self.keepers.stalled(now, limit)
    }

    /// When to look for them again.
    pub fn next_keeper(&self) -> Option<Millis> {
        self.keepers.next()
    }

    /// Ends the keepers that are left, when no worker is.
    pub fn end_keepers(&mut self) {
        self.keepers.end();
    }
}

impl WorkerHandle {
    /// The method to name when it has died.
    pub fn last_method(&self) -> Option<String> {
        let method = self.record.last_method()?;
        Some(self.known.method(method).to_owned())
    }

    /// The method that runs on its event loop right now, if one does.
    pub fn inline_method(&self) -> Option<&str> {
        let method = self.record.inline_method()?;
        Some(self.known.method(method))
    }

    /// When its loop last turned, in milliseconds (CLOCK_MONOTONIC); `None`: never yet.
    pub fn heartbeat(&self) -> Option<u64> {
        Some(self.record.heartbeat_ms.load(Relaxed)).filter(|&at| at > 0)
    }
}
