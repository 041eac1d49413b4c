//! Reports to the master that a worker has read enough calls, or that all its handler threads are stuck.
//!
//! The worker continues to serve. The master starts a successor, and orders the drain when that is ready. A drain may
//! last longer for attempts of jobs than for calls. So connections are closed when the time of the calls is over, and
//! the process waits for its attempts without them.

use std::time::Duration;

use super::attempts::running as attempts;
use super::call_table::ScheduledCall;
use super::event_loop::{EventLoop, WarningKind};
use super::timers::millis;
use crate::link::ids::Pid;
use crate::link::message::Report;
use crate::link::metrics_board::layout::CloseReason;
use crate::link::stuck_calls::StuckCall;
use crate::sys::event::{Reactor, Token};
use crate::sys::signal;
use crate::throttle::jitter;

/// A tick may come this late, and the ends of attempts must be stored before the alarm. In milliseconds.
const BEFORE_ALARM_MS: u64 = 1_500;
/// The number of calls after which a failed report is repeated.
const REPORT_AGAIN_CALLS: u64 = 100;

/// Returns after how many calls this worker asks for a successor; `u64::MAX` if `max_calls` is 0, which means never.
pub(super) fn recycle_threshold(max_calls: u64) -> u64 {
    match max_calls {
        0 => u64::MAX,
        most => jitter::with_jitter(most, u64::from(Pid::current().0.unsigned_abs())),
    }
}

impl EventLoop {
    /// Reports to the master that `max-calls` is reached. Call it after every turn: without a report it is one
    /// comparison.
    pub(super) fn check_recycle_limits(&mut self) {
        let calls = self.service.read() + self.service.attempts.begun();
        if calls >= self.recycle_at {
            self.recycle_at = match self.report(Report::MaxCallsReached(calls)) {
                Ok(()) => u64::MAX,
                Err(_) => calls + REPORT_AGAIN_CALLS,
            };
        }
    }

    /// Logs threads whose handlers ignore their deadline. If all threads are stuck, reports that to the master. Call it
    /// at every tick.
    pub(super) fn check_stuck_threads(&mut self) {
        let service = &self.service;
        let threads = service.threads.count(0);
        if service.calls.counts(&service.threads).2 == 0 || !self.drain.is_serving() {
            return;
        }
        let call = |(serial, call): (u64, &ScheduledCall)| StuckCall {
            thread: service.threads.calls.thread_of(serial),
            method: call.method,
            id: call.id.as_deref().map(str::to_owned),
            age_ms: service.now_ms.saturating_sub(call.read_ms),
        };
        let mut calls: Vec<StuckCall> = (service
            .calls
            .table
            .stuck(service.threads.calls.keys(), service.now_ms))
        .map(call)
        .collect();
        calls.sort_by_key(|call| std::cmp::Reverse(call.age_ms));
        let Some(oldest) = calls.first() else {
            return;
        };
        if calls.len() < threads {
            let id = oldest.id.as_ref();
            let id = id.map_or(String::new(), |id| format!(" (id {id})"));
            let (lost, age) = (calls.len(), oldest.age_ms / 1000);
            let method = service.registry.name(oldest.method);
            let text = format!(
                "{lost} of {threads} handler threads are stuck past their deadline until their handlers \
                 return: {method}{id} has run for {age} s"
            );
            return self.warn_limited(WarningKind::StuckThread, &text);
        }
        if self.stuck_reported {
            return;
        }
        let none = match threads {
            1 => "the only handler thread is stuck past its deadline".to_owned(),
            _ => format!("all {threads} handler threads are stuck past their deadlines"),
        };
        log::warn!("{none}: the master is asked for a successor");
        self.stuck.write(&calls);
        // If it could not be sent, the next tick tries again.
        let reported = self.report(Report::AllThreadsStuck(threads as u64));
        self.stuck_reported = reported.is_ok();
    }

    /// Returns the part of a drain in which calls may run. The rest is for attempts of jobs.
    pub(super) fn limit_of_calls(&self, limit: Duration) -> Duration {
        match self.longest_drain() > self.drain_timeout {
            true => limit.min(self.drain_timeout),
            false => limit,
        }
    }

    /// Returns how long a drain of this process may last.
    pub(super) fn longest_drain(&self) -> Duration {
        self.service.attempts.longest_drain(self.drain_timeout)
    }

    /// Ends a pool process whose master is gone: when no process uses it any more, or when the longest drain has
    /// passed. If the master has died, that is somewhat earlier, so that the process exits before the alarm of
    /// `signal::on_parent_death`.
    pub(super) fn leave_without_master(&mut self, reactor: &mut Reactor) {
        if let Some(since) = self.master_gone
            && self.is_pool()
            && self.drain.is_serving()
        {
            let longest = self.longest_drain();
            let longest_ms = millis(longest);
            // The link ends at an upgrade too, perhaps long before the death of the master.
            let died = signal::parent_died_ms();
            let end = died.unwrap_or(since).saturating_add(longest_ms);
            let left_ms = end.saturating_sub(self.service.now_ms);
            let (early_ms, limit) = match died {
                Some(_) => (
                    BEFORE_ALARM_MS.min(longest_ms / 2),
                    Duration::from_millis(left_ms),
                ),
                // The master lives: no alarm comes, and running calls have the whole time of a drain.
                None => (0, longest),
            };
            if !self.service.forwarding.has_users() || left_ms <= early_ms {
                self.start_drain(reactor, limit);
            }
        }
    }

    /// Lets a draining process wait for its attempts of jobs. Call it before each step of a drain.
    pub(super) fn hold_for_attempts(&mut self) {
        if !self.drain.is_serving() {
            let held_until_ms = self.service.attempts.held_until_ms();
            self.drain.hold_until(held_until_ms);
        }
    }

    /// Checks for handlers that ignore the end of their time. If an attempt of a job does, this worker retires. Call it
    /// at every tick.
    pub(super) fn check_threads(&mut self, reactor: &mut Reactor) {
        self.check_stuck_threads();
        attempts::note_processes(&mut self.service);
        if self.is_pool() || !self.drain.is_serving() {
            return;
        }
        let overdue = self.service.attempts.ignores_timeout(self.service.now_ms);
        let Some(call) = overdue.and_then(|key| self.service.calls.get(key)) else {
            return;
        };
        // Another attempt of the job may begin only when this one has ended.
        log::warn!(
            "retires: an attempt of a job still runs 10 s after its timeout; it ends with this worker \
             method={}",
            self.service.registry.name(call.method)
        );
        // If the report fails, the master notices when this worker has exited.
        let _ = self.report(Report::Retiring);
        self.start_drain(reactor, self.longest_drain());
    }

    /// Closes all connections, because the time for the last answers is over. Attempts of jobs still run.
    pub(super) fn close_all(&mut self, reactor: &mut Reactor) {
        let left = self.connections.iter().flatten();
        let left: Vec<Token> = left.map(|connection| connection.token).collect();
        for token in left {
            self.before_closing(reactor, token);
            self.close_for(reactor, token, CloseReason::Stop);
        }
    }
}
