//! What a connection's bytes, its end and its answers lead to: calls taken, answers sent, the end.
//!
//! Everything that changes a connection ends in `pump`, which sends what was answered, takes
//! what may be taken, and sets reading and deadlines anew. What fails on one connection ends it and
//! no other.

use std::mem;

use super::call_dispatcher::millis;
use super::call_errors::{caller_gone, too_late};
use super::connection::{ConnectionPhase, HIGH_WATER};
use super::event_loop::{EventLoop, WarningKind, find};
use super::input_parser::PROXY_PROTOCOL;
use super::peer_calls;
use super::rebalance::is_transferable;
use super::timers::TimerTarget;
use crate::protocol::detect;
use crate::sys::event::{Reactor, Token};
use crate::sys::socket;

/// Who has sent or was sent something within this time may have an answer unread or a call on its way.
const ACTIVE_MS: u64 = 1000;
/// How long the peer of a connection that we have ended may take to end it too (section 3).
const LINGER_MS: u64 = 2000;

impl EventLoop {
    pub(super) fn on_bytes(&mut self, reactor: &mut Reactor, token: Token, bytes: &[u8]) {
        let unsent = reactor.unsent(token);
        let Some(connection) = find(&mut self.connections, token) else {
            return;
        };
        if connection.phase != ConnectionPhase::Open {
            return;
        }
        connection.active_ms = self.service.now_ms;
        if mem::take(&mut connection.is_first_read) {
            let socket = reactor.descriptor(token);
            self.service.waited(socket.map_or(0, socket::waited_ms));
        }
        let is_proxy = connection.dialect.is_none() && detect::is_proxy_protocol(bytes);
        let peer = connection.peer;
        self.service.ledger.opens();
        let dropped = connection.skip(bytes);
        let used = if dropped == 0 && connection.input.is_empty() {
            self.service.read_requests(connection, bytes, unsent)
        } else {
            dropped
        };
        let kept = connection.keep(&bytes[used..]);
        self.service.ledger.closes(connection, bytes.len());
        if let Err(error) = kept {
            let text = format!("a connection ends, for nothing more can be kept of it: {error}");
            self.warn_limited(WarningKind::Unfinished, &text);
            self.service.accept_wait_ms = 0;
            // What was answered meanwhile goes, or would go to somebody else.
            reactor.send(token, &mut self.service.out);
            self.service.ledger.sent();
            return self.close(reactor, token);
        }
        let whole = used > dropped || dropped > 0 && connection.discarding.is_none();
        self.pump(reactor, token, whole);
        self.service.accept_wait_ms = 0;
        if is_proxy {
            let peer = peer.map_or("unix".to_owned(), |peer| peer.to_string());
            self.warn_limited(WarningKind::Proxy, &format!("{PROXY_PROTOCOL} peer={peer}"));
        }
    }

