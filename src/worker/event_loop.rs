//! The event loop of a worker: completions, deadlines and orders in, answers out.
//!
//! It joins the event floor with the connections and the service, and never waits anywhere but in
//! `Floor::turn`. What fails on one connection ends that connection; what fails on the floor
//! itself ends the worker, with the reason in the log.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::connection::{Connection, HIGH_WATER, Phase};
use super::drain::{Drain, Step};
use super::service::{Service, millis};
use super::threads::Done;
use super::timers::{CallKey, Target};
use crate::config::Workers;
use crate::handler::command::sweep;
use crate::link::channel::WorkerEnd;
use crate::link::handoff::AdoptionQueue;
use crate::link::ids::{Generation, Pid};
use crate::link::message::{Message, Report};
use crate::sys::event::{Completion, Driver, Floor, Token};
use crate::sys::process::monotonic;
use crate::sys::signal::SignalPipe;
use crate::sys::waker::Waker;

/// How long the peer of a connection that we have ended may take to end it too (section 3).
const LINGER_MS: u64 = 2000;
/// Between two tries to accept when the system had no descriptor left.
pub(super) const LISTEN_RETRY_MS: u64 = 200;
/// Between two lines about the same trouble.
const QUIET_MS: u64 = 10_000;
/// The heartbeat, and the look for connections that a stopped sibling left in the queue: at most
/// so far apart, and at least four in the time after which the master takes the loop for stuck.
const TICK_MS: u64 = 1000;
const TICKS_PER_TIMEOUT: u64 = 4;

/// At a stop, who has sent something within this time may have an answer unread or a call on its
/// way, and is closed with the same care as after an error.
pub(super) const ACTIVE_MS: u64 = 1000;

/// The numbers under which descriptors other than connections are watched.
const SIGNALS: u16 = 0;
pub(super) const LINK: u16 = 1;
const WAKER: u16 = 2;
pub(super) const QUEUE: u16 = 3;

/// Trouble that clients can cause: each kind is told at most once in a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trouble {
    /// Nobody can be let in.
    Accepting,
    /// As many are in as may be.
    Full,
    /// A client sends too slowly.
    Reading,
    /// A client takes its answers too slowly.
    Writing,
}

impl Trouble {
    const KINDS: usize = 4;
}

/// A worker at work.
pub struct EventLoop {
    /// What answers calls.
    pub service: Service,
    /// By `Token::index`.
    pub connections: Vec<Option<Connection>>,
    /// The way to the master.
    pub link: WorkerEnd,
    /// TERM and QUIT.
    pub signals: SignalPipe,
    /// Woken by handler threads.
    pub waker: Arc<Waker>,
    /// Which generation this worker is of.
    pub generation: Generation,
    /// Where connections pass between siblings.
    pub adoption: AdoptionQueue,
    /// Connections at rest that wait for room in there, first come first.
    pub(super) waiting_to_give: VecDeque<Token>,
    pub(super) give_deadline: u64,
    /// Shows that this worker drains.
    pub(super) show_draining: Box<dyn Fn()>,
    /// How this worker leaves, once it has to.
    pub drain: Drain,
    /// How long a drain may take when the master can't say so any more.
    pub drain_timeout: Duration,
    pub(super) listen_deadline: u64,
    /// Until when each kind of trouble was told often enough.
    quiet_until_ms: [u64; Trouble::KINDS],
    tick_ms: u64,
    next_tick_ms: u64,
    pub(super) full: bool,
}

impl EventLoop {
    /// A loop that has not turned yet.
    pub fn new(
        service: Service,
        (link, signals, waker): (WorkerEnd, SignalPipe, Arc<Waker>),
        adoption: AdoptionQueue,
        show_draining: Box<dyn Fn()>,
        generation: Generation,
        workers: &Workers,
    ) -> Self {
        EventLoop {
            service,
            connections: Vec::new(),
            link,
            signals,
            waker,
            generation,
            adoption,
            waiting_to_give: VecDeque::new(),
            give_deadline: 0,
            show_draining,
            drain: Drain::default(),
            drain_timeout: workers.drain_timeout,
            listen_deadline: 0,
            quiet_until_ms: [0; Trouble::KINDS],
            tick_ms: TICK_MS.min(millis(workers.heartbeat_timeout) / TICKS_PER_TIMEOUT),
            next_tick_ms: 0,
            full: false,
        }
    }

