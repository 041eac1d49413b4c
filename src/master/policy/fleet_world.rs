//! Simulates a kernel for [`Fleet`]. Tests order forks, deaths and the passing of time. Each action is done at once,
//! and the invariants are checked at each action.

use std::collections::{BTreeMap, BTreeSet};

use log::Level;
use nix::sys::signal::Signal;

use super::action::Action;
use super::event::{Event, Exit, LastCall, Millis, PolicyLimits};
use super::fleet::Fleet;
use super::slots::{WorkerStage, kill_after};
use super::status_view::WorkerView;
use crate::link::ids::{Generation, Pid, Slot};
use crate::master::incident_text::{log_line, reload_result};
use crate::protocol::call_id::CallId;
use crate::protocol::control::WorkerPhase;

pub(crate) const LIMITS: PolicyLimits = PolicyLimits {
    count: 4,
    pools: 0,
    acceptors: 0,
    has_observer: false,
    has_jobs: false,
    boot_timeout: 30_000,
    drain_timeout: 20_000,
    heartbeat_timeout: 10_000,
    respawn_burst: 5,
    respawn_max_delay: 30_000,
    max_memory: 0,
    max_lifetime: 0,
    max_unavailable: 1,
};

pub(crate) const SEGV: Exit = Exit::Signal {
    number: Signal::SIGSEGV as i32,
    core_dumped: true,
};

/// What the world knows about a living process.
#[derive(Debug, Clone)]
pub(crate) struct Process {
    pub slot_id: (Generation, Slot),
    /// It was ordered to exit, exits on its own, or got a signal. So its slot may be given to another process.
    pub leaves: bool,
    /// It got SIGKILL. Only its death must still be reported.
    pub killed: bool,
    /// It was too slow, so it got a signal without an order to drain.
    pub late: bool,
    /// It gives no heartbeat any more.
    pub stuck: bool,
    pub rss_bytes: u64,
    /// It was ordered to drain after its successor got its slot.
    pub replaced: bool,
}

pub(crate) struct World {
    pub fleet: Fleet,
    pub now: Millis,
    pub living: BTreeMap<Pid, Process>,
    /// Every action with its time.
    pub history: Vec<(Millis, Action)>,
    /// Forks that were ordered and not done.
    pub ordered: Vec<(Generation, Slot)>,
    /// Whether forks wait in `ordered`.
    pub hold_forks: bool,
    pub refuse_forks: bool,
    reloads: usize,
    verdicts: usize,
    started: bool,
    stopped: bool,
    pub exited: bool,
    last_pid: i32,
}

impl World {
    /// Exports and imports the fleet, as an upgrade does, if an upgrade is possible now.
    #[allow(clippy::unwrap_used)]
    pub fn cross(&mut self) {
        if !self.fleet.can_reload() || !self.ordered.is_empty() {
            return;
        }
        let before = self.fleet.export();
        let table = serde_json::to_string(&before).unwrap();
        let read = serde_json::from_str(&table).unwrap();
        self.fleet = Fleet::import(read, self.now).unwrap();
    }

    /// Makes a new master whose workers were forked and are not ready.
    pub fn new(limits: PolicyLimits) -> World {
        let (fleet, actions) = Fleet::new(limits, 1_000);
        let mut world = World {
            fleet,
            now: 1_000,
            living: BTreeMap::new(),
            history: Vec::new(),
            ordered: Vec::new(),
            hold_forks: false,
            refuse_forks: false,
            reloads: 0,
            verdicts: 0,
            started: false,
            stopped: false,
            exited: false,
            last_pid: 100,
        };
        world.absorb(actions);
        world
    }

    pub fn serving(limits: PolicyLimits) -> World {
        let mut world = World::new(limits);
        world.all_ready();
        assert!(world.did(&Action::StartUpDone(Ok(()))));
        world
    }

