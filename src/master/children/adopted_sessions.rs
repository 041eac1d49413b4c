//! Gives orders to the sessions whose acceptor has died, watches them and kills them. They are children of the master
//! now.
//!
//! These sessions get orders over their records in shared memory. They hand their connections over in batches, like
//! the sessions of an acceptor. A session that does not obey in time, or whose event loop is stuck, is killed.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;

use nix::sys::signal::Signal;

use super::generation_info::GenerationInfo;
use crate::link::ids::{Generation, Pid};
use crate::link::session_draining::{Draining, LOOK_MS};
use crate::link::session_limits::{ExceededTime, SessionLimits};
use crate::link::session_table::{DirectOrder, SESSIONS, SessionRecord};
use crate::master::policy::event::Millis;
use crate::master::policy::slots::KillReason;
use crate::sys::process::{self, monotonic_ms};

/// The time from the deadline of an order to the SIGKILL.
const OVERDUE: Millis = 300;
/// The time between two checks for late sessions.
const LOOK: Millis = 500;

/// A session whose acceptor has died.
#[derive(Debug)]
pub struct AdoptedSession {
    /// The number of its record.
    pub place: usize,
    /// What the master reports about its generation.
    pub known: Rc<GenerationInfo>,
    /// When it gets SIGKILL, if it was ordered to exit.
    kill_at: Option<Millis>,
    /// Whether it was chosen to hand its connection over, now or in a later batch.
    is_draining: bool,
    /// Why it was killed.
    pub killed_for: Option<KillReason>,
}

/// All sessions whose acceptor has died.
#[derive(Debug, Default)]
pub struct AdoptedSessions {
    /// The records of all sessions; none before there is a session.
    records: &'static [SessionRecord],
    adopted: BTreeMap<Pid, AdoptedSession>,
    /// The sessions that hand their connections over, by the numbers of their records.
    draining: Draining,
    /// How long sessions of the serving generation may live, by the first place of the listener's records.
    limits: BTreeMap<usize, SessionLimits>,
    serving: Option<Generation>,
    /// When `kill_late` is due.
    look_at: Millis,
}

impl AdoptedSessions {
    /// Sets where the records of all sessions are.
    pub fn set_records(&mut self, records: &'static [SessionRecord]) {
        self.records = records;
    }

    /// Sets how long sessions of the generation that serves may live, by the first places of the ranges.
    pub fn set_limits(&mut self, serving: Generation, limits: BTreeMap<usize, SessionLimits>) {
        (self.serving, self.limits) = (Some(serving), limits);
    }

    /// Adopts a session. `known` is what the master reports about its generation.
    pub fn add(&mut self, pid: Pid, place: usize, known: &Rc<GenerationInfo>) {
        let session = AdoptedSession {
            place,
            known: Rc::clone(known),
            kill_at: None,
            is_draining: false,
            killed_for: None,
        };
        self.adopted.insert(pid, session);
    }

    /// Removes a reaped child. Returns `None` if it was no adopted session.
    pub fn remove(&mut self, pid: Pid) -> Option<AdoptedSession> {
        self.adopted.remove(&pid)
    }

    pub fn is_empty(&self) -> bool {
        self.adopted.is_empty()
    }

    pub fn pids(&self) -> impl Iterator<Item = Pid> {
        self.adopted.keys().copied()
    }

    /// Returns the generation of each adopted session.
    pub fn generations(&self) -> impl Iterator<Item = Generation> {
        let adopted = self.adopted.values();
        adopted.map(|session| self.records[session.place].generation())
    }

    /// Returns whether the record at `place` belongs to an adopted session of `generation`.
    pub fn has(&self, place: usize, generation: Generation) -> bool {
        let mut adopted = self.adopted.values();
        let is_there = adopted.any(|session| session.place == place);
        is_there && self.records[place].generation() == generation
    }

    /// Sends an order to the adopted sessions of the `wanted` generations. `until_ms` is the deadline
    /// (CLOCK_MONOTONIC).
    pub fn order(
        &mut self,
        wanted: impl Fn(Generation) -> bool,
        order: DirectOrder,
        until_ms: Millis,
    ) {
        let records = self.records;
        let mut draining = Vec::new();
        for session in self.adopted.values_mut() {
            let record = &records[session.place];
            if wanted(record.generation()) {
                // A later order must not extend the deadline of an earlier one.
                let kill_at = until_ms + OVERDUE;
                let kill_at = session.kill_at.map_or(kill_at, |at| at.min(kill_at));
                session.kill_at = Some(kill_at);
                // An acceptor takes its connection if the listener is still isolated in the serving generation.
                let first = session.place / SESSIONS * SESSIONS;
                let has_taker = self.limits.contains_key(&first)
                    && self.serving.is_some_and(|it| it != record.generation());
                if order == DirectOrder::Drain && has_taker {
                    let is_first = !std::mem::replace(&mut session.is_draining, true);
                    draining.extend(is_first.then_some(session.place));
                } else {
                    record.set_order(DirectOrder::Stop, kill_at.saturating_sub(OVERDUE));
                }
            }
        }
        if order == DirectOrder::Stop {
            self.draining = Draining::default();
        }
        self.draining.add(draining.into_iter());
        self.drain_next();
    }

