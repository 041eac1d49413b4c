//! Runs the event loop of a worker: completions, deadlines and orders in, answers out.
//!
//! It connects the event layer with the connections and the dispatcher, and waits only in
//! `Reactor::poll_once`. A failure of a connection ends that connection. A failure of the reactor ends
//! the worker, with the reason in the log.

use std::array;
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::access_log::turn;
use super::active_rebalance::ActiveRebalance;
use super::call_dispatcher::CallDispatcher;
use super::connection::{AnswerPosition, Connection};
use super::drain::{Drain, DrainStep};
use super::forwarding::LINK_BASE;
use super::peer_calls;
use super::peer_frames;
use super::pool_update;
use super::publishing::{Published, publish};
use super::session_state::SessionState;
use super::timers::TimerTarget;
use super::timers::millis;
use crate::config::WorkersConfig;
use crate::handler::command::sweep;
use crate::link::adoption_queue::AdoptionQueue;
use crate::link::channel::WorkerEnd;
use crate::link::ids::{Generation, Pid};
use crate::link::message::{Message, Report};
use crate::link::stuck_calls::StuckCalls;
use crate::sys::event::{Completion, Driver, Interest, Reactor, Token};
use crate::sys::process::monotonic_ns;
use crate::sys::signal::SignalPipe;
use crate::sys::waker::Waker;
use crate::throttle::limiter::{Limiter, with_suppressed_count};

/// The time between two attempts to accept after the system had no descriptor left.
pub(super) const LISTEN_RETRY_MS: u64 = 200;
/// The longest time between two ticks: the heartbeat, and the check for connections that a stopped sibling left in
/// the queue. At least four ticks fit into `heartbeat-timeout`, after which the loop counts as stuck.
const TICK_MS: u64 = 1000;
const TICKS_PER_TIMEOUT: u64 = 4;
/// The time between two checks whether the pool processes serve, while they start.
const POOL_LOOK_MS: u64 = 10;
/// If a tick is this late, the worker was paused or its loop was delayed.
const PAUSE_MS: u64 = 1000;

/// The numbers under which other descriptors than connections are watched.
pub(super) const SIGNALS: u16 = 0;
pub(super) const LINK: u16 = 1;
pub(super) const WAKER: u16 = 2;
pub(super) const QUEUE: u16 = 3;
pub(super) const MASTER: u16 = 4;
pub(super) const REFUSED: u16 = 5;
/// The first number for the sockets of pool programs.
const PROGRAMS: u16 = 16;

/// Events that clients can cause. Each kind is logged at a limited rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WarningKind {
    /// No connection can be accepted.
    Accepting,
    /// The connection limit is reached.
    Full,
    Reading,
    /// A client reads its answers too slowly.
    Writing,
    /// A handler thread is stuck.
    StuckThread,
    /// Clients send more unfinished input than there is room for.
    Unfinished,
    /// Clients do not read their answers, and there is no room for more.
    Unsent,
    /// A connection is closed to make room for another one.
    Silent,
    /// A client uses the PROXY protocol or TLS.
    Protocol,
}

impl WarningKind {
    const KINDS: usize = 9;
}

