//! Holds the calls of `rpc.job.wait`. Pure: the caller passes the time and reads the records.
//!
//! A call is answered when its job has ended. It is answered with the record as it is when its time is over, or when
//! its worker or this process drains. Each answer needs a read of the record, and one read answers all calls of a job.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::ticket::CallPlace;
use crate::protocol::job_id::JobId;

#[derive(Debug)]
struct WaitingCall {
    job: JobId,
    until_ms: u64,
    /// Whether it is answered with the record as it is.
    is_over: bool,
}

/// The waiting calls.
#[derive(Debug, Default)]
pub struct Waits {
    calls: BTreeMap<CallPlace, WaitingCall>,
    jobs: HashMap<JobId, BTreeSet<CallPlace>>,
    /// Calls whose time is not over.
    timers: BTreeSet<(u64, CallPlace)>,
}

impl Waits {
    /// Adds a call that waits for a job until `until_ms`. The record of the job must be read afterwards, because
    /// nothing else reports that the job has ended already.
    pub fn add(&mut self, call: CallPlace, job: JobId, until_ms: u64) {
        self.remove(call);
        self.timers.insert((until_ms, call));
        self.jobs.entry(job).or_default().insert(call);
        let waiting = WaitingCall {
            job,
            until_ms,
            is_over: false,
        };
        self.calls.insert(call, waiting);
    }

    /// Removes a call whose caller does not wait any more. Returns whether it was there.
    pub fn remove(&mut self, call: CallPlace) -> bool {
        let Some(waiting) = self.calls.remove(&call) else {
            return false;
        };
        self.timers.remove(&(waiting.until_ms, call));
        if let Some(calls) = self.jobs.get_mut(&waiting.job) {
            calls.remove(&call);
            if calls.is_empty() {
                self.jobs.remove(&waiting.job);
            }
        }
        true
    }

    /// Removes the calls of a link that has ended.
    pub fn remove_link(&mut self, link: u64) {
        for call in self.of_link(link) {
            self.remove(call);
        }
    }

    fn of_link(&self, link: u64) -> Vec<CallPlace> {
        let place = |number| CallPlace { link, number };
        let calls = self.calls.range(place(0)..=place(u64::MAX));
        calls.map(|(call, _)| *call).collect()
    }

    /// Ends the waits whose time is over at `now_ms`. Returns the jobs whose records must be read.
    pub fn expire(&mut self, now_ms: u64) -> BTreeSet<JobId> {
        let due = self.timers.iter().take_while(|(at, _)| *at <= now_ms);
        let due: Vec<CallPlace> = due.map(|(_, call)| *call).collect();
        self.end_time(due)
    }

    /// Ends the waits of all calls of a link. Returns the jobs whose records must be read.
    pub fn finish_link(&mut self, link: u64) -> BTreeSet<JobId> {
        let calls = self.of_link(link);
        self.end_time(calls)
    }

    /// Ends the waits of all calls. Returns the jobs whose records must be read.
    pub fn finish_all(&mut self) -> BTreeSet<JobId> {
        let calls: Vec<CallPlace> = self.calls.keys().copied().collect();
        self.end_time(calls)
    }

    fn end_time(&mut self, calls: Vec<CallPlace>) -> BTreeSet<JobId> {
        let mut jobs = BTreeSet::new();
        for call in calls {
            if let Some(waiting) = self.calls.get_mut(&call)
                && !std::mem::replace(&mut waiting.is_over, true)
            {
                self.timers.remove(&(waiting.until_ms, call));
                jobs.insert(waiting.job);
            }
        }
        jobs
    }

    /// Removes the calls that the record of a job answers, and returns them. `has_ended` says whether all are
    /// answered: the job has ended, or does not exist.
    pub fn take_answered(&mut self, job: JobId, has_ended: bool) -> Vec<CallPlace> {
        let Some(calls) = self.jobs.get(&job) else {
            return Vec::new();
        };
        let is_answered = |call: &&CallPlace| {
            has_ended || self.calls.get(call).is_none_or(|waiting| waiting.is_over)
        };
        let answered: Vec<CallPlace> = calls.iter().filter(is_answered).copied().collect();
        for call in &answered {
            self.remove(*call);
        }
        answered
    }

    /// Returns whether a call waits for this job.
    pub fn has(&self, job: JobId) -> bool {
        self.jobs.contains_key(&job)
    }

    /// Returns the jobs for which calls wait.
    pub fn jobs(&self) -> impl Iterator<Item = JobId> {
        self.jobs.keys().copied()
    }

    pub fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    /// Returns when `expire` is due.
    pub fn next_ms(&self) -> Option<u64> {
        self.timers.first().map(|(at, _)| *at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn call(link: u64, number: u64) -> CallPlace {
        CallPlace { link, number }
    }

    const fn job(number: u8) -> JobId {
        JobId([number; 16])
    }

    #[test]
    fn an_ended_job_answers_all_its_calls_and_a_living_one_those_whose_time_is_over() {
        let mut waits = Waits::default();
        waits.add(call(1, 1), job(1), 100);
        waits.add(call(2, 1), job(1), 200);
        waits.add(call(2, 2), job(2), 300);
        assert!(waits.take_answered(job(1), false).is_empty());
        assert_eq!(waits.next_ms(), Some(100));
        assert!(waits.expire(99).is_empty());
        assert_eq!(waits.expire(100), BTreeSet::from([job(1)]));
        assert_eq!(waits.next_ms(), Some(200));
        assert_eq!(waits.take_answered(job(1), false), [call(1, 1)]);
        assert_eq!(waits.take_answered(job(1), true), [call(2, 1)]);
        assert!(!waits.has(job(1)) && waits.has(job(2)));
        assert!(waits.take_answered(job(1), true).is_empty());
        assert_eq!(waits.jobs().collect::<Vec<_>>(), [job(2)]);
    }

    #[test]
    fn calls_of_a_link_end_with_it_and_are_over_when_it_drains() {
        let mut waits = Waits::default();
        waits.add(call(1, u64::MAX), job(1), 100);
        waits.add(call(2, 0), job(1), 100);
        waits.add(call(3, 0), job(2), 100);
        assert_eq!(waits.finish_link(2), BTreeSet::from([job(1)]));
        assert_eq!(waits.take_answered(job(1), false), [call(2, 0)]);
        waits.remove_link(1);
        waits.remove(call(1, 1));
        assert!(!waits.has(job(1)));
        assert_eq!(waits.finish_all(), BTreeSet::from([job(2)]));
        assert_eq!(waits.next_ms(), None);
        assert_eq!(waits.take_answered(job(2), false), [call(3, 0)]);
        assert!(waits.is_empty());
    }
}
