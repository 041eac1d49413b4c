//! Handles calls that other processes run for this one, and their calls and attempts of jobs that run here.

use super::call_scheduler::{CallScheduler, FinishedCall};
use super::call_table::{NewCall, RemoteCall};
use super::connection::{AnswerPosition, PendingAnswer};
use super::crash::call_record::CallRef;
use super::fair_queue::Waiting;
use super::lane::Lane;
use super::method_stats;
use super::run_queue;
use super::shares::Source;
use super::threads::{HandlerCall, Threads};
use super::timers::CallKey;
use crate::handler::trace::CallIdentity;
use crate::handler::trace::TraceSource;
use crate::link::call_frame::CallFrame;
use crate::protocol::body::Form;
use crate::protocol::reply::{AnswerFormat, Framing};
use crate::sys::event::Token;

/// Returns how many calls of a lane could begin here now.
pub fn idle(calls: &CallScheduler, lane: usize, threads: &Threads) -> usize {
    let available = threads.available(lane);
    let methods = calls.loads.iter().filter(|load| load.lane == lane);
    let ahead = match lane {
        0 => 0,
        _ if threads.has_parallel_programs() => 0,
        _ => method_stats::ahead_of_programs(methods, available),
    };
    (available + ahead).saturating_sub(calls.lanes[lane].local)
}

/// Returns how many waiting calls of a lane another process could run. Calls that a thread of this process will begin
/// soon do not count.
pub fn sendable(calls: &CallScheduler, lane: usize, threads: &Threads, now_ms: u64) -> usize {
    let Lane { queue, local, .. } = &calls.lanes[lane];
    match local.saturating_sub(threads.count(lane)) {
        0 => 0,
        waiting => queue.sendable(now_ms).min(waiting),
    }
}

/// Returns how many calls of a lane the executor of this process has.
pub fn with_executor(calls: &CallScheduler, lane: usize) -> usize {
    let Lane { queue, local, .. } = &calls.lanes[lane];
    local.saturating_sub(queue.lacking())
}

/// Takes a call of this process out of the table, for a program of this process. Call it after
/// `next_to_send`.
pub fn run_own(calls: &mut CallScheduler, lane: usize, key: CallKey) -> Option<HandlerCall> {
    let to_run = calls.table.get_mut(key)?.to_run.take()?;
    calls.lanes[lane].local += 1;
    calls.with_programs.push_back(key);
    Some(to_run)
}

/// Returns how many more short calls of other workers may wait here, because the handler threads would begin them soon.
pub fn room_for_short(calls: &CallScheduler) -> usize {
    calls.lanes[0].queue.room_for_short()
}

/// Returns whether a handler thread may begin a call of this method soon, although none is idle.
pub fn begins_soon(calls: &CallScheduler, method: usize) -> bool {
    run_queue::is_short(calls.loads[method].expected()) && room_for_short(calls) > 0
}

/// Removes the calls of other workers that no thread will begin soon. For this process they are over.
pub fn take_foreign_back(calls: &mut CallScheduler) -> Vec<(CallKey, FinishedCall)> {
    let keys = calls.lanes[0].queue.take_foreign_back();
    let ended = keys.into_iter().filter_map(|key| {
        let mut call = calls.table.remove(key)?;
        let lane = &mut calls.lanes[0];
        lane.unanswered -= 1;
        lane.local -= 1;
        lane.bytes -= call.size;
        let ended = call.finish(false);
        Some((key, ended))
    });
    ended.collect()
}

/// Returns how many calls other processes run for this one.
pub fn sent(calls: &CallScheduler) -> usize {
    calls.lanes.iter().map(|lane| lane.sent).sum()
}

/// Removes the next call for another process from its queue. Returns `None` if no call may be sent, or if
/// `only_short` is set and the next one is not short. Call `send` afterwards.
///
/// # Errors
/// A call that would miss its deadline; give it up.
pub fn next_to_send(
    calls: &mut CallScheduler,
    lane: usize,
    only_short: bool,
    now_ms: u64,
) -> Result<Option<CallKey>, CallKey> {
    let queue = &calls.lanes[lane].queue;
    let Some(to_run) = queue.next_to_send(only_short, now_ms)? else {
        return Ok(None);
    };
    calls.lanes[lane].local -= 1;
    let key = to_run.key;
    if let Some(call) = calls.table.get_mut(key) {
        call.to_run = Some(to_run);
    }
    Ok(Some(key))
}

