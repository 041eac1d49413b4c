//! Handles the events of connections: takes calls from their bytes, sends answers, and ends them.
//!
//! Each change of a connection ends in `pump`. It sends answers, takes the calls that may be taken, and
//! sets reading and deadlines again. A failure of one connection ends only that connection.

use std::mem;

use super::access_log::turn;
use super::attempts::running as attempts;
use super::call_errors::{caller_gone, too_late};
use super::connection::{ConnectionPhase, HIGH_WATER};
use super::event_loop::{EventLoop, WarningKind, find};
use super::peer_calls;
use super::rebalance::is_transferable;
use super::timers::{TimerTarget, millis};
use crate::link::metrics_board::layout::CloseReason;
use crate::link::source_table::peer_name;
use crate::sys::event::{Reactor, Token};
use crate::sys::socket;

/// A client that sent or received bytes within this time may have an unread answer or a call in transit.
const ACTIVE_MS: u64 = 1000;
/// How long the peer may take to close a connection that we have ended.
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
            let wait_ms = socket.map_or(0, socket::waited_ms);
            self.service.accept_wait.record(wait_ms);
            // A connection that another process has handed over was counted there with its first bytes.
            if connection.peer.is_some() && connection.dialect.is_none() {
                self.service.counts.add_accept_wait(wait_ms);
            }
        }
        let peer = connection.peer;
        self.service.journal.opens();
        let dropped = connection.skip(bytes);
        let uncounted = connection
            .dialect
            .is_none()
            .then_some(connection.input.len());
        let used = if dropped == 0 && connection.input.is_empty() {
            self.service.read_requests(connection, bytes, unsent)
        } else {
            dropped
        };
        if connection.dialect.is_some() {
            let length = bytes.len() + uncounted.unwrap_or(0);
            self.service.counts.add_received(connection.dialect, length);
        }
        let kept = connection.keep(&bytes[used..]);
        self.service.journal.closes(connection, bytes.len());
        if let Err(error) = kept {
            let text = format!(
                "a connection is closed, because there is no memory for its input: {error}"
            );
            self.warn_limited(WarningKind::Unfinished, &text);
            self.service.accept_wait.now_ms = 0;
            // Send the collected answers now, or they would go to another connection.
            reactor.send(token, &mut self.service.out);
            self.service.journal.sent();
            return self.close_for(reactor, token, CloseReason::Limit);
        }
        let whole = used > dropped || dropped > 0 && connection.discarding.is_none();
        self.pump(reactor, token, whole);
        self.service.accept_wait.now_ms = 0;
        if let Some(text) = self.service.met_protocol.take() {
            let peer = peer_name(peer);
            self.warn_limited(WarningKind::Protocol, &format!("{text} peer={peer}"));
        }
    }

    /// Sends answers, takes the calls that may be taken now, and sets reading, deadlines and the end.
    /// `whole` says that a call was taken just before.
    pub(super) fn pump(&mut self, reactor: &mut Reactor, token: Token, mut whole: bool) {
        let Some(connection) = find(&mut self.connections, token) else {
            self.service.journal.sent();
            return self.service.out.clear();
        };
        let service = &mut self.service;
        let (mut shed, mut victim) = (false, None);
        loop {
            if !service.out.is_empty() {
                connection.active_ms = service.now_ms;
                let (dialect, length) = (connection.dialect, service.out.len());
                service.counts.add_sent(dialect, length);
                turn::between_answers(service);
            }
            reactor.send(token, &mut service.out);
            service.journal.sent();
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
                // If other calls of it are in flight or it is to be handed over, it is not refused: only
                // reading stops.
                let goes_elsewhere = self.drain.is_handing_off();
                let stays = !service.has_no_room_for(connection);
                if stays || goes_elsewhere || connection.unanswered > 0 {
                    break;
                }
                victim = service.victim_for(connection);
                if victim.is_some() {
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
        // Do this while the reactor still lends its buffer: the kept bytes are lost with this process.
        service.journal.update_flags(connection);
        let unsent = reactor.unsent(token);
        let may_rest = self.drain.is_handing_off() && service.is_soon_quiescent(connection, unsent);
        if may_rest {
            self.drain.look_again(service.now_ms);
        }
        let takes_no_more = may_rest
            || !service.may_take(connection, unsent)
            || connection.unanswered > 0 && service.has_no_room_for(connection);
        // Input to be dropped is no call.
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
            // One large answer must not keep its memory for the life of the worker.
            service.out = Vec::new();
        }
        let now = service.now_ms;
        let sent = connection.input.len();
        let waits = connection.http.as_ref().is_some_and(|it| it.waits(sent));
        let holds_back = connection.is_read_paused || waits && connection.unanswered > 0;
        if !connection.has_partial_input() || holds_back || connection.peer_closed {
            // While we do not read, the delay is not the fault of the client.
            service
                .timers
                .disarm(&mut connection.read_deadline, TimerTarget::Read(token));
        } else if whole || connection.read_deadline == 0 {
            let at = now + millis(service.limits.read_timeout);
            service
                .timers
                .arm(&mut connection.read_deadline, at, TimerTarget::Read(token));
            // The beginning of a call. A client with Nagle's algorithm sends the rest after an
            // acknowledgement, which the kernel delays by 40 ms to send it with an answer.
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
        if let Some(victim) = victim {
            let may_refuse = self.may_be_refused(victim);
            self.refuse_unfinished(reactor, if may_refuse { victim } else { token });
        }
        if rests {
            self.finish_if_idle(reactor, token);
        }
        if self.service.unsent.is_exceeded() {
            self.close_most_unsent(reactor);
        }
    }

    /// Returns whether the input of a connection is only an unfinished call.
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
            "a client's unfinished call is refused: the unfinished calls of this worker have reached \
             limits.unfinished, and this client has the most",
        );
    }

    /// Hands over or ends a connection whose calls are all answered and sent, if it is time for that.
    fn finish_if_idle(&mut self, reactor: &mut Reactor, token: Token) {
        let Some(connection) = find(&mut self.connections, token) else {
            return;
        };
        let open = connection.phase == ConnectionPhase::Open;
        // Input that could not be taken any more may contain calls. The worker that adopts the connection
        // answers them.
        let has_more = !connection.peer_closed || !connection.input.is_empty();
        if open && self.drain.is_handing_off() && has_more {
            return self.give(reactor, token);
        }
        let again = self.rebalancing.after_change;
        if self.rebalancing.gives() && is_transferable(connection, again, self.service.now_ms) {
            return self.give_by_order(reactor, token);
        }
        if connection.peer_closed && connection.phase != ConnectionPhase::Lingering {
            if connection.has_partial_input() {
                log::debug!("a client ended in the middle of a frame");
            }
            return self.close(reactor, token);
        }
        if connection.phase == ConnectionPhase::Closing {
            // If more bytes arrived after an immediate close, the kernel would reset the connection, and
            // the client could lose an answer that it has not read.
            connection.phase = ConnectionPhase::Lingering;
            self.service.journal.update_flags(connection);
            reactor.shutdown(token);
            let at = self.service.now_ms + LINGER_MS;
            let armed = &mut connection.quiet_deadline;
            self.service.timers.disarm(armed, TimerTarget::Idle(token));
            self.service
                .timers
                .arm(armed, at, TimerTarget::Linger(token));
        }
    }

    /// Closes a connection on which everything is answered and sent. It lingers, unless it has been
    /// silent for so long that its client must have read everything.
    pub(super) fn close_quiescent(
        &mut self,
        reactor: &mut Reactor,
        token: Token,
        reason: CloseReason,
    ) {
        let Some(connection) = find(&mut self.connections, token) else {
            return;
        };
        connection.ends_by(reason);
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

    /// Handles a connection that its peer has closed. Calls that expect an answer are cancelled, because no answer
    /// reaches the peer. Notifications run, including those that are not read yet, and enqueues are sent to the jobs
    /// process, also if there is none at the moment.
    pub(super) fn on_hang_up(&mut self, reactor: &mut Reactor, token: Token) {
        let Some(connection) = find(&mut self.connections, token) else {
            return;
        };
        connection.peer_gone = true;
        let service = &mut self.service;
        let cancelled: Vec<_> = peer_calls::cancellable(service, token)
            .filter(|(_, call)| connection.drops_answer(call.reply.shape.form))
            .map(|(key, _)| key)
            .collect();
        for key in cancelled {
            if let Some(ended) = service.give_up(key) {
                let error = caller_gone(ended.begun);
                service.answer(connection, &ended, (Err(error), None), None);
            }
        }
        self.pump(reactor, token, false);
    }

    /// Closes a connection for a reason that is not its client's.
    pub(super) fn close_for(&mut self, reactor: &mut Reactor, token: Token, reason: CloseReason) {
        self.with_connection(token, |connection| connection.ends_by(reason));
        self.close(reactor, token);
    }

    /// Closes a connection. The answers of its calls are dropped. An enqueue that was read is stored all the same.
    pub(super) fn close(&mut self, reactor: &mut Reactor, token: Token) {
        let Some(slot) = self.connections.get_mut(token.index()) else {
            return;
        };
        let Some(mut connection) = slot.take_if(|connection| connection.token == token) else {
            return;
        };
        self.service.counts.count_end(connection.end);
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
        self.before_closing(reactor, token);
        self.service.unused.remove(&mut connection);
        (self.service.source_limits).release(connection.source_key);
        reactor.close(token);
        self.service.calls.unpark(token);
        if connection.unanswered > 0 {
            let calls: Vec<_> = peer_calls::cancellable(&self.service, token)
                .map(|(key, _)| key)
                .collect();
            for key in calls {
                if let Some(ended) = self.service.give_up(key) {
                    self.end_unanswered(&ended);
                }
            }
            for mark in connection.marks() {
                self.service.journal.forget(mark);
            }
        }
        if self.is_at_limit && reactor.connections() < self.service.limits.connections {
            self.is_at_limit = false;
            self.resume_listening(reactor);
        }
        self.return_to_accepting(reactor);
    }

    /// Takes the next calls of the first batch that was too long for one turn of the loop, which serves
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

    /// Answers the finished calls: one write for each connection.
    pub(super) fn on_results(&mut self, reactor: &mut Reactor) {
        let done = attempts::take_call_results(&mut self.service);
        if !done.is_empty() {
            self.service.counts.read_clock();
        }
        let mut done: Vec<_> = done
            .into_iter()
            .filter_map(|done| {
                let it = &mut self.service;
                (it.slow).ended((&it.calls, &it.registry, &it.counts, it.now_ms), &done);
                let (call, cpu) = (self.service.calls.get(done.key), done.runner.cpu);
                // A process that ran it for this one has counted it.
                if let Some(call) = call.filter(|call| call.sent_to.is_none() && !cpu.is_zero()) {
                    self.service.counts.add_command_cpu(call.method, cpu);
                }
                let mut ended = self.service.calls.done(&done)?;
                if let Some(start) = ended.access.get_mut() {
                    start.runner = done.runner;
                }
                let target = TimerTarget::Call(done.key);
                self.service.timers.disarm(&mut ended.timer, target);
                let outcome = done.outcome.unwrap_or_else(|| Err(too_late()));
                Some((ended, outcome, (done.out, done.took, done.runner)))
            })
            .collect();
        // The sort is stable: answers of one connection stay in the order in which they were done.
        done.sort_by_key(|(ended, _, _)| ended.token);
        let mut done = done.into_iter().peekable();
        while let Some((ended, outcome, (out, took, runner))) = done.next() {
            let token = ended.token;
            // The other process clears the suspicion, if the call did not end it.
            if ended.sent_to.is_none() && ended.begun {
                (self.service.quarantine).clear_suspicion(ended.reply.mark.key());
            }
            if token.process().is_some() {
                let rest = (took, runner, out.as_deref());
                peer_calls::answer(&mut self.service, &ended, outcome, rest);
                continue;
            }
            if let Some(connection) = find(&mut self.connections, token) {
                let outcome = (outcome, Some(took));
                self.service
                    .answer(connection, &ended, outcome, out.as_deref());
            } else {
                // It is an enqueue. Or its connection was closed in this loop, at twice limits.unfinished, and `close`
                // did not find the call, because it is no longer in the table.
                self.end_unanswered(&ended);
            }
            if done.peek().is_none_or(|(next, _, _)| next.token != token) {
                self.pump(reactor, token, false);
            }
        }
    }
}
