//! Splits the input of a connection into bodies, by its dialect.
//!
//! The first four bytes decide the dialect of a connection for its whole life. The decoder of the dialect
//! finds the next body and passes it to the dispatcher, which knows no dialects. A violation of a dialect
//! is answered here and ends the connection, because the beginning of the next call is unknown.

use std::mem;

use super::call_counts::CountedCall;
use super::call_dispatcher::CallDispatcher;
use super::connection::{Connection, ConnectionPhase, Discard, PendingAnswer};
use crate::link::metrics_board::layout::CloseReason;
use crate::protocol::body::{self, Form};
use crate::protocol::call::Call;
use crate::protocol::call_id::CallId;
use crate::protocol::code::Code;
use crate::protocol::detect::{self, Dialect};
use crate::protocol::frame::{self, DecodedFrame};
use crate::protocol::http::head::{Ask, RequestHead};
use crate::protocol::http::{self, RejectedRequest, RequestLimits, respond_async, response};
use crate::protocol::reply::{AnswerFormat, Framing};
use crate::protocol::rpc_error::RpcError;
use crate::protocol::{answer, line};
use crate::sys::event::Token;

/// An unfinished call up to this size always has room, because most calls are smaller.
const ALWAYS_ROOM: usize = 16 * 1024;
/// The answer to a client that begins with the PROXY protocol, and the log line about it.
const PROXY_PROTOCOL: &str = "the connection begins with the PROXY protocol, which preforkd does not \
     read: it is refused; turn the protocol off in the proxy (send-proxy of HAProxy, proxy_protocol of nginx)";
/// The answer to a client that begins with TLS, and the log line about it.
const TLS: &str = "the connection begins with TLS, which preforkd does not speak: it is refused; connect without TLS, \
     or let a proxy in front end it (stunnel, nginx, HAProxy)";
/// How long a draining worker waits for a connection to become quiescent before it reads from it again.
const YOUNG_MS: u64 = 100;

impl CallDispatcher {
    /// Returns how many calls were read so far.
    pub fn read(&self) -> u64 {
        self.last_call - self.foreign
    }

    /// Takes as many complete bodies from `input` as possible, while `unsent` bytes of earlier answers
    /// are unsent. Returns the number of consumed bytes.
    pub fn read_requests(
        &mut self,
        connection: &mut Connection,
        input: &[u8],
        unsent: usize,
    ) -> usize {
        if connection.dialect.is_none() {
            connection.dialect = dialect_of(connection, input);
        }
        let used = match connection.dialect {
            Some(Dialect::Frame) => self.frames(connection, input, unsent),
            Some(Dialect::Line) => self.lines(connection, input, unsent),
            Some(Dialect::Http) => self.requests(connection, input, unsent),
            Some(Dialect::Unknown) => self.reject_unknown_dialect(connection, input),
            None => 0,
        };
        self.counts.add_bodies(connection.dialect);
        used
    }

    /// Returns whether another call may be taken from a connection, with `unsent` bytes of earlier
    /// answers unsent. Answers in `out` do not count, because the client may take them at once.
    pub(super) fn may_take(&self, connection: &Connection, unsent: usize) -> bool {
        connection.takes_calls(self.limits.pipeline, unsent + self.out.len())
            && !(connection.queued_bytes() + unsent > 0
                && self.unsent.blocks((connection.source, connection.token)))
    }

    /// Returns whether a connection will soon be quiescent if it is not read: all its calls are recent,
    /// or its client takes the answers. An old call would delay the calls behind it.
    pub(super) fn is_soon_quiescent(&self, connection: &Connection, unsent: usize) -> bool {
        let since_ms = self.now_ms.saturating_sub(YOUNG_MS);
        let mut calls = self.calls.of(connection.token);
        match connection.unanswered {
            // In the middle of a call the client may not read before it has sent the rest.
            0 => unsent > 0 && !connection.has_partial_input() && connection.active_ms >= since_ms,
            _ => calls.all(|(_, call)| call.read_ms >= since_ms),
        }
    }

    fn frames(&mut self, connection: &mut Connection, input: &[u8], unsent: usize) -> usize {
        let mut at = 0;
        while self.may_take(connection, unsent) {
            match frame::decode(&input[at..], self.limits.frame) {
                DecodedFrame::Whole { body, used } => {
                    at += used;
                    self.journal.reaches(at);
                    self.on_body(connection, Framing::Frame, body);
                }
                DecodedFrame::Partial { .. } => break,
                DecodedFrame::TooLarge { .. }
                    if at == 0
                        && connection.unused_since_ms.is_some()
                        && detect::is_tls_hello(input) =>
                {
                    return self.reject_protocol(connection, TLS, input);
                }
                DecodedFrame::TooLarge { length } => {
                    let text = frame::too_large(length, self.limits.frame);
                    return self.reject_too_large(connection, Framing::Frame, text, input);
                }
            }
        }
        at
    }

