//! Takes each call that a worker reads, from its body to its answer.
//!
//! `input_parser` finds the bodies. This module parses a body, finds the method, checks the limits, runs
//! inline handlers, queues other calls, and writes every answer. It handles one connection at a time and
//! no socket. Answers are collected in `out`, and the caller sends them, one write for a batch. Every
//! call that was taken gets exactly one answer from here.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::access_log::hooks::AccessLog;
use super::access_log::line::body_bytes;
use super::attempts::AttemptTable;
use super::batch::{self, MEMBERS_PER_TURN, UntakenMembers};
use super::call_counts::{AcceptDelay, CallCounts, CountedCall};
use super::call_errors::{self, caller_gone, check_size};
use super::call_room;
use super::call_scheduler::{CallScheduler, FinishedCall};
use super::call_tracing::CallTracing;
use super::connection::{AnswerPosition, Connection, ConnectionPhase, HIGH_WATER, PendingAnswer};
use super::crash::call_record::CallRef;
use super::crash::journal::CallJournal;
use super::forwarding::Forwarding;
use super::path_listeners::PathListeners;
use super::shares::Shares;
use super::slow_log::watch::SlowWatch;
use super::source_limits::SourceLimits;
use super::threads::{Done, Threads};
use super::timers::{CallKey, TimerTarget, Timers, millis};
use super::unsent::UnsentAnswers;
use super::unused_connections::UnusedConnections;
use crate::config::LimitsConfig;
use crate::handler::registry::Registry;
use crate::handler::trace::CallIdentity;
use crate::handler::{Context, Placement, guard};
use crate::link::metrics_board::layout::CloseReason;
use crate::link::quarantine::UsedQuarantine;
use crate::link::scoreboard::WorkerRecord;
use crate::protocol::body::{self, Body, Form};
use crate::protocol::call::{self, Call};
use crate::protocol::code::Code;
use crate::protocol::http::{HttpDate, ResponseContext};
use crate::protocol::reply::{AnswerContext, AnswerFormat, Framing};
use crate::protocol::rpc_error::RpcError;
use crate::protocol::{cancel, jsonrpc};
use crate::sys::event::Token;
use crate::sys::process;

#[derive(Debug)]
pub struct CallDispatcher {
    pub registry: Arc<Registry>,
    /// Waiting and running calls.
    pub calls: CallScheduler,
    /// The handler threads or the pool programs.
    pub threads: Threads,
    /// The links to other workers, which run calls of this one and send theirs.
    pub forwarding: Forwarding,
    /// Results of other workers, and calls that made room for others. They must be answered.
    pub answered_elsewhere: Vec<Done>,
    /// The attempts of jobs that run here.
    pub attempts: AttemptTable,
    pub timers: Timers,
    pub limits: LimitsConfig,
    /// The listeners where an HTTP request must name its method in the path.
    pub path_listeners: PathListeners,
    pub source_limits: SourceLimits,
    /// The origins whose web pages may call. They never change in a worker.
    pub origins: &'static [String],
    /// Connections with a batch that is not completely taken, in order.
    pub untaken_batches: VecDeque<Token>,
    /// Answers of the current connection that are not sent yet.
    pub out: Vec<u8>,
    /// The time of the last wake-up in milliseconds (CLOCK_MONOTONIC).
    pub now_ms: u64,
    pub accept_wait: AcceptDelay,
    /// A stop is scheduled: calls are served, but health checks are answered with "not ready".
    pub stop_pending: bool,
    /// The server is stopping: no further call begins.
    pub stopping: bool,
    /// The bytes of all unfinished frames, lines and requests.
    pub unfinished: usize,
    /// The shares of the connections in these bytes.
    pub unfinished_shares: Shares,
    /// The answers that clients have not taken.
    pub unsent: UnsentAnswers,
    /// Connections that may be closed to make room for others.
    pub unused: UnusedConnections,
    /// The text to log, if a connection began with the PROXY protocol or TLS.
    pub met_protocol: Option<&'static str>,
    /// The number of the last call. Each call gets the next one, also those of other processes.
    pub last_call: u64,
    /// How many of these calls this process has not read: those of other processes, and attempts of jobs.
    pub foreign: u64,
    /// The number of error answers so far.
    pub errors: u64,
    pub counts: CallCounts,
    pub pool_health: super::pool_health::WatchedPools,
    pub tracing: CallTracing,
    pub slow: SlowWatch,
    pub access: AccessLog,
    /// The record of this worker in the scoreboard.
    pub record: &'static WorkerRecord,
    pub slot: u16,
    /// The calls that are not answered yet, for the keeper.
    pub journal: CallJournal,
    /// The quarantined calls; empty without a keeper.
    pub quarantine: UsedQuarantine,
}