    /// Reports an event to the fleet, and does the actions that follow.
    pub fn send(&mut self, event: Event) {
        match &event {
            Event::Reload { .. } => self.reloads += 1,
            Event::Stop | Event::StopNow => self.stopped = true,
            Event::Retiring { pid } => self.living.get_mut(pid).into_iter().for_each(|process| {
                process.leaves = true;
            }),
            _ => {}
        }
        let actions = self.fleet.handle(event, self.now);
        self.absorb(actions);
    }

    fn absorb(&mut self, actions: Vec<Action>) {
        let mut forks = Vec::new();
        for action in actions {
            self.check(&action);
            match &action {
                Action::Fork { slot, generation } => {
                    let slot_id = (*generation, *slot);
                    // A process that was too slow and does not end does not delay its slot any more.
                    let here = |process: &&mut Process| process.slot_id == slot_id;
                    self.living
                        .values_mut()
                        .filter(here)
                        .for_each(|it| it.late = false);
                    forks.push(slot_id);
                }
                Action::Drain { pid, .. } => {
                    let slot_id = self.process(*pid).slot_id;
                    let replaced = self.holders(slot_id) == 2;
                    let process = self.process(*pid);
                    process.leaves = true;
                    process.replaced = replaced;
                }
                Action::Kill { pid, signal } => {
                    let process = self.process(*pid);
                    process.late |= !process.leaves;
                    process.leaves = true;
                    process.killed |= *signal == Signal::SIGKILL;
                }
                // The result comes before the next action.
                Action::Diagnose { pid } => {
                    let text = "S asleep in read(0x5, ...)".to_owned();
                    self.send(Event::Diagnosed { pid: *pid, text });
                }
                _ => {}
            }
            self.history.push((self.now, action));
        }
        self.ordered.append(&mut forks);
        self.do_forks();
    }

    pub fn do_forks(&mut self) {
        while !self.hold_forks && !self.ordered.is_empty() {
            self.do_fork();
        }
    }

    /// Does, or refuses, the oldest fork that was ordered.
    pub fn do_fork(&mut self) {
        let (generation, slot) = self.ordered.remove(0);
        if self.refuse_forks {
            let reason = "Resource temporarily unavailable".to_owned();
            return self.send(Event::ForkFailed {
                slot,
                generation,
                reason,
            });
        }
        self.last_pid += 1;
        let pid = Pid(self.last_pid);
        let slot_id = (generation, slot);
        assert!(self.holders(slot_id) <= 1, "three workers in {slot_id:?}");
        let process = Process {
            slot_id,
            leaves: false,
            killed: false,
            late: false,
            stuck: false,
            rss_bytes: 0,
            replaced: false,
        };
        self.living.insert(pid, process);
        self.send(Event::Forked {
            slot,
            generation,
            pid,
        });
    }

    /// Returns the processes in a slot that were not ordered to exit: a worker, and its successor.
    fn holders(&self, slot_id: (Generation, Slot)) -> usize {
        let here = |process: &&Process| process.slot_id == slot_id && !process.leaves;
        self.living.values().filter(here).count()
    }

    /// Returns the number of recycles under way. Counted are successors that are not ready, successors that were too
    /// slow and have not ended yet, and old workers that have not ended yet.
    pub fn recycles(&self) -> usize {
        let slots: BTreeSet<_> = self
            .living
            .values()
            .map(|process| process.slot_id)
            .collect();
        let coming = |slot_id: &&(Generation, Slot)| {
            let forks = self.ordered.iter().filter(|order| order == slot_id).count();
            let late = |process: &&Process| process.slot_id == **slot_id && process.late;
            let late = self.living.values().filter(late).count();
            self.holders(**slot_id) + forks + late == 2
        };
        // A child that SIGKILL does not end does not count.
        let is_held = |pid: &Pid| {
            let killed = self.signalled(*pid, Signal::SIGKILL);
            killed.is_some_and(|at| self.now >= at + kill_after(Signal::SIGKILL))
        };
        let replaced = self.living.iter();
        let replaced = replaced.filter(|(pid, process)| process.replaced && !is_held(pid));
        slots.iter().filter(coming).count() + replaced.count()
    }

