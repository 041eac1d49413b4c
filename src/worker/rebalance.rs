//! Sends connections to siblings that have fewer. The master counts them and gives the orders.
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

/// How long a connection is not moved again, in milliseconds, unless the workers have changed.
const STAYS_MS: u64 = 10_000;
/// The number of accepts after which a worker checks whether it has too many connections.
const ACCEPTS_PER_LOOK: u32 = 4;
/// How long an order is valid, in milliseconds.
const REBALANCE_TTL_MS: u64 = 150;

impl EventLoop {
    /// Begins an order of the master: sends and adopts the given numbers of connections.
    pub(super) fn start_rebalance(&mut self, reactor: &mut Reactor, shares: RebalanceOrder) {
        if !self.drain.is_serving() {
            return;
        }
        let at = self.service.now_ms + REBALANCE_TTL_MS;
        let timers = &mut self.service.timers;
        timers.arm(&mut self.rebalancing.until, at, TimerTarget::Rebalance);
        self.rebalancing.take = Some(shares.take);
        self.rebalancing.after_change = shares.after_change;
        reactor.set_adopting(shares.take > 0);
        if shares.take > 0 {
            // The order before may have stopped adopting.
            self.resume_listening(reactor);
        }
        // Connections that wait for room in the queue belong to the previous order, and count for this one.
        let waiting: HashSet<Token> = self.waiting_to_give.iter().copied().collect();
        self.rebalancing.give = shares.give.saturating_sub(waiting.len() as u32);
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
        resting.truncate(self.rebalancing.give as usize);
        let resting: Vec<Token> = resting.iter().map(|connection| connection.token).collect();
        log::debug!(
            "rebalancing: sends {} of {} connections, adopts {}",
            resting.len(),
            shares.give,
            shares.take
        );
        for token in resting {
            self.give_by_order(reactor, token);
        }
    }

    pub(super) fn give_by_order(&mut self, reactor: &mut Reactor, token: Token) {
        self.rebalancing.give -= 1;
        self.give(reactor, token);
    }

    /// Records an adopted connection. Returns whether it came because of rebalancing.
    pub(super) fn note_adopted(&mut self, reactor: &mut Reactor) -> bool {
        let by_order = self.rebalancing.take.is_some_and(|left| left > 0);
        if let Some(left) = &mut self.rebalancing.take {
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
    pub(super) fn note_accepted(&mut self, reactor: &mut Reactor) {
        self.accepts += 1;
        if self.accepts < ACCEPTS_PER_LOOK {
            return;
        }
        self.accepts = 0;
        if self.has_too_many(reactor) && self.drain.is_serving() {
            // If it cannot be sent, the next check sends it.
            self.request(Report::Uneven);
            self.yield_accepting(reactor);
        }
    }

    /// Accepts again if this worker has left accepting to the others, and does not have too many connections any more.
    /// Call it after the end of a connection.
    pub(super) fn return_to_accepting(&mut self, reactor: &mut Reactor) {
        if self.service.record.has_yielded.load(Relaxed) > 0 && !self.has_too_many(reactor) {
            self.end_yield();
            self.resume_listening(reactor);
        }
    }

    /// Returns whether this worker has more than its share of the connections of all workers.
    fn has_too_many(&self, reactor: &Reactor) -> bool {
        let own = reactor.connections();
        let (mut workers, mut total) = (1, own);
        for other in self.service.forwarding.other_workers(self.service.now_ms) {
            workers += 1;
            total += other.connections.load(Relaxed) as usize;
        }
        own * workers > total + (total / 4).max(workers)
    }

    /// Ends the order, because its time has passed or the worker no longer serves.
    pub(super) fn end_rebalance(&mut self, reactor: &mut Reactor) {
        let timers = &mut self.service.timers;
        timers.disarm(&mut self.rebalancing.until, TimerTarget::Rebalance);
        if std::mem::take(&mut self.rebalancing).take.is_some() {
            reactor.set_adopting(true);
        }
        self.resume_listening(reactor);
    }
}

/// Returns whether it was not moved recently.
fn has_stayed(connection: &Connection, now_ms: u64) -> bool {
    connection.rebalanced_ms == 0 || now_ms.saturating_sub(connection.rebalanced_ms) >= STAYS_MS
}

/// Returns whether a connection may be sent: it is quiescent and has no unfinished frame, whose read deadline would
/// start again in the other worker. `again` allows recently moved connections.
pub(super) fn is_transferable(connection: &Connection, again: bool, now_ms: u64) -> bool {
    (again || has_stayed(connection, now_ms))
        && connection.phase == ConnectionPhase::Open
        && !connection.peer_closed
        && connection.is_quiescent()
}
