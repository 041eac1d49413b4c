//! Keeps what new children log before they are ready, until the start or reload has a result. A failure is
//! reported with these lines.
//!
//! A child is never trusted: the number and length of its lines are limited, and control characters are
//! escaped.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;

use crate::link::ids::{Pid, Slot};
use crate::logging::printable;
use crate::sys::closer::close_in_child;
use crate::sys::rights::{self, GuardedSocket};
use crate::sys::socket;

/// The largest number of lines that are kept for each child, and of lines of a report.
const MOST_LINES: usize = 20;

/// Creates the socket pair for a child's log lines. Returns the master's end and the child's end. Returns none if no
/// start or reload waits for the child.
///
/// # Errors
/// If there is no descriptor.
pub fn channel(is_awaited: bool) -> io::Result<(Option<GuardedSocket>, Option<OwnedFd>)> {
    if !is_awaited {
        return Ok((None, None));
    }
    let (ours, its) = socket::packet_pair()?;
    rights::refuse(&ours);
    Ok((Some(GuardedSocket::new(ours, close_in_child)), Some(its)))
}

#[derive(Debug, Default)]
pub struct StartupLog {
    lines: BTreeMap<Pid, (Slot, VecDeque<String>)>,
    /// Of the children that have logged a line, the one that ended or was killed last. It is most likely the cause of
    /// the failure.
    ended: Option<Pid>,
}

impl StartupLog {
    /// Adds a line of a child.
    pub fn push(&mut self, pid: Pid, slot: Slot, line: &[u8]) {
        let (_, lines) = self.lines.entry(pid).or_insert((slot, VecDeque::new()));
        if lines.len() == MOST_LINES {
            lines.pop_front();
        }
        lines.push_back(printable(&String::from_utf8_lossy(line)));
    }

    /// Remembers that a child has ended, or is being ended.
    pub fn ended(&mut self, pid: Pid) {
        if self.lines.contains_key(&pid) {
            self.ended = Some(pid);
        }
    }

    /// Takes the kept lines, each after a newline. If a child with lines has ended, takes only its lines. Otherwise
    /// takes those of all children in the order of their pids, up to the limit. Returns an empty text if there are
    /// none.
    pub fn take(&mut self) -> String {
        let mut logged = std::mem::take(&mut self.lines);
        if let Some(ended) = self.ended.take() {
            logged.retain(|pid, _| *pid == ended);
        }
        let mut text = String::new();
        let mut left = MOST_LINES;
        for (pid, (slot, lines)) in logged {
            let begin = lines.len().saturating_sub(left);
            left -= lines.len() - begin;
            let role = slot.role();
            for line in lines.range(begin..) {
                text += &format!("\n  {role} {pid} (slot {slot}) logged: {line}");
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_one_that_ended_is_quoted_and_the_last_lines_of_it_alone() {
        let mut log = StartupLog::default();
        log.ended(Pid(7));
        assert_eq!(log.take(), "", "it logged nothing");
        log.push(Pid(8), Slot(1), b"WARN a neighbour");
        for number in 0..30 {
            log.push(Pid(7), Slot(0), format!("ERROR {number}\x1b").as_bytes());
        }
        log.ended(Pid(7));
        log.ended(Pid(9));
        let text = log.take();
        assert_eq!(text.matches('\n').count(), MOST_LINES);
        assert!(
            text.starts_with("\n  worker 7 (slot 0) logged: ERROR 10\\u{1b}"),
            "{text}"
        );
        assert!(!text.contains("neighbour"), "{text}");
        assert_eq!(log.take(), "");
    }

    #[test]
    fn all_are_quoted_if_none_is_known_to_have_ended() {
        let mut log = StartupLog::default();
        log.push(Pid(8), Slot(1), b"WARN one");
        log.push(Pid(7), Slot(0), b"WARN other");
        let text = log.take();
        assert!(
            text.contains("WARN one") && text.contains("WARN other"),
            "{text}"
        );
    }
}
