//! The keepers of workers, as the master sees them: children that it has not forked itself, and that
//! it neither takes for orphans nor forgets before they are done.
//!
//! A worker makes its keeper and says in its scoreboard record who that is. When the worker has
//! died, the record stays with the keeper, which writes there what became of the connections.
//!
//! What a worker says is a claim, and whoever is believed to be a keeper is waited for and, at the end,
//! killed: so only who can be one is believed.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::workers::{GenerationInfo, WorkerHandle};
use crate::link::ids::Pid;
use crate::link::quarantine::{CrashReport, PLACES};
use crate::link::scoreboard::WorkerRecord;
use crate::logging::pluralize;
use crate::master::main_loop::{Master, now};
use crate::master::policy::crash_counts::MAX_CRASHES;
use crate::master::policy::event::Millis;
use crate::protocol::control::WorkerPhase;
use crate::sys::process;
use crate::sys::signal::Fault;
use crate::sys::spawn;
use crate::throttle::limiter::Limiter;

#[derive(Debug, Default)]
pub struct Keepers(HashMap<Pid, DeadWorker>);

/// What a keeper had done when it was looked at, and until when it has to do more.
#[derive(Debug, Clone, Copy)]
struct KeeperProgress {
    done: u32,
    until: Millis,
}

/// What a keeper has of its worker.
#[derive(Debug)]
pub struct DeadWorker {
    pub worker: Pid,
    pub record: &'static WorkerRecord,
    /// The number of the record, which is free once the keeper is done.
    pub record_index: usize,
    /// What is known of its end.
    pub evidence: &'static CrashReport,
    /// What is told of it.
    pub known: Rc<GenerationInfo>,
    /// Whether what it ran may have been what it died of.
    pub suspicious: bool,
    /// Not looked at yet: `None`.
    progress: Option<KeeperProgress>,
}

impl DeadWorker {
    /// What its keeper begins with.
    pub fn new(
        worker: Pid,
        (record, record_index): (&'static WorkerRecord, usize),
        evidence: &'static CrashReport,
        known: Rc<GenerationInfo>,
        suspicious: bool,
    ) -> Self {
        DeadWorker {
            worker,
            record,
            record_index,
            evidence,
            known,
            suspicious,
            progress: None,
        }
    }

    /// Connections that its keeper is done with.
    fn done(&self) -> u32 {
        let WorkerRecord { kept, reset, .. } = self.record;
        kept.load(Relaxed).wrapping_add(reset.load(Relaxed))
    }
}

/// A keeper whose worker is gone, as it crosses an upgrade.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeeperState {
    pub pid: i32,
    pub worker: i32,
    pub record: usize,
}

impl Keepers {
    /// What the program after this one has to know.
    pub fn export(&self) -> Vec<KeeperState> {
        let keeper = |(pid, left): (&Pid, &DeadWorker)| KeeperState {
            pid: pid.0,
            worker: left.worker.0,
            record: left.record_index,
        };
        self.0.iter().map(keeper).collect()
    }

    /// The program before this one had this keeper.
    pub fn import(&mut self, keeper: Pid, left: DeadWorker) {
        self.0.insert(keeper, left);
    }

    /// A worker was reaped, and who it has claimed to be its keeper is that if `believes` says so
    /// and nobody else has claimed it. Gives the record back when nobody needs it any more.
    pub fn left(&mut self, left: DeadWorker, believes: impl Fn(Pid) -> bool) -> Option<usize> {
        match claimed_keeper(left.record) {
            Some(keeper) if !self.contains(keeper) && believes(keeper) => {
                self.0.insert(keeper, left);
                None
            }
            _ => Some(left.record_index),
        }
    }

    /// A child was reaped: what it had of its worker, if it was the keeper of one that is gone.
    pub fn ended(&mut self, keeper: Pid) -> Option<DeadWorker> {
        self.0.remove(&keeper)
    }

    /// Whether a child keeps the connections of a worker that is gone.
    pub fn contains(&self, pid: Pid) -> bool {
        self.0.contains_key(&pid)
    }

    /// The keepers that have done nothing for `limit`, each once, with their workers: stopped, most
    /// likely, and their clients would wait for ever.
    pub fn stalled(&mut self, now: Millis, limit: Millis) -> Vec<(Pid, Pid)> {
        let mut overdue = Vec::new();
        for (keeper, left) in &mut self.0 {
            let done = left.done();
            let until = match left.progress {
                Some(before) if before.done == done && before.until > now => continue,
                Some(before) if before.done == done => {
                    overdue.push((*keeper, left.worker));
                    Millis::MAX
                }
                _ => now.saturating_add(limit),
            };
            left.progress = Some(KeeperProgress { done, until });
        }
        overdue
    }

    /// When to look again.
    pub fn next(&self) -> Option<Millis> {
        let progress = self.0.values().filter_map(|left| left.progress);
        let until = progress.map(|it| it.until);
        until.filter(|at| *at < Millis::MAX).min()
    }

