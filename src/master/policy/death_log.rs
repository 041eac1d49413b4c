//! Keeps the death records of the last 100 deaths of each kind, and finds out why a child died.
//!
//! The name of the last method was written by a process that crashed, so it is not trusted. It is shortened, and
//! control characters are replaced by `?`. Nothing here can fail.

use std::collections::VecDeque;

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::event::{Exit, Millis};
use super::slots::{ChildRecord, KillReason, WorkerStage};
use crate::link::ids::{Generation, Pid, Slot};
use crate::protocol::call_id::CallId;
use crate::protocol::control::DeathKind;

/// The largest number of records that are kept of each kind. Each kind has its own limit, so that programs that often
/// die do not displace the records of workers.
pub const MAX_DEATH_RECORDS: usize = 100;
/// The exit code of a child that could not start (EX_OSERR, sysexits(3head)), and of a child with a bug
/// (EX_SOFTWARE).
const CANT_START: i32 = 71;
const BUG: i32 = 70;
/// The longest method name that is kept, in characters.
const LONGEST_METHOD: usize = 128;
/// The largest number of lines of a reason.
const MAX_LINES: usize = 21;
/// The longest text of evidence that is kept, in characters.
const LONGEST_TEXT: usize = 4096;

/// A death. It crosses an upgrade.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Death {
    #[serde(default)]
    pub kind: DeathKind,
    /// The name of the pool, for a pool process or a program; the address of the listener, for an acceptor; the
    /// address of the client, for a session.
    #[serde(default)]
    pub name: Option<String>,
    /// The slot of the child; for a program, the slot of its pool process.
    pub slot: Slot,
    pub pid: Pid,
    pub generation: Generation,
    #[serde(flatten, with = "exit_members")]
    pub how: Exit,
    /// The time from its fork to its end.
    pub uptime: Millis,
    /// The last method that it ran.
    pub method: Option<String>,
    /// The call of that method.
    #[serde(default)]
    pub call: Option<CallId>,
    /// The job if that method ran as an attempt.
    #[serde(default)]
    pub job: Option<String>,
    /// The highest resident memory that it had, in bytes; 0 if it is not known.
    pub rss_bytes: u64,
    pub reason: DeathReason,
    /// Seconds since 1970.
    pub at: u64,
}

/// An exit as two members, of which one is set.
mod exit_members {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::Exit;

    #[derive(Serialize, Deserialize)]
    struct ExitMembers {
        exit: Option<i32>,
        /// The number of the signal, and whether a core was dumped.
        signal: Option<(i32, bool)>,
    }

    pub fn serialize<S: Serializer>(how: &Exit, to: S) -> Result<S::Ok, S::Error> {
        let (exit, signal) = match *how {
            Exit::Code(code) => (Some(code), None),
            Exit::Signal {
                number,
                core_dumped,
            } => (None, Some((number, core_dumped))),
        };
        ExitMembers { exit, signal }.serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Exit, D::Error> {
        let ExitMembers { exit, signal } = ExitMembers::deserialize(from)?;
        Ok(match signal {
            Some((number, core_dumped)) => Exit::Signal {
                number,
                core_dumped,
            },
            None => Exit::Code(exit.unwrap_or_default()),
        })
    }
}

/// How a worker ended, for the counters of the metrics. The order is that of their labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkerExit {
    /// It exited as ordered by a reload, a stop or a scale.
    Ordered,
    /// It was recycled: it exited as ordered, after its successor was ready.
    Recycled,
    /// It exited without an order.
    Exit,
    Signal,
    OutOfMemory,
    Stuck,
    /// It did not become ready.
    Boot,
}

/// Why a child died, as far as the master knows. It crosses an upgrade as text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", from = "String")]
pub enum DeathReason {
    /// The master ended it. The text says what it was stuck in, if that is known.
    Killed(KillReason, Option<String>),
    /// It exited with code 0 while it drained, as ordered.
    Drained,
    /// It exited with a code other than 0 while it drained.
    DrainFailed,
    /// Another process sent it SIGKILL while it drained.
    DrainKilled,
    DrainCrashed,
    NotReady,
    /// It exited with code 0 without an order.
    LeftByQuit,
    /// It exited with another code without an order.
    Left,
    /// Another process or the kernel sent it SIGKILL.
    KilledFromOutside,
    Crashed,
    Text(String),
}

/// The last [`MAX_DEATH_RECORDS`] deaths of each kind, in the order in which the master learned of them,
/// and the number of all deaths.
#[derive(Debug, Clone, Default)]
pub struct Deaths {
    records: VecDeque<Death>,
    total: u64,
}

impl Deaths {
    /// Makes a log of these records, oldest first. `total` is the number of all deaths.
    pub(crate) fn of(records: impl Iterator<Item = Death>, total: u64) -> Self {
        let mut deaths = Deaths::default();
        records.for_each(|death| deaths.keep(death));
        Deaths { total, ..deaths }
    }

    /// Adds a record. If there are too many of its kind, it replaces the oldest of them.
    pub(crate) fn keep(&mut self, death: Death) {
        let is_same = |other: &Death| other.kind == death.kind;
        if self.records.iter().filter(|it| is_same(it)).count() == MAX_DEATH_RECORDS
            && let Some(oldest) = self.records.iter().position(is_same)
        {
            self.records.remove(oldest);
        }
        self.records.push_back(death);
        self.total += 1;
    }

