//! Connects the executors of attempts with the store, the links and the calls of the jobs process.
//!
//! [`super::executors`] decides, and its actions are carried out here.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::fence;

use super::calls;
use super::claiming;
use super::claims::{ClaimPlan, QueueMethod};
use super::comparison::compare;
use super::core::JobsCore;
use super::executor::{Actions, ExecutorAction};
use super::health::StoreState;
use super::links::LinkEnd;
use super::lost_executors;
use super::store_event::{ReadReply, ReadRequest};
use super::ticket::Ticket;
use crate::handler::registry::Registry;
use crate::jobs::kill_point::{self, KillPoint};
use crate::jobs::policy::UnixMs;
use crate::jobs::policy::states::{AttemptCause, EndReason, JobFate, JobState};
use crate::jobs::store::error::StoreError;
use crate::jobs::store::request::{ClaimedJob, FreedAttempt, SettleReply, StoreReply};
use crate::link::attempt_frame::{AttemptFrame, AttemptId};
use crate::link::call_frame::Frame;
use crate::link::executor_end::ExecutorEnd;
use crate::link::scoreboard::{LANES, WorkerRecord};
use crate::logging::pluralize;
use crate::protocol::job_id::JobId;
use crate::sys::process::{Pid, unix_time_ms};
use crate::sys::process_tree;
use crate::throttle::limiter::SharedLimiter;
use crate::worker::peer::place;

/// Returns the plan of claims for the methods of a generation.
pub fn plan(registry: &Registry) -> ClaimPlan {
    let methods = registry.methods().iter().enumerate();
    let methods = methods.filter(|(number, _)| {
        registry.job_method(*number).is_none() && !registry.is_of_connections(*number)
    });
    let methods = methods.map(|(_, method)| {
        let queue = QueueMethod {
            lane: method.handler.placement().lane(),
            concurrency: method.concurrency,
        };
        (method.name.clone(), queue)
    });
    ClaimPlan::new(methods.collect::<BTreeMap<_, _>>())
}

/// Carries out what the executors need.
fn run(core: &mut JobsCore, actions: Actions) {
    for action in actions {
        match action {
            ExecutorAction::Store(request, ticket) => core.store.submit(request, ticket),
            ExecutorAction::Send(link, frame) => {
                if let Some(link) = core.links.get_mut(link) {
                    link.link.queue(&Frame::Attempt(frame));
                }
            }
            ExecutorAction::ReadRunning => {
                core.store.read(ReadRequest::Running, Ticket::Running);
            }
            ExecutorAction::JobEnded {
                job,
                method,
                end,
                attempts,
            } => job_ended(core, (job, &method), end, attempts),
            ExecutorAction::Count(method, cause, took_us) => {
                if let Some(counters) = &core.counters {
                    // An attempt that never began took no time.
                    let ran_ns = (took_us > 0).then(|| took_us.saturating_mul(1_000));
                    counters.attempted(&method, cause, ran_ns);
                }
            }
            ExecutorAction::CountStale => {
                if let Some(counters) = &core.counters {
                    counters.stale();
                }
            }
        }
    }
}

/// Returns the monotonic time and the time of the store, in milliseconds.
fn now(core: &JobsCore) -> (u64, UnixMs) {
    (core.now_ms, unix_time_ms())
}

/// Handles a frame about attempts. Returns false if it is invalid, or if the other process runs no attempts.
pub fn receive(core: &mut JobsCore, link: u64, frame: AttemptFrame<'_>) -> bool {
    let Some(LinkEnd::Executor(record)) = core.links.get_mut(link).map(|link| link.end) else {
        return false;
    };
    let actions = core.executors.receive(link, record, frame, core.now_ms);
    let is_valid = actions.is_some();
    run(core, actions.unwrap_or_default());
    is_valid
}

/// Records that an executor begins no further attempt.
pub fn leaves(core: &mut JobsCore, link: u64) {
    core.executors.leaves(link);
}

/// Records that an executor has room for more attempts.
pub fn offers(core: &mut JobsCore, link: u64) {
    core.executors.offers(link, core.now_ms);
}

/// Handles the end of a link, which was removed.
pub fn link_ended(core: &mut JobsCore, link: u64) {
    let actions = core.executors.link_ended(link, core.now_ms);
    run(core, actions);
}

/// Handles what the master says about the end of a worker or pool process.
pub fn executor_ended(core: &mut JobsCore, end: ExecutorEnd) {
    let actions = lost_executors::executor_ended(&mut core.executors, end, core.now_ms);
    run(core, actions);
}

/// Handles that the store was opened: attempts of an earlier jobs process may run, and jobs may be due.
pub fn store_opened(core: &mut JobsCore) {
    let read = core.executors.read_running();
    run(core, vec![read]);
    look(core);
}

/// Counts an attempt that was lost with the instance that ran it, and the end of its job.
pub fn freed(core: &mut JobsCore, freed: &FreedAttempt) {
    if let Some(counters) = &core.counters {
        counters.attempted(&freed.method, AttemptCause::Lost, None);
    }
    match freed.fate {
        JobFate::End { state, reason } => {
            job_ended(core, (freed.id, &freed.method), (state, reason), None);
        }
        JobFate::Wait { .. } => calls::note_ended(core, freed.id),
    }
}

/// Handles the end of a job: counts it, logs it if the job is dead, and answers those who wait for it. `attempts` is
/// how many there were, if that is known.
pub fn job_ended(
    core: &mut JobsCore,
    (job, method): (JobId, &str),
    (state, reason): (JobState, Option<EndReason>),
    attempts: Option<u32>,
) {
    if let Some(counters) = &core.counters {
        counters.ended(method, state, reason);
    }
    if let (JobState::Dead, Some(reason)) = (state, reason) {
        log_dead(job, method, reason, attempts);
    }
    calls::note_ended(core, job);
}

