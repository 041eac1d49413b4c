//! Handles the calls of one program of a pool while it serves, over its wire.
//!
//! A call is written when the program has none, or as soon as the answer to the call before begins to arrive.
//! The messages of the program are checked here. An answer goes to the one call that the program runs.
//! Anything that cannot be an answer is an error, for which the supervisor ends the program. So if a
//! program sends one frame per call, no answer ever reaches another call. The code runs in the event loop
//! and never waits.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::definition::Pool;
use super::entry::{Entry, ProgramCalls, ServingProgram};
use super::life::millis;
use super::parallel::{OpenCall, ParallelCalls};
use super::wire::Wire;
use crate::handler::call_state::{CallKey, Done};
use crate::handler::job_attempt::JobAttempt;
use crate::handler::registry::Registry;
use crate::handler::trace::Trace;
use crate::protocol::code::Code;
use crate::protocol::frame::{self, DecodedFrame};
use crate::protocol::program::{self, CallExtras, Sent};
use crate::protocol::rpc_error::RpcError;
use crate::sys::process::{monotonic, monotonic_ms};
use crate::throttle::Millis;
use crate::throttle::limiter::Limiter;

/// After this time in the queue the expected run time of a call is checked again.
const STALE: Duration = Duration::from_millis(5);

/// What the programs of a pool share at their dispatcher.
#[derive(Debug)]
pub(super) struct Line {
    /// The calls that no program has, in the order in which they begin.
    pub waiting: VecDeque<Entry>,
    /// The results of other calls.
    pub done: Vec<Done>,
    pub registry: Arc<Registry>,
    pub name: String,
    /// Limits the warnings about invalid answers.
    pub warning_limiter: Limiter,
    /// The largest answer in bytes.
    pub limit: usize,
    /// The deepest nesting of an answer.
    pub depth: usize,
    /// The pool with the records of the programs.
    pub pool: Option<Arc<Pool>>,
}

impl Line {
    /// Records the calls of a program.
    pub fn show(&self, number: usize, connection: &ProgramConnection) {
        let pool = self.pool.as_ref();
        if let Some(record) = pool.and_then(|pool| pool.record(number)) {
            record.show_calls(connection.count(), connection.tally.seen().0);
        }
    }

    /// Returns the time until which a program may run a call or an attempt that was given up.
    fn end_of_abandoned(&self, entry: &Entry) -> Millis {
        let method = &self.registry.methods()[entry.call.method];
        match (entry.begun, entry.call.state.identity().attempt.as_deref()) {
            _ if method.kills_abandoned => 0,
            (Some(_), Some(attempt)) if attempt.must_end_now() => 0,
            (Some(_), Some(_)) => millis(entry.call.deadline),
            (Some(begun), None) => millis(begun.saturating_add(method.timeout)),
            (None, _) => 0,
        }
    }

    /// Logs an invalid answer of a program, at a limited rate.
    fn complain(&mut self, problem: &str) {
        if self.warning_limiter.admit(monotonic_ms()).is_some() {
            log::warn!(
                "pool {}: a program has sent an invalid answer: {problem}; its caller gets \
                 bad-output, the program continues",
                self.name
            );
        }
    }
}

/// A program that serves, with its calls.
#[derive(Debug)]
pub(super) struct ProgramConnection {
    pub wire: Wire,
    pub running: Option<Entry>,
    /// A call that was written while the answer of `running` arrives; `None` if nothing is running.
    pub next: Option<Entry>,
    /// Its calls, if it may run several at once. Then `running` and `next` are not used.
    pub parallel: Option<ParallelCalls>,
    /// Whether it has sent a message. After that, a ready message is an error.
    has_spoken: bool,
    tally: Arc<ProgramCalls>,
    /// After this many answered calls the supervisor is informed, once; 0 means never.
    enough: u64,
    /// The supervisor wants the wire back, so the program gets no further call.
    pub is_recalled: bool,
    /// The program has ended, even if another process still has the other end of its wire.
    pub has_ended: bool,
    /// Whether the wire is also watched for writing.
    pub is_watched_for_writing: bool,
}

