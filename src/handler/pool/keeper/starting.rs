//! A keeper's program from its start until it is ready, and what follows when it does not get so far:
//! the first one's failure is the worker's, a later one's is throttled.

use std::mem;
use std::time::Duration;

use super::{Fresh, Keeper};
use crate::handler::pool::desk::Word;
use crate::handler::pool::process::{NotStarted, Process};
use crate::handler::prepared_program::guard_hint;
use crate::logging::pluralize;
use crate::protocol::frame::DecodedFrame;
use crate::protocol::program::{self, Sent};
use crate::throttle::Millis;

impl Keeper {
    /// There is no program, and there is to be one.
    pub(super) fn revive(&mut self, now: Millis) {
        if now >= self.due {
            if mem::take(&mut self.told_down) {
                self.tell(Word::Starts);
            }
            return self.start(now);
        }
        // While the system has no room for it, calls wait.
        if self.throttle.refused_forks() == 0 && !mem::replace(&mut self.told_down, true) {
            let (name, last) = (&self.post.pool.name, &self.last_end);
            let text = format!(
                "every program of the pool {name} has died too often, the last one as it {last}"
            );
            self.tell(Word::Down(text, self.due));
        }
    }

    pub(super) fn start(&mut self, now: Millis) {
        match Process::start(&self.post.pool) {
            Ok((process, wire)) => {
                self.throttle.forked(now);
                self.fresh = Some(Fresh {
                    process,
                    wire,
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
                self.due = self.throttle.record_refused_fork(now);
                if self.throttle.refused_forks() == 1 {
                    log::warn!(
                        "pool {}: its program could not be started: {error}; it is tried again, \
                         and its calls wait",
                        self.post.pool.name
                    );
                }
            }
            Err(NotStarted::Refused(error)) => {
                let hint = guard_hint(&error);
                self.has_failed(&format!("could not be started: {error}{hint}"), now);
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
                "has not sent {{\"out\": \"ready\"}} on descriptor 3 within boot-timeout ({:?}): let it \
                 send that, or set ready = \"alive\"",
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
            "{} in a row, so the next one is started in {:?}",
            pluralize(
                self.throttle.young_deaths() as usize,
                "young death",
                "young deaths"
            ),
            Duration::from_millis(self.due - now)
        )
    }

    pub(super) fn judge_fresh(&mut self, now: Millis) {
        let (limit, depth) = (self.post.pool.limit, self.post.pool.depth);
        let must_say = self.rules.handshake;
        let Some(fresh) = &mut self.fresh else {
            return;
        };
        // The word of being ready is all that it may say; without a handshake it may come unasked.
        while fresh.wire.has_received() {
            let used = match fresh.wire.frame(limit) {
                DecodedFrame::Whole { body, used } if !fresh.has_spoken => {
                    matches!(program::read(body, depth), Ok(Sent::Ready)).then_some(used)
                }
                // Nobody reads on until it serves: what is not whole is looked at then.
                DecodedFrame::Partial { .. } => break,
                DecodedFrame::Whole { .. } | DecodedFrame::TooLarge { .. } => None,
            };
            let Some(used) = used else {
                let text = if must_say && !fresh.is_ready {
                    "has sent something else than {\"out\": \"ready\"} at its start"
                } else {
                    "has sent something before it was asked"
                };
                return self.fresh_fails(text.into(), now);
            };
            fresh.wire.consume(used);
            fresh.has_spoken = true;
            fresh.is_ready |= must_say;
        }
        if (fresh.wire.is_closed() || fresh.process.has_ended)
            && let Some(fresh) = self.fresh.take()
        {
            let what = self.how_it_ended(fresh.process, now);
            self.has_failed(&format!("{what} before it was ready"), now);
        }
    }
}
