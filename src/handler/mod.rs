//! Defines what answers a call: the trait of handlers, the context of a call, and how a call is given up.
//!
//! Each kind of handler implements `Handler`, and the worker knows no kind by name. A handler fails with
//! an `RpcError`, which the caller gets. `guard` catches a panic and answers with `internal`.

pub mod builtin;
pub mod call_state;
pub mod command;
pub mod function;
pub mod guard;
pub mod handler_state;
pub mod job_attempt;
pub mod job_methods;
pub mod pool;
mod prepared_program;
pub mod registry;
pub mod trace;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, Thread};
use std::time::Duration;

use handler_state::Worker;
use job_attempt::JobAttempt;
use trace::{CallIdentity, Trace};

use crate::protocol::call_id::CallId;
use crate::protocol::rpc_error::RpcError;
use crate::sys::lock::lock;
use crate::sys::process::monotonic;
use crate::sys::waker::Waker;

/// Where a handler runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// On the event loop: for handlers that take microseconds and never wait.
    Inline,
    /// On a handler thread.
    Thread,
    /// In a program of the pool with this number, counted from 0.
    Pool(usize),
}

impl Placement {
    /// Returns the lane of its calls. Calls never wait for those of another lane. The handler threads
    /// have the first lane, the pools have the next ones.
    pub fn lane(self) -> usize {
        match self {
            Placement::Inline | Placement::Thread => 0,
            Placement::Pool(number) => number + 1,
        }
    }
}

/// Answers the calls of one method.
pub trait Handler: Send + Sync {
    /// Answers one call. `params` is JSON as the client wrote it ("null" if there was none). The result
    /// is appended to `result`, as JSON.
    ///
    /// # Errors
    /// The error for the caller. Everything appended to `result` is then dropped.
    fn call(
        &self,
        params: &str,
        context: &Context<'_>,
        result: &mut Vec<u8>,
    ) -> Result<(), RpcError>;

    /// Returns where it runs.
    fn placement(&self) -> Placement {
        Placement::Thread
    }

    /// Returns the `out` of its answers, if it differs from the method's name.
    fn answer_name(&self) -> Option<&str> {
        None
    }
}

/// What a handler may know about its call.
#[derive(Debug)]
pub struct Context<'a> {
    /// The full name of the method.
    pub method: &'a str,
    /// The slot of the worker that runs it.
    pub slot: u16,
    /// The deadline of the call as time since boot.
    deadline: Duration,
    identity: &'a CallIdentity,
    state: Option<&'a CallState>,
    id: Option<&'a str>,
    peer: Option<SocketAddr>,
    worker: Option<&'a Worker>,
}

impl<'a> Context<'a> {
    /// Creates the context of a call on the event loop, which cannot be given up while it runs.
    pub fn inline(method: &'a str, slot: u16, deadline: Duration) -> Self {
        Context {
            method,
            slot,
            deadline,
            identity: CallIdentity::NONE,
            state: None,
            id: None,
            peer: None,
            worker: None,
        }
    }

    /// Creates the context of a call on a handler thread.
    pub fn on_thread(method: &'a str, slot: u16, deadline: Duration, state: &'a CallState) -> Self {
        Context {
            method,
            slot,
            deadline,
            identity: &state.identity,
            state: Some(state),
            id: None,
            peer: None,
            worker: None,
        }
    }

    /// Adds what is known of the caller and of the worker.
    #[must_use]
    pub fn with(
        self,
        (id, peer): (Option<&'a str>, Option<SocketAddr>),
        worker: Option<&'a Worker>,
    ) -> Self {
        Context {
            id,
            peer,
            worker,
            ..self
        }
    }

    /// Adds what identifies a call on the event loop.
    #[must_use]
    pub(crate) fn identified(self, identity: &'a CallIdentity) -> Self {
        Context { identity, ..self }
    }

    /// Returns the id that the server has given to the call: that of logs, death records and errors, and
    /// unlike [`Context::id`] not chosen by the caller.
    pub fn call(&self) -> CallId {
        self.identity.id()
    }

    /// Returns the place of the call in a trace; `None` without `[trace]` in the configuration. Requests that
    /// the handler sends get [`Trace::child`] and [`Trace::tracestate`].
    pub fn trace(&self) -> Option<Trace<'_>> {
        self.identity.trace()
    }

    /// Returns the attempt of a job that this is; `None` in a call. An attempt has no [`Context::id`] and no
    /// [`Context::peer`], and its deadline is that of the attempt.
    pub fn job(&self) -> Option<&JobAttempt> {
        self.identity.attempt.as_deref()
    }

