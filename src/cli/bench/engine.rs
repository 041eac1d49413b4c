//! Runs the load of one thread: its connections, in an event loop.
//!
//! The load must not be the bottleneck. A call needs one send, one receive and a share of one wait. Calls
//! that are due together are sent together. Calls have no ids, so answers come in their order. If a
//! connection fails or times out, its calls have failed and it is opened again. The load ends early only if
//! the server stays away.

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::dialect::{CallEncoder, ParsedAnswer};
use super::pace::{Interval, nanoseconds};
use super::totals::BenchTotals;
use crate::client::connect_nonblocking;
use crate::error::{Error, Result};
use crate::sys::event::{Completion, Driver, Interest, Reactor, Token};
use crate::sys::timer::Timer;

/// How often it checks for timeouts, lost connections and the interrupt.
const TICK: Duration = Duration::from_millis(100);
/// How long it continues without a connection.
const WITHOUT_SERVER: Duration = Duration::from_secs(5);
/// The event number of the timer.
const TIMER: u16 = 0;

/// The share of the load of one thread.
#[derive(Debug, Clone)]
pub(super) struct LoadShare {
    pub(super) connections: u64,
    /// The largest number of unanswered calls of a connection.
    pub(super) depth: usize,
    pub(super) count: Option<u64>,
    pub(super) duration: Option<Duration>,
    /// `Some` in an open loop.
    pub(super) interval: Option<Interval>,
    pub(super) timeout: Duration,
    /// The index of its first params.
    pub(super) first: u64,
}

pub(super) struct BenchEngine {
    reactor: Reactor,
    timer: Timer,
    load: Load,
    interrupted: Arc<AtomicBool>,
}

impl BenchEngine {
    /// Opens the connections of a share.
    pub(super) fn connect(
        address: &str,
        share: LoadShare,
        calls: Arc<CallEncoder>,
        interrupted: Arc<AtomicBool>,
    ) -> Result<Self> {
        let system = |error: io::Error| Error::system("create an event loop for the load", error);
        let mut reactor = Reactor::new().map_err(system)?;
        let timer = Timer::new().map_err(system)?;
        reactor
            .watch(TIMER, &timer, Interest::Read)
            .map_err(system)?;
        let mut load = Load {
            address: address.to_owned(),
            end: share.duration.map(nanoseconds),
            share,
            calls,
            begin: Instant::now(),
            now: 0,
            connections: Vec::new(),
            free: VecDeque::new(),
            outstanding: 0,
            missing: 0,
            stopped: false,
            outbox: Vec::new(),
            tally: BenchTotals::new()?,
        };
        for _ in 0..load.share.connections {
            load.connect(&mut reactor)?;
        }
        Ok(BenchEngine {
            reactor,
            timer,
            load,
            interrupted,
        })
    }

    /// Runs the load from `begin` until all calls are answered or have failed. Returns what was counted,
    /// and why it ended early, if it did.
    pub(super) fn run(self, begin: Instant) -> Result<(BenchTotals, Option<Error>)> {
        let BenchEngine {
            mut reactor,
            timer,
            mut load,
            interrupted,
        } = self;
        let (reactor, load) = (&mut reactor, &mut load);
        load.begin = begin;
        load.look();
        if load.share.interval.is_none() {
            load.fill_all(reactor);
        }
        let mut ticked = Instant::now();
        let mut served = Instant::now();
        let mut gone = None;
        loop {
            load.look();
            load.send_due(reactor);
            if load.is_over() && load.outstanding == 0 {
                break;
            }
            let wait = match load.next_due() {
                Some(due) if due <= load.now => Duration::ZERO,
                Some(due) => {
                    let wait = Duration::from_nanos(due - load.now);
                    timer.set(wait).map_err(failed)?;
                    TICK
                }
                None => TICK,
            };
            reactor
                .poll_once(wait.as_millis() as u64, load)
                .map_err(failed)?;
            if load.share.interval.is_some() {
                timer.clear().map_err(failed)?;
            }
            if ticked.elapsed() >= TICK {
                ticked = Instant::now();
                load.stopped |= interrupted.load(Ordering::SeqCst);
                let outcome = load.tick(reactor);
                if reactor.connections() > 0 {
                    served = ticked;
                } else if served.elapsed() >= WITHOUT_SERVER
                    && let Err(error) = outcome
                {
                    gone = Some(error);
                    load.end = Some(load.now);
                }
            }
        }
        Ok((load.finish(), gone))
    }
}

