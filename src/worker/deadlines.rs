//! Handles deadlines that have passed: of a frame, a slow reader, an idle peer, a call.

use super::accepting::idle_ms;
use super::access_log::turn;
use super::attempts::running as attempts;
use super::call_errors::too_late;
use super::call_scheduler::FinishedCall;
use super::connection::Connection;
use super::event_loop::{EventLoop, WarningKind, find};
use super::job_calls;
use super::peer_calls;
use super::timers::{CallKey, TimerTarget};
use crate::link::message::Report;
use crate::link::metrics_board::layout::CloseReason;
use crate::link::source_table::peer_name;
use crate::protocol::code::Code;
use crate::protocol::detect::{self, Dialect};
use crate::protocol::rpc_error::RpcError;
use crate::sys::event::{Reactor, Token};
use crate::sys::socket;

impl EventLoop {
    pub(super) fn expire(&mut self, reactor: &mut Reactor) {
        while let Some(target) = self.service.timers.expired(self.service.now_ms) {
            match target {
                TimerTarget::Read(token) => {
                    self.with_connection(token, |connection| connection.read_deadline = 0);
                    if !self.answer_short_line(reactor, token) {
                        self.warn_of_client(
                            WarningKind::Reading,
                            token,
                            "a client did not finish its frame, line or request within \
                             limits.read-timeout",
                        );
                        self.close_for(reactor, token, CloseReason::ReadTimeout);
                    }
                }
                TimerTarget::Write(token) => {
                    self.warn_of_client(
                        WarningKind::Writing,
                        token,
                        "a client took none of its answers within limits.write-timeout",
                    );
                    self.with_connection(token, |connection| connection.write_deadline = 0);
                    self.close_for(reactor, token, CloseReason::WriteTimeout);
                }
                TimerTarget::Idle(token) => self.idle(reactor, token),
                TimerTarget::Linger(token) => {
                    self.with_connection(token, |connection| connection.quiet_deadline = 0);
                    self.close(reactor, token);
                }
                TimerTarget::Call(key) => self.on_call_timeout(reactor, key),
                TimerTarget::Give => {
                    self.give_deadline = 0;
                    self.retry_handoffs(reactor);
                }
                TimerTarget::Rebalance => self.end_rebalance(reactor),
                TimerTarget::Unused => {
                    self.service.unused.deadline = 0;
                    self.make_room(reactor);
                }
                TimerTarget::Refused => self.serve_refused(),
                TimerTarget::Slow => self.service.slow.expire(),
                TimerTarget::Listen => {
                    self.end_yield();
                    self.resume_listening(reactor);
                    // Accept once before this worker may yield again, because the other workers may be stopped.
                    reactor.try_accept(self);
                }
            }
        }
    }

    /// Logs a warning about a client, with its address.
    fn warn_of_client(&mut self, kind: WarningKind, token: Token, text: &str) {
        if let Some(connection) = find(&mut self.connections, token) {
            let peer = peer_name(connection.peer);
            self.warn_limited(kind, &format!("{text} peer={peer}"));
        }
    }

    /// Looks for calls that have become slow, if that is due.
    pub(super) fn watch_slow_calls(&mut self) {
        let it = &mut self.service;
        let around = (&it.calls, &*it.registry, &it.counts, it.now_ms);
        if it.slow.watch(around, (&mut it.threads, &mut it.timers)) {
            self.request(Report::SlowCalls);
        }
    }

    /// Answers a line of fewer than four bytes, for which the dialect was not detected yet. Returns whether it answered
    /// one.
    fn answer_short_line(&mut self, reactor: &mut Reactor, token: Token) -> bool {
        let Some(connection) = find(&mut self.connections, token) else {
            return true;
        };
        let first = connection.input.first().copied();
        if connection.dialect.is_some() || !first.is_some_and(detect::is_line) {
            return false;
        }
        connection.dialect = Some(Dialect::Line);
        let before = self.service.last_call;
        self.pump(reactor, token, false);
        self.service.last_call > before
    }

    /// Calls `change` with a connection, if it still exists.
    pub(super) fn with_connection(&mut self, token: Token, change: impl FnOnce(&mut Connection)) {
        if let Some(connection) = find(&mut self.connections, token) {
            change(connection);
        }
    }

    pub(super) fn idle(&mut self, reactor: &mut Reactor, token: Token) {
        let Some(connection) = find(&mut self.connections, token) else {
            return;
        };
        connection.quiet_deadline = 0;
        // A call may have arrived that is not read yet, in a drain or after a very long turn.
        let socket = reactor.descriptor(token);
        let is_at_rest = connection.is_quiescent()
            && reactor.unsent(token) == 0
            && socket.is_none_or(|socket| socket::is_silent(&socket));
        let since = match is_at_rest {
            true => connection.active_ms,
            false => self.service.now_ms,
        };
        let Some(idle_ms) = idle_ms(&self.service, connection) else {
            return;
        };
        let at = since + idle_ms;
        if at > self.service.now_ms {
            // The timer is armed once and the idle time is checked when it expires. So a busy connection does not set
            // a timer for each call.
            let armed = &mut connection.quiet_deadline;
            return self.service.timers.arm(armed, at, TimerTarget::Idle(token));
        }
        self.close_quiescent(reactor, token, CloseReason::Idle);
    }

    pub(super) fn on_call_timeout(&mut self, reactor: &mut Reactor, key: CallKey) {
        if let Some(call) = self.service.calls.get_mut(key) {
            call.timer = 0;
        }
        if attempts::on_timer(&mut self.service, key) {
            return;
        }
        self.service.calls.record_timeout(key, self.service.now_ms);
        let text = "its deadline passed before it was done";
        self.abort_call(reactor, key, Code::Timeout, text);
    }

    /// Answers a waiting call that cannot meet its deadline any more.
    pub(super) fn reject_late_call(&mut self, reactor: &mut Reactor, key: CallKey) {
        self.abort_call(reactor, key, Code::Timeout, &too_late().message);
    }

    /// Answers the calls that no jobs process has taken in time.
    pub(super) fn abort_unavailable(&mut self, reactor: &mut Reactor) {
        for key in job_calls::overdue(&mut self.service) {
            let (code, text) = job_calls::UNAVAILABLE;
            self.abort_call(reactor, key, code, text);
        }
    }

    /// Ends a call whose connection is gone, so that it gets no answer.
    pub(super) fn end_unanswered(&mut self, ended: &FinishedCall) {
        self.service.journal.forget(ended.reply.mark);
        turn::count_unanswered(&mut self.service, ended);
    }

    /// Answers a waiting or running call with an error.
    pub(super) fn abort_call(
        &mut self,
        reactor: &mut Reactor,
        key: CallKey,
        code: Code,
        text: &str,
    ) {
        let doubtful = job_calls::doubtful(&self.service, key);
        let Some(ended) = self.service.give_up(key) else {
            return;
        };
        let error = job_calls::with_doubt(RpcError::of(code, text, ended.begun), doubtful);
        if ended.token.process().is_some() {
            let error = Err(error);
            return peer_calls::answer(&mut self.service, &ended, error, Default::default());
        }
        if let Some(connection) = find(&mut self.connections, ended.token) {
            let outcome = (Err(error), None);
            self.service.answer(connection, &ended, outcome, None);
            self.pump(reactor, ended.token, false);
        } else {
            self.end_unanswered(&ended);
        }
    }
}