    fn lines(&mut self, connection: &mut Connection, input: &[u8], unsent: usize) -> usize {
        let mut at = 0;
        while self.may_take(connection, unsent) {
            let rest = &input[at..];
            let limit = self.limits.frame;
            if connection.unused_since_ms.is_some() && detect::is_proxy_protocol_behind_lines(rest)
            {
                return self.reject_protocol(connection, PROXY_PROTOCOL, input);
            }
            match line::decode(rest, connection.scanned, limit, connection.peer_closed) {
                line::DecodedLine::Whole { body, used } => {
                    connection.scanned = 0;
                    at += used;
                    self.journal.reaches(at);
                    self.on_body(connection, Framing::Line, body);
                }
                line::DecodedLine::Blank { used } => {
                    connection.scanned = 0;
                    at += used;
                }
                line::DecodedLine::Partial => {
                    connection.scanned = rest.len();
                    break;
                }
                line::DecodedLine::TooLarge => {
                    let text = format!("the line is longer than limits.frame ({limit} bytes)");
                    return self.reject_too_large(connection, Framing::Line, text, input);
                }
            }
        }
        at
    }

    fn requests(&mut self, connection: &mut Connection, input: &[u8], unsent: usize) -> usize {
        let mut at = 0;
        let mut progress = connection.http.take().unwrap_or_default();
        while self.may_take(connection, unsent) {
            let rules = RequestLimits {
                body: self.limits.frame,
                origins: self.origins,
                traces: self.tracing.is_on,
                request_ids: self.access.is_on(),
                jobs: self.registry.jobs_lane().is_some(),
            };
            match http::decode(&input[at..], &mut progress, &rules) {
                http::DecodedRequest::Whole {
                    mut head,
                    body,
                    used,
                } => {
                    at += used;
                    self.journal.reaches(at);
                    if head.close {
                        connection.phase = ConnectionPhase::Closing;
                        self.journal.mark_closing(connection);
                    }
                    self.tracing.header = head.trace.take();
                    self.access.request_id = head.request_id.take();
                    self.request(connection, head, &body);
                    (self.tracing.header, self.access.request_id) = (None, None);
                }
                http::DecodedRequest::Blank { used } => at += used,
                http::DecodedRequest::Partial { waits } => {
                    // The client may be asked to continue only when all earlier calls are answered.
                    if waits && connection.unanswered == 0 {
                        progress.continued();
                        self.out.extend_from_slice(http::CONTINUE);
                    }
                    break;
                }
                http::DecodedRequest::Refused(refusal) => {
                    connection.phase = ConnectionPhase::Closing;
                    connection.ends_by(CloseReason::Protocol);
                    self.journal.reaches(input.len());
                    self.journal.mark_closing(connection);
                    let reply = http::ResponseOptions::default();
                    self.refuse_request(connection, reply, &refusal, None);
                }
            }
        }
        if connection.phase != ConnectionPhase::Open {
            return input.len();
        }
        if at < input.len() {
            connection.http = Some(progress);
        }
        at
    }

