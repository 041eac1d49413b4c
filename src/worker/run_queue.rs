//! Holds the waiting calls of an executor in fair order. Handler threads take the next one themselves,
//! and the event loop removes calls for other processes.
//!
//! Waking a thread costs more than a short call. So only as many threads are awake as the work needs: one
//! thread takes several calls of microseconds in a row, and each long call gets its own thread. Run times
//! are estimates. If no thread that is awake takes the next call within a millisecond, `look` wakes
//! another one. The lock is held only briefly, and never while a handler runs.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::fair_queue::{FairQueue, Waiting};
use super::timers::CallKey;
use crate::handler::call_state::HandlerCall;
use crate::sys::event::Token;
use crate::sys::lock::lock;
use crate::sys::process::monotonic;

/// Expected work of this length is enough for one thread.
const SHARE: Duration = Duration::from_micros(100);

/// While threads run short calls, a call that has waited for less than this time is left to them. The time is in whole
/// milliseconds, so the real limit is between 1 and 2 ms.
const SHORT_WAIT_MS: u64 = 2;

/// How many short calls of other workers may wait here, for each thread.
const SHORT_PER_THREAD: usize = 8;

/// The waiting calls of one executor.
#[derive(Debug)]
pub struct RunQueue {
    state: Mutex<State>,
    woken: Condvar,
    /// The expected run time of a method's calls in microseconds; 0 if unknown.
    expected_us: Box<[AtomicU64]>,
}

#[derive(Debug, Default)]
struct State {
    queue: FairQueue<HandlerCall>,
    /// The expected run time of all waiting calls.
    work: Duration,
    /// The number of sleeping threads that were not woken.
    idle: usize,
    /// The number of threads that were woken and do not run yet.
    waking: usize,
    /// The number of threads that run a short call. They will soon take another call.
    short: usize,
    /// The number of calls taken so far.
    taken: u64,
    /// The value of `taken` at the last check, if calls waited then; and the time of that check.
    looked_at: Option<u64>,
    looked_ms: u64,
    /// The event loop will check within a millisecond, even if it is not woken.
    watched: bool,
    /// All threads are awake, but none has taken a call for a millisecond: their calls take longer than
    /// expected. It holds until a thread takes a call or sleeps.
    is_stalled: bool,
}

/// The next call for a thread.
#[derive(Debug)]
pub struct NextCall {
    pub call: HandlerCall,
    /// Whether it has begun. If not, its caller does not wait any more, or it would miss its deadline.
    pub begins: bool,
    /// Whether it is expected to be short.
    pub is_short: bool,
    /// When it was taken (CLOCK_MONOTONIC).
    pub begun: Duration,
}

impl State {
    /// Returns how many more threads the waiting calls need, and counts them as woken.
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

    /// Returns how many threads are expected to take a call soon.
    fn available(&self) -> usize {
        match self.is_stalled {
            true => 0,
            false => self.idle + self.waking + self.short,
        }
    }

    /// Removes a call from the sum of waiting work.
    fn take_out(&mut self, call: Option<HandlerCall>) -> Option<HandlerCall> {
        let call = call?;
        self.work -= work_of(&call);
        Some(call)
    }

    /// Removes the next call for a thread.
    fn pop(&mut self, expected_us: &[AtomicU64]) -> Option<NextCall> {
        let now = monotonic();
        let now_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        let next = *self.queue.next(now_ms)?;
        let is_late = next.is_late(now_ms, time_needed(expected_us, next.method));
        let call = if is_late {
            self.queue.record_timeout(next.key, now_ms);
            self.queue.remove(next.key).map(|(_, call)| call)
        } else {
            self.queue.take(next.key)
        };
        let call = self.take_out(call)?;
        self.taken += 1;
        self.is_stalled = false;
        let begins = !is_late && call.state.begin();
        call.state.set_begun(now);
        Some(NextCall {
            begins,
            is_short: begins && is_short(call.expected),
            begun: now,
            call,
        })
    }
}

/// Returns the expected work of a call. A call with an unknown run time needs its own thread.
fn work_of(call: &HandlerCall) -> Duration {
    call.expected
        .unwrap_or(SHARE)
        .clamp(Duration::from_nanos(1), SHARE)
}

/// Returns whether a call with this expected run time is short, so that its thread is soon free.
pub fn is_short(expected: Option<Duration>) -> bool {
    expected.is_some_and(|expected| expected < SHARE)
}

/// Returns how long a call of this method takes if it begins now. It is the expected run time and a
/// quarter more, because half of the calls take longer.
fn time_needed(expected_us: &[AtomicU64], method: usize) -> Option<Duration> {
    match expected_us.get(method)?.load(Relaxed) {
        0 => None,
        expected => Some(Duration::from_micros(expected + expected / 4)),
    }
}

