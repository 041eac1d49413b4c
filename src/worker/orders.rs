//! Handles orders to a worker: from the master, from signals, and from the death of the master.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::sys::signal::Signal;

use super::attempts::running as attempts;
use super::connection::{Connection, ConnectionPhase};
use super::drain::Drain;
use super::event_loop::{EventLoop, LINK, MASTER};
use super::pool_update;
use super::session_state::{self, SessionStep};
use super::timers::CallKey;
use super::timers::millis;
use crate::link::adoption_queue::REJOIN;
use crate::link::channel::{self, Received};
use crate::link::message::{Order, Report};
use crate::link::metrics_board::layout::CloseReason;
use crate::link::session_table::DirectOrder;
use crate::logging::{self, pluralize};
use crate::protocol::code::Code;
use crate::sys::event::{Interest, Reactor, Token};
use crate::sys::socket;

/// The time between two checks for an order of the master after the acceptor of a session has died, in milliseconds.
const ORDER_LOOK_MS: u64 = 100;

impl EventLoop {
    pub(super) fn orders(&mut self, reactor: &mut Reactor) {
        let mut shares = None;
        loop {
            match self.link.receive() {
                Received::Message(message, descriptor) => match message.body {
                    Order::Drain(limit) => self.start_drain(reactor, limit),
                    Order::Stop(limit) => self.start_stop(reactor, limit),
                    // If several arrived while this process was paused, only the last one is valid.
                    Order::Rebalance(order) => shares = Some(order),
                    Order::StopPending => self.service.stop_pending = true,
                    Order::Link(record) => {
                        if let Some(link) = descriptor {
                            self.service.forwarding.add(record, link, None);
                        }
                    }
                    Order::LinkPool(ends) => {
                        if let Some(session) = &mut self.session {
                            session.rejoined();
                        }
                        if let Some(link) = descriptor {
                            let added = self.service.forwarding.add_pool(ends, link);
                            attempts::link_added(&mut self.service, added);
                        }
                    }
                    Order::UpdatePool(generation) => {
                        pool_update::begin(&mut self.service, generation, descriptor);
                    }
                    Order::EndUpdate(generation, has_succeeded) => {
                        pool_update::end(&mut self.service, generation, has_succeeded);
                    }
                    // Only a jobs process gets them.
                    Order::ExecutorEnded(_) | Order::EndClaims | Order::JobCommand => {}
                    Order::PoolEnded => self.service.forwarding.pools.is_final = true,
                    Order::SessionLink(link) => {
                        if let Some(fd) = descriptor {
                            self.service.forwarding.add_session(link, fd, reactor);
                        }
                    }
                    Order::ReopenAccessLog => self.service.access.reopen(descriptor),
                    Order::ReopenLog => match descriptor {
                        Some(file) => drop(logging::set_output(logging::LogOutput::received(file))),
                        None => log::warn!(
                            "the reopened log was not received, because no descriptor is left: \
                                 this worker continues with the old one"
                        ),
                    },
                },
                Received::Garbage | Received::WithDescriptors(_) => {
                    log::warn!("the master sent an invalid order")
                }
                Received::Empty => break,
                Received::End => {
                    reactor.unwatch(LINK);
                    if let Some(session) = &mut self.session {
                        // The master reaches it by its record in shared memory.
                        session.is_orphan = true;
                        self.tick_ms = self.tick_ms.min(ORDER_LOOK_MS);
                        session.rejoin_later(self.service.now_ms);
                        return;
                    }
                    self.master_gone = Some(self.service.now_ms);
                    if self.is_pool() {
                        // Workers may still use this pool process, so it continues to serve. Its link also ends at an
                        // upgrade, because the new program does not keep the links to the old pool processes.
                        if !self.is_accepting {
                            self.drain.leave_now();
                        }
                        return;
                    }
                    log::error!(
                        "the master has died: this worker accepts nothing more, answers running calls \
                         and exits; start a new master"
                    );
                    return self.start_stop(reactor, self.longest_drain());
                }
            }
        }
        if let Some(shares) = shares {
            self.start_rebalance(reactor, shares);
        }
    }