fn failed(error: io::Error) -> Error {
    Error::system("wait for answers", error)
}

struct Connection {
    token: Token,
    /// When each unanswered call was due and when it was sent, oldest first.
    unanswered: VecDeque<(u64, u64)>,
    /// An incomplete answer.
    inbox: Vec<u8>,
    /// Whether an answer has come on it.
    answered: bool,
}

/// The state of the load, without the reactor. Times are in nanoseconds since the beginning.
struct Load {
    address: String,
    share: LoadShare,
    calls: Arc<CallEncoder>,
    begin: Instant,
    now: u64,
    /// When the last call begins.
    end: Option<u64>,
    /// By the indices of tokens.
    connections: Vec<Option<Connection>>,
    /// In an open loop, a token for each call that a connection has room for. Some belong to connections
    /// that are gone.
    free: VecDeque<Token>,
    /// The unanswered calls of all connections.
    outstanding: usize,
    /// The number of connections to open again.
    missing: u64,
    stopped: bool,
    /// Kept for its capacity.
    outbox: Vec<u8>,
    tally: BenchTotals,
}

impl Load {
    fn look(&mut self) {
        self.now = nanoseconds(self.begin.elapsed());
    }

    fn connect(&mut self, reactor: &mut Reactor) -> Result<()> {
        let socket = connect_nonblocking(&self.address, Some(self.share.timeout))?;
        let token = reactor
            .register(socket)
            .map_err(|error| Error::system("watch a connection", error))?;
        let index = token.index();
        if self.connections.len() <= index {
            self.connections.resize_with(index + 1, || None);
        }
        self.connections[index] = Some(Connection {
            token,
            unanswered: VecDeque::with_capacity(self.share.depth),
            inbox: Vec::new(),
            answered: false,
        });
        if self.share.interval.is_some() {
            self.free.extend((0..self.share.depth).map(|_| token));
        }
        Ok(())
    }

    /// Returns whether no call is begun any more.
    fn is_over(&self) -> bool {
        self.stopped
            || self
                .share
                .count
                .is_some_and(|count| self.tally.sent >= count)
            || self.end.is_some_and(|end| self.now >= end)
            || match (self.share.interval, self.end) {
                (Some(interval), Some(end)) => interval.due(self.tally.sent) >= end,
                _ => false,
            }
    }

    /// Returns when the next call is due that can be sent.
    fn next_due(&self) -> Option<u64> {
        let interval = self.share.interval?;
        (!self.is_over() && !self.free.is_empty()).then(|| interval.due(self.tally.sent))
    }

    /// Sends what is due in an open loop.
    fn send_due(&mut self, reactor: &mut Reactor) {
        while let Some(due) = self.next_due()
            && due <= self.now
        {
            let Some(token) = self.free.pop_front() else {
                return;
            };
            if self.connection(token).is_some() {
                self.send(reactor, token, 1, due);
            }
        }
    }

    /// Fills every connection with calls in a closed loop.
    fn fill_all(&mut self, reactor: &mut Reactor) {
        for index in 0..self.connections.len() {
            if let Some(connection) = &self.connections[index] {
                let token = connection.token;
                let room = self.share.depth - connection.unanswered.len();
                self.send(reactor, token, room, self.now);
            }
        }
    }

    /// Sends a number of calls at once, or as many as are left.
    fn send(&mut self, reactor: &mut Reactor, token: Token, calls: usize, due: u64) {
        let Some(connection) = connection(&mut self.connections, token) else {
            return;
        };
        let left = match self.share.count {
            Some(count) => usize::try_from(count - self.tally.sent).unwrap_or(usize::MAX),
            None => usize::MAX,
        };
        let calls = calls.min(left);
        for _ in 0..calls {
            let number = self.share.first.wrapping_add(self.tally.sent);
            self.outbox.extend_from_slice(self.calls.call(number));
            connection.unanswered.push_back((due, self.now));
            self.tally.sent += 1;
        }
        self.outstanding += calls;
        reactor.send(token, &mut self.outbox);
    }

    fn connection(&mut self, token: Token) -> Option<&mut Connection> {
        connection(&mut self.connections, token)
    }