    /// Asserts that an action is allowed in this history.
    fn check(&mut self, action: &Action) {
        assert!(!self.exited, "{action:?} after the exit");
        match action {
            Action::Fork { slot, generation } => {
                assert!(!self.stopped, "a fork after the stop");
                let order = (*generation, *slot);
                assert!(!self.ordered.contains(&order), "{order:?} forked twice");
            }
            Action::StartUpDone(_) => {
                assert!(!std::mem::replace(&mut self.started, true), "started twice");
            }
            Action::ReloadDone { .. } => {
                self.verdicts += 1;
                assert!(self.verdicts <= self.reloads, "a result without a reload");
            }
            Action::Drain { pid, .. } => {
                let process = self.living[pid].clone();
                let serves = process.slot_id.0 == self.fleet.generation();
                // A new child may have lost its slot before its fork was reported.
                let newborn = pid.0 == self.last_pid;
                let open = self.verdicts < self.reloads;
                let replaced = self.holders(process.slot_id) == 2;
                assert!(
                    !open || !serves || newborn || replaced,
                    "drained before the verdict"
                );
            }
            Action::Kill { pid, signal } if *signal == Signal::SIGABRT => {
                assert!(self.living[pid].stuck, "{pid} was well and got ABRT");
            }
            Action::Exit { .. } => {
                assert!(self.living.is_empty(), "left children behind");
                assert!(self.ordered.is_empty(), "left a fork behind");
                assert_eq!(self.verdicts, self.reloads, "left without a verdict");
                self.exited = true;
            }
            _ => {}
        }
    }

    fn process(&mut self, pid: Pid) -> &mut Process {
        self.living.get_mut(&pid).expect("actions name the living")
    }

    /// Lets `span` milliseconds pass as the master's loop does: it wakes up at each deadline, and reports heartbeats
    /// first.
    pub fn pass(&mut self, span: Millis) {
        let end = self.now + span;
        // A deadline may be due twice at the same time, because an action may set a new one for now.
        let (mut last, mut rounds) = (self.now, 0);
        loop {
            rounds = if self.now == last { rounds + 1 } else { 0 };
            last = self.now;
            assert!(rounds < 100, "{:?} never ends", self.fleet);
            let wake = self.fleet.next_deadline().map_or(end, |at| at.min(end));
            self.now = self.now.max(wake);
            self.tick();
            if self.now == end && self.fleet.next_deadline().is_none_or(|at| at > end) {
                break;
            }
        }
    }

    /// One round of the master's loop.
    pub fn tick(&mut self) {
        let well = self.living.iter().filter(|(_, process)| !process.stuck);
        for pid in well.map(|(pid, _)| *pid).collect::<Vec<_>>() {
            let at = self.now;
            self.send(Event::Heartbeat { pid, at });
        }
        for pid in self.fleet.to_sample(self.now) {
            let rss_bytes = self.process(pid).rss_bytes;
            self.send(Event::Memory { pid, rss_bytes });
        }
        let actions = self.fleet.tick(self.now);
        self.absorb(actions);
    }

    /// Returns the worker that holds a slot of a generation.
    pub fn pid_in(&self, generation: u32, slot: u16) -> Pid {
        let view = self.fleet.workers().into_iter().find(|view| {
            let slot_id = (view.generation, view.slot);
            slot_id == (Generation(generation), Slot(slot)) && view.state != WorkerPhase::Draining
        });
        view.and_then(|view| view.pid)
            .expect("the slot has a worker")
    }

    /// Returns the worker that holds a slot of the serving generation.
    pub fn pid(&self, slot: u16) -> Pid {
        self.pid_in(self.fleet.generation().0, slot)
    }

    pub fn ready(&mut self, pid: Pid) {
        self.send(Event::Ready { pid });
    }