    pub(super) fn on_signal(&mut self, reactor: &mut Reactor) {
        for signal in self.signals.take() {
            match signal {
                Signal::SIGQUIT => self.drain.leave_now(),
                // A pool process serves until the master orders it to exit, because workers may still need it.
                _ if self.is_pool() && self.drain.is_serving() => {
                    let _ = self.report(Report::Retiring);
                }
                _ if self.drain.is_serving() => {
                    log::info!("retires: asked by SIGTERM");
                    // If the report fails, the master notices when this worker has exited.
                    let _ = self.report(Report::Retiring);
                    self.start_drain(reactor, self.longest_drain());
                }
                // In a drain: the master's order to end now, or a late copy of the order that began the drain.
                _ => self.drain.expire_now(self.service.now_ms),
            }
        }
    }

    /// Publishes the figures that are updated only at each tick, because some of them need a system call.
    pub(super) fn publish_tick(&mut self) {
        let is_worker = !self.is_pool() && self.session.is_none();
        let session = self.session.as_ref().map(|session| session.record);
        self.service.pool_health.update();
        self.published.tick(&self.service, is_worker, session);
    }

    /// Returns whether this is a pool process and not a worker.
    pub(super) fn is_pool(&self) -> bool {
        self.service.forwarding.lane > 0
    }

    /// Handles the death of the master in a session: it answers the running calls and exits.
    pub(super) fn session_lost_master(&mut self, reactor: &mut Reactor) {
        reactor.unwatch(MASTER);
        self.master_gone = Some(self.service.now_ms);
        self.start_stop(reactor, self.drain_timeout);
    }

    /// Lets a session exit when its connection has ended and the calls of that connection are done.
    pub(super) fn end_with_connection(&mut self, reactor: &Reactor) {
        let has_ended = self.session.is_some() && reactor.connections() == 0;
        if has_ended && self.drain.is_serving() {
            let now_ms = self.service.now_ms;
            let until_ms = now_ms.saturating_add(millis(self.drain_timeout));
            self.drain.drain(now_ms, until_ms);
        }
    }

    /// Ends a session whose `max-lifetime` is over. If its acceptor is gone, obeys the orders of the master.
    pub(super) fn tick_session(&mut self, reactor: &mut Reactor) {
        let now_ms = self.service.now_ms;
        let Some(session) = &self.session else {
            return;
        };
        session.beat(now_ms);
        self.service.forwarding.pools.is_final |= session.record.has_pool_ended();
        let step = session.step(now_ms);
        self.rejoin(reactor);
        let limit = |until_ms: u64| Duration::from_millis(until_ms.saturating_sub(now_ms));
        match step {
            Some(SessionStep::Obey(DirectOrder::Drain, until_ms)) => {
                self.start_drain(reactor, limit(until_ms));
            }
            Some(SessionStep::Obey(DirectOrder::Stop, until_ms)) => {
                self.start_stop(reactor, limit(until_ms));
            }
            Some(SessionStep::EndDrain(until_ms)) => {
                log::info!(
                    "workers.drain-timeout is nearly over: the connection, which has a program of its own, \
                     ends after its answers"
                );
                if let Some(session) = &mut self.session {
                    session.drains_until_ms = u64::MAX;
                }
                self.start_stop(reactor, limit(until_ms));
            }
            Some(SessionStep::End) if self.drain.is_serving() => {
                // One line for each connection, so not in the normal log.
                log::debug!(
                    "max-lifetime of the listener is reached: the connection ends after its answers"
                );
                self.start_stop(reactor, self.drain_timeout);
            }
            Some(SessionStep::End) | None => {}
        }
    }

