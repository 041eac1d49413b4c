//! What answers a call: the trait, what a handler is told, and how a call is given up.
//!
//! Every kind of handler is one implementation of `Handler`; the worker knows no kind by name. A
//! handler fails with an `RpcError`, which is what the caller sees; a panic is caught by `guard`
//! and answered with `internal`.

pub mod builtin;
pub mod call_state;
pub mod command;
pub mod function;
pub mod guard;
pub mod handler_state;
pub mod pool;
mod prepared_program;
pub mod registry;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, Thread};
use std::time::Duration;

use handler_state::Worker;

use crate::protocol::rpc_error::RpcError;
use crate::sys::process::monotonic;
use crate::sys::waker::Waker;

/// Where a handler runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// On the event loop: for what takes microseconds and never waits.
    Inline,
    /// On a handler thread.
    Thread,
    /// In a program of the pool with this number, counted from 0.
    Pool(usize),
}

impl Placement {
    /// The lane of its calls: those of one never wait for those of another. The handler threads
    /// have the first, pools the following.
    pub fn lane(self) -> usize {
        match self {
            Placement::Inline | Placement::Thread => 0,
            Placement::Pool(number) => number + 1,
        }
    }
}

/// What answers calls of one method.
pub trait Handler: Send + Sync {
    /// Answers one call: params are JSON as the client wrote them ("null" where there were none);
    /// the result is appended to `result`, as JSON.
    ///
    /// # Errors
    /// What the caller is to be told; what was appended by then is dropped.
    fn call(
        &self,
        params: &str,
        context: &Context<'_>,
        result: &mut Vec<u8>,
    ) -> Result<(), RpcError>;

    /// Where it wants to run.
    fn placement(&self) -> Placement {
        Placement::Thread
    }

    /// What stands in `out` in place of the method's name, if anything.
    fn answer_name(&self) -> Option<&str> {
        None
    }
}

/// What a handler may know about its call.
#[derive(Debug)]
pub struct Context<'a> {
    /// The method's full name.
    pub method: &'a str,
    /// The slot of the worker that runs it.
    pub slot: u16,
    /// When nobody will wait for the answer any more, as time since boot.
    deadline: Duration,
    state: Option<&'a CallState>,
    id: Option<&'a str>,
    peer: Option<SocketAddr>,
    worker: Option<&'a Worker>,
}

impl<'a> Context<'a> {
    /// The context of a call that runs on the event loop: nothing can end it early.
    pub fn inline(method: &'a str, slot: u16, deadline: Duration) -> Self {
        Context {
            method,
            slot,
            deadline,
            state: None,
            id: None,
            peer: None,
            worker: None,
        }
    }

    /// The context of a call that runs on a handler thread.
    pub fn on_thread(method: &'a str, slot: u16, deadline: Duration, state: &'a CallState) -> Self {
        Context {
            method,
            slot,
            deadline,
            state: Some(state),
            id: None,
            peer: None,
            worker: None,
        }
    }

    /// The same with what is known of the caller, and of the worker.
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

    /// The call's id, as the caller wrote it in JSON: `7`, or `"seven"` with its quotes. `None`
    /// where it has none.
    pub fn id(&self) -> Option<&str> {
        self.id
    }

    /// Where the caller's connection comes from; `None` over a unix socket.
    pub fn peer(&self) -> Option<SocketAddr> {
        self.peer
    }

    /// What the program made for its handlers (`Server::on_worker_start`,
    /// `Server::on_master_start`), by its type.
    ///
    /// # Panics
    /// When it made nothing of that type; the caller gets `internal`.
    pub fn state<T: 'static>(&self) -> &T {
        self.worker
            .expect("a worker that answers calls has started")
            .state()
    }

    /// The time left until the caller has had `timeout`; zero once it is over.
    pub fn remaining(&self) -> Duration {
        self.deadline.saturating_sub(monotonic())
    }

    /// Whether the answer is for nobody any more: timed out, cancelled, or the caller has left.
    pub fn is_cancelled(&self) -> bool {
        self.state.is_some_and(CallState::is_over)
    }

    /// Waits for `length`, or until the call is given up, and tells whether it was. On the event
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
    /// Runs `wait`, during which `waker` is woken should the call be given up: for a handler that
    /// waits for descriptors. It may be woken already.
    pub fn waking<T>(&self, waker: &Arc<Waker>, wait: impl FnOnce() -> T) -> T {
        let Some(state) = self.state else {
            return wait();
        };
        // What it was woken for before was another call.
        waker.clear();
        state.set_sleeper(Some(Sleeper::Waker(Arc::clone(waker))));
        let result = wait();
        state.set_sleeper(None);
        result
    }
}

