//! What a session has beside a worker's parts: its time, the master's orders, and the programs that belong to its
//! connection.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::call_dispatcher::CallDispatcher;
use super::remote_calls;
use super::timers::CallKey;
use crate::link::session_table::{DirectOrder, SessionRecord};

/// A session that stays until the end of a drain has this time for its last answers, and its programs for
/// their end.
const STOP_MS: u64 = 1000;

/// Of this time, what remains for its exit: its acceptor, which waits for it, must have left in time.
const EXIT_MS: u64 = 300;

/// The first and the longest time from the end of a session's link to the time when it sends another one to the next
/// acceptor.
const REJOIN_MS: u64 = 200;
const LONGEST_REJOIN_MS: u64 = 10_000;

/// What a session watches besides its connection.
pub struct SessionState {
    /// Where the master's orders come if the acceptor is gone.
    pub record: &'static SessionRecord,
    /// Whether the acceptor is gone. Until then no order in the record counts, because another session could
    /// have written it.
    pub is_orphan: bool,
    /// Where it records for its acceptor that the event loop runs.
    pub heartbeat_ms: Option<&'static AtomicU64>,
    /// When its time is over (`max-lifetime`); `u64::MAX`: never.
    pub ends_at_ms: u64,
    /// When it is to have left, if it has a program of its own and so hands its connection to no other process;
    /// `u64::MAX`: it was not ordered to.
    pub drains_until_ms: u64,
    /// When to send a link to the next acceptor, because its own one is gone; `u64::MAX`: it has one.
    pub rejoins_at_ms: u64,
    /// From the end of its link to that time. It doubles, because an acceptor of another generation refuses it.
    rejoin_delay_ms: u64,
}

/// What a session is to do by itself.
pub enum SessionStep {
    /// As the master has ordered, until then.
    Obey(DirectOrder, u64),
    /// Its time is over.
    End,
    /// The time of a drain is nearly over, and its connection stays here: end it until then.
    EndDrain(u64),
}

impl SessionState {
    /// A session with this record and this memory for its heartbeat, whose time is over then.
    pub fn new(
        record: &'static SessionRecord,
        heartbeat_ms: Option<&'static AtomicU64>,
        ends_at_ms: u64,
    ) -> Self {
        SessionState {
            record,
            is_orphan: false,
            heartbeat_ms,
            ends_at_ms,
            drains_until_ms: u64::MAX,
            rejoins_at_ms: u64::MAX,
            rejoin_delay_ms: REJOIN_MS,
        }
    }

    /// Records that the event loop runs.
    pub fn beat(&self, now_ms: u64) {
        if let Some(heartbeat) = self.heartbeat_ms {
            heartbeat.store(now_ms, Relaxed);
        }
    }

    /// Its link to an acceptor has ended, or could not be made.
    pub fn rejoin_later(&mut self, now_ms: u64) {
        self.rejoins_at_ms = now_ms + self.rejoin_delay_ms;
        self.rejoin_delay_ms = (2 * self.rejoin_delay_ms).min(LONGEST_REJOIN_MS);
    }

    /// What is to be done now, if anything.
    pub fn step(&self, now_ms: u64) -> Option<SessionStep> {
        let order = self.is_orphan.then(|| self.record.take_order()).flatten();
        let order = order.map(|(order, until_ms)| SessionStep::Obey(order, until_ms));
        let until_ms = self.drains_until_ms;
        let is_drained = now_ms.saturating_add(STOP_MS) >= until_ms;
        let end = SessionStep::EndDrain(until_ms.saturating_sub(EXIT_MS));
        order
            .or_else(|| is_drained.then_some(end))
            .or_else(|| (now_ms >= self.ends_at_ms).then_some(SessionStep::End))
    }
}

/// Gives the programs as many calls as they may have, and starts those that are missing. Returns a call that
/// would miss its deadline: give it up and call this again.
///
/// # Errors
/// The number of a pool whose program cannot be started, and why.
pub fn give_out(service: &mut CallDispatcher) -> Result<Option<CallKey>, (usize, String)> {
    for number in service.threads.pools().numbers() {
        let lane = number + 1;
        if lane >= service.calls.lanes() || service.calls.lanes[lane].local == 0 {
            continue;
        }
        let started = service.threads.pools().start_own(number);
        started.map_err(|error| (number, format!("could not be started: {error}")))?;
        let available = service.threads.pools().available_own(number);
        while remote_calls::with_executor(&service.calls, lane) < available {
            let now_ms = service.now_ms;
            match remote_calls::next_to_send(&mut service.calls, lane, false, now_ms) {
                Ok(Some(key)) => {
                    if let Some(job) = remote_calls::run_own(&mut service.calls, lane, key) {
                        service.threads.pools().put_own(number, job);
                    }
                }
                Ok(None) => break,
                Err(late) => return Ok(Some(late)),
            }
        }
    }
    Ok(None)
}
