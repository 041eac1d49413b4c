//! Does the master's part of sessions: holds the memory and queues that acceptors share, and takes care of sessions
//! whose acceptor has died.
//!
//! The master adopts the sessions of a dead acceptor. They continue to serve, get orders over shared memory, and are
//! reaped here. The table of sessions is not trusted: an entry counts only if its pid is a child of this process with
//! the same start time.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;

use super::adopted_sessions::{AdoptedSessions, kill_reason};
use super::generation_info::{GenerationContext, GenerationInfo};
use super::own_programs::OwnPrograms;
use super::session_ranges::{SessionRange, SessionRanges, SessionsState};
use crate::error::Result;
use crate::link::adoption_queue::AdoptionQueue;
use crate::link::ids::{Generation, Pid, Slot};
use crate::link::scoreboard::WorkerRecord;
use crate::link::session_limits::SessionLimits;
use crate::link::session_table::{SESSIONS, SessionRecord};
use crate::logging::pluralize;
use crate::master::policy::death_log::{Death, clean, session_reason};
use crate::master::policy::slots::KillReason;
use crate::protocol::control::{DeathKind, IsolatedStatus, SessionStatus};
use crate::sys::process::{self, Exit, ReapedChild, monotonic_ms, unix_seconds};
use crate::sys::process_tree;
use crate::sys::shared_memory;
use crate::worker_init::IsolatedInit;

/// All sessions of the server.
#[derive(Debug, Default)]
pub struct Sessions {
    /// `None` until a listener is isolated.
    shared: Option<SessionRanges>,
    /// The sessions whose acceptor has died.
    pub adopted: AdoptedSessions,
    serving: Option<Generation>,
    /// The programs that belong to connections.
    own_programs: OwnPrograms,
    /// Crashes that were not passed to the policy yet.
    deaths: Vec<Death>,
    /// The number of access log lines that sessions had not written when this process reaped them.
    lost_lines: u64,
    /// The sessions that were reaped after a crash, and whether they had a connection.
    crashed: Vec<(Pid, bool)>,
}

