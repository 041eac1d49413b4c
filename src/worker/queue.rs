//! Which of the calls that wait begins next, and which are not begun any more.
//!
//! The oldest one goes first, as long as that serves everybody. Where the queue stands (it has not
//! been empty for a while, and its oldest call ran out of time), oldest first would begin each call
//! just before its caller stops waiting: then the newest goes first, whose caller still has the most
//! patience, and the oldest run out of time unbegun. So a worker that is offered several times what
//! it can do still does what it can. Calls of one connection that are answered in their order are
//! begun in their order in either case. Pure: it is told what time it is.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::timers::CallKey;
use crate::sys::event::Token;

/// A queue that was not empty for so long stands, and so long after its oldest call ran out of time
/// it is taken to be more than can be done.
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
    /// Its connection, where it is answered in the order of that.
    pub line: Option<Token>,
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
    /// Those that are answered in the order of their connection.
    lines: BTreeSet<(Token, u64)>,
    /// When the first one came after it had been empty.
    since_ms: u64,
    /// Until when its oldest call's bad luck counts.
    behind_until_ms: u64,
}

impl Queue {
    /// Lets a call wait: at the end, or at its old place.
    pub fn push(&mut self, call: Waiting, now_ms: u64) {
        if self.waiting.is_empty() {
            self.since_ms = now_ms;
        }
        if let Some(token) = call.line {
            self.lines.insert((token, call.key.serial));
        }
        self.waiting.insert(call.key.serial, call);
    }

    /// Who is next.
    pub fn next(&self, now_ms: u64) -> Option<&Waiting> {
        if !self.is_behind(now_ms) {
            return self.waiting.values().next();
        }
        let newest = self.waiting.values().next_back()?;
        let Some(token) = newest.line else {
            return Some(newest);
        };
        // Its answer waits for those before it: the first of them it is.
        let (_, serial) = self.lines.range((token, 0)..).next()?;
        self.waiting.get(serial)
    }

    /// Takes a call out.
    pub fn remove(&mut self, key: CallKey) {
        if let Some(call) = self.waiting.remove(&key.serial)
            && let Some(token) = call.line
        {
            self.lines.remove(&(token, key.serial));
        }
    }

    /// A call runs out of time; to be told before it is taken out.
    pub fn runs_out(&mut self, key: CallKey, now_ms: u64) {
        // One with little patience behind others is no sign: they may all be in time.
        if self.waiting.keys().next() == Some(&key.serial) {
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