    /// Returns the records, oldest first.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Death> + ExactSizeIterator {
        self.records.iter()
    }

    /// Returns the number of deaths since the master's start, including those without a record.
    pub fn total(&self) -> u64 {
        self.total
    }
}

/// Returns why a child died.
pub(crate) fn reason(child: &ChildRecord, how: Exit) -> DeathReason {
    match (&child.kill_reason, &child.recycle.evidence) {
        (Some(reason), evidence) => DeathReason::Killed(reason.clone(), evidence.clone()),
        (None, Some(evidence)) => DeathReason::Text(evidence.clone()),
        (None, None) => match (child.stage, how) {
            (WorkerStage::Draining { .. }, Exit::Code(0)) => DeathReason::Drained,
            (WorkerStage::Draining { .. }, Exit::Code(_)) => DeathReason::DrainFailed,
            (WorkerStage::Draining { .. }, how) if how.is_signal(Signal::SIGKILL) => {
                DeathReason::DrainKilled
            }
            (WorkerStage::Draining { .. }, _) => DeathReason::DrainCrashed,
            (WorkerStage::Starting, _) => DeathReason::NotReady,
            (WorkerStage::Ready, Exit::Code(0)) => DeathReason::LeftByQuit,
            (WorkerStage::Ready, Exit::Code(_)) => DeathReason::Left,
            (WorkerStage::Ready, how) if how.is_signal(Signal::SIGKILL) => {
                DeathReason::KilledFromOutside
            }
            (WorkerStage::Ready, _) => DeathReason::Crashed,
        },
    }
}

/// Makes a method name fit for a log line: shortened, with `?` for control characters and spaces.
pub(crate) fn clean(method: &str) -> String {
    method
        .chars()
        .take(LONGEST_METHOD)
        .map(|c| if c.is_control() || c == ' ' { '?' } else { c })
        .collect()
}

/// Returns why a session died. `has_client` is false for a process that waited for a connection.
pub(crate) fn session_reason(
    how: Exit,
    killed_for: Option<KillReason>,
    has_client: bool,
) -> DeathReason {
    let is_killed = how.is_signal(Signal::SIGKILL);
    match (killed_for.filter(|_| is_killed), how) {
        (Some(reason), _) => DeathReason::Killed(reason, None),
        (None, Exit::Code(CANT_START)) => DeathReason::Text("could not start, as logged".into()),
        (None, Exit::Code(BUG)) => DeathReason::Text("a bug ended it, as logged".into()),
        (None, Exit::Code(_)) => DeathReason::Left,
        (None, _) if is_killed => DeathReason::KilledFromOutside,
        (None, _) if has_client => DeathReason::Crashed,
        (None, _) => DeathReason::Text("crashed while it waited for a connection".into()),
    }
}

/// Makes a text from another process fit for a log line: shortened, with `?` for control characters.
pub(crate) fn clean_text(text: &str) -> String {
    text.chars()
        .take(LONGEST_TEXT)
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

/// Makes a text of several lines from another process fit for the log: at most `MAX_LINES` lines, each cleaned by
/// `clean_text`.
pub(crate) fn clean_lines(text: &str) -> String {
    let lines = text.lines().take(MAX_LINES).map(clean_text);
    lines.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn death(pid: i32) -> Death {
        Death {
            kind: DeathKind::Worker,
            name: None,
            slot: Slot(2),
            pid: Pid(pid),
            generation: Generation(1),
            how: Exit::Signal {
                number: 11,
                core_dumped: true,
            },
            uptime: 3250,
            method: Some(clean("add\n[fake] line")),
            call: None,
            job: None,
            rss_bytes: 1 << 20,
            reason: DeathReason::Crashed,
            at: 1_700_000_000,
        }
    }

    #[test]
    fn the_last_hundred_are_kept_and_all_are_counted() {
        let mut deaths = Deaths::default();
        (0..250).for_each(|pid| deaths.keep(death(pid)));
        assert_eq!(deaths.iter().len(), MAX_DEATH_RECORDS);
        assert_eq!(deaths.iter().next().unwrap().pid, Pid(150));
        assert_eq!(deaths.total(), 250);
        let of_program = |pid| Death {
            kind: DeathKind::Program,
            ..death(pid)
        };
        (0..250).for_each(|pid| deaths.keep(of_program(pid)));
        let pids: Vec<i32> = deaths.iter().map(|death| death.pid.0).collect();
        let kept: Vec<i32> = (150..250).chain(150..250).collect();
        assert_eq!(pids, kept, "a crash loop of programs pushes out no worker");
    }

    #[test]
    fn the_death_of_a_session_has_a_reason_in_words() {
        let of =
            |how, killed_for, has_client| String::from(session_reason(how, killed_for, has_client));
        let kill = Exit::Signal {
            number: 9,
            core_dumped: false,
        };
        let stuck = KillReason::EventLoopStuck {
            silent: 3_000,
            is_draining: false,
        };
        assert_eq!(
            of(kill, Some(stuck.clone()), true),
            "event loop stuck for 3 s"
        );
        assert!(of(kill, None, true).starts_with("killed from outside"));
        assert_eq!(
            of(Exit::Code(3), Some(stuck), true),
            "exited without an order"
        );
        assert_eq!(of(death(1).how, None, true), "crashed");
        assert!(of(death(1).how, None, false).contains("waited for a connection"));
        assert!(of(Exit::Code(71), None, false).contains("could not start"));
    }
}
