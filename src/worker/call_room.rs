//! Room for calls to wait: who makes room when there are too many.

use std::time::Duration;

use super::call_scheduler::CallScheduler;
use super::call_table::ScheduledCall;
use super::lane::MOST_BYTES;
use super::shares::Source;
use super::threads::Done;
use super::timers::CallKey;
use crate::protocol::rpc_error::RpcError;
use crate::sys::event::Token;

/// Makes room for one more call of a method to wait, with `threads` in its lane. If all is used up, the
/// connection with the most pays with its newest calls that wait: they are added to `evicted`, to be
/// answered with the error there.
///
/// # Errors
/// `overloaded`, if the caller has as much as any other.
pub fn make_room(
    calls: &mut CallScheduler,
    (method, size): (usize, usize),
    owner: (Source, Token),
    threads: usize,
    evicted: &mut Vec<Done>,
) -> Result<(), RpcError> {
    let concurrency = calls.registry.methods()[method].concurrency;
    if concurrency > 0 && calls.loads[method].current >= concurrency {
        let reason = format!("its concurrency of {concurrency} in this worker is reached");
        return Err(calls.overloaded(method, reason));
    }
    let index = calls.loads[method].lane;
    let most = MOST_BYTES / calls.lanes.len();
    loop {
        // Those that run, and those that will begin at once, do not wait.
        let lane = &calls.lanes[index];
        let begin = threads.saturating_sub(lane.lost);
        let waiting = lane.unanswered.saturating_sub(lane.sent + lane.evicted);
        let (reason, is_by_count) = if waiting >= calls.limit + begin {
            let server = if index == 0 { "thread" } else { "program" };
            let reason = format!("the queue of {} for a {server} is full", calls.limit);
            (reason, true)
        } else if lane.bytes > 0 && lane.bytes.saturating_add(size) > most {
            // One of any size is taken where there is no other.
            let reason = format!("more than {most} bytes of params would wait");
            (reason, false)
        } else {
            return Ok(());
        };
        let amount = if is_by_count { 1 } else { size };
        let payer = lane.shares(is_by_count).payer(owner, amount);
        let mut paid = payer.and_then(|payer| evict(calls, index, payer));
        if payer.is_some() && paid.is_none() {
            // All of its calls run.
            let shares = calls.lanes[index].shares(is_by_count);
            let others = shares.other_payers(owner, amount);
            paid = (others.into_iter()).find_map(|other| evict(calls, index, other));
        }
        match paid {
            Some((key, of)) => evicted.push(Done {
                key,
                outcome: Some(Err(calls.overloaded(of, reason))),
                took: Duration::ZERO,
                out: None,
            }),
            None => return Err(calls.overloaded(method, reason)),
        }
    }
}

/// Takes the newest call of a connection that waits in a lane out. It stays in the table until it is
/// reported. Returns it, and its method.
fn evict(calls: &mut CallScheduler, index: usize, token: Token) -> Option<(CallKey, usize)> {
    let lane = &mut calls.lanes[index];
    let loads = &calls.loads;
    let waits = |(key, call): &(CallKey, &ScheduledCall)| {
        let is_here = call.sent_to.is_none() && loads[call.method].lane == index;
        is_here
            && !(call.is_answered || call.is_evicted)
            && (call.job.is_some() || lane.queue.remove(*key))
    };
    let (key, _) = calls.table.of(token).find(waits)?;
    let call = calls.table.get_mut(key)?;
    // It counts as one that was queued until it is reported.
    lane.local += usize::from(call.job.take().is_some());
    let owner = (call.source, call.token);
    lane.shares.0.remove(owner, 1);
    lane.shares.1.remove(owner, call.size);
    call.is_evicted = true;
    lane.evicted += 1;
    lane.bytes -= std::mem::take(&mut call.size);
    Some((key, call.method))
}
