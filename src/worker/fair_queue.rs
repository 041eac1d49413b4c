//! Decides which waiting call begins next, and which calls are not begun any more.
//!
//! Connections take turns, and each begins its oldest call first. So a client that sends a thousand calls ahead delays
//! only itself. If the queue has not been empty for 100 ms and its next call missed its deadline, the worker is
//! overloaded. The order above would then begin each call just before its deadline. So the newest call begins first,
//! because it usually has the most time left, and the oldest calls time out before they begin. So a worker that gets
//! several times the calls that it can run still uses its whole capacity. Calls of one connection that are answered in
//! order always begin in order. Pure: the caller passes the time.

use std::collections::VecDeque;
use std::time::Duration;

use rustc_hash::FxHashMap;

use super::timers::CallKey;
use crate::sys::event::Token;

/// A queue is overloaded if it was not empty for this time, in milliseconds, and its next call missed its deadline.
/// It then counts as overloaded for the same time.
const STANDING_MS: u64 = 100;

/// If a call has waited for a shorter time than this, in milliseconds, a thread was idle. Then the call begins even
/// if its expected run time is too long for its deadline.
const AT_ONCE_MS: u64 = 5;

/// Identifies the calls of one connection.
type LineKey = (Token, u32);

/// The end of a list.
const NONE: usize = usize::MAX;

/// A waiting call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiting {
    pub key: CallKey,
    /// The number of its method.
    pub method: usize,
    /// Its connection, or the process that has it.
    pub token: Token,
    /// The number of the connection in that process; 0 for a connection of this process.
    pub client: u32,
    /// Whether it is answered in order.
    pub in_order: bool,
    /// When it was read, in milliseconds.
    pub since_ms: u64,
    /// Its deadline in milliseconds.
    pub deadline_ms: u64,
    /// Whether another worker may run it.
    pub can_be_sent: bool,
    /// The expected run time, if it is known.
    pub expected: Option<Duration>,
}

impl Waiting {
    fn line(&self) -> LineKey {
        (self.token, self.client)
    }

    /// Returns whether it would miss its deadline if it began now and took the expected time.
    pub fn is_late(&self, now_ms: u64, expected: Option<Duration>) -> bool {
        let left = Duration::from_millis(self.deadline_ms.saturating_sub(now_ms));
        now_ms.saturating_sub(self.since_ms) >= AT_ONCE_MS
            && expected.is_some_and(|expected| left < expected)
    }
}

/// The waiting calls of one executor, each with what is needed to run it. Adding, taking or removing one call takes
/// constant time, except putting a call back into its old place.
#[derive(Debug)]
pub struct FairQueue<T> {
    /// By `CallKey::index`.
    nodes: Vec<Option<Node<T>>>,
    len: usize,
    /// All calls in the order of arrival.
    arrivals: Ends,
    /// The connections with calls.
    lines: FxHashMap<LineKey, Line>,
    /// Connections in the order of their turns. An element is stale if its number differs from that of
    /// its line.
    turns: VecDeque<(LineKey, u64)>,
    /// The last turn that was assigned. Each is assigned once, so a new connection comes after all
    /// waiting ones.
    last_turn: u64,
    /// The number of calls that another worker may run.
    sendable: usize,
    /// The number of calls of other workers.
    foreign: usize,
    /// When the first call arrived after the queue was empty.
    since_ms: u64,
    /// Until when the queue counts as overloaded.
    behind_until_ms: u64,
}

#[derive(Debug)]
struct Node<T> {
    call: Waiting,
    item: T,
    /// Its neighbours in the list of all calls, and in the list of its connection.
    chains: [Neighbours; 2],
}

#[derive(Debug, Clone, Copy)]
struct Neighbours {
    older: usize,
    newer: usize,
}

/// The ends of a list of calls, ordered by serial number.
#[derive(Debug, Clone, Copy)]
struct Ends {
    oldest: usize,
    newest: usize,
}

#[derive(Debug)]
struct Line {
    turn: u64,
    calls: Ends,
}

/// The list of all calls, and the list of a connection.
const ALL: usize = 0;
const OF_LINE: usize = 1;

