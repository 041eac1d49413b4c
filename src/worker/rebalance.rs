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
use crate::link::message::RebalanceOrder;
use crate::sys::event::{Reactor, Token};

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
        reactor.set_adopting(shares.take > 0);
        // Those that wait for room in the queue were given already, by the order before.
        let waiting: HashSet<Token> = self.waiting_to_give.iter().copied().collect();
        self.spreading.give = shares.give.saturating_sub(waiting.len() as u32);
        let resting: Vec<Token> = self
            .connections
            .iter()
            .flatten()
            .filter(|connection| {
                is_transferable(connection) && reactor.unsent(connection.token) == 0
            })
            .map(|connection| connection.token)
            .filter(|token| !waiting.contains(token))
            .take(self.spreading.give as usize)
            .collect();
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

    /// One was taken out of the queue.
    pub(super) fn has_adopted(&mut self, reactor: &mut Reactor) {
        if let Some(left) = &mut self.spreading.take {
            *left = left.saturating_sub(1);
            if *left == 0 {
                reactor.set_adopting(false);
            }
        }
    }

    /// The moment is over, or the worker serves no more.
    pub(super) fn end_spreading(&mut self, reactor: &mut Reactor) {
        let timers = &mut self.service.timers;
        timers.disarm(&mut self.spreading.until, TimerTarget::Spread);
        if std::mem::take(&mut self.spreading).take.is_some() {
            reactor.set_adopting(true);
            self.resume_listening(reactor);
        }
    }
}

/// At rest between two calls, and no frame begun: its read deadline would begin anew elsewhere.
pub(super) fn is_transferable(connection: &Connection) -> bool {
    connection.phase == ConnectionPhase::Open
        && !connection.peer_closed
        && connection.is_quiescent()
}
