//! The event loop of a worker: completions, deadlines and orders in, answers out.
//!
//! It joins the event floor with the connections and the service, and never waits anywhere but in
//! `Floor::turn`. What fails on one connection ends that connection; what fails on the floor
//! itself ends the worker, with the reason in the log.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::connection::{Connection, Phase};
use super::drain::{Drain, Step};
use super::service::{Service, millis};
use super::threads::Done;
use super::timers::{CallKey, Target};
use crate::link::channel::{Received, WorkerEnd};
use crate::link::ids::{Generation, Pid};
use crate::link::message::{Message, Order, Report};
use crate::logging;
use crate::protocol::code::Code;
use crate::protocol::rpc_error::RpcError;
use crate::sys::event::{Completion, Driver, Floor, Token};
use crate::sys::process::monotonic;
use crate::sys::signal::SignalPipe;
use crate::sys::waker::Waker;
use nix::sys::signal::Signal;

/// How long the peer of a connection that we have ended may take to end it too (section 3).
const LINGER_MS: u64 = 2000;
/// Between two tries to accept when the system had no descriptor left.
const LISTEN_RETRY_MS: u64 = 200;
/// Between two lines about the same trouble.
const QUIET_MS: u64 = 10_000;
/// The heartbeat, and the look for connections that a stopped sibling left in the queue.
const TICK_MS: u64 = 1000;

/// At a stop, who has sent something within this time may have an answer unread or a call on its
/// way, and is closed with the same care as after an error.
const ACTIVE_MS: u64 = 1000;

/// The numbers under which descriptors other than connections are watched.
const SIGNALS: u16 = 0;
const LINK: u16 = 1;
const WAKER: u16 = 2;

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
    /// How this worker leaves, once it has to.
    pub drain: Drain,
    /// How long a drain may take when the master can't say so any more.
    pub drain_timeout: Duration,
    listen_deadline: u64,
    quiet_until_ms: u64,
    next_tick_ms: u64,
    full: bool,
}

impl EventLoop {
    /// A loop that has not turned yet.
    pub fn new(
        service: Service,
        (link, signals, waker): (WorkerEnd, SignalPipe, Arc<Waker>),
        generation: Generation,
        drain_timeout: Duration,
    ) -> Self {
        EventLoop {
            service,
            connections: Vec::new(),
            link,
            signals,
            waker,
            generation,
            drain: Drain::default(),
            drain_timeout,
            listen_deadline: 0,
            quiet_until_ms: 0,
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
            floor.turn(wait.saturating_sub(self.service.now_ms), self)?;
            self.expire(floor);
            if self.service.now_ms >= self.next_tick_ms {
                self.tick(floor);
            }
            self.service.calls.hand_out(&self.service.threads);
            self.publish(floor);
            match self.drain.step(
                self.service.now_ms,
                floor.connections(),
                self.service.calls.is_empty(),
            ) {
                Step::Serve => {}
                Step::CloseResting { partial } => self.close_resting(floor, partial),
                Step::GiveUp => self.give_up_all(floor),
                Step::Leave => return Ok(()),
            }
        }
    }

    fn beat(&mut self) {
        self.service.now_ms = millis(monotonic());
        self.service
            .record
            .heartbeat_ms
            .store(self.service.now_ms, Relaxed);
    }

