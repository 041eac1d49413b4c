//! Handles the children that were reaped in one round, in two phases.
//!
//! The kernel may give a new worker the pid of any reaped child. So all reaped children leave the
//! tables and all their deaths are passed to the policy before the first action of the round is
//! applied. Otherwise a new worker could be taken for the dead child that had its pid.

use std::collections::VecDeque;
use std::rc::Rc;

use nix::sys::signal::Signal;

use super::children::keepers::is_plausible_keeper;
use super::children::program_deaths;
use super::core::Master;
use super::leftovers::{end_orphans, other_child_ended, send_executor_ends};
use super::policy::action::Action;
use super::policy::crash_counts::Suspicion;
use super::policy::death_log::WorkerExit;
use super::policy::event::Event;
use super::policy::executor_causes::ExecutorDeath;
use super::reports::{keep_deaths_of_programs, queue_reports};
use super::requests::settle;
use super::requests::upgrade_driver::probe_ended;
use super::session_orders::{adopt_sessions, note_adopted_sessions, pass_session_deaths};
use crate::link::metrics_board;
use crate::sys::memory;
use crate::sys::process::{self, Exit, Pid, ReapedChild};

/// The largest number of children that are reaped in one round.
const MOST_REAPED: usize = 64;

/// The tables from which a round removes children. Implemented for the master, and in the tests for a simulated
/// master without processes.
trait ReapTarget {
    /// Returns whether a reaped child is a worker.
    fn is_worker(&self, pid: Pid) -> bool;
    /// Removes a worker from the tables and passes its death to the policy. `others` are the children
    /// of the same round that are no workers.
    fn remove_worker(&mut self, child: &ReapedChild, others: &[Pid]);
    /// Removes a child that is no worker from the tables.
    fn remove_other(&mut self, child: &ReapedChild, others: &[Pid]);
    /// Applies the queued actions, except those about the children `ended`.
    fn apply_actions_except(&mut self, ended: &[Pid]);
}

/// Removes all children of a round, and only then applies the actions that follow.
fn handle_round(target: &mut impl ReapTarget, round: &[ReapedChild]) {
    let (workers, others): (Vec<&ReapedChild>, Vec<&ReapedChild>) =
        round.iter().partition(|child| target.is_worker(child.pid));
    let pids: Vec<Pid> = others.iter().map(|child| child.pid).collect();
    // Workers come first: a keeper of the same round is known only from the record of its worker, and a session only
    // from its acceptor.
    for worker in workers {
        target.remove_worker(worker, &pids);
    }
    for child in others {
        target.remove_other(child, &pids);
    }
    let ended: Vec<Pid> = round.iter().map(|child| child.pid).collect();
    target.apply_actions_except(&ended);
}

/// Drops actions about children that have ended. After a fork, such an action could reach a new worker with the same
/// pid.
fn drop_actions_about(actions: &mut VecDeque<Action>, ended: &[Pid]) {
    actions.retain(|action| action.child().is_none_or(|pid| !ended.contains(&pid)));
}

/// The master, and what is known about the current round.
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
        // The policy must get its last reports before its death.
        queue_reports(master, pid);
        keep_deaths_of_programs(master);
        let suspicion = suspicion(master, child, self.out_of_memory);
        let orphans = &master.orphans;
        let may_keep = |pid: Pid| {
            !orphans.cannot_be_keeper(pid) && (others.contains(&pid) || is_plausible_keeper(pid))
        };
        let orders = (
            master.fleet.drains(pid),
            master.fleet.suspicion_of_kill(pid),
        );
        let worker = master.workers.remove(pid, suspicion, may_keep);
        if let Some(ended) = &worker
            && (ended.slot.is_worker() || ended.pool.is_some())
        {
            let is_worker = ended.slot.is_worker();
            let death = ExecutorDeath::of(child.exit, is_worker, orders, self.out_of_memory);
            let has_keeper = master.workers.keepers.has_keeper_of(pid);
            master.executor_ends.died(pid, death, has_keeper);
        }
        master.workers.sessions.adopted.remove(pid);
        for progress in master.workers.keepers.progress() {
            master.queue_actions(progress);
        }
        if let Some(worker) = worker.as_ref().filter(|it| it.slot.acceptor().is_some()) {
            adopt_sessions(master, pid, &worker.known, others);
        }
        // If this round has decided a start or a reload, the result is reported with the log lines of the child that
        // caused it. A later death of the same round must not replace these lines.
        if !master.actions.iter().any(Action::is_result) {
            master.workers.startup_log.ended(pid);
        }
        master.orphans.reaped(pid, true);
        master.queue_actions(Event::Died {
            pid,
            name: worker.as_ref().and_then(program_deaths::process_name),
            how: child.exit,
            last: worker.and_then(|worker| worker.last_call()),
            rss_bytes: child.peak_rss_bytes,
            at: process::unix_seconds(),
        });
        count_exits(
            master,
            self.out_of_memory && child.exit.is_signal(Signal::SIGKILL),
        );
    }

    fn remove_other(&mut self, child: &ReapedChild, others: &[Pid]) {
        let (master, pid) = (&mut *self.master, child.pid);
        let is_session = master.workers.sessions.reaped(child);
        if is_session {
            pass_session_deaths(master);
            note_adopted_sessions(master);
        }
        master.orphans.reaped(pid, is_session);
        let serving = master.fleet.generation();
        if master.workers.release_record(pid, serving) {
            adopt_sessions(master, pid, &Rc::default(), others);
        }
        other_child_ended(master, pid);
    }

    fn apply_actions_except(&mut self, ended: &[Pid]) {
        act_except(self.master, ended);
    }
}

