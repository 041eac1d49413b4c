//! Closes silent connections when a worker is full.
//!
//! A worker at `limits.connections` closes connections that never sent a byte and are older than
//! `limits.read-timeout`, oldest first, one for each that is to be accepted. A connection that had a
//! call is never closed for this. Connections are searched only while the worker is full, and only when
//! the last search is used up, so an accept does not cost a search.

use super::call_dispatcher::millis;
use super::connection::{Connection, ConnectionPhase};
use super::event_loop::{EventLoop, WarningKind, find};
use super::timers::TimerTarget;
use crate::sys::event::{Reactor, Token};
use crate::sys::socket;

/// Between two searches, in milliseconds. One of 16,384 connections takes about 0.1 ms.
const SEARCH_MS: u64 = 100;

impl EventLoop {
    /// Closes silent connections until there is room for one more. Returns whether there is room. If not,
    /// a timer tries again when the oldest silent connection is old enough.
    pub(super) fn make_room(&mut self, reactor: &mut Reactor) -> bool {
        let limit = self.service.limits.connections;
        while reactor.connections() >= limit {
            let Some(token) = self.silent.found.pop_front() else {
                if self.find_silent() {
                    continue;
                }
                return false;
            };
            // A call may have come that was not read yet.
            let socket = reactor.descriptor(token);
            if find(&mut self.connections, token).is_some_and(|it| is_silent(it))
                && socket.is_some_and(socket::is_silent)
            {
                let text = format!(
                    "limits.connections is reached ({limit}): the oldest connection that sent nothing \
                     within limits.read-timeout is closed to accept another one"
                );
                self.warn_limited(WarningKind::Silent, &text);
                self.close(reactor, token);
            }
        }
        true
    }

    /// Searches all connections for those that may be closed. Returns whether there are any; if not,
    /// arms the timer for the next search.
    fn find_silent(&mut self) -> bool {
        let now_ms = self.service.now_ms;
        let mut at = self.silent.next_search_ms;
        if at <= now_ms {
            self.silent.next_search_ms = now_ms + SEARCH_MS;
            let mut silent: Vec<(u64, Token)> = (self.connections.iter().flatten())
                .filter(|connection| is_silent(connection))
                .map(|connection| (connection.active_ms, connection.token))
                .collect();
            silent.sort_unstable();
            // The worker's clock has whole milliseconds: one more, so that none is closed too early.
            let read_timeout_ms = millis(self.service.limits.read_timeout) + 1;
            let is_old = |&(since_ms, _): &(u64, Token)| since_ms + read_timeout_ms <= now_ms;
            let old = silent.partition_point(is_old);
            self.silent.found = silent[..old].iter().map(|&(_, token)| token).collect();
            if old > 0 {
                return true;
            }
            let Some((since_ms, _)) = silent.first() else {
                return false;
            };
            at = (since_ms + read_timeout_ms).max(self.silent.next_search_ms);
        }
        let armed = &mut self.silent.deadline;
        self.service.timers.arm(armed, at, TimerTarget::Silent);
        false
    }
}

/// Returns whether the connection never received a byte. If a sibling has handed it over, `is_first_read` is true
/// again, and only the dialect tells that it had calls.
fn is_silent(connection: &Connection) -> bool {
    connection.is_first_read
        && connection.dialect.is_none()
        && connection.phase == ConnectionPhase::Open
}
