//! Sends calls to other processes, and answers those that they have sent.
//!
//! It runs once per turn of the event loop, after this worker's own threads got calls: a call is sent only if no thread
//! here can begin it. A draining worker sends calls only to pool processes and the jobs process. It returns calls of
//! others, and finishes those that have begun.
//! `peer_frames` handles what the others send.

use std::borrow::Cow;
use std::time::Duration;

use super::attempts::running as attempts;
use super::call_dispatcher::CallDispatcher;
use super::call_errors::check_size;
use super::call_scheduler::FinishedCall;
use super::call_table::ScheduledCall;
use super::job_calls;
use super::peer::{Load, place};
use super::remote_calls;
use super::threads::Done;
use super::timers::{CallKey, TimerTarget};
use crate::handler::job_methods::JobMethod;
use crate::link::call_frame::AnswerFrame;
use crate::link::scoreboard::LANES;
use crate::protocol::call_id::CallRunner;
use crate::protocol::code::Code;
use crate::protocol::rpc_error::RpcError;
use crate::sys::event::{Reactor, Token};

/// Publishes the load of this process, sends waiting calls to processes with capacity, and offers
/// capacity to those with waiting calls. Returns a call that would miss its deadline: give it up and call
/// this again.
#[must_use]
pub fn exchange(
    service: &mut CallDispatcher,
    (is_serving, is_leaving): (bool, bool),
) -> Option<CallKey> {
    let now_ms = service.now_ms;
    let is_due = service.forwarding.recheck_ms.is_some_and(|at| at <= now_ms);
    if is_due {
        service.forwarding.recheck_ms = None;
    }
    if is_leaving {
        service.forwarding.leave(now_ms);
        job_calls::answer_waits(service);
    }
    let load = load(service, (is_serving, is_leaving));
    let has_more = service.forwarding.show(load);
    service.forwarding.owes_offer |= is_due | has_more;
    if load.waiting != [0; LANES] {
        for lane in lanes_to_send(service, is_serving) {
            if let Some(late) = send_waiting(service, lane) {
                return Some(late);
            }
        }
        let load = self::load(service, (is_serving, is_leaving));
        service.forwarding.show(load);
    }
    if is_serving && load.idle == 0 {
        service.forwarding.prepare_links(now_ms);
    }
    return_waiting(service);
    let owes_offer = std::mem::take(&mut service.forwarding.owes_offer) && load.idle > 0;
    if is_serving && (owes_offer || service.forwarding.may_offer_short(now_ms)) {
        let is_repeated = is_due && !has_more || !owes_offer;
        offer(service, load.idle as usize, is_repeated);
    }
    None
}

/// Returns the lanes whose calls may be sent. Pools that belong to a connection are left out. In a drain these are only
/// the lanes of pool processes and of the jobs process.
pub fn lanes_to_send(
    service: &CallDispatcher,
    is_serving: bool,
) -> impl Iterator<Item = usize> + use<> {
    let lanes = service.calls.lanes();
    let shared = service.registry.shared_lanes();
    shared.filter(move |lane| *lane < lanes && (is_serving || *lane > 0))
}

/// Returns the load to publish. It is zero before this process serves.
fn load(service: &CallDispatcher, (is_serving, is_leaving): (bool, bool)) -> Load {
    let mut load = Load::default();
    if is_serving || is_leaving {
        for lane in lanes_to_send(service, is_serving) {
            load.waiting[place(lane)] += sendable(service, lane) as u32;
        }
    }
    if is_serving {
        load.idle =
            remote_calls::idle(&service.calls, service.forwarding.lane, &service.threads) as u32;
    }
    load
}

pub fn sendable(service: &CallDispatcher, lane: usize) -> usize {
    remote_calls::sendable(&service.calls, lane, &service.threads, service.now_ms)
}

/// Sends waiting calls of a lane as long as there is capacity for them. Returns a call that would miss its deadline.
pub fn send_waiting(service: &mut CallDispatcher, lane: usize) -> Option<CallKey> {
    while sendable(service, lane) > 0
        && let Some(peer) = service.forwarding.find_idle(lane, service.now_ms)
    {
        match send_next(service, lane, peer, false) {
            SendOutcome::Call => {}
            SendOutcome::Nothing => return None,
            SendOutcome::Late(late) => return Some(late),
        }
    }
    None
}

/// What `send_next` has done.
pub enum SendOutcome {
    Call,
    Nothing,
    /// The next call would miss its deadline.
    Late(CallKey),
}

