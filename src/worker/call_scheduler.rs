//! The calls of a worker that are for its threads: which wait, which run, which are over.
//!
//! The event loop decides; threads only get what is handed to them. `queue` says which call is next. A
//! few short calls are handed out ahead, so that no thread is idle while the loop is busy. An entry lives
//! until its thread has reported. The handler threads and each pool have a lane of their own.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

pub use super::call_table::FinishedCall;
use super::call_table::{CallTable, RemoteCall, ScheduledCall};
use super::connection::{AnswerPosition, HIGH_WATER, PendingAnswer};
use super::method_stats::{self, MethodStats};
use super::queue::{Lane, Waiting};
use super::threads::{Done, HandlerCall, Threads};
use super::timers::CallKey;
use crate::handler::CallState;
use crate::handler::registry::{Method, Registry};
use crate::link::call_frame::CallFrame;
use crate::logging::pluralize;
use crate::protocol::cancel;
use crate::protocol::code::Code;
use crate::protocol::rpc_error::RpcError;
use crate::sys::event::Token;

/// A result from here up counts as large: how many of its like run for one connection is limited.
const LARGE: usize = 16 * 1024;

/// Calls that are handed out ahead at most, so that no thread need wait for the loop.
const MOST_AHEAD: usize = 64;

/// Bytes of params that may wait or run in a worker, of all its connections together; each lane has
/// an equal part of that.
const MOST_BYTES: usize = 64 * 1024 * 1024;

#[derive(Debug)]
pub struct CallScheduler {
    table: CallTable,
    /// By the lane of a method: each has its own queue, its own limit and its own threads.
    lanes: Vec<Lane>,
    /// Taken out of the queue because their connection has answers enough to send, until that
    /// changes.
    blocked_on_output: HashMap<Token, Vec<Waiting>>,
    loads: Vec<MethodStats>,
    registry: Arc<Registry>,
    limit: usize,
}

impl CallScheduler {
    /// An empty table that lets `limit` calls wait in each lane.
    pub fn new(registry: Arc<Registry>, limit: usize) -> Self {
        let load = |method: &Method| MethodStats::in_lane(method.handler.placement().lane());
        let loads: Vec<MethodStats> = registry.methods().iter().map(load).collect();
        let last = loads.iter().map(|load| load.lane).max().unwrap_or(0);
        CallScheduler {
            table: CallTable::default(),
            lanes: (0..=last).map(|_| Lane::default()).collect(),
            blocked_on_output: HashMap::new(),
            loads,
            registry,
            limit,
        }
    }

    /// Whether the rate of a method allows one more call now; counts it.
    ///
    /// # Errors
    /// `overloaded`.
    pub fn admit(&mut self, method: usize, now_ms: u64) -> Result<(), RpcError> {
        let rate = self.registry.methods()[method].rate;
        if rate == 0 || self.loads[method].admit(rate, now_ms) {
            return Ok(());
        }
        let rate = pluralize(rate as usize, "call", "calls");
        Err(self.overloaded(method, format!("its rate of {rate} a second is reached")))
    }

    /// The lane of a method's calls.
    pub fn lane(&self, method: usize) -> usize {
        self.loads[method].lane
    }

    fn lane_of(&mut self, method: usize) -> &mut Lane {
        &mut self.lanes[self.loads[method].lane]
    }

    /// Whether there is room for one more call of a method to wait, with so many threads in its
    /// lane.
    ///
    /// # Errors
    /// `overloaded`.
    pub fn has_room(&self, method: usize, size: usize, threads: usize) -> Result<(), RpcError> {
        let concurrency = self.registry.methods()[method].concurrency;
        if concurrency > 0 && self.loads[method].current >= concurrency {
            let reason = format!("its concurrency of {concurrency} in this worker is reached");
            return Err(self.overloaded(method, reason));
        }
        // Those that run, and those that will begin at once, do not wait.
        let lane = &self.lanes[self.loads[method].lane];
        let begin = threads.saturating_sub(lane.lost);
        if lane.waiting - lane.sent >= self.limit + begin {
            let server = match self.loads[method].lane {
                0 => "thread",
                _ => "program",
            };
            let reason = format!("the queue of {} for a {server} is full", self.limit);
            return Err(self.overloaded(method, reason));
        }
        // One of any size is taken where there is no other.
        let most = MOST_BYTES / self.lanes.len();
        if lane.bytes > 0 && lane.bytes.saturating_add(size) > most {
            let reason = format!("more than {most} bytes of params would wait");
            return Err(self.overloaded(method, reason));
        }
        Ok(())
    }

