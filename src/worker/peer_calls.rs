//! Sends calls to other workers and runs theirs.
//!
//! It runs once per turn of the event loop, after this worker's own threads got calls: a call is sent only
//! if no thread here can begin it. A draining worker sends nothing, returns calls, and finishes begun ones.

use std::borrow::Cow;
use std::ops::Range;
use std::time::Duration;

use super::call_dispatcher::CallDispatcher;
use super::call_errors::{check_size, quarantined};
use super::call_scheduler::FinishedCall;
use super::connection::{AnswerPosition, PendingAnswer};
use super::peer::{LeaveState, Load, place};
use super::remote_calls;
use super::threads::Done;
use super::timers::{CallKey, TimerTarget};
use crate::link::call_frame::{AnswerFrame, CallFrame, DecodedCallFrame, Frame};
use crate::link::scoreboard::LANES;
use crate::protocol::answer::check_forwarded;
use crate::protocol::body::Form;
use crate::protocol::code::Code;
use crate::protocol::reply::{AnswerFormat, Framing};
use crate::protocol::rpc_error::RpcError;
use crate::sys::event::{Reactor, Token};
use crate::throttle::limiter::SharedLimiter;

/// After a call was returned, a process gets for this time only as many calls as it can begin at once.
const NO_SHORT_MS: u64 = 100;
static INVALID_FRAMES: SharedLimiter = SharedLimiter::new();
/// The most reads from one link before the others get their turn.
const MAX_READS: usize = 16;

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
    }
    let load = load(service, (is_serving, is_leaving));
    service.forwarding.owes_offer |= is_due | service.forwarding.show(load);
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
        offer(service, load.idle as usize, is_due || !owes_offer);
    }
    None
}

/// Returns the lanes whose calls may be sent: none of a connection's pools; in a drain only of pool processes.
fn lanes_to_send(service: &CallDispatcher, is_serving: bool) -> Range<usize> {
    let end = service.registry.pools().len() + 1;
    usize::from(!is_serving)..service.calls.lanes().min(end)
}

/// Zero before this process serves.
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

fn sendable(service: &CallDispatcher, lane: usize) -> usize {
    remote_calls::sendable(&service.calls, lane, &service.threads, service.now_ms)
}

fn send_waiting(service: &mut CallDispatcher, lane: usize) -> Option<CallKey> {
    while sendable(service, lane) > 0
        && let Some(peer) = service.forwarding.find_idle(lane, service.now_ms)
    {
        match send_next(service, lane, peer, false) {
            Sent::Call => {}
            Sent::Nothing => return None,
            Sent::Late(late) => return Some(late),
        }
    }
    None
}

enum Sent {
    Call,
    Nothing,
    /// The next call would miss its deadline.
    Late(CallKey),
}

/// Sends the next waiting call of a lane to another process. With `only_short`, only a short one.
fn send_next(service: &mut CallDispatcher, lane: usize, peer: usize, only_short: bool) -> Sent {
    let now_ms = service.now_ms;
    let key = match remote_calls::next_to_send(&mut service.calls, lane, only_short, now_ms) {
        Ok(Some(key)) => key,
        Ok(None) => return Sent::Nothing,
        Err(late) => return Sent::Late(late),
    };
    let origin = service.calls.origin(key);
    if let Some((to, call)) = remote_calls::send(&mut service.calls, key, peer)
        && !service.forwarding.send(to, origin, call)
    {
        // No call within limits.frame is too long for a frame.
        remote_calls::take_back(&mut service.calls, key);
        return Sent::Nothing;
    }
    service.counts.count_forwarded(lane);
    Sent::Call
}

