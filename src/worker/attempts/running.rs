//! Begins the attempts of jobs in this process, gives them up, and reports how they ended.
//!
//! The jobs process sends an attempt only for free capacity. If a call was faster, the attempt is reported as
//! never begun. Attempts run on the handler threads or in the programs of the pool, also those of inline methods.

use std::borrow::Cow;
use std::mem;
use std::time::Duration;

use super::{EndedAttempt, StopReason};
use crate::handler::command::in_progress::command_of;
use crate::handler::job_attempt::{JobAttempt, ProgramEnd};
use crate::handler::trace::{CallIdentity, TraceSource};
use crate::link::attempt_frame::{
    AttemptEndKind, AttemptFrame, AttemptReport, AttemptStart, ExecutorHello,
};
use crate::link::call_frame::Frame;
use crate::protocol::answer;
use crate::protocol::call_id::{CallId, CallRunner};
use crate::protocol::code::Code;
use crate::protocol::job_id::JobId;
use crate::protocol::rpc_error::RpcError;
use crate::sys::event::Token;
use crate::sys::process::Pid;
use crate::sys::process_tree;
use crate::worker::call_dispatcher::CallDispatcher;
use crate::worker::call_errors::check_size;
use crate::worker::call_room;
use crate::worker::call_table::ScheduledCall;
use crate::worker::job_calls;
use crate::worker::remote_calls::{self, AttemptCall};
use crate::worker::threads::Done;
use crate::worker::timers::{CallKey, TimerTarget};

/// Handles a frame about attempts that came over a link. Returns false if it is invalid, or if the other process is
/// not a jobs process.
pub fn receive(
    service: &mut CallDispatcher,
    link: usize,
    frame: AttemptFrame<'_>,
    is_serving: bool,
) -> bool {
    let peer = service.forwarding.peers.get(link);
    if !peer.is_some_and(|peer| peer.is_jobs_process) {
        return false;
    }
    match frame {
        AttemptFrame::Start(start) => begin(service, link, &start, is_serving),
        AttemptFrame::Stored(id) => {
            service.attempts.stored(id);
            true
        }
        AttemptFrame::Cancel(id) => {
            if let Some(call) = service.attempts.call_of(id) {
                stop(service, call, StopReason::Cancelled);
            }
            true
        }
        // These go to the jobs process only.
        AttemptFrame::End(_) | AttemptFrame::Process { .. } | AttemptFrame::Executor(_) => false,
    }
}

/// Begins an attempt, or reports that it cannot begin. Returns false if it runs already. An attempt that arrives over a
/// replaced link does not begin, because the jobs process at the newer link knows that this process has not begun it.
fn begin(
    service: &mut CallDispatcher,
    link: usize,
    start: &AttemptStart<'_>,
    is_serving: bool,
) -> bool {
    if service.attempts.has(start.id) {
        return false;
    }
    // The published load does not include this attempt, even if it ends before the next check.
    service.forwarding.is_stale = true;
    let is_replaced = (service.forwarding.peers.get(link)).is_some_and(|peer| peer.is_replaced);
    let may_begin = is_serving && !is_replaced;
    let method = method(service, &start.method);
    let Some(method) = method.filter(|method| may_begin && has_room(service, *method)) else {
        let report = AttemptReport::never_begun(start.id);
        send(service, link, AttemptFrame::End(report));
        return true;
    };
    call_room::count_attempt(&mut service.calls, method);
    service.last_call += 1;
    // An attempt is not a call that was read. It counts for `max-calls` elsewhere (`AttemptTable::begun`).
    service.foreign += 1;
    let number = service.last_call;
    let context = start.trace.as_deref().cloned().map(Box::new);
    let trace = match service.tracing.is_on {
        true => TraceSource::of_call(context, number),
        false => TraceSource::Off,
    };
    let (attempt, max_attempts) = (start.attempt, start.max_attempts);
    let job = JobAttempt::new(JobId(start.id.job).to_string(), attempt, max_attempts);
    let pid = Pid::current().0;
    let deadline_ms = service.now_ms.saturating_add(start.timeout_ms);
    let attempt = AttemptCall {
        method,
        params: &start.params,
        deadline_ms,
        key: start.id.key(),
        identity: CallIdentity {
            number,
            // An attempt has no connection, neither here nor elsewhere.
            home: Some(CallId { pid, number }),
            trace,
            attempt: Some(Box::new(job)),
        },
    };
    let token = Token::of_process(link);
    let (calls, threads) = (&mut service.calls, &mut service.threads);
    let key = remote_calls::run_attempt(calls, token, attempt, threads, service.now_ms);
    service
        .attempts
        .begin((start.id, method), link, key, deadline_ms);
    if let Some(added) = service.calls.get_mut(key) {
        let target = TimerTarget::Call(key);
        service.timers.arm(&mut added.timer, deadline_ms, target);
    }
    true
}

