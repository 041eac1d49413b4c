//! Decides whether the limits of a method allow one more call, and which client makes room in a full queue.

use std::time::Duration;

use super::batch;
use super::call_errors;
use super::call_scheduler::CallScheduler;
use super::call_table::ScheduledCall;
use super::connection::{Connection, PendingAnswer};
use super::lane::{Lane, MOST_BYTES, MOST_ID_PARAMS, MOST_JOB_BYTES};
use super::shares::{Shares, Source};
use super::threads::Done;
use super::timers::CallKey;
use super::unsent::UnsentAnswers;
use crate::logging::pluralize;
use crate::protocol::body::Form;
use crate::protocol::call_id::CallRunner;
use crate::protocol::rpc_error::RpcError;
use crate::sys::event::Token;

/// Checks that `concurrency` and `rate` of a method allow one more call, and that it is the turn of its source.
///
/// # Errors
/// `overloaded` if not.
pub fn check_limits(
    calls: &mut CallScheduler,
    method: usize,
    source: Source,
    now_ms: u64,
) -> Result<(), RpcError> {
    let (concurrency, rate) = limits(calls, method);
    if concurrency == 0 && rate == 0 {
        return Ok(());
    }
    let load = &mut calls.loads[method];
    let free = match concurrency {
        0 => usize::MAX,
        most => most.saturating_sub(load.current),
    };
    let allowed = match rate {
        0 => usize::MAX,
        rate => load.allowed(rate, now_ms),
    };
    if load.turns.is_next(source, free.min(allowed), now_ms) {
        return Ok(());
    }
    load.turns.refuse(source, now_ms);
    let limit = if free <= allowed {
        format!("its concurrency of {concurrency} in this worker")
    } else {
        let rate = pluralize(rate as usize, "call", "calls");
        format!("its rate of {rate} a second in this worker")
    };
    let reason = match free.min(allowed) {
        0 => format!("{limit} is reached"),
        _ => format!(
            "the next free place of {limit} is kept for another client that was refused before"
        ),
    };
    Err(calls.overloaded(method, reason))
}

/// Returns `concurrency` and `rate` of a method.
fn limits(calls: &CallScheduler, method: usize) -> (usize, u32) {
    let method = &calls.registry.methods()[method];
    (method.concurrency, method.rate)
}

/// Returns whether `concurrency` and `rate` of a method allow the attempt of a job. No place is kept for a refused
/// attempt, because calls go before jobs.
pub fn allows_attempt(calls: &mut CallScheduler, method: usize, now_ms: u64) -> bool {
    let (concurrency, rate) = limits(calls, method);
    let load = &mut calls.loads[method];
    let has_place = concurrency == 0 || load.current < concurrency;
    has_place && (rate == 0 || load.allowed(rate, now_ms) > 0)
}

/// Counts an attempt that begins. Call it after `allows_attempt`.
pub fn count_attempt(calls: &mut CallScheduler, method: usize) {
    let load = &mut calls.loads[method];
    load.count_call();
    load.current += 1;
}

/// Counts a call that is taken. Call it after `check_limits`.
pub fn count_call(calls: &mut CallScheduler, method: usize, source: Source) {
    let load = &mut calls.loads[method];
    load.count_call();
    load.turns.record_call(source);
}

/// Returns why a call of a batch is not started: there is no room for its answer. `limit` is `limits.frame`.
pub fn batch_refusal(
    connection: &Connection,
    reply: PendingAnswer,
    unsent: &UnsentAnswers,
    limit: usize,
) -> Option<RpcError> {
    if reply.shape.form == Form::Notification {
        return None;
    }
    if connection.is_batch_full(reply.place) {
        return Some(batch::too_long(limit, false));
    }
    let owner = (connection.source, connection.token);
    let waits = connection.queued_bytes() > 0 && unsent.blocks_batch(owner);
    waits.then(|| call_errors::no_room(unsent.batch_limit()))
}