    fn overloaded(&self, method: usize, reason: String) -> RpcError {
        let name = self.registry.name(method);
        let text = format!("{name} is refused: {reason}; try again later");
        RpcError::of(Code::Overloaded, text, false)
    }

    /// Lets a call wait.
    pub fn add(
        &mut self,
        (token, reply, id): (Token, PendingAnswer, Option<&str>),
        peer: Option<SocketAddr>,
        (method, params): (usize, &str),
        (read_ms, deadline_ms): (u64, u64),
    ) -> CallKey {
        let size = params.len() + id.map_or(0, str::len);
        // Large results are taken for what the last one was: calls ahead, whose answers are not
        // fetched, cost room as well.
        let result = self.loads[method].last_result;
        let weight = size + if result < LARGE { 0 } else { result };
        let key = self.table.insert(ScheduledCall {
            token,
            reply,
            id: id.map(Arc::from),
            peer,
            method,
            read_ms,
            deadline_ms,
            timer: 0,
            size,
            charged_bytes: weight,
            params: Some(params.into()),
            state: Arc::new(CallState::shown(reply.mark.begun(), reply.mark.key())),
            handed_out: false,
            sent_to: None,
            number_at_home: 0,
            is_answered: false,
            is_orphaned: false,
        });
        self.enqueue(key, read_ms);
        let lane = self.lane_of(method);
        lane.waiting += 1;
        lane.bytes += size;
        self.loads[method].current += 1;
        key
    }

    /// Puts a call of the table into the queue of its lane.
    fn enqueue(&mut self, key: CallKey, now_ms: u64) {
        let Some(call) = self.table.get(key) else {
            return;
        };
        let waiting = Waiting {
            key,
            method: call.method,
            token: call.token,
            in_order: call.reply.place != AnswerPosition::Anywhere,
            since_ms: call.read_ms,
            deadline_ms: call.deadline_ms,
            // The limit counts the calls of one worker on its own threads.
            can_be_sent: call.is_own()
                && (self.registry.methods()[call.method].concurrency == 0
                    || self.loads[call.method].lane > 0),
        };
        self.lane_of(waiting.method).queue.push(waiting, now_ms);
    }

    /// Hands waiting calls to the threads, as long as one of them could soon be idle. `backlog`
    /// tells how many bytes of answers a connection has yet to send before such a call's. Returns
    /// a call that could not be done in time any more, where it comes upon one: it is to be given
    /// up, and the rest to be handed out then.
    pub fn hand_out(
        &mut self,
        threads: &mut Threads,
        now_ms: u64,
        backlog: impl Fn(Token, AnswerPosition) -> usize,
    ) -> Option<CallKey> {
        let late = (0..self.lanes.len())
            .find_map(|lane| self.hand_out_lane(lane, threads, now_ms, &backlog));
        threads.ring();
        late
    }

    fn hand_out_lane(
        &mut self,
        lane: usize,
        threads: &mut Threads,
        now_ms: u64,
        backlog: &impl Fn(Token, AnswerPosition) -> usize,
    ) -> Option<CallKey> {
        let count = threads.crew(lane);
        while let Some(&next) = self.lanes[lane].queue.next(now_ms)
            && self.may_go_out(lane, next.method, threads)
        {
            if next.is_late(now_ms, self.time_needed(lane, next.method, count)) {
                self.lanes[lane].queue.runs_out(next.key, now_ms);
                return Some(next.key);
            }
            if self.take_next(lane, next, backlog) {
                self.give_to_thread(lane, next.key, threads);
            }
        }
        None
    }

    /// Takes a call out of the queue to be begun. Returns false if its answer would find no room: then
    /// it waits elsewhere for that.
    fn take_next(
        &mut self,
        lane: usize,
        next: Waiting,
        backlog: &impl Fn(Token, AnswerPosition) -> usize,
    ) -> bool {
        self.lanes[lane].queue.take(next.key);
        let Some(call) = self.table.get(next.key) else {
            return false;
        };
        let fits = !call.is_own() || self.fits(call, backlog(call.token, call.reply.place));
        if !fits {
            let blocked = self.blocked_on_output.entry(next.token).or_default();
            blocked.push(next);
        }
        fits
    }

    fn give_to_thread(&mut self, lane: usize, key: CallKey, threads: &mut Threads) {
        let Some(call) = self.table.get_mut(key) else {
            return;
        };
        let Some(params) = call.params.take() else {
            return;
        };
        call.handed_out = true;
        let job = HandlerCall {
            key,
            method: call.method,
            params,
            id: call.id.clone(),
            peer: call.peer,
            expected: self.loads[call.method].expected(),
            deadline: Duration::from_millis(call.deadline_ms),
            state: Arc::clone(&call.state),
        };
        self.lanes[lane].out += 1;
        self.lanes[lane].handed_out.push_back(key);
        threads.run(lane, job);
    }

