//! What a worker notices of its own wear, and tells the master: that it has had calls enough, or
//! that none of its handler threads comes back.
//!
//! It goes on as before. The master starts a successor, and orders the drain when that is ready.

use super::call_table::ScheduledCall;
use super::event_loop::{EventLoop, WarningKind};
use crate::link::message::Report;
use crate::link::stuck_calls::StuckCall;

/// So long a handler may take to notice that its time is over; a command must be killed by then.
const GRACE_MS: u64 = 1000;

/// So many calls later the master is told once more, when it could not be.
const TELL_AGAIN: u64 = 100;

impl EventLoop {
    /// To be asked after every turn: one comparison, when there is nothing to tell.
    pub(super) fn check_recycle_limits(&mut self) {
        if self.service.read >= self.recycle_at {
            self.recycle_at = match self.report(Report::MaxCallsReached(self.service.read)) {
                Ok(()) => u64::MAX,
                Err(_) => self.service.read + TELL_AGAIN,
            };
        }
    }

    /// To be asked at every tick: threads whose handlers heed no deadline.
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
                "{lost} of {threads} handler threads are lost until their handlers come back, which heed \
                 no deadline: {method}{id} has run for {age} s"
            );
            return self.warn_limited(WarningKind::Lost, &text);
        }
        if self.stuck_reported {
            return;
        }
        let none = match threads {
            1 => "the only handler thread does not come".to_owned(),
            _ => format!("none of {threads} handler threads comes"),
        };
        log::warn!("{none} back from its call: the master is asked for a successor");
        self.stuck.write(&calls);
        // If it could not be told, at the next tick.
        let told = self.report(Report::AllThreadsStuck(threads as u64));
        self.stuck_reported = told.is_ok();
    }
}