/// Returns the number of a method whose calls run in this process.
fn method(service: &CallDispatcher, name: &str) -> Option<usize> {
    let registry = &service.registry;
    let found = match service.forwarding.lane {
        0 => registry.find(name, false),
        // A pool process finds no method by its name. After a reload it may have several of a name, and the last one
        // is the newest.
        _ => registry
            .methods()
            .iter()
            .rposition(|method| method.name == name),
    };
    found.filter(|method| service.calls.lane(*method) == service.forwarding.lane)
}

/// Returns whether this process may run one more attempt.
pub fn has_place(service: &CallDispatcher) -> bool {
    match service.forwarding.lane {
        0 => service.attempts.has_room(),
        lane => service.attempts.count() < service.threads.count(lane),
    }
}

/// Returns whether an attempt of this method can begin now.
fn has_room(service: &mut CallDispatcher, method: usize) -> bool {
    let lane = service.forwarding.lane;
    has_place(service)
        && remote_calls::idle(&service.calls, lane, &service.threads) > 0
        && call_room::allows_attempt(&mut service.calls, method, service.now_ms)
}

/// Gives up the attempt of a call. It ends when its code has ended.
fn stop(service: &mut CallDispatcher, call: CallKey, reason: StopReason) {
    let Some(id) = service.attempts.attempt_of(call) else {
        return;
    };
    let is_first = service.attempts.stop(id, reason);
    if reason != StopReason::Cancelled
        && let Some(running) = service.calls.get(call)
        && let Some(attempt) = &running.state.identity().attempt
    {
        attempt.end_now();
    }
    if is_first {
        service.give_up(call);
        if service.calls.get(call).is_none() {
            // It had not begun, so no result follows.
            finish(service, never_ran(call));
        }
    } else if service.forwarding.lane > 0 {
        // Its program may have less time than before.
        service.threads.pools().give_up();
    }
}

fn never_ran(key: CallKey) -> Done {
    Done {
        key,
        outcome: None,
        took: Duration::ZERO,
        runner: CallRunner::default(),
        out: None,
    }
}

/// Handles the timer of a call that has expired: if the call is an attempt, gives it up. Returns whether it is one.
pub fn on_timer(service: &mut CallDispatcher, call: CallKey) -> bool {
    let reason = service.attempts.timer_reason(call, service.now_ms);
    if let Some(reason) = reason {
        stop(service, call, reason);
    }
    reason.is_some()
}

/// Handles a call that was taken out of the queue because no thread will begin it soon. If it is an attempt, reports it
/// as never begun. Returns whether it is one.
pub fn return_attempt(service: &mut CallDispatcher, call: CallKey) -> bool {
    let is_attempt = service.attempts.runs(call);
    if is_attempt {
        finish(service, never_ran(call));
    }
    is_attempt
}

/// Returns the results of calls since the last time, and reports those of attempts.
pub fn take_call_results(service: &mut CallDispatcher) -> Vec<Done> {
    let mut done = mem::take(&mut service.answered_elsewhere);
    done.extend(service.threads.take_done());
    if service.attempts.are_running() {
        let is_attempt = |done: &mut Done| service.attempts.runs(done.key);
        let ended: Vec<Done> = done.extract_if(.., is_attempt).collect();
        for ended in ended {
            finish(service, ended);
        }
    }
    done
}

