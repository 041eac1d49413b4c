//! Which connection is closed to make room for another one when a worker is full: one that never had a call.
//!
//! The source that has the most of them pays with its newest. A connection has a short time for its first call
//! before it can pay: the call may be on its way. It has none if its source has just paid with all that had let
//! this time pass: else a source that connects fast would keep the worker full. If no source has two, the oldest
//! pays after `limits.read-timeout`. Pure.

use std::collections::BTreeMap;

use super::connection::Connection;
use super::ranking::Ranking;
use super::shares::Source;
use crate::sys::event::Token;

/// The time for the first call, in milliseconds.
const FIRST_CALL_MS: u64 = 250;

/// Connections by their age: when they came, in milliseconds, and `Token::index`.
type ByAge = BTreeMap<(u64, usize), Token>;

/// Connections that never had a call.
#[derive(Debug, Default)]
pub struct UnusedConnections {
    sources: Ranking<Source, OfSource>,
    all: ByAge,
    /// When one is next old enough, if the worker waits for that; `Timers::arm` keeps it.
    pub deadline: u64,
}

#[derive(Debug, Default)]
struct OfSource {
    by_age: ByAge,
    /// When the last one was closed that had let its time pass.
    paid_ms: Option<u64>,
}

impl UnusedConnections {
    /// Adds a new connection.
    pub fn add(&mut self, connection: &mut Connection, now_ms: u64) {
        connection.unused_since_ms = Some(now_ms);
        let age = (now_ms, connection.token.index());
        let of_source = self.sources.add(connection.source, 1);
        of_source.by_age.insert(age, connection.token);
        self.all.insert(age, connection.token);
    }

    /// A connection has a call, or is closed.
    #[inline]
    pub fn remove(&mut self, connection: &mut Connection) {
        if let Some(since_ms) = connection.unused_since_ms.take() {
            let age = (since_ms, connection.token.index());
            if let Some(of_source) = self.sources.value_mut(connection.source) {
                of_source.by_age.remove(&age);
            }
            self.sources.remove(connection.source, 1);
            self.all.remove(&age);
        }
    }

    /// A connection is about to be closed to make room.
    pub fn record_payment(&mut self, connection: &Connection, now_ms: u64) {
        let since_ms = connection.unused_since_ms.unwrap_or(now_ms);
        if since_ms + FIRST_CALL_MS <= now_ms
            && let Some(of_source) = self.sources.value_mut(connection.source)
        {
            of_source.paid_ms = Some(now_ms);
        }
    }

    /// Those that may be closed, in this order.
    pub fn payers(&self, now_ms: u64, read_timeout_ms: u64) -> impl Iterator<Item = Token> {
        let rich = self.sources.descending();
        let rich = rich.take_while(|source| source.amount > 1);
        let of_rich = rich.flat_map(move |source| {
            let paid_ms = source.value.paid_ms;
            let has_just_paid = paid_ms.is_some_and(|paid_ms| now_ms < paid_ms + FIRST_CALL_MS);
            let begin = (now_ms + 1).saturating_sub(FIRST_CALL_MS);
            let end = if has_just_paid { now_ms + 1 } else { begin };
            let waited = source.value.by_age.range(..(begin, 0)).rev();
            waited.chain(source.value.by_age.range((begin, 0)..(end, 0)).rev())
        });
        // The clock has whole milliseconds: one more, so that none is closed too early.
        let oldest = now_ms.saturating_sub(read_timeout_ms);
        let old = self.all.range(..(oldest, 0));
        of_rich.chain(old).map(|(_, token)| *token)
    }

    /// When one may be closed next, if none may be closed now; `None` if there is none.
    pub fn next_payer_ms(&self, read_timeout_ms: u64) -> Option<u64> {
        let first_of = |by_age: &ByAge| by_age.keys().next().map(|(since_ms, _)| *since_ms);
        let rich = self.sources.first().filter(|source| source.amount > 1);
        let of_rich = rich.and_then(|source| Some(first_of(&source.value.by_age)? + FIRST_CALL_MS));
        let old = first_of(&self.all).map(|since_ms| since_ms + read_timeout_ms + 1);
        of_rich.into_iter().chain(old).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ_TIMEOUT_MS: u64 = 30_000;
    const NONE: [usize; 0] = [];

    fn connection(
        unused: &mut UnusedConnections,
        (source, index): (u32, usize),
        at: u64,
    ) -> Connection {
        let token = Token::for_test(index);
        let mut connection = Connection::new(token, None, Source::User(source), at);
        unused.add(&mut connection, at);
        connection
    }

    #[test]
    fn the_source_with_the_most_pays_with_its_newest_and_others_after_the_read_timeout() {
        let mut unused = UnusedConnections::default();
        let mut few: Vec<_> = (0..2)
            .map(|n| connection(&mut unused, (1, n), 1000))
            .collect();
        let mut many: Vec<_> = (2..5)
            .map(|n| connection(&mut unused, (2, n), 1000 + n as u64))
            .collect();
        let mut one = connection(&mut unused, (3, 5), 900);
        let payers = |unused: &UnusedConnections, now_ms| -> Vec<usize> {
            let tokens = unused.payers(now_ms, READ_TIMEOUT_MS);
            tokens.map(Token::index).collect()
        };
        assert_eq!(
            payers(&unused, 1001),
            NONE,
            "their calls may be on their way"
        );
        assert_eq!(unused.next_payer_ms(READ_TIMEOUT_MS), Some(1252));
        assert_eq!(payers(&unused, 1252), [2, 1, 0]);
        assert_eq!(payers(&unused, 2000), [4, 3, 2, 1, 0]);
        let mut new = connection(&mut unused, (2, 6), 2000);
        assert_eq!(payers(&unused, 2000)[0], 4);
        unused.record_payment(&new, 2000);
        assert_eq!(payers(&unused, 2000)[0], 4, "a young one does not count");
        unused.record_payment(&many[2], 2000);
        assert_eq!(
            payers(&unused, 2249),
            [4, 3, 2, 6, 1, 0],
            "it has just paid"
        );
        assert_eq!(payers(&unused, 2250), [6, 4, 3, 2, 1, 0]);
        unused.remove(&mut new);
        many.iter_mut().take(2).for_each(|it| unused.remove(it));
        assert_eq!(payers(&unused, 2000), [1, 0]);
        few.iter_mut().take(1).for_each(|it| unused.remove(it));
        assert_eq!(payers(&unused, 30_900), NONE, "each source has one");
        assert_eq!(unused.next_payer_ms(READ_TIMEOUT_MS), Some(30_901));
        assert_eq!(payers(&unused, 30_901), [5]);
        assert_eq!(payers(&unused, 40_000), [5, 1, 4]);
        (few.iter_mut().chain(&mut many).chain([&mut one])).for_each(|it| unused.remove(it));
        assert_eq!(payers(&unused, u64::MAX / 2), NONE);
        assert_eq!(unused.next_payer_ms(READ_TIMEOUT_MS), None);
        assert!(unused.sources.is_empty() && unused.all.is_empty());
    }
}