/// Marks a call as run by the process at the other end of `link`. Returns what to send; `None` if it was given
/// up meanwhile.
pub fn send(
    calls: &mut CallScheduler,
    key: CallKey,
    link: usize,
) -> Option<(RemoteCall, &HandlerCall)> {
    let call = calls.table.get_mut(key)?;
    if !call.state.begin() {
        return None;
    }
    let to = RemoteCall {
        link,
        number: call.number(),
    };
    call.sent_to = Some(to);
    calls.lanes[calls.loads[call.method].lane].sent += 1;
    Some((to, calls.table.get(key)?.to_run.as_ref()?))
}

/// Puts a call back into its place, because another process could not begin it.
pub fn take_back(calls: &mut CallScheduler, key: CallKey) {
    let Some(call) = calls.table.get_mut(key) else {
        return;
    };
    if call.sent_to.take().is_some() && call.state.wait_again() {
        call.state.show_waiting();
        calls.lanes[calls.loads[call.method].lane].sent -= 1;
        calls.unqueued.push(key);
    }
}

/// Runs a call of another worker, which has `number` here. Call it only if the lane has capacity.
pub fn run_for_peer(
    calls: &mut CallScheduler,
    (link, number): (Token, u64),
    call: &CallFrame<'_>,
    reply: PendingAnswer,
    threads: &mut Threads,
    now_ms: u64,
) -> CallKey {
    let method = call.method as usize;
    let trace = match &call.trace {
        Some(context) => TraceSource::Given(Box::new(context.as_ref().clone())),
        None => TraceSource::Off,
    };
    let key = calls.insert(NewCall {
        token: link,
        reply,
        id: call.client_id.as_deref(),
        source: Source::Unknown,
        peer: call.peer,
        method,
        params: &call.params,
        times: (now_ms, call.deadline_ms),
        charged_bytes: 0,
        key: call.key,
        identity: CallIdentity {
            number,
            home: Some(call.id),
            trace,
            attempt: None,
        },
    });
    let to_run = calls.table.get_mut(key).and_then(|call| call.to_run.take());
    let waiting = calls.waiting(key).map(|waiting| Waiting {
        client: call.origin.client,
        ..waiting
    });
    pass_to_executor(calls, waiting, to_run, (threads, now_ms));
    key
}

/// An attempt of a job for the executor of this process.
#[derive(Debug)]
pub struct AttemptCall<'a> {
    pub method: usize,
    pub params: &'a str,
    pub deadline_ms: u64,
    /// Its key in crash reports.
    pub key: u64,
    pub identity: CallIdentity,
}

/// Runs an attempt that came over the link of `token`. Call it only if the lane has capacity.
pub fn run_attempt(
    calls: &mut CallScheduler,
    token: Token,
    attempt: AttemptCall<'_>,
    threads: &mut Threads,
    now_ms: u64,
) -> CallKey {
    let reply = PendingAnswer {
        place: AnswerPosition::Anywhere,
        shape: AnswerFormat {
            form: Form::Plain,
            wrap: Framing::Frame,
        },
        mark: CallRef::default(),
    };
    let key = calls.insert(NewCall {
        token,
        reply,
        id: None,
        source: Source::Unknown,
        peer: None,
        method: attempt.method,
        params: attempt.params,
        times: (now_ms, attempt.deadline_ms),
        charged_bytes: 0,
        key: attempt.key,
        identity: attempt.identity,
    });
    // The run times of calls say nothing about those of attempts, so none is expected, and no attempt is refused
    // because it would miss its deadline.
    let to_run = calls.table.get_mut(key).and_then(|call| call.to_run.take());
    let to_run = to_run.map(|to_run| HandlerCall {
        expected: None,
        ..to_run
    });
    let waiting = calls.waiting(key).map(|waiting| Waiting {
        deadline_ms: u64::MAX,
        expected: None,
        ..waiting
    });
    pass_to_executor(calls, waiting, to_run, (threads, now_ms));
    key
}

/// Gives a call to the handler threads or to the programs of this process.
fn pass_to_executor(
    calls: &mut CallScheduler,
    waiting: Option<Waiting>,
    to_run: Option<HandlerCall>,
    (threads, now_ms): (&mut Threads, u64),
) {
    let (Some(waiting), Some(to_run)) = (waiting, to_run) else {
        return;
    };
    let lane = calls.loads[to_run.method].lane;
    calls.lanes[lane].local += 1;
    if lane == 0 {
        calls.lanes[0].queue.put([(waiting, to_run)], now_ms);
    } else {
        calls.with_programs.push_back(to_run.key);
        threads.pools().main_mut().put(to_run);
    }
}
