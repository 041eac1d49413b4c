//! Holds the state of the jobs process that its parts share.
//!
//! The event loop owns it. The other files beside this one have functions that get it, one file for each concern.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::command_tasks::Commands;
use super::executors::Executors;
use super::links::JobLinks;
use super::store_event::RequestHold;
use super::store_handle::StoreHandle;
use super::ticket::CallPlace;
use super::waits::Waits;
use crate::config::{JobsConfig, LimitsConfig};
use crate::handler::registry::Registry;
use crate::jobs::figures::JobFigures;
use crate::jobs::record::InstanceId;
use crate::jobs::store::request::StoreCounts;
use crate::link::scoreboard::{JOBS_LANE, WorkerRecord};
use crate::protocol::job_id::JobId;
use crate::worker::peer;

/// A call that changes the store and has no answer yet.
#[derive(Debug)]
pub struct AwaitedChange {
    pub hold: Arc<RequestHold>,
    /// Whether the answer is an array.
    pub is_array: bool,
    /// The job, if it is one.
    pub job: Option<JobId>,
    /// When it is answered with `unavailable`, in milliseconds (CLOCK_MONOTONIC).
    pub due_ms: u64,
    /// When it arrived, in nanoseconds.
    pub begun_ns: u64,
}

/// The state that the parts of the jobs process share.
pub struct JobsCore {
    pub config: JobsConfig,
    pub limits: LimitsConfig,
    /// The methods of this generation.
    pub registry: Arc<Registry>,
    pub instance: InstanceId,
    pub links: JobLinks,
    pub store: StoreHandle,
    /// Enqueues and cancel requests without an answer.
    pub awaited: HashMap<CallPlace, AwaitedChange>,
    /// When the calls in `awaited` are due.
    pub awaited_until: BTreeSet<(u64, CallPlace)>,
    pub waits: Waits,
    /// The number of records of jobs with waiting calls that are being read, because another jobs process may have
    /// ended these jobs.
    pub looks: usize,
    /// The commands of operators.
    pub commands: Commands,
    /// `None` if the process has no counters.
    pub counters: Option<JobFigures>,
    /// Whether the counts of the store are being read.
    pub is_counting: bool,
    /// Whether the store has changed since the last read of the counts began.
    pub has_changed: bool,
    /// When the last read of the counts began, and the earliest time of the next one, both in milliseconds
    /// (CLOCK_MONOTONIC).
    pub count_times: (u64, u64),
    /// The last counts of the store.
    pub counts: StoreCounts,
    /// The queues without a method here that the log has named.
    pub unserved: BTreeSet<String>,
    /// The executors of attempts.
    pub executors: Executors,
    /// The time of the last wake-up in milliseconds (CLOCK_MONOTONIC).
    pub now_ms: u64,
    /// Whether it takes no further call.
    pub is_draining: bool,
    /// The calls that it has read.
    pub calls: u64,
    /// All scoreboard records, and the index of its own.
    pub records: (&'static [WorkerRecord], usize),
}

impl JobsCore {
    /// Returns whether another process of the instance uses the store.
    pub fn has_other(&self) -> bool {
        has_other_process(self.records)
    }

    /// Adds a call that is to be answered with `unavailable` when its time is over.
    pub fn await_change(&mut self, call: CallPlace, change: AwaitedChange) {
        self.awaited_until.insert((change.due_ms, call));
        self.awaited.insert(call, change);
    }

    /// Removes such a call. Returns `None` if it was answered already.
    pub fn take_awaited(&mut self, call: CallPlace) -> Option<AwaitedChange> {
        let change = self.awaited.remove(&call)?;
        self.awaited_until.remove(&(change.due_ms, call));
        Some(change)
    }
}

/// Returns whether the scoreboard shows a jobs process beside the one with the record at this index.
pub fn has_other_process((records, own): (&'static [WorkerRecord], usize)) -> bool {
    peer::used(records).any(|(index, record)| {
        // A record keeps its lane after its process has ended.
        let is_used = record.generation.load(Relaxed) != 0;
        index != own && is_used && record.lane.load(Relaxed) == JOBS_LANE
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::link::scoreboard::Scoreboard;

    #[test]
    fn a_jobs_process_sees_another_one_until_that_has_ended() {
        let board = Scoreboard::new().unwrap();
        let records = board.records();
        let (own, other) = (records.len() - 1, records.len() - 3);
        let show = |index: usize, lane| {
            records[index].lane.store(lane, Relaxed);
            records[index].generation.store(2, Relaxed);
        };
        show(own, JOBS_LANE);
        show(other, 1);
        assert!(!has_other_process((records, own)), "that is a pool process");
        show(other, JOBS_LANE);
        assert!(has_other_process((records, own)));
        records[other].clear_capacity();
        assert!(!has_other_process((records, own)));
    }
}