    /// Makes all starting children ready, also those that are forked as a result.
    pub fn all_ready(&mut self) {
        let mut told = BTreeSet::new();
        loop {
            let children = self.fleet.table.children.iter();
            let starting = children.filter(|(_, child)| child.stage == WorkerStage::Starting);
            let mut pids = starting.map(|(pid, _)| *pid);
            let Some(pid) = pids.find(|pid| told.insert(*pid)) else {
                return;
            };
            self.ready(pid);
        }
    }

    pub fn die(&mut self, pid: Pid, how: Exit) {
        self.living.remove(&pid);
        self.send(Event::Died {
            pid,
            name: None,
            how,
            last: Some(LastCall {
                method: "add".to_owned(),
                call: CallId::recorded(pid.0, 12),
                job: Some("ID".to_owned()),
            }),
            rss_bytes: 1 << 20,
            at: 1_700_000_000,
        });
    }

    /// Ends all children that were ordered to exit or got a signal. Those that got SIGKILL end by it, the others with
    /// code 0.
    pub fn let_leave(&mut self) {
        let leaving = self.living.iter().filter(|(_, process)| process.leaves);
        for (pid, process) in leaving.map(|(p, s)| (*p, s.clone())).collect::<Vec<_>>() {
            let killed = Exit::Signal {
                number: Signal::SIGKILL as i32,
                core_dumped: false,
            };
            let how = if process.killed {
                killed
            } else {
                Exit::Code(0)
            };
            self.die(pid, how);
        }
    }

    pub fn first(&self, state: WorkerPhase) -> Option<Pid> {
        let view = self.fleet.workers().into_iter().find(|v| v.state == state);
        view.and_then(|view| view.pid)
    }

    pub fn view(&self, slot: u16) -> WorkerView {
        let views = self.fleet.workers();
        let view = views.into_iter().find(|view| view.slot == Slot(slot));
        view.expect("the slot exists")
    }

    pub fn count(&self, state: WorkerPhase) -> usize {
        let views = self.fleet.workers();
        views.iter().filter(|view| view.state == state).count()
    }

    pub fn did(&self, action: &Action) -> bool {
        self.history.iter().any(|(_, done)| done == action)
    }

    /// Returns when a worker got a signal.
    pub fn signalled(&self, pid: Pid, signal: Signal) -> Option<Millis> {
        let wanted = Action::Kill { pid, signal };
        let hit = self.history.iter().find(|(_, action)| *action == wanted);
        hit.map(|(at, _)| *at)
    }

    pub fn drained(&self) -> BTreeSet<Pid> {
        let pid = |(_, action): &(Millis, Action)| match action {
            Action::Drain { pid, .. } => Some(*pid),
            _ => None,
        };
        self.history.iter().filter_map(pid).collect()
    }

    /// Returns the times of a slot's forks.
    pub fn forks(&self, slot: u16) -> Vec<Millis> {
        let of_slot =
            |action: &Action| matches!(action, Action::Fork { slot: s, .. } if s.0 == slot);
        let hits = self.history.iter().filter(|(_, action)| of_slot(action));
        hits.map(|(at, _)| *at).collect()
    }

    /// Returns the log lines that an operator sees, with their times.
    pub fn lines(&self) -> Vec<(Millis, String)> {
        let line = |(at, action): &(Millis, Action)| match action {
            Action::Log {
                level,
                incident,
                suppressed,
            } if *level <= Level::Info => Some((*at, log_line(incident, *suppressed))),
            _ => None,
        };
        self.history.iter().filter_map(line).collect()
    }

    /// Returns the error of the last reload.
    pub fn refusal(&self) -> Option<String> {
        let mut actions = self.history.iter().rev();
        let result = actions.find_map(|(_, action)| match action {
            Action::ReloadDone { generation, result } => Some((*generation, result)),
            _ => None,
        });
        let (generation, result) = result?;
        reload_result(generation, result.clone()).err()
    }
}