impl Sessions {
    /// Returns all records; none if no listener was ever isolated.
    pub fn records(&self) -> &'static [SessionRecord] {
        let shared = self.shared.as_ref();
        shared.map_or(&[], SessionRanges::records)
    }

    /// Returns what the acceptor in `slot` gets, and the adoption queue of its listener; `None` for another
    /// kind of slot. `scoreboard` is the file of the scoreboard. Creates the table before the first child of a
    /// generation with isolated listeners is forked.
    ///
    /// # Errors
    /// If there is no memory or no descriptor.
    pub fn init(
        &mut self,
        slot: Slot,
        context: &GenerationContext,
        scoreboard: &OwnedFd,
    ) -> io::Result<Option<(IsolatedInit, AdoptionQueue)>> {
        let mut isolated = context.settings.isolated();
        if self.shared.is_none() && isolated.next().is_some() {
            self.shared = Some(SessionRanges::new()?);
            self.adopted.set_records(self.records());
        }
        let Some(number) = slot.acceptor() else {
            return Ok(None);
        };
        let found = context.settings.isolated().nth(number);
        let listen = found.and_then(|(index, _)| Some((index, context.listeners.get(index)?)));
        let (Some(shared), Some((listen, listener))) = (&mut self.shared, listen) else {
            return Err(io::Error::other("its listener is gone"));
        };
        let is_wanted = |address: &str| {
            context
                .listeners
                .iter()
                .any(|listener| listener.bound == address)
        };
        let (range, adoption) = shared.range(&listener.bound, is_wanted)?;
        let init = IsolatedInit {
            listen,
            address: listener.bound.clone(),
            range: (range.records, range.first),
            master_pipe: shared.master_pipe(),
            scoreboard: Rc::new(shared_memory::read_only(scoreboard)?),
            heartbeat_ms: None,
        };
        Ok(Some((init, adoption)))
    }

    /// Writes into the scoreboard which listeners are isolated in the serving generation.
    pub fn set_serving(
        &mut self,
        scoreboard: &[WorkerRecord],
        generation: Generation,
        context: &GenerationContext,
    ) {
        let isolated = &context.known.isolated;
        if self.serving.replace(generation) != Some(generation) {
            let workers = &context.settings.workers;
            let (heartbeat, drain) = (workers.heartbeat_timeout, workers.drain_timeout);
            let listeners = isolated.iter().zip(context.settings.isolated());
            let limits = listeners.filter_map(|((address, _), (_, isolation))| {
                let range = self.ranges().find(|range| range.address == address)?;
                let limits = SessionLimits::new(heartbeat, drain, isolation.max_lifetime);
                Some((range.first, limits))
            });
            let limits = limits.collect();
            self.adopted.set_limits(generation, limits);
            let used = self.generations();
            self.own_programs
                .add(generation, context, |it| used.contains(&it));
        }
        if let Some(shared) = &self.shared {
            let is_isolated = |address: &str| isolated.iter().any(|(it, _)| it == address);
            shared.set_serving(scoreboard, generation, is_isolated);
        }
    }

    /// Returns the generations of all sessions.
    fn generations(&self) -> BTreeSet<Generation> {
        let used = self.used().filter(|(_, _, record)| record.is_used());
        used.map(|(_, _, record)| record.generation()).collect()
    }

    /// Returns the pools with `scope = "connection"`, and the generation of each session with a connection, by its pid.
    pub fn own_programs(&self) -> (&OwnPrograms, BTreeMap<Pid, Generation>) {
        let used = self.used().filter(|(_, _, record)| record.is_open());
        let sessions = used.map(|(_, _, record)| (record.pid(), record.generation()));
        (&self.own_programs, sessions.collect())
    }

    fn ranges(&self) -> impl Iterator<Item = SessionRange<'_>> {
        self.shared.iter().flat_map(SessionRanges::used)
    }

    /// Returns every record that was ever used, with its number and the address of its listener.
    fn used(&self) -> impl Iterator<Item = (usize, &str, &'static SessionRecord)> {
        self.ranges().flat_map(|range| {
            let records = range.records.iter().enumerate();
            records.map(move |(index, record)| (range.first + index, range.address, record))
        })
    }

    /// Returns whether a child that was not reaped is a session.
    pub fn is_session(&self, pid: Pid) -> bool {
        let mut used = self.used();
        used.any(|(_, _, record)| record.is_used() && is_behind(record, pid))
    }

    /// Returns the sessions of an acceptor that was reaped, with the numbers of their records. They are children of
    /// this process now, or were reaped together with the acceptor and are among `reaped`. Records the crashes that the
    /// acceptor had not reported.
    pub fn left_by(
        &mut self,
        acceptor: Pid,
        known: &Rc<GenerationInfo>,
        reaped: &[Pid],
    ) -> Vec<(Pid, usize)> {
        self.note_crashes(|of| (of == acceptor).then(|| Rc::clone(known)));
        let mut found = Vec::new();
        for (place, _, record) in self.used() {
            if record.acceptor() == acceptor && record.is_used() {
                let pid = record.pid();
                let is_there = is_behind(record, pid) && process::is_child(pid);
                match is_there || reaped.contains(&pid) {
                    true => found.push((pid, place)),
                    // The acceptor has reaped this session, or had not forked it yet.
                    false => record.release(),
                }
            }
        }
        found
    }

    /// Adopts the sessions that an acceptor has left.
    pub fn adopt(&mut self, acceptor: Pid, found: Vec<(Pid, usize)>, known: &Rc<GenerationInfo>) {
        let open = |(_, place): &&(Pid, usize)| self.records()[*place].is_open();
        let open = found.iter().filter(open).count();
        if open > 0 {
            let open = pluralize(open, "connection continues", "connections continue");
            log::info!("{open} without acceptor {acceptor}");
        }
        for (pid, place) in found {
            self.adopted.add(pid, place, known);
        }
    }

    /// Handles the end of a child that the policy does not know. Returns whether it was a session.
    pub fn reaped(&mut self, child: &ReapedChild) -> bool {
        let Some(session) = self.adopted.remove(child.pid) else {
            return false;
        };
        let (place, end) = (session.place, (child.exit, child.peak_rss_bytes));
        let record = &self.records()[place];
        if child.exit != Exit::Code(0) {
            self.crashed.push((child.pid, record.is_open()));
            self.note_crash((place, child.pid), end, session.killed_for, &session.known);
        }
        self.lost_lines += record.take_lines();
        record.release();
        true
    }

    /// Takes the sessions that were reaped after a crash, and whether they had a connection.
    pub fn take_crashed(&mut self) -> Vec<(Pid, bool)> {
        std::mem::take(&mut self.crashed)
    }

    /// Takes the number of lines of the access log that reaped sessions had not written.
    pub fn take_lost_lines(&mut self) -> u64 {
        std::mem::take(&mut self.lost_lines)
    }

    /// Marks that a pool process of the program before an upgrade has ended, in the records of all sessions of older
    /// generations.
    pub fn announce_pool_end(&self, serving: Generation) {
        let used = self.used().map(|(_, _, record)| record);
        let is_old = |record: &&SessionRecord| record.is_used() && record.generation() < serving;
        used.filter(is_old).for_each(SessionRecord::set_pool_ended);
    }

    /// Notes the crashes of sessions that acceptors have reaped, and releases their records. `known` returns
    /// what the master reports about the generation of an acceptor; `None` leaves its records. An acceptor
    /// also sends a report, but that may be lost: its link may be full, or it has no link after an upgrade.
    pub fn note_crashes(&mut self, known: impl Fn(Pid) -> Option<Rc<GenerationInfo>>) {
        let crashed: Vec<_> = (self.used())
            .filter_map(|(place, _, record)| Some((place, record, record.crashed()?)))
            // A session can write CRASHED into the record of another session, which still lives.
            .filter(|(_, record, _)| !is_behind(record, record.pid()))
            .collect();
        for (place, record, end) in crashed {
            if let Some(known) = known(record.acceptor()) {
                let killed_for = record.exceeded().map(kill_reason);
                // Any session can write any record. A record that no session can have had is freed, but it is not a
                // death.
                if was_session(record) {
                    self.note_crash((place, record.pid()), end, killed_for, &known);
                }
                record.release();
            }
        }
    }

    fn note_crash(
        &mut self,
        (place, pid): (usize, Pid),
        (exit, rss_bytes): (Exit, u64),
        killed_for: Option<KillReason>,
        known: &GenerationInfo,
    ) {
        let record = &self.records()[place];
        let now = monotonic_ms();
        let opened = record.opened_ms();
        let uptime = opened.map_or(0, |since| now.saturating_sub(since));
        let peer = match opened {
            Some(_) => record.peer_name(),
            None => "(spare)".to_owned(),
        };
        let last = record.worker.last_call(pid);
        self.deaths.push(Death {
            kind: DeathKind::Connection,
            name: Some(peer),
            slot: Slot::of_session(place % SESSIONS),
            pid,
            generation: record.generation(),
            how: exit,
            uptime,
            method: last.map(|last| clean(known.method(last.method))),
            call: last.and_then(|last| last.call),
            // A session runs no attempts.
            job: None,
            rss_bytes,
            reason: session_reason(exit, killed_for, opened.is_some()),
            at: unix_seconds(),
        });
    }

    /// Returns the crashes since the last call, oldest first.
    pub fn take_deaths(&mut self) -> Vec<Death> {
        std::mem::take(&mut self.deaths)
    }

    /// Returns the deaths of programs of connections since the last call.
    pub fn take_program_deaths(&self) -> Vec<Death> {
        self.own_programs.take_deaths()
    }

    /// Returns the addresses of all listeners that were ever isolated.
    pub fn addresses(&self) -> impl Iterator<Item = String> {
        self.ranges().map(|range| range.address.to_owned())
    }

    /// Adds to `shown` the sessions whose acceptor is `wanted`.
    pub fn describe(&self, wanted: impl Fn(Pid) -> bool, shown: &mut IsolatedStatus) {
        let now = monotonic_ms();
        let Some(range) = self.ranges().find(|it| it.address == shown.address) else {
            return;
        };
        let records = range.records;
        if let Some(first) = records.first() {
            shown.crashed = u64::from(first.crashes.load(Relaxed));
            shown.full = u64::from(first.full.load(Relaxed));
            shown.refused_no_process = u64::from(first.unserved.load(Relaxed));
        }
        for record in records.iter().filter(|record| record.is_used()) {
            if !wanted(record.acceptor()) {
                continue;
            }
            if !record.is_open() {
                shown.spare += 1;
                continue;
            }
            shown.running += 1;
            shown.list.push(SessionStatus {
                pid: record.pid().0,
                peer: record.peer_name(),
                generation: record.generation().0,
                running: u64::from(record.worker.running.load(Relaxed)),
                calls: record.worker.calls.load(Relaxed),
                uptime_s: now.saturating_sub(record.since_ms.load(Relaxed)) / 1000,
            });
        }
    }

    /// Returns the state for an upgrade.
    pub fn export(&self) -> Option<SessionsState> {
        self.shared.as_ref().map(SessionRanges::export)
    }

    /// Restores the state after an upgrade. Adopts the sessions without an acceptor. `is_other` returns whether a
    /// child is known to be something else.
    ///
    /// # Errors
    /// The errors of `take`; a table of another format.
    pub fn import(
        state: Option<SessionsState>,
        mut take: impl FnMut(RawFd) -> Result<OwnedFd>,
        is_other: impl Fn(Pid) -> bool,
    ) -> Result<Self> {
        let mut sessions = Sessions::default();
        let Some(state) = state else {
            return Ok(sessions);
        };
        sessions.shared = Some(SessionRanges::import(state, &mut take)?);
        sessions.adopted.set_records(sessions.records());
        let is_orphan = |record: &SessionRecord| {
            let pid = record.pid();
            record.is_used() && is_behind(record, pid) && process::is_child(pid) && !is_other(pid)
        };
        let known: Rc<GenerationInfo> = Rc::default();
        let orphans: Vec<(Pid, usize)> = (sessions.used())
            .filter(|(_, _, record)| is_orphan(record))
            .map(|(place, _, record)| (record.pid(), place))
            .collect();
        for (pid, place) in orphans {
            sessions.adopted.add(pid, place, &known);
        }
        Ok(sessions)
    }
}

