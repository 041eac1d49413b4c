//! From bytes to bodies: what a connection has sent, taken apart by its dialect.
//!
//! Told by its first four bytes, a connection keeps its dialect for life. Each dialect finds the
//! next body in its own way and hands it to the service, which knows none of them; what breaks a
//! dialect's own rules is answered here and ends the connection, for nothing behind it can be
//! told from the rest of it.

use std::mem;

use super::call_dispatcher::CallDispatcher;
use super::connection::{Connection, ConnectionPhase, Discard, PendingAnswer};
use crate::protocol::body::{self, Form};
use crate::protocol::code::Code;
use crate::protocol::detect::{self, Dialect};
use crate::protocol::frame::{self, DecodedFrame};
use crate::protocol::http::head::{Ask, RequestHead};
use crate::protocol::http::{self, RejectedRequest, RequestLimits, response};
use crate::protocol::reply::{AnswerFormat, Framing};
use crate::protocol::rpc_error::RpcError;
use crate::protocol::{answer, line};
use crate::sys::event::Token;

/// So much of an unfinished call has room whatever the others keep: most calls are no larger.
const ALWAYS_ROOM: usize = 16 * 1024;
pub(super) const PROXY_PROTOCOL: &str = "the connection begins with the PROXY protocol, which preforkd does not \
     read: it is refused; turn the protocol off in the proxy (send-proxy of HAProxy, proxy_protocol of nginx)";
/// While the worker drains, how long it waits for a connection to come to rest before it reads on.
const YOUNG_MS: u64 = 100;

impl CallDispatcher {
    /// Takes as many whole bodies from `input` as may be taken, with `unsent` bytes of earlier
    /// answers still on their way. Returns how many bytes were consumed.
    pub fn read_requests(
        &mut self,
        connection: &mut Connection,
        input: &[u8],
        unsent: usize,
    ) -> usize {
        if connection.dialect.is_none() {
            connection.dialect = dialect_of(connection, input);
        }
        match connection.dialect {
            Some(Dialect::Frame) => self.frames(connection, input, unsent),
            Some(Dialect::Line) => self.lines(connection, input, unsent),
            Some(Dialect::Http) => self.requests(connection, input, unsent),
            Some(Dialect::Unknown) => self.reject_unknown_dialect(connection, input),
            None => 0,
        }
    }

    /// Whether another call may be taken from a connection, with `unsent` bytes of earlier answers still
    /// on their way. Answers in `out` are not among them: their client may take them at once.
    pub(super) fn may_take(&self, connection: &Connection, unsent: usize) -> bool {
        connection.takes_calls(self.limits.pipeline, unsent + self.out.len())
            && !(connection.queued_bytes() + unsent > 0
                && self.unsent.blocks((connection.source, connection.token)))
    }

