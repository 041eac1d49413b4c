//! The calls that wait for an executor, in fair order: handler threads take the next one from here
//! themselves, and the event loop takes out what another process is to run.
//!
//! Waking a thread costs more than a short call does, so as many threads are awake as there is work for:
//! one takes several calls of microseconds one after the other, each call that runs for long finds a
//! thread of its own. What a call will take is only expected: if no thread that is awake takes the next
//! one within a millisecond, `look` wakes another. The lock is held for O(log n) and never while a
//! handler runs.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::fair_queue::{FairQueue, Waiting};
use super::timers::CallKey;
use crate::handler::call_state::HandlerCall;
use crate::sys::event::Token;
use crate::sys::process::monotonic;

/// Expected work of this length is enough for one thread.
const SHARE: Duration = Duration::from_micros(100);

/// As long as threads are at short calls, a call that has waited for less than this (in milliseconds, so
/// for at least half of it) is left to them.
const SHORT_WAIT_MS: u64 = 2;

/// Short calls of other workers that may wait here for each thread.
const SHORT_PER_THREAD: usize = 8;

/// The calls that wait for one executor.
#[derive(Debug)]
pub struct RunQueue {
    state: Mutex<State>,
    woken: Condvar,
    /// By method, how long a call is expected to run, in microseconds; 0 where that is not known.
    expected_us: Box<[AtomicU64]>,
}

#[derive(Debug, Default)]
struct State {
    queue: FairQueue<HandlerCall>,
    /// How long all of it is expected to run.
    work: Duration,
    /// Threads that sleep and were not woken.
    idle: usize,
    /// Threads that were woken and do not run yet.
    waking: usize,
    /// Threads at a call that is expected to take less than a share: they will soon take another.
    short: usize,
    /// Calls taken so far.
    taken: u64,
    /// How many that were at the last look, if any waited then; and when that was.
    looked_at: Option<u64>,
    looked_ms: u64,
    /// The event loop will look within a millisecond, whether it is woken or not.
    watched: bool,
    /// No thread has taken a call for a millisecond, though all are awake: what they are at takes longer
    /// than expected. It holds until one takes a call or sleeps.
    is_stalled: bool,
}

/// What a thread is to do next.
#[derive(Debug)]
pub struct NextCall {
    pub call: HandlerCall,
    /// Whether it has begun. If not, its caller does not wait any more, or could not be answered in time.
    pub begins: bool,
    /// Whether it is expected to be short.
    pub is_short: bool,
    /// When it was taken (CLOCK_MONOTONIC).
    pub begun: Duration,
}

impl State {
    /// How many more threads are to be awake for what waits; counts them as woken.
    fn wake(&mut self) -> usize {
        let shares = self.work.as_nanos().div_ceil(SHARE.as_nanos());
        let wanted = (self.queue.len()).min(usize::try_from(shares).unwrap_or(usize::MAX));
        let more = wanted
            .saturating_sub(self.short + self.waking)
            .min(self.idle);
        self.idle -= more;
        self.waking += more;
        more
    }

    /// How many threads will soon take a call, as far as is known.
    fn awake(&self) -> usize {
        match self.is_stalled {
            true => 0,
            false => self.idle + self.waking + self.short,
        }
    }

    /// Takes a call out of the work that waits.
    fn take_out(&mut self, job: Option<HandlerCall>) -> Option<HandlerCall> {
        let job = job?;
        self.work -= work_of(&job);
        Some(job)
    }

    /// The next call for a thread.
    fn pop(&mut self, expected_us: &[AtomicU64]) -> Option<NextCall> {
        let now = monotonic();
        let now_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        let next = *self.queue.next(now_ms)?;
        let is_late = next.is_late(now_ms, time_needed(expected_us, next.method));
        let job = if is_late {
            self.queue.runs_out(next.key, now_ms);
            self.queue.remove(next.key).map(|(_, job)| job)
        } else {
            self.queue.take(next.key)
        };
        let call = self.take_out(job)?;
        self.taken += 1;
        self.is_stalled = false;
        let begins = !is_late && call.state.begin();
        Some(NextCall {
            begins,
            is_short: begins && is_short(call.expected),
            begun: now,
            call,
        })
    }
}

/// What a call is taken to need where that is not known: a thread of its own.
fn work_of(job: &HandlerCall) -> Duration {
    job.expected
        .unwrap_or(SHARE)
        .clamp(Duration::from_nanos(1), SHARE)
}

/// Whether a thread may soon be done with a call that is expected to run this long.
pub fn is_short(expected: Option<Duration>) -> bool {
    expected.is_some_and(|expected| expected < SHARE)
}

/// How long a call of this method takes until it is done, were it begun now: what it is expected to take
/// and a quarter more, for half of its like take longer.
fn time_needed(expected_us: &[AtomicU64], method: usize) -> Option<Duration> {
    match expected_us.get(method)?.load(Relaxed) {
        0 => None,
        expected => Some(Duration::from_micros(expected + expected / 4)),
    }
}

