//! Decides what follows when the keeper of a living worker dies, or the keeper of a dead worker is stuck.
//!
//! A keeper cannot be replaced, because a clone of a process with threads would inherit locks that no thread releases.
//! So its worker is replaced by one with a keeper. The keeper of a dead worker counts the connections that it has
//! completed. If the count stays the same for too long, the keeper is killed. Otherwise the clients of the other
//! connections would wait for ever.

use std::collections::BTreeMap;

use log::Level;
use nix::sys::signal::Signal;

use super::action::{Action, AfterKeeper, Incident};
use super::event::Millis;
use super::slots::{ChildRecord, WorkerStage};
use crate::link::ids::Pid;
use crate::throttle::limiter::Limiter;

/// The limit on workers that retire because their keepers have died: 64 at once, then one each 10 s. If all
/// keepers die, workers without keepers are better than workers that are replaced all the time.
const RETIRED: (u64, Millis) = (64, 10_000);

#[derive(Debug)]
pub(crate) struct KeeperRules {
    at_work: BTreeMap<Pid, KeeperProgress>,
    retired: Limiter,
}

/// The keeper of a dead worker.
#[derive(Debug)]
struct KeeperProgress {
    worker: Pid,
    /// The number of completed connections at the last change.
    done: u32,
    /// When it is killed if that number stays the same.
    until: Millis,
}

impl KeeperRules {
    pub fn new() -> Self {
        KeeperRules {
            at_work: BTreeMap::new(),
            retired: Limiter::new(RETIRED.0, RETIRED.1),
        }
    }

    /// Returns when the next keeper counts as stuck.
    pub fn deadline(&self) -> Option<Millis> {
        let until = self.at_work.values().map(|progress| progress.until);
        until.filter(|at| *at < Millis::MAX).min()
    }

    /// Handles the death of the keeper of a living worker.
    pub fn lost(&mut self, pid: Pid, child: &mut ChildRecord, now: Millis) -> Vec<Action> {
        let retires = !child.drains() && self.retired.admit(now).is_some();
        let is_ready = child.stage == WorkerStage::Ready;
        child.retires_when_ready = retires;
        let follows = match (retires, is_ready) {
            (true, true) => AfterKeeper::RetiresNow,
            (true, false) => AfterKeeper::RetiresWhenReady,
            (false, _) => AfterKeeper::Nothing,
        };
        let mut actions = vec![warning(Incident::KeeperLost(pid, follows))];
        actions.extend((retires && is_ready).then_some(retire(pid)));
        actions
    }

    /// Handles the number of connections that the keeper of a dead worker has completed. `limit` is how
    /// long the number may stay the same; 0 means no limit.
    pub fn progress(
        &mut self,
        (keeper, worker): (Pid, Pid),
        done: u32,
        limit: Millis,
        now: Millis,
    ) {
        let until = match limit {
            0 => Millis::MAX,
            limit => now.saturating_add(limit),
        };
        let before = self.at_work.get(&keeper);
        if before.is_none_or(|before| before.done != done) {
            let progress = KeeperProgress {
                worker,
                done,
                until,
            };
            self.at_work.insert(keeper, progress);
        }
    }

    /// Moves the deadlines of the keepers by the time that the master was paused, because they may have been paused
    /// too.
    pub fn extend_deadlines(&mut self, late: Millis) {
        for progress in self.at_work.values_mut() {
            progress.until = progress.until.saturating_add(late);
        }
    }

    /// Handles the end of the keeper of a dead worker.
    pub fn ended(&mut self, keeper: Pid) {
        self.at_work.remove(&keeper);
    }

    /// Kills the keepers that are stuck.
    pub fn pass_time(&mut self, now: Millis) -> Vec<Action> {
        let mut actions = Vec::new();
        for (&keeper, progress) in &mut self.at_work {
            if progress.until <= now {
                progress.until = Millis::MAX;
                let worker = progress.worker;
                actions.push(warning(Incident::KeeperStuck { keeper, worker }));
                actions.push(Action::KillKeeper { pid: keeper });
            }
        }
        actions
    }
}

/// Asks a worker to retire.
pub(crate) fn retire(pid: Pid) -> Action {
    let signal = Signal::SIGTERM;
    Action::Kill { pid, signal }
}

fn warning(incident: Incident) -> Action {
    Action::Log {
        level: Level::Warn,
        incident,
        suppressed: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::super::event::Event;
    use super::super::fleet_world::{LIMITS, World};
    use super::*;

    #[test]
    fn a_worker_without_keeper_retires_at_once_or_when_it_is_ready() {
        let mut world = World::serving(LIMITS);
        let ready = world.pid(0);
        world.send(Event::KeeperLost { pid: ready });
        assert_eq!(world.signalled(ready, Signal::SIGTERM), Some(world.now));

        let mut world = World::new(LIMITS);
        let starting = world.pid(1);
        world.send(Event::KeeperLost { pid: starting });
        assert_eq!(world.signalled(starting, Signal::SIGTERM), None);
        world.all_ready();
        assert_eq!(world.signalled(starting, Signal::SIGTERM), Some(world.now));
        world.send(Event::KeeperLost { pid: Pid(9999) });
    }

    #[test]
    fn where_all_keepers_die_workers_stay() {
        let mut world = World::serving(LIMITS);
        let pid = world.pid(0);
        for _ in 0..RETIRED.0 {
            world.send(Event::KeeperLost { pid });
        }
        let other = world.pid(1);
        world.send(Event::KeeperLost { pid: other });
        assert_eq!(world.signalled(other, Signal::SIGTERM), None);
        world.pass(RETIRED.1);
        world.send(Event::KeeperLost { pid: other });
        assert!(world.signalled(other, Signal::SIGTERM).is_some());
    }

    #[test]
    fn a_keeper_gets_its_time_again_after_a_pause_of_the_master() {
        let (keeper, worker, limit) = (Pid(5000), Pid(9), LIMITS.heartbeat_timeout);
        let mut rules = KeeperRules::new();
        rules.progress((keeper, worker), 1, limit, 1_000);
        rules.extend_deadlines(60_000);
        assert!(rules.pass_time(61_000 + limit - 1).is_empty());
        assert!(!rules.pass_time(61_000 + limit).is_empty());
    }

    #[test]
    fn a_keeper_that_is_stuck_is_killed_once() {
        let (keeper, worker) = (Pid(5000), Pid(9));
        let mut world = World::serving(LIMITS);
        let kills = |world: &World| {
            let kill = Action::KillKeeper { pid: keeper };
            world.history.iter().filter(|(_, it)| *it == kill).count()
        };
        let progress = |done| Event::KeeperProgress {
            keeper,
            worker,
            done,
        };
        world.send(progress(0));
        world.pass(15_000);
        world.send(progress(1));
        world.pass(15_000);
        assert_eq!(kills(&world), 0, "it makes progress");
        world.send(progress(1));
        world.pass(60_000);
        assert_eq!(kills(&world), 1);
        world.send(progress(2));
        world.send(Event::KeeperEnded { keeper });
        world.pass(60_000);
        assert_eq!(kills(&world), 1, "it is gone");
    }
}
