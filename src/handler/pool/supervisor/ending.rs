//! Ends a program of a pool, and decides what happens to its calls.
//!
//! A call that the program has read is answered with `crashed`. A call that the program has not read goes to another
//! program. The kernel's count of unread bytes tells which calls these are. The wait for an end is limited to the
//! time that a process needs to die.

use std::sync::Arc;

use log::Level;
use nix::sys::signal::Signal;

use super::{Absence, EXIT_GRACE, Leaver, Phase, ProgramSupervisor};
use crate::config::StackSignal;
use crate::handler::job_attempt::{JobAttempt, ProgramEnd};
use crate::handler::pool::definition::ProgramExit;
use crate::handler::pool::dispatcher::SupervisorEvent;
use crate::handler::pool::entry::{EndCause, Entry, Recall};
use crate::handler::pool::parallel::ParallelCalls;
use crate::handler::pool::process::Process;
use crate::handler::pool::program_connection::ProgramConnection;
use crate::handler::pool::program_deaths::ProgramDeath;
use crate::handler::pool::program_record::ProgramState;
use crate::protocol::call_id::CallId;
use crate::protocol::code::Code;
use crate::protocol::rpc_error::RpcError;
use crate::sys::memory::oom_kill_count;
use crate::sys::process::{Exit, Pid, ReapedChild, monotonic_ms, unix_seconds};
use crate::throttle::Millis;

/// Returns whether another process has ended it, and not a fault of its own.
fn is_from_outside(child: ReapedChild) -> bool {
    let signals = [
        Signal::SIGKILL,
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGHUP,
    ];
    (signals.iter()).any(|signal| child.exit.is_signal(*signal))
}

impl ProgramSupervisor {
    /// Logs that a program is replaced.
    pub(super) fn log_replacement(&mut self, pid: Pid, key: &str, now: Millis) {
        let level = self.level_of_end(now);
        let name = &self.post.pool.name;
        log::log!(
            level,
            "pool {name} [{pid}]: the program is replaced, because it has reached {key}"
        );
    }

    /// Returns the level of a line about an end that callers can cause again and again.
    fn level_of_end(&mut self, now: Millis) -> Level {
        match self.kills.admit(now) {
            Some(_) => Level::Info,
            None => Level::Debug,
        }
    }

    /// Ends a process that has closed its socket or must go. Returns how it ended, as a text and as a
    /// status, and whether it ended by itself.
    pub(super) fn how_it_ended(
        &self,
        mut process: Process,
        now: Millis,
    ) -> (String, Option<ReapedChild>, bool) {
        // At an exit, descriptors are closed before the exit can be seen.
        let by_itself = process.ends_soon();
        let ended = process.end(now);
        let what = match ended.map(|child| child.exit) {
            _ if !by_itself => "has closed its descriptor 3 and was killed".into(),
            Some(Exit::Code(code)) => format!("has exited with exit code {code}"),
            Some(exit) => {
                let signal = self.post.pool.settings.stack_signal.map(StackSignal::name);
                let is_own =
                    signal.is_some_and(|name| exit.signal_name() == Some(format!("SIG{name}")));
                let hint = match is_own {
                    true => ", the stack-signal of its pool, which it must handle",
                    false => "",
                };
                format!("was ended by {exit}{hint}")
            }
            None => "did not exit after SIGKILL".into(),
        };
        (what, ended, by_itself)
    }

    /// Records an unexpected death of a program that was started at `since`. `ended` is `None` if it was
    /// killed and hangs in the kernel.
    pub(super) fn record_death(
        &self,
        (pid, since): (Pid, Millis),
        ended: Option<ReapedChild>,
        running: Option<(usize, CallId, u128)>,
        reason: &str,
    ) {
        let killed = Exit::Signal {
            number: Signal::SIGKILL as i32,
            core_dumped: false,
        };
        self.post.pool.add_death(&ProgramDeath {
            pid,
            exit: ended.map_or(killed, |child| child.exit),
            uptime_ms: monotonic_ms().saturating_sub(since),
            method: running.map(|(method, ..)| method),
            call: running.map(|(_, call, _)| call),
            job: running.map_or(0, |(.., job)| job),
            rss_bytes: ended.map_or(0, |child| child.peak_rss_bytes),
            reason: reason.to_owned(),
            at: unix_seconds(),
        });
    }