    /// Takes calls back that were handed out ahead, because the threads are at calls that take long.
    /// They wait again, for whichever thread is free first.
    pub fn take_back_ahead(&mut self, threads: &mut Threads, now_ms: u64) {
        for job in threads.take_back_ahead() {
            let Some(call) = self.table.get_mut(job.key) else {
                continue;
            };
            let lane = self.loads[job.method].lane;
            self.lanes[lane].out -= 1;
            if call.is_answered {
                // Its caller has an answer, and no thread will report it.
                self.lanes[lane].lost -= usize::from(call.is_orphaned);
                self.lanes[lane].bytes -= call.size;
                self.loads[job.method].current -= usize::from(call.is_own());
                self.table.remove(job.key);
            } else {
                call.handed_out = false;
                call.params = Some(job.params);
                self.enqueue(job.key, now_ms);
            }
            self.tidy(lane);
        }
    }

    /// How many lanes there are.
    pub fn lanes(&self) -> usize {
        self.lanes.len()
    }

    /// How many calls of a lane could begin here now.
    pub fn idle(&self, lane: usize, threads: &Threads) -> usize {
        let lane_state = &self.lanes[lane];
        if !lane_state.queue.is_empty() {
            return 0;
        }
        let available = threads.available(lane);
        let methods = self.loads.iter().filter(|load| load.lane == lane);
        let ahead = match lane {
            0 => 0,
            _ if threads.has_parallel_programs() => 0,
            _ => method_stats::ahead_of_programs(methods, available),
        };
        (available + ahead).saturating_sub(lane_state.out)
    }

    /// How many calls of a lane wait that another worker could run.
    pub fn sendable(&self, lane: usize) -> usize {
        self.lanes[lane].queue.sendable()
    }

    /// How many calls other processes run for this one.
    pub fn sent(&self) -> usize {
        self.lanes.iter().map(|lane| lane.sent).sum()
    }

    /// The next call that another process is to run, taken out of its queue; `None` if none may. `send`
    /// is to follow.
    ///
    /// # Errors
    /// A call that cannot be done in time any more, as of `hand_out`.
    pub fn next_to_send(
        &mut self,
        lane: usize,
        threads: &Threads,
        now_ms: u64,
        backlog: &impl Fn(Token, AnswerPosition) -> usize,
    ) -> Result<Option<CallKey>, CallKey> {
        while let Some(&next) = self.lanes[lane].queue.next_to_send(now_ms) {
            // It begins at once there, so it has no turn to wait for.
            let needed = self.time_needed(lane, next.method, threads.crew(lane));
            if next.is_late(now_ms, needed) {
                self.lanes[lane].queue.runs_out(next.key, now_ms);
                return Err(next.key);
            }
            if self.take_next(lane, next, backlog) {
                return Ok(Some(next.key));
            }
        }
        Ok(None)
    }

    /// Another process runs a call. Returns the call, to be sent; `None` if it was given up meanwhile.
    pub fn send(&mut self, key: CallKey, to: RemoteCall) -> Option<&ScheduledCall> {
        let call = self.table.get_mut(key)?;
        if !call.state.begin_elsewhere() {
            return None;
        }
        call.sent_to = Some(to);
        self.lanes[self.loads[call.method].lane].sent += 1;
        self.table.get(key)
    }

    /// Another process could not begin a call: it waits again where it was.
    pub fn take_back(&mut self, key: CallKey, now_ms: u64) {
        let Some(call) = self.table.get_mut(key) else {
            return;
        };
        if call.sent_to.take().is_some() && call.state.wait_again() {
            call.state.show_waiting();
            self.lanes[self.loads[call.method].lane].sent -= 1;
            self.enqueue(key, now_ms);
        }
    }