/// A running worker.
pub struct EventLoop {
    pub service: CallDispatcher,
    /// By `Token::index`.
    pub connections: Vec<Option<Connection>>,
    /// The socketpair to the master.
    pub link: WorkerEnd,
    /// TERM and QUIT.
    pub signals: SignalPipe,
    /// Woken by handler threads and the supervisors of programs.
    pub waker: Arc<Waker>,
    pub generation: Generation,
    /// The queue over which siblings hand over connections.
    pub adoption: AdoptionQueue,
    /// Quiescent connections that wait for room in the queue, in order.
    pub(super) waiting_to_give: VecDeque<Token>,
    pub(super) give_deadline: u64,
    /// The rebalance order in progress.
    pub(super) rebalancing: ActiveRebalance,
    pub(super) show_draining: Box<dyn Fn()>,
    /// How this worker drains and stops.
    pub drain: Drain,
    /// The longest drain if the master cannot order one any more.
    pub drain_timeout: Duration,
    pub(super) listen_deadline: u64,
    /// Limits how often each kind of warning is logged.
    warning_limiters: [Limiter; WarningKind::KINDS],
    pub(super) tick_ms: u64,
    next_tick_ms: u64,
    pub(super) is_at_limit: bool,
    /// The number of connections accepted since the last check for too many.
    pub(super) accepts: u32,
    /// The number of calls after which the worker reports to the master that it should be recycled (`max-calls`).
    pub(super) recycle_at: u64,
    /// When the link to the master ended, in milliseconds; `None` while it exists. It ends before the
    /// master's children get another parent.
    pub(super) master_gone: Option<u64>,
    /// Whether it accepts only once the pool processes of its generation serve. That is so at a start and
    /// a reload, but not for a replaced worker.
    pub(super) waits_for_pools: bool,
    /// Whether the master was informed that it accepts.
    pub(super) is_accepting: bool,
    /// Whether it was reported that all handler threads are stuck.
    pub(super) stuck_reported: bool,
    /// Where the master reads the calls of stuck threads.
    pub(super) stuck: &'static StuckCalls,
    pub(super) published: Published,
    /// `Some` iff this is a session.
    pub(super) session: Option<SessionState>,
}

