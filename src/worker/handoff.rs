//! Hands connections over: a draining worker sends them, a serving worker adopts them.
//!
//! A connection is sent when everything taken from it is answered and sent. Bytes that were received but
//! not consumed are sent with it, so its client notices nothing. While the queue is full, the connection
//! waits here, unread, until there is room.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::accepting::peer_of;
use super::connection::{ConnectionEnd, ConnectionPhase};
use super::crash::journal::note_of;
use super::event_loop::{EventLoop, QUEUE, find};
use super::timers::TimerTarget;
use crate::link::adoption_queue;
use crate::link::adoption_queue::{HandoffState, is_full};
use crate::link::metrics_board::layout::MoveReason;
use crate::sys::closer;
use crate::sys::event::{Interest, Reactor, Token, UnsentData};

/// The time between two attempts if no event reports room. That is so while too many descriptors of this user are in
/// transit (ETOOMANYREFS, unix(7)).
const RETRY_MS: u64 = 20;

impl EventLoop {
    /// Adopts a connection that a sibling has sent.
    pub(super) fn adopted(
        &mut self,
        reactor: &mut Reactor,
        socket: OwnedFd,
        packet: &[u8],
        rest: Option<OwnedFd>,
    ) {
        let is_whole = rest.is_none();
        let Some(taken) = adoption_queue::decode_packet(packet, rest) else {
            closer::close(socket);
            return log::error!("an adopted connection is closed: its handoff packet is invalid");
        };
        let is_rebalanced = self.note_adopted(reactor);
        let peer = peer_of(&socket);
        let owed = match (taken.unsent.is_empty(), is_whole) {
            (true, _) => UnsentData::Nothing,
            (false, true) => UnsentData::InPacket,
            (false, false) => UnsentData::Here,
        };
        let note = note_of(&taken);
        let source_key = self.service.source_limits.add(&socket, peer.1);
        let adopted = reactor.register_adopted(socket, owed, note);
        let is_used =
            taken.state.dialect.is_some() || taken.state.closing || !taken.unsent.is_empty();
        let Some(token) = self.register_connection(reactor, adopted, peer, (source_key, is_used))
        else {
            return;
        };
        let now_ms = self.service.now_ms;
        let Some(connection) = find(&mut self.connections, token) else {
            return;
        };
        connection.recorded_flags = note;
        if is_rebalanced {
            connection.rebalanced_ms = now_ms;
        }
        connection.dialect = taken.state.dialect;
        if taken.state.needs_path
            && let Some(socket) = reactor.descriptor(token)
        {
            let listeners = &self.service.path_listeners;
            connection.needs_http_path = listeners.require_path(socket, true);
        }
        if taken.state.closing {
            connection.phase = ConnectionPhase::Closing;
        } else {
            if taken.unread.is_empty() {
                let idle_ms = u64::from(taken.state.idle_ms);
                connection.active_ms = now_ms.saturating_sub(idle_ms);
            }
            // Its first bytes may have arrived at the sibling, so the socket does not know when they arrived.
            connection.is_first_read = taken.unread.is_empty();
            connection.input = taken.unread.into_owned();
        }
        self.service.journal.update_flags(connection);
        self.watch_idle(token);
        if !taken.unsent.is_empty() {
            self.service.out.extend_from_slice(&taken.unsent);
            reactor.send(token, &mut self.service.out);
            // Do this before the send counts as done, because the keeper would otherwise send the bytes
            // again.
            reactor.clear_carried_output(token);
            self.service.journal.sent();
        }
        self.pump(reactor, token, false);
    }

    /// Hands over every quiescent connection. The others follow when they become quiescent.
    pub(super) fn send_quiescent(&mut self, reactor: &mut Reactor) {
        let open: Vec<Token> = self
            .connections
            .iter()
            .flatten()
            .filter(|connection| {
                connection.phase == ConnectionPhase::Open && connection.unanswered == 0
            })
            .map(|connection| connection.token)
            .collect();
        for token in open {
            if reactor.unsent(token) == 0 {
                self.give(reactor, token);
            }
        }
    }