    /// Sends a link to the next acceptor of the listener, if the acceptor of this session is gone: without one, it
    /// gets no links to pool processes.
    fn rejoin(&mut self, reactor: &mut Reactor) {
        let now_ms = self.service.now_ms;
        let due = (self.session.as_mut()).filter(|session| session.rejoins_at_ms <= now_ms);
        let Some(session) = due.filter(|_| self.drain.is_serving()) else {
            return;
        };
        session.rejoin_later(now_ms);
        if let Ok((acceptor_end, own_end)) = channel::pair()
            && reactor.watch(LINK, &own_end, Interest::Read).is_ok()
        {
            // If the queue is full, the link ends at once, and this is tried again.
            let link = [acceptor_end.as_fd()];
            let _ = socket::send_packet(&self.adoption.tx, &[&REJOIN], &link);
            session.rejoins_at_ms = u64::MAX;
            self.link = own_end;
        }
    }

    /// Prepares the orderly end of a session's connection: the client gets a normal close and no reset, because the
    /// session has not crashed.
    pub(super) fn before_closing(&self, reactor: &Reactor, token: Token) {
        if let Some(session) = &self.session
            && let Some(connection) = reactor.descriptor(token)
        {
            socket::reset_when_closed(connection, false);
            // The connection may have been handed over. Then it counts in the process that has adopted it.
            session.record.set_source(None);
        }
    }

    /// Records until when a session with a program of its own must exit. Its connection cannot be handed over,
    /// because the program keeps state for it. Returns whether the session has such a program.
    fn stays_until(&mut self, until_ms: u64) -> bool {
        let has_own = self.service.threads.pools().has_own();
        let Some(session) = self.session.as_mut().filter(|_| has_own) else {
            return false;
        };
        session.drains_until_ms = session.drains_until_ms.min(until_ms);
        self.tick_ms = self.tick_ms.min(ORDER_LOOK_MS);
        true
    }

    /// Handles a session that gets its first program while it drains: it serves until the end of the drain.
    pub(super) fn stay_with_programs(&mut self) {
        if self.drain.is_handing_off() && self.stays_until(self.drain.until_ms()) {
            self.drain = Drain::default();
        }
    }

    /// Lets the programs of the connection serve. When one of them has ended, the calls that wait for it are
    /// answered with `crashed`, and the connection is closed, because its state is gone.
    pub(super) fn serve_own_programs(&mut self, reactor: &mut Reactor) {
        if self.session.is_none() {
            return;
        }
        let failed = loop {
            match session_state::give_out(&mut self.service) {
                Ok(Some(late)) => self.reject_late_call(reactor, late),
                Ok(None) => break None,
                Err(failed) => break Some(failed),
            }
        };
        if reactor.connections() > 0 {
            self.stay_with_programs();
        }
        let pools = self.service.threads.pools();
        let ended = pools.ended().map(|(number, name, reason)| {
            let ended = format!(
                "the program of the pool {name} has ended, and the state of the connection with it"
            );
            (number, reason.unwrap_or(ended))
        });
        let Some((number, reason)) = failed.or(ended) else {
            return;
        };
        let of_lane = |key: &CallKey| {
            let call = self.service.calls.table.get(*key);
            call.is_some_and(|call| self.service.calls.lane(call.method) == number + 1)
        };
        let left: Vec<CallKey> = self
            .service
            .calls
            .all()
            .into_iter()
            .filter(of_lane)
            .collect();
        for key in left {
            self.abort_call(reactor, key, Code::Crashed, &reason);
        }
        self.close_after_answers(reactor);
    }

    /// Takes no further call from the connection, and closes it after the answers.
    fn close_after_answers(&mut self, reactor: &mut Reactor) {
        let open = self.connections.iter_mut().flatten();
        let open = open.filter(|connection| connection.phase == ConnectionPhase::Open);
        let open: Vec<_> = open
            .map(|connection| {
                connection.phase = ConnectionPhase::Closing;
                connection.token
            })
            .collect();
        for token in open {
            self.pump(reactor, token, false);
        }
    }

    pub(super) fn start_drain(&mut self, reactor: &mut Reactor, limit: Duration) {
        let until_ms = self.service.now_ms.saturating_add(millis(limit));
        if self.stays_until(until_ms) {
            return;
        }
        self.end_rebalance(reactor);
        (self.show_draining)();
        reactor.drain_accept_queues(false, self);
        self.end_yield();
        attempts::drain(&mut self.service, until_ms);
        let now = self.service.now_ms;
        let limit = self.limit_of_calls(limit);
        self.drain.drain(now, now.saturating_add(millis(limit)));
        self.send_quiescent(reactor);
    }

