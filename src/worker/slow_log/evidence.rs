//! Finds out what a slow call is doing, from /proc. Only the thread of the recorder calls it.
//!
//! The evidence belongs to the call only if the call still runs after the read, in the same process. Otherwise the
//! evidence is dropped, so that a record never names the program of another call. If the kernel refuses a part, the
//! text says so instead.

use std::time::Duration;

use nix::sys::signal::Signal;

use super::record::quoted;
use crate::config::StackSignal;
use crate::handler::CallState;
use crate::handler::command::in_progress::command_of;
use crate::handler::pool::entry::ServingProgram;
use crate::sys::process::Pid;
use crate::sys::process_facts::{self, ProcessFacts, had_begun};
use crate::sys::process_tree::PidFd;

/// The largest number of processes that are named.
const MOST_NAMED: usize = 16;
/// The largest number of bytes of standard error.
const STDERR_END: usize = 1024;

/// The process or thread that runs a slow call.
#[derive(Debug)]
pub enum Target {
    /// A thread of this process; 0: not known.
    Thread(i32),
    /// The command of the call with this number in this process.
    Command(u64),
    /// A program, and the name of its pool.
    Program(ServingProgram, String),
    /// The call has ended already, or its program was taken from it.
    Ended,
    /// The call ran on the event loop and has ended.
    EventLoop,
}

/// What is known of a slow call.
#[derive(Debug, PartialEq, Eq)]
pub struct Evidence {
    pub text: String,
    /// The thread whose system call the kernel did not show to this process; 0 if there is none.
    pub refused_thread: i32,
}

impl From<String> for Evidence {
    fn from(text: String) -> Self {
        Evidence {
            text,
            refused_thread: 0,
        }
    }
}

const ENDED: &str = "it ended before it was looked at";

/// Looks at a call that was found running at the time `seen` (CLOCK_MONOTONIC) and had begun at `began_ns`.
pub fn look(target: &Target, state: &CallState, (seen, began_ns): (Duration, u64)) -> Evidence {
    let is_over = || state.begun_ns() != Some(began_ns);
    let (evidence, stack) = match target {
        Target::Ended => return ENDED.to_owned().into(),
        Target::EventLoop => return "held the event loop".to_owned().into(),
        _ if is_over() => return ENDED.to_owned().into(),
        Target::Thread(thread) => (of_thread(*thread), None),
        Target::Command(number) => match command_of(*number, STDERR_END) {
            Some((pid, stderr)) => {
                let text = of_processes("command", pid, seen).map(|text| match stderr.is_empty() {
                    true => text,
                    false => format!("{text}; stderr {}", quoted(&stderr)),
                });
                (text.unwrap_or_else(|| ENDED.into()).into(), None)
            }
            None => ("its command is not started".to_owned().into(), None),
        },
        Target::Program(program, pool) => {
            // Opened before it is known to be the right one, so the signal cannot hit another process.
            let pidfd = PidFd::open(program.pid);
            let text = of_processes(&format!("pool {pool} program"), program.pid, seen);
            let stack = pidfd.zip(program.stack_signal).filter(|_| text.is_some());
            (text.unwrap_or_else(|| ENDED.into()).into(), stack)
        }
    };
    if is_over() {
        return ENDED.to_owned().into();
    }
    let Some((pidfd, signal)) = stack else {
        return evidence;
    };
    pidfd.signal(match signal {
        StackSignal::Usr1 => Signal::SIGUSR1,
        StackSignal::Usr2 => Signal::SIGUSR2,
    });
    format!("{}; it got SIG{}", evidence.text, signal.name()).into()
}

fn of_thread(thread: i32) -> Evidence {
    match process_facts::of_thread(Pid::current(), Pid(thread)) {
        Some((text, is_refused)) => Evidence {
            text,
            refused_thread: if is_refused { thread } else { 0 },
        },
        None => "its thread cannot be read".to_owned().into(),
    }
}

/// Describes the process `root` of a call, and what descends from it; `None` if that process is gone.
fn of_processes(label: &str, root: Pid, seen: Duration) -> Option<String> {
    let me = Pid::current();
    let first = process_facts::look(root).filter(|it| had_begun(it.started, seen))?;
    let tree = process_facts::tree(root, me);
    let is_of_tree = |it: &ProcessFacts| tree.contains(&it.parent) || it.parent == me;
    let others = tree.iter().filter(|pid| **pid != root);
    let others = others.filter_map(|pid| process_facts::look(*pid));
    let others: Vec<ProcessFacts> = others.filter(is_of_tree).collect();
    // Its pid may have been reused meanwhile.
    process_facts::look(root).filter(|it| it.started == first.started)?;
    let mut text = format!("{label} {first}");
    for other in others.iter().take(MOST_NAMED - 1) {
        text += &format!("; {other}");
    }
    if others.len() >= MOST_NAMED {
        text += &format!("; {} more", others.len() + 1 - MOST_NAMED);
    }
    Some(text)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::sys::process::monotonic;

    fn running() -> CallState {
        let state = CallState::default();
        assert!(state.begin());
        state.set_begun(Duration::from_nanos(7));
        state
    }

    #[test]
    fn a_call_that_has_ended_meanwhile_has_no_evidence() {
        let (state, seen) = (running(), monotonic());
        let thread = Target::Thread(nix::unistd::gettid().as_raw());
        let text = look(&thread, &state, (seen, 7)).text;
        assert!(text.starts_with("thread "), "{text}");
        assert_eq!(look(&thread, &state, (seen, 8)).text, ENDED);
        state.set_ended();
        assert_eq!(look(&thread, &state, (seen, 7)).text, ENDED);
    }

    #[test]
    fn a_process_that_began_later_has_only_the_same_pid() {
        let me = Pid::current();
        let text = of_processes("command", me, monotonic()).unwrap();
        assert!(
            text.starts_with("command ") && text.contains(&me.to_string()),
            "{text}"
        );
        assert_eq!(of_processes("command", me, Duration::ZERO), None);
        assert_eq!(of_processes("command", Pid(-1), monotonic()), None);
    }
}