    /// Sends what was answered, takes what may be taken now, and sets what follows from it:
    /// reading, deadlines, the end. `whole` tells that a frame was taken just before.
    pub(super) fn pump(&mut self, reactor: &mut Reactor, token: Token, mut whole: bool) {
        let Some(connection) = find(&mut self.connections, token) else {
            self.service.ledger.sent();
            return self.service.out.clear();
        };
        let service = &mut self.service;
        let (mut shed, mut payer) = (false, None);
        loop {
            if !service.out.is_empty() {
                connection.active_ms = service.now_ms;
            }
            reactor.send(token, &mut service.out);
            service.ledger.sent();
            let unsent = reactor.unsent(token);
            let mut untaken = connection.queued_bytes();
            if unsent > 0 {
                untaken += reactor.unsent_memory(token);
            }
            let owner = (connection.source, token);
            let counted = &mut connection.counted_unsent;
            service.unsent.update(owner, counted, untaken);
            if connection.input.is_empty() || !service.may_take(connection, unsent) {
                break;
            }
            let mut tail = connection.take_tail();
            let used = service.read_requests(connection, &tail, unsent);
            mem::swap(&mut connection.input, &mut tail);
            connection.consume(used);
            whole |= used > 0;
            if used == 0 && service.out.is_empty() {
                service.update_unfinished_total(connection);
                // While others of its calls are under way, it is read no further instead; and one that is to be
                // handed over is.
                let goes_elsewhere = self.drain.is_handing_off();
                let stays = !service.has_no_room_for(connection);
                if stays || goes_elsewhere || connection.unanswered > 0 {
                    break;
                }
                payer = service.payer_for(connection);
                if payer.is_some() {
                    break;
                }
                service.reject_unfinished(connection);
                shed = true;
            }
        }
        if connection.phase != ConnectionPhase::Open {
            connection.input = Vec::new();
        }
        service.update_unfinished_total(connection);
        // While the reactor still lends what it has received: what is kept of it is lost with us.
        service.ledger.update_flags(connection);
        let unsent = reactor.unsent(token);
        let may_rest = self.drain.is_handing_off() && service.is_soon_quiescent(connection, unsent);
        if may_rest {
            self.drain.look_again(service.now_ms);
        }
        let takes_no_more = may_rest
            || !service.may_take(connection, unsent)
            || connection.unanswered > 0 && service.has_no_room_for(connection);
        // What is to be dropped is no call.
        connection.is_read_paused = connection.phase == ConnectionPhase::Open
            && connection.discarding.is_none()
            && takes_no_more;
        reactor.set_reading(token, !connection.is_read_paused);
        service.unsent.note_blocked(connection.is_read_paused);
        if unsent + connection.queued_bytes() >= HIGH_WATER {
            service.calls.park(token);
        }
        if service.calls.are_parked() && (unsent < HIGH_WATER || connection.holds()) {
            service.calls.unpark(token);
        }
        if service.out.capacity() > 4 * HIGH_WATER {
            // One large answer need not keep its room for as long as the worker lives.
            service.out = Vec::new();
        }
        let now = service.now_ms;
        let sent = connection.input.len();
        let waits = connection.http.as_ref().is_some_and(|it| it.waits(sent));
        let holds_back = connection.is_read_paused || waits && connection.unanswered > 0;
        if !connection.has_partial_input() || holds_back || connection.peer_closed {
            // While we hold the peer back, the time it takes is ours.
            service
                .timers
                .disarm(&mut connection.read_deadline, TimerTarget::Read(token));
        } else if whole || connection.read_deadline == 0 {
            let at = now + millis(service.limits.read_timeout);
            service
                .timers
                .arm(&mut connection.read_deadline, at, TimerTarget::Read(token));
            // The beginning of a call. A client with Nagle's algorithm sends the rest when this is
            // acknowledged, and the kernel delays that by 40 ms because it hopes for an answer to go with it.
            if connection.peer.is_some()
                && let Some(socket) = reactor.descriptor(token)
            {
                socket::acknowledge_now(socket);
            }
        }
        if unsent == 0 {
            service
                .timers
                .disarm(&mut connection.write_deadline, TimerTarget::Write(token));
        } else if connection.write_deadline == 0 {
            let at = now + millis(service.limits.write_timeout);
            service.timers.arm(
                &mut connection.write_deadline,
                at,
                TimerTarget::Write(token),
            );
        }
        let rests = connection.unanswered == 0 && unsent == 0;
        if shed {
            self.warn_refused_unfinished();
        }
        if let Some(payer) = payer {
            let pays = self.may_be_refused(payer);
            self.refuse_unfinished(reactor, if pays { payer } else { token });
        }
        if rests {
            self.finish_if_idle(reactor, token);
        }
        if self.service.unsent.is_exceeded() {
            self.close_most_unsent(reactor);
        }
    }

    /// Whether a connection has an unfinished call, and nothing else, in its input.
    fn may_be_refused(&mut self, token: Token) -> bool {
        let connection = find(&mut self.connections, token);
        connection.is_some_and(|connection| {
            connection.phase == ConnectionPhase::Open && self.service.has_only_partial(connection)
        })
    }

    /// Refuses the unfinished call of a connection to make room.
    #[cold]
    fn refuse_unfinished(&mut self, reactor: &mut Reactor, token: Token) {
        if let Some(connection) = find(&mut self.connections, token) {
            self.service.reject_unfinished(connection);
            self.warn_refused_unfinished();
            self.pump(reactor, token, false);
        }
    }

