//! How a worker takes part in accepting: one connection at a time, and not when it can't.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use super::call_dispatcher::millis;
use super::connection::Connection;
use super::event_loop::{EventLoop, LISTEN_RETRY_MS, WarningKind, find};
use super::shares::Source;
use super::timers::TimerTarget;
use crate::logging::pluralize;
use crate::sys::event::{Reactor, Token};
use crate::sys::socket;

/// Where a connection comes from.
pub(super) fn peer_of(socket: &OwnedFd) -> (Option<SocketAddr>, Source) {
    let peer = socket::peer(socket);
    (peer, Source::of(peer, || socket::peer_user(socket).ok()))
}

impl EventLoop {
    pub(super) fn accepted(&mut self, reactor: &mut Reactor, socket: OwnedFd) -> Option<Token> {
        let peer = peer_of(&socket);
        let adopted = reactor.register(socket);
        let token = self.register_connection(reactor, adopted, peer);
        self.has_accepted(reactor);
        token
    }

    /// Makes a connection of what the reactor has adopted.
    pub(super) fn register_connection(
        &mut self,
        reactor: &mut Reactor,
        adopted: io::Result<Token>,
        (peer, source): (Option<SocketAddr>, Source),
    ) -> Option<Token> {
        let token = match adopted {
            Ok(token) => token,
            Err(error) => {
                self.warn_limited(
                    WarningKind::Accepting,
                    &format!("a connection was not taken: {error}"),
                );
                return None;
            }
        };
        let mut connection = Connection::new(token, peer, source, self.service.now_ms);
        let socket = reactor.descriptor(token);
        connection.needs_http_path =
            socket.is_some_and(|socket| self.service.path_listeners.contain(socket));
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
                "{open}, as many as limits.connections allows: nothing more is accepted here until \
                 one ends"
            );
            self.warn_limited(WarningKind::Full, &text);
        }
        Some(token)
    }

    /// Sets when a connection is to be looked at for the first time, whether it is idle.
    pub(super) fn watch_idle(&mut self, token: Token) {
        let idle_ms = millis(self.service.limits.idle_timeout);
        if idle_ms > 0
            && let Some(connection) = find(&mut self.connections, token)
        {
            let at = connection.active_ms + idle_ms;
            let timers = &mut self.service.timers;
            timers.arm(&mut connection.quiet_deadline, at, TimerTarget::Idle(token));
        }
    }

    pub(super) fn on_accept_error(&mut self, error: &io::Error) {
        self.warn_limited(WarningKind::Accepting, &format!(
            "no connection can be accepted: {error}; those that are open are served, the others \
             wait; raise the limit of open files, or lower limits.connections"
        ));
        let at = self.service.now_ms + LISTEN_RETRY_MS;
        self.service
            .timers
            .arm(&mut self.listen_deadline, at, TimerTarget::Listen);
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
