//! Accepts on the listener and gives each connection to a process that was forked ahead.
//!
//! At the limit, and while the system has no process or descriptor, nothing is accepted: the kernel queues
//! connections.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};

use super::held::{ConnectionSource, HeldConnections};
use super::sessions::SessionProcesses;
use super::sources::{Sources, limit_of};
use crate::config::IsolationConfig;
use crate::link::adoption_queue::LONGEST;
use crate::link::ids::{Generation, Pid};
use crate::link::message::Order;
use crate::link::metrics_board::BlockWriter;
use crate::link::metrics_board::layout::{CloseReason, NAMES};
use crate::link::scoreboard;
use crate::link::session_draining::BATCH;
use crate::link::session_limits::SessionLimits;
use crate::link::session_table::{self, SESSIONS};
use crate::link::source_table::Source;
use crate::logging::{self, LogOutput};
use crate::sys::closer;
use crate::sys::process::{monotonic_ms, monotonic_ns};
use crate::sys::signal::SignalPipe;
use crate::sys::socket;
use crate::throttle::limiter::{Limiter, with_suppressed_count};
use crate::worker::refused_connections::RefusedConnections;
use crate::worker_init::WorkerInit;

/// The time until the next try if the system had no process or descriptor.
pub(super) const RETRY_MS: u64 = 200;
/// The time between two checks for room at the limit.
const LIMIT_LOOK_MS: u64 = 50;

/// The numbers of epoll events: of the listener, the adoption queue and the refused connections. The numbers of
/// sessions begin with `FIRST_SESSION`.
pub const LISTENER: u64 = 2;
pub const QUEUE: u64 = 3;
pub const REFUSED: u64 = 4;
pub const FIRST_SESSION: u64 = 16;

/// The sources of connections, and the processes that get them.
pub struct Accepting<'a> {
    /// The parameters with which this process was started. Its sessions get the same.
    pub boot: WorkerInit<'a>,
    pub signals: SignalPipe,
    pub epoll: Epoll,
    pub sessions: SessionProcesses,
    pub(super) sources: Sources,
    pub(super) isolation: IsolationConfig,
    /// Connections that have no process yet.
    pub(super) held: HeldConnections,
    /// Connections that get none.
    refused: RefusedConnections,
    warning_limiter: Limiter,
    /// Counts in the block that its sessions share.
    pub writer: BlockWriter,
    pub(super) packet: Vec<u8>,
    /// The time in milliseconds (CLOCK_MONOTONIC).
    pub now_ms: u64,
    pub(super) limits: SessionLimits,
    /// The largest number of connections that other acceptors of the listener had.
    most_elsewhere: usize,
    /// Whether the limit was reached at the last look.
    was_full: bool,
}

impl<'a> Accepting<'a> {
    /// Accepts nothing yet.
    ///
    /// # Errors
    /// If no descriptor is left.
    pub fn new(
        boot: WorkerInit<'a>,
        signals: SignalPipe,
        epoll: Epoll,
        isolation: IsolationConfig,
    ) -> io::Result<Self> {
        let listener = boot.listeners.first().cloned();
        let refused = RefusedConnections::new(closer::close_in_child)?;
        epoll.add(&refused, EpollEvent::new(EpollFlags::EPOLLIN, REFUSED))?;
        boot.count_programs_of_connections();
        let writer = BlockWriter::new(boot.metrics.block, true);
        let workers = &boot.settings.workers;
        let limits = SessionLimits::new(
            workers.heartbeat_timeout,
            workers.drain_timeout,
            isolation.max_lifetime,
        );
        Ok(Accepting {
            sessions: SessionProcesses::new(&boot),
            sources: Sources::new(listener, Rc::clone(&boot.adoption.rx)),
            boot,
            signals,
            epoll,
            isolation,
            held: HeldConnections::default(),
            refused,
            warning_limiter: Limiter::rare(),
            writer,
            packet: vec![0; LONGEST],
            now_ms: monotonic_ms(),
            limits,
            most_elsewhere: 0,
            was_full: false,
        })
    }

    /// Returns when to call `listen` again; `None` while it listens.
    pub fn resume_at_ms(&self) -> Option<u64> {
        self.sources.resume_at_ms()
    }

    /// Returns whether the acceptor of another generation takes over the connections of this one.
    pub fn has_taker(&self) -> bool {
        self.serving().is_some_and(|it| it != self.boot.generation)
    }

    /// Returns whether the listener is isolated in the generation that serves.
    pub fn is_isolated(&self) -> bool {
        self.serving().is_some()
    }

    fn serving(&self) -> Option<Generation> {
        let isolated = self.boot.isolated.as_ref()?;
        scoreboard::serving(self.boot.records.0, isolated.range.1 / SESSIONS)
    }