    /// Whether a connection that is not at rest will be in a moment, if nothing more is read of it: all
    /// that it has under way are young calls, or answers that its client takes. Who has an old one would hold
    /// up what comes behind it.
    pub(super) fn is_soon_quiescent(&self, connection: &Connection, unsent: usize) -> bool {
        let since_ms = self.now_ms.saturating_sub(YOUNG_MS);
        let mut calls = self.calls.of(connection.token);
        match connection.unanswered {
            // In the middle of a call it may read nothing until that is sent.
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
                    self.ledger.reaches(at);
                    self.on_body(connection, Framing::Frame, body);
                }
                DecodedFrame::Partial { .. } => break,
                DecodedFrame::TooLarge { length } => {
                    let limit = self.limits.frame;
                    let text = format!("a frame of {length} bytes; limits.frame allows {limit}");
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
            match line::decode(rest, connection.scanned, limit, connection.peer_closed) {
                line::DecodedLine::Whole { body, used } => {
                    connection.scanned = 0;
                    at += used;
                    self.ledger.reaches(at);
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
                    let text = format!("a line of more than limits.frame allows, {limit} bytes");
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
            };
            match http::decode(&input[at..], &mut progress, &rules) {
                http::DecodedRequest::Whole { head, body, used } => {
                    at += used;
                    self.ledger.reaches(at);
                    if head.close {
                        connection.phase = ConnectionPhase::Closing;
                        self.ledger.mark_closing(connection);
                    }
                    self.request(connection, head, &body);
                }
                http::DecodedRequest::Blank { used } => at += used,
                http::DecodedRequest::Partial { waits } => {
                    // It may only be asked to go on once all before it is answered.
                    if waits && connection.unanswered == 0 {
                        progress.continued();
                        self.out.extend_from_slice(http::CONTINUE);
                    }
                    break;
                }
                http::DecodedRequest::Refused(refusal) => {
                    connection.phase = ConnectionPhase::Closing;
                    self.refuse_request(connection, http::ResponseOptions::default(), &refusal);
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
                self.read += 1;
                self.errors += 1;
                let text = "this listener takes no call in the body (http-methods = \"path\"); send \
                            POST /METHOD with the params as body";
                let error = RpcError::of(Code::InvalidRequest, text, false);
                let refusal = RejectedRequest { status: 403, error };
                self.refuse_request(connection, head.reply, &refusal);
            }
            Ask::Call => self.on_body(connection, wrap, body),
            Ask::Method(method) => {
                self.read += 1;
                let reply = self.reserve_answer(connection, wrap, Form::ParamsOnly, None);
                match body::params(body, self.limits.depth) {
                    Ok(params) => self.dispatch(connection, reply, &method, params, None, None),
                    Err(error) => self.answer_error(connection, reply, None, error),
                }
            }
            Ask::Health if self.stopping || self.stop_pending => {
                self.respond(connection, head.reply, 503, b"{\"status\":\"stopping\"}");
            }
            Ask::Health => self.respond(connection, head.reply, 200, b"{\"status\":\"ok\"}"),
            Ask::Preflight => {
                let reply = self.reserve_answer(connection, wrap, Form::Notification, None);
                let about = self.answer_context(connection, reply);
                let close = about.last && about.closing;
                self.write(connection, reply, |out| {
                    response::preflight(out, head.reply, close, about.http);
                });
            }
            Ask::Refused(refusal) => self.refuse_request(connection, head.reply, &refusal),
        }
    }

    fn refuse_request(
        &mut self,
        connection: &mut Connection,
        reply: http::ResponseOptions,
        why: &RejectedRequest,
    ) {
        let mut body = Vec::new();
        answer::bare_error(&mut body, &why.error);
        self.respond(connection, reply, why.status, &body);
    }

    /// Answers a request that is no call.
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
        self.write(connection, reply, |out| {
            let mark = out.len();
            out.extend_from_slice(body);
            response::finish(out, mark, http, status, close, about.http);
        });
    }

    /// Neither a length nor text that one of the dialects begins with.
    fn reject_unknown_dialect(&mut self, connection: &mut Connection, input: &[u8]) -> usize {
        let text = match detect::is_proxy_protocol(input) {
            true => PROXY_PROTOCOL,
            false => {
                "these are no four bytes to begin with: send a frame (a 4-byte little-endian \
                 length and that many bytes of JSON), a line of JSON, or an HTTP request"
            }
        };
        self.reject_too_large(connection, Framing::Frame, text.to_owned(), input)
    }

    /// Answers `too-large`; what follows can't be told apart from the rest of what was refused.
    fn reject_too_large(
        &mut self,
        connection: &mut Connection,
        wrap: Framing,
        why: String,
        input: &[u8],
    ) -> usize {
        self.read += 1;
        let reply = self.reserve_answer(connection, wrap, Form::Plain, None);
        let error = RpcError::of(Code::TooLarge, why, false);
        self.answer_error(connection, reply, None, error);
        input.len()
    }

    /// Counts what a connection keeps of an unfinished call.
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

    /// There is no room for what a connection keeps: the connection that has more and is to make room, if
    /// there is one.
    pub fn payer_for(&self, connection: &Connection) -> Option<Token> {
        let owner = (connection.source, connection.token);
        self.unfinished_shares.payer(owner, 0)
    }

    /// Whether there is no room for what a connection keeps, as counted. For what is little, or all there
    /// is, there always is.
    pub fn has_no_room_for(&self, connection: &Connection) -> bool {
        self.unfinished > self.limits.unfinished.saturating_add(frame::HEADER)
            && connection.accounted_bytes > ALWAYS_ROOM
            && connection.accounted_bytes < self.unfinished
    }

    /// Whether the input of a connection is the beginning of a call, and has no whole one before it.
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

    /// Answers a call for whose rest there is no room, and drops it. In HTTP that ends the connection,
    /// which its response has words for.
    pub fn reject_unfinished(&mut self, connection: &mut Connection) {
        let limit = self.limits.unfinished;
        let text = format!(
            "the unfinished calls of this worker are as much as limits.unfinished allows, {limit} bytes; send \
             it again later"
        );
        let error = RpcError::of(Code::Overloaded, text, false);
        self.read += 1;
        let input = mem::take(&mut connection.input);
        let (wrap, rest) = match connection.dialect {
            Some(Dialect::Http) => {
                connection.phase = ConnectionPhase::Closing;
                self.ledger.mark_closing(connection);
                self.errors += 1;
                let refusal = RejectedRequest { status: 503, error };
                return self.refuse_request(connection, http::ResponseOptions::default(), &refusal);
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
        connection.scanned = 0;
        connection.discarding = Some(rest);
        let reply = self.reserve_answer(connection, wrap, Form::Plain, None);
        self.answer_error(connection, reply, None, error);
    }

    /// Takes a place for a call's answer. In HTTP nothing tells answers apart but their order.
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
        let (place, shape) = (connection.take(free), AnswerFormat { form, wrap });
        let mark = self.ledger.take(connection, shape, place, id);
        PendingAnswer { place, shape, mark }
    }
}

/// The dialect that a connection's first bytes speak; `None` while they don't tell. Where no
/// fourth byte comes, only lines are so short.
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
