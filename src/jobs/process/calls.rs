//! Answers the calls of `rpc.job.*` that workers and sessions send.
//!
//! An enqueue is answered after the commit that stores its jobs. If there is none in time, the answer is
//! `unavailable`, which says whether the jobs may be stored all the same.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::claiming;
use super::core::{AwaitedChange, JobsCore};
use super::store_event::{ReadReply, ReadRequest};
use super::ticket::{CallPlace, Ticket};
use crate::handler::job_methods::JobMethod;
use crate::jobs::policy::enqueue::{self, EnqueueRules, NewJob};
use crate::jobs::policy::states::JobState;
use crate::jobs::record::JobRecord;
use crate::jobs::rules;
use crate::jobs::store::error::StoreError;
use crate::jobs::store::request::{
    CancelReply, EnqueueReply, EnqueuedJob, StoreReply, StoreRequest,
};
use crate::link::call_frame::{CallFrame, Frame};
use crate::protocol::code::Code;
use crate::protocol::job_id::JobId;
use crate::protocol::rpc_error::RpcError;
use crate::protocol::trace_context::TraceContext;
use crate::sys::process::{monotonic_ns, unix_time_ms};
use crate::sys::random::random_bytes;

/// A wait is answered before the deadline of its call: a tenth of the time earlier, but at least and at most this long,
/// in milliseconds. Its record is read first, perhaps behind those of many other waits.
const ANSWER_MS: RangeInclusive<u64> = 5..=500;

type Outcome = Result<Vec<u8>, RpcError>;

/// Begins a call. If this process takes no calls any more, another one gets it.
pub fn begin(core: &mut JobsCore, place: CallPlace, call: &CallFrame<'_>) {
    let Some(method) = JobMethod::from_frame(call.method).filter(|_| !core.is_draining) else {
        core.links.end_call(place);
        if let Some(link) = core.links.get_mut(place.link) {
            let id = place.number;
            link.link.queue(&Frame::Returned { id });
        }
        return;
    };
    core.calls += 1;
    let begun = match method {
        JobMethod::Enqueue => begin_enqueue(core, place, call),
        JobMethod::Get => enqueue::parse_job(&call.params, false).map(|(job, _)| {
            core.store
                .read(ReadRequest::Record(job), Ticket::Get(place));
        }),
        JobMethod::Wait => begin_wait(core, place, call),
        JobMethod::Cancel => enqueue::parse_job(&call.params, false).map(|(job, _)| {
            let request = StoreRequest::Cancel(job);
            let hold = (core.store).submit_held(request, Ticket::Cancel(place, job));
            let change = AwaitedChange {
                hold,
                is_array: false,
                job: None,
                due_ms: due_ms(core, call),
                begun_ns: monotonic_ns(),
            };
            core.await_change(place, change);
        }),
    };
    if let Err(error) = begun {
        core.links.answer(place, Err(error), 0);
    }
}

/// Answers a call of a session whose calls have too many bytes that are not stored.
pub fn refuse_bytes(core: &mut JobsCore, call: CallPlace) {
    let text = "too many bytes of this connection wait for the store of jobs; try again later";
    let error = RpcError::of(Code::Overloaded, text, false);
    core.links.answer(call, Err(error), 0);
}

/// Drops the wait of a caller that does not wait any more. An enqueue is stored all the same.
pub fn give_up(core: &mut JobsCore, call: CallPlace) {
    if core.waits.remove(call) {
        core.links.end_call(call);
    }
}

/// Removes the waits of a link that has ended.
pub fn end_link(core: &mut JobsCore, link: u64) {
    core.waits.remove_link(link);
}

/// Returns when a change is answered with `unavailable`: `enqueue-timeout` after its call was read.
fn due_ms(core: &JobsCore, call: &CallFrame<'_>) -> u64 {
    let timeout = rules::milliseconds(core.config.enqueue_timeout);
    let read_ms = match call.origin.read_ns / 1_000_000 {
        0 => core.now_ms,
        read_ms => read_ms.min(core.now_ms),
    };
    read_ms.saturating_add(timeout)
}

