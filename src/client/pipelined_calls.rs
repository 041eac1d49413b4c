//! Holds the calls of a pipeline that have no answer yet.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use crossbeam_channel::Sender;

use super::reply::Outcome;
use crate::sys::lock::lock;

/// The calls that have no answer yet, by id.
#[derive(Debug, Default)]
pub(super) struct PipelinedCalls {
    /// The number of ids that were used. If an answer has one of these ids and there is no entry, the answer is late.
    pub(super) given: u64,
    pub(super) calls: HashMap<u64, Sender<Outcome>>,
    /// Whether the reader has seen the end of the connection. Then no call is answered any more.
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

/// The entry of one call. Its drop removes the call, because its caller does not wait any more: the answer
/// came, its timeout has passed, or the handle was dropped.
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
