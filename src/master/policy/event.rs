//! Defines the input of the master's policy: events, and the limits of a generation.
//!
//! The policy answers with the actions of [`super::action`]. Nothing here decides anything.

use serde::{Deserialize, Serialize};

use crate::link::ids::{Generation, Pid, Slot};
use crate::protocol::call_id::CallId;
pub use crate::sys::process::Exit;
use crate::throttle;

/// Monotonic milliseconds. The caller chooses the zero point.
pub type Millis = u64;

/// The largest number of workers that one generation can have.
pub const MAX_COUNT: usize = 1024;

/// The limits that the configuration of one generation sets for its processes. A member that an older version has not
/// exported is 0 or false.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PolicyLimits {
    /// The number of workers. Values outside 1 to [`MAX_COUNT`] are clamped.
    pub count: usize,
    /// The number of pools, each of which has a pool process.
    pub pools: usize,
    /// The number of isolated listeners, each of which has an acceptor.
    pub acceptors: usize,
    pub has_observer: bool,
    /// Whether there is a jobs process.
    pub has_jobs: bool,
    /// The longest time from the fork of a child to its ready report; 0 means no limit.
    pub boot_timeout: Millis,
    /// The longest time that a drain may take.
    pub drain_timeout: Millis,
    /// The greatest age of the last heartbeat of an event loop; 0 means no limit.
    pub heartbeat_timeout: Millis,
    /// The number of young deaths of a slot after which forks are delayed.
    pub respawn_burst: u32,
    /// The longest wait of a throttled slot; 0 means no throttle.
    pub respawn_max_delay: Millis,
    /// The resident memory above which a worker is recycled, in bytes; 0 means no limit.
    pub max_memory: u64,
    /// The age at which a worker is recycled; 0 means no limit.
    pub max_lifetime: Millis,
    /// The largest number of recycles that may run at one time, for all reasons together.
    pub max_unavailable: usize,
}

impl PolicyLimits {
    /// Returns the slots of pool processes, of the jobs process and of acceptors.
    pub(crate) fn other_slots(&self) -> impl Iterator<Item = Slot> + use<> {
        let pools = (0..self.pools).map(Slot::of_pool);
        let jobs = self.has_jobs.then_some(Slot::JOBS);
        pools
            .chain(jobs)
            .chain((0..self.acceptors).map(Slot::of_acceptor))
    }

    /// Returns the limits of the throttle.
    pub fn throttle(&self) -> throttle::ThrottleLimits {
        throttle::ThrottleLimits {
            burst: self.respawn_burst,
            max_delay: self.respawn_max_delay,
        }
    }
}

/// A step of a reload with a pool process that stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolStep {
    /// Prepare it for the next generation as well, and report [`Event::PoolUpdated`].
    Update,
    /// The reload has succeeded, so it belongs to the new generation from now on. Comes before
    /// [`super::action::Action::ReloadDone`].
    Move,
    /// The reload has failed. It continues as before.
    Revert,
}

/// A pool process that may stay at a reload: its slot in the serving generation, and in the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeptPool {
    pub from: Slot,
    pub to: Slot,
}

/// What a child ran last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastCall {
    pub method: String,
    pub call: Option<CallId>,
    /// The id of the job if it was an attempt.
    pub job: Option<String>,
}

/// Something that has happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A fork has succeeded.
    Forked {
        slot: Slot,
        generation: Generation,
        /// The new child.
        pid: Pid,
    },
    /// The system refused a fork.
    ForkFailed {
        slot: Slot,
        generation: Generation,
        /// The error text of the system.
        reason: String,
    },
    /// A child reports that it serves.
    Ready {
        pid: Pid,
    },
    /// A child got SIGTERM without an order. A worker drains already. Any other child serves until its successor is
    /// ready.
    Retiring {
        pid: Pid,
    },
    /// A worker reports that it has read the configured number of calls. It continues until its successor
    /// is ready.
    MaxCallsReached {
        pid: Pid,
        /// The number of calls that it has read.
        calls: u64,
    },
    /// A worker reports that all its handler threads are stuck. It needs a successor soon.
    AllThreadsStuck {
        pid: Pid,
        /// What its threads are doing: a sentence.
        evidence: String,
    },
    /// The result of [`super::action::Action::Diagnose`].
    Diagnosed {
        pid: Pid,
        /// What the worker is doing: a sentence.
        text: String,
    },
    /// The memory of a worker that [`super::fleet::Fleet::to_sample`] has returned.
    Memory {
        pid: Pid,
        /// Resident memory in bytes.
        rss_bytes: u64,
    },
    /// The heartbeat of an event loop, from the scoreboard. Report it before [`super::fleet::Fleet::tick`].
    Heartbeat {
        pid: Pid,
        /// When the event loop last gave a heartbeat, on the same clock as `now`.
        at: Millis,
    },
    /// A child was reaped. Before this event, report the messages that are still in its socketpair.
    Died {
        /// The child. A pid that the policy does not know is ignored.
        pid: Pid,
        /// The name of its pool, for a pool process; the address of its listener, for an acceptor.
        name: Option<String>,
        how: Exit,
        /// What it ran last, from its scoreboard record.
        last: Option<LastCall>,
        /// The highest resident memory that it had, in bytes; 0 if it is not known.
        rss_bytes: u64,
        /// Seconds since 1970.
        at: u64,
    },
    /// The keeper of a living worker has died.
    KeeperLost {
        pid: Pid,
    },
    /// The number of connections that the keeper of a dead worker has handed over or reset. Report it when the worker
    /// was reaped, and before [`super::fleet::Fleet::tick`].
    KeeperProgress {
        keeper: Pid,
        worker: Pid,
        done: u32,
    },
    /// The keeper of a dead worker was reaped.
    KeeperEnded {
        keeper: Pid,
    },
    /// [`super::action::Action::ForkObserver`] has succeeded.
    ObserverForked {
        pid: Pid,
    },
    /// The system refused [`super::action::Action::ForkObserver`].
    ObserverForkFailed {
        /// The error text of the system.
        reason: String,
    },
    /// An observer was reaped.
    ObserverDied {
        pid: Pid,
        how: Exit,
    },
    /// Says whether an observer is stopped (SIGSTOP).
    ObserverStopped {
        pid: Pid,
        is_stopped: bool,
    },
    /// Start the generation of a valid configuration, whose listeners are open. Report it only while
    /// [`Fleet::can_reload`] returns true. The caller keeps requests that come earlier.
    Reload {
        limits: PolicyLimits,
    },
    /// These pool processes may stay at the [`Event::Reload`] that follows, because the key `reload` of their pool
    /// allows it.
    KeepPools {
        pools: Vec<KeptPool>,
    },
    /// The result of [`PoolStep::Update`]: the pool process can serve the next generation, or why it
    /// cannot.
    PoolUpdated {
        pid: Pid,
        generation: Generation,
        outcome: Result<(), String>,
    },
    /// Change the number of workers to `count` (1 to [`MAX_COUNT`]).
    Scale {
        count: usize,
    },
    /// Change the number of workers by `by`. At least one worker stays.
    ScaleBy {
        by: i32,
    },
    /// Stop gracefully. A second `Stop` stops at once, unless it comes within 100 ms of the first.
    Stop,
    /// Stop gracefully after `delay`, and serve until then.
    StopAfter {
        delay: Millis,
    },
    StopNow,
}

/// How a child is ordered to exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StopMode {
    /// Drain. Its connections are handed to other workers.
    Retire,
    /// Drain. Its connections are closed after their last answer.
    Stop,
    /// Exit now, whatever it does.
    AtOnce,
}