/// What waits within a call, to be woken when it is given up.
#[derive(Debug)]
enum Sleeper {
    Thread(Thread),
    Waker(Arc<Waker>),
}

/// Shown of a call that another process may have begun.
pub const BEGUN_ELSEWHERE: u32 = 2;

const WAITING: u8 = 0;
const RUNNING: u8 = 1;
const OVER: u8 = 2;

/// Where a call on the threads stands, agreed between the loop and the thread: either it has
/// begun, or it was given up before, never both. That is what makes `started` a promise.
#[derive(Debug, Default)]
pub struct CallState {
    phase: AtomicU8,
    /// Where it is to be said that it has begun, for whoever must know that when this process has
    /// died.
    shown: Option<&'static AtomicU32>,
    /// What its thread is at, while it runs.
    key: u64,
    /// `Some` while its handler waits.
    sleeper: Mutex<Option<Sleeper>>,
}

impl CallState {
    /// The thread begins; false when the call was given up meanwhile, and must not run.
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

    /// Another process begins it, which is shown as 2: this process does not die of it. False if the call
    /// was given up meanwhile.
    pub fn begin_elsewhere(&self) -> bool {
        let begins = self
            .phase
            .compare_exchange(WAITING, RUNNING, Ordering::AcqRel, Ordering::Acquire)
            .is_ok();
        if let (true, Some(shown)) = (begins, self.shown) {
            shown.store(BEGUN_ELSEWHERE, Ordering::Release);
        }
        begins
    }

    /// One whose beginning is shown there, as 1, and that is known by `key`.
    pub fn shown(shown: Option<&'static AtomicU32>, key: u64) -> Self {
        CallState {
            shown,
            key,
            ..CallState::default()
        }
    }

    /// What was to run it is gone, and it is certain that it had not begun: it waits again. False
    /// when it was given up meanwhile.
    pub fn wait_again(&self) -> bool {
        self.phase
            .compare_exchange(RUNNING, WAITING, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// Shows that it waits, if it still does. For the loop alone, which gives calls up: behind that, the
    /// place where it is shown may be another call's.
    pub fn show_waiting(&self) {
        if let (WAITING, Some(shown)) = (self.phase.load(Ordering::Acquire), self.shown) {
            shown.store(0, Ordering::Release);
        }
    }

    /// What it is known by, if anything.
    pub fn key(&self) -> u64 {
        self.key
    }

    /// The loop gives the call up; tells whether it had begun.
    pub fn give_up(&self) -> bool {
        let begun = self.phase.swap(OVER, Ordering::AcqRel) == RUNNING;
        let sleeper = self.sleeper.lock().unwrap_or_else(PoisonError::into_inner);
        match sleeper.as_ref() {
            Some(Sleeper::Thread(thread)) => thread.unpark(),
            Some(Sleeper::Waker(waker)) => waker.wake(),
            None => {}
        }
        begun
    }

    /// Whether a thread runs it.
    pub fn is_running(&self) -> bool {
        self.phase.load(Ordering::Acquire) == RUNNING
    }

    fn is_over(&self) -> bool {
        self.phase.load(Ordering::Acquire) == OVER
    }

    fn set_sleeper(&self, sleeper: Option<Sleeper>) {
        *self.sleeper.lock().unwrap_or_else(PoisonError::into_inner) = sleeper;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_call_begins_or_is_given_up_never_both() {
        let state = CallState::default();
        assert!(!state.give_up());
        assert!(!state.begin());
        let state = CallState::default();
        assert!(state.begin());
        assert!(!state.begin());
        assert!(state.give_up());
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