fn begin_enqueue(
    core: &mut JobsCore,
    place: CallPlace,
    call: &CallFrame<'_>,
) -> Result<(), RpcError> {
    let seed = first_id(call)?;
    let (registry, config) = (&core.registry, &core.config);
    let defaults = |name: &str| {
        let is_known = registry.find(name, false).is_some();
        is_known.then(|| rules::enqueue_defaults(config, name))
    };
    let rules = EnqueueRules {
        method: &defaults,
        most_items: core.limits.batch,
        most_params: core.limits.frame,
        secret: core.store.opened.as_ref().map(|opened| &opened.secret[..]),
        now: unix_time_ms(),
    };
    // All ids of an array can be computed from the seed. So no job of an array has the seed as its id: the jobs may
    // belong to several clients.
    let mut made = usize::from(call.params.trim_start().starts_with('['));
    let trace = call.trace.as_deref().map(trace_text);
    let (jobs, is_array) = enqueue::parse(&call.params, &rules, trace.as_deref(), || {
        made += 1;
        seed.nth(made - 1)
    })?;
    let due_ms = due_ms(core, call);
    submit(core, place, jobs, is_array, due_ms);
    Ok(())
}

/// Submits the jobs of an enqueue. They are answered as an array if `is_array`, and with `unavailable` at `due_ms`.
pub fn submit(
    core: &mut JobsCore,
    place: CallPlace,
    jobs: Vec<NewJob>,
    is_array: bool,
    due_ms: u64,
) {
    let job = match &jobs[..] {
        [job] => Some(job.id),
        _ => None,
    };
    // The claim that follows is executed behind the enqueue, perhaps in the same commit.
    let now = (core.now_ms, unix_time_ms());
    claiming::add_due(&mut core.executors, &jobs, now);
    let request = StoreRequest::Enqueue(jobs);
    let hold = core.store.submit_held(request, Ticket::Enqueue(place));
    let change = AwaitedChange {
        hold,
        is_array,
        job,
        due_ms,
        begun_ns: monotonic_ns(),
    };
    core.await_change(place, change);
}

/// Returns the id that the worker has made for this call. With it, a call that is sent again stores nothing twice.
fn first_id(call: &CallFrame<'_>) -> Result<JobId, RpcError> {
    if let Some(id) = call.client_id.as_deref().and_then(JobId::parse) {
        return Ok(id);
    }
    let random = random_bytes().map_err(|error| {
        let text = format!("no id can be made: {error}");
        RpcError::of(Code::Internal, text, false)
    })?;
    Ok(JobId::at(unix_time_ms(), random))
}

/// The longest `tracestate` that is stored, in bytes. Each job of an array has a copy of it. The specification asks to
/// keep at least 512 characters (W3C Trace Context, 3.3.1.5).
const MOST_STATE: usize = 512;

/// Returns a trace context as it is stored.
fn trace_text(trace: &TraceContext) -> String {
    match &trace.state {
        Some(state) if state.len() > MOST_STATE => trace.traceparent(),
        _ => trace.to_text(),
    }
}

fn begin_wait(core: &mut JobsCore, place: CallPlace, call: &CallFrame<'_>) -> Result<(), RpcError> {
    let (job, timeout_ms) = enqueue::parse_job(&call.params, true)?;
    let asked_ms = core.now_ms.saturating_add(timeout_ms.unwrap_or(u64::MAX));
    let left_ms = call.deadline_ms.saturating_sub(core.now_ms);
    let answer_ms = (left_ms / 10).clamp(*ANSWER_MS.start(), *ANSWER_MS.end());
    let until_ms = asked_ms.min(call.deadline_ms.saturating_sub(answer_ms));
    core.waits.add(place, job, until_ms);
    read(core, BTreeSet::from([job]));
    Ok(())
}

