//! Schedules the calls of a worker that are not inline: which wait, which run, which are over.
//!
//! A call waits in the queue of its lane. Handler threads take their calls from there, and the event loop
//! removes those that it sends to other processes. An entry exists until the call was reported as done.
//! The handler threads and each pool have separate lanes.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

pub use super::call_table::FinishedCall;
use super::call_table::{CallTable, NewCall, ScheduledCall};
use super::connection::{AnswerPosition, HIGH_WATER, PendingAnswer};
use super::fair_queue::Waiting;
use super::lane::Lane;
use super::method_stats::MethodStats;
use super::run_queue::RunQueue;
use super::shares::Source;
use super::slow_log::record::ShownCall;
use super::threads::{Done, HandlerCall, Threads};
use super::timers::CallKey;
use crate::handler::CallState;
use crate::handler::registry::{Method, Registry};
use crate::handler::trace::CallIdentity;
use crate::link::call_frame::CallOrigin;
use crate::protocol::cancel;
use crate::protocol::code::Code;
use crate::protocol::rpc_error::RpcError;
use crate::sys::event::Token;

/// A result of this many bytes counts as large. Few such calls run for one connection at once.
const LARGE: usize = 16 * 1024;

#[derive(Debug)]
pub struct CallScheduler {
    pub(super) table: CallTable,
    /// By the lane of a method. Each lane has its own queue, limit and executor.
    pub(super) lanes: Vec<Lane>,
    /// In a pool process, the calls that programs have, oldest first; done ones are skipped.
    pub(super) with_programs: VecDeque<CallKey>,
    /// Calls that were read or returned in this turn, and are not in a queue yet.
    pub(super) unqueued: Vec<CallKey>,
    /// Calls in no queue, because their connection has too many unsent answers.
    blocked_on_output: HashMap<Token, Vec<CallKey>>,
    pub(super) loads: Vec<MethodStats>,
    pub(super) registry: Arc<Registry>,
    pub(super) limit: usize,
}

impl CallScheduler {
    /// Creates an empty table in which `limit` calls may wait in each lane. `threads` is the queue of the
    /// handler threads.
    pub fn new(registry: Arc<Registry>, limit: usize, threads: Arc<RunQueue>) -> Self {
        let load = |method: &Method| MethodStats::in_lane(method.handler.placement().lane());
        let loads: Vec<MethodStats> = registry.methods().iter().map(load).collect();
        let last = loads.iter().map(|load| load.lane).max().unwrap_or(0);
        CallScheduler {
            table: CallTable::default(),
            lanes: Lane::all(threads, &registry, last),
            with_programs: VecDeque::new(),
            unqueued: Vec::new(),
            blocked_on_output: HashMap::new(),
            loads,
            registry,
            limit,
        }
    }

    /// Returns the lane of a method's calls.
    pub fn lane(&self, method: usize) -> usize {
        self.loads[method].lane
    }

    fn lane_of(&mut self, method: usize) -> &mut Lane {
        &mut self.lanes[self.loads[method].lane]
    }

    pub(super) fn overloaded(&self, method: usize, reason: String) -> RpcError {
        let name = self.registry.name(method);
        let text = format!("{name} is refused: {reason}; try again later");
        RpcError::of(Code::Overloaded, text, false)
    }

    /// Adds a call that waits.
    pub fn add(
        &mut self,
        (token, reply, id, identity): (Token, PendingAnswer, Option<&str>, CallIdentity),
        (peer, source): (Option<SocketAddr>, Source),
        (method, params): (usize, &str),
        (read_ms, deadline_ms): (u64, u64),
    ) -> CallKey {
        let size = self
            .registry
            .counted_size(method, params.len() + id.map_or(0, str::len));
        // The expected size of a large result is that of the last one. It counts from now
        // on, because a client may send many calls before it reads an answer.
        let result = self.loads[method].last_result;
        let weight = size + if result < LARGE { 0 } else { result };
        let key = self.insert(NewCall {
            token,
            reply,
            id,
            source,
            peer,
            method,
            params,
            times: (read_ms, deadline_ms),
            charged_bytes: weight,
            key: reply.mark.key(),
            identity,
        });
        self.unqueued.push(key);
        self.lane_of(method).shares.add((source, token), size);
        self.loads[method].current += 1;
        key
    }