/// Sends the next waiting call of a lane to another process. If `only_short`, it sends only a short call.
pub fn send_next(
    service: &mut CallDispatcher,
    lane: usize,
    peer: usize,
    only_short: bool,
) -> SendOutcome {
    let now_ms = service.now_ms;
    let key = match remote_calls::next_to_send(&mut service.calls, lane, only_short, now_ms) {
        Ok(Some(key)) => key,
        Ok(None) => return SendOutcome::Nothing,
        Err(late) => return SendOutcome::Late(late),
    };
    let origin = service.calls.origin(key);
    let job = (service.calls.get(key)).and_then(|call| service.registry.job_method(call.method));
    let Some((to, call)) = remote_calls::send(&mut service.calls, key, peer) else {
        return SendOutcome::Nothing;
    };
    if !service.forwarding.send(to, origin, call, job) {
        // No call within limits.frame is too long for a frame.
        remote_calls::take_back(&mut service.calls, key);
        return SendOutcome::Nothing;
    }
    service.counts.count_forwarded(lane);
    SendOutcome::Call
}

/// Returns calls of other workers that wait behind long calls, because another worker may have capacity.
fn return_waiting(service: &mut CallDispatcher) {
    for (key, mut ended) in remote_calls::take_foreign_back(&mut service.calls) {
        let target = TimerTarget::Call(key);
        service.timers.disarm(&mut ended.timer, target);
        service.journal.forget(ended.reply.mark);
        if attempts::return_attempt(service, key) {
            continue;
        }
        if let Some(link) = ended.token.process() {
            service.forwarding.return_call(link, ended.number);
        }
    }
}

fn offer(service: &mut CallDispatcher, idle: usize, is_repeated: bool) {
    let now_ms = service.now_ms;
    let short = match service.forwarding.lane {
        0 => remote_calls::room_for_short(&service.calls),
        _ => 0,
    };
    let which = (is_repeated, attempts::has_place(service));
    let waiting = (service.forwarding).find_waiting(idle.max(short), which, now_ms);
    let share = |count: usize| count.div_ceil(waiting.len().max(1));
    let shares = (share(idle), share(short));
    for peer in waiting {
        service.forwarding.offer(peer, shares, now_ms);
    }
}

/// Returns the calls of a connection that are cancelled when it ends: all but enqueues. These are sent when the jobs
/// process can take them, and again if that exits before its answer.
pub fn cancellable(
    service: &CallDispatcher,
    token: Token,
) -> impl Iterator<Item = (CallKey, &ScheduledCall)> {
    let is_enqueue = |method| service.registry.job_method(method) == Some(JobMethod::Enqueue);
    let calls = service.calls.of(token);
    calls.filter(move |(_, call)| !is_enqueue(call.method))
}

/// Sends the answer to a call of another worker.
pub fn answer(
    service: &mut CallDispatcher,
    ended: &FinishedCall,
    outcome: Result<Vec<u8>, RpcError>,
    (took, runner, name): (Duration, CallRunner, Option<&str>),
) {
    service.journal.forget(ended.reply.mark);
    let limit = service.limits.frame;
    let outcome = outcome
        .and_then(|result| check_size(result.len(), limit).map(|()| result))
        .or_else(|error| {
            let length = error.message.len() + error.data.as_ref().map_or(0, |it| it.get().len());
            check_size(length, limit).and(Err(error))
        });
    if let Some(link) = ended.token.process() {
        service.forwarding.answer(
            link,
            AnswerFrame {
                id: ended.number,
                took_us: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
                runner,
                name: name.map(Cow::Borrowed),
                outcome: outcome.map(Cow::Owned).map_err(Cow::Owned),
            },
        );
    }
}

/// Handles the end of another process: answers the calls that it ran with `crashed`, unless they can be repeated, and
/// cancels its own.
pub fn end(service: &mut CallDispatcher, link: usize, reactor: &mut Reactor) {
    let Some(peer) = service.forwarding.remove(link, reactor) else {
        return;
    };
    for key in peer.sent.into_values() {
        if job_calls::wait_again(service, key) {
            remote_calls::take_back(&mut service.calls, key);
            continue;
        }
        let text = "the process that ran it has ended";
        service.answered_elsewhere.push(Done {
            key,
            outcome: Some(Err(RpcError::of(Code::Crashed, text, true))),
            took: Duration::ZERO,
            runner: CallRunner::default(),
            out: None,
        });
    }
    for key in peer.running.into_values() {
        if let Some(ended) = service.give_up(key) {
            service.journal.forget(ended.reply.mark);
        }
    }
    attempts::link_ended(service, link);
    // The capacity that was offered to it is available for others now.
    service.forwarding.recheck_ms = Some(service.now_ms);
}
