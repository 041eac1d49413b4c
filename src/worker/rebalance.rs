//! Giving connections to siblings that have fewer, as the master has counted it, and not taking
//! them back.
//!
//! For a moment after such an order each worker takes no more out of the adoption queue than it was
//! told to, so that what one gives reaches those that it is meant for. What rests is given at once,
//! the others as they come to rest in that time; one in the middle of a call or a frame stays. After the
//! moment all is as before: who is left in the queue then is taken by whoever is first.

use std::collections::HashSet;

use super::connection::{Connection, ConnectionPhase};
use super::event_loop::EventLoop;
use super::timers::TimerTarget;
use crate::link::message::{RebalanceOrder, Report};
use crate::sys::event::{Reactor, Token};

/// For this long a connection is not moved a second time, unless the workers have changed.
const STAYS_MS: u64 = 10_000;
/// Accepts after which it is looked whether this worker has too many connections.
const ACCEPTS_PER_LOOK: u32 = 4;
/// For how long one that has too many leaves accepting to the others. A worker that counts and does not
/// run, because it is stopped, costs new connections so much.
const LEAVE_MS: u64 = 3;
/// How long an order holds.
const REBALANCE_TTL_MS: u64 = 150;

impl EventLoop {
    /// The master has counted: gives so many, takes so many.
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
        // Those that wait for room in the queue were given already, by the order before.
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
        // Those that were moved lately come last.
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

    /// One was taken out of the queue. Returns whether it came for the sake of evenness.
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

    /// One was accepted. Now and then it is looked whether this worker has more than its share of the
    /// connections. Then it leaves accepting to the others for a moment, and the master counts all
    /// connections.
    pub(super) fn has_accepted(&mut self, reactor: &mut Reactor) {
        self.accepts += 1;
        if self.accepts < ACCEPTS_PER_LOOK {
            return;
        }
        self.accepts = 0;
        let forwarding = &self.service.forwarding;
        let (workers, others) = forwarding.other_connections(self.service.now_ms);
        let (workers, own) = (workers + 1, reactor.connections());
        let total = others + own;
        if own * workers > total + (total / 4).max(workers) && self.drain.is_serving() {
            // Untold, it is told the next time.
            self.request(Report::Uneven);
            reactor.leave_listeners();
            let at = self.service.now_ms + LEAVE_MS;
            let timers = &mut self.service.timers;
            timers.arm(&mut self.listen_deadline, at, TimerTarget::Listen);
        }
    }

    /// The moment is over, or the worker serves no more.
    pub(super) fn end_spreading(&mut self, reactor: &mut Reactor) {
        let timers = &mut self.service.timers;
        timers.disarm(&mut self.spreading.until, TimerTarget::Spread);
        if std::mem::take(&mut self.spreading).take.is_some() {
            reactor.set_adopting(true);
        }
        self.resume_listening(reactor);
    }
}

/// Whether it was not moved lately.
fn has_stayed(connection: &Connection, now_ms: u64) -> bool {
    connection.rebalanced_ms == 0 || now_ms.saturating_sub(connection.rebalanced_ms) >= STAYS_MS
}

/// At rest between two calls, and no frame begun: its read deadline would begin anew elsewhere. `again`
/// allows those that were moved lately.
pub(super) fn is_transferable(connection: &Connection, again: bool, now_ms: u64) -> bool {
    (again || has_stayed(connection, now_ms))
        && connection.phase == ConnectionPhase::Open
        && !connection.peer_closed
        && connection.is_quiescent()
}
