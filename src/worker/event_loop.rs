//! The event loop of a worker: completions, deadlines and orders in, answers out.
//!
//! It joins the event layer with the connections and the service, and never waits anywhere but in
//! `Reactor::poll_once`. What fails on one connection ends that connection; what fails on the reactor
//! itself ends the worker, with the reason in the log.

use std::array;
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::active_rebalance::ActiveRebalance;
use super::call_dispatcher::{CallDispatcher, millis};
use super::connection::{AnswerPosition, Connection};
use super::drain::{Drain, DrainStep};
use super::forwarding::LINK_BASE;
use super::peer_calls;
use super::silent_connections::SilentConnections;
use super::timers::TimerTarget;
use crate::config::WorkersConfig;
use crate::handler::command::sweep;
use crate::link::adoption_queue::AdoptionQueue;
use crate::link::channel::WorkerEnd;
use crate::link::ids::{Generation, Pid};
use crate::link::message::{Message, Report};
use crate::link::stuck_calls::StuckCalls;
use crate::logging;
use crate::sys::event::{Completion, Driver, Interest, Reactor, Token};
use crate::sys::process::monotonic_ms;
use crate::sys::signal::SignalPipe;
use crate::sys::waker::Waker;
use crate::throttle::jitter;
use crate::throttle::limiter::{Limiter, with_suppressed_count};

/// Between two tries to accept when the system had no descriptor left.
pub(super) const LISTEN_RETRY_MS: u64 = 200;
/// The heartbeat, and the look for connections that a stopped sibling left in the queue: at most
/// so far apart, and at least four in the time after which the master takes the loop for stuck.
const TICK_MS: u64 = 1000;
const TICKS_PER_TIMEOUT: u64 = 4;
/// Between two looks whether the pool processes serve, while they start.
const POOL_LOOK_MS: u64 = 10;
/// So late for a tick, this worker was paused, or its loop was held up.
const PAUSE_MS: u64 = 1000;

/// The numbers under which descriptors other than connections are watched.
const SIGNALS: u16 = 0;
pub(super) const LINK: u16 = 1;
const WAKER: u16 = 2;
pub(super) const QUEUE: u16 = 3;
/// From here on the wires of pools' programs.
const PROGRAMS: u16 = 16;

/// Trouble that clients can cause: each kind is told at most once in a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WarningKind {
    /// Nobody can be let in.
    Accepting,
    /// As many are in as may be.
    Full,
    /// A client sends too slowly.
    Reading,
    /// A client takes its answers too slowly.
    Writing,
    /// A thread does not come back.
    Lost,
    /// Clients send more than there is room for, and finish nothing.
    Unfinished,
    /// Clients do not take their answers, which are more than there is room for.
    Unsent,
    /// A connection is closed to make room for another one.
    Silent,
    /// A proxy sends the PROXY protocol.
    Proxy,
}

impl WarningKind {
    const KINDS: usize = 9;
}

/// A worker at work.
pub struct EventLoop {
    pub service: CallDispatcher,
    /// By `Token::index`.
    pub connections: Vec<Option<Connection>>,
    /// The way to the master.
    pub link: WorkerEnd,
    /// TERM and QUIT.
    pub signals: SignalPipe,
    /// Woken by handler threads and the keepers of programs.
    pub waker: Arc<Waker>,
    pub generation: Generation,
    /// Where connections pass between siblings.
    pub adoption: AdoptionQueue,
    /// Connections at rest that wait for room in there, first come first.
    pub(super) waiting_to_give: VecDeque<Token>,
    pub(super) give_deadline: u64,
    /// What the master has ordered for the sake of evenness.
    pub(super) spreading: ActiveRebalance,
    pub(super) show_draining: Box<dyn Fn()>,
    /// How this worker leaves, once it has to.
    pub drain: Drain,
    /// How long a drain may take when the master can't say so any more.
    pub drain_timeout: Duration,
    pub(super) listen_deadline: u64,
    /// How often each kind of trouble may be told.
    complaints: [Limiter; WarningKind::KINDS],
    tick_ms: u64,
    next_tick_ms: u64,
    pub(super) is_at_limit: bool,
    /// Connections accepted since it was looked whether they are too many.
    pub(super) accepts: u32,
    pub(super) silent: SilentConnections,
    /// After so many calls the master is told that it is enough.
    pub(super) recycle_at: u64,
    /// When the link to the master has ended, in milliseconds; `None` while it stands. It ends before the
    /// master's children have another parent.
    pub(super) master_gone: Option<u64>,
    /// Whether it begins to accept only once the pool processes of its generation serve: for a start and
    /// a reload, not for a worker that is replaced.
    pub(super) waits_for_pools: bool,
    /// Whether the master was told that it does.
    pub(super) is_accepting: bool,
    /// The master was told that no handler thread comes back.
    pub(super) stuck_reported: bool,
    /// Where it reads which calls they run.
    pub(super) stuck: &'static StuckCalls,
}