/// Removes an attempt whose code has ended, and reports that.
fn finish(service: &mut CallDispatcher, done: Done) {
    let key = done.key;
    let around = (
        &service.calls,
        &*service.registry,
        &service.counts,
        service.now_ms,
    );
    service.slow.ended(around, &done);
    let Some(EndedAttempt { id, method, stop }) = service.attempts.end(key) else {
        return;
    };
    service.calls.loads[method].current -= 1;
    (service.counts).add_command_cpu(method, done.runner.cpu);
    let mut program_end = ProgramEnd::None;
    if let Some(call) = service.calls.get_mut(key) {
        let attempt = call.state.identity().attempt.as_ref();
        program_end = attempt.map_or(program_end, |attempt| attempt.program_end());
        let target = TimerTarget::Call(key);
        service.timers.disarm(&mut call.timer, target);
    }
    // The run times of attempts say nothing about those of calls, so the result is left out.
    service.calls.done(&never_ran(key));
    let took_us = u64::try_from(done.took.as_micros()).unwrap_or(u64::MAX);
    let facts = EndFacts {
        stop,
        program_end,
        is_pool: service.forwarding.lane > 0,
        is_leaving: service.attempts.is_draining(),
        limit: service.limits.frame,
    };
    let (kind, json) = end_of(done.outcome, &facts);
    let report = AttemptReport {
        id,
        kind,
        took_us,
        json: json.map(Cow::Owned),
    };
    let frame = AttemptFrame::End(report.clone());
    if let Some(link) = service.attempts.keep(report) {
        send(service, link, frame);
    }
}

/// What is known of the end of an attempt besides its outcome.
#[derive(Debug, Clone, Copy)]
struct EndFacts {
    stop: Option<StopReason>,
    program_end: ProgramEnd,
    /// Whether this is a pool process.
    is_pool: bool,
    /// Whether this process drains or stops.
    is_leaving: bool,
    /// The largest number of bytes of a result.
    limit: usize,
}

/// Returns how an attempt ended, and its result or error. `outcome` is `None` if it did not begin.
fn end_of(
    outcome: Option<Result<Vec<u8>, RpcError>>,
    facts: &EndFacts,
) -> (AttemptEndKind, Option<String>) {
    let Some(outcome) = outcome else {
        return (AttemptEndKind::NeverBegun, None);
    };
    match (outcome, facts.stop) {
        // What a handler returns after its timeout or its interruption may be incomplete.
        (_, Some(StopReason::Interrupted)) => (AttemptEndKind::Interrupted, None),
        (_, Some(StopReason::TimedOut)) => {
            let text = "its timeout passed before it was done";
            let error = RpcError::of(Code::Timeout, text, true);
            (AttemptEndKind::Error, Some(answer::bare_error_text(&error)))
        }
        (Ok(result), None | Some(StopReason::Cancelled)) => {
            match result_json(result, facts.limit) {
                Ok(json) => (AttemptEndKind::Result, Some(json)),
                Err(error) => (AttemptEndKind::Error, Some(answer::bare_error_text(&error))),
            }
        }
        (Err(error), None | Some(StopReason::Cancelled)) => {
            let kind = match error.table_code() {
                // No program could begin it.
                Some(Code::Crashed) if facts.is_pool && !error.started => {
                    AttemptEndKind::NeverBegun
                }
                // By an order, perhaps only to its program.
                Some(Code::Stopping)
                    if facts.is_leaving || facts.program_end == ProgramEnd::Other =>
                {
                    match error.started {
                        true => AttemptEndKind::Interrupted,
                        false => AttemptEndKind::NeverBegun,
                    }
                }
                Some(Code::Crashed) => match facts.program_end {
                    ProgramEnd::Fault => AttemptEndKind::Crashed,
                    ProgramEnd::SharedFault => AttemptEndKind::Unclear,
                    ProgramEnd::Killed => AttemptEndKind::Killed,
                    ProgramEnd::Other => AttemptEndKind::Interrupted,
                    ProgramEnd::None => AttemptEndKind::Error,
                },
                _ => AttemptEndKind::Error,
            };
            let json = answer::bare_error_text(&error);
            // A report that is longer than a frame would end the link each time.
            let json = match check_size(json.len(), facts.limit) {
                Ok(()) => json,
                Err(error) => answer::bare_error_text(&error),
            };
            (kind, Some(json))
        }
    }
}