    /// Hands over a connection, now or as soon as there is room in the queue.
    pub(super) fn give(&mut self, reactor: &mut Reactor, token: Token) {
        // The rest of a refused call must be dropped, and another worker would not know that.
        if find(&mut self.connections, token).is_some_and(|it| it.discarding.is_some()) {
            return;
        }
        // Keep the order, because a busy connection could otherwise wait for ever.
        if !self.waiting_to_give.is_empty() {
            return self.queue_for_handoff(reactor, token);
        }
        match self.try_send(reactor, token) {
            Ok(()) => {}
            Err(error) if is_full(&error) => self.queue_for_handoff(reactor, token),
            Err(error) => {
                log::error!(
                    "could not hand over a connection: {error}; this worker continues to serve it"
                );
            }
        }
    }

    fn try_send(&mut self, reactor: &mut Reactor, token: Token) -> io::Result<()> {
        let Some(connection) = find(&mut self.connections, token) else {
            return Ok(());
        };
        let Some(socket) = reactor.descriptor(token) else {
            return Ok(());
        };
        if connection.phase != ConnectionPhase::Open {
            return Ok(()); // It was closed while it waited for room.
        }
        let idle_ms = self.service.now_ms.saturating_sub(connection.active_ms);
        let state = HandoffState {
            dialect: connection.dialect,
            idle_ms: u32::try_from(idle_ms).unwrap_or(u32::MAX),
            closing: false,
            needs_path: connection.needs_http_path,
        };
        // Set the flag before sendmsg(2): if the worker dies after the call, the keeper must not hand the
        // connection over again. If it dies before the call, the connection is lost, because the keeper
        // cannot tell the two cases apart. The window is about 100 ns.
        self.service.journal.set_handed_off(connection, true);
        let given = self
            .adoption
            .send(socket.as_fd(), state, b"", &connection.input);
        if let Err(error) = given {
            self.service.journal.set_handed_off(connection, false);
            return Err(error);
        }
        // The queue also has it now, so closing our descriptor does not end it.
        socket.mark_shared();
        connection.end = ConnectionEnd::Moved(match self.drain.is_serving() {
            true => MoveReason::Balance,
            false => MoveReason::Drain,
        });
        self.close(reactor, token);
        Ok(())
    }

    fn queue_for_handoff(&mut self, reactor: &mut Reactor, token: Token) {
        reactor.set_reading(token, false);
        if let Some(connection) = find(&mut self.connections, token) {
            let target = TimerTarget::Read(token);
            self.service
                .timers
                .disarm(&mut connection.read_deadline, target);
        }
        self.waiting_to_give.push_back(token);
        // A new connection must not delay those that already wait.
        if self.give_deadline == 0 {
            self.retry_giving();
        }
    }

    fn retry_giving(&mut self) {
        let at = self.service.now_ms + RETRY_MS;
        self.service
            .timers
            .arm(&mut self.give_deadline, at, TimerTarget::Give);
    }

    /// Tries to send the waiting connections again, because the queue may have room.
    pub(super) fn retry_handoffs(&mut self, reactor: &mut Reactor) {
        reactor.unwatch(QUEUE);
        while let Some(&token) = self.waiting_to_give.front() {
            match self.try_send(reactor, token) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // The queue becomes writable when a packet is taken. The timer is for the case that
                    // it cannot be watched.
                    if let Err(error) = reactor.watch(QUEUE, &*self.adoption.tx, Interest::Write) {
                        log::debug!("the adoption queue cannot be watched: {error}");
                    }
                    return self.retry_giving();
                }
                // The queue itself is writable, so watching it would spin.
                Err(error) if is_full(&error) => return self.retry_giving(),
                Err(error) => {
                    log::error!(
                        "could not hand over a connection: {error}; this worker continues to serve it"
                    );
                    reactor.set_reading(token, true);
                }
                Ok(()) => {}
            }
            self.waiting_to_give.pop_front();
        }
        self.stop_giving(reactor);
    }

    /// Stops sending connections. Those that wait for room stay in this worker, unread until their next `pump`.
    pub(super) fn stop_giving(&mut self, reactor: &mut Reactor) {
        self.waiting_to_give.clear();
        reactor.unwatch(QUEUE);
        self.service
            .timers
            .disarm(&mut self.give_deadline, TimerTarget::Give);
    }
}
