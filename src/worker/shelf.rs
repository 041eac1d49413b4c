//! The short queue between the loop and its handler threads.
//!
//! Waking a thread costs more than a short call does, so as many threads are awake as there is work
//! for: one takes a handful of calls of microseconds one after the other, each call that runs for long
//! finds a thread of its own. What a call will take is only expected: if whoever is awake does not
//! get on with it, `look` wakes another one.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::handler::call_state::HandlerCall;

/// So much expected work is one thread's.
const SHARE: Duration = Duration::from_micros(100);

/// Jobs for handler threads.
#[derive(Debug, Default)]
pub struct Shelf {
    state: Mutex<State>,
    woken: Condvar,
}

#[derive(Debug, Default)]
struct State {
    jobs: VecDeque<HandlerCall>,
    /// What those are expected to take.
    work: Duration,
    /// Threads that sleep and that nobody has woken.
    idle: usize,
    /// Threads that were woken and are not up yet.
    waking: usize,
    /// Threads that are at a job which is expected to take less than a share: they will be back.
    brisk: usize,
    /// Jobs taken so far.
    taken: u64,
    /// How many that were at the last look, if any lay here then; and when that was.
    looked_at: Option<u64>,
    looked_ms: u64,
    /// The loop will look within a millisecond, whether it is woken or not.
    watched: bool,
    /// At a look none had been taken since the look before, though all threads are up: what lies here
    /// waits behind calls that take longer than expected. So many had been taken then. It holds until a
    /// thread is done.
    stalled_at: Option<u64>,
}

impl State {
    /// How many more threads are to be up for what lies here; counts them as woken.
    fn wake(&mut self) -> usize {
        let shares = self.work.as_nanos().div_ceil(SHARE.as_nanos());
        let wanted = self
            .jobs
            .len()
            .min(usize::try_from(shares).unwrap_or(usize::MAX));
        let more = wanted
            .saturating_sub(self.brisk + self.waking)
            .min(self.idle);
        self.idle -= more;
        self.waking += more;
        more
    }
}

/// What a job is taken to need where that is not known: a thread of its own.
fn expected(job: &HandlerCall) -> Duration {
    job.expected
        .unwrap_or(SHARE)
        .clamp(Duration::from_nanos(1), SHARE)
}

impl Shelf {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a job; nobody is woken for it before `ring`.
    pub fn put(&self, job: HandlerCall) {
        let mut state = self.lock();
        state.work += expected(&job);
        state.jobs.push_back(job);
        // It looks once more before it sleeps.
        state.watched = true;
    }

    /// Wakes as many threads as there is work for.
    pub fn ring(&self) {
        let more = self.lock().wake();
        (0..more).for_each(|_| self.woken.notify_one());
    }

    /// Takes a job, and waits for one; for a thread that has just done `brisk`, the kind that its last
    /// one was. Tells whether the one that it takes is of that kind.
    pub fn take(&self, brisk: bool) -> (HandlerCall, bool) {
        let mut state = self.lock();
        state.brisk -= usize::from(brisk);
        loop {
            if let Some(job) = state.jobs.pop_front() {
                let work = expected(&job);
                let brisk = work < SHARE;
                state.work -= work;
                state.brisk += usize::from(brisk);
                state.taken += 1;
                let more = state.wake();
                drop(state);
                (0..more).for_each(|_| self.woken.notify_one());
                return (job, brisk);
            }
            state.idle += 1;
            state.stalled_at = None;
            while state.waking == 0 {
                state = self
                    .woken
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            state.waking -= 1;
        }
    }

    /// Whether a thread may go on with the next job before it wakes the loop for its last one.
    pub fn goes_on(&self) -> bool {
        let state = self.lock();
        state.watched && !state.jobs.is_empty()
    }

    /// Whether all threads are at calls that take long, so that what lies here would wait for them.
    pub fn is_blocked(&self) -> bool {
        let state = self.lock();
        state.stalled_at == Some(state.taken) || state.idle + state.brisk + state.waking == 0
    }

    /// Takes all jobs back that no thread has taken.
    pub fn take_back(&self) -> Vec<HandlerCall> {
        let mut state = self.lock();
        state.work = Duration::ZERO;
        state.jobs.drain(..).collect()
    }

    /// Looks whether the jobs get on, and wakes one more thread when none was taken for a
    /// millisecond. Tells whether to look again in a millisecond.
    pub fn look(&self, now_ms: u64) -> bool {
        let mut state = self.lock();
        // Where all are at long jobs, whoever is done first takes the next one and says so.
        state.watched = !state.jobs.is_empty() && state.idle + state.brisk > 0;
        if !state.watched {
            state.looked_at = None;
            return false;
        }
        if now_ms <= state.looked_ms && state.looked_at.is_some() {
            return true;
        }
        let stands = state.looked_at == Some(state.taken);
        state.looked_at = Some(state.taken);
        state.looked_ms = now_ms;
        if stands && state.idle == 0 {
            // What was to be short is not.
            state.watched = false;
            state.stalled_at = Some(state.taken);
            // The loop takes them back at once.
            return true;
        }
        if stands {
            state.idle -= 1;
            state.waking += 1;
            drop(state);
            self.woken.notify_one();
        }
        true
    }
}

#[cfg(test)]
#[path = "shelf_tests.rs"]
mod tests;
