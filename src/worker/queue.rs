//! Which of the calls that wait begins next, and which are not begun any more.
//!
//! Connections take turns, and the oldest call of one goes first, as long as that serves everybody: who
//! sends a thousand calls ahead keeps nobody waiting but himself. Where the queue stands (it has not
//! been empty for a while, and the call whose turn it is ran out of time), that would begin each call
//! just before its caller stops waiting: then the newest goes first, whose caller still has the most
//! patience, and the oldest run out of time unbegun. So a worker that is offered several times what
//! it can do still does what it can. Calls of one connection that are answered in their order are
//! begun in their order in either case. Pure: it is told what time it is.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::Duration;

use super::timers::CallKey;
use crate::sys::event::Token;

/// A queue that was not empty for so long stands, and so long after its next call ran out of time it is
/// taken to be more than can be done.
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
    /// Since when, in milliseconds.
    pub since_ms: u64,
    /// When it must be answered, in milliseconds.
    pub deadline_ms: u64,
    /// Whether another worker may run it.
    pub can_be_sent: bool,
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
    /// The same by connection, and of each in that order.
    calls: BTreeSet<(Token, u64)>,
    /// The connections that have some, by their turn.
    turns: BTreeSet<(u64, Token)>,
    /// The turn of each.
    turn_of: HashMap<Token, u64>,
    /// The last turn that was given. Never one twice, so who joins comes behind all that wait.
    last_turn: u64,
    /// Calls that another worker may run.
    sendable: usize,
    /// When the first one came after it had been empty.
    since_ms: u64,
    /// Until when its next call's bad luck counts.
    behind_until_ms: u64,
}

impl Queue {
    /// Lets a call wait: behind the older ones of its connection.
    pub fn push(&mut self, call: Waiting, now_ms: u64) {
        if self.waiting.is_empty() {
            self.since_ms = now_ms;
        }
        self.sendable += usize::from(call.can_be_sent);
        self.calls.insert((call.token, call.key.serial));
        self.waiting.insert(call.key.serial, call);
        if !self.turn_of.contains_key(&call.token) {
            self.give_turn(call.token);
        }
    }

    /// Who is next.
    pub fn next(&self, now_ms: u64) -> Option<&Waiting> {
        if !self.is_behind(now_ms) {
            return self.in_turn();
        }
        let newest = self.waiting.values().next_back()?;
        // Its answer waits for those before it: the first of them it is.
        if newest.in_order {
            self.first_of(newest.token)
        } else {
            Some(newest)
        }
    }

    /// The call that another worker runs next, if it may run one: the first that is next in its
    /// connection and may be sent.
    pub fn next_to_send(&self, now_ms: u64) -> Option<&Waiting> {
        if self.sendable == 0 {
            return None;
        }
        let next = self.next(now_ms).filter(|next| next.can_be_sent);
        next.or_else(|| {
            let mut firsts = self.turns.iter().map(|(_, token)| self.first_of(*token));
            firsts.find_map(|first| first.filter(|first| first.can_be_sent))
        })
    }

    /// How many calls another worker may run.
    pub fn sendable(&self) -> usize {
        self.sendable
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The oldest call of the connection whose turn it is.
    fn in_turn(&self) -> Option<&Waiting> {
        self.first_of(self.turns.first()?.1)
    }

    fn first_of(&self, token: Token) -> Option<&Waiting> {
        let (_, serial) = self.calls.range((token, 0)..=(token, u64::MAX)).next()?;
        self.waiting.get(serial)
    }

    /// Takes a call out to be begun: the next turns are the other connections'.
    pub fn take(&mut self, key: CallKey) {
        if let Some(call) = self.remove(key)
            && self.turn_of.contains_key(&call.token)
        {
            self.give_turn(call.token);
        }
    }

    /// Takes a call out that is not begun: that was no turn of its connection's.
    pub fn remove(&mut self, key: CallKey) -> Option<Waiting> {
        let call = self.waiting.remove(&key.serial)?;
        self.sendable -= usize::from(call.can_be_sent);
        self.calls.remove(&(call.token, key.serial));
        if self.first_of(call.token).is_none()
            && let Some(turn) = self.turn_of.remove(&call.token)
        {
            self.turns.remove(&(turn, call.token));
        }
        Some(call)
    }

    /// The last turn of all, in place of the one that it may have.
    fn give_turn(&mut self, token: Token) {
        self.last_turn += 1;
        if let Some(turn) = self.turn_of.insert(token, self.last_turn) {
            self.turns.remove(&(turn, token));
        }
        self.turns.insert((self.last_turn, token));
    }

    /// A call runs out of time; to be told before it is taken out.
    pub fn runs_out(&mut self, key: CallKey, now_ms: u64) {
        // One with little patience behind others is no sign: they may all be in time.
        if self.in_turn().is_some_and(|next| next.key == key) {
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

/// The calls that one crew of threads serves: the handler threads, or those of a pool.
#[derive(Debug, Default)]
pub struct Lane {
    pub queue: Queue,
    /// Those handed out, oldest first; ones that are done are skipped.
    pub handed_out: VecDeque<CallKey>,
    /// Entries that wait in `queue` or at the threads, to be answered.
    pub waiting: usize,
    /// Of those, the ones that other processes run.
    pub sent: usize,
    /// Entries with the threads.
    pub out: usize,
    /// Of those, the ones that run and that nobody waits for.
    pub lost: usize,
    /// Bytes of params and ids, of all entries.
    pub bytes: usize,
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
