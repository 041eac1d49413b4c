//! The calls of a program that runs several at once (`concurrency` above 1).
//!
//! Each call has an id, which the program returns with the answer. A call that was given up is cancelled
//! with a notification. Its id stays known, because the program must still answer it.

use std::collections::BTreeMap;

use super::entry::Entry;
use crate::handler::call_state::CallKey;
use crate::throttle::Millis;

/// How long a cancelled call may stay unanswered after the timeout of its method, in milliseconds.
const GRACE: Millis = 1000;

/// The open calls of one program.
#[derive(Debug)]
pub(super) struct ParallelCalls {
    /// The most calls at once.
    most: usize,
    last_id: u64,
    running: BTreeMap<u64, Entry>,
    /// The deadlines for answers to cancelled calls, by id.
    cancelled: BTreeMap<u64, Millis>,
}

/// The meaning of the id in an answer.
#[derive(Debug)]
pub(super) enum OpenCall {
    Call(Entry),
    /// A cancelled call, whose answer is dropped.
    Cancelled,
    /// No open call has this id.
    Unknown,
}

impl ParallelCalls {
    /// For a program that may run `most` calls at once.
    pub fn new(most: usize) -> Self {
        ParallelCalls {
            most,
            last_id: 0,
            running: BTreeMap::new(),
            cancelled: BTreeMap::new(),
        }
    }

    /// Returns the id for the next call.
    pub fn next_id(&self) -> u64 {
        self.last_id + 1
    }

    /// Adds the call that was written with `next_id`.
    pub fn add(&mut self, entry: Entry) {
        self.last_id += 1;
        self.running.insert(self.last_id, entry);
    }

    /// Returns how many of its calls still have a waiting client.
    pub fn count(&self) -> usize {
        self.running.len()
    }

    /// Returns whether it runs this call.
    pub fn has(&self, key: CallKey) -> bool {
        self.running.values().any(|entry| entry.job.key == key)
    }

    /// Returns whether the program owes no answer.
    pub fn is_empty(&self) -> bool {
        self.running.is_empty() && self.cancelled.is_empty()
    }

    /// Returns how many calls it may run, including the current ones.
    pub fn capacity(&self, now: Millis) -> usize {
        match self.is_overdue(now) {
            true => self.running.len(),
            false => self.most - self.cancelled.len().min(self.most),
        }
    }

    /// Returns whether it may get another call.
    pub fn has_room(&self, now: Millis) -> bool {
        self.running.len() < self.capacity(now)
    }

    /// Returns the time at which it has kept a cancelled call for too long. From then on it gets no
    /// further call, and it is ended when it has no other one.
    pub fn overdue_at(&self) -> Option<Millis> {
        self.cancelled.values().min().copied()
    }

    fn is_overdue(&self, now: Millis) -> bool {
        self.overdue_at().is_some_and(|at| at <= now)
    }

    /// Removes the calls that were given up, and returns them with their ids, so that the caller can
    /// cancel them in the program. `end` returns the time until which such a call may run.
    pub fn cancel_given_up(&mut self, end: impl Fn(&Entry) -> Millis) -> Vec<(u64, Entry)> {
        let running = self.running.iter();
        let ids = running.filter(|(_, entry)| entry.job.state.is_over());
        let ids: Vec<u64> = ids.map(|(id, _)| *id).collect();
        let given_up = ids
            .into_iter()
            .filter_map(|id| Some((id, self.running.remove(&id)?)));
        let given_up: Vec<(u64, Entry)> = given_up.collect();
        for (id, entry) in &given_up {
            self.cancelled.insert(*id, end(entry).saturating_add(GRACE));
        }
        given_up
    }

    /// Returns the call to which an answer belongs.
    pub fn take(&mut self, id: u64) -> OpenCall {
        if let Some(entry) = self.running.remove(&id) {
            return OpenCall::Call(entry);
        }
        match self.cancelled.remove(&id) {
            Some(_) => OpenCall::Cancelled,
            None => OpenCall::Unknown,
        }
    }

    /// Returns all calls that it runs.
    pub fn into_running(self) -> impl Iterator<Item = Entry> {
        self.running.into_values()
    }
}
