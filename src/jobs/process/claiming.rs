//! Claims due jobs for the executors with room, and sends the jobs to these executors.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::claims::FreeExecutor;
use super::executor::{Actions, ExecutorAction, TrackedAttempt, end_of_too_long, monotonic_of};
use super::executors::Executors;
use super::ticket::Ticket;
use crate::jobs::policy::UnixMs;
use crate::jobs::policy::enqueue::NewJob;
use crate::jobs::policy::states::{AttemptCause, AttemptEnd};
use crate::jobs::record::AttemptOwner;
use crate::jobs::store::request::{ClaimRequest, ClaimedJob, StoreRequest};
use crate::link::attempt_frame::{AttemptFrame, AttemptId, AttemptStart};
use crate::protocol::trace_context::TraceContext;

/// Records when the jobs of an enqueue are due. `now` are the monotonic time and that of the store in milliseconds.
pub fn add_due(executors: &mut Executors, jobs: &[NewJob], (now_ms, store_ms): (u64, UnixMs)) {
    for job in jobs {
        let delay_ms = job.due.at(store_ms) - store_ms;
        let at_ms = now_ms.saturating_add(delay_ms);
        executors.plan.add_due(&job.method, at_ms, 1);
    }
}

/// Claims jobs that are due, for executors with room. `is_up` is whether the store can be written.
pub fn claim(executors: &mut Executors, now_ms: u64, is_up: bool) -> Actions {
    let mut actions = Actions::new();
    let next_ms = executors.plan.next_ms();
    if executors.is_leaving || next_ms.is_none_or(|at| at > now_ms) {
        return actions;
    }
    let turn = executors.turn;
    let after = executors.all.range(turn + 1..).map(|(link, _)| *link);
    let before = executors.all.range(..=turn).map(|(link, _)| *link);
    let links: Vec<u64> = after.chain(before).filter(|_| is_up).collect();
    for link in links {
        if let Some(request) = take_claim(executors, link, now_ms) {
            executors.turn = link;
            let ticket = Ticket::Claim(link);
            actions.push(ExecutorAction::Store(StoreRequest::Claim(request), ticket));
        }
    }
    executors.plan.postpone_due(now_ms);
    actions
}

fn take_claim(executors: &mut Executors, link: u64, now_ms: u64) -> Option<ClaimRequest> {
    let executor = executors.all.get_mut(&link)?;
    let limits = &executors.limits;
    let room = executor.room(&limits.places, limits.generation, now_ms);
    // Attempts that it has named are not tracked before the store was read.
    let is_known = executor.named.is_empty() && executor.reports.is_empty();
    if room == 0 || executor.claiming.is_some() || !is_known {
        return None;
    }
    let mut running = BTreeMap::new();
    for attempt in executor.attempts.values().filter(|it| !it.is_settling) {
        *running.entry(attempt.method.as_str()).or_insert(0) += 1;
    }
    let free = FreeExecutor {
        owner: AttemptOwner {
            instance: executors.instance,
            executor: executor.pid,
        },
        lane: executor.lane,
        room,
        running,
    };
    let request = executors.plan.take_request(&free, now_ms)?;
    executor.claiming = Some(request.most);
    Some(request)
}

/// Sends claimed jobs to the executor for which they were claimed. `next_ms` is the time of the store when the next job
/// of the claimed queues is due.
pub fn claimed(
    executors: &mut Executors,
    link: u64,
    jobs: Vec<ClaimedJob>,
    next_ms: Option<u64>,
    now: (u64, u64),
) -> Actions {
    let mut actions = Actions::new();
    let Some(executor) = executors.all.get_mut(&link) else {
        return actions;
    };
    let most = executor.claiming.take().unwrap_or(0);
    let methods = jobs.iter().map(|job| job.method.as_str());
    let next_ms = next_ms.map(|at| monotonic_of(at, now));
    executors
        .plan
        .claimed(executor.lane, methods, most, (next_ms, now.0));
    let mut unsent = Vec::new();
    let mut too_long = Vec::new();
    for job in jobs {
        let id = AttemptId {
            job: job.id.0,
            token: job.token,
        };
        let tracked = TrackedAttempt {
            method: job.method.clone(),
            number: Some(job.attempt),
            deadline_ms: Some(now.0.saturating_add(job.timeout_ms)),
            is_settling: false,
            is_cancelled: false,
        };
        executor.attempts.insert(id, tracked);
        // The executor would end the link, and with it the other attempts.
        if job.params.len() > executors.limits.longest_params {
            too_long.push((id, job.params.len()));
            continue;
        }
        if executor.record.is_none() {
            unsent.push(id);
            continue;
        }
        executor.sent_since += 1;
        let trace = job.trace.as_deref().and_then(TraceContext::from_text);
        let start = AttemptStart {
            id,
            attempt: job.attempt,
            max_attempts: job.max_attempts,
            timeout_ms: job.timeout_ms,
            method: Cow::Owned(job.method),
            trace: trace.map(Cow::Owned),
            params: Cow::Owned(job.params.into_string()),
        };
        actions.push(ExecutorAction::Send(link, AttemptFrame::Start(start)));
    }
    actions.extend(read_lost(executors, link));
    for (id, length) in too_long {
        actions.extend(executors.settle(link, id, end_of_too_long(length), 0));
    }
    // The executor is gone, and has certainly not begun them.
    for id in unsent {
        let end = AttemptEnd::without_answer(AttemptCause::NeverBegun, None);
        actions.extend(executors.settle(link, id, end, 0));
    }
    executors.forget_settled(link);
    actions
}

/// Records that a claim was not executed, because the store is broken.
pub fn not_claimed(executors: &mut Executors, link: u64, now_ms: u64) -> Actions {
    if let Some(executor) = executors.all.get_mut(&link) {
        executor.claiming = None;
        executors.plan.claim_failed(executor.lane, now_ms);
    }
    let actions = read_lost(executors, link);
    executors.forget_settled(link);
    actions
}

/// Ends a claim that has its reply. Reads the store again if it shows attempts of the executor that this claim has not
/// begun, because then the reply to an earlier claim was lost.
fn read_lost(executors: &mut Executors, link: u64) -> Actions {
    let executor = executors.all.get_mut(&link);
    let is_lost = executor.is_some_and(|executor| {
        let maybe_claimed = std::mem::take(&mut executor.maybe_claimed);
        (maybe_claimed.iter()).any(|id| !executor.attempts.contains_key(id))
    });
    let read = is_lost.then(|| executors.read_running());
    read.into_iter().collect()
}