    fn request(&mut self, connection: &mut Connection, head: RequestHead, body: &[u8]) {
        let wrap = Framing::Http(head.reply);
        match head.ask {
            Ask::Call if connection.needs_http_path => {
                let text = "this listener takes no call in the body (http-methods = \"path\"); send \
                            POST /METHOD with the params as body";
                let error = RpcError::of(Code::InvalidRequest, text, false);
                self.count_refused_request(connection, body.len(), &error);
                let refusal = RejectedRequest { status: 403, error };
                let call = self.tracing.id(self.last_call);
                self.refuse_request(connection, head.reply, &refusal, call);
            }
            Ask::Call => self.on_body(connection, wrap, body),
            Ask::Method(method) => {
                self.begin_call(connection, body.len());
                self.counts.count_body(Form::ParamsOnly);
                let reply = self.reserve_answer(connection, wrap, Form::ParamsOnly, None);
                match body::params(body, self.limits.depth) {
                    Ok(params) => {
                        let (method, params) = respond_async::translate(&head.job, method, params);
                        let call = Call {
                            method,
                            params: &params,
                            id: None,
                            timeout_ms: None,
                        };
                        self.tracing.read(&[], &call, Form::Plain);
                        self.dispatch(connection, reply, &call);
                    }
                    Err(error) => self.answer_error(connection, reply, None, error),
                }
            }
            Ask::Health if self.stopping || self.stop_pending => {
                self.respond(connection, head.reply, 503, b"{\"status\":\"stopping\"}");
            }
            Ask::Health if self.pool_health.is_down(self.now_ms) => {
                self.respond(connection, head.reply, 503, b"{\"status\":\"pool down\"}");
            }
            Ask::Health => self.respond(connection, head.reply, 200, b"{\"status\":\"ok\"}"),
            Ask::Preflight { has_jobs } => {
                let reply = self.reserve_answer(connection, wrap, Form::Notification, None);
                let about = self.answer_context(connection, reply);
                let close = about.last && about.closing;
                self.write(connection, reply, |out, _, _| {
                    response::preflight(out, head.reply, (close, has_jobs), about.http);
                });
            }
            Ask::Refused(refusal) => {
                self.refuse_request(connection, head.reply, &refusal, None);
            }
        }
    }

    /// Counts a call that is refused as a request.
    fn count_refused_request(&mut self, from: &Connection, size: usize, error: &RpcError) {
        self.begin_call(from, size);
        self.errors += 1;
        let counted = CountedCall::Refused(self.counts.place(None));
        self.counts.count_error(counted, error);
        self.counts.count(counted);
        let counts = (&self.counts, counted, self.last_call);
        (self.access).answered(Some(from), (Form::ParamsOnly, Some(error), 0), counts);
    }

    /// Answers a refused request. `call` is its id, if it counts as a call and errors have ids.
    fn refuse_request(
        &mut self,
        connection: &mut Connection,
        reply: http::ResponseOptions,
        why: &RejectedRequest,
        call: Option<CallId>,
    ) {
        let mut body = Vec::new();
        answer::bare_error(&mut body, &why.error, call);
        self.respond(connection, reply, why.status, &body);
    }

    /// Answers an HTTP request that is not a call.
    fn respond(
        &mut self,
        connection: &mut Connection,
        http: http::ResponseOptions,
        status: u16,
        body: &[u8],
    ) {
        let reply = self.reserve_answer(connection, Framing::Http(http), Form::ParamsOnly, None);
        let about = self.answer_context(connection, reply);
        let close = about.last && about.closing;
        self.write(connection, reply, |out, _, _| {
            let mark = out.len();
            out.extend_from_slice(body);
            response::finish(out, mark, http, status, close, about.http);
        });
    }

    /// Refuses a connection that begins with neither a length nor text of a known dialect.
    fn reject_unknown_dialect(&mut self, connection: &mut Connection, input: &[u8]) -> usize {
        if detect::is_proxy_protocol(input) {
            return self.reject_protocol(connection, PROXY_PROTOCOL, input);
        }
        let text = "a connection cannot begin with these four bytes: send a frame (a 4-byte \
                    little-endian length and that many bytes of JSON), a line of JSON, or an HTTP request";
        self.reject_too_large(connection, Framing::Frame, text.to_owned(), input)
    }

    /// Refuses a connection with a known protocol that preforkd does not speak. `text` names the protocol and the
    /// remedy.
    fn reject_protocol(
        &mut self,
        connection: &mut Connection,
        text: &'static str,
        input: &[u8],
    ) -> usize {
        self.met_protocol = Some(text);
        self.reject_too_large(connection, Framing::Frame, text.to_owned(), input)
    }

    /// Answers `too-large` and consumes all input, because it is unknown where the next call begins.
    fn reject_too_large(
        &mut self,
        connection: &mut Connection,
        wrap: Framing,
        why: String,
        input: &[u8],
    ) -> usize {
        self.begin_call(connection, input.len());
        self.journal.reaches(input.len());
        self.journal.mark_closing(connection);
        let reply = self.reserve_answer(connection, wrap, Form::Plain, None);
        let error = RpcError::of(Code::TooLarge, why, false);
        self.answer_error(connection, reply, None, error);
        input.len()
    }