    /// Tells the master that this worker accepts, and serves until it is time to leave.
    ///
    /// # Errors
    /// When the floor fails.
    pub fn run(&mut self, floor: &mut Floor) -> io::Result<()> {
        floor.watch(SIGNALS, &self.signals)?;
        floor.watch(LINK, &self.link)?;
        floor.watch(WAKER, &*self.waker)?;
        self.beat();
        self.report(Report::Ready);
        loop {
            let next = self
                .service
                .timers
                .next()
                .unwrap_or(u64::MAX)
                .min(self.next_tick_ms);
            let wait = match self.drain.next() {
                Some(at) => next.min(at),
                None => next,
            };
            let more = floor.turn(wait.saturating_sub(self.service.now_ms), self)?;
            self.expire(floor);
            if self.service.now_ms >= self.next_tick_ms {
                self.tick(floor);
            }
            self.hand_out(floor);
            self.publish(floor);
            match self.drain.step(
                self.service.now_ms,
                floor.connections(),
                self.service.calls.is_empty(),
                more,
            ) {
                Step::Serve => {}
                Step::Quieten => self.quieten(floor),
                Step::CloseResting { partial } => self.close_resting(floor, partial),
                Step::GiveUp => self.give_up_all(floor),
                Step::Leave => return Ok(()),
            }
        }
    }

    fn hand_out(&mut self, floor: &Floor) {
        let connections = &self.connections;
        let backlog = |token: Token, place| {
            let connection = connections.get(token.index()).and_then(Option::as_ref);
            match connection.filter(|connection| connection.token == token) {
                Some(connection) => connection.backlog(place, floor.unsent(token)),
                None => 0,
            }
        };
        let service = &mut self.service;
        service.calls.hand_out(&service.threads, backlog);
    }

    fn beat(&mut self) {
        self.service.now_ms = millis(monotonic());
        self.service
            .record
            .heartbeat_ms
            .store(self.service.now_ms, Relaxed);
    }

    pub(super) fn report(&self, body: Report) {
        let message = Message {
            pid: Pid::current(),
            generation: self.generation,
            body,
        };
        // A master that is gone is noticed by the link's end.
        if let Err(error) = self.link.send(message, None) {
            log::warn!("the master could not be told {body:?}: {error}");
        }
    }

    fn tick(&mut self, floor: &mut Floor) {
        self.next_tick_ms = self.service.now_ms + self.tick_ms;
        if self.listen_deadline == 0 {
            self.resume_listening(floor);
        }
        floor.try_accept(self);
        sweep::tidy();
    }

    fn publish(&self, floor: &Floor) {
        let record = self.service.record;
        let (running, queued, lost) = self.service.calls.counts(self.service.threads.count());
        record
            .connections
            .store(floor.connections() as u32, Relaxed);
        record.running.store(running as u32, Relaxed);
        record.queued.store(queued as u32, Relaxed);
        record.lost_threads.store(lost as u32, Relaxed);
        record.calls.store(self.service.read, Relaxed);
        record.errors.store(self.service.errors, Relaxed);
        record
            .spurious_wakes
            .store(floor.spurious_wakes as u32, Relaxed);
        let (method, since) = match self.service.calls.oldest() {
            Some((method, since)) => (method as u32 + 1, since),
            None => (0, 0),
        };
        record.oldest_since_ms.store(since, Relaxed);
        record.oldest_method.store(method, Relaxed);
    }

