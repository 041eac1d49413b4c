//! Bounds the answers that clients have not taken, of all connections of a worker together.
//!
//! It counts answers that the kernel has not taken yet, and answers that wait for others: in order or in
//! a batch. At the limit, no call is taken from connections with at least half as much as the largest
//! one. At twice the limit the largest one is closed, because nothing else frees the memory of existing
//! answers. Pure: the event loop reads, sends and closes.

use super::lane::MOST_BYTES;
use super::shares::{Shares, Source};
use crate::sys::event::Token;

/// The total of a worker, and its limit.
#[derive(Debug)]
pub struct UnsentAnswers {
    bytes: usize,
    /// The shares of the connections.
    pub shares: Shares,
    limit: usize,
    has_blocked: bool,
}

impl UnsentAnswers {
    /// Creates an empty count. Calls are taken freely below `limit` bytes; connections are closed at
    /// twice that.
    pub fn new(limit: usize) -> Self {
        UnsentAnswers {
            bytes: 0,
            shares: Shares::default(),
            limit,
            has_blocked: false,
        }
    }

    /// Records that a connection has `bytes` of such answers now. `counted` is the last recorded number,
    /// and is set to `bytes`.
    #[inline]
    pub fn update(&mut self, owner: (Source, Token), counted: &mut usize, bytes: usize) {
        if *counted != bytes {
            self.shares.remove(owner, *counted);
            self.shares.add(owner, bytes);
            self.bytes -= *counted;
            self.bytes += bytes;
            *counted = bytes;
        }
    }

    /// Returns whether no call may be taken from this connection: the limit is reached, and this connection
    /// has much of it.
    #[inline]
    pub fn blocks(&self, owner: (Source, Token)) -> bool {
        self.is_full() && self.shares.is_heavy(owner)
    }

    /// Returns the number of unsent bytes at which further calls of a batch are refused, because their answers must
    /// wait for the last call of the batch. It is the limit for waiting params, and at most `limit`.
    pub fn batch_limit(&self) -> usize {
        self.limit.min(MOST_BYTES)
    }

    /// Returns whether members of a batch of this connection are refused.
    pub fn blocks_batch(&self, owner: (Source, Token)) -> bool {
        self.bytes >= self.batch_limit() && self.shares.is_heavy(owner)
    }

    /// Returns whether the limit is reached.
    #[inline]
    pub fn is_full(&self) -> bool {
        self.bytes >= self.limit
    }

    /// Returns whether a connection must be closed.
    #[inline]
    pub fn is_exceeded(&self) -> bool {
        self.bytes >= self.limit.saturating_mul(2)
    }

    /// Records that a connection was blocked at the limit. If its client reads nothing, no event reports
    /// new room, so the event loop has to check.
    #[inline]
    pub fn note_blocked(&mut self, is_blocked: bool) {
        self.has_blocked |= is_blocked && self.is_full();
    }

    /// Returns whether there is room again for blocked connections. Returns `true` only once each time.
    pub fn take_room_for_blocked(&mut self) -> bool {
        let has_room = self.has_blocked && !self.is_full();
        self.has_blocked &= !has_room;
        has_room
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_total_follows_each_connection_and_room_is_reported_once() {
        let mut unsent = UnsentAnswers::new(100);
        let (mut first, mut second) = (0, 0);
        let [a, b] = [1, 2].map(|number| (Source::User(7), Token::for_test(number)));
        unsent.update(a, &mut first, 60);
        unsent.note_blocked(true);
        assert!(!unsent.is_full() && !unsent.take_room_for_blocked());
        unsent.update(b, &mut second, 140);
        assert!(unsent.is_full() && unsent.is_exceeded());
        unsent.update(b, &mut second, 139);
        assert!(unsent.is_full() && !unsent.is_exceeded());
        assert!(unsent.blocks(b) && !unsent.blocks(a));
        assert_eq!(unsent.shares.heaviest(), Some(b.1));
        unsent.note_blocked(true);
        assert!(!unsent.take_room_for_blocked());
        unsent.update(b, &mut second, 0);
        assert!(unsent.take_room_for_blocked() && !unsent.take_room_for_blocked());
        unsent.update(a, &mut first, 0);
        assert_eq!((unsent.bytes, first, second), (0, 0, 0));
    }

    #[test]
    fn members_of_batches_are_refused_before_the_limit_is_reached_if_that_is_high() {
        let mut unsent = UnsentAnswers::new(4 * MOST_BYTES);
        let (mut first, mut second) = (0, 0);
        let [a, b] = [1, 2].map(|number| (Source::User(7), Token::for_test(number)));
        unsent.update(a, &mut first, MOST_BYTES - 1);
        assert!(!unsent.blocks_batch(a));
        unsent.update(b, &mut second, 1);
        assert!(unsent.blocks_batch(a) && !unsent.blocks_batch(b) && !unsent.blocks(a));
        assert_eq!(UnsentAnswers::new(100).batch_limit(), 100);
    }
}