impl RunQueue {
    /// An empty queue for calls of this number of methods.
    pub fn new(methods: usize) -> Self {
        RunQueue {
            state: Mutex::default(),
            woken: Condvar::new(),
            expected_us: (0..methods).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn notify(&self, threads: usize) {
        (0..threads).for_each(|_| self.woken.notify_one());
    }

    /// Notes how long a call of a method is expected to run.
    pub fn expect(&self, method: usize, expected: Duration) {
        let expected_us = u64::try_from(expected.as_micros()).unwrap_or(u64::MAX);
        self.expected_us[method].store(expected_us, Relaxed);
    }

    /// Adds calls, and wakes as many threads as there is work for.
    pub fn put(&self, calls: impl IntoIterator<Item = (Waiting, HandlerCall)>, now_ms: u64) {
        let mut state = self.lock();
        for (waiting, job) in calls {
            state.work += work_of(&job);
            state.queue.push(waiting, job, now_ms);
        }
        // The event loop looks once more before it sleeps.
        state.watched = true;
        let more = state.wake();
        drop(state);
        self.notify(more);
    }

    /// Takes the next call, and waits for one. `was_short` says whether the last call of the calling
    /// thread was of the short kind.
    pub fn take(&self, was_short: bool) -> NextCall {
        let mut state = self.lock();
        state.short -= usize::from(was_short);
        loop {
            if let Some(taken) = state.pop(&self.expected_us) {
                state.short += usize::from(taken.is_short);
                let more = state.wake();
                drop(state);
                self.notify(more);
                return taken;
            }
            state.idle += 1;
            state.is_stalled = false;
            while state.waking == 0 {
                state = self
                    .woken
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            state.waking -= 1;
        }
    }

    /// Takes a call out that is not to be begun. Returns `false` if it does not wait here.
    pub fn remove(&self, key: CallKey) -> bool {
        let mut state = self.lock();
        let job = state.queue.remove(key).map(|(_, job)| job);
        state.take_out(job).is_some()
    }

    /// Takes all calls of a connection out, oldest first.
    pub fn take_all_of(&self, token: Token) -> Vec<HandlerCall> {
        let mut state = self.lock();
        let jobs = state.queue.take_all_of(token);
        state.work -= jobs.iter().map(work_of).sum::<Duration>();
        jobs
    }

    /// Takes out the next call that another process is to run; `None` if none may be sent, or the next one
    /// is not short and `only_short` is set.
    ///
    /// # Errors
    /// A call that could not be done in time any more: it is to be given up.
    pub fn next_to_send(
        &self,
        only_short: bool,
        now_ms: u64,
    ) -> Result<Option<HandlerCall>, CallKey> {
        let mut state = self.lock();
        let Some(&next) = state.queue.next_to_send(now_ms) else {
            return Ok(None);
        };
        if only_short && !is_short(next.expected) {
            return Ok(None);
        }
        if next.is_late(now_ms, time_needed(&self.expected_us, next.method)) {
            state.queue.runs_out(next.key, now_ms);
            return Err(next.key);
        }
        let job = state.queue.take(next.key);
        Ok(state.take_out(job))
    }

    /// How many calls another process could run that no thread of this one will soon begin.
    pub fn sendable(&self, now_ms: u64) -> usize {
        let state = self.lock();
        let begins_soon = state.awake() > 0;
        let is_young = |oldest: &Waiting| now_ms.saturating_sub(oldest.since_ms) < SHORT_WAIT_MS;
        match state.queue.all().next().is_some_and(is_young) && begins_soon {
            true => 0,
            false => state.queue.sendable(),
        }
    }

    /// How many short calls of other workers may come beside those that wait here.
    pub fn room_for_short(&self) -> usize {
        let state = self.lock();
        (state.awake() * SHORT_PER_THREAD).saturating_sub(state.queue.foreign())
    }

    /// Takes out the calls of other workers, if all threads are at long calls.
    pub fn take_foreign_back(&self) -> Vec<CallKey> {
        let mut state = self.lock();
        if state.queue.foreign() == 0 || state.awake() > 0 {
            return Vec::new();
        }
        let is_foreign = |call: &&Waiting| call.token.process().is_some();
        let keys: Vec<CallKey> = (state.queue.all().filter(is_foreign))
            .map(|call| call.key)
            .collect();
        for key in &keys {
            let job = state.queue.remove(*key).map(|(_, job)| job);
            state.take_out(job);
        }
        keys
    }

    /// The call that has waited longest.
    pub fn first(&self) -> Option<CallKey> {
        self.lock().queue.all().next().map(|call| call.key)
    }

    /// A waiting call's time is over; to be told before it is taken out.
    pub fn runs_out(&self, key: CallKey, now_ms: u64) {
        self.lock().queue.runs_out(key, now_ms);
    }

    /// Whether a thread may go on with the next call before it wakes the event loop for its last one.
    pub fn goes_on(&self) -> bool {
        let state = self.lock();
        state.watched && !state.queue.is_empty()
    }

    /// Looks whether the calls get on, and wakes one more thread if none was taken for a millisecond.
    /// Returns whether to look again in a millisecond.
    pub fn look(&self, now_ms: u64) -> bool {
        let mut state = self.lock();
        let was_watched = state.watched;
        state.watched = !state.queue.is_empty() && state.awake() > 0;
        if !state.watched {
            state.looked_at = None;
            // All threads are at long calls: once more, to send what waits to other processes.
            return was_watched && !state.queue.is_empty();
        }
        if now_ms <= state.looked_ms && state.looked_at.is_some() {
            return true;
        }
        let stands = state.looked_at == Some(state.taken);
        state.looked_at = Some(state.taken);
        state.looked_ms = now_ms;
        if stands && state.idle > 0 {
            state.idle -= 1;
            state.waking += 1;
            drop(state);
            self.notify(1);
        } else if stands && state.waking == 0 {
            state.is_stalled = true;
            state.watched = false;
        }
        true
    }
}

#[cfg(test)]
#[path = "run_queue_tests.rs"]
mod tests;
