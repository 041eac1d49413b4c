//! How a worker takes part in accepting: one connection at a time, not when it can't, and not while others
//! can begin more.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

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

/// For how long a worker leaves accepting to the others. One that counts and does not run, because it is
/// stopped, costs new connections so much.
const LEAVE_MS: u64 = 3;

/// Returns how long a connection may be idle, in milliseconds; `None` if there is no limit. A session whose
/// client has sent nothing yet is held by that client alone, so it ends sooner.
pub(super) fn idle_ms(service: &CallDispatcher, connection: &Connection) -> Option<u64> {
    let is_unused = service.forwarding.is_session && connection.dialect.is_none();
    let limit = match is_unused {
        true => service.limits.read_timeout,
        false => service.limits.idle_timeout,
    };
    (!limit.is_zero()).then(|| millis(limit))
}

/// Where a connection comes from.
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
                return None;
            }
        };
        let adopted = reactor.register(socket);
        let token = self.register_connection(reactor, adopted, peer, (key, false));
        if token.is_some() {
            self.service.counts.count_accepted();
        }
        self.has_accepted(reactor);
        token
    }

    /// Makes a connection of a socket that the reactor has accepted or adopted. `source_key` is that of
    /// `SourceLimits`. One that had a call elsewhere (`is_used`) is never closed to make room.
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

    /// Refuses a connection whose source has too many, for the `reason` that its client gets.
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

    /// Answers refused connections whose first bytes have come, and closes those whose time is over.
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

    /// Leaves accepting to the other workers for a moment. Then it takes the connections that no other one has
    /// taken, and may leave again.
    pub(super) fn leave_accepting(&mut self, reactor: &mut Reactor) {
        reactor.leave_listeners();
        let at = self.service.now_ms + LEAVE_MS;
        let timers = &mut self.service.timers;
        timers.arm(&mut self.listen_deadline, at, TimerTarget::Listen);
    }

    /// Leaves it to them if no thread is idle here and one is elsewhere: a call that is read there need not be
    /// sent. Called once per turn, when it is known how many threads are idle.
    pub(super) fn leave_accepting_if_busy(&mut self, reactor: &mut Reactor) {
        let is_serving = self.is_accepting && !self.is_at_limit && self.drain.is_serving();
        let (forwarding, now_ms) = (&mut self.service.forwarding, self.service.now_ms);
        if is_serving && self.listen_deadline == 0 && forwarding.leaves_accepting(now_ms) {
            self.leave_accepting(reactor);
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
