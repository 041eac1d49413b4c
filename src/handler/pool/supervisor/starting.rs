//! Starts a supervisor's program, and handles it until it is ready. If the first one fails, the process
//! fails. If a later one fails, the next start is throttled.

use std::mem;
use std::time::Duration;

use super::{Absence, Fresh, Phase, ProgramSupervisor};
use crate::handler::pool::definition::ProgramExit;
use crate::handler::pool::dispatcher::SupervisorEvent;
use crate::handler::pool::process::{NotStarted, Process};
use crate::handler::prepared_program::guard_hint;
use crate::logging::pluralize;
use crate::protocol::frame::DecodedFrame;
use crate::protocol::program::{self, Sent};
use crate::throttle::Millis;

impl ProgramSupervisor {
    /// Starts a program if there is none.
    pub(super) fn revive(&mut self, now: Millis) {
        if now >= self.due {
            if !self.takes_room() {
                return;
            }
            if self.absence == Absence::Down {
                self.absence = Absence::None;
                self.report(SupervisorEvent::Starts);
            }
            return self.start(now);
        }
        // The next attempt is at `due`, so do not wait for room before that.
        self.waits_for_room = false;
        // While the system has no room for a program, calls wait.
        if self.throttle.refused_forks() == 0 && self.absence != Absence::Down {
            self.absence = Absence::Down;
            let (name, last) = (&self.post.pool.name, &self.last_end);
            let text =
                format!("every program of the pool {name} has died too often; the last one {last}");
            self.report(SupervisorEvent::Down(text, self.due));
        }
    }

    /// Returns whether a program may be started, possibly beside another one.
    pub(super) fn takes_room(&mut self) -> bool {
        let count = self.processes().count();
        let has_room = match &self.post.spare {
            Some(spare) if count > 0 && !self.has_spare => {
                self.has_spare = spare.take(&self.post.waker);
                self.has_spare
            }
            Some(_) => count < 2,
            None => true,
        };
        self.waits_for_room = !has_room;
        has_room
    }

    pub(super) fn release_room(&mut self) {
        if mem::take(&mut self.has_spare)
            && let Some(spare) = &self.post.spare
        {
            spare.release();
        }
    }

    pub(super) fn start(&mut self, now: Millis) {
        let boot = self.post.boot.clone().filter(|_| !self.proven);
        match Process::start(&self.post.pool, boot) {
            Ok((process, wire)) => {
                self.throttle.forked(now);
                self.post.pool.count_start();
                self.fresh = Some(Fresh {
                    process,
                    wire,
                    since: now,
                    is_ready: false,
                    has_spoken: false,
                });
            }
            // The process exits: the order for that follows.
            Err(NotStarted::Leaving) => self.due = Millis::MAX,
            Err(NotStarted::Refused(error)) if error.is_temporary() => {
                let in_time = self.proven || now < self.began + self.post.pool.first_boot();
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
            let cut = match boot < self.rules.boot {
                true => ", nine tenths of workers.boot-timeout",
                false => "",
            };
            let text = format!(
                "has not sent {{\"out\": \"ready\"}} on descriptor 3 within boot-timeout ({:?}{cut}): let it \
                 send that, or set ready = \"alive\"",
                Duration::from_millis(boot)
            );
            self.fresh_fails(text, now);
        }
    }

    /// Returns the longest time until a program is ready.
    pub(super) fn boot_limit(&self) -> Millis {
        if self.proven {
            self.rules.boot
        } else {
            self.post.pool.first_boot()
        }
    }

    fn fresh_fails(&mut self, what: String, now: Millis) {
        if let Some(fresh) = self.fresh.take() {
            let pid = fresh.process.pid();
            let ended = fresh.process.end(now);
            self.post.pool.count_exit(ProgramExit::Boot);
            self.record_death((pid, fresh.since), ended, None, &what);
            self.has_failed(&what, now);
        }
    }

    /// Handles a program that has failed before it was ready.
    fn has_failed(&mut self, what: &str, now: Millis) {
        what.clone_into(&mut self.last_end);
        if !self.proven {
            let name = &self.post.pool.name;
            if let Some(boot) = &self.post.boot {
                boot.fail(format!("the program of the pool {name} {what}"));
            }
            self.phase = self.phase.max(Phase::Closing(0));
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
        if self.post.pool.is_of_connection() {
            return "its connection is closed".into();
        }
        if self.due <= now {
            return "another one is started".into();
        }
        format!(
            "it died soon after its start {} in a row, so the next one is started in {:?}",
            pluralize(self.throttle.young_deaths() as usize, "time", "times"),
            Duration::from_millis(self.due - now)
        )
    }

    pub(super) fn handle_fresh(&mut self, now: Millis) {
        let (limit, depth) = (self.post.pool.limit, self.post.pool.depth);
        let must_say = self.rules.handshake;
        let Some(fresh) = &mut self.fresh else {
            return;
        };
        // It may send only its ready message, even if none is expected.
        while fresh.wire.has_received() {
            let used = match fresh.wire.frame(limit) {
                DecodedFrame::Whole { body, used } if !fresh.has_spoken => {
                    matches!(program::read(body, depth), Ok(Sent::Ready)).then_some(used)
                }
                // An incomplete message is checked when the program serves.
                DecodedFrame::Partial { .. } => break,
                DecodedFrame::Whole { .. } | DecodedFrame::TooLarge { .. } => None,
            };
            let Some(used) = used else {
                let text = if must_say && !fresh.is_ready {
                    "has sent something other than {\"out\": \"ready\"} at its start"
                } else {
                    "has sent a message before it got a call"
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
            let (pid, since) = (fresh.process.pid(), fresh.since);
            let (what, ended, _) = self.how_it_ended(fresh.process, now);
            let what = format!("{what} before it was ready");
            self.post.pool.count_exit(ProgramExit::Boot);
            self.record_death((pid, since), ended, None, &what);
            self.has_failed(&what, now);
        }
    }
}