    /// Ends the serving program. Answers its calls, or lets them wait for another program.
    pub(super) fn end_serving(
        &mut self,
        connection: ProgramConnection,
        why: &EndCause,
        now: Millis,
    ) {
        let serving = self.serving.take();
        let serving = serving.expect("only a program that serves is ended so");
        if self.post.pool.is_of_connection() {
            self.phase = self.phase.max(Phase::Leaving);
        }
        let (running, next) = (connection.running, connection.next);
        let parallel = connection.parallel.into_iter();
        let parallel: Vec<Entry> = parallel.flat_map(ParallelCalls::into_running).collect();
        let pool = Arc::clone(&self.post.pool);
        let name = &pool.name;
        let pid = serving.process.pid();
        let health = serving.usage.health(now);
        let oom_kills = serving.process.oom_kills;
        let (what, ended, by_itself) = match why {
            EndCause::Died => self.how_it_ended(serving.process, now),
            EndCause::Broken(problem) => (
                format!("was killed, because it sent no valid answer: {problem}"),
                serving.process.end(now),
                false,
            ),
            EndCause::GivenUp | EndCause::Leaving => {
                (String::new(), serving.process.end(now), false)
            }
        };
        pool.count_exit(match (why, ended.map(|child| child.exit)) {
            (EndCause::Leaving, _) => ProgramExit::Ordered,
            (EndCause::GivenUp, _) => ProgramExit::Timeout,
            (EndCause::Broken(_), _) => ProgramExit::Protocol,
            (EndCause::Died, Some(Exit::Code(_))) => ProgramExit::Exit,
            (EndCause::Died, _) => ProgramExit::Signal,
        });
        // If we have killed it, SIGKILL says nothing about the cause.
        let is_killed = by_itself && ended.is_some_and(is_from_outside);
        let is_sigkill = ended.is_some_and(|child| child.exit.is_signal(Signal::SIGKILL));
        // The OOM killer may have killed other processes meanwhile, so this is not certain.
        let is_out_of_memory =
            is_killed && is_sigkill && oom_kills.is_some() && oom_kills < oom_kill_count();
        let end = match why {
            EndCause::Died if is_out_of_memory => ProgramEnd::SharedFault,
            EndCause::Died if is_killed => ProgramEnd::Killed,
            EndCause::Died | EndCause::Broken(_) if parallel.len() > 1 => ProgramEnd::SharedFault,
            EndCause::Died => ProgramEnd::Fault,
            EndCause::Broken(_) => ProgramEnd::None,
            // If an attempt was given up, its own state says why it has ended.
            EndCause::GivenUp | EndCause::Leaving => ProgramEnd::Other,
        };
        for entry in running.iter().chain(&parallel) {
            if let Some(attempt) = &entry.call.state.identity().attempt {
                attempt.set_program_end(end);
            }
        }
        let left_unread = connection.wire.was_left_unread();
        let last = running.iter().chain(&parallel).next();
        let last = last.map(|Entry { call, .. }| {
            let identity = call.state.identity();
            let job = identity.attempt.as_deref().map_or(0, JobAttempt::bits);
            (call.method, identity.id(), job)
        });
        let method = last.map(|(method, ..)| method);
        let is_attempt = last.is_some_and(|(.., job)| job != 0);
        let told = match &*what {
            "" if is_attempt => "was killed: the attempt of a job was given up",
            "" => "was killed: its caller had left, or its timeout was over",
            what => what,
        };
        if *why != EndCause::Leaving {
            self.record_death((pid, serving.since), ended, last, told);
        }
        for entry in parallel {
            let error = match why {
                EndCause::Leaving => RpcError::of(Code::Stopping, "its process exits", true),
                // One of several calls has caused it, but it is not known which.
                EndCause::Died | EndCause::Broken(_) | EndCause::GivenUp => {
                    let text = format!("the program of the pool {name} that ran it {told}");
                    RpcError::of(Code::Crashed, text, true)
                }
            };
            self.answer_or_repeat(entry, false, error);
        }
        // The call that was written last is the one that was not read.
        let unread_running = left_unread && next.is_none();
        if let Some(entry) = running {
            let error = match why {
                EndCause::GivenUp => RpcError::of(Code::Cancelled, "the call was abandoned", true),
                EndCause::Leaving => RpcError::of(Code::Stopping, "its process exits", true),
                EndCause::Broken(problem) => {
                    let text = format!("the program of the pool {name} sent no answer: {problem}");
                    RpcError::of(Code::BadOutput, text, true)
                }
                EndCause::Died => {
                    let text = format!("the program of the pool {name} that ran it {what}");
                    RpcError::of(Code::Crashed, text, !unread_running)
                }
            };
            self.answer_or_repeat(entry, unread_running && *why == EndCause::Died, error);
        }
        if let Some(entry) = next {
            let text = format!(
                "the program of the pool {name} had just received this call when it ended with its previous call"
            );
            let error = RpcError::of(Code::Crashed, text, !left_unread);
            self.answer_or_repeat(entry, left_unread, error);
        }
        if what.is_empty() {
            let registry = &self.post.registry;
            if method.is_some_and(|method| registry.methods()[method].kills_abandoned) {
                // Without this delay, clients could have all programs killed again and again.
                self.due = self.throttle.death(Some(health), &self.rules.throttle, now);
                self.last_end = "was killed for an abandoned call".to_owned();
            }
            // The program is not to blame: a caller gave up, or an operator set a limit.
            let level = self.level_of_end(now);
            let method = method.map_or("a call", |method| self.post.registry.name(method));
            log::log!(
                level,
                "pool {name} [{pid}]: the program was killed while it ran {method}: its caller had left, or its \
                 timeout was over"
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

    /// Lets a call that has not begun wait for another program, but only once, because it may be the reason why
    /// programs die.
    fn answer_or_repeat(&self, entry: Entry, unbegun: bool, error: RpcError) {
        if !unbegun || entry.returned {
            self.post.reports.send(entry.done(Some(Err(error)), None));
        } else if entry.call.state.wait_again() {
            self.report(SupervisorEvent::Again(entry.call));
        } else {
            self.post.reports.send(entry.done(None, None));
        }
    }

    /// Ends the supervisor when its program has no call. Returns false when it is done.
    pub(super) fn finish(&mut self, now: Millis) -> bool {
        self.recall(Recall::Successor);
        if let Some(fresh) = self.fresh.take() {
            self.dismiss(fresh.process, ProgramExit::Ordered, (EXIT_GRACE, now));
        }
        self.processes().next().is_some()
    }

    /// Marks that nothing is left.
    pub(super) fn is_gone(&mut self) {
        self.release_room();
        if let Some(record) = self.post.pool.record(self.post.number) {
            record.show(0, ProgramState::Vacant, 0);
        }
        self.report(SupervisorEvent::Gone);
    }

    /// Lets the program that served exit. Its socket was closed, which is the order to exit.
    pub(super) fn retire(&mut self, now: Millis) {
        if let Some(serving) = self.serving.take() {
            self.throttle
                .record_ready_time(Some(serving.usage.health(now)));
            let exit = match () {
                () if self.absence == Absence::Asleep => ProgramExit::Idle,
                // In `Resting` too: a process that leaves takes its programs back before it ends them.
                () if self.phase >= Phase::Resting => ProgramExit::Ordered,
                () => ProgramExit::Recycled,
            };
            self.dismiss(serving.process, exit, (EXIT_GRACE, now));
        }
    }

    /// Lets a program exit whose socket is closed: it gets SIGTERM after `grace`, and SIGKILL after the
    /// same time again.
    pub(super) fn dismiss(
        &mut self,
        process: Process,
        exit: ProgramExit,
        (grace, now): (Millis, Millis),
    ) {
        self.post.pool.count_exit(exit);
        // At most two programs exit at a time: the oldest one is killed when a third one must exit.
        if self.leavers.len() > 1 {
            self.leavers.remove(0).process.end(now);
        }
        self.leavers.push(Leaver {
            process,
            terminate_at: now + grace,
            kill_at: now + 2 * grace,
        });
    }

    /// Lets all programs exit and starts no more, because the process exits.
    pub(super) fn leave(&mut self, grace: Millis, now: Millis) {
        if let Some(fresh) = self.fresh.take() {
            self.dismiss(fresh.process, ProgramExit::Ordered, (grace, now));
        }
        // The event loop has not read yet that this program is ready, and drops it.
        if let Some(serving) = self.serving.take() {
            self.dismiss(serving.process, ProgramExit::Ordered, (grace, now));
        }
        for leaver in &mut self.leavers {
            leaver.kill_at = leaver.kill_at.min(now + 2 * grace);
            if leaver.terminate_at > 0 {
                leaver.terminate_at = leaver.terminate_at.min(now + grace);
            }
        }
    }
}