    /// Runs a call of another worker, which knows it by `number`. To be called only if the lane has
    /// capacity.
    pub fn run_for_peer(
        &mut self,
        (link, number): (Token, u64),
        call: &CallFrame<'_>,
        reply: PendingAnswer,
        threads: &mut Threads,
        now_ms: u64,
    ) -> CallKey {
        let method = call.method as usize;
        let size = call.params.len() + call.client_id.as_deref().map_or(0, str::len);
        let key = self.table.insert(ScheduledCall {
            token: link,
            reply,
            id: call.client_id.as_deref().map(Arc::from),
            peer: call.peer,
            method,
            read_ms: now_ms,
            deadline_ms: call.deadline_ms,
            timer: 0,
            size,
            charged_bytes: 0,
            params: Some(call.params.as_ref().into()),
            state: Arc::new(CallState::shown(reply.mark.begun(), call.key)),
            handed_out: false,
            sent_to: None,
            number_at_home: number,
            is_answered: false,
            is_orphaned: false,
        });
        let lane = self.loads[method].lane;
        self.lanes[lane].waiting += 1;
        self.lanes[lane].bytes += size;
        self.give_to_thread(lane, key, threads);
        key
    }

    /// How long a call of this method is going to take until it is done, were it handed out now: what
    /// it takes, some more, for half of its like take longer, and its turn at a thread.
    fn time_needed(&self, lane: usize, method: usize, threads: usize) -> Option<Duration> {
        let expected = self.loads[method].expected()?;
        let before = (self.lanes[lane].out + 1).saturating_sub(threads);
        let turn = expected * u32::try_from(before).ok()? / u32::try_from(threads.max(1)).ok()?;
        Some(expected + expected / 4 + turn)
    }

    /// Whether a thread could take a call of this method, or will soon: so none stands idle while the
    /// loop is busy. Of what runs for long no more than there are threads are out: which goes
    /// first is decided when a thread is there for it.
    fn may_go_out(&self, lane: usize, method: usize, threads: &Threads) -> bool {
        let count = threads.count(lane);
        if self.lanes[lane].out < count {
            return true;
        }
        // A program of a pool has a call of its own ahead, and no more.
        let most = if lane == 0 { MOST_AHEAD } else { count };
        let ahead = match threads.is_blocked(lane) {
            false => self.loads[method].ahead(count, most),
            true => 0,
        };
        self.lanes[lane].out < count + ahead
    }

    /// Whether a call's answer will find room: a client that never reads must not fill the memory
    /// with answers to what it sent ahead. A result's size is known once it is there, so the last
    /// one of its method speaks for it: no more of them are made for one connection at once than
    /// may wait for it. Whoever wants more of large results at once has several connections.
    fn fits(&self, call: &ScheduledCall, backlog: usize) -> bool {
        if backlog >= HIGH_WATER {
            return false;
        }
        let expected = self.loads[call.method].last_result;
        if expected < LARGE {
            return true;
        }
        let running = (self.table.of(call.token))
            .filter(|(_, it)| !it.is_answered && (it.handed_out || it.sent_to.is_some()))
            .count();
        running == 0 || backlog + running * expected <= HIGH_WATER
    }

    /// Whether calls of any connection are held back.
    pub fn are_parked(&self) -> bool {
        !self.blocked_on_output.is_empty()
    }

    /// A connection may have room again: its calls wait where they would be without that.
    pub fn unpark(&mut self, token: Token, now_ms: u64) {
        for waiting in self.blocked_on_output.remove(&token).into_iter().flatten() {
            if self.table.get(waiting.key).is_some() {
                self.lane_of(waiting.method).queue.push(waiting, now_ms);
            }
        }
    }

    /// A thread has reported: the call that is to be answered now, if anybody still waits.
    pub fn done(&mut self, done: &Done) -> Option<FinishedCall> {
        let mut call = self.table.remove(done.key)?;
        let index = self.loads[call.method].lane;
        let lane = &mut self.lanes[index];
        match call.sent_to {
            Some(_) => lane.sent -= 1,
            None => lane.out -= 1,
        }
        lane.lost -= usize::from(call.is_orphaned);
        lane.waiting -= usize::from(!call.is_answered);
        lane.bytes -= call.size;
        let load = &mut self.loads[call.method];
        load.current -= usize::from(call.is_own());
        if let Some(outcome) = &done.outcome {
            // What was refused before it began says nothing about how long a call takes.
            if done.took > Duration::ZERO {
                load.record_run(done.took, call.is_answered);
            }
            if let Ok(result) = outcome {
                load.last_result = result.len();
            }
        }
        while let Some(&key) = self.lanes[index].handed_out.front()
            && self.table.get(key).is_none()
        {
            self.lanes[index].handed_out.pop_front();
        }
        self.tidy(index);
        if call.is_answered {
            return None;
        }
        Some(call.finish(true))
    }