impl EventLoop {
    /// Creates a loop that has not run yet.
    pub fn new(
        service: CallDispatcher,
        (link, signals, waker): (WorkerEnd, SignalPipe, Arc<Waker>),
        (adoption, stuck): (AdoptionQueue, &'static StuckCalls),
        show_draining: Box<dyn Fn()>,
        generation: Generation,
        workers: &WorkersConfig,
    ) -> Self {
        EventLoop {
            connections: Vec::new(),
            link,
            signals,
            waker,
            generation,
            adoption,
            waiting_to_give: VecDeque::new(),
            give_deadline: 0,
            rebalancing: ActiveRebalance::default(),
            show_draining,
            drain: Drain::default(),
            drain_timeout: workers.drain_timeout,
            listen_deadline: 0,
            warning_limiters: array::from_fn(|_| Limiter::rare()),
            tick_ms: TICK_MS.min(millis(workers.heartbeat_timeout) / TICKS_PER_TIMEOUT),
            next_tick_ms: 0,
            is_at_limit: false,
            accepts: 0,
            recycle_at: u64::MAX,
            service,
            master_gone: None,
            waits_for_pools: false,
            is_accepting: false,
            stuck_reported: false,
            stuck,
            published: Published::default(),
            session: None,
        }
    }

    /// Reports that this worker accepts, as soon as it can, and serves until it must exit.
    ///
    /// # Errors
    /// If the reactor or a required pool program fails, or the report to the master fails.
    pub fn run(&mut self, reactor: &mut Reactor) -> io::Result<()> {
        self.record_heartbeat();
        self.defer_accepting(reactor);
        let mut is_watched = false;
        loop {
            let was_accepting = self.is_accepting;
            self.start_accepting(reactor)?;
            let mut next = self.next_tick_ms;
            if self.is_accepting != was_accepting {
                // Publish the load at once, because other processes may wait for it.
                next = self.service.now_ms;
            }
            if is_watched {
                next = self.service.now_ms + 1;
            }
            if self.waits_for_pools && !self.is_accepting {
                next = next.min(self.service.now_ms + POOL_LOOK_MS);
            }
            let pools = self.service.threads.pools();
            next = next.min(pools.next_overdue().unwrap_or(u64::MAX));
            if pools.has_done() || !self.service.untaken_batches.is_empty() {
                next = self.service.now_ms;
            }
            if self.service.calls.has_unqueued() || !self.service.answered_elsewhere.is_empty() {
                next = self.service.now_ms;
            }
            let forwarding = &self.service.forwarding;
            let next = next
                .min(self.service.timers.next().unwrap_or(u64::MAX))
                .min(forwarding.recheck_ms.unwrap_or(u64::MAX));
            let wait = match self.drain.next() {
                Some(at) => next.min(at),
                None => next,
            };
            let more = reactor.poll_once(wait.saturating_sub(self.service.now_ms), self)?;
            if self.service.threads.has_done() || !self.service.answered_elsewhere.is_empty() {
                self.on_results(reactor);
            }
            self.expire(reactor);
            self.resume_batch(reactor);
            if self.service.now_ms >= self.next_tick_ms {
                self.tick(reactor);
            }
            self.queue_calls(reactor);
            is_watched = self.service.threads.look(self.service.now_ms);
            self.exchange_calls(reactor);
            self.watch_slow_calls();
            self.settle_programs(reactor);
            turn::end(&mut self.service);
            publish(&self.service, reactor.connections(), reactor.spurious_wakes);
            self.check_recycle_limits();
            self.end_with_connection(reactor);
            self.hold_for_attempts();
            match self.drain.step(
                self.service.now_ms,
                reactor.connections(),
                self.service.calls.is_empty()
                    && self.service.forwarding.is_settled(self.service.now_ms),
                more,
            ) {
                DrainStep::Serve => {}
                DrainStep::ResumeReading => {
                    self.resume_reading(reactor);
                    is_watched = true;
                }
                DrainStep::StopReading => self.stop_reading(reactor),
                DrainStep::CloseQuiescent { partial } => self.close_all_quiescent(reactor, partial),
                DrainStep::GiveUp => self.give_up_all(reactor),
                DrainStep::CloseAll => self.close_all(reactor),
                DrainStep::Leave => return Ok(()),
            }
        }
    }

    /// Queues the calls of this turn for threads and programs.
    pub(super) fn queue_calls(&mut self, reactor: &Reactor) {
        let backlog = |token, place| backlog(&self.connections, reactor, token, place);
        let now_ms = self.service.now_ms;
        self.service.calls.queue_calls(now_ms, backlog);
    }

    /// Sends calls to other workers, and asks the master for missing links.
    fn exchange_calls(&mut self, reactor: &mut Reactor) {
        self.serve_own_programs(reactor);
        let is_serving = self.is_accepting && self.drain.is_serving();
        let phase = (is_serving, !self.drain.is_serving());
        for key in pool_update::unserved_calls(&self.service) {
            let (code, text) = pool_update::UNSERVED;
            self.abort_call(reactor, key, code, text);
        }
        while let Some(late) = peer_calls::exchange(&mut self.service, phase) {
            self.reject_late_call(reactor, late);
        }
        self.abort_unavailable(reactor);
        self.yield_accepting_if_busy(reactor);
        for record in self.service.forwarding.take_wanted() {
            // If the request cannot be sent, the next search tries again.
            self.request(Report::LinkWanted(record));
        }
        if let Some(report) = pool_update::report(&mut self.service)
            && self.request(report)
        {
            pool_update::reported(&mut self.service);
        }
        self.service.forwarding.settle(reactor);
    }

    /// Watches the sockets of the programs that serve, and only these.
    pub(super) fn settle_programs(&mut self, reactor: &mut Reactor) {
        self.service.threads.pools().settle(|program, wire| {
            let watch = u16::try_from(program)
                .ok()
                .and_then(|program| program.checked_add(PROGRAMS))
                .ok_or(io::ErrorKind::OutOfMemory)?;
            match wire {
                Some((fd, false)) => reactor.watch(watch, fd, Interest::Read),
                Some((fd, true)) => reactor.watch(watch, fd, Interest::Both),
                None => {
                    reactor.unwatch(watch);
                    Ok(())
                }
            }
        });
    }

    fn record_heartbeat(&mut self) {
        let now_ns = monotonic_ns();
        self.service.counts.begin_turn(now_ns);
        self.service.now_ms = now_ns / 1_000_000;
        let heartbeat_ms = &self.service.record.heartbeat_ms;
        heartbeat_ms.store(self.service.now_ms, Relaxed);
    }

    /// Sends a report that a master of an older version would not understand, if the master allows it. Returns whether
    /// it was sent.
    pub(super) fn request(&self, body: Report) -> bool {
        let sent = self.service.record.request(|| self.report(body));
        sent.is_some_and(|sent| sent.is_ok())
    }

    /// # Errors
    /// If the message cannot be sent, which is logged.
    pub(super) fn report(&self, body: Report) -> io::Result<()> {
        let message = Message {
            pid: Pid::current(),
            generation: self.generation,
            body,
        };
        // If the master is gone, the end of the link shows it.
        match self.link.send(message, None) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                log::warn!("could not send {body:?} to the master: {error}");
                Err(error)
            }
            _ => Ok(()),
        }
    }

    fn tick(&mut self, reactor: &mut Reactor) {
        if self.service.now_ms.saturating_sub(self.next_tick_ms) > PAUSE_MS && self.next_tick_ms > 0
        {
            self.drain.extend_after_pause(self.service.now_ms);
        }
        self.next_tick_ms = self.service.now_ms + self.tick_ms;
        if self.listen_deadline == 0 {
            self.resume_listening(reactor);
        }
        reactor.try_accept(self);
        if self.service.unsent.take_room_for_blocked() {
            self.advance_open(reactor, |connection| connection.is_read_paused);
        }
        self.check_threads(reactor);
        self.leave_without_master(reactor);
        self.tick_session(reactor);
        sweep::reap_adopted();
        self.publish_tick();
    }

    /// Logs an event that clients can cause, at a limited rate.
    pub(super) fn warn_limited(&mut self, kind: WarningKind, text: &str) {
        match self.warning_limiters[kind as usize].admit(self.service.now_ms) {
            Some(more) => log::warn!("{}", with_suppressed_count(text.to_owned(), more)),
            None => log::debug!("{text}"),
        }
    }
}