/// Returns a result as text.
///
/// # Errors
/// If it does not fit into a frame. Another attempt would not change that.
fn result_json(result: Vec<u8>, limit: usize) -> Result<String, RpcError> {
    let never = |error: RpcError| error.with_data(serde_json::json!({"retry": false}));
    check_size(result.len(), limit).map_err(never)?;
    String::from_utf8(result).map_err(|_| {
        let text = "the result is not UTF-8";
        never(RpcError::of(Code::BadOutput, text, true))
    })
}

/// Queues a frame for a jobs process. If the link has ended, the report is sent over the next one.
fn send(service: &mut CallDispatcher, link: usize, frame: AttemptFrame<'_>) {
    if let Some(peer) = service.forwarding.peers.get_mut(link) {
        peer.link.queue(&Frame::Attempt(frame));
    }
}

/// Reports the processes of commands and programs that run attempts to the jobs process, which stores them. If all
/// processes of the server are killed, the next server waits until these have ended. Once per tick is often enough:
/// the kernel kills them together with this process, so the next server needs only those that do not die at once.
pub fn note_processes(service: &mut CallDispatcher) {
    job_calls::find_jobs_process(service);
    for (id, key) in service.attempts.unnoted() {
        let pid = match service.forwarding.lane {
            0 => {
                let number = service.calls.get(key).map(ScheduledCall::number);
                number.and_then(|number| Some(command_of(number, 0)?.0))
            }
            _ => (service.threads.pools().program_of(key)).map(|program| program.pid),
        };
        if let Some(pid) = pid
            && let Some(start_time) = process_tree::start_ticks(pid)
            && let Some(link) = service.attempts.note(id)
        {
            let pid = pid.0;
            let frame = AttemptFrame::Process {
                id,
                pid,
                start_time,
            };
            send(service, link, frame);
        }
    }
}

/// Handles a link that was added. If it leads to a jobs process, sends it what it must know about this process.
pub fn link_added(service: &mut CallDispatcher, link: Option<usize>) {
    let peers = &service.forwarding.peers;
    let is_jobs = |link: &usize| peers.get(*link).is_some_and(|it| it.is_jobs_process);
    // A session runs no attempts.
    let is_executor = !service.forwarding.is_session;
    let Some(link) = link.filter(|link| is_executor && is_jobs(link)) else {
        return;
    };
    let generation = service.forwarding.peers[link].generation;
    let others = service.forwarding.peers.iter_mut();
    for (_, other) in others.filter(|(other, _)| *other != link) {
        other.is_replaced |= other.is_jobs_process && other.generation == generation;
    }
    let (attempts, reports) = service.attempts.linked(link);
    let hello = ExecutorHello {
        pid: Pid::current().0,
        lane: service.forwarding.lane as u32,
        attempts,
    };
    send(service, link, AttemptFrame::Executor(hello));
    for report in reports {
        send(service, link, AttemptFrame::End(report));
    }
}

/// Handles the end of a link. If it led to a jobs process, its attempts are reported over another link, now or when
/// there is one.
pub fn link_ended(service: &mut CallDispatcher, link: usize) {
    service.attempts.link_ended(link);
    if service.attempts.count() > 0 {
        let peers = service.forwarding.peers.iter();
        let jobs = peers.filter(|(_, peer)| peer.is_jobs_process && !peer.is_replaced);
        let other = jobs.last();
        let other = other.map(|(link, _)| link);
        link_added(service, other);
    }
}