impl ProgramConnection {
    pub fn new(
        (wire, has_spoken): (Wire, bool),
        concurrency: usize,
        tally: Arc<ProgramCalls>,
        enough: u64,
    ) -> Self {
        ProgramConnection {
            wire,
            running: None,
            next: None,
            parallel: (concurrency > 1).then(|| ParallelCalls::new(concurrency)),
            has_spoken,
            tally,
            enough,
            is_recalled: false,
            has_ended: false,
            is_watched_for_writing: false,
        }
    }

    /// Returns whether it can take a call now.
    pub fn is_idle(&self) -> bool {
        let has_room = match &self.parallel {
            Some(calls) => calls.has_room(monotonic_ms()),
            None => self.running.is_none(),
        };
        has_room && self.takes_calls()
    }

    /// Returns the program if it runs this call.
    pub fn runs(&self, key: CallKey) -> Option<ServingProgram> {
        let mut running = self.running.iter();
        let is_running = match &self.parallel {
            Some(calls) => calls.has(key),
            None => running.any(|entry| entry.call.key == key),
        };
        is_running.then_some(self.tally.program)
    }

    /// Returns how many of its calls must still be reported.
    pub fn count(&self) -> usize {
        match &self.parallel {
            Some(calls) => calls.count(),
            None => usize::from(self.running.is_some()),
        }
    }

    /// Returns how many calls it may run, including the current ones.
    pub fn capacity(&self) -> usize {
        match &self.parallel {
            _ if self.is_recalled => self.count(),
            Some(calls) => calls.capacity(monotonic_ms()),
            None => 1,
        }
    }

    /// If all its calls are abandoned, returns the time until which it may continue: an abandoned call
    /// may run until the timeout of its method. Milliseconds (CLOCK_MONOTONIC).
    pub fn abandoned_until(&self, line: &Line) -> Option<Millis> {
        match (&self.parallel, &self.running) {
            (Some(calls), _) => calls.overdue_at().filter(|_| calls.are_abandoned()),
            (None, Some(entry)) if entry.call.state.is_over() => Some(line.end_of_abandoned(entry)),
            (None, _) => None,
        }
    }

    /// Returns whether the program must be ended, because all its calls are abandoned and their time is over.
    pub fn is_abandoned_too_long(&self, line: &Line) -> bool {
        let until = self.abandoned_until(line);
        until.is_some_and(|until| until <= monotonic_ms())
    }

    /// Cancels in the program the calls that were given up.
    pub fn cancel_given_up(&mut self, line: &mut Line) {
        let Some(calls) = &mut self.parallel else {
            return;
        };
        let wire = &mut self.wire;
        let end = |entry: &Entry| line.end_of_abandoned(entry);
        for entry in calls.cancel_given_up(end, |id| wire.cancel(id)) {
            let error = RpcError::of(Code::Cancelled, "the call was cancelled", true);
            line.done.push(entry.done(Some(Err(error)), None));
        }
    }

    fn takes_calls(&self) -> bool {
        !self.is_recalled && !self.is_at_end()
    }

    /// Returns whether nothing more will come from it.
    pub fn is_at_end(&self) -> bool {
        self.has_ended || self.wire.is_closed()
    }

    /// Returns whether the program has answered the number of calls at which its supervisor recycles it. Returns true
    /// only once.
    pub fn take_recycle_due(&mut self) -> bool {
        let enough = self.enough > 0 && self.tally.seen().0 >= self.enough;
        if enough {
            self.enough = 0;
        }
        enough
    }

    /// Gives the program as many calls as it may run.
    pub fn give_out(&mut self, line: &mut Line) {
        while self.give_one(line) {}
    }

