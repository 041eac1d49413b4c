//! From a body to its answer: what a worker does with each call it reads.
//!
//! Which bytes are a body is `intake`'s business. Parses, finds the method, checks the limits, runs what is inline, lets the rest wait for a
//! thread, and writes every answer. It knows one connection at a time and no socket: answers are
//! collected in `out`, and whoever called sends them, one write for a batch. Every call that was
//! taken gets exactly one answer from here.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::batch::{self, MEMBERS_PER_TURN, UntakenMembers};
use super::call_errors::{self, caller_gone, check_size};
use super::call_room;
use super::call_scheduler::{CallScheduler, FinishedCall};
use super::connection::{AnswerPosition, Connection, ConnectionPhase, HIGH_WATER, PendingAnswer};
use super::crash::journal::{CallJournal, CallRef};
use super::forwarding::Forwarding;
use super::path_listeners::PathListeners;
use super::remote_calls;
use super::shares::Shares;
use super::threads::{Done, Threads};
use super::timers::{CallKey, TimerTarget, Timers};
use super::unsent::UnsentAnswers;
use crate::config::LimitsConfig;
use crate::handler::registry::{self, Registry};
use crate::handler::{Context, Placement, guard};
use crate::link::quarantine::Quarantine;
use crate::link::scoreboard::WorkerRecord;
use crate::protocol::body::{self, Body, Form};
use crate::protocol::call::Call;
use crate::protocol::code::Code;
use crate::protocol::http::{HttpDate, ResponseContext};
use crate::protocol::reply::{AnswerContext, AnswerFormat, Framing};
use crate::protocol::rpc_error::RpcError;
use crate::protocol::{cancel, jsonrpc};
use crate::sys::event::Token;
use crate::sys::{process, signal};

#[derive(Debug)]
pub struct CallDispatcher {
    /// The methods.
    pub registry: Arc<Registry>,
    /// Calls that wait or run.
    pub calls: CallScheduler,
    /// What runs them.
    pub threads: Threads,
    /// The other workers that run calls of this one, and whose calls it runs.
    pub forwarding: Forwarding,
    /// What came back from them, and calls that made room for others: to be answered.
    pub answered_elsewhere: Vec<Done>,
    /// All deadlines of the worker.
    pub timers: Timers,
    pub limits: LimitsConfig,
    /// The listeners where HTTP requests name their method in the path alone.
    pub path_listeners: PathListeners,
    /// The origins whose web pages may call. A worker has them for life.
    pub origins: &'static [String],
    /// Connections with a batch of which not all calls are taken, in their turn.
    pub untaken_batches: VecDeque<Token>,
    /// Answers of one connection that are not sent yet.
    pub out: Vec<u8>,
    /// The time, in milliseconds (CLOCK_MONOTONIC), as of the last wake-up.
    pub now_ms: u64,
    /// For how long the bytes being read have waited for somebody to accept their connection.
    pub accept_wait_ms: u64,
    /// The longest and the last such time.
    pub longest_wait_ms: u64,
    /// See `longest_wait_ms`.
    pub last_wait_ms: u64,
    /// A stop will come: not ready for who asks, and serving.
    pub stop_pending: bool,
    /// No further call begins: the server stops.
    pub stopping: bool,
    /// Bytes of all unfinished frames, lines and requests.
    pub unfinished: usize,
    /// Who has them.
    pub unfinished_shares: Shares,
    /// Bytes of all answers that clients have not taken.
    pub unsent: UnsentAnswers,
    /// Calls read so far.
    pub read: u64,
    /// Answers that were errors so far.
    pub errors: u64,
    /// Where this worker shows what it does.
    pub record: &'static WorkerRecord,
    pub slot: u16,
    /// What is not answered yet, for the keeper.
    pub ledger: CallJournal,
    /// Calls that are not to be run; `None` without a keeper.
    pub quarantine: Option<Quarantine>,
}

