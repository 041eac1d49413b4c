//! Decides when due jobs are claimed, and for which executor.
//!
//! A job is claimed only for capacity that is free now. So each executor has at most one claim under way, for the calls
//! that it could begin. A lane has the methods of one kind of executor: the workers have lane 0, and each pool has a
//! lane. Pure: the caller passes the time, and what the executors show.

use std::collections::BTreeMap;

use crate::jobs::policy::turns::{QueueShare, QueueTurns};
use crate::jobs::record::AttemptOwner;
use crate::jobs::store::request::ClaimRequest;

/// The time between two claims of a lane whose due jobs could not be claimed.
const RETRY_MS: u64 = 100;
/// How long an executor gets no job of a method after it has refused one. It refuses if a limit of the method is
/// reached, or if a call has taken the capacity.
const REFUSED_MS: u64 = 100;
/// The same if a pool refuses again: its programs cannot be started.
const REFUSED_POOL_MS: u64 = 1_000;

/// What a claim needs to know about a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueMethod {
    pub lane: usize,
    /// The largest number of calls and attempts of the method in one executor; 0: no limit.
    pub concurrency: usize,
}

/// When jobs of a lane are due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct DueJobs {
    at_ms: u64,
    /// How many are due then, as far as is known; at least 1.
    count: usize,
    /// Whether they are due already, but no executor has room.
    is_waiting: bool,
    /// Whether an executor with room could not get them. The end of an attempt may change that.
    is_held: bool,
}

/// What a claim needs to know about an executor.
#[derive(Debug)]
pub struct FreeExecutor<'a> {
    pub owner: AttemptOwner,
    pub lane: usize,
    /// How many attempts it could begin.
    pub room: usize,
    /// The number of its attempts, by method.
    pub running: BTreeMap<&'a str, usize>,
}

/// The claims of a jobs process.
#[derive(Debug)]
pub struct ClaimPlan {
    methods: BTreeMap<String, QueueMethod>,
    turns: QueueTurns,
    /// By lane; a lane without an entry has no due job.
    due: BTreeMap<usize, DueJobs>,
    /// Until when an executor gets no job of a method, by its pid and the method.
    refused: BTreeMap<(i32, String), u64>,
}

impl ClaimPlan {
    /// Makes the plan for the methods of a generation.
    pub fn new(methods: BTreeMap<String, QueueMethod>) -> Self {
        ClaimPlan {
            methods,
            turns: QueueTurns::default(),
            due: BTreeMap::new(),
            refused: BTreeMap::new(),
        }
    }

    /// Records that `count` jobs of a method are due at this time.
    pub fn add_due(&mut self, method: &str, at_ms: u64, count: usize) {
        if let Some(method) = self.methods.get(method) {
            self.add_due_in(method.lane, at_ms, count);
        }
    }

    fn add_due_in(&mut self, lane: usize, at_ms: u64, count: usize) {
        match self.due.get_mut(&lane) {
            Some(due) => {
                due.at_ms = due.at_ms.min(at_ms);
                due.count = due.count.saturating_add(count);
            }
            None => {
                let due = DueJobs {
                    at_ms,
                    count,
                    is_waiting: false,
                    is_held: false,
                };
                self.due.insert(lane, due);
            }
        }
    }

    /// Lets all lanes claim at this time, because it is not known which jobs are due.
    pub fn look_at_all(&mut self, at_ms: u64) {
        let lanes: Vec<usize> = self.methods.values().map(|method| method.lane).collect();
        for lane in lanes {
            if self.due.get(&lane).is_none_or(|due| due.at_ms > at_ms) {
                self.add_due_in(lane, at_ms, 1);
            }
        }
    }

    /// Returns when `take_request` must be called next; `None` if no job waits.
    pub fn next_ms(&self) -> Option<u64> {
        self.due.values().map(|due| due.at_ms).min()
    }

    /// Returns how many jobs of a lane are due, as far as is known.
    pub fn due_in(&self, lane: usize, now_ms: u64) -> usize {
        let due = self.due.get(&lane).filter(|due| due.at_ms <= now_ms);
        due.map_or(0, |due| due.count)
    }