/// Begins a drain or stop that lasts until `until_ms` at the latest. Each attempt is interrupted when the drain timeout
/// of its method is over.
pub fn drain(service: &mut CallDispatcher, until_ms: u64) {
    let now_ms = service.now_ms;
    service.attempts.begin_drain((now_ms, until_ms));
    for key in service.attempts.calls() {
        if let Some(call) = service.calls.get_mut(key) {
            let method = service.registry.name(call.method);
            let limits = (now_ms, until_ms);
            let end_ms = service.attempts.drain_end(key, method, limits);
            // An attempt that was given up has no timer. It still gets one, because its program may be running.
            let at_ms = match call.timer {
                0 => end_ms,
                armed => end_ms.min(armed),
            };
            let target = TimerTarget::Call(key);
            service.timers.arm(&mut call.timer, at_ms, target);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const FACTS: EndFacts = EndFacts {
        stop: None,
        program_end: ProgramEnd::None,
        is_pool: true,
        is_leaving: false,
        limit: 10,
    };

    #[test]
    fn a_result_counts_unless_the_attempt_was_over_before() {
        let of = |stop| end_of(Some(Ok(b"[1]".to_vec())), &EndFacts { stop, ..FACTS });
        let done = (AttemptEndKind::Result, Some("[1]".to_owned()));
        assert_eq!(of(None), done);
        assert_eq!(of(Some(StopReason::Cancelled)), done);
        let interrupted = (AttemptEndKind::Interrupted, None);
        assert_eq!(of(Some(StopReason::Interrupted)), interrupted);
        let (kind, json) = of(Some(StopReason::TimedOut));
        assert_eq!(kind, AttemptEndKind::Error);
        assert!(json.unwrap().contains("\"code\":-32001"));
        assert_eq!(end_of(None, &FACTS), (AttemptEndKind::NeverBegun, None));
    }

    #[test]
    fn a_result_that_is_too_long_is_not_tried_again() {
        let (kind, json) = end_of(Some(Ok(b"\"0123456789\"".to_vec())), &FACTS);
        assert_eq!(kind, AttemptEndKind::Error);
        assert!(json.unwrap().contains(r#""data":{"retry":false}"#));
    }

    #[test]
    fn an_error_says_whether_the_attempt_began_and_how_its_program_died() {
        use AttemptEndKind::{Crashed, Error, Interrupted, Killed, NeverBegun, Unclear};
        let of = |code, started, facts: EndFacts| {
            end_of(Some(Err(RpcError::of(code, "", started))), &facts).0
        };
        let died = |program_end| EndFacts {
            program_end,
            ..FACTS
        };
        assert_eq!(of(Code::Internal, true, FACTS), Error);
        assert_eq!(of(Code::Crashed, false, FACTS), NeverBegun);
        assert_eq!(of(Code::Crashed, true, died(ProgramEnd::Fault)), Crashed);
        assert_eq!(
            of(Code::Crashed, true, died(ProgramEnd::SharedFault)),
            Unclear
        );
        assert_eq!(of(Code::Crashed, true, died(ProgramEnd::Killed)), Killed);
        let other = died(ProgramEnd::Other);
        assert_eq!(of(Code::Crashed, true, other), Interrupted);
        assert_eq!(of(Code::Stopping, true, other), Interrupted);
        assert_eq!(of(Code::Stopping, true, FACTS), Error);
        // A function may return these codes too.
        let function = EndFacts {
            is_pool: false,
            ..FACTS
        };
        assert_eq!(of(Code::Crashed, false, function), Error);
        assert_eq!(of(Code::Stopping, true, function), Error);
        let leaving = EndFacts {
            is_leaving: true,
            ..FACTS
        };
        assert_eq!(of(Code::Stopping, true, leaving), Interrupted);
        assert_eq!(of(Code::Stopping, false, leaving), NeverBegun);
    }
}
