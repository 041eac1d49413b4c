//! Decides which connection is closed to make room for another one when a worker is full. Only connections that never
//! had a call are closed.
//!
//! The source with the largest number of them loses its newest one. A connection has a short time for its first call
//! before it can be closed, because the call may be in transit. The newest one may lose that time too, but only after
//! all older ones of its source. Otherwise a source that connects fast would keep the worker full. If no source has two
//! such connections, the oldest one is closed after `limits.read-timeout`. Pure.

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
    /// When the next connection is old enough to be closed; 0 if the worker does not wait for one. Set by
    /// `Timers::arm`.
    pub deadline: u64,
}

#[derive(Debug, Default)]
struct OfSource {
    by_age: ByAge,
    /// When a connection was last closed after its time for the first call, in milliseconds.
    evicted_ms: Option<u64>,
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

    /// Removes a connection that has a call, or is closed.
    #[inline]
    pub fn remove(&mut self, connection: &mut Connection) {
        // Each call comes here, but only the first one of a connection finds something.
        if connection.unused_since_ms.is_some() {
            self.remove_unused(connection);
        }
    }

    #[cold]
    fn remove_unused(&mut self, connection: &mut Connection) {
        if let Some(since_ms) = connection.unused_since_ms.take() {
            let age = (since_ms, connection.token.index());
            if let Some(of_source) = self.sources.value_mut(connection.source) {
                of_source.by_age.remove(&age);
            }
            self.sources.remove(connection.source, 1);
            self.all.remove(&age);
        }
    }

    /// Records that a connection is about to be closed to make room.
    pub fn record_eviction(&mut self, connection: &Connection, now_ms: u64) {
        let since_ms = connection.unused_since_ms.unwrap_or(now_ms);
        if since_ms + FIRST_CALL_MS <= now_ms
            && let Some(of_source) = self.sources.value_mut(connection.source)
        {
            of_source.evicted_ms = Some(now_ms);
        }
    }

    /// Returns the connections that may be closed, in this order.
    pub fn victims(&self, now_ms: u64, read_timeout_ms: u64) -> impl Iterator<Item = Token> {
        let largest = self.sources.descending();
        let largest = largest.take_while(|source| source.amount > 1);
        let of_largest = largest.flat_map(move |source| {
            let evicted_ms = source.value.evicted_ms;
            let has_just_lost_one =
                evicted_ms.is_some_and(|evicted_ms| now_ms < evicted_ms + FIRST_CALL_MS);
            let begin = (now_ms + 1).saturating_sub(FIRST_CALL_MS);
            let end = if has_just_lost_one { now_ms + 1 } else { begin };
            let waited = source.value.by_age.range(..(begin, 0)).rev();
            waited.chain(source.value.by_age.range((begin, 0)..(end, 0)).rev())
        });
        // Strictly older than the timeout: the clock has whole milliseconds, so an equal value may be too early.
        let oldest = now_ms.saturating_sub(read_timeout_ms);
        let old = self.all.range(..(oldest, 0));
        of_largest.chain(old).map(|(_, token)| *token)
    }

    /// Returns when a connection may be closed, if none may be closed now, in milliseconds; `None` if no connection
    /// can be closed.
    pub fn next_victim_ms(&self, read_timeout_ms: u64) -> Option<u64> {
        let first_of = |by_age: &ByAge| by_age.keys().next().map(|(since_ms, _)| *since_ms);
        let largest = self.sources.first().filter(|source| source.amount > 1);
        let of_largest =
            largest.and_then(|source| Some(first_of(&source.value.by_age)? + FIRST_CALL_MS));
        let old = first_of(&self.all).map(|since_ms| since_ms + read_timeout_ms + 1);
        of_largest.into_iter().chain(old).min()
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
        let victims = |unused: &UnusedConnections, now_ms| -> Vec<usize> {
            let tokens = unused.victims(now_ms, READ_TIMEOUT_MS);
            tokens.map(Token::index).collect()
        };
        assert_eq!(
            victims(&unused, 1001),
            NONE,
            "their calls may be on their way"
        );
        assert_eq!(unused.next_victim_ms(READ_TIMEOUT_MS), Some(1252));
        assert_eq!(victims(&unused, 1252), [2, 1, 0]);
        assert_eq!(victims(&unused, 2000), [4, 3, 2, 1, 0]);
        let mut new = connection(&mut unused, (2, 6), 2000);
        assert_eq!(victims(&unused, 2000)[0], 4);
        unused.record_eviction(&new, 2000);
        assert_eq!(victims(&unused, 2000)[0], 4, "a young one does not count");
        unused.record_eviction(&many[2], 2000);
        assert_eq!(
            victims(&unused, 2249),
            [4, 3, 2, 6, 1, 0],
            "it has just paid"
        );
        assert_eq!(victims(&unused, 2250), [6, 4, 3, 2, 1, 0]);
        unused.remove(&mut new);
        many.iter_mut().take(2).for_each(|it| unused.remove(it));
        assert_eq!(victims(&unused, 2000), [1, 0]);
        few.iter_mut().take(1).for_each(|it| unused.remove(it));
        assert_eq!(victims(&unused, 30_900), NONE, "each source has one");
        assert_eq!(unused.next_victim_ms(READ_TIMEOUT_MS), Some(30_901));
        assert_eq!(victims(&unused, 30_901), [5]);
        assert_eq!(victims(&unused, 40_000), [5, 1, 4]);
        (few.iter_mut().chain(&mut many).chain([&mut one])).for_each(|it| unused.remove(it));
        assert_eq!(victims(&unused, u64::MAX / 2), NONE);
        assert_eq!(unused.next_victim_ms(READ_TIMEOUT_MS), None);
        assert!(unused.sources.is_empty() && unused.all.is_empty());
    }
}