    /// Returns the claim for an executor, if jobs of its lane are due and it has room.
    pub fn take_request(
        &mut self,
        executor: &FreeExecutor<'_>,
        now_ms: u64,
    ) -> Option<ClaimRequest> {
        let count = self.due_in(executor.lane, now_ms);
        if count == 0 || executor.room == 0 {
            return None;
        }
        let pid = executor.owner.executor;
        // Refusals that are over are kept for a while, to see whether the next one is repeated.
        (self.refused).retain(|_, until_ms| *until_ms + REFUSED_POOL_MS > now_ms);
        let methods = self.methods.iter();
        let of_lane = methods.filter(|(_, method)| method.lane == executor.lane);
        let mut is_any_left_out = false;
        let mut shares: Vec<QueueShare> = of_lane
            .filter_map(|(name, method)| {
                let running = executor.running.get(name.as_str()).copied().unwrap_or(0);
                let most = match method.concurrency {
                    0 => executor.room,
                    most => most.saturating_sub(running).min(executor.room),
                };
                let until_ms = self.refused.get(&(pid, name.clone()));
                let is_left_out = most == 0 || until_ms.is_some_and(|at| *at > now_ms);
                is_any_left_out |= is_left_out;
                (!is_left_out).then(|| QueueShare {
                    method: name.clone(),
                    most,
                })
            })
            .collect();
        if shares.is_empty() {
            return None;
        }
        self.turns.sort(&mut shares);
        // What this claim takes is not due for another executor.
        match self.due.get_mut(&executor.lane) {
            Some(due) if due.count > executor.room => due.count -= executor.room,
            // The jobs of the methods that are left out stay due, also for another executor.
            Some(due) if is_any_left_out => (due.count, due.is_held) = (1, true),
            _ => drop(self.due.remove(&executor.lane)),
        }
        Some(ClaimRequest {
            owner: executor.owner,
            shares,
            most: executor.room,
        })
    }