impl Ends {
    const EMPTY: Ends = Ends {
        oldest: NONE,
        newest: NONE,
    };

    /// Inserts the node at `index`. It goes to the end if it is the newest.
    fn insert<T>(&mut self, nodes: &mut [Option<Node<T>>], chain: usize, index: usize) {
        let serial = nodes[index].as_ref().map_or(0, |node| node.call.key.serial);
        // A returned call is often the oldest.
        let is_first = nodes.get(self.oldest).is_some_and(|node| {
            let first = node.as_ref().map_or(0, |node| node.call.key.serial);
            first > serial
        });
        let mut older = if is_first { NONE } else { self.newest };
        while let Some(Some(node)) = nodes.get(older)
            && node.call.key.serial > serial
        {
            older = node.chains[chain].older;
        }
        let newer = match nodes.get_mut(older) {
            Some(Some(node)) => std::mem::replace(&mut node.chains[chain].newer, index),
            _ => std::mem::replace(&mut self.oldest, index),
        };
        match nodes.get_mut(newer) {
            Some(Some(node)) => node.chains[chain].older = index,
            _ => self.newest = index,
        }
        if let Some(node) = &mut nodes[index] {
            node.chains[chain] = Neighbours { older, newer };
        }
    }

    /// Removes a node with these neighbours.
    fn remove<T>(&mut self, nodes: &mut [Option<Node<T>>], chain: usize, between: Neighbours) {
        match nodes.get_mut(between.older) {
            Some(Some(node)) => node.chains[chain].newer = between.newer,
            _ => self.oldest = between.newer,
        }
        match nodes.get_mut(between.newer) {
            Some(Some(node)) => node.chains[chain].older = between.older,
            _ => self.newest = between.older,
        }
    }
}

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        FairQueue {
            nodes: Vec::new(),
            len: 0,
            arrivals: Ends::EMPTY,
            lines: FxHashMap::default(),
            turns: VecDeque::new(),
            last_turn: 0,
            sendable: 0,
            foreign: 0,
            since_ms: 0,
            behind_until_ms: 0,
        }
    }
}

impl<T> FairQueue<T> {
    fn at(&self, index: usize) -> Option<&Node<T>> {
        self.nodes.get(index)?.as_ref()
    }

    fn call_at(&self, index: usize) -> Option<&Waiting> {
        self.at(index).map(|node| &node.call)
    }

    /// Adds a call behind the older ones of its connection.
    pub fn push(&mut self, call: Waiting, item: T, now_ms: u64) {
        if self.is_empty() {
            self.since_ms = now_ms;
        }
        let (index, key) = (call.key.index, call.line());
        if index >= self.nodes.len() {
            self.nodes.resize_with(index + 1, || None);
        }
        let alone = Neighbours {
            older: NONE,
            newer: NONE,
        };
        self.nodes[index] = Some(Node {
            call,
            item,
            chains: [alone; 2],
        });
        self.len += 1;
        self.sendable += usize::from(call.can_be_sent);
        self.foreign += usize::from(call.token.process().is_some());
        self.arrivals.insert(&mut self.nodes, ALL, index);
        if !self.lines.contains_key(&key) {
            self.last_turn += 1;
            let turn = self.last_turn;
            self.turns.push_back((key, turn));
            let calls = Ends::EMPTY;
            self.lines.insert(key, Line { turn, calls });
        }
        if let Some(line) = self.lines.get_mut(&key) {
            line.calls.insert(&mut self.nodes, OF_LINE, index);
        }
    }

    /// Returns the next call.
    pub fn next(&self, now_ms: u64) -> Option<&Waiting> {
        if !self.is_behind(now_ms) {
            return self.firsts().next();
        }
        let newest = self.call_at(self.arrivals.newest)?;
        // The answer of the newest call must wait for those before it. So the oldest call of its connection begins.
        if newest.in_order {
            self.call_at(self.lines.get(&newest.line())?.calls.oldest)
        } else {
            Some(newest)
        }
    }