    /// Returns the number of the call in the process that runs it.
    pub(super) fn number(&self) -> u64 {
        self.identity.number
    }

    /// Returns the call id in JSON as the caller wrote it: `7`, or `"seven"` with its quotes. `None` if
    /// it has none.
    pub fn id(&self) -> Option<&str> {
        self.id
    }

    /// Returns the address of the client; `None` on a unix socket.
    pub fn peer(&self) -> Option<SocketAddr> {
        self.peer
    }

    /// Returns the state that the program made for its handlers (`Server::on_worker_start`,
    /// `Server::on_master_start`), by its type.
    ///
    /// # Panics
    /// If there is nothing of that type; the caller gets `internal`.
    pub fn state<T: 'static>(&self) -> &T {
        self.worker
            .expect("a worker that answers calls has started")
            .state()
    }

    /// Returns the time left until the deadline; zero after it.
    pub fn remaining(&self) -> Duration {
        self.deadline.saturating_sub(monotonic())
    }

    /// Returns whether the answer is no longer needed: the call timed out or was cancelled, or the client
    /// has disconnected.
    pub fn is_cancelled(&self) -> bool {
        self.state.is_some_and(CallState::is_over)
    }

    /// Waits for `length`, or until the call is given up. Returns whether it was given up. On the event
    /// loop it does not wait.
    pub fn pause(&self, length: Duration) -> bool {
        let Some(state) = self.state else {
            return false;
        };
        state.set_sleeper(Some(Sleeper::Thread(thread::current())));
        let end = monotonic().saturating_add(length);
        loop {
            let left = end.saturating_sub(monotonic());
            if state.is_over() || left.is_zero() {
                break;
            }
            thread::park_timeout(left);
        }
        state.set_sleeper(None);
        state.is_over()
    }
}

impl Context<'_> {
    /// Runs `wait`. Meanwhile `waker` is woken if the call is given up, for a handler that waits for
    /// descriptors. It may already be woken at the start.
    pub fn waking<T>(&self, waker: &Arc<Waker>, wait: impl FnOnce() -> T) -> T {
        let Some(state) = self.state else {
            return wait();
        };
        // An earlier wake was for another call.
        waker.clear();
        state.set_sleeper(Some(Sleeper::Waker(Arc::clone(waker))));
        let result = wait();
        state.set_sleeper(None);
        result
    }
}

/// What waits within a call, and is woken when the call is given up.
#[derive(Debug)]
enum Sleeper {
    Thread(Thread),
    Waker(Arc<Waker>),
}

const WAITING: u8 = 0;
const RUNNING: u8 = 1;
const OVER: u8 = 2;
/// Added to the time at which a handler began, once it has ended.
const ENDED: u64 = 1 << 63;

/// The state of a call on the threads. The loop and the thread agree on it: the call either has begun or
/// was given up before, never both. So `started` is reliable.
#[derive(Debug, Default)]
pub struct CallState {
    phase: AtomicU8,
    /// Where to record that it has begun, for the keeper after the death of this process.
    shown: Option<&'static AtomicU32>,
    /// The key of the call for the quarantine. The thread that runs it records it in shared memory.
    key: u64,
    identity: CallIdentity,
    /// When its handler began, in nanoseconds (CLOCK_MONOTONIC), with `ENDED` once it has ended; 0: it has not begun.
    begun_ns: AtomicU64,
    /// `Some` while its handler waits.
    sleeper: Mutex<Option<Sleeper>>,
}

impl CallState {
    /// Begins the call on a thread or in another process. Returns false if it was given up meanwhile; then it
    /// must not run.
    pub fn begin(&self) -> bool {
        let begins = self
            .phase
            .compare_exchange(WAITING, RUNNING, Ordering::AcqRel, Ordering::Acquire)
            .is_ok();
        if let (true, Some(shown)) = (begins, self.shown) {
            shown.store(1, Ordering::Release);
        }
        begins
    }

    /// Creates a state that records the beginning (1) in `shown`, and has the key `key`.
    pub fn shown(shown: Option<&'static AtomicU32>, key: u64, identity: CallIdentity) -> Self {
        CallState {
            shown,
            key,
            identity,
            ..CallState::default()
        }
    }