impl CallDispatcher {
    /// What is read now has waited so long for somebody to accept its connection.
    pub(super) fn waited(&mut self, wait_ms: u64) {
        self.accept_wait_ms = wait_ms;
        self.last_wait_ms = wait_ms;
        self.longest_wait_ms = self.longest_wait_ms.max(wait_ms);
    }

    /// Shows to the master what this process does.
    pub fn publish(&self, connections: usize, spurious_wakes: u64) {
        let record = self.record;
        let (running, queued, lost) = self.calls.counts(&self.threads);
        record.connections.store(connections as u32, Relaxed);
        record.running.store(running as u32, Relaxed);
        record.queued.store(queued as u32, Relaxed);
        let forwarding = &self.forwarding;
        record
            .sent
            .store(remote_calls::sent(&self.calls) as u32, Relaxed);
        let for_others = forwarding.running_for_others() as u32;
        record.running_for_others.store(for_others, Relaxed);
        record.lost_threads.store(lost as u32, Relaxed);
        record.calls.store(self.read, Relaxed);
        record.errors.store(self.errors, Relaxed);
        record.spurious_wakes.store(spurious_wakes as u32, Relaxed);
        record.last_wait_ms.store(self.last_wait_ms as u32, Relaxed);
        record
            .longest_wait_ms
            .store(self.longest_wait_ms as u32, Relaxed);
        let programs_down = self.threads.programs_down();
        record.programs_down.store(programs_down as u32, Relaxed);
        let (method, since) = match self.calls.oldest(&self.threads) {
            Some((method, since)) => (method as u32 + 1, since),
            None => (0, 0),
        };
        record.oldest_since_ms.store(since, Relaxed);
        record.oldest_method.store(method, Relaxed);
    }

    /// Takes one body, which came wrapped in `wrap`.
    pub(super) fn on_body(&mut self, connection: &mut Connection, wrap: Framing, body: &[u8]) {
        match body::read(body, self.limits.depth, self.limits.batch) {
            Body::One(form, Ok(call)) => {
                let reply = self.reserve_answer(connection, wrap, form, call.id);
                self.take_call(connection, reply, &call);
            }
            Body::One(form, Err(refusal)) => {
                self.read += 1;
                let reply = self.reserve_answer(connection, wrap, form, refusal.id);
                self.answer_error(connection, reply, refusal.id, refusal.error);
            }
            Body::Batch { text, members } => self.take_batch(connection, wrap, text, &members),
        }
    }

    /// Takes the calls of a batch: each is one like any other, and its answer a part of one.
    fn take_batch(
        &mut self,
        connection: &mut Connection,
        wrap: Framing,
        text: &str,
        members: &[&str],
    ) {
        let whole = self.reserve_answer(connection, wrap, Form::JsonRpc, None);
        // Its answer is of many parts, which the ledger does not know. Only once it counts as
        // unanswered: that is how long it holds.
        self.ledger.mark_unlogged(connection);
        let batch = connection.begin_batch(whole, members.len());
        let taken = self.take_members(connection, batch, text, members.iter().copied());
        if taken < members.len() {
            let received_ms = self.now_ms - self.accept_wait_ms;
            let rest = UntakenMembers::new(batch, text, &members[taken..], received_ms);
            connection.untaken_members = Some(Box::new(rest));
            self.untaken_batches.push_back(connection.token);
        }
    }

    /// Takes the next calls of a batch that was too long to be taken at once.
    pub(super) fn resume_batch(&mut self, connection: &mut Connection) {
        let Some(mut rest) = connection.untaken_members.take() else {
            return;
        };
        // The caller's time includes that of the calls before them.
        self.accept_wait_ms = self.now_ms.saturating_sub(rest.received_ms);
        let taken = self.take_members(connection, rest.batch, &rest.text, rest.members());
        self.accept_wait_ms = 0;
        if rest.advance(taken) {
            connection.untaken_members = Some(rest);
            self.untaken_batches.push_back(connection.token);
        }
    }

