//! Accepts connections, and decides when this worker accepts none: at its limit, after an error, and while other
//! workers have more capacity.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering::SeqCst;

use super::call_dispatcher::CallDispatcher;
use super::connection::{Connection, ConnectionEnd};
use super::event_loop::{EventLoop, LISTEN_RETRY_MS, REFUSED, WarningKind, find};
use super::shares::Source;
use super::timers::TimerTarget;
use super::timers::millis;
use crate::link::metrics_board::layout::CloseReason;
use crate::logging::pluralize;
use crate::sys::event::{Interest, Reactor, Token};
use crate::sys::socket;

/// How long a worker leaves accepting to the others, in milliseconds. If the others are stopped and do not accept, new
/// connections wait this much longer.
const YIELD_MS: u64 = 3;

/// Returns how long a connection may be idle, in milliseconds; `None` if there is no limit. A client that sends
/// nothing would hold the whole process of its session, so such a session ends earlier.
pub(super) fn idle_ms(service: &CallDispatcher, connection: &Connection) -> Option<u64> {
    let is_unused = service.forwarding.is_session && connection.dialect.is_none();
    let limit = match is_unused {
        true => service.limits.read_timeout,
        false => service.limits.idle_timeout,
    };
    (!limit.is_zero()).then(|| millis(limit))
}

/// Returns the address of a client, and the source to which its connection counts.
pub(super) fn peer_of(socket: &OwnedFd) -> (Option<SocketAddr>, Source) {
    let peer = socket::peer(socket);
    (peer, Source::of(peer, || socket::peer_user(socket).ok()))
}

impl EventLoop {
    pub(super) fn accepted(&mut self, reactor: &mut Reactor, socket: OwnedFd) -> Option<Token> {
        let peer = peer_of(&socket);
        let limits = &mut self.service.source_limits;
        let key = match limits.admit(&socket, peer, self.service.now_ms) {
            Ok(key) => key,
            Err(reason) => {
                self.refuse(reactor, socket, &reason);
                reactor.note_refused();
                return None;
            }
        };
        let adopted = reactor.register(socket);
        if adopted.is_ok() {
            // Count it at once, because from here on the keeper assumes that it is counted.
            self.service.counts.count_accepted();
        }
        let token = self.register_connection(reactor, adopted, peer, (key, false));
        self.note_accepted(reactor);
        token
    }

    /// Creates a connection for a socket that the reactor has accepted or adopted. `source_key` is the key of
    /// `SourceLimits`. A connection that had a call in another worker (`is_used`) is never closed to make room.
    pub(super) fn register_connection(
        &mut self,
        reactor: &mut Reactor,
        adopted: io::Result<Token>,
        (peer, source): (Option<SocketAddr>, Source),
        (source_key, is_used): (u64, bool),
    ) -> Option<Token> {
        let token = match adopted {
            Ok(token) => token,
            Err(error) => {
                self.service.source_limits.release(source_key);
                self.warn_limited(
                    WarningKind::Accepting,
                    &format!("a connection could not be registered: {error}"),
                );
                return None;
            }
        };
        let mut connection = Connection::new(token, peer, source, self.service.now_ms);
        connection.source_key = source_key;
        let socket = reactor.descriptor(token);
        connection.needs_http_path =
            socket.is_some_and(|socket| self.service.path_listeners.require_path(socket, false));
        if !is_used {
            self.service
                .unused
                .add(&mut connection, self.service.now_ms);
        }
        if self.connections.len() <= token.index() {
            self.connections.resize_with(token.index() + 1, || None);
        }
        self.connections[token.index()] = Some(connection);
        self.watch_idle(token);
        if !self.make_room(reactor) {
            self.is_at_limit = true;
            reactor.pause_listeners();
            let open = reactor.connections();
            let open = pluralize(open, "connection is open", "connections are open");
            let text = format!(
                "{open}, as many as limits.connections allows: accepting is paused until \
                 a connection is closed"
            );
            self.warn_limited(WarningKind::Full, &text);
        }
        Some(token)
    }

    /// Refuses a connection whose source has too many connections. Its client gets `reason` as the message.
    #[cold]
    fn refuse(&mut self, reactor: &mut Reactor, socket: OwnedFd, reason: &str) {
        let now_ms = self.service.now_ms;
        self.service.counts.count_accepted();
        self.service
            .counts
            .count_end(ConnectionEnd::Closed(CloseReason::Limit));
        if let Some((refused, _)) = self.service.source_limits.refused() {
            refused.add(socket, reason, now_ms);
            if let Err(error) = reactor.watch(REFUSED, &*refused, Interest::Read) {
                log::debug!("refused connections cannot be watched: {error}");
            }
            self.serve_refused();
        }
    }