    /// Gives a call up: its time is over, or the caller does not want it any more. `None` when it
    /// is over already.
    pub fn give_up(&mut self, key: CallKey) -> Option<FinishedCall> {
        let call = self.table.get_mut(key)?;
        if call.is_answered {
            return None;
        }
        call.is_answered = true;
        let begun = call.state.give_up();
        let ended = call.finish(begun);
        let (size, is_own) = (call.size, call.is_own());
        call.params = None;
        call.is_orphaned = begun && call.sent_to.is_none();
        let index = self.loads[ended.method].lane;
        self.lanes[index].waiting -= 1;
        self.lanes[index].sent -= usize::from(call.sent_to.is_some());
        if call.handed_out {
            // It lives on until its thread reports.
            self.lanes[index].lost += usize::from(begun);
        } else {
            self.lanes[index].queue.remove(key);
            self.table.remove(key);
            self.lanes[index].bytes -= size;
            self.loads[ended.method].current -= usize::from(is_own);
            self.tidy(index);
        }
        Some(ended)
    }

    /// A waiting call's time is over, or a running one's; to be told before it is given up.
    pub fn runs_out(&mut self, key: CallKey, now_ms: u64) {
        if let Some(call) = self.table.get(key) {
            let method = call.method;
            self.lane_of(method).queue.runs_out(key, now_ms);
        }
    }

    /// Drops keys whose calls are gone, once they are the most of those handed out: behind one call
    /// that never ends they would pile up for as long as the worker lives.
    fn tidy(&mut self, lane: usize) {
        let handed_out = &mut self.lanes[lane].handed_out;
        if handed_out.len() > 2 * self.table.len() + 64 {
            handed_out.retain(|key| self.table.get(*key).is_some());
        }
    }

    /// The call of a connection with this id, as JSON.
    pub fn find(&self, token: Token, id: &str) -> Option<CallKey> {
        let is_same = |own: Option<&str>, id| own.is_some_and(|own| cancel::is_same_id(own, id));
        let mut calls = self.of(token);
        Some(calls.find(|(_, call)| is_same(call.id.as_deref(), id))?.0)
    }

    /// All calls of a connection that are not over.
    pub fn of(&self, token: Token) -> impl Iterator<Item = (CallKey, &ScheduledCall)> {
        self.table.of(token).filter(|(_, call)| !call.is_answered)
    }

    /// All calls that are not over: those that wait, then those that run.
    pub fn all(&self) -> Vec<CallKey> {
        let calls = || self.table.iter().filter(|(_, call)| !call.is_answered);
        let waiting = calls().filter(|(_, call)| !call.is_running());
        let running = calls().filter(|(_, call)| call.is_running());
        waiting.chain(running).map(|(key, _)| key).collect()
    }

    /// A call, to keep its timer.
    pub fn get_mut(&mut self, key: CallKey) -> Option<&mut ScheduledCall> {
        self.table.get_mut(key)
    }

    /// Whether no call waits or runs.
    pub fn is_empty(&self) -> bool {
        self.lanes.iter().all(|lane| lane.waiting == 0)
    }

    /// How many run on a thread, wait for one, and run for nobody. Of the latter, those of the
    /// handler threads alone: a pool's program is ended then.
    pub fn counts(&self, threads: &Threads) -> (usize, usize, usize) {
        let (mut running, mut queued) = (0, 0);
        for (number, lane) in self.lanes.iter().enumerate() {
            let at_work = (lane.out - lane.lost)
                .min(threads.count(number).saturating_sub(lane.lost))
                .min(lane.waiting - lane.sent);
            running += at_work;
            queued += lane.waiting - lane.sent - at_work;
        }
        (running, queued, self.lanes[0].lost)
    }

    /// The calls that keep handler threads past their deadline and `grace_ms` beyond, with their
    /// serials.
    pub fn stuck(&self, now_ms: u64, grace_ms: u64) -> impl Iterator<Item = (u64, &ScheduledCall)> {
        self.table
            .iter()
            .filter(|(_, call)| call.is_orphaned && self.lane(call.method) == 0)
            .filter(move |(_, call)| call.deadline_ms.saturating_add(grace_ms) <= now_ms)
            .map(|(key, call)| (key.serial, call))
    }

    /// The method of the call that is the longest with the threads, and when it was read.
    pub fn oldest(&self) -> Option<(usize, u64)> {
        let oldest = |lane: &Lane| {
            let call = self.table.get(*lane.handed_out.front()?)?;
            Some((call.method, call.read_ms))
        };
        let lanes = self.lanes.iter().filter_map(oldest);
        lanes.min_by_key(|&(_, read_ms)| read_ms)
    }
}

#[cfg(test)]
#[path = "call_scheduler_tests.rs"]
mod tests;
