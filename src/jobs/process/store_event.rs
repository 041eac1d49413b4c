//! Defines what the event loop asks the threads of the store, and what they report.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::SeqCst};
use std::time::Duration;

use super::health::StoreState;
use super::ticket::Ticket;
use crate::jobs::policy::UnixMs;
use crate::jobs::record::{JobDetails, JobRecord};
use crate::jobs::store::Engine;
use crate::jobs::store::error::StoreError;
use crate::jobs::store::request::{
    ClaimedJob, FreedAttempt, ListFilter, ListPage, Maintained, RunningAttempt, StoreCounts,
    StoreFacts, StoreReply, StoreRequest,
};
use crate::protocol::job_id::JobId;

/// An order to the writing thread.
pub enum WriterOrder {
    Execute(SubmittedRequest),
    /// A read has found that the store is damaged.
    Damaged(StoreError),
    /// Execute what has arrived, close the store and end.
    Close,
}

/// A request with what its reply is for.
pub struct SubmittedRequest {
    pub request: StoreRequest,
    pub ticket: Ticket,
    /// `Some` if the request may be withdrawn.
    pub hold: Option<Arc<RequestHold>>,
}

/// A report of a thread of the store.
#[derive(Debug)]
pub enum StoreEvent {
    /// The store is open, and the instance has joined.
    Opened(Box<OpenedStore>),
    /// The store cannot be used: the process must exit.
    Refused(String),
    /// The state has changed.
    State(StoreState),
    /// A group was committed within this time. The replies to its requests follow.
    Committed(Duration),
    /// The reply to a request, which is committed.
    Replied(Ticket, StoreReply),
    /// The reply to a claim, which is committed, and when the next job of the claimed queues is due. That is in the
    /// store's time and may be in the past; `None` if no job waits.
    Claimed(Ticket, Vec<ClaimedJob>, Option<UnixMs>),
    /// The request is not stored, or it is unknown whether it is.
    Failed(Ticket, StoreError),
    /// The result of a read.
    Read(Ticket, Result<ReadReply, StoreError>),
    /// A pass of maintenance was done.
    Maintained(Maintained),
    /// A sync has failed: the process must exit at once, and nothing more is acknowledged.
    SyncFailed(String),
    /// The store is closed after the last request.
    Closed,
}

impl StoreEvent {
    /// Returns the report of a reply that is committed.
    pub fn of_reply(
        ticket: Ticket,
        reply: StoreReply,
        request: &StoreRequest,
        engine: &mut dyn Engine,
    ) -> Self {
        match (request, reply) {
            (StoreRequest::Claim(claim), StoreReply::Claimed(jobs)) => {
                let methods: Vec<&str> = claim.shares.iter().map(|it| it.method.as_str()).collect();
                // If it cannot be read when the next job is due, the next claim is made at once.
                let next = engine.next_event_ms(&methods).unwrap_or(Some(0));
                StoreEvent::Claimed(ticket, jobs, next)
            }
            (_, reply) => StoreEvent::Replied(ticket, reply),
        }
    }
}

/// What is known about the store that was opened.
#[derive(Debug)]
pub struct OpenedStore {
    pub facts: StoreFacts,
    /// The secret from which ids for an `Idempotency-Key` are derived.
    pub secret: Vec<u8>,
    /// The attempts of earlier instances.
    pub freed: Vec<FreedAttempt>,
}

/// A read on the connection for reading. Each sees all groups that were committed before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadRequest {
    Record(JobId),
    Details(JobId),
    List(ListFilter, usize),
    Counts,
    /// The running attempts of this instance.
    Running,
    /// The next jobs behind this place.
    Export(u64),
}

/// The result of the read of the same name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadReply {
    Record(Option<JobRecord>),
    Details(Option<JobDetails>),
    List(ListPage),
    Counts(StoreCounts),
    Running(Vec<RunningAttempt>),
    Export(Vec<JobDetails>, u64),
}

const WAITING: u8 = 0;
const TAKEN: u8 = 1;
const WITHDRAWN: u8 = 2;

/// Decides a race: the event loop may withdraw a request while the writing thread begins to execute it. Only one of
/// them succeeds, so a request that was withdrawn is certainly not stored.
#[derive(Debug, Default)]
pub struct RequestHold(AtomicU8);

impl RequestHold {
    /// Withdraws the request. Returns false if it was executed, or is being executed.
    pub fn withdraw(&self) -> bool {
        self.change(WAITING, WITHDRAWN)
    }

    /// For the writing thread: returns whether the request may be executed, perhaps again.
    pub fn take(&self) -> bool {
        self.change(WAITING, TAKEN) || self.0.load(SeqCst) == TAKEN
    }

    /// For the writing thread: lets a request wait again that is certainly not stored.
    pub fn release(&self) {
        self.change(TAKEN, WAITING);
    }

    /// For the writing thread: returns whether the request was withdrawn.
    pub fn is_withdrawn(&self) -> bool {
        self.0.load(SeqCst) == WITHDRAWN
    }

    fn change(&self, from: u8, to: u8) -> bool {
        self.0.compare_exchange(from, to, SeqCst, SeqCst).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_executed_or_withdrawn() {
        let hold = RequestHold::default();
        assert!(hold.take() && !hold.withdraw());
        assert!(hold.take(), "it is executed again after a fault");
        hold.release();
        assert!(hold.withdraw() && !hold.take());
        hold.release();
        assert!(!hold.take() && hold.is_withdrawn(), "it stays withdrawn");
    }
}
