//! Holds the calls of a worker that are not inline, by key and by connection.
//!
//! The calls of one connection form a linked list. So an operation on a connection (a cancelled id, its
//! end) visits only its calls. Pure.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::sync::Arc;

use slab::Slab;

use super::access_log::line::CallStart;
use super::connection::PendingAnswer;
use super::shares::Source;
use super::slow_log::record::ShownCall;
use super::timers::CallKey;
use crate::handler::CallState;
use crate::handler::call_state::HandlerCall;
use crate::handler::trace::CallIdentity;
use crate::link::call_frame::CallOrigin;
use crate::sys::event::Token;

/// How long a handler may take to react to its deadline, in milliseconds. A command must be killed by then.
const GRACE_MS: u64 = 1000;
/// The end of a list.
const NONE: usize = usize::MAX;

/// A call that runs in another process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemoteCall {
    /// The link to that process.
    pub link: usize,
    /// The number of the call here.
    pub number: u64,
}

/// A call from a connection of this worker or from another process.
#[derive(Debug)]
pub struct NewCall<'a> {
    pub token: Token,
    pub reply: PendingAnswer,
    /// The id as JSON.
    pub id: Option<&'a str>,
    pub source: Source,
    pub peer: Option<SocketAddr>,
    pub method: usize,
    pub params: &'a str,
    /// When it was read, and its deadline, in milliseconds (CLOCK_MONOTONIC).
    pub times: (u64, u64),
    /// See `ScheduledCall`.
    pub charged_bytes: usize,
    /// The key of the call for the quarantine; 0 if it has none.
    pub key: u64,
    pub identity: CallIdentity,
}

/// A waiting or running call.
#[derive(Debug)]
pub struct ScheduledCall {
    /// The connection, or the process that has it.
    pub token: Token,
    /// The position and form of its answer.
    pub reply: PendingAnswer,
    pub id: Option<Arc<str>>,
    /// The source of its connection.
    pub source: Source,
    pub method: usize,
    /// When it was read, in milliseconds.
    pub read_ms: u64,
    /// When it was read, in nanoseconds, for the metrics; 0 for a call of another process.
    pub read_ns: u64,
    /// The deadline in milliseconds.
    pub deadline_ms: u64,
    /// Its armed timer; kept by `Timers::arm`.
    pub timer: u64,
    /// The bytes of its params and id.
    pub(super) size: usize,
    /// The bytes of its params and id, plus the expected bytes of a large result. This amount counts for its
    /// connection.
    pub charged_bytes: usize,
    /// What is needed to run the call. `Some` while it is in no queue, or runs in another process; `None` while it is
    /// in the queue or with the executor.
    pub(super) to_run: Option<HandlerCall>,
    pub(super) state: Arc<CallState>,
    /// What a record of the slow log shows about the call.
    pub(super) shown: ShownCall,
    /// What its line in the access log will say; `None` without one.
    pub access: Option<Box<CallStart>>,
    /// The remote call, if it runs in another process.
    pub(super) sent_to: Option<RemoteCall>,
    /// Whether no caller waits for its answer any more.
    pub(super) is_answered: bool,
    /// Whether it had to make room for another call, and so is refused.
    pub(super) is_evicted: bool,
    /// Whether it was given up but still runs. Its thread is not available until the handler returns.
    pub(super) is_orphaned: bool,
}

impl ScheduledCall {
    /// Returns whether it came over a connection of this worker, and not from another one.
    pub fn is_own(&self) -> bool {
        self.state.identity().home.is_none()
    }

    /// Returns its number in the process that has its connection.
    pub fn number(&self) -> u64 {
        let identity = self.state.identity();
        identity.home.map_or(identity.number, |home| home.number)
    }

    /// Returns where it came from, for another process.
    pub fn origin(&self) -> CallOrigin {
        CallOrigin {
            client: self.token.index() as u32,
            read_ns: self.read_ns,
            ..self.shown.origin
        }
    }

