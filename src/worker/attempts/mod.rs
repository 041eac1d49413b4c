//! Keeps the attempts of jobs that this process runs, until the jobs process has stored how they ended.
//!
//! `running` begins, gives up and reports attempts. This file has only their table. Pure.
//!
//! An attempt is a call without a connection: a handler thread or a program of the pool runs it. The difference
//! is its end. A call that is given up is over for its caller at once. An attempt ends when its code has ended,
//! because the next attempt of the job may begin only then. Its report is kept until the jobs process has answered it,
//! and is sent again over a new link.

pub mod running;

use std::collections::BTreeMap;
use std::time::Duration;

use super::timers::{CallKey, millis};
use crate::config::JobsConfig;
use crate::link::attempt_frame::{AttemptId, AttemptReport};

/// How long a process that exits waits for interrupted attempts and for the answers to its reports.
const LEAVE_MS: u64 = 500;
/// How long a function may run after the timeout of its attempt. Then its worker is replaced.
const OVERTIME_MS: u64 = 10_000;

/// Why an attempt was given up. The first reason counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    /// A client has cancelled the job. If the handler returns a result, that counts.
    Cancelled,
    TimedOut,
    /// This process exits.
    Interrupted,
}

#[derive(Debug)]
enum AttemptPhase {
    Running {
        call: CallKey,
        method: usize,
        deadline_ms: u64,
        stop: Option<StopReason>,
        /// Whether the jobs process knows which process runs it.
        is_noted: bool,
        /// How long a draining process waits for it.
        held_until_ms: u64,
    },
    Ended(AttemptReport<'static>),
}

#[derive(Debug)]
struct OpenAttempt {
    /// The link to the jobs process that gets the report; `None` while there is none.
    link: Option<usize>,
    phase: AttemptPhase,
}

/// An attempt whose code has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EndedAttempt {
    pub id: AttemptId,
    pub method: usize,
    pub stop: Option<StopReason>,
}

/// The attempts of this process that the jobs process has not settled.
#[derive(Debug)]
pub struct AttemptTable {
    /// The largest number of attempts (`jobs.concurrency`); `usize::MAX` without `[jobs]`.
    most: usize,
    /// By method. A method without an entry has `drain_timeout_ms`.
    drain_timeouts_ms: BTreeMap<String, u64>,
    drain_timeout_ms: u64,
    open: BTreeMap<AttemptId, OpenAttempt>,
    /// The running ones.
    by_call: BTreeMap<CallKey, AttemptId>,
    /// How many have begun since the start of this process.
    begun: u64,
    /// How long a draining process waits for the answers to its reports; 0: it does not drain.
    reports_until_ms: u64,
}

impl AttemptTable {
    /// Creates an empty table. `drain_timeout` counts without `[jobs]`.
    pub fn new(jobs: Option<&JobsConfig>, drain_timeout: Duration) -> Self {
        let drain_timeout = jobs.map_or(drain_timeout, |jobs| jobs.defaults.drain_timeout);
        let methods = jobs.into_iter().flat_map(|jobs| &jobs.methods);
        AttemptTable {
            most: jobs.map_or(usize::MAX, |jobs| jobs.concurrency),
            drain_timeouts_ms: methods
                .map(|(name, rules)| (name.clone(), millis(rules.drain_timeout)))
                .collect(),
            drain_timeout_ms: millis(drain_timeout),
            open: BTreeMap::new(),
            by_call: BTreeMap::new(),
            begun: 0,
            reports_until_ms: 0,
        }
    }

    /// Returns whether another attempt may begin on the handler threads.
    pub fn has_room(&self) -> bool {
        self.open.len() < self.most
    }

    /// Returns the number of attempts that are not settled.
    pub fn count(&self) -> usize {
        self.open.len()
    }

    /// Returns how many have begun since the start of this process.
    pub fn begun(&self) -> u64 {
        self.begun
    }

    /// Returns whether any attempt runs.
    #[inline]
    pub fn are_running(&self) -> bool {
        !self.by_call.is_empty()
    }

    /// Returns whether this call is an attempt that runs.
    #[inline]
    pub fn runs(&self, call: CallKey) -> bool {
        !self.by_call.is_empty() && self.by_call.contains_key(&call)
    }

