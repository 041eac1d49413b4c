//! A program's end, and what becomes of what it had: its call is answered, or goes to the next
//! program where it is certain that it had not begun.
//!
//! The answer to a call of a dead program is `crashed`, unless the program had not read it, which
//! the kernel knows. Ends wait for no longer than a process takes to die.

use std::sync::Arc;

use log::Level;

use super::Keeper;
use crate::handler::pool::desk::{Why, Word};
use crate::handler::pool::entry::Entry;
use crate::handler::pool::parallel::ParallelCalls;
use crate::handler::pool::process::Process;
use crate::handler::pool::seat::Seat;
use crate::protocol::code::Code;
use crate::protocol::rpc_error::RpcError;
use crate::sys::process::Exit;
use crate::throttle::Millis;

impl Keeper {
    /// Ends a process that is at its end, and says how.
    pub(super) fn how_it_ended(&self, mut process: Process, now: Millis) -> String {
        // An exit closes descriptors before it is seen.
        let by_itself = process.ends_soon();
        match process.end(now) {
            _ if !by_itself => "has closed its descriptor 3, and is killed".into(),
            Some(Exit::Code(code)) => format!("has left with exit code {code}"),
            Some(exit) => format!("was ended by {exit}"),
            None => "hangs".into(),
        }
    }

    /// Ends the program that serves; answers its calls, or lets them wait for another one.
    pub(super) fn end_serving(&mut self, seat: Seat, why: &Why, now: Millis) {
        let serving = self.serving.take();
        let serving = serving.expect("only a program that serves is ended so");
        let (running, next) = (seat.running, seat.next);
        let parallel = seat.parallel.into_iter();
        let parallel: Vec<Entry> = parallel.flat_map(ParallelCalls::into_running).collect();
        let name = Arc::clone(&self.post.pool);
        let name = &name.name;
        let pid = serving.process.pid();
        let health = serving.wear.health(now);
        let what = match why {
            Why::Died => self.how_it_ended(serving.process, now),
            Why::Broken(problem) => {
                serving.process.end(now);
                format!("is killed, for what it sent is no answer: {problem}")
            }
            Why::GivenUp | Why::Leaving => {
                serving.process.end(now);
                String::new()
            }
        };
        let left_unread = seat.wire.was_left_unread();
        let method = running.iter().chain(&parallel).next();
        let method = method.map(|entry| entry.job.method);
        for entry in parallel {
            let error = match why {
                Why::Leaving => RpcError::of(Code::Stopping, "this worker leaves", true),
                // One of its calls may be to blame, and not this one.
                Why::Died | Why::Broken(_) | Why::GivenUp => {
                    let text = format!("the program of the pool {name} that ran it {what}");
                    RpcError::of(Code::Crashed, text, true)
                }
            };
            self.answer_or_repeat(entry, false, error);
        }
        // What came last is what was left.
        let unread_running = left_unread && next.is_none();
        if let Some(entry) = running {
            let error = match why {
                Why::GivenUp => RpcError::of(Code::Cancelled, "it was given up", true),
                Why::Leaving => RpcError::of(Code::Stopping, "this worker leaves", true),
                Why::Broken(problem) => {
                    let text = format!("the program of the pool {name} sent no answer: {problem}");
                    RpcError::of(Code::BadOutput, text, true)
                }
                Why::Died => {
                    let text = format!("the program of the pool {name} that ran it {what}");
                    RpcError::of(Code::Crashed, text, !unread_running)
                }
            };
            self.answer_or_repeat(entry, unread_running && *why == Why::Died, error);
        }
        if let Some(entry) = next {
            let text = format!(
                "the program of the pool {name} that had just got it was ended with the call before"
            );
            let error = RpcError::of(Code::Crashed, text, !left_unread);
            self.answer_or_repeat(entry, left_unread, error);
        }
        if what.is_empty() {
            let registry = &self.post.registry;
            if method.is_some_and(|method| registry.methods()[method].kills_abandoned) {
                // Otherwise clients could keep all programs starting.
                self.due = self.throttle.death(Some(health), &self.rules.throttle, now);
                self.last_end = "was killed for an abandoned call".to_owned();
            }
            // No fault of the program's: the caller's patience, or the operator's. Callers can cause
            // many of them.
            let level = match self.kills.admit(now) {
                Some(_) => Level::Info,
                None => Level::Debug,
            };
            let method = method.map_or("a call", |method| self.post.registry.name(method));
            log::log!(
                level,
                "pool {name} [{pid}]: is killed while it runs {method}, for nobody waits for that any \
                 more"
            );
            return;
        }
        what.clone_into(&mut self.last_end);
        self.due = self.throttle.death(Some(health), &self.rules.throttle, now);
        let during = method.map_or_else(String::new, |method| {
            format!(" while it ran {}", self.post.registry.name(method))
        });
        log::warn!(
            "pool {name} [{pid}]: the program {what}{during}; {}",
            self.what_follows(now)
        );
    }

    /// A call that has not begun goes to another program, but once only: it may be what programs
    /// die of.
    fn answer_or_repeat(&self, entry: Entry, unbegun: bool, error: RpcError) {
        if !unbegun || entry.returned {
            self.post.reports.send(entry.done(Some(Err(error)), None));
        } else if entry.job.state.wait_again() {
            self.tell(Word::Again(entry.job));
        } else {
            self.post.reports.send(entry.done(None, None));
        }
    }
}