    /// Adds a call to the table and to its lane. It is in no queue yet.
    pub(super) fn insert(&mut self, new: NewCall<'_>) -> CallKey {
        let size = new.params.len() + new.id.map_or(0, str::len);
        let size = self.registry.counted_size(new.method, size);
        let state = Arc::new(CallState::shown(
            new.reply.mark.begun(),
            new.key,
            new.identity,
        ));
        let id: Option<Arc<str>> = new.id.map(Arc::from);
        let (read_ms, deadline_ms) = new.times;
        let key = self.table.insert(ScheduledCall {
            token: new.token,
            reply: new.reply,
            id: id.clone(),
            source: new.source,
            method: new.method,
            read_ms,
            read_ns: 0,
            deadline_ms,
            timer: 0,
            size,
            charged_bytes: new.charged_bytes,
            to_run: None,
            state: Arc::clone(&state),
            shown: ShownCall::default(),
            access: None,
            sent_to: None,
            is_answered: false,
            is_evicted: false,
            is_orphaned: false,
        });
        let expected = self.loads[new.method].expected();
        if let Some(call) = self.table.get_mut(key) {
            call.to_run = Some(HandlerCall {
                key,
                method: new.method,
                params: new.params.into(),
                id,
                peer: new.peer,
                expected,
                deadline: Duration::from_millis(deadline_ms),
                state,
            });
        }
        let lane = self.lane_of(new.method);
        lane.unanswered += 1;
        lane.bytes += size;
        key
    }

    /// Returns whether calls have arrived since `queue_calls`.
    pub fn has_unqueued(&self) -> bool {
        !self.unqueued.is_empty()
    }

    /// Puts the calls of this turn into their queues, except those whose answers would have no room.
    /// `backlog` returns how many bytes of answers a connection still has to send before the answer of
    /// such a call; `None` if the connection is gone, so that no answer needs room.
    pub fn queue_calls(
        &mut self,
        now_ms: u64,
        backlog: impl Fn(Token, AnswerPosition) -> Option<usize>,
    ) {
        if self.unqueued.is_empty() {
            return;
        }
        for key in std::mem::take(&mut self.unqueued) {
            // A call that was evicted meanwhile, and perhaps answered, has nothing to run.
            let Some(call) = self.table.get(key).filter(|it| it.to_run.is_some()) else {
                continue;
            };
            let backlog = backlog(call.token, call.reply.place);
            if backlog.is_some_and(|backlog| !self.fits(call, backlog)) {
                let blocked = self.blocked_on_output.entry(call.token).or_default();
                blocked.push(key);
            } else if let Some(call) = self.table.get_mut(key)
                && let Some(to_run) = call.to_run.take()
            {
                let waiting = self.waiting(key);
                let lane = self.lane_of(to_run.method);
                lane.local += 1;
                lane.batch.extend(waiting.map(|waiting| (waiting, to_run)));
            }
        }
        for lane in &mut self.lanes {
            if !lane.batch.is_empty() {
                lane.queue.put(lane.batch.drain(..), now_ms);
            }
        }
    }

    /// Returns a call as its queue needs it.
    pub(super) fn waiting(&self, key: CallKey) -> Option<Waiting> {
        let call = self.table.get(key)?;
        Some(Waiting {
            key,
            method: call.method,
            token: call.token,
            client: 0,
            in_order: call.reply.place != AnswerPosition::Anywhere,
            since_ms: call.read_ms,
            deadline_ms: call.deadline_ms,
            // The limit counts the calls of one worker on its own threads.
            can_be_sent: call.is_own()
                && (self.registry.methods()[call.method].concurrency == 0
                    || self.loads[call.method].lane > 0),
            expected: self.loads[call.method].expected(),
        })
    }

    /// Returns the number of lanes.
    pub fn lanes(&self) -> usize {
        self.lanes.len()
    }

