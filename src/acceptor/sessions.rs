//! The sessions of an acceptor: forks them ahead, gives them connections, reaps them, and kills what dead
//! ones leave behind.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::signal::Signal;

use super::held::HeldConnection;
use super::records::OwnRecords;
use super::rejoined::RejoinedSessions;
use super::session::{self, HandOver, Session, SessionEnds};
use crate::link::adoption_queue::is_full;
use crate::link::channel::{self, Received};
use crate::link::ids::{Generation, Pid, Slot};
use crate::link::message::{Order, PoolLink, Report, SessionLink};
use crate::link::metrics_board::layout::CloseReason;
use crate::link::session_limits::SessionTimes;
use crate::link::session_memory;
use crate::sys::process::{self, Exit, Fork, ReapedChild};
use crate::sys::process_tree::{self, PidFd};
use crate::sys::shared_memory::OwnedArray;
use crate::sys::signal::{self, SignalPipe};
use crate::sys::{closer, socket};
use crate::worker;
use crate::worker_init::WorkerInit;

/// The delay before the next process is forked ahead, after a process ended before it was ready or a fork ahead failed.
/// Each further failure doubles the delay, up to the maximum.
const FIRST_DELAY_MS: u64 = 100;
const MAX_DELAY_MS: u64 = 30_000;
/// The largest number of reports that are read from one session at once.
const MAX_REPORTS: usize = 16;

/// All children of the acceptor.
pub struct SessionProcesses {
    pub records: OwnRecords,
    generation: Generation,
    living: BTreeMap<usize, Session>,
    /// Sessions of dead acceptors that reach the master over this one.
    pub(super) rejoined: RejoinedSessions,
    by_pid: BTreeMap<Pid, usize>,
    spares: VecDeque<usize>,
    /// The number of sessions with a connection.
    open: usize,
    /// When the next one may be forked ahead, and the delay after the next failure.
    fork_at_ms: u64,
    delay_ms: u64,
    has_forked: bool,
    /// Whether a session has crashed and its leftovers may not be gone yet.
    is_sweep_pending: bool,
    /// Whether a session has ended since the last tick. It may have left processes behind, even if it ended well.
    has_ended: bool,
    /// Whether the server stops soon. New sessions get that order, too.
    is_stop_pending: bool,
}

/// Closes a client's descriptors in a child, because the last close may wait for what the client has
/// attached.
pub fn close(client: Vec<OwnedFd>) {
    client.into_iter().for_each(closer::close_in_child);
}

