//! The calls of a worker that are for its handler threads, by key and by connection.
//!
//! The calls of one connection are chained, so that what concerns one connection (a cancelled id,
//! its end) looks at its calls and at no others, however many there are. Pure.

use std::sync::Arc;

use slab::Slab;

use super::connection::PendingAnswer;
use super::shares::Source;
use super::timers::CallKey;
use crate::handler::CallState;
use crate::handler::call_state::HandlerCall;
use crate::sys::event::Token;

/// No call: the end of a chain.
const NONE: usize = usize::MAX;

/// A call that another process runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemoteCall {
    /// The link to that process.
    pub link: usize,
    /// The number of the call on that link.
    pub number: u64,
}

/// A call that waits or runs.
#[derive(Debug)]
pub struct ScheduledCall {
    /// The connection, or the process that has it.
    pub token: Token,
    /// Where its answer goes, and how it looks there.
    pub reply: PendingAnswer,
    pub id: Option<Arc<str>>,
    /// Where its connection comes from.
    pub source: Source,
    pub method: usize,
    /// When it was read, in milliseconds.
    pub read_ms: u64,
    /// When it must be answered, in milliseconds.
    pub deadline_ms: u64,
    /// Its armed timer; `Timers::arm` keeps it.
    pub timer: u64,
    /// Bytes of its params and id.
    pub(super) size: usize,
    /// The same and the bytes that its result is expected to have, if those are many: what its
    /// connection is charged with.
    pub charged_bytes: usize,
    /// What is needed to run it, while it is in no queue, or runs in another process; `None` while it is in the
    /// queue or with the executor.
    pub(super) job: Option<HandlerCall>,
    pub(super) state: Arc<CallState>,
    /// Where it runs, if that is another process.
    pub(super) sent_to: Option<RemoteCall>,
    /// The number that its home worker gave it; 0 for a call of this worker's own connections.
    pub(super) number_at_home: u64,
    /// Nobody waits for its answer any more.
    pub(super) is_answered: bool,
    /// It made room for another call, and is refused.
    pub(super) is_evicted: bool,
    /// It runs for nobody: its thread is lost until it reports.
    pub(super) is_orphaned: bool,
}

impl ScheduledCall {
    /// Whether it came over a connection of this worker, and not from another one.
    pub fn is_own(&self) -> bool {
        self.number_at_home == 0
    }

    /// What is needed to answer it. Its id stays: should its thread never come back, it is asked for.
    pub fn finish(&mut self, begun: bool) -> FinishedCall {
        FinishedCall {
            token: self.token,
            reply: self.reply,
            id: self.id.clone(),
            method: self.method,
            timer: std::mem::take(&mut self.timer),
            charged_bytes: self.charged_bytes,
            begun,
            sent_to: self.sent_to,
            number_at_home: self.number_at_home,
        }
    }

    /// Whether a thread or another process runs it.
    pub fn is_running(&self) -> bool {
        self.state.is_running()
    }
}

/// A call that is to be answered now.
#[derive(Debug)]
pub struct FinishedCall {
    /// Whose it is.
    pub token: Token,
    /// Where its answer goes, and how it looks there.
    pub reply: PendingAnswer,
    pub id: Option<Arc<str>>,
    pub method: usize,
    pub timer: u64,
    /// What its connection was charged with for it, in bytes.
    pub charged_bytes: usize,
    /// Whether it had begun.
    pub begun: bool,
    /// Where it ran, if that was another process.
    pub sent_to: Option<RemoteCall>,
    /// The number that its home worker gave it; 0 for a call of this worker's own connections.
    pub number_at_home: u64,
}

#[derive(Debug)]
struct CallEntry {
    serial: u64,
    call: ScheduledCall,
    /// The next older and the next newer call of its connection's place.
    older: usize,
    newer: usize,
}

#[derive(Debug, Default)]
pub struct CallTable {
    entries: Slab<CallEntry>,
    /// By `Token::index`, the newest call of whoever has that place.
    newest: Vec<usize>,
    serial: u64,
}

