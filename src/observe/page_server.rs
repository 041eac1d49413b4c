//! Serves pages over HTTP/1.1, in one thread: accepts, waits for the master if a page needs it, answers.
//!
//! At most 32 connections have a place. For one more, the connection that has been idle for the longest time
//! is closed; if none is idle, the one whose request has been unfinished for the longest time, at least 1 s.
//! Else the new one gets 503. Without requests nothing wakes this process up.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

use super::answer::PageAnswer;
use super::connection::PageConnection;
use super::content::{Content, Now};
use super::master_facts::Readiness;
use super::routes::RouteRules;
use crate::protocol::http::HttpDate;
use crate::sys::closer;
use crate::sys::process::{monotonic_ms, unix_time};
use crate::sys::rights::GuardedSocket;
use crate::sys::signal::SignalPipe;
use crate::sys::socket;

/// The largest number of connections that are served.
const MAX_CONNECTIONS: usize = 32;
/// The largest number of connections beyond them that get an answer with 503. Further ones are closed without an
/// answer.
const MAX_REFUSED: usize = 8;
/// For how long a request may be unfinished before its connection makes room for another one.
const UNFINISHED_MS: u64 = 1_000;
/// The largest number of connections that are accepted in one turn.
const BATCH: usize = 64;
/// The time until the next try if the system had no descriptor for a connection.
const RETRY_MS: u64 = 200;
/// How long connections may still be served when the observer exits, or after an upgrade, in milliseconds.
const LEAVE_MS: u64 = 4_000;

pub struct PageServer {
    /// `None` once it leaves.
    listener: Option<OwnedFd>,
    /// Whether clients come by a unix socket.
    is_unix: bool,
    signals: SignalPipe,
    rules: RouteRules,
    content: Content,
    connections: Vec<PageConnection>,
    refused: Vec<PageConnection>,
    /// No connection is accepted before this time.
    closed_until_ms: u64,
    /// When the observer exits at the latest; `None` while it serves.
    gone_ms: Option<u64>,
    /// Whether a connection has another request that is not answered yet.
    has_more: bool,
    now: Now,
}

impl PageServer {
    pub fn new(
        (listener, is_unix): (OwnedFd, bool),
        signals: SignalPipe,
        rules: RouteRules,
        content: Content,
    ) -> Self {
        PageServer {
            listener: Some(listener),
            is_unix,
            signals,
            rules,
            content,
            connections: Vec::new(),
            refused: Vec::new(),
            closed_until_ms: 0,
            gone_ms: None,
            has_more: false,
            now: now(),
        }
    }

    /// Serves until a signal ends it.
    ///
    /// # Errors
    /// If poll(2) fails.
    pub fn serve(&mut self) -> io::Result<()> {
        loop {
            self.wait()?;
            let signals = self.signals.take();
            if !signals.is_empty() {
                // The link may have ended since poll(2). A new master sends its order after that.
                self.content.facts.receive(self.now.ms);
            }
            for signal in signals {
                match signal {
                    // A service manager may send SIGTERM to all processes. After an upgrade it is an order of the
                    // master.
                    Signal::SIGTERM if self.content.facts.is_linked() => {}
                    Signal::SIGTERM | Signal::SIGINT | Signal::SIGQUIT => self.leave(),
                    _ => return Ok(()),
                }
            }
            self.pass_time();
            self.answer_requests();
            self.connections.retain(|one| !one.has_ended());
            self.refused.retain(|one| !one.has_ended());
            let is_left = self.listener.is_none() && self.connections.is_empty();
            if is_left || self.gone_ms.is_some_and(|at| at <= self.now.ms) {
                return Ok(());
            }
        }
    }

    /// Waits until something is ready or due, and does what is ready.
    fn wait(&mut self) -> io::Result<()> {
        let is_open = self.now.ms >= self.closed_until_ms;
        let listener = self.listener.as_ref().filter(|_| is_open);
        let facts = self.content.facts.descriptor();
        let input = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = vec![input(self.signals.as_fd())];
        fds.extend(listener.map(|fd| input(fd.as_fd())));
        fds.extend(facts.map(input));
        let connections = self.connections.iter().chain(&self.refused);
        fds.extend(connections.map(|one| PollFd::new(one.as_fd(), one.interest())));
        match poll(&mut fds, self.timeout()) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut ready = fds.iter().map(|fd| fd.any().unwrap_or(false)).skip(1);
        let may_accept = listener.is_some() && ready.next().unwrap_or(false);
        let has_facts = facts.is_some() && ready.next().unwrap_or(false);
        let ready: Vec<bool> = ready.collect();
        self.now = now();
        let date = self.date();
        let all = self.connections.iter_mut().chain(&mut self.refused);
        for (connection, _) in all.zip(ready).filter(|(_, is_ready)| *is_ready) {
            connection.advance(self.now.ms, date);
        }
        if has_facts {
            self.content.facts.receive(self.now.ms);
        }
        if may_accept {
            self.accept();
        }
        Ok(())
    }

