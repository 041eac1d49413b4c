//! The calls of a program that runs several at once (`concurrency` above 1).
//!
//! Each call has an id, which the program returns with the answer. A call that was given up is cancelled
//! with a notification. Its id stays known, because the program must still answer it. A cancelled attempt of a job
//! ends only with that answer or with the program, because no other attempt may begin before that.

use std::collections::BTreeMap;

use super::entry::Entry;
use crate::handler::call_state::CallKey;
use crate::throttle::Millis;

/// How long a cancelled call may stay unanswered after the timeout of its method, in milliseconds.
const GRACE: Millis = 1000;

/// The open calls of one program.
#[derive(Debug)]
pub(super) struct ParallelCalls {
    /// The largest number of calls at once.
    most: usize,
    last_id: u64,
    running: BTreeMap<u64, Entry>,
    /// The deadlines for answers to cancelled calls, by id.
    cancelled: BTreeMap<u64, Cancelled>,
}

#[derive(Debug)]
struct Cancelled {
    answer_by: Millis,
    /// `Some` if it is the attempt of a job.
    attempt: Option<Entry>,
}

/// The meaning of the id in an answer.
#[derive(Debug)]
pub(super) enum OpenCall {
    Call(Entry),
    /// A cancelled call, whose answer is dropped, or a cancelled attempt.
    Cancelled(Option<Entry>),
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

    /// Returns how many of its calls must still be reported: those with a waiting client, and all attempts.
    pub fn count(&self) -> usize {
        let cancelled = self.cancelled.values();
        self.running.len() + cancelled.filter(|it| it.attempt.is_some()).count()
    }

    /// Returns whether all its calls and attempts were given up.
    pub fn are_abandoned(&self) -> bool {
        self.running.is_empty()
    }

    /// Returns whether it runs this call.
    pub fn has(&self, key: CallKey) -> bool {
        let attempts = self.cancelled.values().filter_map(|it| it.attempt.as_ref());
        let mut entries = self.running.values().chain(attempts);
        entries.any(|entry| entry.call.key == key)
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

    /// Returns the time at which the first cancelled call stays unanswered for too long. From then on the
    /// program gets no further call, and it is ended when it has no call that is still wanted.
    pub fn overdue_at(&self) -> Option<Millis> {
        self.cancelled.values().map(|it| it.answer_by).min()
    }

    fn is_overdue(&self, now: Millis) -> bool {
        self.overdue_at().is_some_and(|at| at <= now)
    }

    /// Removes the calls that were given up, and returns those that are no attempts of jobs. `cancel` gets the id of
    /// each, to cancel it in the program. `end` returns the time until which such a call may run.
    pub fn cancel_given_up(
        &mut self,
        end: impl Fn(&Entry) -> Millis,
        mut cancel: impl FnMut(u64),
    ) -> Vec<Entry> {
        // A cancelled attempt may be given less time later.
        for cancelled in self.cancelled.values_mut() {
            if let Some(entry) = &cancelled.attempt {
                cancelled.answer_by = end(entry).saturating_add(GRACE).min(cancelled.answer_by);
            }
        }
        let mut calls = Vec::new();
        let running = self.running.iter();
        let over = running.filter(|(_, entry)| entry.call.state.is_over());
        let ids: Vec<u64> = over.map(|(id, _)| *id).collect();
        for id in ids {
            let Some(entry) = self.running.remove(&id) else {
                continue;
            };
            cancel(id);
            let answer_by = end(&entry).saturating_add(GRACE);
            let is_attempt = entry.call.state.identity().attempt.is_some();
            let attempt = match is_attempt {
                true => Some(entry),
                false => {
                    calls.push(entry);
                    None
                }
            };
            self.cancelled.insert(id, Cancelled { answer_by, attempt });
        }
        calls
    }

    /// Returns the call to which an answer belongs.
    pub fn take(&mut self, id: u64) -> OpenCall {
        if let Some(entry) = self.running.remove(&id) {
            return OpenCall::Call(entry);
        }
        match self.cancelled.remove(&id) {
            Some(cancelled) => OpenCall::Cancelled(cancelled.attempt),
            None => OpenCall::Unknown,
        }
    }

    /// Returns all calls and attempts that it runs.
    pub fn into_running(self) -> impl Iterator<Item = Entry> {
        let cancelled = self.cancelled.into_values();
        (self.running.into_values()).chain(cancelled.filter_map(|it| it.attempt))
    }
}
