//! Reports to the master that a worker has read enough calls, or that all its handler threads are stuck.
//!
//! The worker continues to serve. The master starts a successor, and orders the drain when that is ready.

use super::call_table::ScheduledCall;
use super::event_loop::{EventLoop, WarningKind};
use crate::link::ids::Pid;
use crate::link::message::Report;
use crate::link::stuck_calls::StuckCall;
use crate::throttle::jitter;

/// How long a handler may take to react to its deadline, in milliseconds. A command must be killed by
/// then.
const GRACE_MS: u64 = 1000;

/// The number of calls after which a failed report is repeated.
const TELL_AGAIN: u64 = 100;

/// Returns after how many calls this worker asks for a successor; 0 means never.
pub(super) fn recycle_threshold(max_calls: u64) -> u64 {
    match max_calls {
        0 => u64::MAX,
        most => jitter::with_jitter(most, u64::from(Pid::current().0.unsigned_abs())),
    }
}

impl EventLoop {
    /// Call it after every turn. If there is nothing to report, it is one comparison.
    pub(super) fn check_recycle_limits(&mut self) {
        if self.service.read() >= self.recycle_at {
            self.recycle_at = match self.report(Report::MaxCallsReached(self.service.read())) {
                Ok(()) => u64::MAX,
                Err(_) => self.service.read() + TELL_AGAIN,
            };
        }
    }

    /// Checks at every tick for threads whose handlers ignore their deadline.
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
        let mut calls: Vec<StuckCall> = (service.calls.stuck(service.now_ms, GRACE_MS))
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
            return self.warn_limited(WarningKind::Lost, &text);
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
}