    fn received(&mut self, reactor: &mut Reactor, token: Token, bytes: &[u8]) {
        self.look();
        let Some(connection) = connection(&mut self.connections, token) else {
            return;
        };
        let mut held = mem::take(&mut connection.inbox);
        let bytes = if held.is_empty() {
            bytes
        } else {
            held.extend_from_slice(bytes);
            &held
        };
        let (mut used, mut answered) = (0, 0);
        let fault = loop {
            let (length, error) = match self.calls.read(&bytes[used..]) {
                ParsedAnswer::Result { used } => (used, None),
                ParsedAnswer::Error { used, name } => (used, Some(name)),
                ParsedAnswer::Partial => break None,
                ParsedAnswer::Alien => break Some("not an answer"),
            };
            used += length;
            let Some((due, _)) = connection.unanswered.pop_front() else {
                break Some("an answer to no call");
            };
            match error {
                None => self.tally.ok += 1,
                Some(name) => self.tally.error(name),
            }
            let latency = self.now.saturating_sub(due);
            self.tally.latencies.saturating_record(latency);
            answered += 1;
        };
        connection.answered |= answered > 0;
        if used < bytes.len() && fault.is_none() {
            connection.inbox.extend_from_slice(&bytes[used..]);
        }
        self.outstanding -= answered;
        self.tally.elapsed = self.now;
        if let Some(reason) = fault {
            return self.lose(reactor, token, reason);
        }
        if self.share.interval.is_some() {
            self.free.extend((0..answered).map(|_| token));
            self.send_due(reactor);
        } else if answered > 0 && !self.is_over() {
            self.send(reactor, token, answered, self.now);
        }
    }

    /// Closes a connection that cannot be used any more.
    fn lose(&mut self, reactor: &mut Reactor, token: Token, reason: &'static str) {
        reactor.close(token);
        let Some(connection) = self
            .connections
            .get_mut(token.index())
            .and_then(Option::take)
        else {
            return;
        };
        self.outstanding -= connection.unanswered.len();
        self.tally.lose(reason, connection.unanswered.len());
        self.missing += 1;
        // If the server closes a connection without an answer, opening it at once would loop. The next tick opens it.
        if connection.answered && !self.is_over() {
            let _ = self.reconnect(reactor);
        }
    }

    /// Opens the missing connections again. In a closed loop they begin to call.
    fn reconnect(&mut self, reactor: &mut Reactor) -> Result<()> {
        while self.missing > 0 {
            self.connect(reactor)?;
            self.missing -= 1;
            self.tally.reconnects += 1;
        }
        if self.share.interval.is_none() {
            self.fill_all(reactor);
        }
        Ok(())
    }

    /// Handles timeouts, and opens lost connections again.
    fn tick(&mut self, reactor: &mut Reactor) -> Result<()> {
        self.look();
        let timeout = nanoseconds(self.share.timeout);
        let late: Vec<Token> = self
            .connections
            .iter()
            .flatten()
            .filter(|connection| {
                let oldest = connection.unanswered.front();
                oldest.is_some_and(|(_, sent)| self.now.saturating_sub(*sent) >= timeout)
            })
            .map(|connection| connection.token)
            .collect();
        for token in late {
            self.lose(reactor, token, "no answer in time");
        }
        if self.is_over() {
            return Ok(());
        }
        self.reconnect(reactor)
    }

    /// Returns the counts, with calls that were due and never sent.
    fn finish(&mut self) -> BenchTotals {
        if let (Some(interval), false) = (self.share.interval, self.stopped)
            && let Some(end) = self.end
        {
            let most = self.share.count.unwrap_or(u64::MAX);
            let unsent = interval
                .due_before(end)
                .min(most)
                .saturating_sub(self.tally.sent);
            self.tally.not_sent = self.tally.not_sent.max(unsent);
        }
        self.tally.clone()
    }
}

fn connection(connections: &mut [Option<Connection>], token: Token) -> Option<&mut Connection> {
    connections
        .get_mut(token.index())?
        .as_mut()
        .filter(|connection| connection.token == token)
}

impl Driver for Load {
    fn complete(&mut self, reactor: &mut Reactor, completion: Completion<'_>) {
        match completion {
            Completion::Received { token, bytes } => self.received(reactor, token, bytes),
            Completion::Ended { token } => self.lose(reactor, token, "connection closed"),
            Completion::Failed { token, .. } => self.lose(reactor, token, "connection reset"),
            // The timer only ends the wait, and there is no listener.
            Completion::HungUp { .. }
            | Completion::Sent { .. }
            | Completion::Readable { .. }
            | Completion::Accepted { .. }
            | Completion::Adopted { .. }
            | Completion::AcceptFailed { .. } => {}
        }
    }
}
