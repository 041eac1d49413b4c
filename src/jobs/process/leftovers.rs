//! Waits for processes that may still run attempts of an instance that has ended, and kills them if they take too long.
//!
//! The store names the pid and the start time of each command and program that runs an attempt. Before such a process
//! is gone, no other attempt of its job may begin.

use nix::sys::signal::{self, Signal};

use crate::jobs::record::ProcessMark;
use crate::logging::{HumanDuration, pluralize};
use crate::sys::process::Pid;
use crate::sys::process_tree;

/// How long these processes may take to end, in milliseconds. Then they are killed.
const PATIENCE_MS: u64 = 5_000;

/// How often the log names those that still live.
const REPORT_MS: u64 = 60_000;

/// The processes of an earlier instance.
#[derive(Debug, Default)]
pub struct Leftovers {
    /// Since when they are awaited, in milliseconds.
    since_ms: Option<u64>,
    /// When the log says next that they are killed, in milliseconds.
    report_ms: u64,
}

impl Leftovers {
    /// Returns whether all of these processes are gone. Call it again until then. `now_ms` is CLOCK_MONOTONIC.
    pub fn are_gone(&mut self, marks: Vec<ProcessMark>, now_ms: u64) -> bool {
        let living: Vec<ProcessMark> = marks.into_iter().filter(is_living).collect();
        if living.is_empty() {
            self.since_ms = None;
            return true;
        }
        if self.since_ms.is_none() {
            log::info!(
                "job store: {} of a server that was killed; they get SIGKILL in {}",
                pluralize(
                    living.len(),
                    "process runs an attempt",
                    "processes run attempts"
                ),
                HumanDuration(PATIENCE_MS)
            );
        }
        let since_ms = *self.since_ms.get_or_insert(now_ms);
        if now_ms.saturating_sub(since_ms) >= PATIENCE_MS {
            let is_said = now_ms < self.report_ms;
            if !is_said {
                self.report_ms = now_ms + REPORT_MS;
            }
            for mark in living {
                kill(mark.pid, is_said);
            }
        }
        false
    }
}

/// Kills a process, and says so unless `is_said`. One of another user cannot be killed.
fn kill(pid: i32, is_said: bool) {
    let done = signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
    match done {
        _ if is_said => {}
        Ok(()) => log::warn!(
            "job store: process {pid} runs an attempt of a server that was killed, and gets SIGKILL"
        ),
        Err(error) => log::warn!(
            "job store: process {pid} runs an attempt of a server that was killed, and cannot be killed: {error}; the \
             store stays closed until it ends; end it"
        ),
    }
}

/// Returns whether the process with this mark still runs.
fn is_living(mark: &ProcessMark) -> bool {
    process_tree::living_since(Pid(mark.pid)) == Some(mark.start_time)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_is_killed_after_five_seconds_and_a_later_one_with_its_pid_is_not() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id() as i32;
        let start_time = process_tree::start_ticks(Pid(pid)).unwrap();
        let marks = |start_time| vec![ProcessMark { pid, start_time }];
        let mut left = Leftovers::default();
        assert!(
            left.are_gone(marks(start_time + 1), 0),
            "it is another process"
        );
        assert!(left.are_gone(Vec::new(), 0));
        assert!(!left.are_gone(marks(start_time), 1_000));
        assert!(!left.are_gone(marks(start_time), 1_000 + PATIENCE_MS - 1));
        assert_eq!(child.try_wait().unwrap(), None);
        assert!(!left.are_gone(marks(start_time), 1_000 + PATIENCE_MS));
        child.wait().unwrap();
        assert!(left.are_gone(marks(start_time), 1_000 + PATIENCE_MS));
    }
}