    /// Makes the call wait again, because the program or process that was to run it is gone and had
    /// certainly not begun it. Returns false if it was given up meanwhile.
    pub fn wait_again(&self) -> bool {
        self.phase
            .compare_exchange(RUNNING, WAITING, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// Records in shared memory that it has not begun, if it waits again. Only the loop calls it, because the loop
    /// gives calls up: then `shown` may belong to another call.
    pub fn show_waiting(&self) {
        if let (WAITING, Some(shown)) = (self.phase.load(Ordering::Acquire), self.shown) {
            shown.store(0, Ordering::Release);
        }
    }

    /// Records when its handler began. Call it when it begins.
    pub fn set_begun(&self, at: Duration) {
        self.begun_ns.store(at.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Records that its handler has ended.
    pub fn set_ended(&self) {
        let begun = self.begun_ns.load(Ordering::Relaxed);
        self.begun_ns.store(begun | ENDED, Ordering::Relaxed);
    }

    /// Returns when its handler began, in nanoseconds (CLOCK_MONOTONIC); `None` if it does not run.
    pub fn begun_ns(&self) -> Option<u64> {
        let at = self.begun_ns.load(Ordering::Relaxed);
        Some(at).filter(|at| (1..ENDED).contains(at))
    }

    /// Returns when its handler began last, even if it has ended; `None` if it has not begun.
    pub fn last_begun_ns(&self) -> Option<u64> {
        let at = self.begun_ns.load(Ordering::Relaxed) & !ENDED;
        Some(at).filter(|at| *at > 0)
    }

    /// Returns the key of the call.
    pub fn key(&self) -> u64 {
        self.key
    }

    /// Returns what identifies the call.
    pub fn identity(&self) -> &CallIdentity {
        &self.identity
    }

    /// Gives the call up; only the loop does that. Returns whether it had begun.
    pub fn give_up(&self) -> bool {
        let begun = self.phase.swap(OVER, Ordering::AcqRel) == RUNNING;
        let sleeper = lock(&self.sleeper);
        match sleeper.as_ref() {
            Some(Sleeper::Thread(thread)) => thread.unpark(),
            Some(Sleeper::Waker(waker)) => waker.wake(),
            None => {}
        }
        begun
    }

    /// Returns whether it is running.
    pub fn is_running(&self) -> bool {
        self.phase.load(Ordering::Acquire) == RUNNING
    }

    fn is_over(&self) -> bool {
        self.phase.load(Ordering::Acquire) == OVER
    }

    fn set_sleeper(&self, sleeper: Option<Sleeper>) {
        *lock(&self.sleeper) = sleeper;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::sys::process::Pid;
    use std::sync::Arc;
    use trace::TraceSource;

    #[test]
    fn a_call_either_begins_or_is_given_up() {
        let state = CallState::default();
        assert!(!state.give_up());
        assert!(!state.begin());
        let state = CallState::default();
        assert!(state.begin());
        assert!(!state.begin());
        assert!(state.give_up());
    }

    #[test]
    fn a_handler_sees_the_id_and_the_trace_of_its_call() {
        let identity = |home, trace| CallIdentity {
            number: 3,
            home,
            trace,
            attempt: None,
        };
        let home = CallId { pid: 7, number: 9 };
        let state = CallState::shown(None, 0, identity(Some(home), TraceSource::Off));
        let context = Context::on_thread("m", 0, Duration::MAX, &state);
        assert_eq!((context.call(), context.number()), (home, 3));
        assert!(context.trace().is_none());
        let own = identity(None, TraceSource::New);
        let context = Context::inline("m", 0, Duration::MAX).identified(&own);
        let pid = Pid::current().0;
        assert_eq!(context.call(), CallId { pid, number: 3 });
        assert!(context.trace().is_some());
    }

    #[test]
    fn only_the_handler_of_an_attempt_sees_a_job() {
        let identity = CallIdentity {
            attempt: Some(Box::new(JobAttempt::new("0-1", 1, 2))),
            ..CallIdentity::default()
        };
        let state = CallState::shown(None, 4, identity);
        let context = Context::on_thread("m", 0, Duration::MAX, &state);
        assert_eq!(context.job().map(JobAttempt::id), Some("0-1"));
        assert!(Context::inline("m", 0, Duration::MAX).job().is_none());
    }

    #[test]
    fn giving_up_wakes_a_pausing_handler() {
        let state = Arc::new(CallState::default());
        let shared = Arc::clone(&state);
        let handler = thread::spawn(move || {
            shared.begin();
            let context = Context::on_thread("sleep", 0, Duration::MAX, &shared);
            context.pause(Duration::from_secs(3600))
        });
        while !state.is_running() {
            thread::yield_now();
        }
        state.give_up();
        assert!(handler.join().unwrap());
    }
}