    /// Ends all that are left, and waits for it: their descriptors are among them the ports.
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

/// So many workers are replaced at once when their keepers die, and one more each ten seconds.
pub(crate) fn keepers_lost() -> Limiter {
    Limiter::new(64, 10_000)
}

/// Who a worker says is its keeper: whoever it likes. Good to be compared with a child that was seen
/// or reaped, and for nothing else before it was asked whether it [can be one](can_be_one).
pub fn claimed_keeper(record: &WorkerRecord) -> Option<Pid> {
    Some(Pid(record.keeper.load(Relaxed))).filter(|keeper| keeper.0 > 1)
}

/// Whether a process can be a worker's keeper: a child, and none of those that the master has made
/// itself.
pub fn is_plausible_keeper(pid: Pid) -> bool {
    pid.0 > 1 && process::is_child(pid) && !process::is_forked(pid) && !spawn::is_child(pid)
}

impl Master<'_> {
    /// Ends the keepers that stand still, as event loops that do are ended.
    pub(crate) fn watch_keepers(&mut self) {
        let limit = match self.fleet.limits.heartbeat_timeout {
            0 => Millis::MAX,
            // Longer than a stuck worker is waited for, which may be all that could take from the queue.
            timeout => timeout.saturating_mul(2),
        };
        for (keeper, worker) in self.workers.overdue_keepers(now(), limit) {
            log::warn!(
                "the keeper of worker {worker}, which has died, stands still: it gets SIGKILL, and the \
                 connections that it has not passed on end pid={keeper}"
            );
            if is_plausible_keeper(keeper) {
                process::kill(keeper, Signal::SIGKILL);
            }
        }
    }

    /// A child that is no worker was reaped.
    pub(crate) fn no_worker_ended(&mut self, pid: Pid) {
        if let Some(left) = self.workers.keeper_ended(pid) {
            tell(&left);
            return self.suspect(&left);
        }
        let Some((worker, living)) = self
            .workers
            .iter()
            .find(|(_, worker)| claimed_keeper(worker.record) == Some(pid))
        else {
            return;
        };
        living.record.keeper.store(0, Relaxed);
        let mut views = self.fleet.workers().into_iter();
        let view = views.find(|view| view.pid == Some(worker));
        let state = view.map(|view| view.state);
        // Where all keepers die, workers without one are better than workers that only come and go.
        let is_replaced = matches!(state, Some(WorkerPhase::Starting | WorkerPhase::Ready))
            && self.keepers_lost.admit(now()).is_some();
        living.keeper_is_lost.set(is_replaced);
        // Nobody can be made the twin of a process that has threads.
        log::warn!(
            "the keeper of worker {worker} has died: {}",
            match state {
                Some(WorkerPhase::Ready) if is_replaced =>
                    "the worker retires, for one with a keeper",
                _ if is_replaced => "the worker retires once it is ready, for one with a keeper",
                _ => "should the worker crash, its connections end with it",
            }
        );
        if state == Some(WorkerPhase::Ready) {
            self.retire_without_keeper(worker);
        }
    }

    /// A worker that is ready, and whose keeper has died, is not to serve without one for life.
    pub(crate) fn retire_without_keeper(&self, worker: Pid) {
        let is_lost = |worker: &WorkerHandle| worker.keeper_is_lost.get();
        // It may have been reaped in the same round, and be told of next.
        if self.workers.get(worker).is_some_and(is_lost) && process::is_forked(worker) {
            process::kill(worker, Signal::SIGTERM);
        }
    }
}

impl Master<'_> {
    /// What a worker ran when it died is suspected of that.
    fn suspect(&mut self, left: &DeadWorker) {
        if !left.suspicious {
            return;
        }
        let evidence = left.evidence;
        let mut ran = evidence.running_calls();
        // The same call on several threads is one call for one death.
        ran.sort_unstable_by_key(|(key, _)| *key);
        ran.dedup_by_key(|(key, _)| *key);
        let ran: Vec<(u64, String)> = ran
            .into_iter()
            .map(|(key, method)| (key, left.known.method(method).to_owned()))
            .collect();
        let fault = Fault::of(evidence.fault.load(Relaxed));
        let culprit = evidence.faulting_call.load(Relaxed);
        let when = (now(), process::unix_seconds());
        let quarantine = self.workers.quarantine();
        let found = self.strikes.death(quarantine, (fault, culprit), &ran, when);
        for (caught, evicted) in found {
            log::warn!(
                "a call of {method} was running each time when a worker died, {MAX_CRASHES} times now: that very \
                 call is refused with crashed until the next reload; mend its handler method={method} \
                 key={key:016x}",
                method = caught.method,
                key = caught.key,
            );
            if let Some((evicted, refused)) = evicted {
                log::warn!(
                    "the quarantine is full, {PLACES} calls: the one that was refused least runs again; mend \
                     the handlers, then reload method={} key={:016x} refused={refused}",
                    evicted.method,
                    evicted.key,
                );
            }
        }
    }
}

/// Says what a keeper has done.
fn tell(left: &DeadWorker) {
    let DeadWorker { worker, record, .. } = left;
    let number = |number: &std::sync::atomic::AtomicU32| number.load(Relaxed);
    let (kept, crashed) = (number(&record.kept), number(&record.crashed));
    let reset = number(&record.reset);
    if kept + reset == 0 {
        return;
    }
    log::info!(
        "worker {worker} has left its connections behind: {}, with {} answered as crashed; {} \
         pid={worker} kept={kept} crashed={crashed} reset={reset}",
        pluralize(kept as usize, "is passed on", "are passed on"),
        pluralize(crashed as usize, "call", "calls"),
        pluralize(reset as usize, "is not, and ends", "are not, and end"),
    );
}
