//! Handles calls to the jobs process where they differ from those of a pool: how long they wait for it, what happens
//! when it dies, and what their errors say.

use std::sync::atomic::Ordering::Relaxed;

use super::call_dispatcher::CallDispatcher;
use super::jobs_lane::DoubtfulJob;
use super::timers::CallKey;
use crate::link::call_frame::Frame;
use crate::link::scoreboard::{JOBS_LANE, WorkerRecord};
use crate::protocol::code::Code;
use crate::protocol::rpc_error::RpcError;

/// The error that `overdue` calls get.
pub const UNAVAILABLE: (Code, &str) = (
    Code::Unavailable,
    "no jobs process took or answered the call within jobs.enqueue-timeout; try again",
);

/// Returns the calls that have waited for the jobs process for `enqueue-timeout`, or that it has not answered in time.
pub fn overdue(service: &mut CallDispatcher) -> Vec<CallKey> {
    let (forwarding, now_ms) = (&mut service.forwarding, service.now_ms);
    let jobs = &mut forwarding.pools.jobs;
    let Some(lane) = jobs.lane.and_then(|lane| service.calls.lanes.get(lane)) else {
        return Vec::new();
    };
    if lane.local == 0 && !jobs.has_sent() {
        return Vec::new();
    }
    let mut due = Vec::new();
    if now_ms >= jobs.check_ms {
        let table = &service.calls.table;
        jobs.forget_ended(|key| table.get(key).is_some());
        jobs.check_ms = jobs
            .find_stuck(now_ms, &mut due)
            .min(now_ms + jobs.timeout_ms);
        for (key, read_ms) in lane.queue.waiting() {
            let number = table.get(key).map_or(0, |call| call.number());
            let at = jobs.waits_since(number, read_ms) + jobs.timeout_ms;
            match at <= now_ms {
                true => due.push(key),
                false => jobs.check_ms = jobs.check_ms.min(at),
            }
        }
    }
    let check_ms = jobs.check_ms;
    forwarding.recheck_by(check_ms);
    due
}

/// Returns the job of a call that is about to fail, if the call is an enqueue that may be stored all the same.
pub fn doubtful(service: &CallDispatcher, key: CallKey) -> Option<DoubtfulJob> {
    let jobs = &service.forwarding.pools.jobs;
    let call = service.calls.table.get(key)?;
    if !jobs.is(service.calls.lane(call.method)) {
        return None;
    }
    let params = call.to_run.as_ref().map(|to_run| to_run.params.as_ref());
    jobs.doubtful(call.number(), params)
}

/// Returns the error of a call, with what is known about its job.
pub fn with_doubt(error: RpcError, doubtful: Option<DoubtfulJob>) -> RpcError {
    let Some(DoubtfulJob { id }) = doubtful else {
        return error;
    };
    let error = RpcError {
        started: true,
        ..error
    };
    match id {
        Some(id) => error.with_data(serde_json::json!({ "job": id })),
        None => error,
    }
}

/// Lets a call wait again, because the jobs process has ended or takes no calls any more. Returns false if it is no
/// call to the jobs process.
pub fn wait_again(service: &mut CallDispatcher, key: CallKey) -> bool {
    let Some(call) = service.calls.table.get(key) else {
        return false;
    };
    let jobs = &mut service.forwarding.pools.jobs;
    let is_its = jobs.is(service.calls.loads[call.method].lane);
    if is_its {
        let params = call.to_run.as_ref().map(|to_run| to_run.params.as_ref());
        jobs.wait_again(call.number(), params, service.now_ms);
    }
    is_its
}

/// Lets the jobs process answer all waits, because this process drains.
pub fn answer_waits(service: &mut CallDispatcher) {
    let forwarding = &mut service.forwarding;
    let jobs = &mut forwarding.pools.jobs;
    if std::mem::take(&mut jobs.has_waits) {
        let lane = jobs.lane;
        let peers = forwarding.peers.iter_mut();
        for (_, peer) in peers.filter(|(_, peer)| Some(peer.lane) == lane) {
            peer.link.queue(&Frame::AnswerWaits);
        }
    }
}

/// If attempts run here and there is no link to the jobs process, asks the master for one. Perhaps only the link has
/// ended, and the ends of the attempts must be stored.
pub fn find_jobs_process(service: &mut CallDispatcher) {
    let mut peers = service.forwarding.peers.iter();
    let has_jobs_process = peers.any(|(_, peer)| peer.is_jobs_process);
    if service.attempts.count() > 0 && !has_jobs_process {
        let is_jobs = |record: &WorkerRecord| record.lane.load(Relaxed) == JOBS_LANE;
        (service.forwarding).want_links(service.now_ms, is_jobs);
    }
}
