//! A keeper's calls: written to the program that serves, answered by it, or by us where it can't.
//!
//! The next call is written as soon as the answer before is there, or behind it while it arrives. A
//! program that sends what is no answer, breaks off, or whose call is given up is ended here, and what
//! it had is answered, or goes to the next program where it is certain that it had not begun.

use std::sync::Arc;
use std::time::Duration;

use super::{Keeper, Why};
use crate::handler::Sleeper;
use crate::handler::job::Done;
use crate::handler::pool::desk::Entry;
use crate::protocol::code::Code;
use crate::protocol::frame::Decoded;
use crate::protocol::program::{self, Sent};
use crate::protocol::rpc_error::RpcError;
use crate::sys::process::monotonic;
use crate::throttle::Millis;

/// A call that has lain here for so long was not expected to.
const STALE: Duration = Duration::from_millis(5);

impl Keeper {
    /// Gives the program a call, when it has none.
    pub(super) fn give_out(&mut self) {
        if self.fresh.as_ref().is_some_and(|fresh| fresh.is_ready) {
            return;
        }
        while let Some(serving) = &self.serving
            && serving.running.is_none()
            && !serving.process.is_closed
            && !serving.process.has_ended
            && let Some(entry) = self.post.desk.take(self.post.number)
        {
            if let Some(entry) = self.begin(entry)
                && let Some(serving) = &mut self.serving
            {
                serving.running = Some(entry);
            }
        }
    }

    /// Begins a call and writes it; `None` when it was given up before.
    pub(super) fn begin(&mut self, mut entry: Entry) -> Option<Entry> {
        if !entry.job.state.begin() {
            self.report(entry, None, None);
            return None;
        }
        let now = monotonic();
        let left = entry.job.deadline.saturating_sub(now);
        // The loop has looked at that, but a program may have had to be started meanwhile.
        let has_waited = now.saturating_sub(entry.put) >= STALE;
        if left.is_zero() || has_waited && entry.job.expected.is_some_and(|it| left < it) {
            let text = "its time would be over before it could be done";
            let error = RpcError::of(Code::Timeout, text, false);
            self.report(entry, Some(Err(error)), None);
            return None;
        }
        let waker = Arc::clone(self.post.desk.waker(self.post.number));
        entry.job.state.set_sleeper(Some(Sleeper::Waker(waker)));
        // Given up before there was anybody to wake.
        if entry.job.state.is_over() {
            self.report(entry, None, None);
            return None;
        }
        entry.begun = Some(now);
        let serving = self.serving.as_mut()?;
        let method = self.post.registry.name(entry.job.method);
        if !serving.process.write(method, &entry.job.params) {
            let error = RpcError::of(Code::TooLarge, "no frame is so large", false);
            self.report(entry, Some(Err(error)), None);
            return None;
        }
        Some(entry)
    }

    pub(super) fn report(
        &self,
        entry: Entry,
        outcome: Option<Result<Vec<u8>, RpcError>>,
        out: Option<Box<str>>,
    ) {
        entry.job.state.set_sleeper(None);
        let took = entry.begun.map(|begun| monotonic().saturating_sub(begun));
        self.post.reports.send(Done {
            key: entry.job.key,
            outcome,
            took: took.unwrap_or_default(),
            out,
        });
    }

    pub(super) fn judge_serving(&mut self, now: Millis) {
        loop {
            if let Err(problem) = self.take_answers(now) {
                return self.end_serving(&Why::Broken(problem), now);
            }
            let Some(serving) = &mut self.serving else {
                return;
            };
            if !serving.process.has_ended && !serving.process.is_closed {
                break;
            }
            // All that it has sent by then counts.
            if !serving.process.receive() {
                return self.end_serving(&Why::Died, now);
            }
        }
        let running = self.serving.as_ref().and_then(|it| it.running.as_ref());
        let Some(entry) = running else { return };
        if entry.job.state.is_over() {
            self.end_serving(&Why::GivenUp, now);
        } else if monotonic() >= entry.job.deadline {
            self.end_serving(&Why::TimedOut, now);
        }
    }