impl CallDispatcher {
    /// Gives the next number to a call that was read, with a body of this many bytes.
    #[inline]
    pub(super) fn begin_call(&mut self, connection: &Connection, bytes: usize) {
        self.last_call += 1;
        let times = (self.counts.turn_ns(), self.accept_wait.now_ms);
        (self.access).begin(connection, self.last_call, bytes, times);
    }

    /// Takes one body with its framing.
    pub(super) fn on_body(&mut self, connection: &mut Connection, wrap: Framing, body: &[u8]) {
        match body::read(body, self.limits.depth, self.limits.batch) {
            Body::One(form, Ok(call)) => {
                self.counts.count_body(form);
                self.begin_call(connection, body.len());
                let reply = self.reserve_answer(connection, wrap, form, call.id);
                self.tracing.read(body, &call, form);
                self.dispatch(connection, reply, &call);
            }
            Body::One(form, Err(refusal)) => {
                self.counts.count_body(form);
                self.begin_call(connection, body.len());
                let reply = self.reserve_answer(connection, wrap, form, refusal.id);
                self.answer_error(connection, reply, refusal.id, refusal.error);
            }
            Body::Batch { text, members } => self.take_batch(connection, wrap, text, &members),
        }
    }

    /// Takes the calls of a batch: each is an ordinary call whose answer is a part of one answer.
    fn take_batch(
        &mut self,
        connection: &mut Connection,
        wrap: Framing,
        text: &str,
        members: &[&str],
    ) {
        self.counts.count_body(Form::JsonRpc);
        let whole = self.reserve_answer(connection, wrap, Form::JsonRpc, None);
        // The journal cannot record an answer of many parts. Mark it only now that its answer is reserved: while
        // nothing is unanswered, the mark is removed.
        self.journal.mark_unlogged(connection);
        let batch = connection.begin_batch(whole, members.len());
        let taken = self.take_members(connection, batch, text, members.iter().copied());
        if taken < members.len() {
            let received_ms = self.now_ms - self.accept_wait.now_ms;
            let rest = UntakenMembers::new(batch, text, &members[taken..], received_ms);
            let rest = rest.of_request(&self.tracing.header, &self.access.request_id);
            connection.untaken_members = Some(Box::new(rest));
            self.untaken_batches.push_back(connection.token);
        }
    }

    /// Takes the next calls of a batch that was too long for one turn.
    pub(super) fn resume_batch(&mut self, connection: &mut Connection) {
        let Some(mut rest) = connection.untaken_members.take() else {
            return;
        };
        // The time spent on the earlier calls counts towards the timeout.
        self.accept_wait.now_ms = self.now_ms.saturating_sub(rest.received_ms);
        self.tracing.header.clone_from(&rest.header);
        self.access.request_id.clone_from(&rest.request_id);
        let taken = self.take_members(connection, rest.batch, &rest.text, rest.members());
        self.accept_wait.now_ms = 0;
        (self.tracing.header, self.access.request_id) = (None, None);
        if rest.advance(taken) {
            connection.untaken_members = Some(rest);
            self.untaken_batches.push_back(connection.token);
        }
    }