impl SessionProcesses {
    pub fn new(boot: &WorkerInit<'_>) -> Self {
        SessionProcesses {
            records: OwnRecords::new(boot),
            generation: boot.generation,
            living: BTreeMap::new(),
            rejoined: RejoinedSessions::default(),
            by_pid: BTreeMap::new(),
            spares: VecDeque::new(),
            open: 0,
            fork_at_ms: 0,
            delay_ms: FIRST_DELAY_MS,
            has_forked: false,
            is_sweep_pending: false,
            has_ended: false,
            is_stop_pending: false,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.living.is_empty()
    }

    pub fn has_forked(&self) -> bool {
        self.has_forked
    }

    /// Returns the number of sessions with a connection.
    pub fn open(&self) -> usize {
        self.open
    }

    /// Returns the number of connections that other acceptors of the listener have; `is_exact` as in
    /// `OwnRecords::open_elsewhere`.
    pub fn open_elsewhere(&mut self, is_exact: bool, now_ms: u64) -> usize {
        let own = &self.by_pid;
        let is_own = |pid| own.contains_key(&pid);
        self.records.open_elsewhere(is_own, is_exact, now_ms)
    }

    /// Returns the number of sessions that wait for a connection.
    pub fn spares(&self) -> usize {
        self.spares.len()
    }

    pub fn may_fork_at(&self, now_ms: u64) -> bool {
        now_ms >= self.fork_at_ms
    }

    /// Delays the next fork after a failure.
    pub fn postpone_forks(&mut self, now_ms: u64) {
        self.fork_at_ms = now_ms + self.delay_ms;
        self.delay_ms = (2 * self.delay_ms).min(MAX_DELAY_MS);
    }

    /// Forks a session. Only the parent returns. Returns its index among those of this listener.
    ///
    /// # Errors
    /// If the system refuses the process or a descriptor, or all records are in use.
    pub fn fork(
        &mut self,
        boot: &mut WorkerInit<'_>,
        signals: &mut SignalPipe,
        epoll: &Epoll,
        first_event: u64,
    ) -> io::Result<usize> {
        let (own_end, session_end) = channel::pair()?;
        let heartbeat = OwnedArray::new(NonZeroUsize::MIN)?;
        let index = self
            .records
            .claim(|index| self.living.contains_key(&index) || self.rejoined.has(index))?;
        let record = &self.records.all[index];
        // A signal between fork and the child's own handlers would wake this process, or be lost.
        signal::block_all();
        let forked = match process::fork() {
            Ok(Fork::Child) => worker::run(WorkerInit {
                isolated: session::isolated_init(boot, heartbeat),
                jobs: None,
                slot: Slot::of_session(index),
                generation: boot.generation,
                settings: Rc::clone(&boot.settings),
                registry: Arc::clone(&boot.registry),
                listeners: boot.listeners.clone(),
                methods: boot.methods.clone(),
                kept_lanes: boot.kept_lanes.clone(),
                adoption: boot.adoption.clone(),
                link: session_end,
                startup_log_tx: None,
                record: &record.worker,
                metrics: boot.metrics.clone(),
                access_file: boot.access_file.clone(),
                records: (
                    boot.records.0,
                    session_memory::link_index(self.records.place(index)),
                ),
                session_records: boot.session_records,
                // `worker::post_fork` takes it, and replaces the shared tables by private ones.
                sources: boot.sources.clone(),
                quarantine: boot.quarantine.clone(),
                crash_report: boot.crash_report,
                stuck: boot.stuck,
                master_signals: signals,
                pid_file: None,
                title: boot.title,
                program: boot.program.clone(),
                master: boot.master,
            }),
            Ok(Fork::Parent(pid)) => Ok(pid),
            Err(error) => Err(error),
        };
        signal::unblock_all();
        let pid = match forked {
            Ok(pid) => pid,
            Err(error) => {
                self.records.release(index);
                return Err(error);
            }
        };
        self.has_forked = true;
        if let Err(error) = heartbeat.hide_from_children() {
            log::warn!(
                "could not hide the heartbeat of connection process {pid}: {error}; connection processes that are forked later can change it"
            );
        }
        record.set_process(pid, process_tree::start_ticks(pid).unwrap_or(0));
        let event = EpollEvent::new(EpollFlags::EPOLLIN, first_event + index as u64);
        // If this fails, the session serves, but gets no links to pools.
        let _ = epoll.add(own_end.as_fd(), event);
        self.by_pid.insert(pid, index);
        self.living
            .insert(index, Session::new(pid, own_end, Some(heartbeat)));
        if self.is_stop_pending {
            self.living[&index].order(self.generation, Order::StopPending, None);
        }
        Ok(index)
    }

    /// Keeps a process that waits for a connection.
    pub fn keep_spare(&mut self, session: usize) {
        self.spares.push_front(session);
    }

    pub fn take_spare(&mut self) -> Option<usize> {
        while let Some(index) = self.spares.pop_back() {
            if self.living.contains_key(&index) {
                return Some(index);
            }
        }
        None
    }

    /// Sends a connection to a session.
    pub fn hand_over(&mut self, index: usize, held: HeldConnection, now_ms: u64) -> HandOver {
        let Some(session) = self.living.get_mut(&index) else {
            return HandOver::Again(held);
        };
        let Some(link) = &session.link else {
            return HandOver::Again(held);
        };
        let record = &self.records.all[index];
        record.open(held.from, now_ms);
        let fds: Vec<BorrowedFd<'_>> = held.client.iter().map(AsFd::as_fd).collect();
        let sent = socket::send_packet(link, &[&held.packet], &fds);
        drop(fds);
        match sent {
            // The session has its descriptors too, so closing them here ends nothing.
            Ok(()) => {
                (session.is_open, session.opened_ms) = (true, now_ms);
                self.open += 1;
                HandOver::Done
            }
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => HandOver::Again(held),
            Err(error) if is_full(&error) => {
                record.wait_again();
                self.spares.push_back(index);
                HandOver::Later(held, error)
            }
            Err(error) => {
                close(held.client);
                // It is unknown whether the session has got the connection, so it gets no other one.
                session.link = None;
                HandOver::Lost(error)
            }
        }
    }

    /// Reads the reports of a session.
    pub fn reports(&mut self, index: usize, epoll: &Epoll) -> Vec<Report> {
        let mut reports = Vec::new();
        let Some(session) = self.living.get_mut(&index) else {
            return self.rejoined.reports(index, epoll, MAX_REPORTS);
        };
        while reports.len() < MAX_REPORTS
            && let Some(link) = &session.link
        {
            match link.receive() {
                Received::Message(message, _) => {
                    if message.body == Report::Ready && !session.is_ready {
                        session.is_ready = true;
                        (self.fork_at_ms, self.delay_ms) = (0, FIRST_DELAY_MS);
                    }
                    reports.push(message.body);
                }
                Received::Empty => break,
                // A session is not trusted: an invalid report ends the link, but not the connection.
                Received::WithDescriptors(_) | Received::Garbage | Received::End => {
                    session.unwatch(epoll);
                }
            }
        }
        reports
    }

    /// Returns whether a session may ask the master for a link to the pool process with this record.
    pub fn may_ask(&mut self, index: usize, record: u32, now_ms: u64) -> bool {
        let session = self.living.get_mut(&index);
        let session = session.or_else(|| self.rejoined.get_mut(index));
        session.is_some_and(|session| session.may_ask(record, now_ms))
    }

    /// Takes the link of a session whose acceptor has died; `first_event` as in `fork`.
    pub fn rejoin(&mut self, link: Vec<OwnedFd>, epoll: &Epoll, first_event: u64) {
        let records = (&self.records, |index| self.living.contains_key(&index));
        self.rejoined.add(records, link, epoll, first_event);
    }

    /// Sends a session the link that the master has made for it.
    pub fn link(&self, link: SessionLink, fd: &OwnedFd) {
        let index = self.records.index_of(link.session);
        let session =
            index.and_then(|index| self.living.get(&index).or_else(|| self.rejoined.get(index)));
        if let Some(session) = session {
            let order = Order::LinkPool(PoolLink {
                record: link.record,
                lane: link.lane,
                generation: self.generation,
            });
            session.order(self.generation, order, Some(fd.as_fd()));
        }
    }

    /// Returns the indices of all living sessions.
    pub fn places(&self) -> impl Iterator<Item = usize> {
        self.living.keys().copied()
    }

    /// Returns whether a session lives and runs no call, so that it can hand its connection over.
    pub fn may_move(&self, index: usize) -> bool {
        let runs_none = |_: &Session| self.records.all[index].worker.running.load(Relaxed) == 0;
        self.living.get(&index).is_some_and(runs_none)
    }

    /// Sends an order to one session.
    pub fn order_one(&self, index: usize, body: Order) {
        if let Some(session) = self.living.get(&index) {
            session.order(self.generation, body, None);
        }
    }

    /// Sends an order to all sessions. Rejoined ones get orders to drain or stop only from the master.
    pub fn order_all(&mut self, body: Order, descriptor: Option<BorrowedFd<'_>>) {
        self.is_stop_pending |= body == Order::StopPending;
        let has_all = !matches!(body, Order::Drain(_) | Order::Stop(_));
        let others = self.rejoined.all().filter(|_| has_all);
        for session in self.living.values().chain(others) {
            session.order(self.generation, body, descriptor);
        }
    }

    /// Ends the processes without a connection.
    pub fn end_spares(&mut self, epoll: &Epoll) {
        self.spares.clear();
        for session in self.living.values_mut().filter(|it| !it.is_open) {
            session.unwatch(epoll);
        }
    }

    /// Reaps all children that have ended.
    pub fn reap(&mut self, epoll: &Epoll, now_ms: u64) -> SessionEnds {
        let mut ends = SessionEnds::default();
        while let Some(child) = process::reap_any() {
            if let Some(index) = self.by_pid.remove(&child.pid)
                && let Some(mut session) = self.living.remove(&index)
            {
                session.unwatch(epoll);
                let has_crashed = self.has_ended(index, &session, child, now_ms);
                if has_crashed {
                    ends.crashed.push(self.records.place(index) as u32);
                }
                let reason = match has_crashed {
                    true => Some(CloseReason::Crash),
                    false => session.is_killed.then_some(CloseReason::Stop),
                };
                let reason = reason.filter(|_| session.is_open);
                ends.lost.extend(reason.map(|it| (it, child.pid)));
            }
        }
        self.sweep(false);
        ends
    }

    /// Handles the end of a session. Returns whether it has crashed.
    fn has_ended(
        &mut self,
        index: usize,
        session: &Session,
        child: ReapedChild,
        now_ms: u64,
    ) -> bool {
        self.has_ended = true;
        self.open -= usize::from(session.is_open);
        self.spares.retain(|spare| *spare != index);
        if !session.is_ready && !session.is_killed {
            self.postpone_forks(now_ms);
        }
        if child.exit == Exit::Code(0) || session.is_killed {
            self.is_sweep_pending |= session.is_killed;
            self.records.release(index);
            return false;
        }
        self.is_sweep_pending = true;
        self.records.lose_lines(index);
        self.records.all[index].crash(child.exit, child.peak_rss_bytes);
        self.records.all[0].crashes.fetch_add(1, Relaxed);
        true
    }

    /// Kills the leftovers of dead sessions, which this process has adopted; at a tick also those of sessions that have
    /// ended well.
    pub fn sweep(&mut self, is_tick: bool) {
        self.is_sweep_pending |= is_tick && std::mem::take(&mut self.has_ended);
        if !self.is_sweep_pending {
            return;
        }
        let mut left = process_tree::direct_children();
        left.retain(|pid| !self.by_pid.contains_key(pid));
        self.is_sweep_pending = !left.is_empty();
        if self.is_sweep_pending {
            let held = process_tree::open_with_descendants(&left, |_| true);
            held.iter().for_each(PidFd::kill);
        }
    }

    /// Kills sessions that have not ended in time, with what they have started. They count as crashed.
    pub fn kill_late(&mut self, most: &SessionTimes, now_ms: u64) {
        let living = self.living.iter_mut();
        for (&index, session) in living.filter(|(_, it)| it.is_open && !it.is_late) {
            let record = &self.records.all[index];
            let times = (session.opened_ms, session.heartbeat_ms());
            let Some(reason) = most.exceeded(times, now_ms) else {
                continue;
            };
            record.set_exceeded(reason);
            log::error!(
                "connection process {} is killed: {reason} peer={}",
                session.pid,
                self.records.all[index].peer_name()
            );
            session.is_late = true;
            session.kill_tree();
            self.is_sweep_pending = true;
        }
    }

    /// Kills all sessions and the processes that they have started.
    pub fn kill_all(&mut self) {
        let pids: Vec<Pid> = self.living.values().map(|session| session.pid).collect();
        let held = process_tree::open_with_descendants(&pids, |_| true);
        held.iter().for_each(PidFd::kill);
        for session in self.living.values_mut() {
            session.is_killed = true;
            // For the case that it could not be opened.
            process::kill(session.pid, Signal::SIGKILL);
        }
        self.is_sweep_pending = true;
    }
}