    /// Gives the program the next call if it has room. That call may have been given up. Returns whether
    /// there was a call.
    pub fn give_one(&mut self, line: &mut Line) -> bool {
        if !self.is_idle() {
            return false;
        }
        let Some(entry) = line.waiting.pop_front() else {
            return false;
        };
        let begun = self.begin(entry, line);
        match &mut self.parallel {
            Some(calls) => {
                if let Some(entry) = begun {
                    calls.add(entry);
                }
            }
            None => {
                self.running = begun;
                self.tally.set_running(self.running.as_ref());
            }
        }
        true
    }

    /// Writes the next call while the answer of the current one arrives.
    fn begin_next(&mut self, line: &mut Line) {
        while self.next.is_none()
            && self.wire.has_sent_all()
            && self.takes_calls()
            && let Some(entry) = line.waiting.pop_front()
        {
            self.next = self.begin(entry, line);
        }
    }

    /// Begins a call and writes it. Returns `None` if no answer will follow.
    fn begin(&mut self, mut entry: Entry, line: &mut Line) -> Option<Entry> {
        if !entry.call.state.begin() {
            line.done.push(entry.done(None, None));
            return None;
        }
        let now = monotonic();
        let left = entry.call.deadline.saturating_sub(now);
        // The event loop has checked this before, but the call may have waited for the start of a program since.
        let has_waited = now.saturating_sub(entry.put) >= STALE;
        let error =
            if left.is_zero() || has_waited && entry.call.expected.is_some_and(|it| left < it) {
                let text = "its deadline would pass before it is done";
                RpcError::of(Code::Timeout, text, false)
            } else {
                entry.begun = Some(now);
                entry.program = self.tally.program.pid.0;
                entry.call.state.set_begun(now);
                let method = line.registry.name(entry.call.method);
                let id = self.parallel.as_ref().map(ParallelCalls::next_id);
                let identity = entry.call.state.identity();
                let trace = identity.trace().map(Trace::into_context);
                let extras = CallExtras {
                    id,
                    trace: trace.as_ref().map(|context| (identity.id(), &**context)),
                    job: identity.attempt.as_deref().map(JobAttempt::member),
                };
                if self.wire.write(method, &entry.call.params, extras) {
                    return Some(entry);
                }
                RpcError::of(Code::TooLarge, "it is too large for a frame", false)
            };
        line.done.push(entry.done(Some(Err(error)), None));
        None
    }

    /// Returns whether a message that has come cannot be an answer, because the program has not read its call.
    fn answers_too_early(&self) -> bool {
        self.running.is_some() && self.next.is_none() && self.wire.has_unread()
    }

    /// Returns whether its first message may still be the ready message.
    fn may_become_ready(&self) -> bool {
        !self.has_spoken && (self.running.is_none() || self.wire.has_unread())
    }