    /// Returns what is needed to answer it. The id stays in the table, because it is logged if its thread
    /// is stuck.
    pub fn finish(&mut self, begun: bool) -> FinishedCall {
        let mut access = self.access.take();
        if let Some(start) = &mut access {
            // It may have ended at its deadline, a moment before it was given up.
            start.began_ns = self.state.last_begun_ns().unwrap_or(0);
        }
        FinishedCall {
            token: self.token,
            reply: self.reply,
            id: self.id.clone(),
            method: self.method,
            read_ns: self.read_ns,
            timer: std::mem::take(&mut self.timer),
            charged_bytes: self.charged_bytes,
            begun,
            sent_to: self.sent_to,
            number: self.number(),
            access: RefCell::new(access),
        }
    }

    /// Returns whether it runs, on a thread or in another process.
    pub fn is_running(&self) -> bool {
        self.state.is_running()
    }
}

/// A call that must be answered now.
#[derive(Debug)]
pub struct FinishedCall {
    /// Its connection or process.
    pub token: Token,
    /// The position and form of its answer.
    pub reply: PendingAnswer,
    pub id: Option<Arc<str>>,
    pub method: usize,
    /// See `ScheduledCall`.
    pub read_ns: u64,
    pub timer: u64,
    /// The bytes that counted for its connection.
    pub charged_bytes: usize,
    /// Whether it had begun.
    pub begun: bool,
    /// The remote call, if it ran in another process.
    pub sent_to: Option<RemoteCall>,
    /// Its number in the process that has its connection.
    pub number: u64,
    /// What its line in the access log will say. It is taken when the line is made.
    pub access: RefCell<Option<Box<CallStart>>>,
}

#[derive(Debug)]
struct CallEntry {
    serial: u64,
    call: ScheduledCall,
    /// The next older and the next newer call in the list of its connection's index.
    older: usize,
    newer: usize,
}

#[derive(Debug, Default)]
pub struct CallTable {
    entries: Slab<CallEntry>,
    /// By `Token::index`, the newest call of the connection with this index.
    newest: Vec<usize>,
    serial: u64,
}

impl CallTable {
    /// Returns the calls that still run `GRACE_MS` after their deadline, with their serials. `running` are the keys of the
    /// calls on handler threads.
    pub fn stuck(
        &self,
        running: impl Iterator<Item = CallKey>,
        now_ms: u64,
    ) -> impl Iterator<Item = (u64, &ScheduledCall)> {
        let calls = running.filter_map(|key| Some((key.serial, self.get(key)?)));
        calls.filter(move |(_, call)| {
            call.is_orphaned && call.deadline_ms.saturating_add(GRACE_MS) <= now_ms
        })
    }

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

    /// Removes a call.
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

    /// Returns a call, if it still exists.
    pub fn get(&self, key: CallKey) -> Option<&ScheduledCall> {
        let entry = self.entries.get(key.index)?;
        (entry.serial == key.serial).then_some(&entry.call)
    }

    /// Returns a call for changes, if it still exists.
    pub fn get_mut(&mut self, key: CallKey) -> Option<&mut ScheduledCall> {
        let entry = self.entries.get_mut(key.index)?;
        (entry.serial == key.serial).then_some(&mut entry.call)
    }

    /// Returns the calls of a connection, newest first.
    pub fn of(&self, token: Token) -> impl Iterator<Item = (CallKey, &ScheduledCall)> {
        let first = self.newest.get(token.index()).copied().unwrap_or(NONE);
        let at = |index: usize| Some((index, self.entries.get(index)?));
        std::iter::successors(at(first), move |(_, entry)| at(entry.older))
            .map(|(index, entry)| (key(index, entry), &entry.call))
            // Earlier calls may belong to another connection that had this index.
            .filter(move |(_, call)| call.token == token)
    }

    pub fn iter(&self) -> impl Iterator<Item = (CallKey, &ScheduledCall)> {
        self.entries
            .iter()
            .map(|(index, entry)| (key(index, entry), &entry.call))
    }

    /// Returns the number of calls.
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
            read_ns: 0,
            deadline_ms: 0,
            timer: 0,
            size: 0,
            charged_bytes: 0,
            to_run: None,
            state: Arc::default(),
            shown: ShownCall::default(),
            access: None,
            sent_to: None,
            is_answered: false,
            is_evicted: false,
            is_orphaned: false,
        }
    }

    proptest! {
        #[test]
        fn the_list_of_a_connection_has_only_its_calls(
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