    /// Returns the attempt that this call is.
    pub fn attempt_of(&self, call: CallKey) -> Option<AttemptId> {
        self.by_call.get(&call).copied()
    }

    /// Returns whether this attempt is in the table.
    pub fn has(&self, id: AttemptId) -> bool {
        self.open.contains_key(&id)
    }

    /// Returns the call of an attempt that runs.
    pub fn call_of(&self, id: AttemptId) -> Option<CallKey> {
        match self.open.get(&id)?.phase {
            AttemptPhase::Running { call, .. } => Some(call),
            AttemptPhase::Ended(_) => None,
        }
    }

    /// Adds an attempt of a method that came over `link`.
    pub fn begin(
        &mut self,
        (id, method): (AttemptId, usize),
        link: usize,
        call: CallKey,
        deadline_ms: u64,
    ) {
        let phase = AttemptPhase::Running {
            call,
            method,
            deadline_ms,
            stop: None,
            is_noted: false,
            held_until_ms: 0,
        };
        self.begun += 1;
        let link = Some(link);
        self.open.insert(id, OpenAttempt { link, phase });
        self.by_call.insert(call, id);
    }

    /// Returns why the attempt of this call is given up when its timer expires at `now_ms`: its timeout, or the end of
    /// a drain. Returns `None` if the call is no running attempt.
    pub fn timer_reason(&self, call: CallKey, now_ms: u64) -> Option<StopReason> {
        let id = self.by_call.get(&call)?;
        match self.open.get(id)?.phase {
            AttemptPhase::Running { deadline_ms, .. } if deadline_ms <= now_ms => {
                Some(StopReason::TimedOut)
            }
            AttemptPhase::Running { .. } => Some(StopReason::Interrupted),
            AttemptPhase::Ended(_) => None,
        }
    }

    /// Records that an attempt is given up. Returns false if it was given up before.
    pub fn stop(&mut self, id: AttemptId, reason: StopReason) -> bool {
        match self.open.get_mut(&id).map(|open| &mut open.phase) {
            Some(AttemptPhase::Running { stop, .. }) if stop.is_none() => {
                *stop = Some(reason);
                true
            }
            _ => false,
        }
    }

    /// Removes the call of an attempt whose code has ended. Call `keep` afterwards.
    pub fn end(&mut self, call: CallKey) -> Option<EndedAttempt> {
        let id = self.by_call.remove(&call)?;
        match self.open.get(&id)?.phase {
            AttemptPhase::Running { method, stop, .. } => Some(EndedAttempt { id, method, stop }),
            AttemptPhase::Ended(_) => None,
        }
    }

    /// Keeps the report of an attempt. Returns the link over which it must be sent; `None` if there is none now.
    pub fn keep(&mut self, report: AttemptReport<'static>) -> Option<usize> {
        let open = self.open.get_mut(&report.id)?;
        open.phase = AttemptPhase::Ended(report);
        open.link
    }