    fn timeout(&self) -> PollTimeout {
        if self.has_more {
            return PollTimeout::ZERO;
        }
        let now_ms = self.now.ms;
        let all = self.connections.iter().chain(&self.refused);
        let reopens = Some(self.closed_until_ms).filter(|at| *at > now_ms);
        let next = all
            .filter_map(PageConnection::deadline_ms)
            .chain(self.content.next_reading_ms(now_ms))
            .chain(self.content.facts.deadline_ms(now_ms))
            .chain(reopens)
            .chain(self.gone_ms)
            .min();
        match next {
            // One more millisecond, because poll(2) rounds down: a process that wakes early must wake twice.
            Some(at) => {
                let wait = Duration::from_millis(at.saturating_sub(monotonic_ms()) + 1);
                PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX)
            }
            None => PollTimeout::NONE,
        }
    }

    fn date(&self) -> HttpDate {
        HttpDate(self.now.unix.as_secs())
    }

    fn accept(&mut self) {
        if let Some(listener) = &self.listener {
            // An observer before this one shares the listener, and may have cleared O_NONBLOCK.
            let _ = socket::restore_nonblocking(listener);
        }
        for _ in 0..BATCH {
            let Some(listener) = &self.listener else {
                return;
            };
            let socket = match socket::accept(listener) {
                Ok(socket) => socket,
                Err(Errno::EAGAIN) => return,
                Err(Errno::EINTR | Errno::ECONNABORTED) => continue,
                // If the connection stayed in the queue, the listener would be readable all the time, and this process
                // would spin.
                Err(_) => {
                    self.closed_until_ms = self.now.ms + RETRY_MS;
                    return;
                }
            };
            let socket = GuardedSocket::accepted(socket, self.is_unix, closer::close);
            let mut connection = PageConnection::new(socket, self.now.ms);
            // Most clients have sent their request by now.
            connection.advance(self.now.ms, self.date());
            self.admit(connection);
        }
    }

    /// Gives a connection a place. If there is none, answers 503 and closes it.
    fn admit(&mut self, mut connection: PageConnection) {
        self.connections.retain(|one| !one.has_ended());
        if self.connections.len() >= MAX_CONNECTIONS {
            let all = self.connections.iter().enumerate();
            let idle = all.clone().filter(|(_, one)| one.is_idle());
            let longest = idle.min_by_key(|(_, one)| one.idle_since_ms);
            let late_ms = self.now.ms.saturating_sub(UNFINISHED_MS);
            let unfinished =
                all.filter_map(|(index, one)| Some((index, one.unfinished_since_ms()?)));
            let oldest = unfinished.min_by_key(|(_, since_ms)| *since_ms);
            let oldest = oldest.filter(|(_, since_ms)| *since_ms <= late_ms);
            let closed = longest.map(|(index, _)| index);
            match closed.or(oldest.map(|(index, _)| index)) {
                Some(index) => drop(self.connections.swap_remove(index)),
                None => {
                    if self.refused.len() < MAX_REFUSED {
                        // If the request was malformed, the connection already has its answer.
                        if !connection.is_answered() {
                            let text = "32 other connections are busy; try again";
                            let answer = PageAnswer::text(503, text);
                            connection.answer(&answer, true, self.now.ms, self.date());
                        }
                        self.refused.push(connection);
                    }
                    return;
                }
            }
        }
        self.connections.push(connection);
    }

    fn pass_time(&mut self) {
        self.now = now();
        for connection in self.connections.iter_mut().chain(&mut self.refused) {
            connection.expire(self.now.ms);
        }
        self.content.record(self.now);
        if self.content.facts.has_lost_link() && self.gone_ms.is_none() {
            // The master was upgraded: the new one starts its own observer. Until that observer accepts, this one
            // continues. If the master had died, the kernel would have ended this process.
            self.gone_ms = Some(self.now.ms + LEAVE_MS);
        }
    }

    /// Answers the requests that can be answered now, one of each connection: a client that sends many ahead
    /// delays only itself.
    fn answer_requests(&mut self) {
        let (now, date, leaves) = (self.now, self.date(), self.listener.is_none());
        self.has_more = false;
        for connection in &mut self.connections {
            let Some(request) = connection.request() else {
                continue;
            };
            let answer = match self.rules.route(request) {
                Err((status, text)) => PageAnswer::text(status, &text),
                Ok(route) => match self.content.prepare(&route, now) {
                    Readiness::Until(_) => continue,
                    Readiness::Now => self.content.answer(&route, now),
                },
            };
            connection.answer(&answer, leaves, now.ms, date);
            self.has_more |= connection.request().is_some();
        }
    }

    /// Accepts nothing more, and leaves when the requests that have begun are answered.
    fn leave(&mut self) {
        self.listener = None;
        // Keep new connections: their first requests may be on the way.
        self.connections
            .retain(|one| !one.is_idle() || !one.has_answered);
        self.gone_ms = Some(self.now.ms + LEAVE_MS);
    }
}

fn now() -> Now {
    Now {
        ms: monotonic_ms(),
        unix: unix_time(),
    }
}