    /// Restores the mode of the listener; see `Sources::restore_nonblocking`. Call it at each tick.
    pub fn tick(&mut self) {
        self.sources.restore_nonblocking();
        let lost = logging::take_uncounted_lines();
        self.writer.add(&self.writer.block.lost_lines, lost);
        self.sessions.sweep(true);
        self.publish_methods();
        let most = self.limits.at_tick(self.now_ms);
        self.sessions.kill_late(&most, self.now_ms);
    }

    /// Uses the reopened log or access log, and passes it to the sessions.
    pub fn reopen(&mut self, order: Order, file: OwnedFd) {
        self.sessions.order_all(order, Some(file.as_fd()));
        match (order, &self.boot.access_file) {
            (Order::ReopenLog, _) => drop(logging::set_output(LogOutput::received(file))),
            (_, Some(own)) => {
                if let Err(error) = own.replace(file) {
                    log::warn!("the access log continues in the old file: {error}");
                }
            }
            (_, None) => {}
        }
    }

    /// Publishes the numbers of running and waiting calls by method: of the sessions of this acceptor, and of
    /// sessions of its generation whose acceptor has died. A session that has ended does not count any more.
    fn publish_methods(&self) {
        let mut sums = [(0, 0); NAMES + 1];
        let records = &self.sessions.records;
        let places = self.sessions.places().chain(records.orphans());
        for (method, running, queued) in places.flat_map(|it| records.all[it].methods()) {
            let (all_running, all_queued) = &mut sums[method];
            *all_running += running;
            *all_queued += queued;
        }
        let block = self.writer.block;
        for (method, (running, queued)) in sums.into_iter().enumerate() {
            block.running[method].store(running, Relaxed);
            block.queued[method].store(queued, Relaxed);
        }
    }

    /// Returns whether too few processes wait for a connection. With `needs_one` one is needed to show that
    /// a session can start.
    pub fn lacks_spare(&self, needs_one: bool) -> bool {
        self.sessions.spares() < self.wanted_spares().max(usize::from(needs_one))
    }

    /// Returns whether less than half of the processes that should wait for a connection do.
    pub fn is_short_of_spares(&self) -> bool {
        2 * self.sessions.spares() < self.wanted_spares()
    }

    fn wanted_spares(&self) -> usize {
        let room = self
            .isolation
            .processes
            .saturating_sub(self.sessions.open());
        self.isolation.spare.min(room)
    }

    /// Returns whether `refill` must be called now.
    pub fn may_refill(&self, needs_one: bool) -> bool {
        self.lacks_spare(needs_one) && self.sessions.may_fork_at(self.now_ms)
    }

    /// Forks one process if too few wait for a connection.
    ///
    /// # Errors
    /// If the fork failed and `needs_one` is set.
    pub fn refill(&mut self, needs_one: bool) -> io::Result<()> {
        if !self.may_refill(needs_one) {
            return Ok(());
        }
        match self.fork() {
            Ok(session) => {
                self.sessions.keep_spare(session);
                Ok(())
            }
            Err(error) if needs_one => Err(error),
            Err(error) => {
                self.sessions.postpone_forks(self.now_ms);
                self.warn(&format!(
                    "could not fork a process ahead: {error}; trying again"
                ));
                Ok(())
            }
        }
    }

    fn fork(&mut self) -> io::Result<usize> {
        self.sessions.fork(
            &mut self.boot,
            &mut self.signals,
            &self.epoll,
            FIRST_SESSION,
        )
    }

    /// Returns whether a session may ask for a link to the process with this record: to a pool process, and
    /// not too often.
    pub fn may_ask(&mut self, session: usize, record: u32) -> bool {
        let asked = self.boot.records.0.get(record as usize);
        let is_pool = asked.is_some_and(|it| it.lane.load(Relaxed) > 0);
        is_pool && self.sessions.may_ask(session, record, self.now_ms)
    }

    /// Returns a process that waits for a connection.
    pub(super) fn take_spare(&mut self) -> io::Result<usize> {
        match self.sessions.take_spare() {
            Some(session) => Ok(session),
            None => self.fork(),
        }
    }

    pub(super) fn is_full(&mut self) -> bool {
        self.connections(false) >= self.isolation.processes
    }

    /// Returns whether no further connection may be adopted. Another acceptor has counted adopted connections already,
    /// so this limit is higher than that of `is_full`: it allows for those in transit, and for other acceptors that
    /// have more, because `processes` was lowered. There is a limit because a hostile session can send connections that
    /// no acceptor has accepted.
    pub(super) fn is_overfull(&mut self) -> bool {
        let most = (self.isolation.processes + BATCH).max(self.most_elsewhere);
        // The number may be some milliseconds old, and count sessions that have ended since then.
        self.connections(false) >= most && self.connections(true) >= most
    }

