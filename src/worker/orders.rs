//! What a worker is told: by the master, by a signal, by the master's death; and how it obeys.

use std::time::Duration;

use nix::sys::signal::Signal;

use super::call_dispatcher::millis;
use super::connection::{Connection, ConnectionPhase};
use super::event_loop::{EventLoop, LINK};
use crate::link::channel::Received;
use crate::link::message::{Order, Report};
use crate::logging::{self, pluralize};
use crate::protocol::code::Code;
use crate::sys::event::{Reactor, Token};

impl EventLoop {
    pub(super) fn orders(&mut self, reactor: &mut Reactor) {
        let mut shares = None;
        loop {
            match self.link.receive() {
                Received::Message(message, descriptor) => match message.body {
                    Order::Drain(limit) => self.start_drain(reactor, limit),
                    Order::Stop(limit) => self.start_stop(reactor, limit),
                    // Of several that came while this worker was stopped, the last one is true.
                    Order::Rebalance(order) => shares = Some(order),
                    Order::StopPending => self.service.stop_pending = true,
                    Order::Link(record) => {
                        if let Some(link) = descriptor {
                            self.service.forwarding.add(record, link);
                        }
                    }
                    Order::ReopenLog => match descriptor {
                        Some(file) => drop(logging::set_output(logging::LogOutput::received(file))),
                        None => log::warn!(
                            "the reopened log did not come along, for want of a descriptor: \
                                 this worker goes on with the old one"
                        ),
                    },
                },
                Received::Garbage | Received::WithDescriptors(_) => {
                    log::warn!("the master sent something that is no order")
                }
                Received::Empty => break,
                Received::End => {
                    reactor.unwatch(LINK);
                    self.master_gone = Some(self.service.now_ms);
                    if self.is_pool() {
                        // Workers may use it; after an upgrade another program is the master.
                        if !self.is_accepting {
                            self.drain.leave_now();
                        }
                        return;
                    }
                    log::error!(
                        "the master has died: this worker accepts nothing more, answers what runs \
                         and leaves; start a new master"
                    );
                    return self.start_stop(reactor, self.drain_timeout);
                }
            }
        }
        if let Some(shares) = shares {
            self.spread(reactor, shares);
        }
    }

    pub(super) fn on_signal(&mut self, reactor: &mut Reactor) {
        for signal in self.signals.take() {
            match signal {
                Signal::SIGQUIT => self.drain.leave_now(),
                // It serves until it is ordered to leave.
                _ if self.is_pool() && self.drain.is_serving() => {
                    let _ = self.report(Report::Retiring);
                }
                _ if self.drain.is_serving() => {
                    log::info!("retires: asked by SIGTERM");
                    // Untold, the master finds out when this worker has left.
                    let _ = self.report(Report::Retiring);
                    self.start_drain(reactor, self.drain_timeout);
                }
                // To one that drains: the master's last word, or what it does already.
                _ => self.drain.expire_now(self.service.now_ms),
            }
        }
    }

    /// Whether this is a pool process, and not a worker.
    fn is_pool(&self) -> bool {
        self.service.forwarding.lane > 0
    }

    /// A pool process whose master is gone leaves when no process uses it any more, at `drain-timeout` at
    /// the latest.
    pub(super) fn leave_without_master(&mut self, reactor: &mut Reactor) {
        if let Some(since) = self.master_gone
            && self.is_pool()
            && self.drain.is_serving()
        {
            let end = since.saturating_add(millis(self.drain_timeout));
            if self.service.forwarding.peers.is_empty() || self.service.now_ms >= end {
                self.start_drain(reactor, self.drain_timeout);
            }
        }
    }

    pub(super) fn start_drain(&mut self, reactor: &mut Reactor, limit: Duration) {
        self.end_spreading(reactor);
        (self.show_draining)();
        reactor.drain_accept_queues(false, self);
        let now = self.service.now_ms;
        self.drain.drain(now, now.saturating_add(millis(limit)));
        self.send_quiescent(reactor);
    }

    /// Some connections were read no further, so that they come to rest, and did not: their calls
    /// take longer, and nobody is to wait for that.
    pub(super) fn resume_reading(&mut self, reactor: &mut Reactor) {
        self.advance_open(reactor, |connection| connection.is_read_paused);
        self.queue_calls(reactor);
        self.settle_programs(reactor);
    }

    /// Half of the drain is over and some connections never rest: nothing more is taken from
    /// them, so that they do once what runs is answered.
    pub(super) fn stop_reading(&mut self, reactor: &mut Reactor) {
        self.service.limits.pipeline = 0;
        self.advance_open(reactor, |_| true);
    }

    pub(super) fn start_stop(&mut self, reactor: &mut Reactor, limit: Duration) {
        self.end_spreading(reactor);
        // Who is in a queue has connected and may have sent a call already, and what siblings have
        // passed on has nobody else to go to.
        reactor.drain_accept_queues(true, self);
        self.stop_giving(reactor);
        self.service.stopping = true;
        self.service.ledger.stops();
        // What was not taken for the handoff's sake is answered now.
        self.service.limits.pipeline = usize::MAX;
        let now = self.service.now_ms;
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

    pub(super) fn close_resting(&mut self, reactor: &mut Reactor, partial: bool) {
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
            self.close_quiescent(reactor, token);
        }
    }

    /// The worker leaves. Who is still connected, and has not been told of the end, is counted.
    pub(super) fn leaves(&self) {
        let connected = self.connections.iter().flatten();
        let left = connected
            .filter(|it| it.phase != ConnectionPhase::Lingering)
            .count();
        let service = &self.service;
        service.ledger.record_exit(left, &service.record.reset);
    }

    /// The drain's time is over: who still waits gets an answer, as far as it can be sent.
    pub(super) fn give_up_all(&mut self, reactor: &mut Reactor) {
        // Those that wait first: a thread that is let go would begin one of them at this late hour.
        let left = self.service.calls.all();
        if !left.is_empty() {
            log::warn!(
                "{} done and can't be waited for any longer: answered with stopping",
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
        self.close_resting(reactor, true);
    }
}