    fn warn_refused_unfinished(&mut self) {
        self.warn_limited(
            WarningKind::Unfinished,
            "a client's unfinished call is refused: those of this worker have as much as \
             limits.unfinished allows, and this client has the most",
        );
    }

    /// Closes the connections with the most untaken answers until those of the worker are below twice
    /// their limit: of the source that has the most. Each search of all closes one of them, so calls do not pay
    /// for it.
    #[cold]
    fn close_most_unsent(&mut self, reactor: &mut Reactor) {
        while self.service.unsent.is_exceeded() {
            let Some(token) = self.service.unsent.shares.heaviest() else {
                return;
            };
            let Some(most) = find(&mut self.connections, token) else {
                return;
            };
            let (token, bytes) = (most.token, most.counted_unsent);
            let peer = (most.peer).map_or("unix".to_owned(), |peer| peer.to_string());
            let text = format!(
                "answers that clients have not taken reach twice limits.unfinished: the connection with \
                 the most is closed; its client must read sooner, or raise limits.unfinished peer={peer} \
                 bytes={bytes}"
            );
            self.warn_limited(WarningKind::Unsent, &text);
            self.close(reactor, token);
        }
    }

    /// Everything read is answered and sent: ends the connection if it is to end.
    fn finish_if_idle(&mut self, reactor: &mut Reactor, token: Token) {
        let Some(connection) = find(&mut self.connections, token) else {
            return;
        };
        let open = connection.phase == ConnectionPhase::Open;
        // A tail that could not be taken any more may hold calls: whoever adopts it answers them.
        let has_more = !connection.peer_closed || !connection.input.is_empty();
        if open && self.drain.is_handing_off() && has_more {
            return self.give(reactor, token);
        }
        let again = self.spreading.after_change;
        if self.spreading.gives() && is_transferable(connection, again, self.service.now_ms) {
            return self.give_by_order(reactor, token);
        }
        if connection.peer_closed && connection.phase != ConnectionPhase::Lingering {
            if connection.has_partial_input() {
                log::debug!("a client ended in the middle of a frame");
            }
            return self.close(reactor, token);
        }
        if connection.phase == ConnectionPhase::Closing {
            // Closing at once would reset the connection if something more arrived, and a reset
            // takes along the answer that the client has not read yet.
            connection.phase = ConnectionPhase::Lingering;
            self.service.ledger.update_flags(connection);
            reactor.shutdown(token);
            let at = self.service.now_ms + LINGER_MS;
            let armed = &mut connection.quiet_deadline;
            self.service.timers.disarm(armed, TimerTarget::Idle(token));
            self.service
                .timers
                .arm(armed, at, TimerTarget::Linger(token));
        }
    }

    /// Closes a connection on which all is answered and sent: with care, unless it has been silent for
    /// so long that its client must have read what there was.
    pub(super) fn close_quiescent(&mut self, reactor: &mut Reactor, token: Token) {
        let Some(connection) = find(&mut self.connections, token) else {
            return;
        };
        if self.service.now_ms.saturating_sub(connection.active_ms) > ACTIVE_MS {
            return self.close(reactor, token);
        }
        connection.phase = ConnectionPhase::Closing;
        self.pump(reactor, token, false);
    }

    pub(super) fn on_end(&mut self, reactor: &mut Reactor, token: Token) {
        let Some(connection) = find(&mut self.connections, token) else {
            return;
        };
        connection.peer_closed = true;
        if connection.phase == ConnectionPhase::Lingering {
            return self.close(reactor, token);
        }
        self.pump(reactor, token, false);
    }

    /// The peer has closed the connection. Calls that expect an answer are cancelled, because no answer
    /// reaches it. Notifications run, also those that are not read yet.
    pub(super) fn on_hang_up(&mut self, reactor: &mut Reactor, token: Token) {
        let Some(connection) = find(&mut self.connections, token) else {
            return;
        };
        connection.peer_gone = true;
        let service = &mut self.service;
        let calls = service.calls.of(token);
        let cancelled: Vec<_> = calls
            .filter(|(_, call)| connection.drops_answer(call.reply.shape.form))
            .map(|(key, _)| key)
            .collect();
        for key in cancelled {
            if let Some(ended) = service.give_up(key) {
                let error = caller_gone(ended.begun);
                service.answer(connection, &ended, Err(error), None);
            }
        }
        self.pump(reactor, token, false);
    }

