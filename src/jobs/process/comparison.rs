//! Compares the attempts that run according to the store with those of the executors.
//!
//! The jobs process compares them when it begins, when the store is open again, and when an executor names attempts
//! that it does not know, because another jobs process has claimed them.

use std::collections::BTreeSet;

use super::executor::{Actions, CAUSE_MS, Executor, ExecutorAction, TrackedAttempt};
use super::executors::Executors;
use crate::jobs::policy::states::{AttemptCause, AttemptEnd};
use crate::jobs::store::request::RunningAttempt;
use crate::link::attempt_frame::{AttemptFrame, AttemptId};

/// Takes over the attempts of this instance that run according to the store, and settles those that no executor has.
/// `is_alone` is whether no other jobs process of the instance claims jobs; `is_alive` returns whether a process
/// exists.
pub fn compare(
    executors: &mut Executors,
    rows: &[RunningAttempt],
    is_alone: bool,
    is_alive: impl Fn(i32) -> bool,
    now_ms: u64,
) -> Actions {
    let mut actions = Actions::new();
    let (read, settled) = executors.end_read();
    let foreign_dead = std::mem::take(&mut executors.foreign_dead);
    for row in rows {
        let id = AttemptId {
            job: row.id.0,
            token: row.token,
        };
        // The row is older than the settlement.
        if settled.contains(&id) {
            continue;
        }
        let Some(link) = executors.link_of(row.executor) else {
            // What the master says counts, also if another process has the pid now.
            if executors.ended.cause(row.executor).is_some() || !is_alive(row.executor) {
                let since_ms = foreign_dead.get(&row.executor).copied().unwrap_or(now_ms);
                if is_alone || since_ms + CAUSE_MS <= now_ms {
                    actions.extend(take_over_dead(executors, row, id, now_ms));
                } else {
                    // The other jobs process settles it, unless it never had a link to this executor. So it is left to
                    // that process for a while only.
                    executors.foreign_dead.insert(row.executor, since_ms);
                    executors.look_at(since_ms + CAUSE_MS);
                }
            }
            continue;
        };
        let is_claiming = |it: &(u64, &Executor)| it.1.claiming.is_some();
        let claiming = executors.all_of(row.executor).find(is_claiming);
        let claiming = claiming.map(|(link, _)| link);
        // The attempt may still belong to an earlier link of the executor.
        let has_it = |it: &(u64, &Executor)| it.1.attempts.contains_key(&id);
        let tracked = executors.all_of(row.executor).find(has_it);
        let link = tracked.map_or(link, |(link, _)| link);
        let Some(executor) = executors.all.get_mut(&link) else {
            continue;
        };
        let is_linked = executor.record.is_some();
        if let Some(tracked) = executor.attempts.get_mut(&id) {
            if row.is_cancel_requested && is_linked && !tracked.is_cancelled {
                // The cancel request may have come from a client of the other jobs process.
                tracked.is_cancelled = true;
                actions.push(ExecutorAction::Send(link, AttemptFrame::Cancel(id)));
            }
            continue;
        }
        if executor.needs_read > read {
            continue;
        }
        let is_reported = executor.reports.iter().any(|report| report.id == id);
        let is_named = is_reported || executor.named.contains(&id);
        // The claim under way may have begun this attempt. Then its executor does not have it yet, and cannot name it.
        if !is_named && let Some(claiming) = claiming.and_then(|it| executors.all.get_mut(&it)) {
            claiming.maybe_claimed.push(id);
            continue;
        }
        if is_linked && !is_named && !is_alone {
            // The other jobs process may be about to send it.
            continue;
        }
        let found = TrackedAttempt::found(&row.method);
        if let Some(executor) = executors.all.get_mut(&link) {
            executor.attempts.insert(id, found);
        }
        if !is_linked {
            actions.extend(executors.settle_dead(link, now_ms));
        } else if !is_named {
            // The reply to the claim was lost, so the executor never got it.
            let end = AttemptEnd::without_answer(AttemptCause::NeverBegun, None);
            actions.extend(executors.settle(link, id, end, 0));
        } else if row.is_cancel_requested {
            actions.push(ExecutorAction::Send(link, AttemptFrame::Cancel(id)));
        }
    }
    forget_ended(executors, rows, read);
    let links: Vec<u64> = executors.all.keys().copied().collect();
    for link in links {
        if executors
            .all
            .get(&link)
            .is_some_and(|it| it.needs_read <= read)
        {
            actions.extend(handle_early_reports(executors, link, now_ms));
        }
    }
    actions
}

/// Removes the attempts that another jobs process has settled. Only that process gets their reports.
fn forget_ended(executors: &mut Executors, rows: &[RunningAttempt], read: u64) {
    let running = rows.iter().map(|row| (row.id.0, row.token));
    let running: BTreeSet<([u8; 16], u64)> = running.collect();
    let linked = executors.all.values_mut().filter(|it| it.record.is_some());
    for executor in linked.filter(|it| it.needs_read <= read) {
        let attempts = &mut executor.attempts;
        attempts.retain(|id, attempt| !attempt.is_found() || running.contains(&(id.job, id.token)));
    }
}

/// Settles an attempt whose executor has ended and was never linked with this process.
fn take_over_dead(
    executors: &mut Executors,
    row: &RunningAttempt,
    id: AttemptId,
    now_ms: u64,
) -> Actions {
    let cause = executors.ended.cause(row.executor);
    // No link has this number, so it can be the key of an executor without a link.
    let link = u64::MAX - u64::from(row.executor.unsigned_abs());
    let executor =
        (executors.all.entry(link)).or_insert_with(|| Executor::dead(row.executor, now_ms, cause));
    let found = TrackedAttempt::found(&row.method);
    executor.attempts.entry(id).or_insert(found);
    executors.settle_dead(link, now_ms)
}

/// Handles the reports that came before the store was read.
fn handle_early_reports(executors: &mut Executors, link: u64, now_ms: u64) -> Actions {
    let Some(executor) = executors.all.get_mut(&link) else {
        return Actions::new();
    };
    // No job was claimed for it before its attempts were known.
    if !executor.named.is_empty() || !executor.reports.is_empty() {
        executors.plan.has_room(executor.lane, now_ms);
    }
    executor.named.clear();
    let mut actions = Actions::new();
    for report in std::mem::take(&mut executor.reports) {
        let executor = executors.all.get(&link);
        if executor.is_some_and(|it| it.attempts.contains_key(&report.id)) {
            actions.extend(executors.settle_report(link, report, now_ms));
        } else {
            // The job was claimed again, settled or removed.
            let stored = AttemptFrame::Stored(report.id);
            actions.push(ExecutorAction::Send(link, stored));
        }
    }
    actions
}
