//! Handles the children that were reaped in one round, in two phases.
//!
//! The kernel may give a new worker the pid of any reaped child. So all reaped children leave the
//! tables and all their deaths are passed to the policy before the first action of the round is
//! applied. Otherwise a new worker could be taken for the dead child that had its pid.

use std::collections::VecDeque;

use nix::sys::signal::Signal;

use super::children::keepers::is_plausible_keeper;
use super::main_loop::Master;
use super::policy::event::{Action, Event};
use crate::protocol::control::WorkerPhase;
use crate::sys::memory;
use crate::sys::process::{self, Exit, Pid, ReapedChild};

/// Children taken note of at once.
const MOST_REAPED: usize = 64;

/// What a round of reaping works on. `Master` implements it, and a test without processes.
trait ReapTarget {
    /// Returns whether a reaped child is a worker.
    fn is_worker(&self, pid: Pid) -> bool;
    /// Removes a worker from the tables and passes its death to the policy. `others` are the children
    /// of the same round that are no workers.
    fn remove_worker(&mut self, child: &ReapedChild, others: &[Pid]);
    /// Removes a child that is no worker from the tables.
    fn remove_other(&mut self, pid: Pid);
    /// Applies the queued actions, except those about the children `ended`.
    fn apply_actions_except(&mut self, ended: &[Pid]);
}

/// Removes all children of a round, and only then applies the actions that follow.
fn handle_round(target: &mut impl ReapTarget, round: &[ReapedChild]) {
    let (workers, others): (Vec<&ReapedChild>, Vec<&ReapedChild>) =
        round.iter().partition(|child| target.is_worker(child.pid));
    let others: Vec<Pid> = others.iter().map(|child| child.pid).collect();
    // Workers first: a keeper of the same round is recognized by what its worker leaves.
    for worker in workers {
        target.remove_worker(worker, &others);
    }
    for pid in others {
        target.remove_other(pid);
    }
    let ended: Vec<Pid> = round.iter().map(|child| child.pid).collect();
    target.apply_actions_except(&ended);
}

/// Drops actions about children that have ended: applied after a fork, they could reach a new worker
/// with the same pid.
fn drop_actions_about(actions: &mut VecDeque<Action>, ended: &[Pid]) {
    actions.retain(|action| action.child().is_none_or(|pid| !ended.contains(&pid)));
}

/// A master with what it knows about the current round.
struct Round<'m, 'a> {
    master: &'m mut Master<'a>,
    /// Whether a SIGKILL of this round may have come from the OOM killer.
    out_of_memory: bool,
}

impl ReapTarget for Round<'_, '_> {
    fn is_worker(&self, pid: Pid) -> bool {
        self.master.workers.get(pid).is_some()
    }

    fn remove_worker(&mut self, child: &ReapedChild, others: &[Pid]) {
        let (master, pid) = (&mut *self.master, child.pid);
        // What it said last comes before its end.
        master.queue_reports(pid);
        // Whoever else sends a KILL has reasons of its own.
        let is_told_apart = self.out_of_memory || !child.exit.is_signal(Signal::SIGKILL);
        let suspicious = is_told_apart && master.is_suspicious(child);
        let orphans = &master.orphans;
        let may_keep = |pid: Pid| {
            !orphans.is_from_before(pid) && (others.contains(&pid) || is_plausible_keeper(pid))
        };
        let worker = master.workers.remove(pid, suspicious, may_keep);
        // The log lines of the worker that decided a start or a reload are reported with its result,
        // so a later death of the same round must not replace them.
        if !master.actions.iter().any(Action::is_result) {
            master.first_words.ended(pid);
        }
        master.orphans.reaped(pid, true);
        master.queue_actions(Event::Died {
            pid,
            how: child.exit,
            method: worker.and_then(|worker| worker.last_method()),
            rss_bytes: child.peak_rss_bytes,
            at: process::unix_seconds(),
        });
    }

    fn remove_other(&mut self, pid: Pid) {
        self.master.orphans.reaped(pid, false);
        self.master.workers.release_record(pid);
        self.master.no_worker_ended(pid);
    }

    fn apply_actions_except(&mut self, ended: &[Pid]) {
        self.master.act_except(ended);
    }
}