    /// Returns whether there is room for a call's answer, because a client that never reads must not fill
    /// the memory with answers. The size of a result is unknown before the call runs, so the last result
    /// of its method is the estimate. For one connection, calls run only while
    /// their expected answers have room. A client that wants more concurrent large results needs several connections.
    fn fits(&self, call: &ScheduledCall, backlog: usize) -> bool {
        if !call.is_own() {
            return true;
        }
        if backlog >= HIGH_WATER {
            return false;
        }
        let expected = self.loads[call.method].last_result;
        if expected < LARGE {
            return true;
        }
        let queued = (self.table.of(call.token))
            .filter(|(_, it)| !it.is_answered && (it.to_run.is_none() || it.sent_to.is_some()))
            .count();
        queued == 0 || backlog + queued * expected <= HIGH_WATER
    }

    /// Returns whether calls of any connection are held back.
    pub fn are_parked(&self) -> bool {
        !self.blocked_on_output.is_empty()
    }

    /// Lets `queue_calls` check the calls of a connection that were held back, because it may have room again.
    pub fn unpark(&mut self, token: Token) {
        let blocked = self.blocked_on_output.remove(&token);
        self.unqueued.extend(blocked.into_iter().flatten());
    }

    /// Takes the waiting calls of a connection out of their queues, because it has too many unsent answers.
    /// `queue_calls` checks them again.
    pub fn park(&mut self, token: Token) {
        for lane in &mut self.lanes {
            if lane.local == 0 {
                continue;
            }
            for to_run in lane.queue.take_all_of(token) {
                lane.local -= 1;
                self.unqueued.push(to_run.key);
                if let Some(call) = self.table.get_mut(to_run.key) {
                    call.to_run = Some(to_run);
                }
            }
        }
    }

    /// Removes a call that is over. Returns it if its caller still waits for the answer.
    pub fn done(&mut self, done: &Done) -> Option<FinishedCall> {
        let mut call = self.table.remove(done.key)?;
        let index = self.loads[call.method].lane;
        let lane = &mut self.lanes[index];
        match call.sent_to {
            Some(_) => lane.sent -= 1,
            None => lane.local -= 1,
        }
        lane.orphaned -= usize::from(call.is_orphaned);
        lane.evicted -= usize::from(call.is_evicted);
        if !call.is_answered {
            lane.forget(&call);
        }
        lane.bytes -= call.size;
        let load = &mut self.loads[call.method];
        load.current -= usize::from(call.is_own());
        if let Some(outcome) = &done.outcome {
            // A call that was refused before it began gives no information about run times.
            if done.took > Duration::ZERO {
                load.record_run(done.took, call.is_answered);
                if let Some(expected) = load.expected() {
                    lane.queue.expect(call.method, expected);
                }
            }
            if let Ok(result) = outcome {
                load.last_result = result.len();
                let was_thought_small = call.charged_bytes <= call.size;
                if result.len() >= LARGE && was_thought_small && call.is_own() {
                    // The other calls of this connection had the same estimate.
                    self.park(call.token);
                }
            }
        }
        self.skip_done();
        if call.is_answered {
            return None;
        }
        let begun = call.is_running();
        Some(call.finish(begun))
    }

    /// Gives up a call that timed out or was cancelled. Returns `None` if it is already over.
    pub fn give_up(&mut self, key: CallKey) -> Option<FinishedCall> {
        let call = self.table.get_mut(key)?;
        if call.is_answered {
            return None;
        }
        call.is_answered = true;
        let begun = call.state.give_up();
        let ended = call.finish(begun);
        let (size, is_own) = (call.size, call.is_own());
        let lane = &mut self.lanes[self.loads[ended.method].lane];
        lane.forget(call);
        let is_remote = call.sent_to.is_some();
        lane.sent -= usize::from(is_remote);
        let was_queued = call.to_run.is_none() && lane.queue.remove(key);
        lane.local -= usize::from(was_queued);
        if call.to_run.take().is_none() && !was_queued {
            // It stays in the table until it is reported.
            call.is_orphaned = begun;
            lane.orphaned += usize::from(begun);
        } else {
            self.table.remove(key);
            lane.bytes -= size;
            self.loads[ended.method].current -= usize::from(is_own);
            self.skip_done();
        }
        Some(ended)
    }

