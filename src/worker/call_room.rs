//! Room for calls: whether the limits of a method allow one more, and who makes room in a full queue.

use std::time::Duration;

use super::call_scheduler::CallScheduler;
use super::call_table::ScheduledCall;
use super::lane::{Lane, MOST_BYTES};
use super::shares::{Shares, Source};
use super::threads::Done;
use super::timers::CallKey;
use crate::logging::pluralize;
use crate::protocol::rpc_error::RpcError;
use crate::sys::event::Token;

/// Whether `concurrency` and `rate` of a method allow one more call of a source, and it is the turn of that
/// source.
///
/// # Errors
/// `overloaded`.
pub fn check_limits(
    calls: &mut CallScheduler,
    method: usize,
    source: Source,
    now_ms: u64,
) -> Result<(), RpcError> {
    let (concurrency, rate) = {
        let method = &calls.registry.methods()[method];
        (method.concurrency, method.rate)
    };
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
        format!("its concurrency of {concurrency} in this worker is reached")
    } else {
        let rate = pluralize(rate as usize, "call", "calls");
        format!("its rate of {rate} a second in this worker is reached")
    };
    let kept = match free.min(allowed) {
        0 => "",
        _ => ", and the next call is one of another client that was refused",
    };
    Err(calls.overloaded(method, format!("{limit}{kept}")))
}

/// Counts a call that these limits allow, and that is taken.
pub fn count_call(calls: &mut CallScheduler, method: usize, source: Source) {
    let load = &mut calls.loads[method];
    load.count_call();
    load.turns.record_call(source);
}

/// Makes room for one more call of a method to wait, with `threads` in its lane. If all is used up, the
/// connection with the most pays with its newest calls that wait: they are added to `evicted`, to be
/// answered with the error there.
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
    let most = MOST_BYTES / calls.lanes.len();
    loop {
        // Running calls and those that begin at once do not wait.
        let lane = &calls.lanes[index];
        let begin = threads.saturating_sub(lane.lost);
        let waiting = lane.unanswered.saturating_sub(lane.sent + lane.evicted);
        let (reason, is_by_count) = if waiting >= calls.limit + begin {
            let server = if index == 0 { "thread" } else { "program" };
            let reason = format!("the queue of {} for a {server} is full", calls.limit);
            (reason, true)
        } else if lane.bytes > 0 && lane.bytes.saturating_add(size) > most {
            // If no other call waits, a call of any size is accepted.
            let reason = format!("more than {most} bytes of params would wait");
            (reason, false)
        } else {
            return Ok(());
        };
        let amount = if is_by_count { 1 } else { size };
        let paid = (shares(lane, is_by_count).payers(owner, amount))
            .find_map(|payer| newest_waiting(calls, index, payer));
        match paid {
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

/// Takes the newest call of a connection that waits in a lane out of its queue. `None` if all of its calls run.
fn newest_waiting(calls: &CallScheduler, index: usize, token: Token) -> Option<CallKey> {
    let waits = |(key, call): &(CallKey, &ScheduledCall)| {
        let is_here = call.sent_to.is_none() && calls.loads[call.method].lane == index;
        is_here
            && !(call.is_answered || call.is_evicted)
            && (call.job.is_some() || calls.lanes[index].queue.remove(*key))
    };
    Some(calls.table.of(token).find(waits)?.0)
}

/// Refuses a call that is in no queue any more. It stays in the table until it is reported.
fn evict(calls: &mut CallScheduler, index: usize, key: CallKey, reason: String) -> Done {
    let mut method = 0;
    if let Some(call) = calls.table.get_mut(key) {
        let lane = &mut calls.lanes[index];
        method = call.method;
        // It counts as one that was queued until it is reported.
        lane.local += usize::from(call.job.take().is_some());
        lane.shares.remove(call);
        call.is_evicted = true;
        lane.evicted += 1;
        lane.bytes -= std::mem::take(&mut call.size);
    }
    Done {
        key,
        outcome: Some(Err(calls.overloaded(method, reason))),
        took: Duration::ZERO,
        cpu: Duration::ZERO,
        out: None,
    }
}