impl Master<'_> {
    pub(super) fn reap(&mut self) {
        // A bounded number, and all taken before any is replaced: workers that die as fast as
        // they are forked must not keep the master from everything else.
        let mut round: Vec<_> = std::iter::from_fn(process::reap_any)
            .take(MOST_REAPED)
            .collect();
        self.reap_again = round.len() == MOST_REAPED;
        round.retain(|ended| {
            !self.probe_ended(ended.pid, ended.exit) && !self.orphans.reader_ended(ended.pid)
        });
        let is_killed_worker = |ended: &ReapedChild| {
            ended.exit.is_signal(Signal::SIGKILL) && self.workers.get(ended.pid).is_some()
        };
        let out_of_memory = round.iter().any(is_killed_worker)
            && (self.strikes).ran_out_of_memory(memory::oom_kill_count());
        let mut target = Round {
            master: self,
            out_of_memory,
        };
        handle_round(&mut target, &round);
        // After the dead are replaced, which is urgent.
        self.end_orphans();
    }

    /// Applies the queued actions, except those about the children `ended`, whose pids may be given
    /// to new workers.
    pub(super) fn act_except(&mut self, ended: &[Pid]) {
        drop_actions_about(&mut self.actions, ended);
        self.apply_actions();
    }

    /// Whether a worker's end may be a call's doing: not what it was told to do.
    fn is_suspicious(&self, ended: &ReapedChild) -> bool {
        let serves = |view: &super::policy::status_view::WorkerView| {
            view.pid == Some(ended.pid) && view.state == WorkerPhase::Ready
        };
        !self.stopping && ended.exit != Exit::Code(0) && self.fleet.workers().iter().any(serves)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeSet;

    use super::super::policy::event::{Millis, PolicyLimits};
    use super::super::policy::fleet::Fleet;
    use super::super::policy::fleet_world::{LIMITS, SEGV};
    use super::*;
    use crate::link::ids::Slot;

    const NOW: Millis = 1_000;

    /// A policy with tables, and a kernel that gives new workers the pids in `free` first.
    struct FakeMaster {
        fleet: Fleet,
        actions: VecDeque<Action>,
        workers: BTreeSet<Pid>,
        keepers: BTreeSet<Pid>,
        free: VecDeque<Pid>,
        next_pid: i32,
        /// The workers that got an order or a signal.
        ordered: BTreeSet<Pid>,
    }

    impl FakeMaster {
        /// Its workers are 101 and the following pids, and ready.
        fn serving(count: usize) -> Self {
            let (fleet, actions) = Fleet::new(PolicyLimits { count, ..LIMITS }, NOW);
            let mut master = FakeMaster {
                fleet,
                actions: actions.into(),
                workers: BTreeSet::new(),
                keepers: BTreeSet::new(),
                free: VecDeque::new(),
                next_pid: 101,
                ordered: BTreeSet::new(),
            };
            master.act();
            for pid in master.workers.clone() {
                master.handle(Event::Ready { pid });
            }
            master
        }

        fn handle(&mut self, event: Event) {
            self.queue(event);
            self.act();
        }

        fn queue(&mut self, event: Event) {
            self.actions.extend(self.fleet.handle(event, NOW));
        }

        fn act(&mut self) {
            while let Some(action) = self.actions.pop_front() {
                self.ordered.extend(action.child());
                if let Action::Fork { slot, generation } = action {
                    let pid = self.free.pop_front().unwrap_or(Pid(self.next_pid));
                    self.next_pid += i32::from(pid.0 == self.next_pid);
                    assert!(self.workers.insert(pid), "{pid} is a worker already");
                    self.queue(Event::Forked {
                        slot,
                        generation,
                        pid,
                    });
                }
            }
        }

        /// These end by SIGSEGV in one round.
        fn reap(&mut self, pids: &[i32]) {
            let child = |pid: &i32| ReapedChild {
                pid: Pid(*pid),
                exit: SEGV,
                peak_rss_bytes: 0,
            };
            let round: Vec<ReapedChild> = pids.iter().map(child).collect();
            handle_round(self, &round);
        }

        /// The worker in a slot that does not drain, with its state.
        fn worker(&self, slot: u16) -> (i32, WorkerPhase) {
            let views = self.fleet.workers().into_iter();
            let mut here =
                views.filter(|view| view.slot == Slot(slot) && view.state != WorkerPhase::Draining);
            let view = here.next().unwrap();
            (view.pid.unwrap().0, view.state)
        }
    }

    impl ReapTarget for FakeMaster {
        fn is_worker(&self, pid: Pid) -> bool {
            self.workers.contains(&pid)
        }

        fn remove_worker(&mut self, child: &ReapedChild, _others: &[Pid]) {
            assert!(self.workers.remove(&child.pid));
            self.queue(Event::Died {
                pid: child.pid,
                how: child.exit,
                method: None,
                rss_bytes: 0,
                at: 0,
            });
        }

        fn remove_other(&mut self, pid: Pid) {
            assert!(self.keepers.remove(&pid), "{pid} is no keeper");
        }

        fn apply_actions_except(&mut self, ended: &[Pid]) {
            drop_actions_about(&mut self.actions, ended);
            self.act();
        }
    }

    #[test]
    fn a_new_worker_may_get_the_pid_of_a_worker_of_the_same_round() {
        let mut master = FakeMaster::serving(3);
        master.free = [Pid(102), Pid(101)].into();
        master.reap(&[101, 102]);
        assert_eq!(master.worker(0), (102, WorkerPhase::Starting));
        assert_eq!(master.worker(1), (101, WorkerPhase::Starting));
        assert_eq!(master.worker(2), (103, WorkerPhase::Ready));
        assert_eq!(master.workers, [Pid(101), Pid(102), Pid(103)].into());
    }

    #[test]
    fn a_new_worker_may_get_the_pid_of_a_keeper_of_the_same_round() {
        for round in [[101, 201], [201, 101]] {
            let mut master = FakeMaster::serving(1);
            master.keepers = [Pid(201)].into();
            master.free = [Pid(201)].into();
            master.reap(&round);
            assert_eq!(master.worker(0), (201, WorkerPhase::Starting));
            assert_eq!(master.workers, [Pid(201)].into());
            assert!(master.keepers.is_empty());
        }
    }

    #[test]
    fn an_order_to_a_reaped_worker_does_not_reach_a_new_one_with_its_pid() {
        let mut master = FakeMaster::serving(1);
        let limits = PolicyLimits { count: 2, ..LIMITS };
        master.handle(Event::Reload { limits });
        master.handle(Event::Ready { pid: Pid(102) });
        assert_eq!(master.workers, [101, 102, 103].map(Pid).into());
        // The death of 103 fails the reload, so 102 is told to drain. 101 is replaced.
        master.free = [Pid(102)].into();
        master.reap(&[101, 103, 102]);
        assert_eq!(master.worker(0), (102, WorkerPhase::Starting));
        assert_eq!(master.ordered, BTreeSet::new());
    }
}
