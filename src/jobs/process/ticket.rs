//! Names what a request to the store was made for, so that the event loop knows what to do with its reply.
//!
//! The threads of the store pass a ticket back unchanged. Each part of the jobs process that makes requests has
//! variants of its own here.

use crate::link::attempt_frame::AttemptId;
use crate::protocol::job_id::JobId;

/// A call of a worker or session: its link, and its number on that link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CallPlace {
    /// The number of the link. It is never used again for another link.
    pub link: u64,
    pub number: u64,
}

/// What a request was made for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ticket {
    /// `rpc.job.enqueue`.
    Enqueue(CallPlace),
    /// `rpc.job.cancel`.
    Cancel(CallPlace, JobId),
    /// `rpc.job.get`.
    Get(CallPlace),
    /// The calls of `rpc.job.wait` for this job.
    Wait(JobId),
    /// The same, because another jobs process may have ended the job.
    Look(JobId),
    /// The task of a command with this number.
    Command(u64),
    /// The counts for the status.
    Counts,
    /// A claim for the executor at the other end of this link.
    Claim(u64),
    /// The end of this attempt.
    Settle(AttemptId),
    /// The process that runs an attempt.
    Process,
    /// The attempts that run.
    Running,
    /// The instance ends, and is forgotten by the store.
    Leave,
}
