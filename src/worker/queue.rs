//! Which of the calls that wait begins next, and which are not begun any more.
//!
//! Connections take turns, and of one turn the oldest call goes first, as long as that serves everybody: who
//! sends a thousand calls ahead keeps nobody waiting but himself. Where the queue stands (it has not
//! been empty for a while, and the call whose turn it is ran out of time), that would begin each call
//! just before its caller stops waiting: then the newest goes first, whose caller still has the most
//! patience, and the oldest run out of time unbegun. So a worker that is offered several times what
//! it can do still does what it can. Calls of one connection that are answered in their order are
//! begun in their order in either case. Pure: it is told what time it is.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use super::timers::CallKey;
use crate::sys::event::Token;

/// A queue that was not empty for so long stands, and so long after its next call ran out of time it is taken to be more than can be done.
const STANDING_MS: u64 = 100;

/// A call that has waited less found its thread as good as idle: it is begun whatever it takes.
const AT_ONCE_MS: u64 = 5;

/// A call that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiting {
    /// Which.
    pub key: CallKey,
    /// The number of its method.
    pub method: usize,
    /// Its connection.
    pub token: Token,
    /// Whether it is answered in the order of that.
    pub in_order: bool,
    /// Its turn, which the queue gives it; 0 where it has none yet.
    pub turn: u64,
    /// Since when, in milliseconds.
    pub since_ms: u64,
    /// When it must be answered, in milliseconds.
    pub deadline_ms: u64,
}

impl Waiting {
    /// Whether it could not be done in time any more, were it begun now and took what its method
    /// is expected to take.
    pub fn is_late(&self, now_ms: u64, expected: Option<Duration>) -> bool {
        let left = Duration::from_millis(self.deadline_ms.saturating_sub(now_ms));
        now_ms.saturating_sub(self.since_ms) >= AT_ONCE_MS
            && expected.is_some_and(|expected| left < expected)
    }
}

/// The calls that wait for one kind of thread.
#[derive(Debug, Default)]
pub struct Queue {
    /// By serial, which is the order of arrival.
    waiting: BTreeMap<u64, Waiting>,
    /// By turn, and in that by serial.
    turns: BTreeSet<(u64, u64)>,
    /// How many calls of a connection wait, and the last one's turn.
    connections: HashMap<Token, (usize, u64)>,
    /// Those that are answered in the order of their connection.
    lines: BTreeSet<(Token, u64)>,
    /// When the first one came after it had been empty.
    since_ms: u64,
    /// Until when its next call's bad luck counts.
    behind_until_ms: u64,
}

impl Queue {
    /// Lets a call wait: behind those of its connection, or at its old place.
    pub fn push(&mut self, mut call: Waiting, now_ms: u64) {
        if self.waiting.is_empty() {
            self.since_ms = now_ms;
        }
        let turn = self.turns.first().map_or(1, |(turn, _)| *turn);
        let (count, last) = self.connections.entry(call.token).or_default();
        if call.turn == 0 {
            call.turn = turn.max(*last + 1);
        }
        (*count, *last) = (*count + 1, call.turn.max(*last));
        let serial = call.key.serial;
        if call.in_order {
            self.lines.insert((call.token, serial));
        }
        self.turns.insert((call.turn, serial));
        self.waiting.insert(serial, call);
    }

    /// Who is next.
    pub fn next(&self, now_ms: u64) -> Option<&Waiting> {
        let next = if self.is_behind(now_ms) {
            self.waiting.values().next_back()?
        } else {
            self.waiting.get(&self.turns.first()?.1)?
        };
        if !next.in_order {
            return Some(next);
        }
        // Its answer waits for those before it: the first of them it is.
        let (_, serial) = self.lines.range((next.token, 0)..).next()?;
        self.waiting.get(serial)
    }

    /// Takes a call out.
    pub fn remove(&mut self, key: CallKey) {
        let Some(call) = self.waiting.remove(&key.serial) else {
            return;
        };
        self.turns.remove(&(call.turn, key.serial));
        self.lines.remove(&(call.token, key.serial));
        if let Some((count, _)) = self.connections.get_mut(&call.token) {
            *count -= 1;
            if *count == 0 {
                self.connections.remove(&call.token);
            }
        }
    }

    /// A call runs out of time; to be told before it is taken out.
    pub fn runs_out(&mut self, key: CallKey, now_ms: u64) {
        // One with little patience behind others is no sign: they may all be in time.
        if self
            .turns
            .first()
            .is_some_and(|(_, serial)| *serial == key.serial)
        {
            self.behind_until_ms = now_ms + STANDING_MS;
        }
    }

    /// Whether it holds more than can be done in time.
    pub fn is_behind(&self, now_ms: u64) -> bool {
        now_ms < self.behind_until_ms && now_ms.saturating_sub(self.since_ms) >= STANDING_MS
    }

    /// How many wait.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.waiting.len()
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