    /// Returns a kept report.
    pub fn report(&self, id: AttemptId) -> Option<&AttemptReport<'static>> {
        match &self.open.get(&id)?.phase {
            AttemptPhase::Ended(report) => Some(report),
            AttemptPhase::Running { .. } => None,
        }
    }

    /// Removes an attempt whose end the jobs process has stored. If it still runs, the jobs process has made a mistake,
    /// and the attempt stays.
    pub fn stored(&mut self, id: AttemptId) {
        if self.report(id).is_some() {
            self.open.remove(&id);
        }
    }

    /// Adds a link to a jobs process. Attempts without a link use it from now on. Returns all attempts, and the reports
    /// that must be sent over it.
    pub fn linked(&mut self, link: usize) -> (Vec<AttemptId>, Vec<AttemptReport<'static>>) {
        let mut reports = Vec::new();
        for open in self.open.values_mut() {
            let is_ours = *open.link.get_or_insert(link) == link;
            if let AttemptPhase::Ended(report) = &open.phase
                && is_ours
            {
                reports.push(report.clone());
            }
        }
        (self.open.keys().copied().collect(), reports)
    }

    /// Removes a link that has ended. If there is another link to a jobs process, call `linked` with it.
    pub fn link_ended(&mut self, link: usize) {
        for open in self.open.values_mut() {
            open.link = open.link.filter(|it| *it != link);
        }
    }

    /// Lets a process that drains from `now_ms` to `until_ms` wait for the answers to its reports.
    pub fn begin_drain(&mut self, (now_ms, until_ms): (u64, u64)) {
        // The attempt of a method with a longer time may end after those of the others.
        let end_ms = now_ms.saturating_add(self.longest_ms()).min(until_ms);
        self.reports_until_ms = end_ms.max(1);
    }

    /// Returns when the attempt of this call and method must be interrupted by a process that drains from `now_ms` to
    /// `until_ms`, and makes the process wait for it. The process does not wait for one that was given up.
    pub fn drain_end(
        &mut self,
        call: CallKey,
        method: &str,
        (now_ms, until_ms): (u64, u64),
    ) -> u64 {
        let own = self.drain_timeouts_ms.get(method).copied();
        let timeout_ms = own.unwrap_or(self.drain_timeout_ms);
        // Earlier than the master's limit, so that the end of the attempt can be stored.
        let last_ms = until_ms.saturating_sub(LEAVE_MS).max(now_ms);
        let mut end_ms = now_ms.saturating_add(timeout_ms).min(last_ms);
        let open = self.by_call.get(&call).and_then(|id| self.open.get_mut(id));
        if let Some(AttemptPhase::Running {
            stop,
            held_until_ms,
            ..
        }) = open.map(|open| &mut open.phase)
        {
            if stop.is_some() {
                end_ms = now_ms;
            }
            *held_until_ms = end_ms.saturating_add(LEAVE_MS);
        }
        end_ms
    }

    /// Returns how long a drain may last, of which `calls` is for calls.
    pub fn longest_drain(&self, calls: Duration) -> Duration {
        calls.max(Duration::from_millis(self.longest_ms()))
    }

    /// Returns the longest time of an attempt in a drain, in milliseconds.
    fn longest_ms(&self) -> u64 {
        let methods = self.drain_timeouts_ms.values().copied();
        methods.fold(self.drain_timeout_ms, u64::max)
    }

    /// Returns whether this process drains or stops.
    pub fn is_draining(&self) -> bool {
        self.reports_until_ms > 0
    }

    /// Returns until when a draining process must wait; 0 if it has no attempt that is not settled.
    pub fn held_until_ms(&self) -> u64 {
        let holds = self.open.values().map(|open| match open.phase {
            AttemptPhase::Running { held_until_ms, .. } => held_until_ms,
            AttemptPhase::Ended(_) => self.reports_until_ms,
        });
        holds.max().unwrap_or(0)
    }

    /// Returns the calls of all attempts that run.
    pub fn calls(&self) -> Vec<CallKey> {
        self.by_call.keys().copied().collect()
    }

    /// Returns the running attempts whose processes the jobs process does not know.
    pub fn unnoted(&self) -> Vec<(AttemptId, CallKey)> {
        let attempts = self.open.iter();
        let unnoted = attempts.filter_map(|(id, open)| match open.phase {
            AttemptPhase::Running {
                call,
                is_noted: false,
                ..
            } => Some((*id, call)),
            _ => None,
        });
        unnoted.collect()
    }

    /// Records that the jobs process gets to know the process of an attempt. Returns the link for the report.
    pub fn note(&mut self, id: AttemptId) -> Option<usize> {
        let open = self.open.get_mut(&id)?;
        if let AttemptPhase::Running { is_noted, .. } = &mut open.phase {
            *is_noted = true;
        }
        open.link
    }

    /// Returns an attempt that still runs 10 s after its timeout.
    pub fn ignores_timeout(&self, now_ms: u64) -> Option<CallKey> {
        self.open.values().find_map(|open| match open.phase {
            AttemptPhase::Running {
                call, deadline_ms, ..
            } if deadline_ms.saturating_add(OVERTIME_MS) <= now_ms => Some(call),
            _ => None,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::link::attempt_frame::AttemptEndKind;

    const NOW: u64 = 1_000;

    fn id(token: u64) -> AttemptId {
        AttemptId {
            job: [7; 16],
            token,
        }
    }

    fn call(serial: u64) -> CallKey {
        CallKey { index: 0, serial }
    }

    fn table() -> AttemptTable {
        AttemptTable::new(None, Duration::from_secs(30))
    }

    fn ended(token: u64, stop: Option<StopReason>) -> EndedAttempt {
        EndedAttempt {
            id: id(token),
            method: 3,
            stop,
        }
    }

    fn report(token: u64) -> AttemptReport<'static> {
        AttemptReport {
            kind: AttemptEndKind::Result,
            json: Some("1".into()),
            ..AttemptReport::never_begun(id(token))
        }
    }

    #[test]
    fn a_report_is_kept_until_it_is_stored_and_sent_again_over_a_new_link() {
        let mut table = table();
        table.begin((id(1), 3), 4, call(1), NOW);
        table.begin((id(2), 3), 4, call(2), NOW);
        assert!(table.runs(call(1)) && !table.runs(call(3)));
        table.stored(id(1));
        assert!(table.has(id(1)), "a running attempt is not forgotten");
        assert_eq!(table.end(call(1)), Some(ended(1, None)));
        assert_eq!(table.keep(report(1)), Some(4));
        assert!(!table.runs(call(1)) && table.has(id(1)));
        // Over the link of another jobs process, only the attempts are named.
        let both = vec![id(1), id(2)];
        assert_eq!(table.linked(5), (both.clone(), Vec::new()));
        table.link_ended(4);
        assert_eq!(table.linked(5), (both, vec![report(1)]));
        table.stored(id(1));
        assert_eq!(table.linked(6), (vec![id(2)], Vec::new()));
        assert_eq!(table.end(call(2)), Some(ended(2, None)));
        assert_eq!(table.keep(report(2)), Some(5));
        table.stored(id(2));
        assert_eq!(table.count(), 0);
    }

    #[test]
    fn the_first_reason_to_give_up_an_attempt_counts() {
        let mut table = table();
        table.begin((id(1), 3), 0, call(1), NOW);
        let timer_reason = |table: &AttemptTable, now_ms| table.timer_reason(call(1), now_ms);
        assert_eq!(timer_reason(&table, NOW - 1), Some(StopReason::Interrupted));
        assert_eq!(timer_reason(&table, NOW), Some(StopReason::TimedOut));
        assert!(table.stop(id(1), StopReason::Cancelled));
        assert!(!table.stop(id(1), StopReason::TimedOut));
        assert_eq!(table.ignores_timeout(NOW + OVERTIME_MS - 1), None);
        assert_eq!(table.ignores_timeout(NOW + OVERTIME_MS), Some(call(1)));
        let cancelled = ended(1, Some(StopReason::Cancelled));
        assert_eq!(table.end(call(1)), Some(cancelled));
        assert_eq!(table.end(call(1)), None);
    }

    #[test]
    fn a_draining_process_waits_for_the_longest_attempt_but_not_over_its_limit() {
        let mut table = table();
        table.drain_timeouts_ms.insert("long".into(), 60_000);
        assert_eq!(table.held_until_ms(), 0);
        table.begin((id(1), 3), 0, call(1), u64::MAX);
        let limits = (NOW, NOW + 50_000);
        table.begin_drain(limits);
        let last = NOW + 50_000 - LEAVE_MS;
        assert_eq!(table.drain_end(call(1), "long", limits), last);
        assert_eq!(table.held_until_ms(), NOW + 50_000);
        assert_eq!(table.drain_end(call(1), "short", limits), NOW + 30_000);
        assert_eq!(table.drain_end(call(1), "short", (NOW, NOW)), NOW);
        table.stop(id(1), StopReason::TimedOut);
        assert_eq!(table.drain_end(call(1), "long", limits), NOW);
        assert_eq!(table.held_until_ms(), NOW + LEAVE_MS);
        table.end(call(1));
        table.keep(report(1));
        assert_eq!(table.held_until_ms(), NOW + 50_000);
        table.stored(id(1));
        assert_eq!(table.held_until_ms(), 0);
    }

    #[test]
    fn as_many_attempts_as_configured_may_be_open() {
        let mut table = table();
        table.most = 1;
        assert!(table.has_room());
        table.begin((id(1), 3), 0, call(1), NOW);
        assert!(!table.has_room());
        table.end(call(1));
        table.keep(report(1));
        assert!(!table.has_room(), "its report occupies the place");
        table.stored(id(1));
        assert!(table.has_room());
    }
}