    /// Returns the next call for another worker: the first one that is next in its connection and may be
    /// sent.
    pub fn next_to_send(&self, now_ms: u64) -> Option<&Waiting> {
        if self.sendable == 0 {
            return None;
        }
        let next = self.next(now_ms).filter(|next| next.can_be_sent);
        next.or_else(|| self.firsts().find(|first| first.can_be_sent))
    }

    /// Returns how many calls another worker may run.
    pub fn sendable(&self) -> usize {
        self.sendable
    }

    /// Returns how many calls belong to other workers.
    pub fn foreign(&self) -> usize {
        self.foreign
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns how many calls wait.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns the oldest call of each connection, in the order of turns.
    fn firsts(&self) -> impl Iterator<Item = &Waiting> {
        let line = |&(key, turn): &(LineKey, u64)| {
            let line = self.lines.get(&key)?;
            (line.turn == turn).then_some(line)
        };
        let lines = self.turns.iter().filter_map(line);
        lines.filter_map(|line| self.call_at(line.calls.oldest))
    }

    /// Returns all calls, oldest first.
    pub fn all(&self) -> impl Iterator<Item = &Waiting> {
        let node = |index: usize| self.at(index);
        std::iter::successors(node(self.arrivals.oldest), move |it| {
            node(it.chains[ALL].newer)
        })
        .map(|node| &node.call)
    }

    /// Removes a call that begins. The next turns belong to the other connections.
    pub fn take(&mut self, key: CallKey) -> Option<T> {
        let (call, item) = self.remove(key)?;
        if let Some(line) = self.lines.get_mut(&call.line()) {
            self.last_turn += 1;
            line.turn = self.last_turn;
            self.turns.push_back((call.line(), self.last_turn));
            self.drop_old_turns();
        }
        Some(item)
    }

    /// Removes all calls of a connection of this worker, oldest first.
    pub fn take_all_of(&mut self, token: Token) -> Vec<T> {
        let mut items = Vec::new();
        while let Some(line) = self.lines.get(&(token, 0))
            && let Some(&Waiting { key, .. }) = self.call_at(line.calls.oldest)
            && let Some((_, item)) = self.remove(key)
        {
            items.push(item);
        }
        items
    }

    /// Removes a call that does not begin. Its connection keeps its turn.
    pub fn remove(&mut self, key: CallKey) -> Option<(Waiting, T)> {
        let slot = self.nodes.get_mut(key.index)?;
        let Node { call, item, chains } = slot.take_if(|node| node.call.key == key)?;
        self.len -= 1;
        self.sendable -= usize::from(call.can_be_sent);
        self.foreign -= usize::from(call.token.process().is_some());
        self.arrivals.remove(&mut self.nodes, ALL, chains[ALL]);
        if let Some(line) = self.lines.get_mut(&call.line()) {
            line.calls.remove(&mut self.nodes, OF_LINE, chains[OF_LINE]);
            if line.calls.oldest == NONE {
                self.lines.remove(&call.line());
                self.drop_old_turns();
            }
        }
        Some((call, item))
    }

    /// Drops stale turns: at the front, and all of them if they are the majority.
    fn drop_old_turns(&mut self) {
        let lines = &self.lines;
        let is_valid =
            |&(key, turn): &(LineKey, u64)| lines.get(&key).is_some_and(|line| line.turn == turn);
        while self.turns.front().is_some_and(|turn| !is_valid(turn)) {
            self.turns.pop_front();
        }
        if self.turns.len() > 2 * lines.len() + 64 {
            self.turns.retain(is_valid);
        }
    }

    /// Records that a call missed its deadline. Call this before it is removed.
    pub fn record_timeout(&mut self, key: CallKey, now_ms: u64) {
        // A call with a short timeout behind others is no sign of overload, because those may be in time.
        if self.firsts().next().is_some_and(|next| next.key == key) {
            self.behind_until_ms = now_ms + STANDING_MS;
        }
    }

    /// Returns whether the queue is overloaded: it has more calls than can be done in time.
    pub fn is_behind(&self, now_ms: u64) -> bool {
        now_ms < self.behind_until_ms && now_ms.saturating_sub(self.since_ms) >= STANDING_MS
    }
}

#[cfg(test)]
#[path = "fair_queue_tests.rs"]
mod tests;