    /// Handles the reply to a claim of a lane. `claimed` are the methods of the jobs in their order, `most` is the most
    /// jobs of the request. `next_ms` is when the next job of the claimed queues is due, which may be in the past.
    pub fn claimed<'a>(
        &mut self,
        lane: usize,
        claimed: impl Iterator<Item = &'a str>,
        most: usize,
        (next_ms, now_ms): (Option<u64>, u64),
    ) {
        let mut count = 0;
        for method in claimed {
            self.turns.served(method);
            count += 1;
        }
        match next_ms {
            // It got as many as it has room for, so more are probably due than are known.
            Some(next_ms) if count == most => self.add_due_in(lane, next_ms, usize::MAX),
            // The store did not give them, for example because of the concurrency of their method.
            Some(next_ms) => {
                self.add_due_in(lane, next_ms.max(now_ms + RETRY_MS), 1);
                if let Some(due) = self.due.get_mut(&lane) {
                    due.is_held |= next_ms <= now_ms;
                }
            }
            None => {}
        }
    }

    /// Records that a claim of a lane was not executed.
    pub fn claim_failed(&mut self, lane: usize, now_ms: u64) {
        self.add_due_in(lane, now_ms + RETRY_MS, 1);
    }

    /// Records that an executor has refused a job of this method.
    pub fn refused(&mut self, pid: i32, method: &str, now_ms: u64) {
        let lane = self.methods.get(method).map_or(0, |method| method.lane);
        let method = (pid, method.to_owned());
        let before = self.refused.get(&method);
        let is_repeated = before.is_some_and(|until_ms| *until_ms + REFUSED_POOL_MS > now_ms);
        let pause_ms = match lane {
            _ if !is_repeated => REFUSED_MS,
            0 => REFUSED_MS,
            _ => REFUSED_POOL_MS,
        };
        let until_ms = now_ms + pause_ms;
        self.refused.insert(method, until_ms);
        self.add_due_in(lane, until_ms, 1);
    }

    /// Records that all executors had their turn: jobs that are still due wait for room.
    pub fn postpone_due(&mut self, now_ms: u64) {
        for due in self.due.values_mut() {
            if due.at_ms <= now_ms {
                due.at_ms = now_ms + RETRY_MS;
                due.is_waiting = !due.is_held;
            }
        }
    }

    /// Returns how many jobs of a lane wait for room, as far as is known.
    pub fn waiting_in(&self, lane: usize) -> usize {
        let due = self.due.get(&lane).filter(|due| due.is_waiting);
        due.map_or(0, |due| due.count)
    }

    /// Lets the jobs of a lane be claimed now that wait for room or for the end of another job of their method, because
    /// an attempt of the lane has ended.
    pub fn attempt_ended(&mut self, lane: usize, now_ms: u64) {
        if let Some(due) = self.due.get_mut(&lane)
            && (due.is_waiting || due.is_held)
        {
            due.at_ms = due.at_ms.min(now_ms);
        }
    }

    /// Lets the jobs of a lane that wait for room be claimed now.
    pub fn has_room(&mut self, lane: usize, now_ms: u64) {
        if let Some(due) = self.due.get_mut(&lane)
            && due.is_waiting
        {
            due.at_ms = due.at_ms.min(now_ms);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::protocol::job_id::JobId;

    const NOW: u64 = 1_000;

    fn plan() -> ClaimPlan {
        let method = |lane, concurrency| QueueMethod { lane, concurrency };
        ClaimPlan::new(BTreeMap::from([
            ("a".to_owned(), method(0, 0)),
            ("b".to_owned(), method(0, 2)),
            ("p".to_owned(), method(1, 0)),
        ]))
    }

    fn executor(pid: i32, room: usize) -> FreeExecutor<'static> {
        FreeExecutor {
            owner: AttemptOwner {
                instance: JobId([1; 16]),
                executor: pid,
            },
            lane: 0,
            room,
            running: BTreeMap::new(),
        }
    }

    fn shares(request: &ClaimRequest) -> Vec<(&str, usize)> {
        let shares = request.shares.iter();
        shares.map(|it| (it.method.as_str(), it.most)).collect()
    }

    #[test]
    fn an_enqueue_lets_as_many_executors_claim_as_there_are_jobs() {
        let mut plan = plan();
        assert_eq!(plan.take_request(&executor(7, 4), NOW), None);
        plan.add_due("a", NOW, 5);
        plan.add_due("unknown", NOW, 5);
        let first = plan.take_request(&executor(7, 4), NOW).unwrap();
        assert_eq!(shares(&first), [("a", 4), ("b", 2)]);
        assert_eq!((first.owner.executor, first.most), (7, 4));
        assert_eq!(plan.due_in(0, NOW), 1);
        assert!(plan.take_request(&executor(8, 4), NOW).is_some());
        assert_eq!(plan.take_request(&executor(9, 4), NOW), None);
        assert_eq!(plan.next_ms(), None);
    }

    #[test]
    fn a_full_claim_continues_and_an_empty_one_waits_for_the_next_job() {
        let mut plan = plan();
        plan.add_due("a", NOW, 1);
        assert!(plan.take_request(&executor(7, 1), NOW).is_some());
        plan.claimed(0, ["a"].into_iter(), 1, (Some(NOW - 5), NOW));
        assert_eq!(plan.next_ms(), Some(NOW - 5));
        // Now it is the turn of b.
        let next = plan.take_request(&executor(7, 1), NOW).unwrap();
        assert_eq!(shares(&next), [("b", 1), ("a", 1)]);
        assert!(plan.due_in(0, NOW) > 100);
        let mut plan = self::plan();
        plan.claimed(0, [].into_iter(), 1, (Some(NOW - 5), NOW));
        assert_eq!(plan.next_ms(), Some(NOW + RETRY_MS));
        plan.claimed(0, [].into_iter(), 1, (Some(NOW + 5_000), NOW));
        assert_eq!(plan.next_ms(), Some(NOW + RETRY_MS));
        let mut plan = self::plan();
        plan.claimed(0, [].into_iter(), 1, (Some(NOW + 5_000), NOW));
        assert_eq!(plan.next_ms(), Some(NOW + 5_000));
        plan.claimed(0, [].into_iter(), 1, (None, NOW));
        assert_eq!(plan.next_ms(), Some(NOW + 5_000));
    }

    #[test]
    fn concurrency_and_refusals_limit_the_share_of_a_method() {
        let mut plan = plan();
        plan.add_due("b", NOW, 9);
        let mut busy = executor(7, 4);
        busy.running.insert("b", 2);
        assert_eq!(shares(&plan.take_request(&busy, NOW).unwrap()), [("a", 4)]);
        plan.refused(7, "a", NOW);
        assert_eq!(plan.take_request(&busy, NOW), None);
        assert_eq!(
            shares(&plan.take_request(&executor(8, 4), NOW).unwrap()),
            [("a", 4), ("b", 2)]
        );
        plan.look_at_all(NOW);
        let later = NOW + REFUSED_MS;
        assert_eq!(
            shares(&plan.take_request(&busy, later).unwrap()),
            [("a", 4)]
        );
    }

    #[test]
    fn what_a_claim_leaves_out_stays_due_and_is_claimed_at_the_end_of_an_attempt() {
        let mut plan = plan();
        plan.add_due("b", NOW, 5);
        plan.take_request(&executor(7, 9), NOW).unwrap();
        plan.claimed(0, ["b", "b"].into_iter(), 9, (Some(NOW - 5), NOW));
        let later = NOW + RETRY_MS;
        let mut busy = executor(7, 7);
        busy.running.insert("b", 2);
        let request = plan.take_request(&busy, later).unwrap();
        assert_eq!(shares(&request), [("a", 7)]);
        plan.claimed(0, [].into_iter(), 7, (None, later));
        plan.postpone_due(later);
        assert_eq!(plan.next_ms(), Some(later + RETRY_MS));
        // No offer of an executor changes that.
        plan.has_room(0, later + 1);
        assert_eq!(plan.waiting_in(0), 0);
        assert_eq!(plan.next_ms(), Some(later + RETRY_MS));
        plan.attempt_ended(0, later + 2);
        assert_eq!(plan.due_in(0, later + 2), 1);
    }

    #[test]
    fn a_pool_gets_a_longer_pause_only_if_it_refuses_again() {
        let mut plan = plan();
        plan.refused(7, "p", NOW);
        assert_eq!(plan.next_ms(), Some(NOW + REFUSED_MS));
        let pool = FreeExecutor {
            lane: 1,
            ..executor(7, 1)
        };
        let again = NOW + REFUSED_MS;
        assert!(plan.take_request(&pool, again).is_some());
        plan.refused(7, "p", again);
        assert_eq!(plan.next_ms(), Some(again + REFUSED_POOL_MS));
    }

    #[test]
    fn lanes_do_not_wait_for_each_other() {
        let mut plan = plan();
        plan.add_due("p", NOW, 1);
        assert_eq!(plan.take_request(&executor(7, 4), NOW), None);
        let pool = FreeExecutor {
            lane: 1,
            ..executor(9, 1)
        };
        assert_eq!(shares(&plan.take_request(&pool, NOW).unwrap()), [("p", 1)]);
        assert_eq!(plan.next_ms(), None);
    }

    #[test]
    fn jobs_that_wait_for_room_are_claimed_when_there_is_some() {
        let mut plan = plan();
        plan.add_due("p", NOW + 50, 1);
        plan.has_room(1, NOW);
        plan.postpone_due(NOW);
        assert_eq!((plan.next_ms(), plan.waiting_in(1)), (Some(NOW + 50), 0));
        plan.postpone_due(NOW + 50);
        assert_eq!(plan.next_ms(), Some(NOW + 50 + RETRY_MS));
        assert_eq!((plan.waiting_in(1), plan.waiting_in(0)), (1, 0));
        plan.has_room(1, NOW + 60);
        assert_eq!(plan.next_ms(), Some(NOW + 60));
    }
}