impl RunQueue {
    /// Creates an empty queue for this number of methods.
    pub fn new(methods: usize) -> Self {
        RunQueue {
            state: Mutex::default(),
            woken: Condvar::new(),
            expected_us: (0..methods).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn notify(&self, threads: usize) {
        (0..threads).for_each(|_| self.woken.notify_one());
    }

    /// Records the expected run time of a method's calls.
    pub fn expect(&self, method: usize, expected: Duration) {
        let expected_us = u64::try_from(expected.as_micros()).unwrap_or(u64::MAX);
        // A pool process may get methods later, and has no use for this.
        if let Some(expected) = self.expected_us.get(method) {
            expected.store(expected_us, Relaxed);
        }
    }

    /// Adds calls, and wakes as many threads as the work needs.
    pub fn put(&self, calls: impl IntoIterator<Item = (Waiting, HandlerCall)>, now_ms: u64) {
        let mut state = self.lock();
        for (waiting, call) in calls {
            state.work += work_of(&call);
            state.queue.push(waiting, call, now_ms);
        }
        // The event loop checks once more before it sleeps.
        state.watched = true;
        let more = state.wake();
        drop(state);
        self.notify(more);
    }

    /// Waits for a call and takes it. `was_short` says whether the caller's last call was expected to be
    /// short.
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

    /// Removes a call that must not begin. Returns `false` if it does not wait here.
    pub fn remove(&self, key: CallKey) -> bool {
        let mut state = self.lock();
        let call = state.queue.remove(key).map(|(_, call)| call);
        state.take_out(call).is_some()
    }

    /// Removes all calls of a connection, oldest first.
    pub fn take_all_of(&self, token: Token) -> Vec<HandlerCall> {
        let mut state = self.lock();
        let calls = state.queue.take_all_of(token);
        state.work -= calls.iter().map(work_of).sum::<Duration>();
        calls
    }

    /// Removes the next call for another process. Returns `None` if no call may be sent, or if
    /// `only_short` is set and the next one is not short.
    ///
    /// # Errors
    /// The key of a call that would miss its deadline. It still waits here: give it up.
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
            state.queue.record_timeout(next.key, now_ms);
            return Err(next.key);
        }
        let call = state.queue.take(next.key);
        Ok(state.take_out(call))
    }

    /// Returns how many calls another process could run and no thread of this process will begin soon.
    pub fn sendable(&self, now_ms: u64) -> usize {
        let state = self.lock();
        let is_young = |oldest: &Waiting| now_ms.saturating_sub(oldest.since_ms) < SHORT_WAIT_MS;
        match state.queue.all().next().is_some_and(is_young) && state.available() > 0 {
            true => 0,
            false => state.queue.sendable(),
        }
    }

    /// Returns how many short calls of other workers may be added to those that wait here.
    pub fn room_for_short(&self) -> usize {
        let state = self.lock();
        (state.available() * SHORT_PER_THREAD).saturating_sub(state.queue.foreign())
    }

    /// If all threads run long calls, removes the calls of other workers.
    pub fn take_foreign_back(&self) -> Vec<CallKey> {
        let mut state = self.lock();
        if state.queue.foreign() == 0 || state.available() > 0 {
            return Vec::new();
        }
        let is_foreign = |call: &&Waiting| call.token.process().is_some();
        let keys: Vec<CallKey> = (state.queue.all().filter(is_foreign))
            .map(|call| call.key)
            .collect();
        for key in &keys {
            let call = state.queue.remove(*key).map(|(_, call)| call);
            state.take_out(call);
        }
        keys
    }

    /// Returns all waiting calls, oldest first, and when each was read, in milliseconds.
    pub fn waiting(&self) -> Vec<(CallKey, u64)> {
        let state = self.lock();
        let calls = state.queue.all();
        calls.map(|call| (call.key, call.since_ms)).collect()
    }

    /// Returns the call that has waited longest.
    pub fn first(&self) -> Option<CallKey> {
        self.lock().queue.all().next().map(|call| call.key)
    }

    /// Records that the deadline of a waiting call has passed. Call this before the call is removed.
    pub fn record_timeout(&self, key: CallKey, now_ms: u64) {
        self.lock().queue.record_timeout(key, now_ms);
    }

    /// Returns whether a thread may take the next call before it wakes the event loop for the call that
    /// it has just finished.
    pub fn may_take_more(&self) -> bool {
        let state = self.lock();
        state.watched && !state.queue.is_empty()
    }

    /// Returns the number of waiting calls that no sleeping thread can take.
    pub fn lacking(&self) -> usize {
        let state = self.lock();
        (state.queue.len()).saturating_sub(state.idle + state.waking)
    }

    /// Checks whether calls are being taken, and wakes one more thread if none was taken for a
    /// millisecond. Returns whether to check again in a millisecond.
    pub fn look(&self, now_ms: u64) -> bool {
        let mut state = self.lock();
        let was_watched = state.watched;
        state.watched = !state.queue.is_empty() && state.available() > 0;
        if !state.watched {
            state.looked_at = None;
            // All threads run long calls, so one more turn of the loop must send the waiting calls to other processes.
            return was_watched && !state.queue.is_empty();
        }
        if now_ms <= state.looked_ms && state.looked_at.is_some() {
            return true;
        }
        let is_unchanged = state.looked_at == Some(state.taken);
        state.looked_at = Some(state.taken);
        state.looked_ms = now_ms;
        if is_unchanged && state.idle > 0 {
            state.idle -= 1;
            state.waking += 1;
            drop(state);
            self.notify(1);
        } else if is_unchanged && state.waking == 0 {
            state.is_stalled = true;
            state.watched = false;
        }
        true
    }
}

#[cfg(test)]
#[path = "run_queue_tests.rs"]
mod tests;
