//! Sends connections to siblings that have fewer, as the master has counted, and does not take them back.
//!
//! For a short time after an order each worker adopts only the ordered number of connections, so that
//! connections reach the workers with fewer. Quiescent connections are sent at once, the others when they
//! become quiescent in that time. A connection in the middle of a call or a frame stays. After that time,
//! any worker adopts the connections that are left in the queue.

use std::collections::HashSet;
use std::sync::atomic::Ordering::Relaxed;

use super::connection::{Connection, ConnectionPhase};
use super::event_loop::EventLoop;
use super::timers::TimerTarget;
use crate::link::message::{RebalanceOrder, Report};
use crate::sys::event::{Reactor, Token};

/// For this time in milliseconds a connection is not moved again, unless the workers have changed.
const STAYS_MS: u64 = 10_000;
/// The number of accepts after which a worker checks whether it has too many connections.
const ACCEPTS_PER_LOOK: u32 = 4;
/// How long an order holds.
const REBALANCE_TTL_MS: u64 = 150;

impl EventLoop {
    /// Executes the master's order: sends and adopts the given numbers of connections.
    pub(super) fn spread(&mut self, reactor: &mut Reactor, shares: RebalanceOrder) {
        if !self.drain.is_serving() {
            return;
        }
        let at = self.service.now_ms + REBALANCE_TTL_MS;
        let timers = &mut self.service.timers;
        timers.arm(&mut self.spreading.until, at, TimerTarget::Spread);
        self.spreading.take = Some(shares.take);
        self.spreading.after_change = shares.after_change;
        reactor.set_adopting(shares.take > 0);
        // Those that wait for room in the queue were already sent by the previous order.
        let waiting: HashSet<Token> = self.waiting_to_give.iter().copied().collect();
        self.spreading.give = shares.give.saturating_sub(waiting.len() as u32);
        let now_ms = self.service.now_ms;
        let mut resting: Vec<&Connection> = self
            .connections
            .iter()
            .flatten()
            .filter(|connection| {
                is_transferable(connection, shares.after_change, now_ms)
                    && reactor.unsent(connection.token) == 0
            })
            .filter(|connection| !waiting.contains(&connection.token))
            .collect();
        // Recently moved connections come last.
        resting.sort_by_key(|connection| !has_stayed(connection, now_ms));
        resting.truncate(self.spreading.give as usize);
        let resting: Vec<Token> = resting.iter().map(|connection| connection.token).collect();
        log::debug!(
            "gives {} of {} connections to siblings, takes {}",
            resting.len(),
            shares.give,
            shares.take
        );
        for token in resting {
            self.give_by_order(reactor, token);
        }
    }

    pub(super) fn give_by_order(&mut self, reactor: &mut Reactor, token: Token) {
        self.spreading.give -= 1;
        self.give(reactor, token);
    }

    /// Records an adopted connection. Returns whether it came because of rebalancing.
    pub(super) fn has_adopted(&mut self, reactor: &mut Reactor) -> bool {
        let by_order = self.spreading.take.is_some_and(|left| left > 0);
        if let Some(left) = &mut self.spreading.take {
            *left = left.saturating_sub(1);
            if *left == 0 {
                reactor.set_adopting(false);
            }
        }
        by_order
    }

    /// Records an accepted connection. After some accepts it checks whether this worker has more than its
    /// share of the connections. If so, it leaves accepting to the others for a short time, and the
    /// master counts all connections.
    pub(super) fn has_accepted(&mut self, reactor: &mut Reactor) {
        self.accepts += 1;
        if self.accepts < ACCEPTS_PER_LOOK {
            return;
        }
        self.accepts = 0;
        let forwarding = &self.service.forwarding;
        let own = reactor.connections();
        let (mut workers, mut total) = (1, own);
        for other in forwarding.other_workers(self.service.now_ms) {
            workers += 1;
            total += other.connections.load(Relaxed) as usize;
        }
        if own * workers > total + (total / 4).max(workers) && self.drain.is_serving() {
            // If it cannot be sent, the next check sends it.
            self.request(Report::Uneven);
            self.leave_accepting(reactor);
        }
    }

    /// Ends the order, because its time has passed or the worker no longer serves.
    pub(super) fn end_spreading(&mut self, reactor: &mut Reactor) {
        let timers = &mut self.service.timers;
        timers.disarm(&mut self.spreading.until, TimerTarget::Spread);
        if std::mem::take(&mut self.spreading).take.is_some() {
            reactor.set_adopting(true);
        }
        self.resume_listening(reactor);
    }
}

/// Returns whether it was not moved recently.
fn has_stayed(connection: &Connection, now_ms: u64) -> bool {
    connection.rebalanced_ms == 0 || now_ms.saturating_sub(connection.rebalanced_ms) >= STAYS_MS
}

/// Returns whether it is quiescent without an unfinished frame, because its read deadline would start
/// again elsewhere. `again` allows recently moved connections.
pub(super) fn is_transferable(connection: &Connection, again: bool, now_ms: u64) -> bool {
    (again || has_stayed(connection, now_ms))
        && connection.phase == ConnectionPhase::Open
        && !connection.peer_closed
        && connection.is_quiescent()
}