/// Returns whether this can be the record of a session: it needs valid numbers, and a start that is not before the
/// start of its acceptor.
fn was_session(record: &SessionRecord) -> bool {
    let acceptor = record.acceptor();
    let began = record.start_ticks();
    let is_possible = record.pid().0 > 1 && acceptor.0 > 1 && record.generation().0 > 0;
    is_possible && began > 0 && process_tree::start_ticks(acceptor).is_none_or(|it| it <= began)
}

/// Returns whether the record was made for the process that has this pid now.
fn is_behind(record: &SessionRecord, pid: Pid) -> bool {
    pid.0 > 1 && record.pid() == pid && process_tree::start_ticks(pid) == Some(record.start_ticks())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::link::session_table::note_claim;

    #[test]
    fn a_record_that_no_session_can_have_had_is_no_death() {
        let mut shared = SessionRanges::new().unwrap();
        let (range, _) = shared.range("127.0.0.1:1", |_| false).unwrap();
        let own = Pid::current();
        let began = process_tree::start_ticks(own).unwrap();
        let impossible = [
            (Pid(-5), began, Generation(1)),
            (Pid(1), began, Generation(1)),
            (Pid(i32::MAX), 0, Generation(1)),
            (Pid(i32::MAX), began - 1, Generation(1)),
            (Pid(i32::MAX), began, Generation(0)),
        ];
        let possible = (Pid(i32::MAX), began, Generation(1));
        for (index, (pid, start, generation)) in (0..).zip(impossible.into_iter().chain([possible]))
        {
            let record = &range.records[index];
            assert!(record.claim(own, generation));
            note_claim(range.records, index);
            record.set_process(pid, start);
            record.crash(Exit::Code(3), 1 << 20);
        }
        let mut sessions = Sessions {
            shared: Some(shared),
            ..Sessions::default()
        };
        sessions.note_crashes(|_| Some(Rc::default()));
        let deaths: Vec<Pid> = sessions.take_deaths().iter().map(|it| it.pid).collect();
        assert_eq!(deaths, [possible.0]);
        assert!(range.records[..6].iter().all(|it| it.crashed().is_none()));
    }
}