    /// Passes complete answers on, and gives out the next call as soon as possible.
    ///
    /// # Errors
    /// What is wrong with the messages of the program.
    pub fn take_answers(&mut self, line: &mut Line) -> Result<(), String> {
        if let Some(mut calls) = self.parallel.take() {
            let taken = self.take_parallel_answers(&mut calls, line);
            self.parallel = Some(calls);
            // A program that broke the protocol gets no further call.
            if taken.is_ok() {
                self.give_out(line);
            }
            return taken;
        }
        loop {
            let (used, answer) = match self.wire.frame(line.limit) {
                DecodedFrame::Partial { .. } if !self.wire.has_received() => return Ok(()),
                // It may be the ready message, which can come late if the program is not required to send
                // it.
                DecodedFrame::Partial { .. } if self.may_become_ready() => return Ok(()),
                DecodedFrame::Partial { .. } if self.running.is_some() => {
                    // The answer is arriving.
                    self.begin_next(line);
                    return Ok(());
                }
                DecodedFrame::Partial { .. } => return Err("it sent a frame without a call".into()),
                DecodedFrame::TooLarge { length } => {
                    return Err(frame::too_large(length, line.limit));
                }
                DecodedFrame::Whole { body, used } => match program::read(body, line.depth) {
                    Ok(Sent::Ready) if !self.has_spoken => (used, None),
                    _ if self.answers_too_early() => {
                        return Err("it answered before it had read the call".into());
                    }
                    // The frame is complete, so the next one can be found. An invalid answer is often
                    // caused by the params of the client, which must not be able to end the program.
                    Err(problem) if self.running.is_some() => {
                        line.complain(&problem);
                        let text = format!("the program sent an invalid answer: {problem}");
                        let error = RpcError::of(Code::BadOutput, text, true);
                        (used, Some((None, Err(error))))
                    }
                    Err(problem) => return Err(problem),
                    Ok(Sent::Ready) => return Err("it sent a second ready message".into()),
                    Ok(Sent::Answer(answer)) => {
                        let Some(entry) = &self.running else {
                            return Err("it sent an answer without a call".into());
                        };
                        let name = line.registry.answer_name(entry.call.method);
                        (used, Some(program::outcome(answer, name)))
                    }
                },
            };
            self.has_spoken = true;
            self.wire.consume(used);
            let Some((out, outcome)) = answer else {
                continue;
            };
            let done = self.running.take();
            let answered = done.map(|entry| entry.done(Some(outcome), out));
            self.running = self.next.take();
            self.tally.set_running(self.running.as_ref());
            self.tally.answered(monotonic_ms());
            // Further bytes can only answer a call that the program has read.
            let twice = self.wire.has_received() && self.wire.has_unread();
            if self.running.is_none() && !self.wire.has_received() {
                self.give_out(line);
            }
            line.done.extend(answered);
            if twice {
                return Err("it sent a second answer to a call".into());
            }
        }
    }

    /// Passes complete answers on, as `take_answers` does, for a program with several calls.
    fn take_parallel_answers(
        &mut self,
        calls: &mut ParallelCalls,
        line: &mut Line,
    ) -> Result<(), String> {
        loop {
            let (body, used) = match self.wire.frame(line.limit) {
                DecodedFrame::Partial { .. }
                    if self.wire.has_received() && self.has_spoken && calls.is_empty() =>
                {
                    return Err("it sent a frame without a call".into());
                }
                DecodedFrame::Partial { .. } => return Ok(()),
                DecodedFrame::TooLarge { length } => {
                    return Err(frame::too_large(length, line.limit));
                }
                DecodedFrame::Whole { body, used } => (body, used),
            };
            let sent = program::read(body, line.depth);
            let id = match &sent {
                Ok(Sent::Ready) if !self.has_spoken => {
                    self.has_spoken = true;
                    self.wire.consume(used);
                    continue;
                }
                Ok(Sent::Ready) => return Err("it sent a second ready message".into()),
                _ => program::id(body),
            };
            self.has_spoken = true;
            let Some(id) = id else {
                let problem = sent.err();
                return Err(
                    problem.unwrap_or_else(|| "an answer without the id of its call".into())
                );
            };
            let entry = match calls.take(id) {
                OpenCall::Call(entry) => Some(entry),
                OpenCall::Cancelled(attempt) => attempt,
                OpenCall::Unknown => {
                    return Err(format!(
                        "an answer with the id {id}, which no open call has"
                    ));
                }
            };
            let answered = entry.map(|entry| match sent {
                Ok(Sent::Answer(answer)) => {
                    let name = line.registry.answer_name(entry.call.method);
                    let (out, outcome) = program::outcome(answer, name);
                    (entry.done(Some(outcome), out), None)
                }
                Ok(Sent::Ready) | Err(_) => {
                    let problem = sent.err().unwrap_or_default();
                    let text = format!("the program sent an invalid answer: {problem}");
                    let error = RpcError::of(Code::BadOutput, text, true);
                    (entry.done(Some(Err(error)), None), Some(problem))
                }
            });
            self.wire.consume(used);
            self.tally.answered(monotonic_ms());
            if let Some((done, problem)) = answered {
                line.done.push(done);
                if let Some(problem) = problem {
                    line.complain(&problem);
                }
            }
        }
    }
}