    /// Answers refused connections whose first bytes have arrived, and closes those whose time is over.
    pub(super) fn serve_refused(&mut self) {
        let service = &mut self.service;
        if let Some((refused, deadline)) = service.source_limits.refused() {
            refused.serve();
            refused.expire(service.now_ms);
            match refused.next_ms() {
                Some(at) => service.timers.arm(deadline, at, TimerTarget::Refused),
                None => service.timers.disarm(deadline, TimerTarget::Refused),
            }
        }
    }

    /// Arms the first check for an idle connection.
    pub(super) fn watch_idle(&mut self, token: Token) {
        let service = &self.service;
        if let Some(connection) = find(&mut self.connections, token)
            && let Some(idle_ms) = idle_ms(service, connection)
        {
            let at = connection.active_ms + idle_ms;
            let timers = &mut self.service.timers;
            timers.arm(&mut connection.quiet_deadline, at, TimerTarget::Idle(token));
        }
    }

    pub(super) fn on_accept_error(&mut self, error: &io::Error) {
        if error.kind() == io::ErrorKind::BrokenPipe {
            return log::warn!(
                "a process has shut the adoption queue down: until the server restarts, a worker that drains serves \
                 its connections itself and then closes them, and those of a crashed worker are reset"
            );
        }
        self.warn_limited(
            WarningKind::Accepting,
            &format!(
                "no connection can be accepted: {error}; open connections are served, new ones \
             wait; raise the limit of open files, or lower limits.connections"
            ),
        );
        let at = self.service.now_ms + LISTEN_RETRY_MS;
        self.service
            .timers
            .arm(&mut self.listen_deadline, at, TimerTarget::Listen);
    }

    /// Leaves accepting to the other workers for `YIELD_MS`, if one of them accepts. Then this worker accepts the
    /// connections that no other worker has accepted, and may yield again.
    pub(super) fn yield_accepting(&mut self, reactor: &mut Reactor) {
        let (record, now_ms) = (self.service.record, self.service.now_ms);
        // Set the own flag before reading those of the others. So if two workers yield at the same time, at least one
        // of them sees the other's flag and continues to accept.
        record.has_yielded.store(1, SeqCst);
        let mut others = self.service.forwarding.other_workers(now_ms);
        if others.all(|other| other.has_yielded.load(SeqCst) > 0) {
            return record.has_yielded.store(0, SeqCst);
        }
        reactor.pause_only_listeners();
        let timers = &mut self.service.timers;
        let at = now_ms + YIELD_MS;
        timers.arm(&mut self.listen_deadline, at, TimerTarget::Listen);
    }

    /// Shows that this worker accepts again. `resume_listening` must follow, unless it drains or stops.
    pub(super) fn end_yield(&mut self) {
        let timers = &mut self.service.timers;
        timers.disarm(&mut self.listen_deadline, TimerTarget::Listen);
        self.service.record.has_yielded.store(0, SeqCst);
    }

    /// Leaves accepting to the other workers if this worker has no idle thread and another one has. That worker can run
    /// the calls of its new connections itself, so they are not sent. Call it once per turn, after the idle threads
    /// were counted.
    pub(super) fn yield_accepting_if_busy(&mut self, reactor: &mut Reactor) {
        let is_serving = self.is_accepting && !self.is_at_limit && self.drain.is_serving();
        let (forwarding, now_ms) = (&mut self.service.forwarding, self.service.now_ms);
        if is_serving && self.listen_deadline == 0 && forwarding.should_yield_accepting(now_ms) {
            self.yield_accepting(reactor);
        }
    }

    pub(super) fn resume_listening(&mut self, reactor: &mut Reactor) {
        if self.is_at_limit || !self.is_accepting || !self.drain.is_serving() {
            return;
        }
        match reactor.resume_listeners() {
            Ok(false) => {}
            Ok(true) => self.warn_limited(
                WarningKind::Accepting,
                "another process has cleared O_NONBLOCK of a listener: it is set again; find the process \
                 that shares the listener (a worker, or another service of the service manager)",
            ),
            Err(error) => self.on_accept_error(&error),
        }
    }
}
