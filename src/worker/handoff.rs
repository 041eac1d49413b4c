//! Handing connections over: a draining worker gives, a serving one takes them up.
//!
//! A connection is given when everything taken from it is answered and sent; bytes that were
//! received and not consumed cross with it. So its client notices nothing. While the queue is full
//! the connection rests here, unread, and is given as soon as there is room.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::accepting::peer_of;
use super::connection::ConnectionPhase;
use super::crash::journal::note_of;
use super::event_loop::{EventLoop, QUEUE, find};
use super::timers::TimerTarget;
use crate::link::adoption_queue;
use crate::link::adoption_queue::{HandoffState, is_full};
use crate::sys::closer;
use crate::sys::event::{Interest, Reactor, Token, UnsentData};

/// Between two tries when nothing tells that there is room again: too many descriptors of this
/// user are on their way (ETOOMANYREFS, unix(7)).
const RETRY_MS: u64 = 20;

impl EventLoop {
    /// Takes up a connection that a sibling has passed on.
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
            return log::error!(
                "a connection was passed on with no state to be understood: closed"
            );
        };
        let is_rebalanced = self.has_adopted(reactor);
        let peer = peer_of(&socket);
        let owed = match (taken.unsent.is_empty(), is_whole) {
            (true, _) => UnsentData::Nothing,
            (false, true) => UnsentData::InPacket,
            (false, false) => UnsentData::Here,
        };
        let note = note_of(&taken);
        let adopted = reactor.register_adopted(socket, owed, note);
        let Some(token) = self.register_connection(reactor, adopted, peer) else {
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
        if taken.state.closing {
            connection.phase = ConnectionPhase::Closing;
        } else {
            if taken.unread.is_empty() {
                let idle_ms = u64::from(taken.state.idle_ms);
                connection.active_ms = now_ms.saturating_sub(idle_ms);
            }
            // What has come to the sibling already: the socket can't tell when.
            connection.is_first_read = taken.unread.is_empty();
            connection.input = taken.unread.into_owned();
        }
        self.service.ledger.update_flags(connection);
        self.watch_idle(token);
        if !taken.unsent.is_empty() {
            self.service.out.extend_from_slice(&taken.unsent);
            reactor.send(token, &mut self.service.out);
            // Before the sending counts as over, so that nobody sends it a second time.
            reactor.clear_carried_output(token);
            self.service.ledger.sent();
        }
        self.pump(reactor, token, false);
    }

    /// Gives away every connection that may go; the others follow as they come to rest.
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

    /// Gives a connection away, now or as soon as there is room.
    pub(super) fn give(&mut self, reactor: &mut Reactor, token: Token) {
        // What it sends now is to be dropped, which nobody else would know.
        if find(&mut self.connections, token).is_some_and(|it| it.discarding.is_some()) {
            return;
        }
        // First come, first given: else a busy connection could wait for ever.
        if !self.waiting_to_give.is_empty() {
            return self.queue_for_handoff(reactor, token);
        }
        match self.try_send(reactor, token) {
            Ok(()) => {}
            Err(error) if is_full(&error) => self.queue_for_handoff(reactor, token),
            Err(error) => {
                log::error!("a connection could not be passed on: {error}; it is served here");
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
            return Ok(()); // It was ended while it waited for room.
        }
        let idle_ms = self.service.now_ms.saturating_sub(connection.active_ms);
        let state = HandoffState {
            dialect: connection.dialect,
            idle_ms: u32::try_from(idle_ms).unwrap_or(u32::MAX),
            closing: false,
        };
        // Said before: dead in between, we must not have it passed on a second time. Dead before the
        // system call too, it ends, which nobody can tell from the other case: a moment of some 100 ns.
        self.service.ledger.set_handed_off(connection, true);
        let given = self
            .adoption
            .send(socket.as_fd(), state, b"", &connection.input);
        if let Err(error) = given {
            self.service.ledger.set_handed_off(connection, false);
            return Err(error);
        }
        // The queue holds it now: closing our descriptor ends nothing.
        socket.mark_shared();
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
        // Who joins must not put off those that wait already.
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

    /// The queue may have room again.
    pub(super) fn retry_handoffs(&mut self, reactor: &mut Reactor) {
        reactor.unwatch(QUEUE);
        while let Some(&token) = self.waiting_to_give.front() {
            match self.try_send(reactor, token) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // Told when somebody has taken one; the timer is for when that can't be.
                    if let Err(error) = reactor.watch(QUEUE, &*self.adoption.tx, Interest::Write) {
                        log::debug!("the adoption queue can't be watched: {error}");
                    }
                    return self.retry_giving();
                }
                // The queue itself is writable: watching it would spin.
                Err(error) if is_full(&error) => return self.retry_giving(),
                Err(error) => {
                    log::error!("a connection could not be passed on: {error}; it is served here");
                    reactor.set_reading(token, true);
                }
                Ok(()) => {}
            }
            self.waiting_to_give.pop_front();
        }
        self.stop_giving(reactor);
    }

    /// Gives nothing more: what waits stays here.
    pub(super) fn stop_giving(&mut self, reactor: &mut Reactor) {
        self.waiting_to_give.clear();
        reactor.unwatch(QUEUE);
        self.service
            .timers
            .disarm(&mut self.give_deadline, TimerTarget::Give);
    }
}
