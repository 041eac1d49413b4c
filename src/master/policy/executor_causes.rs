//! Decides what the master reports to a jobs process about the end of an executor (a worker or pool process). Pure.
//!
//! It uses the same evidence as the quarantine of calls (see [`super::crash_counts`]). The evidence is complete only
//! when the keeper of the worker has ended. So an end with incomplete evidence waits here.

use std::collections::{BTreeMap, VecDeque};

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::crash_counts::{CrashEvidence, Suspicion};
use super::event::Millis;
use crate::link::executor_end::{ExecutorCause, ExecutorEnd, cause_of_key};
use crate::link::ids::Pid;
use crate::sys::process::Exit;
use crate::sys::signal::Fault;

/// The largest number of ends that are kept while there is no jobs process.
const MOST_UNSENT: usize = 1_000;

/// Signals that mean a fault of the process itself. A death by any other signal counts as caused from outside.
const FAULTS: [Signal; 7] = [
    Signal::SIGSEGV,
    Signal::SIGBUS,
    Signal::SIGILL,
    Signal::SIGFPE,
    Signal::SIGABRT,
    Signal::SIGSYS,
    Signal::SIGTRAP,
];

/// How a process died, as far as is known without its crash report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecutorDeath {
    /// The master has ordered its end.
    Ordered,
    /// Another process has killed it, or it is a pool process. Its programs run the attempts, so its own death is not
    /// the fault of an attempt.
    Outside,
    /// The master has killed it, because its event loop was stuck.
    Stuck,
    /// It failed or exited by itself, or the OOM killer has ended it.
    Fault,
}

impl ExecutorDeath {
    /// Decides how a process died. `drains` is whether it was ordered to exit. `by_master` is `Some` if the master has
    /// killed it. `out_of_memory` is whether a SIGKILL may have come from the OOM killer.
    pub fn of(
        exit: Exit,
        is_worker: bool,
        (drains, by_master): (bool, Option<Suspicion>),
        out_of_memory: bool,
    ) -> Self {
        match by_master {
            // Exit code 0 without an order means that a handler has called exit(3).
            _ if drains && exit == Exit::Code(0) => ExecutorDeath::Ordered,
            Some(Suspicion::EventLoop) if is_worker => ExecutorDeath::Stuck,
            Some(Suspicion::Nothing) => ExecutorDeath::Ordered,
            _ if !is_worker => ExecutorDeath::Outside,
            _ if out_of_memory && exit.is_signal(Signal::SIGKILL) => ExecutorDeath::Fault,
            _ => match exit {
                Exit::Code(_) => ExecutorDeath::Fault,
                exit if FAULTS.iter().any(|fault| exit.is_signal(*fault)) => ExecutorDeath::Fault,
                Exit::Signal { .. } => ExecutorDeath::Outside,
            },
        }
    }

    /// Returns the cause. `evidence` is the crash report of a worker with a keeper.
    pub fn cause(self, evidence: Option<&CrashEvidence>) -> ExecutorCause {
        let named = |suspicion| {
            let cause = evidence.and_then(|evidence| evidence.cause(suspicion));
            cause_of_key(cause.map_or(0, |(key, _)| *key))
        };
        match self {
            ExecutorDeath::Ordered => ExecutorCause::Ordered,
            ExecutorDeath::Outside => ExecutorCause::Outside,
            ExecutorDeath::Stuck => named(Suspicion::EventLoop),
            ExecutorDeath::Fault if evidence.is_some_and(|it| it.fault == Fault::Sent) => {
                ExecutorCause::Outside
            }
            ExecutorDeath::Fault => named(Suspicion::Reported),
        }
    }
}

/// How long an end is also sent to new jobs processes, because the jobs process that got it may have died.
const RECENT_MS: Millis = 30_000;
/// The largest number of ends that are kept for new jobs processes.
const MOST_RECENT: usize = 100;

