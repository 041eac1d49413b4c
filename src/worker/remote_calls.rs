//! Calls that other processes run for this one, and theirs that run here.

use std::sync::Arc;
use std::time::Duration;

use super::call_scheduler::{CallScheduler, FinishedCall};
use super::call_table::{RemoteCall, ScheduledCall};
use super::connection::PendingAnswer;
use super::fair_queue::Waiting;
use super::lane::Lane;
use super::method_stats;
use super::run_queue;
use super::shares::Source;
use super::threads::{HandlerCall, Threads};
use super::timers::CallKey;
use crate::handler::CallState;
use crate::link::call_frame::CallFrame;
use crate::sys::event::Token;

/// How many calls of a lane could begin here now.
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

/// How many calls of a lane wait that another process could run, and that no thread of this one will
/// soon begin.
pub fn sendable(calls: &CallScheduler, lane: usize, threads: &Threads, now_ms: u64) -> usize {
    let Lane { queue, local, .. } = &calls.lanes[lane];
    match local.saturating_sub(threads.count(lane)) {
        0 => 0,
        waiting => queue.sendable(now_ms).min(waiting),
    }
}

/// How many short calls of other workers handler threads would begin soon, beside those that could begin
/// now.
pub fn room_for_short(calls: &CallScheduler) -> usize {
    calls.lanes[0].queue.room_for_short()
}

/// Whether a handler thread may begin a call of this method soon, though none is idle.
pub fn begins_soon(calls: &CallScheduler, method: usize) -> bool {
    run_queue::is_short(calls.loads[method].expected()) && room_for_short(calls) > 0
}

/// Takes out the calls of other workers that no thread will begin soon. They are over here.
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

/// How many calls other processes run for this one.
pub fn sent(calls: &CallScheduler) -> usize {
    calls.lanes.iter().map(|lane| lane.sent).sum()
}

/// The next call that another process is to run, taken out of its queue; `None` if none may, or the next
/// one is not short and `only_short` is set. `send` is to follow.
///
/// # Errors
/// A call that could not be done in time any more: it is to be given up.
pub fn next_to_send(
    calls: &mut CallScheduler,
    lane: usize,
    only_short: bool,
    now_ms: u64,
) -> Result<Option<CallKey>, CallKey> {
    let queue = &calls.lanes[lane].queue;
    let Some(job) = queue.next_to_send(only_short, now_ms)? else {
        return Ok(None);
    };
    calls.lanes[lane].local -= 1;
    let key = job.key;
    if let Some(call) = calls.table.get_mut(key) {
        call.job = Some(job);
    }
    Ok(Some(key))
}

/// Another process runs a call. Returns what is to be sent; `None` if it was given up meanwhile.
pub fn send(calls: &mut CallScheduler, key: CallKey, to: RemoteCall) -> Option<&HandlerCall> {
    let call = calls.table.get_mut(key)?;
    if !call.state.begin_elsewhere() {
        return None;
    }
    call.sent_to = Some(to);
    calls.lanes[calls.loads[call.method].lane].sent += 1;
    calls.table.get(key)?.job.as_ref()
}

/// Another process could not begin a call: it waits again where it was.
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

/// Runs a call of another worker, which knows it by `number`. To be called only if the lane has
/// capacity.
pub fn run_for_peer(
    calls: &mut CallScheduler,
    (link, number): (Token, u64),
    call: &CallFrame<'_>,
    reply: PendingAnswer,
    threads: &mut Threads,
    now_ms: u64,
) -> CallKey {
    let method = call.method as usize;
    let size = call.params.len() + call.client_id.as_deref().map_or(0, str::len);
    let id: Option<Arc<str>> = call.client_id.as_deref().map(Arc::from);
    let state = Arc::new(CallState::shown(reply.mark.begun(), call.key));
    let key = calls.table.insert(ScheduledCall {
        token: link,
        reply,
        id: id.clone(),
        source: Source::Unknown,
        method,
        read_ms: now_ms,
        deadline_ms: call.deadline_ms,
        timer: 0,
        size,
        charged_bytes: 0,
        job: None,
        state: Arc::clone(&state),
        sent_to: None,
        number_at_home: number,
        is_answered: false,
        is_evicted: false,
        is_orphaned: false,
    });
    let job = HandlerCall {
        key,
        method,
        params: call.params.as_ref().into(),
        id,
        peer: call.peer,
        expected: calls.loads[method].expected(),
        deadline: Duration::from_millis(call.deadline_ms),
        state,
    };
    let waiting = calls.waiting(key).map(|waiting| Waiting {
        client: call.client,
        ..waiting
    });
    let lane = calls.loads[method].lane;
    calls.lanes[lane].unanswered += 1;
    calls.lanes[lane].bytes += size;
    calls.lanes[lane].local += 1;
    if lane == 0 {
        let call = waiting.map(|waiting| (waiting, job));
        calls.lanes[0].queue.put(call, now_ms);
    } else {
        calls.with_programs.push_back(key);
        threads.pools().put(0, job);
    }
    key
}
