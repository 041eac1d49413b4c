//! Holds the calls of a pipeline that have no answer yet.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam_channel::Sender;

use super::error::ClientError;
use super::reply::Reply;

pub(super) type Outcome = Result<Reply, ClientError>;

/// The calls that have no answer yet, by id.
#[derive(Debug, Default)]
pub(super) struct PipelinedCalls {
    /// The number of ids that were used. An answer to one of them without an entry is late.
    pub(super) given: u64,
    pub(super) calls: HashMap<u64, Sender<Outcome>>,
    /// The reader has seen the end: nothing sent from now on is answered.
    pub(super) ended: bool,
}

impl PipelinedCalls {
    /// Adds a call. Returns its id.
    pub(super) fn add(&mut self, sender: Sender<Outcome>) -> u64 {
        self.given += 1;
        self.calls.insert(self.given, sender);
        self.given
    }
}

/// The entry of one call. Its drop removes the call, because its caller no longer waits: the answer
/// came, its time was over, or the handle was dropped.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) id: u64,
    pub(super) unanswered: Arc<Mutex<PipelinedCalls>>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        lock(&self.unanswered).calls.remove(&self.id);
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
