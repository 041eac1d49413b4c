//! Defines the requests to an engine and its replies.

use crate::jobs::policy::UnixMs;
use crate::jobs::policy::enqueue::NewJob;
use crate::jobs::policy::states::{AttemptEnd, EndReason, JobFate, JobState, RetryRules};
use crate::jobs::policy::turns::QueueShare;
use crate::jobs::record::{AttemptOwner, InstanceId, JobDetails, JobRecord, ProcessMark};
use crate::protocol::job_id::JobId;

/// What the store keeps about an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstanceInfo {
    pub id: InstanceId,
    pub host: String,
    /// The pid of the master.
    pub pid: i32,
    /// The version of preforkd.
    pub version: String,
}

/// A request to the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreRequest {
    /// Registers an instance and frees the attempts of all instances that have ended. It changes nothing if
    /// it is repeated.
    Join(InstanceInfo),
    /// Forgets an instance that ends cleanly.
    Leave(InstanceId),
    /// Stores jobs: all or none.
    Enqueue(Vec<NewJob>),
    /// Takes due jobs for attempts.
    Claim(ClaimRequest),
    /// Records which process runs an attempt, so that the next server waits for it.
    NoteProcess {
        id: JobId,
        token: u64,
        process: ProcessMark,
    },
    /// Stores how an attempt ended.
    Settle(Settlement),
    /// Cancels a waiting job, or requests it for a running one.
    Cancel(JobId),
    /// Lets dead and cancelled jobs wait again, with counters at 0. Other jobs are left alone.
    Retry(JobSelection),
    /// Removes ended jobs. Live jobs are left alone.
    Purge(JobSelection),
    /// Stops or resumes the claims of a method, for all instances.
    Pause { method: String, is_paused: bool },
    /// Stores exported jobs. A job whose id exists is left alone. A running job waits again.
    Import(Vec<JobDetails>),
}

/// The reply to the request of the same name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreReply {
    Joined(Vec<FreedAttempt>),
    Left,
    Enqueued(EnqueueReply),
    /// In the order in which the queues took turns.
    Claimed(Vec<ClaimedJob>),
    /// False if the attempt is not the current one.
    Noted(bool),
    Settled(SettleReply),
    Cancelled(CancelReply),
    Retried(Selected),
    Purged(Selected),
    Paused,
    /// The number of jobs that were stored. The others were left out: their id exists, or another live job has their
    /// method and key.
    Imported(usize),
}

/// A claim for the capacity of one executor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimRequest {
    pub owner: AttemptOwner,
    /// The queues in their turn, each with its own limit.
    pub shares: Vec<QueueShare>,
    /// The largest number of jobs of all queues together.
    pub most: usize,
}

/// A job that was claimed for an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimedJob {
    pub id: JobId,
    pub token: u64,
    pub method: String,
    pub params: Box<str>,
    /// The number of this attempt, from 1.
    pub attempt: u32,
    pub max_attempts: u32,
    pub timeout_ms: u64,
    pub trace: Option<String>,
    /// When the job became due, for the time that it waited.
    pub due_ms: UnixMs,
}

/// How an attempt ended, and the rules for what follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settlement {
    pub id: JobId,
    pub token: u64,
    pub end: AttemptEnd,
    pub rules: RetryRules,
    /// Random, for the backoff.
    pub jitter: u16,
}

/// The reply to an enqueue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EnqueueReply {
    /// The jobs in the order of the request.
    Stored(Vec<EnqueuedJob>),
    /// The id of the job at this index exists with another method or other params. Nothing was stored.
    Conflict { index: usize, id: JobId },
    /// `max-jobs` live jobs exist. Nothing was stored.
    TooMany,
    /// The store is over `max-size`. Nothing was stored.
    StoreFull,
}

/// A job after its enqueue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnqueuedJob {
    /// The id of the request, or that of the live job with the same key.
    pub id: JobId,
    pub state: JobState,
    pub is_new: bool,
    pub due_ms: UnixMs,
}