/// Returns calls of other workers that wait behind long calls, because another worker may have capacity.
fn return_waiting(service: &mut CallDispatcher) {
    for (key, mut ended) in remote_calls::take_foreign_back(&mut service.calls) {
        let target = TimerTarget::Call(key);
        service.timers.disarm(&mut ended.timer, target);
        service.ledger.forget(ended.reply.mark);
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
    let waiting = (service.forwarding).find_waiting(idle.max(short), is_repeated, now_ms);
    let share = |count: usize| count.div_ceil(waiting.len().max(1));
    let shares = (share(idle), share(short));
    for peer in waiting {
        service.forwarding.offer(peer, shares, now_ms);
    }
}

/// Reads from the link to another worker. Answers to calls of this worker are added to
/// `CallDispatcher::answered_elsewhere`. Returns false if the link has ended; then call `end`.
#[must_use]
pub fn receive(service: &mut CallDispatcher, link: usize, is_serving: bool) -> bool {
    let mut piece = service.forwarding.take_piece();
    let mut is_alive = true;
    for _ in 0..MAX_READS {
        let Some(peer) = service.forwarding.peers.get_mut(link) else {
            break;
        };
        let has_more = peer.link.receive(&mut piece);
        let is_closed = peer.link.is_closed();
        is_alive = read_frames(service, link, is_serving) && !is_closed;
        if !has_more || !is_alive {
            break;
        }
    }
    service.forwarding.put_piece(piece);
    is_alive
}

/// Returns false if the other worker sent an invalid frame.
fn read_frames(service: &mut CallDispatcher, link: usize, is_serving: bool) -> bool {
    let Some(peer) = service.forwarding.peers.get_mut(link) else {
        return false;
    };
    let (received, mut at) = (peer.link.take_received(), 0);
    let is_understood = loop {
        match Frame::decode(&received[at..], service.limits.frame) {
            DecodedCallFrame::Partial => break true,
            DecodedCallFrame::Invalid => break false,
            DecodedCallFrame::Whole(frame, used) => {
                at += used;
                if !read_frame(service, link, frame, is_serving) {
                    break false;
                }
            }
        }
    };
    if !is_understood {
        let text = "another worker sent an invalid frame over an internal link: the link is closed";
        INVALID_FRAMES.log(log::Level::Warn, text.to_owned());
    }
    if let Some(peer) = service.forwarding.peers.get_mut(link) {
        peer.link.put_back(received, at);
    }
    is_understood
}

/// Returns false if the frame is invalid.
fn read_frame(
    service: &mut CallDispatcher,
    link: usize,
    frame: Frame<'_>,
    is_serving: bool,
) -> bool {
    let now_ms = service.now_ms;
    match frame {
        Frame::Call(mut call) => {
            if service.forwarding.lane > 0 {
                call.method = own_number(service, link, call.method);
            }
            return run(service, link, &call, is_serving);
        }
        Frame::Cancel { id } => {
            let peer = service.forwarding.peers.get_mut(link);
            if let Some(key) = peer.and_then(|peer| peer.running.remove(&id))
                && let Some(ended) = service.give_up(key)
            {
                service.ledger.forget(ended.reply.mark);
            }
        }
        Frame::Answer(answer) => {
            let peer = service.forwarding.peers.get_mut(link);
            // An answer to a call that was given up is dropped.
            if let Some(key) = peer.and_then(|peer| peer.sent.remove(&answer.id)) {
                let read_ms = service
                    .calls
                    .get_mut(key)
                    .map_or(now_ms, |call| call.read_ms);
                let longest = Duration::from_millis(now_ms.saturating_sub(read_ms) + 1);
                let outcome = match answer.outcome {
                    Ok(result) => Ok(result.into_owned()),
                    Err(error) => Err(error.into_owned()),
                };
                let is_result = outcome.is_ok();
                let outcome = check_forwarded(answer.name.as_deref(), outcome);
                if let Err(error) = &outcome
                    && is_result
                    && let Some(peer) = service.forwarding.peers.get_mut(link)
                    && peer.complaints.admit(now_ms).is_some()
                {
                    log::warn!("{}; its caller gets `bad-output`", error.message);
                }
                service.answered_elsewhere.push(Done {
                    key,
                    outcome: Some(outcome),
                    took: Duration::from_micros(answer.took_us).min(longest),
                    cpu: Duration::ZERO,
                    out: answer.name.map(|name| name.into_owned().into_boxed_str()),
                });
            }
        }
        Frame::Returned { id } => {
            let peer = service.forwarding.peers.get_mut(link);
            let sent = peer.and_then(|peer| {
                peer.no_short_until_ms = now_ms + NO_SHORT_MS;
                peer.sent.remove(&id)
            });
            if let Some(key) = sent {
                let method = service.calls.get(key).map_or(0, |call| call.method);
                service.counts.count_returned(service.calls.lane(method));
                remote_calls::take_back(&mut service.calls, key);
            }
        }
        Frame::Leave => {
            if let Some(peer) = service.forwarding.peers.get_mut(link) {
                peer.is_leaving = true;
                peer.link.queue(&Frame::LeaveNoted);
            }
        }
        Frame::LeaveNoted => {
            if let Some(peer) = service.forwarding.peers.get_mut(link) {
                peer.leave = LeaveState::Noted;
            }
        }
        Frame::Offer { lane, count, short } => {
            let lane = usize::from(lane);
            let is_sent = lanes_to_send(service, is_serving).contains(&lane);
            if is_sent && service.forwarding.may_send(link, lane) {
                let peer = service.forwarding.peers.get(link);
                let may_send_short = peer.is_some_and(|peer| peer.no_short_until_ms <= now_ms);
                let short = if may_send_short { short } else { 0 };
                for number in 0..count.saturating_add(short) {
                    let only_short = number >= count;
                    if sendable(service, lane) == 0
                        || !matches!(send_next(service, lane, link, only_short), Sent::Call)
                    {
                        break;
                    }
                }
            }
        }
    }
    true
}

/// In a pool process, its own number of a method of a worker, or one that is none.
fn own_number(service: &CallDispatcher, link: usize, method: u32) -> u32 {
    let forwarding = &service.forwarding;
    let peer = forwarding.peers.get(link);
    let methods = &forwarding.pools.methods;
    let number = peer.and_then(|peer| methods.number(peer.generation, method as usize));
    number.map_or(u32::MAX, |number| number as u32)
}

fn has_capacity(service: &CallDispatcher, lane: usize, method: usize) -> bool {
    remote_calls::idle(&service.calls, lane, &service.threads) > 0
        || lane == 0 && remote_calls::begins_soon(&service.calls, method)
}

/// Runs a call of another worker, or returns it. Returns false if its number is already in use.
fn run(service: &mut CallDispatcher, link: usize, call: &CallFrame<'_>, is_serving: bool) -> bool {
    // The published load does not include this call, even if it ends before the next check.
    service.forwarding.is_stale = true;
    let method = call.method as usize;
    let is_known = method < service.registry.methods().len() && call.id.number > 0;
    let lane = if is_known {
        service.calls.lane(method)
    } else {
        0
    };
    if !is_known
        || !is_serving
        || lane != service.forwarding.lane
        || !has_capacity(service, lane, method)
    {
        service.forwarding.return_call(link, call.id.number);
        return true;
    }
    let refused = |code, text: &str| Err(Cow::Owned(RpcError::of(code, text, false)));
    let outcome = if service.is_quarantined(call.key) {
        Err(Cow::Owned(quarantined()))
    } else if call.deadline_ms <= service.now_ms {
        refused(
            Code::Timeout,
            "its deadline had passed when it arrived at the worker that was to run it",
        )
    } else {
        Ok(())
    };
    let Some(peer) = service.forwarding.peers.get_mut(link) else {
        return false;
    };
    if peer.running.contains_key(&call.id.number) {
        return false;
    }
    if let Err(error) = outcome {
        peer.link.queue(&Frame::Answer(AnswerFrame {
            id: call.id.number,
            took_us: 0,
            name: None,
            outcome: Err(error),
        }));
        return true;
    }
    let reply = PendingAnswer {
        place: AnswerPosition::Anywhere,
        shape: AnswerFormat {
            form: Form::Plain,
            wrap: Framing::Frame,
        },
        mark: service.ledger.take_for_peer(call.id, call.key, method),
    };
    service.last_call += 1;
    // A pool process has no calls of its own.
    service.foreign += u64::from(lane == 0);
    let key = remote_calls::run_for_peer(
        &mut service.calls,
        (Token::of_process(link), service.last_call),
        call,
        reply,
        &mut service.threads,
        service.now_ms,
    );
    peer.running.insert(call.id.number, key);
    if let Some(added) = service.calls.get_mut(key) {
        added.shown = service.slow.shown(call.origin, call.peer, &call.params);
        let target = TimerTarget::Call(key);
        service
            .timers
            .arm(&mut added.timer, call.deadline_ms, target);
    }
    true
}

/// Sends the answer to a call of another worker.
pub fn answer(
    service: &mut CallDispatcher,
    ended: &FinishedCall,
    outcome: Result<Vec<u8>, RpcError>,
    took: Duration,
    name: Option<&str>,
) {
    service.ledger.forget(ended.reply.mark);
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
            &AnswerFrame {
                id: ended.number,
                took_us: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
                name: name.map(Cow::Borrowed),
                outcome: outcome.map(Cow::Owned).map_err(Cow::Owned),
            },
        );
    }
}

/// Handles the end of another worker: answers the calls that it ran with `crashed` and cancels its own.
pub fn end(service: &mut CallDispatcher, link: usize, reactor: &mut Reactor) {
    let Some(peer) = service.forwarding.remove(link, reactor) else {
        return;
    };
    for key in peer.sent.into_values() {
        let text = "the process that ran it has ended";
        service.answered_elsewhere.push(Done {
            key,
            outcome: Some(Err(RpcError::of(Code::Crashed, text, true))),
            took: Duration::ZERO,
            cpu: Duration::ZERO,
            out: None,
        });
    }
    for key in peer.running.into_values() {
        if let Some(ended) = service.give_up(key) {
            service.ledger.forget(ended.reply.mark);
        }
    }
    // What was offered to it is available for others.
    service.forwarding.recheck_ms = Some(service.now_ms);
}