    /// Closes a connection; whatever its calls answer is for nobody.
    pub(super) fn close(&mut self, reactor: &mut Reactor, token: Token) {
        let Some(slot) = self.connections.get_mut(token.index()) else {
            return;
        };
        let Some(mut connection) = slot.take_if(|connection| connection.token == token) else {
            return;
        };
        let timers = &mut self.service.timers;
        timers.disarm(&mut connection.read_deadline, TimerTarget::Read(token));
        timers.disarm(&mut connection.write_deadline, TimerTarget::Write(token));
        let target = match connection.phase {
            ConnectionPhase::Lingering => TimerTarget::Linger(token),
            _ => TimerTarget::Idle(token),
        };
        timers.disarm(&mut connection.quiet_deadline, target);
        self.service.unfinished -= connection.accounted_bytes;
        let owner = (connection.source, token);
        let shares = &mut self.service.unfinished_shares;
        shares.remove(owner, connection.accounted_bytes);
        let unsent = &mut self.service.unsent;
        unsent.update(owner, &mut connection.counted_unsent, 0);
        reactor.close(token);
        self.service.calls.unpark(token);
        if connection.unanswered > 0 {
            let calls: Vec<_> = self.service.calls.of(token).map(|(key, _)| key).collect();
            for key in calls {
                if let Some(ended) = self.service.give_up(key) {
                    self.service.ledger.forget(ended.reply.mark);
                }
            }
            for mark in connection.marks() {
                self.service.ledger.forget(mark);
            }
        }
        if self.is_at_limit && reactor.connections() < self.service.limits.connections {
            self.is_at_limit = false;
            self.resume_listening(reactor);
        }
    }

    /// Takes the next calls of the first batch that was too long for one turn of the loop, which serves the
    /// other connections in between.
    pub(super) fn resume_batch(&mut self, reactor: &mut Reactor) {
        let Some(token) = self.service.untaken_batches.pop_front() else {
            return;
        };
        if let Some(connection) = find(&mut self.connections, token) {
            self.service.resume_batch(connection);
            self.pump(reactor, token, false);
        }
    }

    /// Answers what the threads have done: one write for each connection.
    pub(super) fn on_results(&mut self, reactor: &mut Reactor) {
        let mut done = mem::take(&mut self.service.answered_elsewhere);
        done.extend(self.service.threads.take_done());
        let mut done: Vec<_> = done
            .into_iter()
            .filter_map(|done| {
                let mut ended = self.service.calls.done(&done)?;
                let target = TimerTarget::Call(done.key);
                self.service.timers.disarm(&mut ended.timer, target);
                let outcome = done.outcome.unwrap_or_else(|| Err(too_late()));
                Some((ended, outcome, (done.out, done.took)))
            })
            .collect();
        // Stable: answers of one connection stay in the order in which they were done.
        done.sort_by_key(|(ended, _, _)| ended.token);
        let mut done = done.into_iter().peekable();
        while let Some((ended, outcome, (out, took))) = done.next() {
            let token = ended.token;
            // What ran elsewhere is cleared there, if it did not end its process.
            if ended.sent_to.is_none() && ended.begun {
                self.service.acquit(ended.reply.mark);
            }
            if token.process().is_some() {
                let name = out.as_deref();
                peer_calls::answer(&mut self.service, &ended, outcome, took, name);
                continue;
            }
            if let Some(connection) = find(&mut self.connections, token) {
                self.service
                    .answer(connection, &ended, outcome, out.as_deref());
            } else {
                // Its connection was closed in this loop, at twice limits.unfinished. `close` did not find
                // the call, because it is not in the table any more.
                self.service.ledger.forget(ended.reply.mark);
            }
            if done.peek().is_none_or(|(next, _, _)| next.token != token) {
                self.pump(reactor, token, false);
            }
        }
    }
}