impl EventLoop {
    /// A loop that has not turned yet.
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
            spreading: ActiveRebalance::default(),
            show_draining,
            drain: Drain::default(),
            drain_timeout: workers.drain_timeout,
            listen_deadline: 0,
            complaints: array::from_fn(|_| Limiter::rare()),
            tick_ms: TICK_MS.min(millis(workers.heartbeat_timeout) / TICKS_PER_TIMEOUT),
            next_tick_ms: 0,
            is_at_limit: false,
            accepts: 0,
            silent: SilentConnections::default(),
            // A pool process counts the calls of others, and has limits of its own.
            recycle_at: match service.forwarding.lane {
                0 => recycle_threshold(workers.max_calls),
                _ => u64::MAX,
            },
            service,
            master_gone: None,
            waits_for_pools: false,
            is_accepting: false,
            stuck_reported: false,
            stuck,
        }
    }

    /// Tells the master that this worker accepts, as soon as it can, and serves until it is time to
    /// leave.
    ///
    /// # Errors
    /// When the reactor fails, a program of a pool does that has to be there, or the master can't be told.
    pub fn run(&mut self, reactor: &mut Reactor) -> io::Result<()> {
        reactor.watch(SIGNALS, &self.signals, Interest::Read)?;
        reactor.watch(LINK, &self.link, Interest::Read)?;
        reactor.watch(WAKER, &*self.waker, Interest::Read)?;
        self.record_heartbeat();
        self.defer_accepting(reactor);
        let mut is_watched = false;
        loop {
            let was_accepting = self.is_accepting;
            self.start_accepting(reactor)?;
            let mut next = self.next_tick_ms;
            if self.is_accepting != was_accepting {
                // What it has is shown at once: others may wait for that.
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
            self.settle_programs(reactor);
            self.service
                .publish(reactor.connections(), reactor.spurious_wakes);
            self.check_recycle_limits();
            match self.drain.step(
                self.service.now_ms,
                reactor.connections(),
                self.service.calls.is_empty()
                    && self.service.forwarding.is_settled(self.service.now_ms),
                more,
            ) {
                DrainStep::Serve => {}
                DrainStep::ReadOn => {
                    self.resume_reading(reactor);
                    is_watched = true;
                }
                DrainStep::Quieten => self.stop_reading(reactor),
                DrainStep::CloseResting { partial } => self.close_resting(reactor, partial),
                DrainStep::GiveUp => self.give_up_all(reactor),
                DrainStep::Leave => return Ok(()),
            }
        }
    }

    /// Lets the calls of this turn wait for threads and programs.
    pub(super) fn queue_calls(&mut self, reactor: &Reactor) {
        let backlog = |token, place| backlog(&self.connections, reactor, token, place);
        let now_ms = self.service.now_ms;
        self.service.calls.queue_calls(now_ms, backlog);
    }

    /// Sends calls to other workers, and asks the master for links to those that have none.
    fn exchange_calls(&mut self, reactor: &mut Reactor) {
        let is_serving = self.is_accepting && self.drain.is_serving();
        let phase = (is_serving, !self.drain.is_serving());
        while let Some(late) = peer_calls::exchange(&mut self.service, phase) {
            self.reject_late_call(reactor, late);
        }
        for record in self.service.forwarding.take_wanted() {
            // If it cannot be sent, the next search asks again.
            self.request(Report::LinkWanted(record));
        }
        self.service.forwarding.settle(reactor);
    }

    /// Watches the wires of the programs that serve, and of no other.
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
        self.service.now_ms = monotonic_ms();
        self.service
            .record
            .heartbeat_ms
            .store(self.service.now_ms, Relaxed);
    }

    /// Sends a report that a master of an older version would not understand, if this one does.
    pub(super) fn request(&self, body: Report) {
        self.service.record.request(|| {
            let _ = self.report(body);
        });
    }

    /// # Errors
    /// When the message can't be sent, which is logged.
    pub(super) fn report(&self, body: Report) -> io::Result<()> {
        let message = Message {
            pid: Pid::current(),
            generation: self.generation,
            body,
        };
        // A master that is gone is noticed by the link's end.
        match self.link.send(message, None) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                log::warn!("the master could not be told {body:?}: {error}");
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
        self.check_stuck_threads();
        self.leave_without_master(reactor);
        sweep::reap_adopted();
        logging::report_lost_lines();
        let lost = u32::try_from(logging::lost_lines()).unwrap_or(u32::MAX);
        self.service.record.lost_lines.store(lost, Relaxed);
    }

    /// Logs something that clients can cause, at most one line in a while.
    pub(super) fn warn_limited(&mut self, trouble: WarningKind, text: &str) {
        match self.complaints[trouble as usize].admit(self.service.now_ms) {
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
                // It has taken something: the time begins anew.
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
            Completion::Readable { watch: WAKER } => {
                self.waker.clear();
                self.service.threads.pools().hear();
                self.on_results(reactor);
            }
            Completion::Readable { watch } if watch >= LINK_BASE => {
                let is_serving = self.is_accepting && self.drain.is_serving();
                let link = usize::from(watch - LINK_BASE);
                if !peer_calls::receive(&mut self.service, link, is_serving) {
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

/// How many bytes of answers a connection has yet to send before that of a call at `place`.
fn backlog(
    connections: &[Option<Connection>],
    reactor: &Reactor,
    token: Token,
    place: AnswerPosition,
) -> usize {
    let connection = connections.get(token.index()).and_then(Option::as_ref);
    match connection.filter(|connection| connection.token == token) {
        Some(connection) => connection.backlog(place, reactor.unsent(token)),
        None => 0,
    }
}

/// The connection of a token, if it is still there.
pub(super) fn find(
    connections: &mut [Option<Connection>],
    token: Token,
) -> Option<&mut Connection> {
    connections
        .get_mut(token.index())?
        .as_mut()
        .filter(|connection| connection.token == token)
}

/// After how many calls this worker has had enough; 0 is never.
fn recycle_threshold(max_calls: u64) -> u64 {
    match max_calls {
        0 => u64::MAX,
        most => jitter::with_jitter(most, u64::from(Pid::current().0.unsigned_abs())),
    }
}