    /// Returns the number of connections of the listener; `is_exact` as in `OwnRecords::open_elsewhere`.
    fn connections(&mut self, is_exact: bool) -> usize {
        let others = self.sessions.open_elsewhere(is_exact, self.now_ms);
        self.most_elsewhere = self.most_elsewhere.max(others);
        self.sessions.open() + self.held.len() + others
    }

    /// Counts each time that the limit is reached. `is_full` says whether it is reached now.
    pub(super) fn note_limit(&mut self, is_full: bool) {
        if is_full
            && !self.was_full
            && let Some(first) = self.sessions.records.all.first()
        {
            first.full.fetch_add(1, Relaxed);
        }
        self.was_full = is_full;
    }

    /// Stops accepting at the limit for a while, and adopting too if `all` is set.
    pub(super) fn wait_for_room(&mut self, all: bool) {
        let resume_at_ms = self.now_ms + LIMIT_LOOK_MS;
        self.sources.pause(&self.epoll, resume_at_ms, all);
    }

    /// Stops accepting and adopting after an error for a while.
    pub(super) fn pause(&mut self, ms: u64, error: &io::Error) {
        self.sources.pause(&self.epoll, self.now_ms + ms, true);
        self.warn(&format!(
            "no connection can be accepted: {error}; open connections are served, the others wait, at most \
             for limits.read-timeout; raise the limits of processes and open files, or lower processes of \
             the listener"
        ));
    }

    /// Stops adopting connections, because a process has shut the queue down.
    pub(super) fn leave_queue(&mut self) {
        self.sources.leave_queue(&self.epoll);
        self.warn(
            "a process has shut the adoption queue of this listener down: until the server restarts, sessions keep \
             their connections at a reload, and close them at the end of their drain",
        );
    }

    /// Where a connection comes from, with the key of its source if that is counted.
    pub(super) fn source_of(&self, client: &OwnedFd) -> ConnectionSource {
        let peer = socket::peer(client);
        let key = limit_of(&self.boot).and_then(|(limit, _)| {
            let source = Source::of(peer, || socket::peer_user(client).ok());
            source.key_at(limit.listener)
        });
        (peer, key)
    }

    /// Refuses a connection if its source has too many.
    pub(super) fn admit(
        &mut self,
        client: OwnedFd,
        (peer, key): ConnectionSource,
    ) -> Option<OwnedFd> {
        let (Some((limit, tables)), Some(key)) = (limit_of(&self.boot), key) else {
            return Some(client);
        };
        let open = session_table::count_of_source(self.sessions.records.all, key);
        if open + self.held.count_of_source(key) < limit.most {
            return Some(client);
        }
        let source = Source::of(peer, || socket::peer_user(&client).ok());
        let reason = limit.refuse(tables, (peer, source), self.now_ms);
        self.refuse(client, &reason);
        None
    }

    /// Answers refused connections whose first bytes have come, and closes those whose time is over.
    pub fn serve_refused(&mut self) {
        self.refused.serve();
        self.refused.expire(self.now_ms);
    }

    /// Whether no connection needs this process any more.
    pub fn is_done(&self) -> bool {
        self.sessions.is_empty() && self.refused.next_ms().is_none()
    }

    /// Returns when to call `serve_refused` at the latest.
    pub fn refused_until_ms(&self) -> Option<u64> {
        self.refused.next_ms()
    }

    /// Answers a connection with `overloaded` once its dialect is known, and closes it.
    pub(super) fn refuse(&mut self, client: OwnedFd, text: &str) {
        self.count_closed(CloseReason::Limit);
        self.refused.add(client, text, self.now_ms);
    }

    /// Counts a connection that was closed, but not by its session.
    pub(super) fn count_closed(&self, reason: CloseReason) {
        let closed = &self.writer.block.closed;
        self.writer.add(&closed[reason as usize], 1);
    }

    /// Counts what a session that has crashed or was killed could not count itself.
    pub fn count_lost(&self, reason: CloseReason, session: Pid) {
        self.count_closed(reason);
        let is_crash = reason == CloseReason::Crash;
        self.boot.count_left_programs(session, is_crash);
        let block = self.writer.block;
        if block.slow_calls.load(Relaxed) > 0 {
            // It could not complete the records of its slow calls.
            drop(block.slow.close(session.0, monotonic_ns()));
        }
    }

    /// Logs a warning, at most once in ten seconds.
    pub fn warn(&mut self, text: &str) {
        match self.warning_limiter.admit(self.now_ms) {
            Some(more) => log::warn!("{}", with_suppressed_count(text.to_owned(), more)),
            None => log::debug!("{text}"),
        }
    }
}