    fn report(&self, body: Report) {
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
        self.next_tick_ms = self.service.now_ms + TICK_MS;
        if floor.is_listening() {
            floor.try_accept(self);
        }
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

    fn accepted(&mut self, floor: &mut Floor, socket: OwnedFd) {
        let token = match floor.adopt(socket) {
            Ok(token) => token,
            Err(error) => return self.complain(&format!("a connection was not taken: {error}")),
        };
        let mut connection = Connection::new(token, self.service.now_ms);
        let idle_ms = millis(self.service.limits.idle_timeout);
        if idle_ms > 0 {
            let at = self.service.now_ms + idle_ms;
            let target = Target::Idle(token);
            self.service
                .timers
                .arm(&mut connection.quiet_deadline, at, target);
        }
        if self.connections.len() <= token.index() {
            self.connections.resize_with(token.index() + 1, || None);
        }
        self.connections[token.index()] = Some(connection);
        if floor.connections() >= self.service.limits.connections {
            floor.pause_listeners();
            if !self.full {
                self.full = true;
                log::warn!(
                    "{} connections are open, as many as limits.connections allows: nothing more \
                     is accepted here until one ends",
                    floor.connections()
                );
            }
        }
    }

    fn received(&mut self, floor: &mut Floor, token: Token, bytes: &[u8]) {
        let unsent = floor.unsent(token);
        let Some(connection) = find(&mut self.connections, token) else {
            return;
        };
        if connection.phase != Phase::Open {
            return;
        }
        connection.active_ms = self.service.now_ms;
        let mut whole = true;
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
    fn advance(&mut self, floor: &mut Floor, token: Token, mut whole: bool) {
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
            if used == 0 {
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
    fn close(&mut self, floor: &mut Floor, token: Token) {
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

    fn expire(&mut self, floor: &mut Floor) {
        while let Some(target) = self.service.timers.expired(self.service.now_ms) {
            match target {
                Target::Read(token) => {
                    self.complain("a client did not finish its frame within limits.read-timeout");
                    self.forget(token, |connection| connection.read_deadline = 0);
                    self.close(floor, token);
                }
                Target::Write(token) => {
                    self.complain("a client took none of its answers within limits.write-timeout");
                    self.forget(token, |connection| connection.write_deadline = 0);
                    self.close(floor, token);
                }
                Target::Idle(token) => self.idle(floor, token),
                Target::Linger(token) => {
                    self.forget(token, |connection| connection.quiet_deadline = 0);
                    self.close(floor, token);
                }
                Target::Call(key) => self.time_out(floor, key),
                Target::Listen => {
                    self.listen_deadline = 0;
                    self.resume_listening(floor);
                }
            }
        }
    }

    /// A deadline that has passed is not armed any more.
    fn forget(&mut self, token: Token, clear: impl FnOnce(&mut Connection)) {
        if let Some(connection) = find(&mut self.connections, token) {
            clear(connection);
        }
    }

    fn idle(&mut self, floor: &mut Floor, token: Token) {
        let Some(connection) = find(&mut self.connections, token) else {
            return;
        };
        connection.quiet_deadline = 0;
        let since = if connection.is_at_rest() {
            connection.active_ms
        } else {
            self.service.now_ms
        };
        let at = since + millis(self.service.limits.idle_timeout);
        if at > self.service.now_ms {
            // Armed once and looked at when it is due: a busy connection pays nothing for it.
            let armed = &mut connection.quiet_deadline;
            return self.service.timers.arm(armed, at, Target::Idle(token));
        }
        connection.phase = Phase::Closing;
        self.advance(floor, token, false);
    }

    fn time_out(&mut self, floor: &mut Floor, key: CallKey) {
        if let Some(call) = self.service.calls.get_mut(key) {
            call.timer = 0;
        }
        let text = "its time was over before it was done";
        self.end_call(floor, key, Code::Timeout, text);
    }

    /// Answers a call with an error, whether it waits or runs.
    fn end_call(&mut self, floor: &mut Floor, key: CallKey, code: Code, text: &str) {
        let Some(ended) = self.service.give_up(key) else {
            return;
        };
        if let Some(connection) = find(&mut self.connections, ended.token) {
            let error = RpcError::of(code, text, ended.begun);
            self.service.answer(connection, &ended, Err(error));
            self.advance(floor, ended.token, false);
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

    fn accept_failed(&mut self, error: &io::Error) {
        self.complain(&format!(
            "no connection can be accepted: {error}; those that are open are served, the others \
             wait; raise the limit of open files, or lower limits.connections"
        ));
        let at = self.service.now_ms + LISTEN_RETRY_MS;
        self.service
            .timers
            .arm(&mut self.listen_deadline, at, Target::Listen);
    }

    fn resume_listening(&mut self, floor: &mut Floor) {
        if self.full || !self.drain.is_serving() {
            return;
        }
        if let Err(error) = floor.resume_listeners() {
            self.accept_failed(&error);
        }
    }

    fn orders(&mut self, floor: &mut Floor) {
        loop {
            match self.link.receive() {
                Received::Message(message, descriptor) => match message.body {
                    Order::Drain(limit) => self.start_drain(floor, limit),
                    Order::Stop(limit) => self.start_stop(floor, limit),
                    Order::Quit => self.drain.leave_now(),
                    Order::Log => {
                        if let Some(descriptor) = descriptor {
                            logging::set_output(logging::Output::received(descriptor));
                        }
                    }
                },
                Received::Garbage => log::warn!("the master sent something that is no order"),
                Received::Empty => return,
                Received::End => {
                    floor.unwatch(LINK);
                    log::error!(
                        "the master has died: this worker accepts nothing more, answers what runs \
                         and leaves; start a new master"
                    );
                    return self.start_stop(floor, self.drain_timeout);
                }
            }
        }
    }

    fn heard(&mut self, floor: &mut Floor) {
        for signal in self.signals.take() {
            match signal {
                Signal::SIGQUIT => self.drain.leave_now(),
                _ if self.drain.is_serving() => {
                    log::info!("retires: asked by SIGTERM");
                    self.report(Report::Retiring);
                    self.start_drain(floor, self.drain_timeout);
                }
                // The master's last word to one that drains, or an impatient operator's.
                _ => self.drain.hurry(self.service.now_ms),
            }
        }
    }

    fn start_drain(&mut self, floor: &mut Floor, limit: Duration) {
        floor.close_listeners();
        self.drain
            .drain(self.service.now_ms.saturating_add(millis(limit)));
    }

    fn start_stop(&mut self, floor: &mut Floor, limit: Duration) {
        // Who is in the queue has connected and may have sent a call already: closing the last
        // listener would reset those.
        let mut before = usize::MAX;
        while floor.is_listening() && floor.connections() != before {
            before = floor.connections();
            floor.try_accept(self);
        }
        floor.close_listeners();
        self.service.stopping = true;
        self.drain
            .stop(self.service.now_ms.saturating_add(millis(limit)));
    }

    fn close_resting(&mut self, floor: &mut Floor, partial: bool) {
        let resting: Vec<(Token, u64)> = self
            .connections
            .iter()
            .flatten()
            .filter(|connection| connection.phase == Phase::Open)
            .filter(|connection| connection.is_at_rest() || (partial && connection.unanswered == 0))
            .filter(|connection| floor.unsent(connection.token) == 0)
            .map(|connection| (connection.token, connection.active_ms))
            .collect();
        for (token, active_ms) in resting {
            if self.service.now_ms.saturating_sub(active_ms) > ACTIVE_MS {
                self.close(floor, token);
            } else {
                self.forget(token, |connection| connection.phase = Phase::Closing);
                self.advance(floor, token, false);
            }
        }
    }

    /// The drain's time is over: who still waits gets an answer, as far as it can be sent.
    fn give_up_all(&mut self, floor: &mut Floor) {
        let left: Vec<CallKey> = self.service.calls.of(|_| true).collect();
        if !left.is_empty() {
            log::warn!(
                "{} calls were not done within workers.drain-timeout: they are answered with \
                 stopping",
                left.len()
            );
        }
        for key in left {
            self.end_call(
                floor,
                key,
                Code::Stopping,
                "the server stops and could not wait longer",
            );
        }
        self.close_resting(floor, true);
    }

    /// Logs something that clients can cause, at most one line in a while.
    fn complain(&mut self, text: &str) {
        if self.service.now_ms < self.quiet_until_ms {
            return log::debug!("{text}");
        }
        self.quiet_until_ms = self.service.now_ms + QUIET_MS;
        log::warn!("{text}");
    }
}

impl Driver for EventLoop {
    fn woken(&mut self) {
        self.beat();
    }

    fn complete(&mut self, floor: &mut Floor, completion: Completion<'_>) {
        match completion {
            Completion::Accepted { socket } => self.accepted(floor, socket),
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
            Completion::Readable { .. } => self.collect(floor),
        }
    }
}

/// The connection of a token, if it is still there.
fn find(connections: &mut [Option<Connection>], token: Token) -> Option<&mut Connection> {
    connections
        .get_mut(token.index())?
        .as_mut()
        .filter(|connection| connection.token == token)
}
