//! Keeps track of the keepers of dead workers. The master has not forked them, but they are its children.
//!
//! A worker starts its keeper and writes the keeper's pid into its scoreboard record. When the worker has died, the
//! record stays reserved for the keeper. The keeper counts there how many connections it has handed over and reset.
//!
//! The pid comes from the worker, which is not trusted. The master waits for that pid and may kill it. So
//! it first checks that the pid is a child that it did not start itself.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::generation_info::GenerationInfo;
use crate::link::ids::Pid;
use crate::link::quarantine::{CrashReport, WITHOUT_KEY};
use crate::link::scoreboard::WorkerRecord;
use crate::master::policy::crash_counts::{CrashEvidence, Suspicion};
use crate::master::policy::event::Event;
use crate::sys::process;
use crate::sys::signal::Fault;
use crate::sys::spawn;

#[derive(Debug, Default)]
pub struct Keepers(HashMap<Pid, DeadWorker>);

/// What the master knows about a dead worker while its keeper runs.
#[derive(Debug)]
pub struct DeadWorker {
    pub worker: Pid,
    pub record: &'static WorkerRecord,
    /// The number of the record, which becomes free when the keeper has ended.
    pub record_index: usize,
    /// What the worker and its keeper wrote about its crash.
    pub crash_report: &'static CrashReport,
    pub known: Rc<GenerationInfo>,
    /// Which of its calls may have caused its death.
    pub suspicion: Suspicion,
}

impl DeadWorker {
    /// Returns what is known about its crash. Call it when its keeper has ended.
    pub fn evidence(&self) -> CrashEvidence {
        let report = self.crash_report;
        let key = |key: u64| if key == WITHOUT_KEY { 0 } else { key };
        let method = |method: usize| self.known.method(method).to_owned();
        let running = report.running_calls().into_iter();
        CrashEvidence {
            fault: Fault::of(report.fault.load(Relaxed)),
            faulting_call: report.faulting_call.load(Relaxed),
            event_loop_call: key(report.event_loop_call.load(Relaxed)),
            running: running.map(|(it, of)| (key(it), method(of))).collect(),
        }
    }

    /// Returns the number of connections that the keeper has handed over or reset.
    fn done(&self) -> u32 {
        let WorkerRecord { kept, reset, .. } = self.record;
        kept.load(Relaxed).wrapping_add(reset.load(Relaxed))
    }
}

/// A keeper of a dead worker in the state of an upgrade.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeeperState {
    pub pid: Pid,
    pub worker: Pid,
    pub record: usize,
}

impl Keepers {
    /// Returns the state for an upgrade.
    pub fn export(&self) -> Vec<KeeperState> {
        let keeper = |(pid, left): (&Pid, &DeadWorker)| KeeperState {
            pid: *pid,
            worker: left.worker,
            record: left.record_index,
        };
        self.0.iter().map(keeper).collect()
    }

    /// Adds a keeper from the state of an upgrade.
    pub fn import(&mut self, keeper: Pid, left: DeadWorker) {
        self.0.insert(keeper, left);
    }

    /// Handles the death of a worker. Accepts the keeper that the worker claims, if `may_be_keeper` returns true and
    /// no other dead worker has claimed it. Otherwise returns the number of the worker's record, which is free now.
    pub fn worker_died(
        &mut self,
        left: DeadWorker,
        may_be_keeper: impl Fn(Pid) -> bool,
    ) -> Option<usize> {
        match claimed_keeper(left.record) {
            Some(keeper) if !self.contains(keeper) && may_be_keeper(keeper) => {
                self.0.insert(keeper, left);
                None
            }
            _ => Some(left.record_index),
        }
    }

    /// Removes a keeper that was reaped. Returns what is known of its worker.
    pub fn ended(&mut self, keeper: Pid) -> Option<DeadWorker> {
        self.0.remove(&keeper)
    }

    /// Returns whether a child is the keeper of a dead worker.
    pub fn contains(&self, pid: Pid) -> bool {
        self.0.contains_key(&pid)
    }

    /// Returns whether a dead worker has a keeper that has not ended.
    pub fn has_keeper_of(&self, worker: Pid) -> bool {
        self.0.values().any(|left| left.worker == worker)
    }

    /// Returns the progress of each keeper.
    pub fn progress(&self) -> Vec<Event> {
        let progress = |(keeper, left): (&Pid, &DeadWorker)| Event::KeeperProgress {
            keeper: *keeper,
            worker: left.worker,
            done: left.done(),
        };
        self.0.iter().map(progress).collect()
    }

    /// Sends SIGKILL to a keeper.
    pub fn kill(&self, keeper: Pid) {
        if self.contains(keeper) && is_plausible_keeper(keeper) {
            process::kill(keeper, Signal::SIGKILL);
        }
    }

    /// Kills and reaps all keepers, because they hold the listening sockets open.
    pub fn end(&mut self) {
        for (keeper, _) in self
            .0
            .drain()
            .filter(|(keeper, _)| is_plausible_keeper(*keeper))
        {
            process::kill(keeper, Signal::SIGKILL);
            process::reap(keeper, true);
        }
    }
}

/// Returns the keeper's pid as the worker claims it. It is not verified: only compare it with pids of
/// reaped children, and call [`is_plausible_keeper`] before a signal.
pub fn claimed_keeper(record: &WorkerRecord) -> Option<Pid> {
    Some(Pid(record.keeper.load(Relaxed))).filter(|keeper| keeper.0 > 1)
}

/// Returns whether a process that is no worker can be a keeper: a child that the master did not start by
/// `spawn`.
pub fn is_plausible_keeper(pid: Pid) -> bool {
    pid.0 > 1 && process::is_child(pid) && !spawn::is_child(pid)
}
