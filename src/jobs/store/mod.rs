//! Keeps jobs: the interface of an engine, and the engines.
//!
//! An engine executes a list of [`StoreRequest`]s in one transaction and returns one [`StoreReply`] for each.
//! A request that is refused changes nothing and does not stop the others. All decisions are in
//! [`super::policy`], which an engine calls inside the transaction.
//!
//! - [`sqlite`]: the engine for one machine (feature `jobs-sqlite`).
//! - `model_world`: an engine in memory, against which the tests compare the others.
//!
//! An engine reports each fault as a [`StoreError`]. It never retries: the jobs process decides that.

#[cfg(test)]
pub(super) mod conformance_tests;
pub mod error;
pub mod group;
#[cfg(test)]
mod model_world;
#[cfg(test)]
mod random_order_tests;
pub mod request;
#[cfg(feature = "jobs-sqlite")]
pub mod sqlite;

use error::StoreError;
#[cfg(test)]
use request::StoreLimits;
use request::{
    ListFilter, ListPage, Maintained, RunningAttempt, StoreCounts, StoreFacts, StoreReply,
    StoreRequest,
};

use super::policy::UnixMs;
use super::policy::retention::RetentionRules;
use super::record::{InstanceId, JobDetails, JobRecord, ProcessMark};
use crate::protocol::job_id::JobId;

/// The largest number of bytes of the jobs in a page of an export, except that a page has at least one job.
pub const EXPORT_PAGE: usize = 4 << 20;

/// The largest number of rows of a page of a list.
pub const LIST_PAGE: usize = 1_000;

/// The writing side of a store. One thread of a process uses it. During a reload, two processes of the instance have
/// the store open.
pub trait Engine: Send {
    /// Returns the time by the engine's clock. Due times and expiries follow this clock. Only the conformance suite
    /// asks for it: requests and replies have the times that others need.
    #[cfg(test)]
    fn now_ms(&mut self) -> Result<UnixMs, StoreError>;

    /// Returns what status, log and `job check` say about the store.
    fn facts(&self) -> &StoreFacts;

    /// Returns the secret of the store, from which ids for an `Idempotency-Key` are derived.
    fn secret(&self) -> &[u8];

    /// Sets the limits. After a reload another process opens the store with its own ones.
    #[cfg(test)]
    fn set_limits(&mut self, limits: StoreLimits);

    /// Executes all requests in their order in one transaction, and commits it. The replies have the same
    /// order. They may be sent only after the return.
    ///
    /// # Errors
    /// Nothing is stored if [`StoreError::is_maybe_stored`] is false. If it is true, all requests or none are
    /// stored.
    fn execute(&mut self, requests: &[StoreRequest]) -> Result<Vec<StoreReply>, StoreError>;

    /// Does what was postponed in `execute`, such as a checkpoint. Call it when the replies were sent.
    ///
    /// # Errors
    /// Nothing that was committed is lost.
    fn after_commit(&mut self) -> Result<(), StoreError>;

    /// Does one pass of maintenance: ends expired jobs, removes ended jobs that are old enough, and measures
    /// the store. A pass handles a limited number of jobs.
    ///
    /// # Errors
    /// As for [`Self::execute`].
    fn maintain(&mut self, rules: &RetentionRules) -> Result<Maintained, StoreError>;

    /// Returns when the next waiting job of one of these methods is due or expires, which may be in the past.
    /// Paused methods have no due jobs. `None` if no job waits.
    ///
    /// # Errors
    /// The store could not be read.
    fn next_event_ms(&mut self, methods: &[&str]) -> Result<Option<UnixMs>, StoreError>;

    /// Returns the processes of commands and programs that may still run attempts of instances other than
    /// `own`. They must be gone before `own` joins.
    ///
    /// # Errors
    /// The store could not be read.
    fn leftovers(&mut self, own: InstanceId) -> Result<Vec<ProcessMark>, StoreError>;

    /// Opens another connection for reading.
    ///
    /// # Errors
    /// The store could not be opened.
    fn reader(&self) -> Result<Box<dyn StoreReader>, StoreError>;

    /// Closes the store after a last checkpoint.
    ///
    /// # Errors
    /// The checkpoint failed. Nothing that was committed is lost.
    fn close(self: Box<Self>) -> Result<(), StoreError>;
}

/// What the instance knows about a store that it opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opening {
    /// Nothing. The store is created if it does not exist.
    First,
    /// The instance has used it. So it must exist.
    Again,
    /// Another process of the instance is using it. So it must exist, and its log has been checked.
    Beside,
}

/// The reading side of a store. Each method sees one state of the store: all groups that were committed before.
pub trait StoreReader: Send {
    /// Returns the record of a job; `None` if it is unknown or was removed.
    ///
    /// # Errors
    /// As for all methods: the store could not be read.
    fn record(&mut self, id: JobId) -> Result<Option<JobRecord>, StoreError>;

    /// Returns a job with its params and all that the store knows.
    ///
    /// # Errors
    /// The store could not be read.
    fn details(&mut self, id: JobId) -> Result<Option<JobDetails>, StoreError>;

    /// Returns a page of records. A page may have fewer jobs than `most`, even none, and still have a next
    /// one, because a page also reads a limited number of rows.
    ///
    /// # Errors
    /// The store could not be read.
    fn list(&mut self, filter: &ListFilter, most: usize) -> Result<ListPage, StoreError>;

    /// Returns the counts of all queues at `now`.
    ///
    /// # Errors
    /// The store could not be read.
    fn counts(&mut self, now: UnixMs) -> Result<StoreCounts, StoreError>;

    /// Returns the running attempts of an instance.
    ///
    /// # Errors
    /// The store could not be read.
    fn running(&mut self, owner: InstanceId) -> Result<Vec<RunningAttempt>, StoreError>;

    /// Returns the next jobs behind the place `after` (from 0) of an export, and the place of the last one.
    /// No jobs: the export is complete.
    ///
    /// # Errors
    /// The store could not be read.
    fn export(&mut self, after: u64) -> Result<(Vec<JobDetails>, u64), StoreError>;
}
