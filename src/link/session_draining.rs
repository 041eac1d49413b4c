//! Drains sessions in batches, for an acceptor and for the master, because the adoption queue has room for only about
//! 270 connections. If all sent at once, most would wait for room and try again and again.
//!
//! The next session gets its order when one of the batch has ended. A session with a running call does not
//! take a place in the batch, and each takes one for a limited time, so that none delays the others for long.

use std::time::Duration;

/// Sessions that hand their connections over at the same time.
pub const BATCH: usize = 64;
/// How long a session takes a place in the batch at most, in milliseconds.
const COUNT_MS: u64 = 1_000;
/// The time between two checks whether the next sessions can get the order, in milliseconds.
pub const LOOK_MS: u64 = 50;

/// A drain under way.
#[derive(Debug, Default)]
pub struct Draining {
    /// The sessions without the order; the last one is next.
    waiting: Vec<usize>,
    /// The sessions that have got it, and when.
    ordered: Vec<(usize, u64)>,
    until_ms: u64,
}

impl Draining {
    /// Drains these sessions until `until_ms`.
    pub fn new(sessions: impl Iterator<Item = usize>, until_ms: u64) -> Self {
        Draining {
            waiting: sessions.collect(),
            ordered: Vec::new(),
            until_ms,
        }
    }

    /// Adds sessions to a drain under way. Each gets the order once.
    pub fn add(&mut self, sessions: impl Iterator<Item = usize>) {
        self.waiting.extend(sessions);
    }

    /// Returns whether sessions wait for the order.
    pub fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Sends the order to the sessions for which there is room. Call it when sessions have ended, and after
    /// `LOOK_MS`. `may_move` returns whether a session lives and runs no call. `order` gets the time until the end.
    pub fn advance(
        &mut self,
        may_move: impl Fn(usize) -> bool,
        mut order: impl FnMut(usize, Duration),
        now_ms: u64,
    ) {
        self.ordered
            .retain(|(session, at)| now_ms < at + COUNT_MS && may_move(*session));
        let limit = Duration::from_millis(self.until_ms.saturating_sub(now_ms));
        while self.ordered.len() < BATCH
            && let Some(session) = self.waiting.pop()
        {
            order(session, limit);
            if may_move(session) {
                self.ordered.push((session, now_ms));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns how many get the order at this time.
    fn advance(draining: &mut Draining, may_move: impl Fn(usize) -> bool, now_ms: u64) -> usize {
        let mut count = 0;
        let order = |_, limit| {
            assert_eq!(limit, Duration::from_millis(30_000 - now_ms));
            count += 1;
        };
        draining.advance(may_move, order, now_ms);
        count
    }

    #[test]
    fn the_next_sessions_get_the_order_when_others_have_ended() {
        let mut draining = Draining::new(0..200, 30_000);
        assert_eq!(advance(&mut draining, |_| true, 0), BATCH);
        assert_eq!(advance(&mut draining, |_| true, 50), 0);
        // The last ones were ordered first; ten have ended.
        assert_eq!(advance(&mut draining, |session| session < 190, 100), 10);
        assert_eq!(
            advance(&mut draining, |session| session < 190, COUNT_MS),
            54
        );
        assert_eq!(advance(&mut draining, |_| false, COUNT_MS), 200 - 64 - 64);
        assert!(!draining.has_waiting());
    }

    #[test]
    fn sessions_with_running_calls_do_not_delay_others() {
        let mut draining = Draining::new(0..200, 30_000);
        assert_eq!(advance(&mut draining, |session| session < 10, 0), 200);
    }
}