/// Reads the records of jobs for which calls wait.
pub fn read(core: &mut JobsCore, jobs: BTreeSet<JobId>) {
    for job in jobs {
        core.store.read(ReadRequest::Record(job), Ticket::Wait(job));
    }
}

/// Reads the records of all jobs for which calls wait, because another jobs process may have ended them. If the records
/// of the last look were not read yet, more reads would only make that take longer.
pub fn look(core: &mut JobsCore) {
    if core.looks == 0 {
        let jobs: Vec<JobId> = core.waits.jobs().collect();
        core.looks = jobs.len();
        for job in jobs {
            core.store.read(ReadRequest::Record(job), Ticket::Look(job));
        }
    }
}

/// Handles the record of a look.
pub fn looked(core: &mut JobsCore, job: JobId, read: Result<ReadReply, StoreError>) {
    core.looks = core.looks.saturating_sub(1);
    read_for_waits(core, job, read);
}

/// Answers the calls that wait for a job, because it has ended or was removed.
pub fn note_ended(core: &mut JobsCore, job: JobId) {
    if core.waits.has(job) {
        read(core, BTreeSet::from([job]));
    }
}

/// Answers what is due.
pub fn pass_time(core: &mut JobsCore) {
    while let Some((due_ms, call)) = core.awaited_until.first().copied()
        && due_ms <= core.now_ms
    {
        let Some(change) = core.take_awaited(call) else {
            core.awaited_until.pop_first();
            continue;
        };
        let is_withdrawn = change.hold.withdraw();
        if is_withdrawn {
            core.store.note_withdrawn();
        }
        let state = core.store.state.name();
        let text = format!(
            "the store of jobs gave no answer within jobs.enqueue-timeout (it is {state}); try again"
        );
        let error = unavailable(text, !is_withdrawn, change.job);
        core.links.answer(call, Err(error), 0);
    }
    let over = core.waits.expire(core.now_ms);
    read(core, over);
}

/// Returns when `pass_time` is due.
pub fn next_ms(core: &JobsCore) -> Option<u64> {
    let awaited = core.awaited_until.first().map(|(at, _)| *at);
    awaited.into_iter().chain(core.waits.next_ms()).min()
}

/// Handles the reply to an enqueue.
pub fn enqueued(core: &mut JobsCore, call: CallPlace, reply: EnqueueReply) {
    if let (EnqueueReply::Stored(jobs), Some(counters)) = (&reply, &core.counters) {
        counters.enqueued(jobs.iter().filter(|job| job.is_new).count() as u64);
    }
    let Some(change) = core.take_awaited(call) else {
        return;
    };
    let refused = |code, text: String| Err(RpcError::of(code, text, false));
    let outcome = match reply {
        EnqueueReply::Stored(jobs) => Ok(stored(&jobs, change.is_array)),
        // Its client knows the key of the request, but it may not know the id.
        EnqueueReply::Conflict { id, .. } if id.is_derived() => {
            let text = "a job exists with this Idempotency-Key and other params";
            refused(Code::Conflict, text.to_owned())
        }
        EnqueueReply::Conflict { index, id } => {
            let text = match change.is_array {
                true => format!(
                    "params[{index}]: the id {id} exists with another method or other params"
                ),
                false => format!("the id {id} exists with another method or other params"),
            };
            refused(Code::Conflict, text).map_err(|error| with_job(error, Some(id)))
        }
        EnqueueReply::TooMany => refused(
            Code::Overloaded,
            format!(
                "the store has {} jobs that have not ended (jobs.max-jobs); try again later",
                core.config.max_jobs
            ),
        ),
        EnqueueReply::StoreFull => refused(
            Code::Overloaded,
            format!(
                "the store has reached {} bytes (jobs.max-size); try again later",
                core.config.max_size
            ),
        ),
    };
    core.links.answer(call, outcome, took_us(change.begun_ns));
}

