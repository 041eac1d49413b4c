//! Handles the frames of other processes: their calls, their answers, and what they offer.
//!
//! `peer_calls` sends. A process that sends an invalid frame loses its link.

use std::borrow::Cow;
use std::time::Duration;

use super::attempts::running as attempts;
use super::call_dispatcher::CallDispatcher;
use super::call_errors::quarantined;
use super::connection::{AnswerPosition, PendingAnswer};
use super::job_calls;
use super::peer::LeaveState;
use super::peer_calls::{SendOutcome, lanes_to_send, send_next, sendable};
use super::remote_calls;
use super::threads::Done;
use super::timers::{TimerTarget, millis};
use crate::link::call_frame::{AnswerFrame, CallFrame, Frame};
use crate::link::call_link::MAX_READS;
use crate::protocol::answer::check_forwarded;
use crate::protocol::body::Form;
use crate::protocol::call_id::CallRunner;
use crate::protocol::code::Code;
use crate::protocol::reply::{AnswerFormat, Framing};
use crate::protocol::rpc_error::RpcError;
use crate::sys::event::Token;
use crate::throttle::limiter::SharedLimiter;

/// After a process has returned a call, it gets only as many calls as it can begin at once, for this time in
/// milliseconds.
const NO_SHORT_MS: u64 = 100;
static INVALID_FRAMES: SharedLimiter = SharedLimiter::new();

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

/// Handles the frames that were received. Returns false if one of them is invalid.
fn read_frames(service: &mut CallDispatcher, link: usize, is_serving: bool) -> bool {
    let Some(peer) = service.forwarding.peers.get_mut(link) else {
        return false;
    };
    let (received, limit) = (peer.link.take_received(), service.limits.frame);
    let (used, is_understood) = Frame::decode_each(&received, limit, |frame| {
        read_frame(service, link, frame, is_serving)
    });
    if !is_understood {
        let text = "another worker sent an invalid frame over an internal link: the link is closed";
        INVALID_FRAMES.log(log::Level::Warn, text.to_owned());
    }
    if let Some(peer) = service.forwarding.peers.get_mut(link) {
        peer.link.put_back(received, used);
    }
    is_understood
}

/// Handles a frame. Returns false if it is invalid.
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
            return run(service, link, &mut call, is_serving);
        }
        Frame::Cancel { id } => {
            let peer = service.forwarding.peers.get_mut(link);
            if let Some(key) = peer.and_then(|peer| peer.running.remove(&id))
                && let Some(ended) = service.give_up(key)
            {
                service.journal.forget(ended.reply.mark);
            }
        }
        Frame::Answer(answer) => {
            let peer = service.forwarding.peers.get_mut(link);
            // An answer to a call that was given up is dropped.
            if let Some(key) = peer.and_then(|peer| peer.sent.remove(&answer.id)) {
                service.forwarding.pools.jobs.forget(answer.id);
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
                    && peer.warning_limiter.admit(now_ms).is_some()
                {
                    log::warn!("{}; its caller gets `bad-output`", error.message);
                }
                service.answered_elsewhere.push(Done {
                    key,
                    outcome: Some(outcome),
                    took: Duration::from_micros(answer.took_us).min(longest),
                    runner: answer.runner,
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
                job_calls::wait_again(service, key);
                remote_calls::take_back(&mut service.calls, key);
            }
        }
        Frame::Leave => {
            if let Some(peer) = service.forwarding.peers.get_mut(link) {
                // Once, because a session could repeat it endlessly.
                if !std::mem::replace(&mut peer.is_leaving, true) {
                    peer.link.queue(&Frame::LeaveNoted);
                }
            }
        }
        // Only the jobs process gets it.
        Frame::AnswerWaits => return false,
        Frame::LeaveNoted => {
            if let Some(peer) = service.forwarding.peers.get_mut(link) {
                peer.leave = LeaveState::Noted;
            }
        }
        Frame::Attempt(frame) => return attempts::receive(service, link, frame, is_serving),
        Frame::Offer { lane, count, short } => {
            let lane = usize::from(lane);
            let is_sent = lanes_to_send(service, is_serving).any(|it| it == lane);
            if is_sent && service.forwarding.may_send(link, lane) {
                let peer = service.forwarding.peers.get(link);
                let may_send_short = peer.is_some_and(|peer| peer.no_short_until_ms <= now_ms);
                let short = if may_send_short { short } else { 0 };
                for number in 0..count.saturating_add(short) {
                    let only_short = number >= count;
                    if sendable(service, lane) == 0
                        || !matches!(
                            send_next(service, lane, link, only_short),
                            SendOutcome::Call
                        )
                    {
                        break;
                    }
                }
            }
        }
    }
    true
}

/// In a pool process, returns its own number of a method of a worker; `u32::MAX` if it has no such method.
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
fn run(
    service: &mut CallDispatcher,
    link: usize,
    call: &mut CallFrame<'_>,
    is_serving: bool,
) -> bool {
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
    let outcome = if service.quarantine.is_quarantined(call.key) {
        Err(Cow::Owned(quarantined()))
    } else if call.deadline_ms <= service.now_ms {
        let text = "its deadline had passed when it arrived at the worker that was to run it";
        Err(Cow::Owned(RpcError::of(Code::Timeout, text, false)))
    } else {
        Ok(())
    };
    let Some(peer) = service.forwarding.peers.get_mut(link) else {
        return false;
    };
    if peer.running.contains_key(&call.id.number) {
        return false;
    }
    if peer.is_session() {
        // It is not trusted, and its call must end.
        let timeout = millis(service.registry.methods()[method].timeout);
        let most_ms = service.now_ms.saturating_add(timeout);
        call.deadline_ms = call.deadline_ms.min(most_ms);
    }
    if let Err(error) = outcome {
        peer.link.queue(&Frame::Answer(AnswerFrame {
            id: call.id.number,
            took_us: 0,
            runner: CallRunner::default(),
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
        mark: service.journal.take_for_peer(call.id, call.key, method),
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