impl CallTable {
    pub fn insert(&mut self, call: ScheduledCall) -> CallKey {
        let place = call.token.index();
        if place >= self.newest.len() {
            self.newest.resize(place + 1, NONE);
        }
        self.serial += 1;
        let serial = self.serial;
        let older = self.newest[place];
        let index = self.entries.insert(CallEntry {
            serial,
            call,
            older,
            newer: NONE,
        });
        if let Some(entry) = self.entries.get_mut(older) {
            entry.newer = index;
        }
        self.newest[place] = index;
        CallKey { index, serial }
    }

    /// Takes a call out.
    pub fn remove(&mut self, key: CallKey) -> Option<ScheduledCall> {
        self.get(key)?;
        let entry = self.entries.remove(key.index);
        if let Some(older) = self.entries.get_mut(entry.older) {
            older.newer = entry.newer;
        }
        match self.entries.get_mut(entry.newer) {
            Some(newer) => newer.older = entry.older,
            None => self.newest[entry.call.token.index()] = entry.older,
        }
        Some(entry.call)
    }

    /// A call, if it is still there.
    pub fn get(&self, key: CallKey) -> Option<&ScheduledCall> {
        let entry = self.entries.get(key.index)?;
        (entry.serial == key.serial).then_some(&entry.call)
    }

    /// Likewise, to be changed.
    pub fn get_mut(&mut self, key: CallKey) -> Option<&mut ScheduledCall> {
        let entry = self.entries.get_mut(key.index)?;
        (entry.serial == key.serial).then_some(&mut entry.call)
    }

    /// The calls of a connection, newest first.
    pub fn of(&self, token: Token) -> impl Iterator<Item = (CallKey, &ScheduledCall)> {
        let first = self.newest.get(token.index()).copied().unwrap_or(NONE);
        let at = |index: usize| Some((index, self.entries.get(index)?));
        std::iter::successors(at(first), move |(_, entry)| at(entry.older))
            .map(|(index, entry)| (key(index, entry), &entry.call))
            // The place may have belonged to another connection, whose calls still run.
            .filter(move |(_, call)| call.token == token)
    }

    pub fn iter(&self) -> impl Iterator<Item = (CallKey, &ScheduledCall)> {
        self.entries
            .iter()
            .map(|(index, entry)| (key(index, entry), &entry.call))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }
}

fn key(index: usize, entry: &CallEntry) -> CallKey {
    CallKey {
        index,
        serial: entry.serial,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::protocol::body::Form;
    use crate::protocol::reply::{AnswerFormat, Framing};
    use crate::worker::connection::AnswerPosition;
    use proptest::prelude::*;

    fn call(token: Token) -> ScheduledCall {
        let shape = AnswerFormat {
            form: Form::Plain,
            wrap: Framing::Frame,
        };
        ScheduledCall {
            token,
            reply: PendingAnswer {
                place: AnswerPosition::Anywhere,
                shape,
                mark: Default::default(),
            },
            id: None,
            source: Source::Unknown,
            method: 0,
            read_ms: 0,
            deadline_ms: 0,
            timer: 0,
            size: 0,
            charged_bytes: 0,
            job: None,
            state: Arc::default(),
            sent_to: None,
            number_at_home: 0,
            is_answered: false,
            is_evicted: false,
            is_orphaned: false,
        }
    }

    proptest! {
        #[test]
        fn a_connections_chain_is_its_calls_and_no_others(
            steps in prop::collection::vec((0..4_usize, any::<bool>(), any::<prop::sample::Index>()), 0..200)
        ) {
            let mut table = CallTable::default();
            let mut model: Vec<(CallKey, Token)> = Vec::new();
            for (place, add, which) in steps {
                let token = Token::for_test(place);
                if add || model.is_empty() {
                    model.push((table.insert(call(token)), token));
                } else {
                    let (key, _) = model.remove(which.index(model.len()));
                    prop_assert!(table.remove(key).is_some());
                    prop_assert!(table.get(key).is_none() && table.remove(key).is_none());
                }
                for place in 0..4 {
                    let token = Token::for_test(place);
                    let chain: Vec<CallKey> = table.of(token).map(|(key, _)| key).collect();
                    let wanted = model.iter().rev().filter(|(_, of)| *of == token);
                    prop_assert_eq!(chain, wanted.map(|(key, _)| *key).collect::<Vec<_>>());
                }
                prop_assert_eq!(table.len(), model.len());
                prop_assert_eq!(table.iter().count(), model.len());
            }
        }
    }
}