/// The ends of workers and pool processes: those whose evidence is incomplete, those not yet sent to a jobs process,
/// and those sent a short time ago.
#[derive(Debug, Default)]
pub struct ExecutorEnds {
    /// The dead workers whose keepers have not ended.
    waiting: BTreeMap<Pid, ExecutorDeath>,
    unsent: Vec<ExecutorEnd>,
    /// The ends that were sent last, and when.
    recent: VecDeque<(Millis, ExecutorEnd)>,
}

/// The ends that the new program must know after an upgrade. Otherwise its jobs process would treat an attempt as
/// killed although its worker has exited on order.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecutorEndsState {
    waiting: Vec<(Pid, ExecutorDeath)>,
    /// The ends as in messages, each with the time of the export. Older versions read it as the time of sending.
    recent: Vec<(Millis, u64)>,
}

impl ExecutorEnds {
    /// Returns what the next program must know.
    pub fn export(&self, now: Millis) -> ExecutorEndsState {
        let unsent = self.unsent.iter().map(|end| (now, *end));
        // Another process may have the pid of an older one.
        let recent = self.recent(now).into_iter().map(|end| (now, end));
        ExecutorEndsState {
            waiting: self
                .waiting
                .iter()
                .map(|(pid, death)| (*pid, *death))
                .collect(),
            recent: recent
                .chain(unsent)
                .map(|(at, end)| (at, end.encode()))
                .collect(),
        }
    }

    /// Takes over what the old program knew. All ends are sent to the next jobs process, because no jobs process of
    /// this program has got them. It ignores those that it knows.
    pub fn import(state: ExecutorEndsState) -> Self {
        let recent = state.recent.into_iter();
        ExecutorEnds {
            waiting: state.waiting.into_iter().collect(),
            unsent: recent
                .filter_map(|(_, end)| ExecutorEnd::decode(end))
                .collect(),
            recent: VecDeque::new(),
        }
    }

    /// Records the death of a process. If it has a keeper, call `complete` when the keeper has ended.
    pub fn died(&mut self, pid: Pid, death: ExecutorDeath, has_keeper: bool) {
        match has_keeper {
            true => drop(self.waiting.insert(pid, death)),
            false => self.add(pid, death.cause(None)),
        }
    }

    /// Records the crash report of a worker whose keeper has ended.
    pub fn complete(&mut self, worker: Pid, evidence: &CrashEvidence) {
        if let Some(death) = self.waiting.remove(&worker) {
            self.add(worker, death.cause(Some(evidence)));
        }
    }

    fn add(&mut self, pid: Pid, cause: ExecutorCause) {
        if self.unsent.len() < MOST_UNSENT {
            self.unsent.push(ExecutorEnd { pid: pid.0, cause });
        }
    }

    /// Takes the ends that must be sent to all jobs processes. Without a jobs process they are kept, at most
    /// [`MOST_UNSENT`].
    pub fn take_unsent(&mut self, has_jobs_process: bool, now: Millis) -> Vec<ExecutorEnd> {
        if !has_jobs_process {
            return Vec::new();
        }
        let sent = self.unsent.iter().map(|end| (now, *end));
        self.recent.extend(sent);
        let surplus = self.recent.len().saturating_sub(MOST_RECENT);
        self.recent.drain(..surplus);
        std::mem::take(&mut self.unsent)
    }

