//! Holds what a worker knows of its calls to the jobs process.
//!
//! Such a call waits in its lane until the jobs process takes it. If that process dies or drains, its calls wait again
//! for the next one, because each of them may be repeated: a new job gets its id here, so an enqueue that is sent again
//! stores nothing twice. Pure, except that it reads the clock and random bits for an id.

use std::collections::HashMap;

use super::timers::CallKey;
use crate::handler::job_methods::JobMethod;
use crate::link::message;
use crate::link::scoreboard;
use crate::protocol::http::respond_async;
use crate::protocol::job_id::JobId;
use crate::sys::process::unix_time_ms;
use crate::sys::random::random_bytes;

/// When `enqueue-timeout` is over, the jobs process itself answers a call that it has taken, because only it knows
/// whether the job is stored. If no answer has come this many milliseconds later, it is stuck.
const STUCK_MS: u64 = 100;

/// A call that was sent at least once.
#[derive(Debug)]
struct SentJobCall {
    key: CallKey,
    is_enqueue: bool,
    /// When the jobs process must have answered, in milliseconds; `u64::MAX` for a wait.
    due_ms: u64,
    /// The id for a job that has none.
    first_id: Option<Box<str>>,
    /// Since when it waits again, in milliseconds; `None` while the jobs process has it.
    waits_since_ms: Option<u64>,
    /// The job of an enqueue that waits again, if the call enqueues exactly one job.
    job: Option<String>,
}

/// The job of an enqueue that may be stored although its call has failed.
#[derive(Debug, PartialEq, Eq)]
pub struct DoubtfulJob {
    /// Its id, if it is known.
    pub id: Option<String>,
}

/// The calls to the jobs process.
#[derive(Debug, Default)]
pub struct JobsLane {
    /// The number of the lane; `None` without jobs.
    pub lane: Option<usize>,
    /// `jobs.enqueue-timeout` in milliseconds.
    pub timeout_ms: u64,
    /// When the first call may be overdue.
    pub check_ms: u64,
    /// By their numbers.
    sent: HashMap<u64, SentJobCall>,
    /// Whether calls of `rpc.job.wait` were sent since the jobs process was last asked to answer them.
    pub has_waits: bool,
}

impl JobsLane {
    pub fn new(lane: Option<usize>, timeout_ms: u64) -> Self {
        JobsLane {
            lane,
            timeout_ms,
            ..JobsLane::default()
        }
    }

    /// Returns whether this is its lane.
    pub fn is(&self, lane: usize) -> bool {
        self.lane == Some(lane)
    }

    /// Returns the lane of this process that an order means.
    pub fn of_order(&self, lane: u16) -> Option<usize> {
        match lane {
            message::JOBS_LANE => self.lane,
            lane => Some(lane.into()),
        }
    }

    /// Returns how the scoreboard shows a lane.
    pub fn shown(&self, lane: usize) -> u32 {
        match self.is(lane) {
            true => scoreboard::JOBS_LANE,
            false => lane as u32,
        }
    }

    /// Records that a call is sent, perhaps again. `read_ms` is when it was read. Returns the id for a job without one.
    pub fn send(
        &mut self,
        (number, key): (u64, CallKey),
        method: JobMethod,
        read_ms: u64,
    ) -> Option<&str> {
        let is_wait = method == JobMethod::Wait;
        self.has_waits |= is_wait;
        let is_enqueue = method == JobMethod::Enqueue;
        let due_ms = match is_wait {
            true => u64::MAX,
            false => read_ms.saturating_add(self.timeout_ms + STUCK_MS),
        };
        self.check_ms = self.check_ms.min(due_ms);
        let call = self.sent.entry(number).or_insert_with(|| SentJobCall {
            key,
            is_enqueue,
            due_ms,
            first_id: is_enqueue.then(make_id).flatten(),
            waits_since_ms: None,
            job: None,
        });
        call.waits_since_ms = None;
        call.first_id.as_deref()
    }

    /// Records that a call waits again from `now_ms` on. `params` are its params.
    pub fn wait_again(&mut self, number: u64, params: Option<&str>, now_ms: u64) {
        if let Some(call) = self.sent.get_mut(&number) {
            call.waits_since_ms = Some(now_ms);
            call.job = params.and_then(|params| job_of(params, call.first_id.as_deref()));
        }
        self.check_ms = self.check_ms.min(now_ms + self.timeout_ms);
    }

    /// Returns since when a call waits: `read_ms`, when it was read, unless it waits again.
    pub fn waits_since(&self, number: u64, read_ms: u64) -> u64 {
        let call = self.sent.get(&number);
        call.and_then(|call| call.waits_since_ms).unwrap_or(read_ms)
    }

    /// Adds the calls that the jobs process should have answered by `now_ms` to `overdue`. Returns when this is due
    /// again.
    pub fn find_stuck(&self, now_ms: u64, overdue: &mut Vec<CallKey>) -> u64 {
        let mut next_ms = u64::MAX;
        let sent = self.sent.values();
        for call in sent.filter(|call| call.waits_since_ms.is_none()) {
            match call.due_ms <= now_ms {
                true => overdue.push(call.key),
                false => next_ms = next_ms.min(call.due_ms),
            }
        }
        next_ms
    }

    /// Returns whether the jobs process has calls, or had some that wait again.
    pub fn has_sent(&self) -> bool {
        !self.sent.is_empty()
    }