/// The reply to a settlement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SettleReply {
    /// The end of the attempt is stored, and this follows.
    Stored(JobFate),
    /// The same end of this attempt was stored before: the executor has sent it again.
    Repeated,
    /// The attempt is not the current one. Nothing was changed. `current` is the token now; `None` if the job
    /// does not exist.
    Stale { current: Option<u64> },
}

/// The reply to a cancel request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CancelReply {
    /// It waited in the queue of this method, and has ended now.
    Ended {
        method: String,
    },
    /// It runs. The request must be sent to its executor.
    Requested {
        owner: AttemptOwner,
        token: u64,
    },
    /// It had ended before.
    WasEnded,
    NoSuchJob,
}

/// An attempt that another instance had left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FreedAttempt {
    pub id: JobId,
    pub method: String,
    pub token: u64,
    pub fate: JobFate,
}

/// The jobs that a command of an operator means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobSelection {
    Ids(Vec<JobId>),
    /// Ended jobs of a state, at most `most` of them.
    Ended {
        state: JobState,
        method: Option<String>,
        most: usize,
        /// Where to begin: the `next` of the previous reply.
        after: Option<ListCursor>,
    },
}

/// What a command of an operator did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selected {
    /// The jobs that were changed or removed.
    pub done: Vec<JobId>,
    /// The jobs that were left alone, with the reason.
    pub left: Vec<(JobId, LeftAlone)>,
    /// Where to continue; `None` if there are no more jobs.
    pub next: Option<ListCursor>,
}

/// Why a job was left alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeftAlone {
    NoSuchJob,
    /// It has this state.
    Is(JobState),
    /// Another live job of the method has its key.
    KeyInUse,
    /// `max-jobs` live jobs exist.
    TooMany,
}

/// The limits of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreLimits {
    /// The largest number of live jobs.
    pub max_jobs: u64,
    /// The largest number of bytes of data and indexes.
    pub max_size: u64,
}

/// What is known about an open store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreFacts {
    /// The path, without a password.
    pub location: String,
    /// Major and minor version of the schema.
    pub schema: (u32, u32),
    /// Whether acknowledged jobs survive a power failure.
    pub is_durable: bool,
    /// Live jobs when the store was opened.
    pub waiting: u64,
    pub running: u64,
}

/// What a pass of maintenance did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Maintained {
    /// Jobs that are dead because they expired.
    pub expired: Vec<EndedJob>,
    /// The number of ended jobs that were removed.
    pub removed: u64,
    /// Bytes of data and indexes.
    pub size: u64,
    /// Whether the store is over `max-size`.
    pub is_full: bool,
    /// If false, another pass has work to do now.
    pub is_complete: bool,
}

/// A job that has just ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndedJob {
    pub id: JobId,
    pub method: String,
    pub state: JobState,
    pub reason: Option<EndReason>,
}

/// A place in a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct ListCursor {
    /// When the last job ended; 0 in a list of other jobs.
    pub end_ms: UnixMs,
    /// The sequence number of the last job.
    pub seq: u64,
}

/// Which jobs a list has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ListFilter {
    pub state: Option<JobState>,
    pub method: Option<String>,
    /// Where to begin: the `next` of the previous page.
    pub after: Option<ListCursor>,
}

/// A page of a list: live jobs in the order of their enqueue, ended jobs of a state in the order of their end.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ListPage {
    pub jobs: Vec<JobRecord>,
    /// Where the next page begins; `None` after the last page.
    pub next: Option<ListCursor>,
}

/// The counts of a queue.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct QueueCounts {
    pub method: String,
    pub waiting: u64,
    /// Waiting jobs whose due time has come.
    pub due: u64,
    pub running: u64,
    /// Dead jobs that are still kept.
    pub dead: u64,
    /// The due time of the due job that waits longest.
    pub oldest_due_ms: Option<UnixMs>,
    pub is_paused: bool,
}

/// The counts of all queues that have jobs or are paused, sorted by method.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoreCounts {
    pub queues: Vec<QueueCounts>,
}

/// An attempt that runs, as the store has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunningAttempt {
    pub id: JobId,
    pub token: u64,
    pub method: String,
    pub executor: i32,
    pub is_cancel_requested: bool,
    pub process: Option<ProcessMark>,
}
