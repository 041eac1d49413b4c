//! The words between the master's policy and its mechanism: events go in, actions come out.
//!
//! The mechanism reports what happened, does each action in its order, and reports again. Nothing
//! here decides anything.

use std::fmt;

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use crate::link::ids::{Generation, Pid, Slot};
pub use crate::sys::process::Exit;
use crate::throttle;

/// Monotonic milliseconds; where zero lies is the caller's choice (the master's start).
pub type Millis = u64;

/// Most workers that one generation may have.
pub const MAX_COUNT: usize = 1024;

/// What one generation's configuration says about its workers. A member that is added is 0 where
/// the program before an upgrade did not know it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PolicyLimits {
    /// How many workers: 1 to [`MAX_COUNT`]; what lies outside is moved to the nearer end.
    pub count: usize,
    /// How many pools have a pool process.
    pub pools: usize,
    /// How long a worker may take until it says ready; 0 is no limit.
    pub boot_timeout: Millis,
    /// How long a draining worker may take to finish.
    pub drain_timeout: Millis,
    /// How old the last heartbeat of an event loop may be; 0 is no limit.
    pub heartbeat_timeout: Millis,
    /// How many young deaths of a slot are replaced at once.
    pub respawn_burst: u32,
    /// The longest wait for a throttled slot; 0 is no throttle.
    pub respawn_max_delay: Millis,
    /// Resident bytes above which a worker is recycled; 0 is no limit.
    pub max_memory: u64,
    /// The age at which a worker is recycled; 0 is no limit.
    pub max_lifetime: Millis,
    /// How many recycles may be under way at one time, of all reasons together.
    pub max_unavailable: usize,
}

impl PolicyLimits {
    /// The part that is the throttle's.
    pub fn throttle(&self) -> throttle::ThrottleLimits {
        throttle::ThrottleLimits {
            burst: self.respawn_burst,
            max_delay: self.respawn_max_delay,
        }
    }
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// [`Action::Fork`] was done.
    Forked {
        /// As ordered.
        slot: Slot,
        /// As ordered.
        generation: Generation,
        /// The new worker.
        pid: Pid,
    },
    /// [`Action::Fork`] was refused by the system.
    ForkFailed {
        /// As ordered.
        slot: Slot,
        /// As ordered.
        generation: Generation,
        /// What the system said.
        reason: String,
    },
    /// A worker reports that it serves.
    Ready {
        /// The worker.
        pid: Pid,
    },
    /// A worker reports that it drains by itself (it got TERM): it wants a successor.
    Retiring {
        /// The worker.
        pid: Pid,
    },
    /// A worker reports that it has read as many calls as it may: it serves on, and wants a
    /// successor.
    Worn {
        /// The worker.
        pid: Pid,
        /// So many.
        calls: u64,
    },
    /// A worker reports that none of its handler threads comes back: it wants a successor soon.
    Wedged {
        /// The worker.
        pid: Pid,
        /// What its threads are at, a sentence.
        evidence: String,
    },
    /// What [`Action::Diagnose`] has found.
    Evidence {
        /// The worker.
        pid: Pid,
        /// What it is at, in words.
        text: String,
    },
    /// What a worker of [`Fleet::to_sample`] has in memory.
    Memory {
        /// The worker.
        pid: Pid,
        /// Resident, in bytes.
        rss_bytes: u64,
    },
    /// What the scoreboard says about a worker's event loop. Feed it before [`Fleet::tick`].
    Heartbeat {
        /// The worker.
        pid: Pid,
        /// When its event loop last gave a sign, on the same clock as `now`.
        at: Millis,
    },
    /// A child was reaped. Feed what its socketpair still held first.
    Died {
        /// Who. Need not be a worker: what is unknown is ignored.
        pid: Pid,
        how: Exit,
        /// The method that it last ran, as its scoreboard record says.
        method: Option<String>,
        /// Its resident memory when last seen, in bytes.
        rss_bytes: u64,
        /// The wall clock, in unix seconds.
        at: u64,
    },
    /// A checked configuration, its listeners bound: start its generation. Only while
    /// [`Fleet::can_reload`] says yes; a reload that comes earlier is the caller's to keep.
    Reload {
        /// What the new configuration says.
        limits: PolicyLimits,
    },
    /// So many workers from now on (1 to [`MAX_COUNT`]).
    Scale {
        /// How many.
        count: usize,
    },
    /// So many workers more or, below zero, less; one always stays.
    ScaleBy {
        /// The difference.
        by: i32,
    },
    /// Stop gracefully; the second time, now. Of two within a tenth of a second the second one is
    /// the first again.
    Stop,
    /// Stop gracefully after so long, and serve until then.
    StopAfter {
        /// How long.
        delay: Millis,
    },
    StopNow,
}

