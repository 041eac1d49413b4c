//! Defines a call of a pool program, and its result. Also defines what a supervisor knows about the calls of its
//! program, and why a program is ended.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::config::StackSignal;
use crate::handler::call_state::{Done, HandlerCall};
use crate::logging::LoggedCall;
use crate::protocol::call_id::CallRunner;
use crate::protocol::rpc_error::RpcError;
use crate::sys::lock::lock;
use crate::sys::process::{Pid, monotonic};
use crate::throttle::Millis;

/// Why a program that served must be ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum EndCause {
    /// The program has died, or has closed its descriptor 3. Both are handled in the same way.
    Died,
    /// It has sent something that is not a valid answer.
    Broken(String),
    /// All its calls were given up, and their time limits have passed.
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
pub(super) struct ProgramCalls {
    pub program: ServingProgram,
    calls: AtomicU64,
    answered_at: AtomicU64,
    /// The call that the program runs, as log lines name it; `None` if they name none.
    call: Mutex<Option<LoggedCall>>,
    /// Whether `call` is set, so that programs without such calls take no lock.
    has_call: AtomicBool,
}

impl ProgramCalls {
    pub fn of(program: ServingProgram) -> Self {
        ProgramCalls {
            program,
            calls: AtomicU64::new(0),
            answered_at: AtomicU64::new(0),
            call: Mutex::new(None),
            has_call: AtomicBool::new(false),
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
    pub fn set_running(&self, entry: Option<&Entry>) {
        let is_asked = self.program.stack_signal.is_some();
        let call = entry.and_then(|entry| {
            let identity = entry.call.state.identity();
            // If the program is asked for its stack, its log lines must name this call.
            let id = is_asked.then(|| identity.id());
            identity.logged().or(id.map(|id| (id.pid, id.number)))
        });
        // Only the event loop sets it, so it sees its own last value.
        if call.is_some() || self.has_call.load(Ordering::Relaxed) {
            *lock(&self.call) = call;
            self.has_call.store(call.is_some(), Ordering::Relaxed);
        }
    }

    /// Returns the call that its output belongs to.
    pub fn call(&self) -> Option<LoggedCall> {
        *lock(&self.call)
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

    /// Returns the result of the call. `outcome` is `None` if the call was given up before it began.
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