/// Makes room for one more waiting call of a method, with `size` bytes. `threads` is the number of threads of its lane.
/// If there is no room, the newest waiting calls of the connection with the largest share are evicted. They are
/// added to `evicted`, and the caller answers them with the error there.
///
/// # Errors
/// `overloaded` if no other connection has more than the caller.
pub fn make_room(
    calls: &mut CallScheduler,
    (method, size): (usize, usize),
    owner: (Source, Token),
    threads: usize,
    evicted: &mut Vec<Done>,
) -> Result<(), RpcError> {
    let index = calls.loads[method].lane;
    let (most, size) = match calls.registry.jobs_lane() == Some(index) {
        true => {
            let counted = calls.registry.counted_size(method, size);
            if counted == 0 && size > MOST_ID_PARAMS {
                let text = format!(
                    "params and id of this call have {size} bytes: at most {MOST_ID_PARAMS}, because it only names a job"
                );
                return Err(RpcError::invalid_params(text));
            }
            (MOST_JOB_BYTES, counted)
        }
        false => (MOST_BYTES / calls.lanes.len(), size),
    };
    loop {
        // Running calls and those that begin at once do not wait.
        let lane = &calls.lanes[index];
        let begin = threads.saturating_sub(lane.orphaned);
        let waiting = lane.unanswered.saturating_sub(lane.sent + lane.evicted);
        let (reason, is_by_count) = if waiting >= calls.limit + begin {
            let server = match index {
                0 => "thread",
                _ if calls.registry.jobs_lane() == Some(index) => "jobs process",
                _ => "program",
            };
            let reason = format!("the queue of {} for a {server} is full", calls.limit);
            (reason, true)
        } else if lane.bytes > 0 && lane.bytes.saturating_add(size) > most {
            // If no other call waits, a call of any size is accepted.
            let reason = format!("the params of open calls would exceed {most} bytes");
            (reason, false)
        } else {
            return Ok(());
        };
        let amount = if is_by_count { 1 } else { size };
        let evictable = (shares(lane, is_by_count).victims(owner, amount))
            .find_map(|victim| newest_waiting(calls, index, victim));
        match evictable {
            Some(key) => evicted.push(evict(calls, index, key, reason)),
            None => return Err(calls.overloaded(method, reason)),
        }
    }
}

fn shares(lane: &Lane, is_by_count: bool) -> &Shares {
    match is_by_count {
        true => &lane.shares.calls,
        false => &lane.shares.bytes,
    }
}

/// Takes the newest waiting call of a connection out of the queue of a lane. Returns `None` if no call of the
/// connection waits in that queue.
fn newest_waiting(calls: &CallScheduler, index: usize, token: Token) -> Option<CallKey> {
    let waits = |(key, call): &(CallKey, &ScheduledCall)| {
        let is_here = call.sent_to.is_none() && calls.loads[call.method].lane == index;
        is_here
            && !(call.is_answered || call.is_evicted)
            && (call.to_run.is_some() || calls.lanes[index].queue.remove(*key))
    };
    Some(calls.table.of(token).find(waits)?.0)
}

/// Refuses a call that is in no queue any more. It stays in the table until it is reported.
fn evict(calls: &mut CallScheduler, index: usize, key: CallKey, reason: String) -> Done {
    let mut method = 0;
    if let Some(call) = calls.table.get_mut(key) {
        let lane = &mut calls.lanes[index];
        method = call.method;
        // Until it is reported, it counts as a call that was queued.
        lane.local += usize::from(call.to_run.take().is_some());
        lane.shares.remove(call);
        call.is_evicted = true;
        lane.evicted += 1;
        lane.bytes -= std::mem::take(&mut call.size);
    }
    Done {
        key,
        outcome: Some(Err(calls.overloaded(method, reason))),
        took: Duration::ZERO,
        runner: CallRunner::default(),
        out: None,
    }
}