/// Handles the reply to a cancel request.
pub fn cancelled(core: &mut JobsCore, call: CallPlace, job: JobId, reply: &StoreReply) {
    let StoreReply::Cancelled(reply) = reply else {
        return;
    };
    if let CancelReply::Ended { method } = reply {
        if let Some(counters) = &core.counters {
            counters.ended(method, JobState::Cancelled, None);
        }
        note_ended(core, job);
    }
    let Some(change) = core.take_awaited(call) else {
        return;
    };
    let outcome = match reply {
        CancelReply::Ended { .. } | CancelReply::Requested { .. } => Ok(b"true".to_vec()),
        CancelReply::WasEnded => Ok(b"false".to_vec()),
        CancelReply::NoSuchJob => Err(no_such_job(job)),
    };
    core.links.answer(call, outcome, took_us(change.begun_ns));
}

/// Answers a call whose change could not be stored, or of which it is unknown whether it is stored.
pub fn failed(core: &mut JobsCore, call: CallPlace, error: &StoreError) {
    if let Some(change) = core.take_awaited(call) {
        let text = format!("the store of jobs cannot be written: {error}");
        let error = unavailable(text, error.is_maybe_stored, change.job);
        core.links.answer(call, Err(error), 0);
    }
}

/// Answers `rpc.job.get`.
pub fn got(core: &mut JobsCore, call: CallPlace, read: Result<ReadReply, StoreError>) {
    let outcome = match read {
        Ok(ReadReply::Record(Some(record))) => Ok(text_of(&record)),
        Ok(_) => Err(RpcError::of(
            Code::NoSuchJob,
            "there is no job with this id: it is unknown or was removed",
            false,
        )),
        Err(error) => Err(unreadable(&error)),
    };
    core.links.answer_record(call, outcome);
}

/// Handles the record of a job for which calls wait.
pub fn read_for_waits(core: &mut JobsCore, job: JobId, read: Result<ReadReply, StoreError>) {
    let (has_ended, outcome): (bool, Outcome) = match read {
        Ok(ReadReply::Record(Some(record))) => (record.state.is_ended(), Ok(text_of(&record))),
        Ok(_) => (true, Err(no_such_job(job))),
        Err(error) => (false, Err(unreadable(&error))),
    };
    for call in core.waits.take_answered(job, has_ended) {
        core.links.answer_record(call, outcome.clone());
    }
}

fn text_of(record: &JobRecord) -> Vec<u8> {
    let mut text = Vec::new();
    record.write(&mut text);
    text
}

/// Returns the result of an enqueue.
fn stored(jobs: &[EnqueuedJob], is_array: bool) -> Vec<u8> {
    let one = |job: &EnqueuedJob| {
        let (id, state) = (job.id, job.state.name());
        format!(r#"{{"job":"{id}","state":"{state}","new":{}}}"#, job.is_new)
    };
    let jobs: Vec<String> = jobs.iter().map(one).collect();
    match is_array {
        true => format!("[{}]", jobs.join(",")).into_bytes(),
        false => jobs.concat().into_bytes(),
    }
}

fn took_us(begun_ns: u64) -> u64 {
    let took = Duration::from_nanos(monotonic_ns().saturating_sub(begun_ns));
    u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1)
}

fn unavailable(text: String, started: bool, job: Option<JobId>) -> RpcError {
    let error = RpcError::of(Code::Unavailable, text, started);
    match started {
        true => with_job(error, job),
        false => error,
    }
}

fn unreadable(error: &StoreError) -> RpcError {
    let text = format!("the store of jobs cannot be read: {error}");
    unavailable(text, false, None)
}

fn no_such_job(job: JobId) -> RpcError {
    let text = format!("there is no job {job}: it is unknown or was removed");
    RpcError::of(Code::NoSuchJob, text, false)
}

/// Adds the id of the job, so that the caller can look it up.
fn with_job(error: RpcError, job: Option<JobId>) -> RpcError {
    match job {
        Some(job) => error.with_data(serde_json::json!({ "job": job.to_string() })),
        None => error,
    }
}
