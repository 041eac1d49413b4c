//! What a worker does when time is over: for a frame, a reader, an idle peer, a call.

use std::time::Duration;

use super::call_dispatcher::millis;
use super::call_errors::too_late;
use super::connection::Connection;
use super::event_loop::{EventLoop, WarningKind, find};
use super::peer_calls;
use super::timers::{CallKey, TimerTarget};
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
                    self.forget(token, |connection| connection.read_deadline = 0);
                    if !self.answer_short_line(reactor, token) {
                        self.warn_limited(
                            WarningKind::Reading,
                            "a client did not finish its frame, line or request within \
                             limits.read-timeout",
                        );
                        self.close(reactor, token);
                    }
                }
                TimerTarget::Write(token) => {
                    self.warn_limited(
                        WarningKind::Writing,
                        "a client took none of its answers within limits.write-timeout",
                    );
                    self.forget(token, |connection| connection.write_deadline = 0);
                    self.close(reactor, token);
                }
                TimerTarget::Idle(token) => self.idle(reactor, token),
                TimerTarget::Linger(token) => {
                    self.forget(token, |connection| connection.quiet_deadline = 0);
                    self.close(reactor, token);
                }
                TimerTarget::Call(key) => self.on_call_timeout(reactor, key),
                TimerTarget::Give => {
                    self.give_deadline = 0;
                    self.retry_handoffs(reactor);
                }
                TimerTarget::Spread => self.end_spreading(reactor),
                TimerTarget::Silent => {
                    self.silent.deadline = 0;
                    self.make_room(reactor);
                }
                TimerTarget::Listen => {
                    self.listen_deadline = 0;
                    self.resume_listening(reactor);
                }
            }
        }
    }

    /// Fewer than four bytes have come: a line that is so short is answered now. Tells whether
    /// anything was.
    fn answer_short_line(&mut self, reactor: &mut Reactor, token: Token) -> bool {
        let Some(connection) = find(&mut self.connections, token) else {
            return true;
        };
        let first = connection.input.first().copied();
        if connection.dialect.is_some() || !first.is_some_and(detect::is_line) {
            return false;
        }
        connection.dialect = Some(Dialect::Line);
        let before = self.service.read;
        self.pump(reactor, token, false);
        self.service.read > before
    }

    /// A deadline that has passed is not armed any more.
    pub(super) fn forget(&mut self, token: Token, clear: impl FnOnce(&mut Connection)) {
        if let Some(connection) = find(&mut self.connections, token) {
            clear(connection);
        }
    }

    pub(super) fn idle(&mut self, reactor: &mut Reactor, token: Token) {
        let Some(connection) = find(&mut self.connections, token) else {
            return;
        };
        connection.quiet_deadline = 0;
        // A call may have come that was not read yet: in a drain, or where a turn had no end.
        let socket = reactor.descriptor(token);
        let is_at_rest = connection.is_quiescent()
            && reactor.unsent(token) == 0
            && socket.is_none_or(|socket| socket::is_silent(&socket));
        let since = match is_at_rest {
            true => connection.active_ms,
            false => self.service.now_ms,
        };
        let at = since + millis(self.service.limits.idle_timeout);
        if at > self.service.now_ms {
            // Armed once and looked at when it is due: a busy connection pays nothing for it.
            let armed = &mut connection.quiet_deadline;
            return self.service.timers.arm(armed, at, TimerTarget::Idle(token));
        }
        self.close_quiescent(reactor, token);
    }

    pub(super) fn on_call_timeout(&mut self, reactor: &mut Reactor, key: CallKey) {
        if let Some(call) = self.service.calls.get_mut(key) {
            call.timer = 0;
        }
        self.service.calls.runs_out(key, self.service.now_ms);
        let text = "its time was over before it was done";
        self.abort_call(reactor, key, Code::Timeout, text);
    }

    /// A call that waits could not be done in time any more.
    pub(super) fn reject_late_call(&mut self, reactor: &mut Reactor, key: CallKey) {
        self.abort_call(reactor, key, Code::Timeout, &too_late().message);
    }

    /// Answers a call with an error, whether it waits or runs.
    pub(super) fn abort_call(
        &mut self,
        reactor: &mut Reactor,
        key: CallKey,
        code: Code,
        text: &str,
    ) {
        let Some(ended) = self.service.give_up(key) else {
            return;
        };
        if ended.token.process().is_some() {
            let error = Err(RpcError::of(code, text, ended.begun));
            return peer_calls::answer(&mut self.service, &ended, error, Duration::ZERO, None);
        }
        if let Some(connection) = find(&mut self.connections, ended.token) {
            let error = RpcError::of(code, text, ended.begun);
            self.service.answer(connection, &ended, Err(error), None);
            self.pump(reactor, ended.token, false);
        }
    }
}
