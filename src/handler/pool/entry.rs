//! Defines a call of a pool program, and its result. Also defines what a supervisor knows about the calls of its
//! program, and why a program is ended.

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::time::Duration;

use crate::config::StackSignal;
use crate::handler::call_state::{Done, HandlerCall};
use crate::logging::LoggedCall;
use crate::protocol::call_id::CallRunner;
use crate::protocol::rpc_error::RpcError;
use crate::sys::process::{Pid, monotonic};
use crate::throttle::Millis;

/// Why a program that served must be ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// The program has died, or has closed its descriptor 3. Both are handled in the same way.
    Died,
    /// It has sent something that is not a valid answer.
    Broken(String),
    /// No caller waits for its calls any more, and their time is over.
    GivenUp,
    /// The process exits.
    Leaving,
}

/// Why a supervisor needs its program back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Recall {
    /// To end it because it has had no call for a while, if it still has none.
    Sleep,
    /// Another program is ready to replace it.
    Successor,
    /// It has ended.
    Ended,
}

/// A program that serves, for the slow log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServingProgram {
    pub pid: Pid,
    /// The signal that it gets when its call is slow.
    pub stack_signal: Option<StackSignal>,
}

/// What the supervisor of a program knows about the program's calls.
#[derive(Debug)]
pub(super) struct Tally {
    pub program: ServingProgram,
    calls: AtomicU64,
    answered_at: AtomicU64,
    /// The call that it runs, as log lines name it: the pid and the number, which is 0 if they name none.
    home: AtomicI32,
    number: AtomicU64,
}

impl Tally {
    pub fn of(program: ServingProgram) -> Self {
        Tally {
            program,
            calls: AtomicU64::new(0),
            answered_at: AtomicU64::new(0),
            home: AtomicI32::new(0),
            number: AtomicU64::new(0),
        }
    }

    /// Returns how many calls it has answered, and the time of the last answer.
    pub fn seen(&self) -> (u64, Millis) {
        // `Acquire`: a thread that sees the new count also sees the time that was written before it.
        let calls = self.calls.load(Ordering::Acquire);
        (calls, self.answered_at.load(Ordering::Relaxed))
    }

    pub fn answered(&self, now: Millis) {
        self.answered_at.store(now, Ordering::Relaxed);
        self.calls.fetch_add(1, Ordering::Release);
    }

    /// Records the call that it runs from now on.
    pub fn runs(&self, entry: Option<&Entry>) {
        let is_asked = self.program.stack_signal.is_some();
        let call = entry.and_then(|entry| {
            let identity = entry.call.state.identity();
            // If the program is asked for its stack, its log lines must name this call.
            let id = is_asked.then(|| identity.id());
            identity.logged().or(id.map(|id| (id.pid, id.number)))
        });
        let (home, number) = call.unwrap_or_default();
        if number != 0 || self.number.load(Ordering::Relaxed) != 0 {
            self.home.store(home, Ordering::Relaxed);
            self.number.store(number, Ordering::Relaxed);
        }
    }

    /// Returns the call that its output belongs to.
    pub fn call(&self) -> Option<LoggedCall> {
        let (home, number) = (
            self.home.load(Ordering::Relaxed),
            self.number.load(Ordering::Relaxed),
        );
        (number != 0).then_some((home, number))
    }
}

/// A call for a program.
#[derive(Debug)]
pub(super) struct Entry {
    pub call: HandlerCall,
    /// Whether a program had this call and died before it had read it.
    pub returned: bool,
    /// When it was queued, as time since boot.
    pub put: Duration,
    /// When it was written to the program, as time since boot.
    pub begun: Option<Duration>,
    /// The pid of that program; 0 before.
    pub program: i32,
}

impl Entry {
    pub fn new(call: HandlerCall, returned: bool) -> Self {
        Entry {
            call,
            returned,
            put: monotonic(),
            begun: None,
            program: 0,
        }
    }

    /// Returns its result. `None` means that it was given up before it began.
    pub fn done(self, outcome: Option<Result<Vec<u8>, RpcError>>, out: Option<Box<str>>) -> Done {
        let took = self.begun.map(|begun| monotonic().saturating_sub(begun));
        self.call.state.set_ended();
        Done {
            key: self.call.key,
            outcome,
            took: took.unwrap_or_default(),
            runner: CallRunner {
                program: self.program,
                ..CallRunner::default()
            },
            out,
        }
    }
}