    /// Returns the recent ends, for a new jobs process.
    pub fn recent(&self, now: Millis) -> Vec<ExecutorEnd> {
        let recent = self.recent.iter();
        let recent = recent.filter(|(sent, _)| sent + RECENT_MS > now);
        recent.map(|(_, end)| *end).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEGV: Exit = Exit::Signal {
        number: Signal::SIGSEGV as i32,
        core_dumped: true,
    };
    const KILL: Exit = Exit::Signal {
        number: Signal::SIGKILL as i32,
        core_dumped: false,
    };

    fn evidence(fault: Fault, faulting_call: u64, running: &[u64]) -> CrashEvidence {
        CrashEvidence {
            fault,
            faulting_call,
            event_loop_call: 7,
            running: running.iter().map(|key| (*key, "m".into())).collect(),
        }
    }

    #[test]
    fn the_exit_says_who_ended_a_worker() {
        let of = |exit, by_master, oom| ExecutorDeath::of(exit, true, (false, by_master), oom);
        assert_eq!(of(Exit::Code(0), None, false), ExecutorDeath::Fault);
        let drained = ExecutorDeath::of(Exit::Code(0), true, (true, None), false);
        assert_eq!(drained, ExecutorDeath::Ordered);
        assert_eq!(of(Exit::Code(1), None, false), ExecutorDeath::Fault);
        assert_eq!(of(SEGV, None, false), ExecutorDeath::Fault);
        assert_eq!(of(KILL, None, false), ExecutorDeath::Outside);
        assert_eq!(of(KILL, None, true), ExecutorDeath::Fault);
        let ordered = Some(Suspicion::Nothing);
        assert_eq!(of(KILL, ordered, true), ExecutorDeath::Ordered);
        let stuck = Some(Suspicion::EventLoop);
        assert_eq!(of(KILL, stuck, false), ExecutorDeath::Stuck);
        let pool = ExecutorDeath::of(SEGV, false, (false, None), false);
        assert_eq!(pool, ExecutorDeath::Outside);
    }

    #[test]
    fn the_evidence_names_an_attempt_a_call_or_neither() {
        use ExecutorCause::{Attempt, OtherCall, Outside, Unclear};
        let cause = |evidence: &CrashEvidence| ExecutorDeath::Fault.cause(Some(evidence));
        // Multiples of four are keys of attempts.
        assert_eq!(cause(&evidence(Fault::Own, 12, &[7, 12])), Attempt(1));
        assert_eq!(cause(&evidence(Fault::Own, 7, &[7, 12])), OtherCall);
        assert_eq!(cause(&evidence(Fault::Own, 0, &[7, 12])), Unclear);
        assert_eq!(cause(&evidence(Fault::Unknown, 0, &[12])), Attempt(1));
        assert_eq!(cause(&evidence(Fault::Unknown, 0, &[12, 20])), Unclear);
        assert_eq!(cause(&evidence(Fault::Sent, 12, &[12])), Outside);
        let stuck = evidence(Fault::Own, 12, &[7, 12]);
        assert_eq!(ExecutorDeath::Stuck.cause(Some(&stuck)), OtherCall);
        assert_eq!(ExecutorDeath::Fault.cause(None), Unclear);
    }

    #[test]
    fn an_end_is_kept_until_its_evidence_is_complete_and_a_jobs_process_lives() {
        let mut ends = ExecutorEnds::default();
        ends.died(Pid(1), ExecutorDeath::Fault, true);
        ends.died(Pid(2), ExecutorDeath::Outside, false);
        assert_eq!(ends.take_unsent(false, 5), []);
        let end = |pid, cause| ExecutorEnd { pid, cause };
        assert_eq!(ends.take_unsent(true, 5), [end(2, ExecutorCause::Outside)]);
        let report = evidence(Fault::Own, 12, &[12]);
        ends.complete(Pid(1), &report);
        ends.complete(Pid(1), &report);
        let named = end(1, ExecutorCause::Attempt(1));
        assert_eq!(ends.take_unsent(true, 5), [named]);
        assert_eq!(ends.take_unsent(true, 5), []);
        // The next jobs process gets them too.
        let both = [end(2, ExecutorCause::Outside), named];
        assert_eq!(ends.recent(5), both);
        // The jobs process that the new program starts gets them too.
        ends.died(Pid(3), ExecutorDeath::Ordered, false);
        ends.died(Pid(4), ExecutorDeath::Ordered, true);
        let mut next = ExecutorEnds::import(ends.export(6));
        next.complete(Pid(4), &report);
        let ordered = |pid| end(pid, ExecutorCause::Ordered);
        let all = [both[0], both[1], ordered(3), ordered(4)];
        assert_eq!(next.take_unsent(true, 6), all);
        // Another process may have the pid of an older one.
        let late = ExecutorEnds::import(ends.export(5 + RECENT_MS));
        assert_eq!(late.unsent, [ordered(3)]);
        assert_eq!(ends.recent(5 + RECENT_MS), []);
    }
}