    /// Reads again from connections that the worker did not read for a short time so that they become quiescent, but
    /// that did not become quiescent. Their calls take longer, and must not delay the next ones.
    pub(super) fn resume_reading(&mut self, reactor: &mut Reactor) {
        self.advance_open(reactor, |connection| connection.is_read_paused);
        self.queue_calls(reactor);
        self.settle_programs(reactor);
    }

    /// Takes nothing more from any connection, because half of the drain is over and some are never quiescent. They
    /// become quiescent when their calls are answered.
    pub(super) fn stop_reading(&mut self, reactor: &mut Reactor) {
        self.service.limits.pipeline = 0;
        self.advance_open(reactor, |_| true);
    }

    pub(super) fn start_stop(&mut self, reactor: &mut Reactor, limit: Duration) {
        self.end_rebalance(reactor);
        // A client in the accept queue is connected and may have sent a call. Connections that siblings
        // have sent can go to no other worker.
        reactor.drain_accept_queues(true, self);
        self.end_yield();
        self.stop_giving(reactor);
        self.service.stopping = true;
        self.service.journal.stops();
        // Calls that were not taken because of the handoff are answered now.
        self.service.limits.pipeline = usize::MAX;
        let now = self.service.now_ms;
        attempts::drain(&mut self.service, now.saturating_add(millis(limit)));
        let limit = self.limit_of_calls(limit);
        self.drain.stop(now.saturating_add(millis(limit)));
        self.advance_open(reactor, |_| true);
    }

    pub(super) fn advance_open(
        &mut self,
        reactor: &mut Reactor,
        which: impl Fn(&Connection) -> bool,
    ) {
        let open: Vec<Token> = self
            .connections
            .iter()
            .flatten()
            .filter(|connection| connection.phase == ConnectionPhase::Open && which(connection))
            .map(|connection| connection.token)
            .collect();
        for token in open {
            self.pump(reactor, token, false);
        }
    }

    pub(super) fn close_all_quiescent(&mut self, reactor: &mut Reactor, partial: bool) {
        let resting: Vec<Token> = self
            .connections
            .iter()
            .flatten()
            .filter(|connection| connection.phase == ConnectionPhase::Open)
            .filter(|connection| {
                connection.is_quiescent() || (partial && connection.unanswered == 0)
            })
            .filter(|connection| reactor.unsent(connection.token) == 0)
            .map(|connection| connection.token)
            .collect();
        for token in resting {
            self.close_quiescent(reactor, token, CloseReason::Stop);
        }
    }

    /// Prepares the end of the remaining connections at the exit, and counts them.
    pub(super) fn leaves(&self, reactor: &Reactor) {
        for connection in self.connections.iter().flatten() {
            self.before_closing(reactor, connection.token);
        }
        let connected = self.connections.iter().flatten();
        let left = connected
            .filter(|it| it.phase != ConnectionPhase::Lingering)
            .count();
        let service = &self.service;
        let writer = service.counts.writer;
        let open = self.connections.iter().flatten().count() as u64;
        writer.add(&writer.block.closed[CloseReason::Stop as usize], open);
        service.journal.record_exit(left, &service.record.reset);
    }

    /// Answers all remaining calls with an error, because the time of the drain has passed.
    pub(super) fn give_up_all(&mut self, reactor: &mut Reactor) {
        // The waiting calls come first, because a freed thread would begin one of them.
        let mut left = self.service.calls.all();
        left.retain(|key| !self.service.attempts.runs(*key));
        if !left.is_empty() {
            log::warn!(
                "{} done when the drain time had passed (workers.drain-timeout): answered with stopping",
                pluralize(left.len(), "call is not", "calls are not")
            );
        }
        self.service.stopping = true;
        for key in left {
            self.abort_call(
                reactor,
                key,
                Code::Stopping,
                "the server stops and could not wait longer",
            );
        }
        self.close_all_quiescent(reactor, true);
    }
}
