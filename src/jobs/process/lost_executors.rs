//! Decides when the attempts of an executor are over, if the executor has died or its link has ended.
//!
//! The master says why a process has died. A process that lives without a link gets a new link, and names its attempts
//! over that link. Pure: the caller passes the time, and whether a process exists.

use super::executor::{Actions, CAUSE_MS};
use super::executors::Executors;
use crate::link::executor_end::{ExecutorCause, ExecutorEnd};

/// Handles what the master says about the end of a process.
pub fn executor_ended(executors: &mut Executors, end: ExecutorEnd, now_ms: u64) -> Actions {
    let links: Vec<u64> = executors.all_of(end.pid).map(|(link, _)| link).collect();
    executors.ended.add(end.pid, end.cause, now_ms);
    if links.is_empty() {
        return vec![executors.read_running()];
    }
    let mut actions = Actions::new();
    for link in links {
        if let Some(executor) = executors.all.get_mut(&link) {
            executor.cause = Some(end.cause);
        }
        // A report may be on its way until the link of the executor has ended.
        actions.extend(executors.settle_dead(link, now_ms));
    }
    actions
}

/// Settles the attempts of dead executors of which the master says nothing. Reads the store if that is due.
pub fn pass_time(
    executors: &mut Executors,
    is_alive: impl Fn(i32) -> bool,
    now_ms: u64,
) -> Actions {
    let mut actions = Actions::new();
    if executors.look_ms.is_some_and(|at| at <= now_ms) {
        executors.look_ms = None;
        actions.push(executors.read_running());
    }
    let all = executors.all.iter();
    let unexplained = all.filter(|(_, executor)| {
        let is_overdue = executor.ended_ms.is_some_and(|at| at + CAUSE_MS <= now_ms);
        is_overdue && executor.cause.is_none()
    });
    let unexplained: Vec<(u64, i32)> = unexplained.map(|(link, it)| (*link, it.pid)).collect();
    for (link, pid) in unexplained {
        if executors.all_of(pid).any(|(_, it)| it.record.is_some()) {
            actions.extend(executors.retire(link));
        } else if let Some(executor) = executors.all.get_mut(&link) {
            match is_alive(pid) {
                // Only its link has ended. No other attempt of its jobs may begin.
                true => executor.ended_ms = Some(now_ms),
                false => {
                    executor.cause = Some(ExecutorCause::Outside);
                    actions.extend(executors.settle_dead(link, now_ms));
                }
            }
        }
    }
    actions
}
