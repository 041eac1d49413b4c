//! A program's place at the desk: its wire and its calls, as long as it serves.
//!
//! A call is written when the program has none; the next one already while an answer still arrives.
//! What the program sends is judged here: an answer goes to the one call that it has, and whatever
//! can be no answer is told in words, for the keeper to end the program: so no answer of a program
//! that sends one frame a call ever reaches another call than its own. It runs in the event loop and
//! waits for nothing.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::Pool;
use super::entry::Entry;
use super::life::millis;
use super::parallel::{OpenCall, ParallelCalls};
use super::wire::Wire;
use crate::handler::call_state::Done;
use crate::handler::registry::Registry;
use crate::protocol::code::Code;
use crate::protocol::frame::DecodedFrame;
use crate::protocol::program::{self, Sent};
use crate::protocol::rpc_error::RpcError;
use crate::sys::process::{monotonic, monotonic_ms};
use crate::throttle::Millis;
use crate::throttle::limiter::Limiter;

/// A call that has lain here for so long was not expected to.
const STALE: Duration = Duration::from_millis(5);

/// What a program has done, for the keeper to see.
#[derive(Debug, Default)]
pub(super) struct Tally {
    calls: AtomicU64,
    answered_at: AtomicU64,
}

impl Tally {
    /// How many calls it has answered, and when the last one.
    pub fn seen(&self) -> (u64, Millis) {
        // Who sees an answer counted sees its time as well.
        let calls = self.calls.load(Ordering::Acquire);
        (calls, self.answered_at.load(Ordering::Relaxed))
    }

    fn answered(&self, now: Millis) {
        self.answered_at.store(now, Ordering::Relaxed);
        self.calls.fetch_add(1, Ordering::Release);
    }
}

/// What all programs of a pool have in common at their desk.
#[derive(Debug)]
pub(super) struct Line {
    /// Calls that no program has, in the order in which they are begun.
    pub waiting: VecDeque<Entry>,
    /// What became of others.
    pub done: Vec<Done>,
    pub registry: Arc<Registry>,
    /// The pool's name.
    pub name: String,
    /// How often it may be said that a program sends no answers.
    pub complaints: Limiter,
    /// Bytes of an answer.
    pub limit: usize,
    /// Its nesting.
    pub depth: usize,
    /// Where is shown what its programs do.
    pub pool: Option<Arc<Pool>>,
}

impl Line {
    /// Shows what a program does.
    pub fn show(&self, number: usize, seat: &Seat) {
        let pool = self.pool.as_ref();
        if let Some(record) = pool.and_then(|pool| pool.records().get(number)) {
            record.show_calls(seat.count(), seat.tally.seen().0);
        }
    }

    /// Until when a program may run a call that was given up.
    fn end_of_abandoned(&self, entry: &Entry) -> Millis {
        let method = &self.registry.methods()[entry.job.method];
        match (entry.begun, method.kills_abandoned) {
            (Some(begun), false) => millis(begun.saturating_add(method.timeout)),
            _ => 0,
        }
    }