    /// Takes calls of a batch, up to the limit for one turn of the event loop. Returns their number.
    fn take_members<'a>(
        &mut self,
        connection: &mut Connection,
        batch: usize,
        text: &str,
        members: impl Iterator<Item = &'a str>,
    ) -> usize {
        let (mut taken, mut bytes) = (0, 0);
        for member in members {
            if taken == MEMBERS_PER_TURN || bytes > HIGH_WATER {
                break;
            }
            taken += 1;
            self.begin_call(connection, member.len());
            let held = connection.queued_bytes();
            let call = jsonrpc::member(text, member);
            let shape = AnswerFormat {
                form: body::request_form(&call),
                wrap: Framing::Member,
            };
            let reply = PendingAnswer {
                place: AnswerPosition::Member(batch),
                shape,
                mark: CallRef::default(),
            };
            self.tracing.read_member(member, &call);
            match call {
                Ok(call) => match call_room::batch_refusal(
                    connection,
                    reply,
                    &self.unsent,
                    self.limits.frame,
                ) {
                    None => self.dispatch(connection, reply, &call),
                    Some(error) => {
                        let method = self.registry.find(&call.method, self.forwarding.is_session);
                        let place = self.counts.place(method);
                        self.refuse(connection, reply, place, (call.id, error));
                    }
                },
                Err(refusal) => self.answer_error(connection, reply, refusal.id, refusal.error),
            }
            bytes += member.len() + connection.queued_bytes().saturating_sub(held);
        }
        taken
    }

    /// The answers of a batch have reached their limit: refuses its calls that have not begun.
    #[cold]
    fn fill_batch(&mut self, connection: &mut Connection, place: AnswerPosition) {
        if !connection.set_batch_full(place) {
            return;
        }
        let calls = self.calls.of(connection.token);
        let waiting: Vec<CallKey> = calls
            .filter(|(_, call)| call.reply.place == place && !call.is_running())
            .filter(|(_, call)| call.reply.shape.form != Form::Notification)
            .map(|(key, _)| key)
            .collect();
        for key in waiting {
            if let Some(ended) = self.give_up(key) {
                let error = batch::too_long(self.limits.frame, ended.begun);
                self.answer(connection, &ended, (Err(error), None), None);
            }
        }
    }

    /// Runs a call, queues it, or answers it with an error. It is the call that was read last.
    pub(super) fn dispatch(
        &mut self,
        connection: &mut Connection,
        reply: PendingAnswer,
        call: &Call<'_>,
    ) {
        let (name, params, id) = (&*call.method, call.params, call.id);
        let identity = self.tracing.identity(self.last_call);
        let found = self.registry.find(name, self.forwarding.is_session);
        let place = self.counts.place(found);
        let trace = (&identity, self.tracing.parent_id);
        self.access.found((place, name), trace, reply.mark);
        if self.stopping {
            return self.refuse(connection, reply, place, (id, call_errors::stopping()));
        }
        if connection.drops_answer(reply.shape.form) {
            return self.refuse(connection, reply, place, (id, caller_gone(false)));
        }
        let Some(method) = found else {
            return self.dispatch_builtin(connection, reply, name, params, id);
        };
        let own_ms = millis(self.registry.methods()[method].timeout);
        let timeout_ms = call.timeout_ms.map_or(own_ms, |asked| asked.min(own_ms));
        // The timeout of the client counts from when it sent the call, not from when we read it.
        let timeout_ms = timeout_ms.saturating_sub(self.accept_wait.now_ms);
        let inline = self.registry.methods()[method].handler.placement() == Placement::Inline;
        let admitted = if timeout_ms == 0 {
            Err(call_errors::over_when_read())
        } else {
            let size = params.len() + id.map_or(0, str::len);
            self.admit(connection, (method, size), inline)
        };
        if let Err(error) = admitted {
            return self.refuse(connection, reply, place, (id, error));
        }
        if let Some(key) = self.quarantine.key(name, params) {
            if self.quarantine.is_quarantined(key) {
                let writer = self.counts.writer;
                writer.add(&writer.block.quarantine_refusals, 1);
                return self.refuse(connection, reply, place, (id, call_errors::quarantined()));
            }
            reply.mark.set_key(key, method);
        }
        let deadline_ms = self.now_ms.saturating_add(timeout_ms);
        if inline {
            let method = (method, params);
            return self.run_inline(connection, reply, method, (id, &identity), deadline_ms);
        }
        let key = self.calls.add(
            (connection.token, reply, id, identity),
            (connection.peer, connection.source),
            (method, params),
            (self.now_ms, deadline_ms),
        );
        if let Some(added) = self.calls.get_mut(key) {
            connection.pending += added.charged_bytes;
            added.read_ns = self.counts.turn_ns();
            added.access = self.access.start();
            let waited = (added.read_ns, self.accept_wait.now_ms);
            added.shown = self.slow.shown(waited.into(), connection.peer, params);
            self.timers
                .arm(&mut added.timer, deadline_ms, TimerTarget::Call(key));
        }
    }

    /// Checks the limits of a method, and makes room for a call. For that it may evict waiting calls of a connection
    /// that has more.
    #[inline(always)] // It has one caller, and each call comes here.
    fn admit(
        &mut self,
        connection: &Connection,
        (method, size): (usize, usize),
        inline: bool,
    ) -> Result<(), RpcError> {
        let (calls, source) = (&mut self.calls, connection.source);
        call_room::check_limits(calls, method, source, self.now_ms)?;
        if !inline {
            let owner = (source, connection.token);
            let threads = self.threads.crew(calls.lane(method));
            let evicted = &mut self.answered_elsewhere;
            call_room::make_room(calls, (method, size), owner, threads, evicted)?;
        }
        call_room::count_call(calls, method, source);
        Ok(())
    }

    /// Handles the methods of the protocol itself.
    fn dispatch_builtin(
        &mut self,
        connection: &mut Connection,
        reply: PendingAnswer,
        name: &str,
        params: &str,
        id: Option<&str>,
    ) {
        match name {
            call::CANCEL => self.cancel(connection, reply, id, params),
            call::DISCOVER => {
                let registry = Arc::clone(&self.registry);
                let document = registry.document(self.forwarding.is_session);
                let limit = self.limits.frame;
                let counted = CountedCall::Inline(self.counts.place(None));
                self.compose(connection, reply, (name, id), counted, |out| {
                    check_size(document.len(), limit)?;
                    out.extend_from_slice(document.as_bytes());
                    Ok(())
                });
            }
            _ => {
                let error = call_errors::no_method(&self.registry, name);
                self.answer_error(connection, reply, id, error);
            }
        }
    }

    fn run_inline(
        &mut self,
        connection: &mut Connection,
        reply: PendingAnswer,
        (number, params): (usize, &str),
        (id, identity): (Option<&str>, &CallIdentity),
        deadline_ms: u64,
    ) {
        let registry = Arc::clone(&self.registry);
        let method = &registry.methods()[number];
        let context = Context::inline(&method.name, self.slot, Duration::from_millis(deadline_ms))
            .with((id, connection.peer), registry.worker())
            .identified(identity);
        // The master reads it if this call ends the worker.
        self.record.last_method.store(number as u32 + 1, Relaxed);
        self.record.last_call.store(identity.number, Relaxed);
        self.record.inline_running.store(1, Relaxed);
        self.journal.begins_inline(reply.mark, number);
        let begin = self.slow.inline.begin(self.errors);
        let limit = self.limits.frame;
        let name = method.handler.answer_name().unwrap_or(&method.name);
        let counted = CountedCall::Inline(self.counts.place(Some(number)));
        self.compose(connection, reply, (name, id), counted, |out| {
            let start = out.len();
            let run = || method.handler.call(params, &context, out);
            guard::run((&method.name, id), run)?;
            check_size(out.len() - start, limit)
        });
        self.journal.ends_inline();
        self.quarantine.clear_suspicion(reply.mark.key());
        self.record.inline_running.store(0, Relaxed);
        let call = (number, method.name.as_str(), params, reply.mark);
        let around = (
            &self.counts,
            self.now_ms,
            self.errors,
            self.accept_wait.now_ms,
        );
        (self.slow).inline_ended(begin, call, (identity, connection.peer), around);
    }

    /// Handles `rpc.cancel`: cancels the call with that id, and answers whether there was one.
    fn cancel(
        &mut self,
        connection: &mut Connection,
        reply: PendingAnswer,
        id: Option<&str>,
        params: &str,
    ) {
        let Some(wanted) = cancel::target_id(params) else {
            let error = RpcError::invalid_params("rpc.cancel takes {\"id\": ID}");
            return self.answer_error(connection, reply, id, error);
        };
        let key = self.calls.find(connection.token, wanted);
        self.slow.cancelled = key;
        if let Some(ended) = key.and_then(|key| self.give_up(key)) {
            let error = call_errors::cancelled(ended.begun);
            self.answer(connection, &ended, (Err(error), None), None);
        }
        let counted = CountedCall::Inline(self.counts.place(None));
        self.compose(connection, reply, (call::CANCEL, id), counted, |out| {
            out.extend_from_slice(if key.is_some() { b"true" } else { b"false" });
            Ok(())
        });
    }

    /// Answers a call that is not started. Closes the connection if the code requires it.
    pub(super) fn answer_error(
        &mut self,
        connection: &mut Connection,
        reply: PendingAnswer,
        id: Option<&str>,
        error: RpcError,
    ) {
        let place = self.counts.place(None);
        self.refuse(connection, reply, place, (id, error));
    }

    /// Refuses a call with an error. `place` is the place of its method on the metrics board.
    fn refuse(
        &mut self,
        connection: &mut Connection,
        reply: PendingAnswer,
        place: usize,
        (id, error): (Option<&str>, RpcError),
    ) {
        let counted = CountedCall::Refused(place);
        self.compose(connection, reply, ("", id), counted, |_| Err(error));
    }

    /// Gives up a waiting or running call, and disarms its timer.
    pub fn give_up(&mut self, key: CallKey) -> Option<FinishedCall> {
        let around = (&self.calls, &*self.registry, &self.counts, self.now_ms);
        self.slow.given_up(around, key);
        let mut ended = self.calls.give_up(key)?;
        self.timers.disarm(&mut ended.timer, TimerTarget::Call(key));
        if let Some(call) = ended.sent_to {
            self.forwarding.cancel(call);
        } else if ended.begun && self.calls.lane(ended.method) > 0 {
            self.threads.pools().give_up();
        }
        Some(ended)
    }

    /// Answers a call that has waited or run. `took` is its run time; `None` if it was given up.
    pub fn answer(
        &mut self,
        connection: &mut Connection,
        ended: &FinishedCall,
        (outcome, took): (Result<Vec<u8>, RpcError>, Option<Duration>),
        out: Option<&str>,
    ) {
        connection.pending -= ended.charged_bytes;
        let registry = Arc::clone(&self.registry);
        let method = &registry.methods()[ended.method];
        let name = out.or_else(|| method.handler.answer_name());
        let name = name.unwrap_or(&method.name);
        let limit = self.limits.frame;
        let counted = self.counts.ended(ended, took);
        let before = self.access.switch_to(ended);
        let name = (name, ended.id.as_deref());
        self.compose(connection, ended.reply, name, counted, |out| {
            let result = outcome?;
            check_size(result.len(), limit)?;
            out.extend_from_slice(&result);
            Ok(())
        });
        self.access.switch_back(before);
    }

    /// Writes one answer: the result that `fill` appends, or its error.
    fn compose(
        &mut self,
        connection: &mut Connection,
        reply: PendingAnswer,
        (name, id): (&str, Option<&str>),
        counted: CountedCall,
        fill: impl FnOnce(&mut Vec<u8>) -> Result<(), RpcError>,
    ) {
        // A code of a handler does not close the client's connection.
        let ours = name.is_empty() || self.stopping;
        let about = AnswerContext {
            ours,
            ..self.answer_context(connection, reply)
        };
        let is_member = reply.shape.wrap == Framing::Member;
        let limit = self.limits.frame;
        let mut outcome = Ok(());
        let mut is_full = false;
        let (has_line, mut sent_bytes) = (self.access.is_on(), 0);
        self.write(connection, reply, |out, tracing, last_call| {
            let start = out.len();
            let call = || tracing.id(counted.number(last_call));
            outcome = reply.shape.compose(out, about, (name, id), call, |out| {
                fill(out)?;
                // All answers of a batch are kept until the last one is done.
                is_full = is_member && out.len() > limit;
                match is_full {
                    true => Err(batch::too_long(limit, true)),
                    false => Ok(()),
                }
            });
            if has_line {
                sent_bytes = body_bytes(&out[start..], reply.shape.wrap);
            }
        });
        if is_full {
            self.fill_batch(connection, reply.place);
        }
        if let Err(error) = &outcome {
            self.counts.count_error(counted, error);
            // An answer that is not sent is not counted.
            self.errors += u64::from(!connection.drops_answer(reply.shape.form));
            if ours && error.table_code().is_some_and(Code::closes) {
                connection.phase = ConnectionPhase::Closing;
                connection.ends_by(match self.stopping {
                    true => CloseReason::Stop,
                    false => CloseReason::Protocol,
                });
            }
        }
        self.counts.count(counted);
        if has_line {
            let answer = (reply.shape.form, outcome.as_ref().err(), sent_bytes);
            let counts = (&self.counts, counted, self.last_call);
            (self.access).answered(Some(&*connection), answer, counts);
        }
    }

    /// Returns the properties of the answer at a position. The last HTTP answer says that the connection closes.
    pub(super) fn answer_context(
        &self,
        connection: &mut Connection,
        reply: PendingAnswer,
    ) -> AnswerContext<'static> {
        let is_http = matches!(reply.shape.wrap, Framing::Http(_));
        let last = is_http && connection.is_last(reply.place);
        if last && self.stopping {
            connection.phase = ConnectionPhase::Closing;
            connection.ends_by(CloseReason::Stop);
        }
        AnswerContext {
            last,
            closing: connection.phase != ConnectionPhase::Open,
            ours: false,
            http: ResponseContext {
                origins: self.origins,
                date: HttpDate(if is_http { process::unix_seconds() } else { 0 }),
            },
        }
    }

    /// Writes an answer to the output if it is its turn, or keeps it in its connection or batch. `write` gets the
    /// tracing of calls, which has their ids, and the number of the last call.
    pub(super) fn write(
        &mut self,
        connection: &mut Connection,
        reply: PendingAnswer,
        write: impl FnOnce(&mut Vec<u8>, &CallTracing, u64),
    ) {
        if let AnswerPosition::Member(key) = reply.place {
            let write = |out: &mut Vec<u8>| write(out, &self.tracing, self.last_call);
            if let Some(batch) = connection.member(key, write) {
                let about = self.answer_context(connection, batch.reply);
                let shape = batch.reply.shape;
                self.append_in_order(connection, batch.reply, |out, _, _| {
                    shape.batch(out, about, &batch.out);
                });
            }
            return;
        }
        self.append_in_order(connection, reply, write);
    }

    fn append_in_order(
        &mut self,
        connection: &mut Connection,
        PendingAnswer { place, mark, .. }: PendingAnswer,
        write: impl FnOnce(&mut Vec<u8>, &CallTracing, u64),
    ) {
        if connection.is_next(place) {
            write(&mut self.out, &self.tracing, self.last_call);
            let journal = &mut self.journal;
            journal.answers(mark);
            connection.answered(place, &mut self.out, |mark| journal.answers(mark));
        } else {
            let mut answer = Vec::new();
            write(&mut answer, &self.tracing, self.last_call);
            connection.queue_answer(place, answer, mark);
        }
    }
}
