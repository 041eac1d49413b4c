//! What new workers logged before they were ready: kept until the verdict on their generation,
//! which is told with it when it is no.
//!
//! Pure. A worker is never trusted: so many lines of each, so long, and no control characters.

use std::collections::{BTreeMap, VecDeque};

use crate::link::ids::{Pid, Slot};
use crate::logging::printable;

/// The last lines that are kept of each worker, and told of all.
const MOST_LINES: usize = 20;

#[derive(Debug, Default)]
pub struct StartupLog {
    said: BTreeMap<Pid, (Slot, VecDeque<String>)>,
    /// Who ended last, or was made to: most likely the reason of the verdict.
    ended: Option<Pid>,
}

impl StartupLog {
    /// A worker has logged this.
    pub fn push(&mut self, pid: Pid, slot: Slot, line: &[u8]) {
        let (_, lines) = self.said.entry(pid).or_insert((slot, VecDeque::new()));
        if lines.len() == MOST_LINES {
            lines.pop_front();
        }
        lines.push_back(printable(&String::from_utf8_lossy(line)));
    }

    /// A worker has ended, or is being ended.
    pub fn ended(&mut self, pid: Pid) {
        if self.said.contains_key(&pid) {
            self.ended = Some(pid);
        }
    }

    /// Takes all, told as lines that follow a reason: of the one that ended, or of all where it
    /// said nothing. Empty if nobody said anything.
    pub fn take(&mut self) -> String {
        let mut said = std::mem::take(&mut self.said);
        if let Some(ended) = self.ended.take() {
            said.retain(|pid, _| *pid == ended);
        }
        let mut text = String::new();
        let mut left = MOST_LINES;
        for (pid, (slot, lines)) in said {
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
        let mut words = StartupLog::default();
        words.ended(Pid(7));
        assert_eq!(words.take(), "", "it said nothing");
        words.push(Pid(8), Slot(1), b"WARN a neighbour");
        for number in 0..30 {
            words.push(Pid(7), Slot(0), format!("ERROR {number}\x1b").as_bytes());
        }
        words.ended(Pid(7));
        words.ended(Pid(9));
        let text = words.take();
        assert_eq!(text.matches('\n').count(), MOST_LINES);
        assert!(
            text.starts_with("\n  worker 7 (slot 0) logged: ERROR 10\\u{1b}"),
            "{text}"
        );
        assert!(!text.contains("neighbour"), "{text}");
        assert_eq!(words.take(), "");
    }

    #[test]
    fn where_nobody_is_known_to_have_ended_all_are_quoted() {
        let mut words = StartupLog::default();
        words.push(Pid(8), Slot(1), b"WARN one");
        words.push(Pid(7), Slot(0), b"WARN other");
        let text = words.take();
        assert!(
            text.contains("WARN one") && text.contains("WARN other"),
            "{text}"
        );
    }
}