    /// Tells that a program has sent no answer, now and then.
    fn complain(&mut self, problem: &str) {
        if self.complaints.admit(monotonic_ms()).is_some() {
            log::warn!(
                "pool {}: a program has sent a frame that is no answer: {problem}; its caller gets \
                 bad-output, the program goes on",
                self.name
            );
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Seat {
    pub wire: Wire,
    pub running: Option<Entry>,
    /// Written while the answer of `running` arrives; `None` where nothing is running.
    pub next: Option<Entry>,
    /// Its calls instead of these two, if it may have several at once.
    pub parallel: Option<ParallelCalls>,
    /// It has sent something already, so that a word of being ready is out of place.
    has_spoken: bool,
    tally: Arc<Tally>,
    /// After so many calls its keeper wants to know, once; 0: never.
    enough: u64,
    /// Its keeper wants it back: it gets no further call.
    pub is_recalled: bool,
    /// The program has ended, whoever else may hold the wire's other end.
    pub has_ended: bool,
    /// How the wire is watched.
    pub is_watched_for_writing: bool,
}

impl Seat {
    pub fn new(
        (wire, has_spoken): (Wire, bool),
        concurrency: usize,
        tally: Arc<Tally>,
        enough: u64,
    ) -> Self {
        Seat {
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

    /// Whether it would take a call now.
    pub fn is_idle(&self) -> bool {
        let has_room = match &self.parallel {
            Some(calls) => calls.has_room(monotonic_ms()),
            None => self.running.is_none(),
        };
        has_room && self.takes_calls()
    }

    /// How many calls it runs whose clients still wait.
    pub fn count(&self) -> usize {
        match &self.parallel {
            Some(calls) => calls.count(),
            None => usize::from(self.running.is_some()),
        }
    }

    /// How many calls it may have, those that it has included.
    pub fn capacity(&self) -> usize {
        match &self.parallel {
            _ if self.is_recalled => self.count(),
            Some(calls) => calls.capacity(monotonic_ms()),
            None => 1,
        }
    }

    /// Until when it may go on if all its calls are abandoned: a call that was given up may run until its
    /// method's timeout. Milliseconds (CLOCK_MONOTONIC).
    pub fn works_in_vain_until(&self, line: &Line) -> Option<Millis> {
        match (&self.parallel, &self.running) {
            (Some(calls), _) => calls.overdue_at().filter(|_| calls.count() == 0),
            (None, Some(entry)) if entry.job.state.is_over() => Some(line.end_of_abandoned(entry)),
            (None, _) => None,
        }
    }

    /// Whether it is to be ended, because all its calls are abandoned and its time is over.
    pub fn works_in_vain(&self, line: &Line) -> bool {
        let until = self.works_in_vain_until(line);
        until.is_some_and(|until| until <= monotonic_ms())
    }

    /// Tells the program which of its calls were given up.
    pub fn cancel_given_up(&mut self, line: &mut Line) {
        let Some(calls) = &mut self.parallel else {
            return;
        };
        for (id, entry) in calls.cancel_given_up(|entry| line.end_of_abandoned(entry)) {
            self.wire.cancel(id);
            let error = RpcError::of(Code::Cancelled, "it was given up", true);
            line.done.push(entry.done(Some(Err(error)), None));
        }
    }

    fn takes_calls(&self) -> bool {
        !self.is_recalled && !self.is_at_end()
    }

    /// Whether nothing more will come from it.
    pub fn is_at_end(&self) -> bool {
        self.has_ended || self.wire.is_closed()
    }

    /// Whether it has answered so many calls that its keeper wants to know; tells so once.
    pub fn has_had_enough(&mut self) -> bool {
        let enough = self.enough > 0 && self.tally.seen().0 >= self.enough;
        if enough {
            self.enough = 0;
        }
        enough
    }

    /// Gives the program calls, as many as it may have.
    pub fn give_out(&mut self, line: &mut Line) {
        while self.give_one(line) {}
    }

    /// Gives the program the next call, if it may have one; it may have been given up. Returns whether
    /// there was one.
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
            None => self.running = begun,
        }
        true
    }

    /// Writes the next call already, behind the one whose answer arrives.
    fn begin_next(&mut self, line: &mut Line) {
        while self.next.is_none()
            && self.wire.has_sent_all()
            && self.takes_calls()
            && let Some(entry) = line.waiting.pop_front()
        {
            self.next = self.begin(entry, line);
        }
    }

    /// Begins a call and writes it; `None` when there is nothing to wait for.
    fn begin(&mut self, mut entry: Entry, line: &mut Line) -> Option<Entry> {
        if !entry.job.state.begin() {
            line.done.push(entry.done(None, None));
            return None;
        }
        let now = monotonic();
        let left = entry.job.deadline.saturating_sub(now);
        // The loop has looked at that, but a program may have had to be started meanwhile.
        let has_waited = now.saturating_sub(entry.put) >= STALE;
        let error =
            if left.is_zero() || has_waited && entry.job.expected.is_some_and(|it| left < it) {
                let text = "its time would be over before it could be done";
                RpcError::of(Code::Timeout, text, false)
            } else {
                entry.begun = Some(now);
                let method = line.registry.name(entry.job.method);
                let id = self.parallel.as_ref().map(ParallelCalls::next_id);
                if self.wire.write(method, &entry.job.params, id) {
                    return Some(entry);
                }
                RpcError::of(Code::TooLarge, "no frame is so large", false)
            };
        line.done.push(entry.done(Some(Err(error)), None));
        None
    }

    /// Whether what it has sent can be no answer to its call, for it has not read that.
    fn answers_too_early(&self) -> bool {
        self.running.is_some() && self.next.is_none() && self.wire.has_unread()
    }

    /// Whether what it says first may still be that it is ready.
    fn may_become_ready(&self) -> bool {
        !self.has_spoken && (self.running.is_none() || self.wire.has_unread())
    }

    /// Passes on the answers that are whole, and gives the next call out as soon as may be.
    ///
    /// # Errors
    /// What is wrong with what the program has sent.
    pub fn take_answers(&mut self, line: &mut Line) -> Result<(), String> {
        if let Some(mut calls) = self.parallel.take() {
            let taken = self.take_parallel_answers(&mut calls, line);
            self.parallel = Some(calls);
            self.give_out(line);
            return taken;
        }
        loop {
            let (used, answer) = match self.wire.frame(line.limit) {
                DecodedFrame::Partial { .. } if !self.wire.has_received() => return Ok(()),
                // It may be the word of being ready, which comes late where nobody waits for it.
                DecodedFrame::Partial { .. } if self.may_become_ready() => return Ok(()),
                DecodedFrame::Partial { .. } if self.running.is_some() => {
                    // Its answer is on the way.
                    self.begin_next(line);
                    return Ok(());
                }
                DecodedFrame::Partial { .. } => return Err("it spoke unasked".into()),
                DecodedFrame::TooLarge { length } => {
                    let limit = line.limit;
                    return Err(format!(
                        "a frame of {length} bytes; limits.frame allows {limit}"
                    ));
                }
                DecodedFrame::Whole { body, used } => match program::read(body, line.depth) {
                    Ok(Sent::Ready) if !self.has_spoken => (used, None),
                    _ if self.answers_too_early() => {
                        return Err("it answered before it had read the call".into());
                    }
                    // It came whole, so the next one can be told from it; and what a program can't
                    // say well is often what its caller gave it, who must not end it with that.
                    Err(problem) if self.running.is_some() => {
                        line.complain(&problem);
                        let text = format!("the program sent no answer: {problem}");
                        let error = RpcError::of(Code::BadOutput, text, true);
                        (used, Some((None, Err(error))))
                    }
                    Err(problem) => return Err(problem),
                    Ok(Sent::Ready) => return Err("it said that it is ready once more".into()),
                    Ok(Sent::Answer(answer)) => {
                        let Some(entry) = &self.running else {
                            return Err("it answered though nothing was asked".into());
                        };
                        let name = line.registry.answer_name(entry.job.method);
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
            self.tally.answered(monotonic_ms());
            // More of it is an answer only to what it has read by now.
            let twice = self.wire.has_received() && self.wire.has_unread();
            if self.running.is_none() && !self.wire.has_received() {
                self.give_out(line);
            }
            line.done.extend(answered);
            if twice {
                return Err("it answered more than it was asked".into());
            }
        }
    }

    /// The same for a program that has several calls.
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
                    return Err("it spoke unasked".into());
                }
                DecodedFrame::Partial { .. } => return Ok(()),
                DecodedFrame::TooLarge { length } => {
                    let limit = line.limit;
                    return Err(format!(
                        "a frame of {length} bytes; limits.frame allows {limit}"
                    ));
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
                Ok(Sent::Ready) => return Err("it said that it is ready once more".into()),
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
                OpenCall::Cancelled => None,
                OpenCall::Unknown => {
                    return Err(format!(
                        "an answer with the id {id}, which no open call has"
                    ));
                }
            };
            let answered = entry.map(|entry| match sent {
                Ok(Sent::Answer(answer)) => {
                    let name = line.registry.answer_name(entry.job.method);
                    let (out, outcome) = program::outcome(answer, name);
                    (entry.done(Some(outcome), out), None)
                }
                Ok(Sent::Ready) | Err(_) => {
                    let problem = sent.err().unwrap_or_default();
                    let text = format!("the program sent no answer: {problem}");
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