    /// Passes on the answers that are whole, and gives the next call out as soon as may be.
    ///
    /// Fails with what is wrong with what the program has sent.
    pub(super) fn take_answers(&mut self, now: Millis) -> Result<(), String> {
        let (limit, depth) = (self.post.pool.limit, self.post.pool.depth);
        while let Some(serving) = &mut self.serving {
            let process = &serving.process;
            let (used, answer) = match process.frame(limit) {
                Decoded::Partial { .. } if !process.has_received() => return Ok(()),
                Decoded::Partial { .. } if serving.running.is_some() => {
                    // Its answer is on the way.
                    self.begin_next();
                    return Ok(());
                }
                Decoded::Partial { .. } if !serving.has_spoken => return Ok(()),
                Decoded::Partial { .. } => return Err("it spoke unasked".into()),
                Decoded::TooLarge { length } => {
                    return Err(format!(
                        "a frame of {length} bytes; limits.frame allows {limit}"
                    ));
                }
                Decoded::Whole { body, used } => match program::read(body, depth) {
                    // It came whole, so the next one can be told from it; and what a program can't
                    // say well is often what its caller gave it, who must not end it with that.
                    Err(problem) if serving.running.is_some() => {
                        let text = format!("the program sent no answer: {problem}");
                        let error = RpcError::of(Code::BadOutput, text, true);
                        (used, Some((None, Err(error))))
                    }
                    Err(problem) => return Err(problem),
                    Ok(Sent::Ready) if !serving.has_spoken => (used, None),
                    Ok(Sent::Ready) => return Err("it said that it is ready once more".into()),
                    Ok(Sent::Answer(answer)) => {
                        let Some(entry) = &serving.running else {
                            return Err("it answered though nothing was asked".into());
                        };
                        if serving.next.is_none() && process.has_unread() {
                            return Err("it answered before it had read the call".into());
                        }
                        let name = self.post.registry.answer_name(entry.job.method);
                        (used, Some(program::outcome(answer, name)))
                    }
                },
            };
            serving.has_spoken = true;
            serving.process.consume(used);
            let Some((out, outcome)) = answer else {
                continue;
            };
            serving.wear.answered(now);
            let done = serving.running.take();
            serving.running = serving.next.take();
            let process = &serving.process;
            // More of it is an answer only to what it has read by now.
            let twice = process.has_received() && process.has_unread();
            if serving.running.is_none() && !process.has_received() {
                self.give_out();
            }
            if let Some(done) = done {
                self.report(done, Some(outcome), out);
            }
            if twice {
                return Err("it answered more than it was asked".into());
            }
        }
        Ok(())
    }

    /// Writes the next call already, behind the one whose answer arrives.
    pub(super) fn begin_next(&mut self) {
        let is_replaced = self.fresh.as_ref().is_some_and(|fresh| fresh.is_ready);
        while let Some(serving) = &self.serving
            && serving.next.is_none()
            && serving.process.has_sent_all()
            && !is_replaced
            && let Some(entry) = self.post.desk.take_ahead()
        {
            if let Some(entry) = self.begin(entry)
                && let Some(serving) = &mut self.serving
            {
                serving.next = Some(entry);
            }
        }
    }

    /// Ends the program that serves; answers its calls, or lets them wait for another one.
    pub(super) fn end_serving(&mut self, why: &Why, now: Millis) {
        let Some(serving) = self.serving.take() else {
            return;
        };
        self.post.desk.pass_on(self.post.number);
        let name = Arc::clone(&self.post.pool);
        let name = &name.name;
        let pid = serving.process.pid();
        let health = serving.wear.health(now);
        let (what, left_unread) = match why {
            Why::Died => self.how_it_ended(serving.process, now),
            Why::Broken(problem) => {
                let ended = serving.process.end(now);
                let what = format!("is killed, for what it sent is no answer: {problem}");
                (what, ended.left_unread)
            }
            Why::TimedOut | Why::GivenUp | Why::Leaving => {
                (String::new(), serving.process.end(now).left_unread)
            }
        };
        let method = serving.running.as_ref().map(|entry| entry.job.method);
        // What came last is what was left.
        let unread_running = left_unread && serving.next.is_none();
        if let Some(entry) = serving.running {
            let error = match why {
                Why::TimedOut => RpcError::of(Code::Timeout, "its time was over", true),
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
            self.answer_or_repeat(entry, unread_running && matches!(why, Why::Died), error);
        }
        if let Some(entry) = serving.next {
            let text = format!(
                "the program of the pool {name} that had just got it was ended with the call before"
            );
            let error = RpcError::of(Code::Crashed, text, !left_unread);
            self.answer_or_repeat(entry, left_unread, error);
        }
        if what.is_empty() {
            // No fault of the program's: the caller's patience, or the operator's.
            log::debug!("pool {name} [{pid}]: is killed with its call");
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
    pub(super) fn answer_or_repeat(&self, entry: Entry, unbegun: bool, error: RpcError) {
        if !unbegun || entry.returned {
            return self.report(entry, Some(Err(error)), None);
        }
        entry.job.state.set_sleeper(None);
        if entry.job.state.wait_again() {
            self.post.desk.put_back(entry.job);
        } else {
            self.report(entry, None, None);
        }
    }
}