    pub(super) fn received(&mut self, floor: &mut Floor, token: Token, bytes: &[u8]) {
        let unsent = floor.unsent(token);
        let Some(connection) = find(&mut self.connections, token) else {
            return;
        };
        if connection.phase != Phase::Open {
            return;
        }
        connection.active_ms = self.service.now_ms;
        let mut whole = false;
        if connection.tail.is_empty() {
            let used = self.service.consume(connection, bytes, unsent);
            connection.keep(&bytes[used..]);
            whole = used > 0;
        } else {
            connection.keep(bytes);
        }
        self.advance(floor, token, whole);
    }

    /// Sends what was answered, takes what may be taken now, and sets what follows from it:
    /// reading, deadlines, the end. `whole` tells that a frame was taken just before.
    pub(super) fn advance(&mut self, floor: &mut Floor, token: Token, mut whole: bool) {
        let Some(connection) = find(&mut self.connections, token) else {
            return self.service.out.clear();
        };
        let service = &mut self.service;
        let pipeline = service.limits.pipeline;
        loop {
            floor.send(token, &mut service.out);
            let unsent = floor.unsent(token);
            if connection.tail.is_empty() || !connection.takes_calls(pipeline, unsent) {
                break;
            }
            let mut tail = connection.take_tail();
            let used = service.consume(connection, &tail, unsent);
            std::mem::swap(&mut connection.tail, &mut tail);
            connection.consume(used);
            whole |= used > 0;
            if used == 0 && service.out.is_empty() {
                break;
            }
        }
        if connection.phase != Phase::Open {
            connection.tail = Vec::new();
        }
        let unsent = floor.unsent(token);
        connection.blocked =
            connection.phase == Phase::Open && !connection.takes_calls(pipeline, unsent);
        floor.set_reading(token, !connection.blocked);
        if service.calls.are_parked() && (unsent < HIGH_WATER || connection.holds()) {
            service.calls.unpark(token);
        }
        if service.out.capacity() > 4 * HIGH_WATER {
            // One large answer need not keep its room for as long as the worker lives.
            service.out = Vec::new();
        }
        let now = service.now_ms;
        if connection.tail.is_empty() || connection.blocked || connection.ended {
            // While we hold the peer back, the time it takes is ours.
            service
                .timers
                .disarm(&mut connection.read_deadline, Target::Read(token));
        } else if whole || connection.read_deadline == 0 {
            let at = now + millis(service.limits.read_timeout);
            service
                .timers
                .arm(&mut connection.read_deadline, at, Target::Read(token));
        }
        if unsent == 0 {
            service
                .timers
                .disarm(&mut connection.write_deadline, Target::Write(token));
        } else if connection.write_deadline == 0 {
            let at = now + millis(service.limits.write_timeout);
            service
                .timers
                .arm(&mut connection.write_deadline, at, Target::Write(token));
        }
        if connection.unanswered == 0 && unsent == 0 {
            self.settle(floor, token);
        }
    }

    /// Everything read is answered and sent: ends the connection if it is to end.
    fn settle(&mut self, floor: &mut Floor, token: Token) {
        let Some(connection) = find(&mut self.connections, token) else {
            return;
        };
        let open = connection.phase == Phase::Open;
        // A tail that could not be taken any more may hold calls: whoever adopts it answers them.
        if open && self.drain.hands_over() && !(connection.ended && connection.tail.is_empty()) {
            return self.give(floor, token);
        }
        if connection.ended && connection.phase != Phase::Lingering {
            if !connection.tail.is_empty() {
                log::debug!("a client ended in the middle of a frame");
            }
            return self.close(floor, token);
        }
        if connection.phase == Phase::Closing {
            // Closing at once would reset the connection if something more arrived, and a reset
            // takes along the answer that the client has not read yet.
            connection.phase = Phase::Lingering;
            floor.shutdown(token);
            let at = self.service.now_ms + LINGER_MS;
            let armed = &mut connection.quiet_deadline;
            self.service.timers.disarm(armed, Target::Idle(token));
            self.service.timers.arm(armed, at, Target::Linger(token));
        }
    }