    /// Counts the unfinished input that a connection keeps.
    pub fn update_unfinished_total(&mut self, connection: &mut Connection) {
        let batch = connection.untaken_members.as_ref();
        let bytes = connection.input.len() + batch.map_or(0, |batch| batch.text.len());
        if bytes != connection.accounted_bytes {
            let owner = (connection.source, connection.token);
            self.unfinished_shares
                .remove(owner, connection.accounted_bytes);
            self.unfinished_shares.add(owner, bytes);
            self.unfinished += bytes;
            self.unfinished -= mem::replace(&mut connection.accounted_bytes, bytes);
        }
    }

    /// Returns the connection that must make room for the input of this one; `None` if no other has more.
    pub fn victim_for(&self, connection: &Connection) -> Option<Token> {
        let owner = (connection.source, connection.token);
        self.unfinished_shares.victims(owner, 0).next()
    }

    /// Returns whether there is no room for the counted input of a connection. There is always room if the input is
    /// small, or the only one.
    pub fn has_no_room_for(&self, connection: &Connection) -> bool {
        self.unfinished > self.limits.unfinished.saturating_add(frame::HEADER)
            && connection.accounted_bytes > ALWAYS_ROOM
            && connection.accounted_bytes < self.unfinished
    }

    /// Returns whether the input of a connection is the beginning of a call, without a complete one
    /// before it.
    pub fn has_only_partial(&self, connection: &Connection) -> bool {
        let input = &connection.input;
        if input.is_empty() || connection.untaken_members.is_some() {
            return false;
        }
        match connection.dialect {
            Some(Dialect::Frame) => matches!(
                frame::decode(input, self.limits.frame),
                DecodedFrame::Partial { .. }
            ),
            Some(Dialect::Line) => connection.scanned == input.len(),
            Some(Dialect::Http) => connection.http.is_some(),
            _ => false,
        }
    }

    /// Answers a call whose rest has no room, and drops it. In HTTP that ends the connection, and the
    /// response says so.
    pub fn reject_unfinished(&mut self, connection: &mut Connection) {
        let limit = self.limits.unfinished;
        let text = format!(
            "the unfinished calls of this worker have reached limits.unfinished, {limit} bytes; send \
             it again later"
        );
        let error = RpcError::of(Code::Overloaded, text, false);
        let input = mem::take(&mut connection.input);
        let (wrap, rest) = match connection.dialect {
            Some(Dialect::Http) => {
                connection.phase = ConnectionPhase::Closing;
                connection.ends_by(CloseReason::Limit);
                self.journal.mark_closing(connection);
                self.count_refused_request(connection, input.len(), &error);
                let refusal = RejectedRequest { status: 503, error };
                let call = self.tracing.id(self.last_call);
                let reply = http::ResponseOptions::default();
                return self.refuse_request(connection, reply, &refusal, call);
            }
            Some(Dialect::Line) => (Framing::Line, Discard::Line),
            _ => {
                let need = match frame::decode(&input, self.limits.frame) {
                    DecodedFrame::Partial { need } => need,
                    _ => input.len(),
                };
                (Framing::Frame, Discard::Bytes(need - input.len()))
            }
        };
        self.begin_call(connection, input.len());
        connection.scanned = 0;
        connection.discarding = Some(rest);
        let reply = self.reserve_answer(connection, wrap, Form::Plain, None);
        self.answer_error(connection, reply, None, error);
    }

    /// Reserves the position of the answer of the last call. HTTP answers have no ids, so their order matters.
    pub(super) fn reserve_answer(
        &mut self,
        connection: &mut Connection,
        wrap: Framing,
        form: Form,
        id: Option<&str>,
    ) -> PendingAnswer {
        let free = match wrap {
            Framing::Http(_) => false,
            _ => form == Form::Notification || id.is_some_and(|id| id != "null"),
        };
        self.unused.remove(connection);
        let (place, shape) = (connection.take(free), AnswerFormat { form, wrap });
        let mark = self
            .journal
            .take(connection, shape, place, (id, self.last_call));
        self.access.recorded(mark);
        PendingAnswer { place, shape, mark }
    }
}

/// Returns the dialect of the first bytes; `None` while it is unknown. If there is no fourth byte, it can
/// only be a line.
fn dialect_of(connection: &Connection, input: &[u8]) -> Option<Dialect> {
    match (input.first_chunk(), input) {
        (Some(_), _) if detect::is_proxy_protocol(input) => Some(Dialect::Unknown),
        (Some(first_four), _) => Some(detect::detect(*first_four)),
        (None, [first, ..]) if connection.peer_closed => {
            detect::is_line(*first).then_some(Dialect::Line)
        }
        _ => None,
    }
}