    /// Orders the next batch of sessions to hand their connections over.
    fn drain_next(&mut self) {
        if !self.draining.has_waiting() {
            return;
        }
        let (records, adopted) = (self.records, &self.adopted);
        let of = |place: usize| adopted.values().find(|it| it.place == place);
        let may_move =
            |place: usize| of(place).is_some() && records[place].worker.running.load(Relaxed) == 0;
        let order = |place: usize, _| {
            if let Some(until) = of(place).and_then(|session| session.kill_at) {
                let until = until.saturating_sub(OVERDUE);
                records[place].set_order(DirectOrder::Drain, until);
            }
        };
        self.draining.advance(may_move, order, monotonic_ms());
    }

    /// Sends SIGKILL to all adopted sessions.
    pub fn kill_all(&self) {
        self.adopted.keys().copied().for_each(kill);
    }

    /// Kills the sessions that have not obeyed in time, and late ones. Orders the next batch to drain.
    pub fn pass_time(&mut self, now: Millis) {
        for (pid, session) in &mut self.adopted {
            if session.kill_at.take_if(|at| *at <= now).is_some() {
                session.killed_for.get_or_insert(KillReason::DrainDeadline);
                kill(*pid);
            }
        }
        self.drain_next();
        if self.look_at <= now && !self.is_empty() {
            self.look_at = now + LOOK;
            self.kill_late(now);
        }
    }

    /// Kills the sessions of the serving generation whose event loop is stuck or whose `max-lifetime` is over.
    fn kill_late(&mut self, now: Millis) {
        for (first, limits) in &mut self.limits {
            let most = limits.at_tick(now);
            let places = *first..first + SESSIONS;
            for (pid, session) in &mut self.adopted {
                let record = &self.records[session.place];
                let is_watched = places.contains(&session.place)
                    && session.killed_for.is_none()
                    && record.is_open()
                    && Some(record.generation()) == self.serving;
                if let Some(exceeded) = most.exceeded(record.times(), now).filter(|_| is_watched) {
                    let peer = record.peer_name();
                    log::error!("connection process {pid} is killed: {exceeded} peer={peer}");
                    session.killed_for = Some(kill_reason(exceeded));
                    kill(*pid);
                }
            }
        }
    }

    /// Returns when to call `pass_time` again.
    pub fn next_ms(&self) -> Option<Millis> {
        let kills = self.adopted.values().filter_map(|it| it.kill_at);
        let drain = self.draining.has_waiting();
        let drain = drain.then(|| monotonic_ms() + LOOK_MS);
        let look = (!self.is_empty()).then_some(self.look_at);
        kills.chain(drain).chain(look).min()
    }
}

/// Returns why a session was killed that has exceeded its time.
pub fn kill_reason(exceeded: ExceededTime) -> KillReason {
    match exceeded {
        ExceededTime::Silent(silent) => KillReason::EventLoopStuck {
            silent,
            is_draining: false,
        },
        ExceededTime::Open => KillReason::Text(exceeded.to_string()),
    }
}

fn kill(pid: Pid) {
    // A pid that is not a child any more may belong to any process.
    if process::is_child(pid) {
        process::kill(pid, Signal::SIGKILL);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::link::session_memory::SessionTable;
    use std::time::Duration;

    #[test]
    fn connections_are_handed_over_in_batches_and_closed_together() {
        let table = SessionTable::new().unwrap();
        let range = table.range(0);
        let mut sessions = AdoptedSessions::default();
        sessions.set_records(table.records());
        let second = Duration::from_secs(1);
        let limits = SessionLimits::new(second, second, Duration::ZERO);
        sessions.set_limits(Generation(2), [(0, limits)].into());
        // No process has these pids, so none can be killed.
        let pid = |place: usize| Pid(i32::MAX - place as i32);
        for (place, record) in range[..200].iter().enumerate() {
            assert!(record.claim(Pid(7), Generation(1)));
            record.open((None, None), 1);
            sessions.add(pid(place), place, &Rc::default());
        }
        let ordered = |wanted| {
            let orders = range[..200].iter().filter_map(SessionRecord::take_order);
            orders.filter(|(order, _)| *order == wanted).count()
        };
        let until = monotonic_ms() + 30_000;
        sessions.order(|_| true, DirectOrder::Drain, until);
        assert_eq!(ordered(DirectOrder::Drain), 64);
        assert!(sessions.next_ms().unwrap() < until);
        // The master orders the same again when it adopts others.
        sessions.order(|_| true, DirectOrder::Drain, until);
        assert_eq!(ordered(DirectOrder::Drain), 0);
        (0..10).for_each(|place| drop(sessions.remove(pid(place))));
        sessions.pass_time(monotonic_ms());
        assert_eq!(ordered(DirectOrder::Drain), 10);
        sessions.order(|_| true, DirectOrder::Stop, until);
        assert_eq!(ordered(DirectOrder::Stop), 190);
        sessions.pass_time(monotonic_ms());
        assert_eq!(ordered(DirectOrder::Drain), 0, "none drains after a stop");
    }
}