    fn ended(&mut self, floor: &mut Floor, token: Token) {
        let Some(connection) = find(&mut self.connections, token) else {
            return;
        };
        connection.ended = true;
        if connection.phase == Phase::Lingering {
            return self.close(floor, token);
        }
        self.advance(floor, token, false);
    }

    /// Closes a connection; whatever its calls answer is for nobody.
    pub(super) fn close(&mut self, floor: &mut Floor, token: Token) {
        let Some(slot) = self.connections.get_mut(token.index()) else {
            return;
        };
        let Some(mut connection) = slot.take_if(|connection| connection.token == token) else {
            return;
        };
        let timers = &mut self.service.timers;
        timers.disarm(&mut connection.read_deadline, Target::Read(token));
        timers.disarm(&mut connection.write_deadline, Target::Write(token));
        let target = match connection.phase {
            Phase::Lingering => Target::Linger(token),
            _ => Target::Idle(token),
        };
        timers.disarm(&mut connection.quiet_deadline, target);
        floor.close(token);
        self.service.calls.unpark(token);
        if connection.unanswered > 0 {
            let left: Vec<CallKey> = self.service.calls.of(|call| call.token == token).collect();
            for key in left {
                self.service.give_up(key);
            }
        }
        if self.full && floor.connections() < self.service.limits.connections {
            self.full = false;
            self.resume_listening(floor);
        }
    }

    /// Answers what the threads have done: one write for each connection.
    fn collect(&mut self, floor: &mut Floor) {
        self.waker.clear();
        let mut done: Vec<_> = self
            .service
            .threads
            .take_done()
            .collect::<Vec<Done>>()
            .into_iter()
            .filter_map(|done| {
                let mut ended = self.service.calls.done(&done)?;
                let target = Target::Call(done.key);
                self.service.timers.disarm(&mut ended.timer, target);
                Some((ended, done.outcome?))
            })
            .collect();
        // Stable: answers of one connection stay in the order in which they were done.
        done.sort_by_key(|(ended, _)| ended.token);
        let mut done = done.into_iter().peekable();
        while let Some((ended, outcome)) = done.next() {
            let token = ended.token;
            if let Some(connection) = find(&mut self.connections, token) {
                self.service.answer(connection, &ended, outcome);
            }
            if done.peek().is_none_or(|(next, _)| next.token != token) {
                self.advance(floor, token, false);
            }
        }
    }

    /// Logs something that clients can cause, at most one line in a while.
    pub(super) fn complain(&mut self, trouble: Trouble, text: &str) {
        let quiet_until_ms = &mut self.quiet_until_ms[trouble as usize];
        if self.service.now_ms < *quiet_until_ms {
            return log::debug!("{text}");
        }
        *quiet_until_ms = self.service.now_ms + QUIET_MS;
        log::warn!("{text}");
    }
}

impl Driver for EventLoop {
    fn woken(&mut self) {
        self.beat();
    }

    fn complete(&mut self, floor: &mut Floor, completion: Completion<'_>) {
        match completion {
            Completion::Accepted { socket } => drop(self.accepted(floor, socket)),
            Completion::Adopted {
                socket,
                packet,
                rest,
            } => self.adopted(floor, socket, &packet, rest),
            Completion::AcceptFailed { error } => self.accept_failed(&error),
            Completion::Received { token, bytes } => self.received(floor, token, bytes),
            Completion::Ended { token } => self.ended(floor, token),
            Completion::Sent { token } => {
                // It has taken something: the time begins anew.
                let armed = find(&mut self.connections, token).map(|c| &mut c.write_deadline);
                if let Some(armed) = armed {
                    self.service.timers.disarm(armed, Target::Write(token));
                }
                self.advance(floor, token, false);
            }
            Completion::Failed { token, error } => {
                log::debug!("a connection broke: {error}");
                self.close(floor, token);
            }
            Completion::Readable { watch: SIGNALS } => self.heard(floor),
            Completion::Readable { watch: LINK } => self.orders(floor),
            Completion::Readable { watch: QUEUE } => self.give_waiting(floor),
            Completion::Readable { .. } => self.collect(floor),
        }
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