/// Looks for due jobs in the store, because other processes may have added some.
pub fn look(core: &mut JobsCore) {
    let now_ms = core.now_ms;
    core.executors.plan().look_at_all(now_ms);
}

/// Reads which attempts run, because another jobs process stores cancel requests for them, or has left some when it
/// ended. Does nothing while a read is under way, unless `is_needed`.
pub fn look_at_running(core: &mut JobsCore, is_needed: bool) {
    if is_needed || !core.executors.is_reading() {
        let read = core.executors.read_running();
        run(core, vec![read]);
    }
}

/// Handles the reply to a claim.
pub fn claimed(
    core: &mut JobsCore,
    ticket: &Ticket,
    jobs: Vec<ClaimedJob>,
    next_ms: Option<UnixMs>,
) {
    if let Ticket::Claim(link) = ticket {
        if !jobs.is_empty() {
            kill_point::reached(KillPoint::AfterClaim);
        }
        let now = now(core);
        if let Some(counters) = &core.counters {
            let due = jobs.iter().map(|job| job.due_ms);
            due.for_each(|due_ms| counters.claimed(due_ms, now.1));
        }
        let actions = claiming::claimed(&mut core.executors, *link, jobs, next_ms, now);
        run(core, actions);
    }
}

/// Handles the stored end of an attempt.
pub fn settled(core: &mut JobsCore, id: AttemptId, reply: &SettleReply) {
    kill_point::reached(KillPoint::BeforeAcknowledgement);
    let now = now(core);
    let actions = core.executors.settled(id, reply, now);
    run(core, actions);
}

/// Handles that a claim or the end of an attempt cannot be stored.
pub fn failed(core: &mut JobsCore, ticket: &Ticket) {
    match ticket {
        Ticket::Claim(link) => {
            let actions = claiming::not_claimed(&mut core.executors, *link, core.now_ms);
            run(core, actions);
        }
        Ticket::Settle(id) => {
            let actions = core.executors.not_settled(*id);
            run(core, actions);
        }
        _ => {}
    }
}

/// Passes the cancel request of a client to the executor of a running attempt.
pub fn cancelled(core: &mut JobsCore, job: JobId, reply: &StoreReply) {
    if let StoreReply::Cancelled(reply) = reply {
        let actions = core.executors.cancelled(job, reply);
        run(core, actions);
    }
}

/// Handles the result of reading which attempts run according to the store.
pub fn running_read(core: &mut JobsCore, read: Result<ReadReply, StoreError>) {
    let Ok(ReadReply::Running(rows)) = read else {
        // The reports that wait for it are handled after the next read.
        core.executors.read_failed(core.now_ms);
        return;
    };
    let is_alone = !core.has_other();
    let actions = compare(&mut core.executors, &rows, is_alone, is_alive, core.now_ms);
    run(core, actions);
}

/// Clients can cause such lines, by params that the handler refuses.
fn log_dead(job: JobId, method: &str, reason: EndReason, attempts: Option<u32>) {
    static DEAD_JOBS: SharedLimiter = SharedLimiter::new();

    let attempts = attempts.map_or_else(String::new, |number| {
        format!(
            " after {}",
            pluralize(number as usize, "attempt", "attempts")
        )
    });
    let reason = reason.name();
    let text = format!(
        "job dead{attempts}: see preforkd job show {job} job={job} method={method} reason={reason}"
    );
    DEAD_JOBS.log(log::Level::Warn, text);
}

fn is_alive(pid: i32) -> bool {
    process_tree::living_since(Pid(pid)).is_some()
}

/// Claims due jobs, and does what else is due. Shows in the record of this process how many jobs wait for room, so that
/// executors offer it.
pub fn pass_time(core: &mut JobsCore, record: &WorkerRecord) {
    let mut actions = lost_executors::pass_time(&mut core.executors, is_alive, core.now_ms);
    let is_up = core.store.state == StoreState::Up && core.store.opened.is_some();
    actions.extend(claiming::claim(&mut core.executors, core.now_ms, is_up));
    run(core, actions);
    let mut is_changed = false;
    let lanes = 0..=core.registry.pools().len();
    let waiting = waiting_by_place(lanes.map(|lane| core.executors.waiting_in(lane)));
    for (shown, waiting) in record.waiting.iter().zip(waiting) {
        is_changed |= shown.swap(waiting, Relaxed) != waiting;
    }
    if is_changed {
        record.capacity_epoch.fetch_add(1, Relaxed);
        // An executor that gets room now either sees these numbers, or this process sees its room at the next claim.
        fence(SeqCst);
    }
}

/// Sums the numbers of the lanes from 0 on by their places in a record, because many lanes may share the last one.
fn waiting_by_place(lanes: impl Iterator<Item = usize>) -> [u32; LANES] {
    let mut sums = [0_u32; LANES];
    for (lane, waiting) in lanes.enumerate() {
        let waiting = u32::try_from(waiting).unwrap_or(u32::MAX);
        let sum = &mut sums[place(lane)];
        *sum = sum.saturating_add(waiting);
    }
    sums
}

/// Returns when `pass_time` is due.
pub fn next_ms(core: &JobsCore) -> Option<u64> {
    core.executors.next_ms()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_that_share_a_place_are_summed() {
        let lanes = (0..LANES + 2).map(|lane| if lane == LANES { 0 } else { 3 });
        let sums = waiting_by_place(lanes);
        assert_eq!((sums[0], sums[LANES - 2]), (3, 3));
        assert_eq!(sums[LANES - 1], 6);
        let many = waiting_by_place([usize::MAX].into_iter());
        assert_eq!(many[0], u32::MAX);
    }
}