/// What to do, in the order given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Fork a worker, and report [`Event::Forked`] or [`Event::ForkFailed`]: exactly one of them.
    Fork {
        slot: Slot,
        /// Its generation: which configuration it runs.
        generation: Generation,
    },
    /// Order a worker by its socketpair to drain.
    Drain {
        /// The worker.
        pid: Pid,
        /// When it must be done.
        deadline: Millis,
        /// Whether the server stops: connections are closed after their answers. If not, its
        /// connections go on elsewhere, or here until the deadline.
        stop: bool,
    },
    /// Look at what a worker is stuck in, and report it with [`Event::Evidence`] before the next
    /// action, which may end it.
    Diagnose {
        /// The worker.
        pid: Pid,
    },
    /// Send a worker a signal. That it is gone already is no error.
    Kill {
        /// The worker.
        pid: Pid,
        /// QUIT (leave now), TERM (the drain is over, or never ready), ABRT (stuck: leave evidence)
        /// or KILL.
        signal: Signal,
    },
    /// Every worker of a fresh master is ready, or why not; given once. After an error everything
    /// left is stopped, and [`Action::Exit`] follows by itself.
    StartUpDone(Result<(), String>),
    /// A reload's verdict, one for each: the generation that serves now, or why the old one goes on.
    ReloadDone(Result<Generation, String>),
    /// The time of [`Event::StopAfter`] is over: report [`Event::Stop`].
    StopDue,
    Log {
        /// How bad it is.
        level: log::Level,
        /// The whole line.
        text: String,
    },
    /// No child is left, nothing is left to do: leave. The last action of all.
    Exit { code: u8 },
}

impl Action {
    pub(crate) fn child(&self) -> Option<Pid> {
        match self {
            Action::Drain { pid, .. } | Action::Diagnose { pid } | Action::Kill { pid, .. } => {
                Some(*pid)
            }
            Action::Fork { .. }
            | Action::StartUpDone(_)
            | Action::ReloadDone(_)
            | Action::StopDue
            | Action::Log { .. }
            | Action::Exit { .. } => None,
        }
    }

    /// Whether it gives the result of a start or a reload.
    pub(crate) fn is_result(&self) -> bool {
        matches!(self, Action::StartUpDone(_) | Action::ReloadDone(_))
    }
}

/// A duration as people say it: `350 ms`, `1.6 s`.
pub(crate) struct HumanDuration(pub(crate) Millis);

impl fmt::Display for HumanDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            ms @ 0..1000 => write!(f, "{ms} ms"),
            // In tenths, cut and not rounded: 59.96 s is not 60.
            ms if ms % 1000 < 100 => write!(f, "{} s", ms / 1000),
            ms => write!(f, "{}.{} s", ms / 1000, ms % 1000 / 100),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_and_spans_are_said_as_people_say_them() {
        let segv = Exit::Signal {
            number: 11,
            core_dumped: true,
        };
        assert_eq!(segv.to_string(), "SIGSEGV (core dumped)");
        assert_eq!(Exit::Code(3).to_string(), "exit code 3");
        let odd = Exit::Signal {
            number: 40,
            core_dumped: false,
        };
        assert_eq!(odd.to_string(), "SIG40");
        assert_eq!(HumanDuration(350).to_string(), "350 ms");
        assert_eq!(HumanDuration(1600).to_string(), "1.6 s");
        assert_eq!(HumanDuration(30_000).to_string(), "30 s");
    }
}

/// How a worker is told to leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StopMode {
    /// Drain; its connections go on elsewhere.
    Retire,
    /// Drain; its connections end with their last answer.
    Stop,
    /// Now, whatever it does.
    AtOnce,
}