impl Driver for EventLoop {
    fn woken(&mut self) {
        self.record_heartbeat();
    }

    fn complete(&mut self, reactor: &mut Reactor, completion: Completion<'_>) {
        match completion {
            Completion::Accepted { socket } => drop(self.accepted(reactor, socket)),
            Completion::Adopted {
                socket,
                packet,
                rest,
            } => self.adopted(reactor, socket, packet, rest),
            Completion::AcceptFailed { error } => self.on_accept_error(&error),
            Completion::Received { token, bytes } => self.on_bytes(reactor, token, bytes),
            Completion::Ended { token } => self.on_end(reactor, token),
            Completion::HungUp { token } => self.on_hang_up(reactor, token),
            Completion::Sent { token } => {
                // The client has taken some bytes, so its write timeout starts again.
                if let Some(connection) = find(&mut self.connections, token) {
                    connection.active_ms = self.service.now_ms;
                    let armed = &mut connection.write_deadline;
                    self.service.timers.disarm(armed, TimerTarget::Write(token));
                }
                self.pump(reactor, token, false);
            }
            Completion::Failed { token, error } => {
                log::debug!("a connection broke: {error}");
                self.close(reactor, token);
            }
            Completion::Readable { watch: SIGNALS } => self.on_signal(reactor),
            Completion::Readable { watch: LINK } => self.orders(reactor),
            Completion::Readable { watch: QUEUE } => self.retry_handoffs(reactor),
            Completion::Readable { watch: MASTER } => self.session_lost_master(reactor),
            Completion::Readable { watch: REFUSED } => self.serve_refused(),
            Completion::Readable { watch: WAKER } => {
                self.waker.clear();
                self.service.threads.pools().receive_events();
                self.on_results(reactor);
            }
            Completion::Readable { watch } if watch >= LINK_BASE => {
                let is_serving = self.is_accepting && self.drain.is_serving();
                let link = usize::from(watch - LINK_BASE);
                if !peer_frames::receive(&mut self.service, link, is_serving) {
                    peer_calls::end(&mut self.service, link, reactor);
                }
                self.on_results(reactor);
            }
            Completion::Readable { watch } => {
                let program = usize::from(watch - PROGRAMS);
                self.service.threads.pools().attend(program);
            }
        }
    }
}

/// Returns how many bytes of answers a connection has to send before the answer at `place`; `None` if it is gone.
fn backlog(
    connections: &[Option<Connection>],
    reactor: &Reactor,
    token: Token,
    place: AnswerPosition,
) -> Option<usize> {
    let connection = connections.get(token.index()).and_then(Option::as_ref);
    let connection = connection.filter(|connection| connection.token == token);
    connection.map(|connection| connection.backlog(place, reactor.unsent(token)))
}

/// Returns the connection of a token, if it still exists.
pub(super) fn find(
    connections: &mut [Option<Connection>],
    token: Token,
) -> Option<&mut Connection> {
    connections
        .get_mut(token.index())?
        .as_mut()
        .filter(|connection| connection.token == token)
}