    /// Records that the deadline of a call has passed. Call this before it is given up.
    pub fn record_timeout(&mut self, key: CallKey, now_ms: u64) {
        if let Some(call) = self.table.get(key) {
            let method = call.method;
            self.lane_of(method).queue.record_timeout(key, now_ms);
        }
    }

    /// Drops keys of calls that are gone: at the front, and all of them if they are the majority. Behind
    /// a call that never ends they would accumulate for the life of the process.
    fn skip_done(&mut self) {
        let (keys, table) = (&mut self.with_programs, &self.table);
        while keys.front().is_some_and(|key| table.get(*key).is_none()) {
            keys.pop_front();
        }
        if keys.len() > 2 * table.len() + 64 {
            keys.retain(|key| table.get(*key).is_some());
        }
    }

    /// Returns the call of a connection with this id, as JSON.
    pub fn find(&self, token: Token, id: &str) -> Option<CallKey> {
        let wanted = cancel::WantedId::new(id);
        let mut calls = self.of(token);
        let is_wanted = |call: &ScheduledCall| call.id.as_deref().is_some_and(|id| wanted.is(id));
        Some(calls.find(|(_, call)| is_wanted(call))?.0)
    }

    /// Returns all calls of a connection that are not over.
    pub fn of(&self, token: Token) -> impl Iterator<Item = (CallKey, &ScheduledCall)> {
        self.table.of(token).filter(|(_, call)| !call.is_answered)
    }

    /// Returns all calls that are not over: first the waiting ones, then the running ones.
    pub fn all(&self) -> Vec<CallKey> {
        let calls = || self.table.iter().filter(|(_, call)| !call.is_answered);
        let waiting = calls().filter(|(_, call)| !call.is_running());
        let running = calls().filter(|(_, call)| call.is_running());
        waiting.chain(running).map(|(key, _)| key).collect()
    }

    /// Returns a call.
    pub fn get(&self, key: CallKey) -> Option<&ScheduledCall> {
        self.table.get(key)
    }

    /// Returns where a call came from.
    pub fn origin(&self, key: CallKey) -> CallOrigin {
        self.get(key).map(ScheduledCall::origin).unwrap_or_default()
    }

    /// Returns a call for changes.
    pub fn get_mut(&mut self, key: CallKey) -> Option<&mut ScheduledCall> {
        self.table.get_mut(key)
    }

    /// Returns whether no call waits or runs.
    pub fn is_empty(&self) -> bool {
        self.lanes.iter().all(|lane| lane.unanswered == 0)
    }

    /// Returns three numbers of calls: that run, that wait, and that run although they were given up. The last one is
    /// only for handler threads, because a pool program is ended in that case.
    pub fn counts(&self, threads: &Threads) -> (usize, usize, usize) {
        let (mut running, mut queued) = (0, 0);
        for (number, lane) in self.lanes.iter().enumerate() {
            let at_work = (lane.local - lane.orphaned)
                .min(threads.count(number).saturating_sub(lane.orphaned))
                .min(lane.unanswered - lane.sent);
            running += at_work;
            queued += lane.unanswered - lane.sent - at_work;
        }
        (running, queued, self.lanes[0].orphaned)
    }

    /// Returns the oldest running call. A call that was queued just now may be about to begin.
    pub fn oldest(&self, threads: &Threads) -> Option<&ScheduledCall> {
        let on_threads = threads.calls.keys();
        let running = on_threads.chain(self.with_programs.front().copied());
        let running = running.filter_map(|key| self.table.get(key));
        let oldest = running.min_by_key(|call| call.read_ms);
        match oldest {
            None if self.lanes[0].local > 0 => self.table.get(self.lanes[0].queue.first()?),
            oldest => oldest,
        }
    }
}

#[cfg(test)]
#[path = "call_scheduler_tests.rs"]
mod tests;