    /// Takes calls of a batch, until that was work enough for one turn of the event loop. Returns how many.
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
            match call {
                Ok(call) => match self.member_refusal(connection, reply) {
                    None => self.take_call(connection, reply, &call),
                    Some(error) => {
                        self.read += 1;
                        self.answer_error(connection, reply, call.id, error);
                    }
                },
                Err(refusal) => {
                    self.read += 1;
                    self.answer_error(connection, reply, refusal.id, refusal.error);
                }
            }
            bytes += member.len() + connection.queued_bytes().saturating_sub(held);
        }
        taken
    }

    /// Why a call of a batch is not started: there is no room for its answer. A notification has none.
    fn member_refusal(&self, connection: &Connection, reply: PendingAnswer) -> Option<RpcError> {
        if reply.shape.form == Form::Notification {
            return None;
        }
        if connection.is_batch_full(reply.place) {
            return Some(batch::too_long(self.limits.frame, false));
        }
        let owner = (connection.source, connection.token);
        let waits = connection.queued_bytes() > 0 && self.unsent.blocks(owner);
        waits.then(|| call_errors::no_room(self.limits.unfinished))
    }

    /// The answers of a batch are as long as they may be: refuses its calls that have not begun.
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
                self.answer(connection, &ended, Err(error), None);
            }
        }
    }

    fn take_call(&mut self, connection: &mut Connection, reply: PendingAnswer, call: &Call<'_>) {
        self.read += 1;
        let asked_ms = call.timeout_ms;
        self.dispatch(
            connection,
            reply,
            &call.method,
            call.params,
            call.id,
            asked_ms,
        );
    }

    /// Runs a call, or lets it wait for a thread, or says why not.
    pub(super) fn dispatch(
        &mut self,
        connection: &mut Connection,
        reply: PendingAnswer,
        name: &str,
        params: &str,
        id: Option<&str>,
        asked_ms: Option<u64>,
    ) {
        if self.stopping {
            return self.answer_error(connection, reply, id, call_errors::stopping());
        }
        if connection.drops_answer(reply.shape.form) {
            return self.answer_error(connection, reply, id, caller_gone(false));
        }
        let Some(method) = self.registry.find(name) else {
            return self.dispatch_builtin(connection, reply, name, params, id);
        };
        let own_ms = millis(self.registry.methods()[method].timeout);
        let timeout_ms = asked_ms.map_or(own_ms, |asked| asked.min(own_ms));
        // Its caller counts from when it was sent, and not from when somebody came to read it.
        let timeout_ms = timeout_ms.saturating_sub(self.accept_wait_ms);
        let inline = self.registry.methods()[method].handler.placement() == Placement::Inline;
        let admitted = if timeout_ms == 0 {
            Err(call_errors::over_when_read())
        } else if inline {
            self.calls.admit(method, self.now_ms)
        } else {
            self.make_room(connection, (method, params.len()))
                .and_then(|()| self.calls.admit(method, self.now_ms))
        };
        if let Err(error) = admitted {
            return self.answer_error(connection, reply, id, error);
        }
        if let Some(quarantine) = &self.quarantine {
            let key = quarantine.key(name, params);
            if quarantine.is_quarantined(key) {
                return self.answer_error(connection, reply, id, call_errors::quarantined());
            }
            reply.mark.is_named(key, method);
        }
        let deadline_ms = self.now_ms.saturating_add(timeout_ms);
        if inline {
            return self.run_inline(connection, reply, (method, params), id, deadline_ms);
        }
        let key = self.calls.add(
            (connection.token, reply, id),
            (connection.peer, connection.source),
            (method, params),
            (self.now_ms, deadline_ms),
        );
        if let Some(added) = self.calls.get_mut(key) {
            connection.pending += added.charged_bytes;
            self.timers
                .arm(&mut added.timer, deadline_ms, TimerTarget::Call(key));
        }
    }

    /// Makes room for a call to wait, if need be at the cost of another connection that has more.
    fn make_room(
        &mut self,
        connection: &Connection,
        (method, size): (usize, usize),
    ) -> Result<(), RpcError> {
        let owner = (connection.source, connection.token);
        let threads = self.threads.crew(self.calls.lane(method));
        let evicted = &mut self.answered_elsewhere;
        call_room::make_room(&mut self.calls, (method, size), owner, threads, evicted)
    }

    /// The methods of the protocol itself.
    fn dispatch_builtin(
        &mut self,
        connection: &mut Connection,
        reply: PendingAnswer,
        name: &str,
        params: &str,
        id: Option<&str>,
    ) {
        match name {
            cancel::METHOD => self.cancel(connection, reply, id, params),
            registry::DISCOVER => {
                let registry = Arc::clone(&self.registry);
                let document = registry.document();
                let limit = self.limits.frame;
                self.compose(connection, reply, (name, id), |out| {
                    check_size(document.len(), limit)?;
                    out.extend_from_slice(document.as_bytes());
                    Ok(())
                });
            }
            _ => {
                self.answer_error(connection, reply, id, call_errors::no_method(name));
            }
        }
    }

    fn run_inline(
        &mut self,
        connection: &mut Connection,
        reply: PendingAnswer,
        (number, params): (usize, &str),
        id: Option<&str>,
        deadline_ms: u64,
    ) {
        let registry = Arc::clone(&self.registry);
        let method = &registry.methods()[number];
        let context = Context::inline(&method.name, self.slot, Duration::from_millis(deadline_ms))
            .with((id, connection.peer), registry.worker());
        // Seen by the master should this call be the last thing that the worker does.
        self.record.last_method.store(number as u32 + 1, Relaxed);
        self.record.inline_running.store(1, Relaxed);
        reply.mark.begins();
        signal::set_current_call(reply.mark.key());
        let limit = self.limits.frame;
        let name = method.handler.answer_name().unwrap_or(&method.name);
        self.compose(connection, reply, (name, id), |out| {
            let start = out.len();
            let run = || method.handler.call(params, &context, out);
            guard::run((&method.name, id), run)?;
            check_size(out.len() - start, limit)
        });
        signal::set_current_call(0);
        self.acquit(reply.mark);
        self.record.inline_running.store(0, Relaxed);
    }

    /// A call has run to its end: whatever it was suspected of, it was not that.
    #[inline]
    pub fn acquit(&self, mark: CallRef) {
        if let Some(quarantine) = &self.quarantine {
            quarantine.clear_suspicion(mark.key());
        }
    }

    /// Whether the pool process of each pool of this generation serves.
    pub fn has_all_pools(&self) -> bool {
        let pools = self.registry.pools().len();
        (1..=pools).all(|lane| self.forwarding.is_served(lane))
    }

    /// Whether the call with this key is refused. A call without a key has 0 and is not.
    pub fn is_quarantined(&self, key: u64) -> bool {
        let quarantine = self.quarantine.as_ref().filter(|_| key != 0);
        quarantine.is_some_and(|quarantine| quarantine.is_quarantined(key))
    }

    /// `rpc.cancel`: ends the call with that id, and answers whether there was one.
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
        if let Some(ended) = key.and_then(|key| self.give_up(key)) {
            let error = call_errors::cancelled(ended.begun);
            self.answer(connection, &ended, Err(error), None);
        }
        self.compose(connection, reply, (cancel::METHOD, id), |out| {
            out.extend_from_slice(if key.is_some() { b"true" } else { b"false" });
            Ok(())
        });
    }

    /// Answers a call that is not begun, in its turn; ends the connection where the code says so.
    pub(super) fn answer_error(
        &mut self,
        connection: &mut Connection,
        reply: PendingAnswer,
        id: Option<&str>,
        error: RpcError,
    ) {
        self.compose(connection, reply, ("", id), |_| Err(error));
    }

    /// Gives up a call that waits or runs, and its timer with it.
    pub fn give_up(&mut self, key: CallKey) -> Option<FinishedCall> {
        let mut ended = self.calls.give_up(key)?;
        self.timers.disarm(&mut ended.timer, TimerTarget::Call(key));
        if let Some(call) = ended.sent_to {
            self.forwarding.cancel(call);
        } else if ended.begun && self.calls.lane(ended.method) > 0 {
            self.threads.pools().give_up();
        }
        Some(ended)
    }

    /// Answers a call that had waited or run.
    pub fn answer(
        &mut self,
        connection: &mut Connection,
        ended: &FinishedCall,
        outcome: Result<Vec<u8>, RpcError>,
        out: Option<&str>,
    ) {
        connection.pending -= ended.charged_bytes;
        let registry = Arc::clone(&self.registry);
        let method = &registry.methods()[ended.method];
        let name = out.or_else(|| method.handler.answer_name());
        let name = name.unwrap_or(&method.name);
        let limit = self.limits.frame;
        self.compose(
            connection,
            ended.reply,
            (name, ended.id.as_deref()),
            |out| {
                let result = outcome?;
                check_size(result.len(), limit)?;
                out.extend_from_slice(&result);
                Ok(())
            },
        );
    }

    /// Writes one answer: the result that `fill` appends, or its error.
    fn compose(
        &mut self,
        connection: &mut Connection,
        reply: PendingAnswer,
        (name, id): (&str, Option<&str>),
        fill: impl FnOnce(&mut Vec<u8>) -> Result<(), RpcError>,
    ) {
        // A code of a handler's own does not end its caller's connection.
        let ours = name.is_empty() || self.stopping;
        let about = AnswerContext {
            ours,
            ..self.answer_context(connection, reply)
        };
        let is_member = reply.shape.wrap == Framing::Member;
        let limit = self.limits.frame;
        let mut outcome = Ok(());
        let mut is_full = false;
        self.write(connection, reply, |out| {
            outcome = reply.shape.compose(out, about, (name, id), |out| {
                fill(out)?;
                // All of a batch's answers are kept until the last one is there.
                is_full = is_member && out.len() > limit;
                match is_full {
                    true => Err(batch::too_long(limit, true)),
                    false => Ok(()),
                }
            });
        });
        if is_full {
            self.fill_batch(connection, reply.place);
        }
        if let Err(error) = &outcome {
            // An answer that nobody gets is not counted.
            self.errors += u64::from(!connection.drops_answer(reply.shape.form));
            if ours && error.table_code().is_some_and(Code::closes) {
                connection.phase = ConnectionPhase::Closing;
            }
        }
    }

    /// What the answer at a place says about the connection. A client that is told that its
    /// connection ends (HTTP alone has the words) is told in the last answer.
    pub(super) fn answer_context(
        &self,
        connection: &mut Connection,
        reply: PendingAnswer,
    ) -> AnswerContext<'static> {
        let is_http = matches!(reply.shape.wrap, Framing::Http(_));
        let last = is_http && connection.is_last(reply.place);
        if last && self.stopping {
            connection.phase = ConnectionPhase::Closing;
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

    /// Writes an answer to the output when it is its turn, else keeps it with the connection, or
    /// with the others of its batch.
    pub(super) fn write(
        &mut self,
        connection: &mut Connection,
        reply: PendingAnswer,
        write: impl FnOnce(&mut Vec<u8>),
    ) {
        if let AnswerPosition::Member(key) = reply.place {
            if let Some(batch) = connection.member(key, write) {
                let about = self.answer_context(connection, batch.reply);
                let shape = batch.reply.shape;
                self.append_in_order(connection, batch.reply, |out| {
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
        write: impl FnOnce(&mut Vec<u8>),
    ) {
        if connection.is_next(place) {
            write(&mut self.out);
            let ledger = &mut self.ledger;
            ledger.answers(mark);
            connection.answered(place, &mut self.out, |mark| ledger.answers(mark));
        } else {
            let mut answer = Vec::new();
            write(&mut answer);
            connection.queue_answer(place, answer, mark);
        }
    }
}

/// A duration in milliseconds, as long as can be said.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
