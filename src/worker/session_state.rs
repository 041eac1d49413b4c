//! Holds the state that a session has in addition to that of a worker: its deadlines, the master's orders, and the
//! programs that belong to its connection.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::call_dispatcher::CallDispatcher;
use super::remote_calls;
use super::timers::CallKey;
use crate::link::session_table::{DirectOrder, SessionRecord};

/// If a session stays until the end of a drain, this is the time for its last answers and for the exit of its
/// programs, in milliseconds.
const STOP_MS: u64 = 1000;

/// The part of that time that is kept for the exit of the session, in milliseconds. Its acceptor waits for the exit,
/// and must exit in time itself.
const EXIT_MS: u64 = 300;

/// The first and the longest delay, in milliseconds, from the end of a session's link until it sends a new one to the
/// next acceptor.
const REJOIN_MS: u64 = 200;
const LONGEST_REJOIN_MS: u64 = 10_000;

/// The state of a session, except its connection.
pub struct SessionState {
    /// The session's record. It has the master's orders if the acceptor is gone.
    pub record: &'static SessionRecord,
    /// Whether the acceptor is gone. Until then no order in the record counts, because another session could
    /// have written it.
    pub is_orphan: bool,
    /// Where it records for its acceptor that the event loop runs.
    pub heartbeat_ms: Option<&'static AtomicU64>,
    /// When its time is over (`max-lifetime`); `u64::MAX`: never.
    pub ends_at_ms: u64,
    /// The deadline of a drain for a session with a program of its own, which cannot hand over its connection;
    /// `u64::MAX` if no drain was ordered.
    pub drains_until_ms: u64,
    /// When to send a link to the next acceptor, because the session's acceptor is gone; `u64::MAX` if it has an
    /// acceptor.
    pub rejoins_at_ms: u64,
    /// The delay before that, in milliseconds. It doubles with each attempt, because an acceptor of another
    /// generation refuses the link.
    rejoin_delay_ms: u64,
}

/// A step that is due in a session.
pub enum SessionStep {
    /// Carry out an order of the master, until this time.
    Obey(DirectOrder, u64),
    /// End, because `max-lifetime` is over.
    End,
    /// End the connection until this time, because the drain is nearly over and the connection cannot be handed over.
    EndDrain(u64),
}

impl SessionState {
    /// Creates the state of a session. `ends_at_ms` is when its `max-lifetime` is over.
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

    /// Schedules the next attempt to link with an acceptor, because the link has ended or could not be made.
    pub fn rejoin_later(&mut self, now_ms: u64) {
        self.rejoins_at_ms = now_ms + self.rejoin_delay_ms;
        self.rejoin_delay_ms = (2 * self.rejoin_delay_ms).min(LONGEST_REJOIN_MS);
    }

    /// Records that an acceptor uses the link: the next attempt does not wait long.
    pub fn rejoined(&mut self) {
        self.rejoin_delay_ms = REJOIN_MS;
    }

    /// Returns the step that is due now, if there is one.
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

/// Gives the programs of the connection as many calls as they may have, and starts missing ones. Returns a call that
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
                    if let Some(to_run) = remote_calls::run_own(&mut service.calls, lane, key) {
                        service.threads.pools().put_own(number, to_run);
                    }
                }
                Ok(None) => break,
                Err(late) => return Ok(Some(late)),
            }
        }
    }
    Ok(None)
}