pub fn reap(master: &mut Master<'_>) {
    // The number of children in a round is limited, and all are reaped before the first one is replaced. Otherwise
    // workers that die as fast as they are forked would keep the master from other work.
    let mut round: Vec<_> = std::iter::from_fn(process::reap_any)
        .take(MOST_REAPED)
        .collect();
    master.reap_again = round.len() == MOST_REAPED;
    round.retain(|ended| {
        !probe_ended(master, ended.pid, ended.exit)
            && !master.orphans.reader_ended(ended.pid)
            && !observer_ended(master, ended)
    });
    let is_killed_worker = |ended: &ReapedChild| {
        ended.exit.is_signal(Signal::SIGKILL) && master.workers.get(ended.pid).is_some()
    };
    let out_of_memory = round.iter().any(is_killed_worker)
        && (master.crash_counts).ran_out_of_memory(memory::oom_kill_count());
    let mut target = Round {
        master,
        out_of_memory,
    };
    handle_round(&mut target, &round);
    send_executor_ends(master);
    // This comes last, so that it does not delay the replacement of dead workers.
    end_orphans(master);
    if let Some(pid) = master.fleet.observer() {
        let is_stopped = process::is_stopped(pid);
        master.queue_actions(Event::ObserverStopped { pid, is_stopped });
    }
}

/// Handles a reaped child if it is an observer. Returns whether it was one.
fn observer_ended(master: &mut Master<'_>, child: &ReapedChild) -> bool {
    let (pid, how) = (child.pid, child.exit);
    let is_observer = master.workers.observers.remove(&pid);
    if is_observer {
        master.orphans.reaped(pid, false);
        master.queue_actions(Event::ObserverDied { pid, how });
    }
    is_observer
}

/// Counts the ends of workers. If the OOM killer may have ended them (`is_out_of_memory`), a death by a signal counts
/// as out of memory.
fn count_exits(master: &mut Master<'_>, is_out_of_memory: bool) {
    let exits = &master.workers.metrics.header().worker_exits;
    for exit in std::mem::take(&mut master.fleet.worker_exits) {
        let exit = match exit {
            WorkerExit::Signal if is_out_of_memory => WorkerExit::OutOfMemory,
            exit => exit,
        };
        metrics_board::count(&exits[exit as usize], 1);
    }
}

/// Carries out the queued actions, except those about the children `ended`, whose pids new workers may
/// have.
pub fn act_except(master: &mut Master<'_>, ended: &[Pid]) {
    drop_actions_about(&mut master.actions, ended);
    settle(master);
}

/// Returns which call may have caused the end of a worker.
fn suspicion(master: &Master<'_>, ended: &ReapedChild, out_of_memory: bool) -> Suspicion {
    let is_killed = ended.exit.is_signal(Signal::SIGKILL) && !out_of_memory;
    match master.fleet.suspicion(ended.pid) {
        _ if master.stopping || ended.exit == Exit::Code(0) => Suspicion::Nothing,
        // A SIGKILL of another process is not caused by a call.
        Suspicion::Reported if is_killed => Suspicion::Nothing,
        suspicion => suspicion,
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
    use crate::protocol::control::WorkerPhase;

    const NOW: Millis = 1_000;

    /// A simulated master: the policy with tables. The simulated kernel gives new workers the pids in `free` first.
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
        /// Starts `count` workers, with pids from 101 on. All are ready.
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

        /// Reaps these children in one round; all ended by SIGSEGV.
        fn reap(&mut self, pids: &[i32]) {
            let child = |pid: &i32| ReapedChild {
                pid: Pid(*pid),
                exit: SEGV,
                peak_rss_bytes: 0,
            };
            let round: Vec<ReapedChild> = pids.iter().map(child).collect();
            handle_round(self, &round);
        }

        /// Returns the worker in a slot that does not drain, with its state.
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
                name: None,
                how: child.exit,
                last: None,
                rss_bytes: 0,
                at: 0,
            });
        }

        fn remove_other(&mut self, child: &ReapedChild, _others: &[Pid]) {
            let pid = child.pid;
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
        // The death of 103 fails the reload, so 102 is ordered to drain. 101 is replaced.
        master.free = [Pid(102)].into();
        master.reap(&[101, 103, 102]);
        assert_eq!(master.worker(0), (102, WorkerPhase::Starting));
        assert_eq!(master.ordered, BTreeSet::new());
    }
}
