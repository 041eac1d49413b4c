//! A keeper's program from its start until it is ready, and what follows when it does not get so far:
//! the first one's failure is the worker's, a later one's is throttled.

use std::time::Duration;

use super::{Fresh, Keeper};
use crate::handler::pool::desk::Standing;
use crate::handler::pool::process::{NotStarted, Process};
use crate::protocol::code::Code;
use crate::protocol::frame::Decoded;
use crate::protocol::program::{self, Sent};
use crate::protocol::rpc_error::RpcError;
use crate::throttle::Millis;

impl Keeper {
    /// There is no program, and there is to be one.
    pub(super) fn revive(&mut self, now: Millis) {
        let (desk, number) = (&self.post.desk, self.post.number);
        if now >= self.due {
            desk.stand(number, Standing::Busy);
            return self.start(now);
        }
        desk.stand(number, Standing::Down);
        while let Some(entry) = self.post.desk.take_refused() {
            let outcome = entry.job.state.begin().then(|| {
                let text = format!(
                    "every program of the pool {} has died too often, the last one as it {}; the \
                     next is started in {:?}",
                    self.post.pool.name,
                    self.last_end,
                    Duration::from_millis(self.due - now)
                );
                Err(RpcError::of(Code::Crashed, text, false))
            });
            self.report(entry, outcome, None);
        }
    }

    pub(super) fn start(&mut self, now: Millis) {
        match Process::start(&self.post.pool) {
            Ok(process) => {
                self.throttle.forked(now);
                self.fresh = Some(Fresh {
                    process,
                    since: now,
                    is_ready: false,
                    has_spoken: false,
                });
            }
            // It is about to tell us so.
            Err(NotStarted::Leaving) => self.due = Millis::MAX,
            Err(NotStarted::Refused(error)) if error.is_temporary() => {
                let in_time = self.proven || now < self.began + self.post.pool.first_boot;
                if !in_time {
                    return self.has_failed(&format!("could not be started: {error}"), now);
                }
                self.due = self.throttle.refusal(now);
                if self.throttle.refused_forks() == 1 {
                    log::warn!(
                        "pool {}: its program could not be started: {error}; it is tried again, \
                         and its calls wait",
                        self.post.pool.name
                    );
                }
            }
            Err(NotStarted::Refused(error)) => {
                self.has_failed(&format!("could not be started: {error}"), now);
            }
        }
    }

    pub(super) fn look_at_fresh(&mut self, now: Millis) {
        let boot = self.boot_limit();
        let Some(fresh) = self.fresh.as_mut().filter(|fresh| !fresh.is_ready) else {
            return;
        };
        let by_itself = self.rules.ready_at(fresh.since);
        if by_itself.is_some_and(|at| now >= at) {
            fresh.is_ready = true;
        } else if by_itself.is_none() && now >= fresh.since.saturating_add(boot) {
            let text = format!(
                "has not sent {{\"out\": \"ready\"}} on descriptor 3 within {:?}",
                Duration::from_millis(boot)
            );
            self.fresh_fails(text, now);
        }
    }

    /// How long a program may take to be ready.
    pub(super) fn boot_limit(&self) -> Millis {
        if self.proven {
            self.rules.boot
        } else {
            self.post.pool.first_boot
        }
    }

    fn fresh_fails(&mut self, what: String, now: Millis) {
        if let Some(fresh) = self.fresh.take() {
            fresh.process.end(now);
            self.has_failed(&what, now);
        }
    }

    /// A program did not get ready.
    fn has_failed(&mut self, what: &str, now: Millis) {
        what.clone_into(&mut self.last_end);
        if !self.proven {
            let name = &self.post.pool.name;
            self.post
                .boot
                .fail(format!("the program of the pool {name} {what}"));
            self.gave_up = true;
            return;
        }
        self.due = self.throttle.death(None, &self.rules.throttle, now);
        self.post.desk.pass_on(self.post.number);
        log::warn!(
            "pool {}: its program {what}; {}",
            self.post.pool.name,
            self.what_follows(now)
        );
    }

    pub(super) fn what_follows(&self, now: Millis) -> String {
        if self.due <= now {
            return "another one is started".into();
        }
        format!(
            "{} young deaths in a row, so the next one is started in {:?}",
            self.throttle.young_deaths(),
            Duration::from_millis(self.due - now)
        )
    }

    pub(super) fn judge_fresh(&mut self, now: Millis) {
        let limit = self.post.pool.limit;
        let Some(fresh) = &mut self.fresh else {
            return;
        };
        if self.rules.handshake && !fresh.is_ready {
            let used = match fresh.process.frame(limit) {
                Decoded::Whole { body, used } => {
                    let sent = program::read(body, self.post.pool.depth);
                    matches!(sent, Ok(Sent::Ready)).then_some(used)
                }
                Decoded::Partial { .. } => Some(0),
                Decoded::TooLarge { .. } => None,
            };
            match used {
                None => {
                    let text = "has sent something else than {\"out\": \"ready\"} at its start";
                    return self.fresh_fails(text.into(), now);
                }
                Some(0) => {}
                Some(used) => {
                    fresh.process.consume(used);
                    fresh.is_ready = true;
                    fresh.has_spoken = true;
                }
            }
        }
        // What nobody reads yet is not kept without end; a word of being ready may come unasked.
        let word = match fresh.process.frame(limit) {
            Decoded::Partial { .. } => None,
            Decoded::TooLarge { .. } => Some((0, false)),
            Decoded::Whole { body, used } => {
                let sent = program::read(body, self.post.pool.depth);
                Some((used, matches!(sent, Ok(Sent::Ready)) && !fresh.has_spoken))
            }
        };
        match word {
            None => {}
            Some((used, true)) => {
                fresh.process.consume(used);
                fresh.has_spoken = true;
            }
            Some((_, false)) => {
                let text = "has sent something before it was asked";
                return self.fresh_fails(text.into(), now);
            }
        }
        if (fresh.process.is_closed || fresh.process.has_ended)
            && let Some(fresh) = self.fresh.take()
        {
            let what = self.how_it_ended(fresh.process, now).0;
            self.has_failed(&format!("{what} before it was ready"), now);
        }
    }
}