    /// Returns the job of an enqueue that was sent; `None` for another call, which has certainly stored nothing.
    /// `params` are `Some` while the jobs process has the call.
    pub fn doubtful(&self, number: u64, params: Option<&str>) -> Option<DoubtfulJob> {
        let call = self.sent.get(&number).filter(|call| call.is_enqueue)?;
        let id = params.and_then(|params| job_of(params, call.first_id.as_deref()));
        Some(DoubtfulJob {
            id: id.or_else(|| call.job.clone()),
        })
    }

    /// Removes a call that is over.
    pub fn forget(&mut self, number: u64) {
        if !self.sent.is_empty() {
            self.sent.remove(&number);
        }
    }

    /// Forgets calls that ended while they waited to be sent again. `is_open` says whether a call still exists.
    pub fn forget_ended(&mut self, is_open: impl Fn(CallKey) -> bool) {
        self.sent
            .retain(|_, call| call.waits_since_ms.is_none() || is_open(call.key));
    }
}

/// Makes the id of a new job, a UUID of version 7. Returns `None` if there are no random bits: then the jobs process
/// makes one.
fn make_id() -> Option<Box<str>> {
    let id = JobId::at(unix_time_ms(), random_bytes().ok()?);
    Some(id.to_string().into())
}

/// Returns the id of the job that these params of an enqueue store, if they store exactly one job.
fn job_of(params: &str, first_id: Option<&str>) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct OwnId<'a> {
        #[serde(borrow, default)]
        id: Option<std::borrow::Cow<'a, str>>,
    }

    let own = match respond_async::read(params) {
        // The id of a job with an Idempotency-Key is unknown here.
        Ok(Some(request)) => request.key.is_none().then_some(None)?,
        _ if params.trim_start().starts_with('{') => {
            serde_json::from_str::<OwnId<'_>>(params).ok()?.id
        }
        _ => return None,
    };
    own.as_deref().or(first_id).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn key(serial: u64) -> CallKey {
        CallKey { index: 0, serial }
    }

    #[test]
    fn an_enqueue_that_is_sent_again_has_the_same_id() {
        let mut lane = JobsLane::new(Some(3), 100);
        let send = |lane: &mut JobsLane, number, method| {
            let id = lane.send((number, key(number)), method, 5);
            id.map(str::to_owned)
        };
        let id = send(&mut lane, 7, JobMethod::Enqueue).unwrap();
        assert_eq!((id.len(), &id[14..15]), (36, "7"));
        assert_ne!(send(&mut lane, 8, JobMethod::Enqueue).unwrap(), id);
        assert_eq!(send(&mut lane, 9, JobMethod::Get), None);
        assert_eq!(lane.waits_since(7, 5), 5);
        lane.wait_again(7, Some("{\"method\":\"a\"}"), 50);
        assert_eq!(lane.waits_since(7, 5), 50);
        let doubtful = |lane: &JobsLane, params| lane.doubtful(7, params).unwrap().id;
        assert_eq!(doubtful(&lane, None), Some(id.clone()));
        assert_eq!(send(&mut lane, 7, JobMethod::Enqueue), Some(id));
        let own = doubtful(&lane, Some("{\"id\":\"own\"}"));
        assert_eq!(own.as_deref(), Some("own"));
        let of_array = lane.doubtful(8, Some("[{\"id\":\"own\"}]"));
        assert_eq!(of_array, Some(DoubtfulJob { id: None }));
        assert_eq!(lane.doubtful(9, Some("{}")), None);
        lane.forget(7);
        assert_eq!(lane.doubtful(7, Some("{}")), None);
    }

    #[test]
    fn a_call_that_ended_while_it_waited_again_is_forgotten() {
        let mut lane = JobsLane::new(Some(3), 100);
        lane.send((1, key(1)), JobMethod::Wait, 0);
        lane.send((2, key(2)), JobMethod::Wait, 0);
        lane.wait_again(1, None, 10);
        lane.forget_ended(|_| false);
        assert_eq!(lane.sent.len(), 1);
        assert!(lane.has_waits && lane.is(3) && !lane.is(2));
        assert_eq!((lane.shown(3), lane.shown(2)), (u32::MAX, 2));
        assert_eq!(
            (lane.of_order(u16::MAX), lane.of_order(2)),
            (Some(3), Some(2))
        );
    }

    #[test]
    fn a_call_that_the_jobs_process_does_not_answer_is_overdue_unless_it_waits_for_a_job() {
        let mut lane = JobsLane::new(Some(3), 100);
        lane.send((1, key(1)), JobMethod::Get, 1_000);
        lane.send((2, key(2)), JobMethod::Wait, 1_000);
        lane.send((3, key(3)), JobMethod::Enqueue, 1_050);
        let stuck = |lane: &JobsLane, now_ms| {
            let mut overdue = Vec::new();
            let next_ms = lane.find_stuck(now_ms, &mut overdue);
            (overdue, next_ms)
        };
        let first = 1_100 + STUCK_MS;
        assert_eq!(stuck(&lane, first - 1), (vec![], first));
        assert_eq!(stuck(&lane, first), (vec![key(1)], first + 50));
        lane.forget(1);
        lane.wait_again(3, None, first);
        assert_eq!(stuck(&lane, u64::MAX - 1), (vec![], u64::MAX));
        assert!(lane.has_sent());
    }
}
