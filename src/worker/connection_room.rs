//! Closes connections when a worker is full: those that never had a call, and those with the most untaken
//! answers.
//!
//! A worker at `limits.connections` makes room for one more connection in advance. So it can accept the next one and
//! knows its source. `unused_connections` says which one is closed. A connection that had a call is never closed for
//! this: if there is no other, the worker accepts nothing until one ends.

use super::event_loop::{EventLoop, WarningKind, find};
use super::timers::TimerTarget;
use super::timers::millis;
use crate::link::metrics_board::layout::CloseReason;
use crate::link::source_table::peer_name;
use crate::sys::event::{Reactor, Token};
use crate::sys::socket;

/// The time between two checks whether a connection may be closed, in milliseconds.
const RETRY_MS: u64 = 2;
/// The largest number of connections that are checked before one is accepted. A connection that has sent something is
/// read instead of closed.
const MOST_LOOKS: usize = 64;

impl EventLoop {
    /// Closes connections that never had a call, until there is room for one more. Returns whether there is room. If
    /// not, a timer tries again when a connection is old enough to be closed.
    pub(super) fn make_room(&mut self, reactor: &mut Reactor) -> bool {
        let limit = self.service.limits.connections;
        let read_timeout_ms = millis(self.service.limits.read_timeout);
        let now_ms = self.service.now_ms;
        while reactor.connections() >= limit {
            let unused = &self.service.unused;
            // The first call of the connection may have arrived and not be read yet.
            let is_silent =
                |token: &Token| reactor.descriptor(*token).is_some_and(socket::is_silent);
            let mut victims = unused.victims(now_ms, read_timeout_ms).take(MOST_LOOKS);
            let Some(token) = victims.find(is_silent) else {
                drop(victims);
                if let Some(at) = unused.next_victim_ms(read_timeout_ms) {
                    let at = at.max(now_ms + RETRY_MS);
                    let unused = &mut self.service.unused;
                    let timers = &mut self.service.timers;
                    timers.arm(&mut unused.deadline, at, TimerTarget::Unused);
                }
                return false;
            };
            drop(victims);
            let Some(connection) = find(&mut self.connections, token) else {
                return false;
            };
            self.service.unused.record_eviction(connection, now_ms);
            let peer = peer_name(connection.peer);
            let text = format!(
                "limits.connections is reached ({limit}): a connection that never had a call is closed to \
                 accept another one; its client has the most of them, or sent no call within \
                 limits.read-timeout peer={peer}"
            );
            self.warn_limited(WarningKind::Silent, &text);
            self.close_for(reactor, token, CloseReason::Limit);
        }
        true
    }

    /// Closes the connections with the most untaken answers, from the source with the most, until the
    /// worker is below twice its limit. Each search over all connections closes one, so calls do not pay
    /// for it.
    #[cold]
    pub(super) fn close_most_unsent(&mut self, reactor: &mut Reactor) {
        while self.service.unsent.is_exceeded() {
            let Some(token) = self.service.unsent.shares.heaviest() else {
                return;
            };
            let Some(most) = find(&mut self.connections, token) else {
                return;
            };
            let (token, bytes) = (most.token, most.counted_unsent);
            let peer = peer_name(most.peer);
            let text = format!(
                "answers that clients have not taken reach twice limits.unfinished: the connection with \
                 the most is closed; its client must read sooner, or raise limits.unfinished peer={peer} \
                 bytes={bytes}"
            );
            self.warn_limited(WarningKind::Unsent, &text);
            self.close_for(reactor, token, CloseReason::Limit);
        }
    }
}
