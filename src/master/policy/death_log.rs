//! The death records: the last 100 deaths, for `status`, and how a death is told in the log.
//!
//! What a worker leaves behind (its last method) was written by a process that crashed: it is cut
//! and cleaned before it goes anywhere. Nothing here can fail.

use std::collections::VecDeque;

use nix::sys::signal::Signal;

use super::event::{Exit, HumanDuration, Millis};
use super::slots::{ChildRecord, WorkerStage};
use crate::link::ids::{Generation, Pid, Slot};

/// So many records are kept.
pub const MAX_DEATH_RECORDS: usize = 100;
/// Longest method name that is kept, in characters.
const LONGEST_METHOD: usize = 128;
/// Longest text of evidence that is kept, in characters.
const LONGEST_TEXT: usize = 4096;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Death {
    /// Where the worker was.
    pub slot: Slot,
    pub pid: Pid,
    /// Which configuration it ran.
    pub generation: Generation,
    /// How it ended.
    pub how: Exit,
    /// From its fork to its end.
    pub uptime: Millis,
    /// The method that it last ran.
    pub method: Option<String>,
    /// Its resident memory when last seen, in bytes.
    pub rss_bytes: u64,
    /// Why, as far as the master knows.
    pub reason: String,
    /// The wall clock, in unix seconds.
    pub at: u64,
}

impl Death {
    /// The death in words, up to what follows from it.
    pub(crate) fn sentence(&self) -> String {
        let Death {
            pid,
            slot,
            how,
            reason,
            ..
        } = self;
        let after = HumanDuration(self.uptime);
        let method = match &self.method {
            Some(method) => format!(", last method {method}"),
            None => String::new(),
        };
        let role = slot.role();
        format!("{role} {pid} (slot {slot}) ended by {how} after {after}: {reason}{method}")
    }

    /// The death as the key=value pairs that end a log line.
    pub(crate) fn log_fields(&self) -> String {
        let mut pairs = format!(
            "slot={} pid={} generation={}",
            self.slot, self.pid, self.generation
        );
        match (self.how, self.how.signal_name()) {
            (Exit::Signal { core_dumped, .. }, Some(name)) => {
                pairs += &format!(" signal={name} core={core_dumped}");
            }
            (Exit::Code(code), _) | (Exit::Signal { number: code, .. }, None) => {
                pairs += &format!(" exit={code}");
            }
        }
        pairs += &format!(" uptime_ms={}", self.uptime);
        if let Some(method) = &self.method {
            pairs += &format!(" method={method}");
        }
        pairs
    }
}

/// The last [`MAX_DEATH_RECORDS`] deaths, oldest first, and how many there were in all.
#[derive(Debug, Clone, Default)]
pub struct Deaths {
    records: VecDeque<Death>,
    total: u64,
}

impl Deaths {
    /// Records, oldest first, of `total` deaths.
    pub(crate) fn of(mut records: VecDeque<Death>, total: u64) -> Self {
        let surplus = records.len().saturating_sub(MAX_DEATH_RECORDS);
        records.drain(..surplus);
        Deaths { records, total }
    }

    /// Keeps one more record, in place of the oldest.
    pub(crate) fn keep(&mut self, death: Death) {
        if self.records.len() == MAX_DEATH_RECORDS {
            self.records.pop_front();
        }
        self.records.push_back(death);
        self.total += 1;
    }

    /// The records, oldest first.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Death> + ExactSizeIterator {
        self.records.iter()
    }

    /// All deaths since the master's start, those included whose record is gone.
    pub fn total(&self) -> u64 {
        self.total
    }
}

/// Why a worker died, as far as the master knows.
pub(crate) fn reason(child: &ChildRecord, how: Exit) -> String {
    match (&child.kill_reason, &child.recycle.evidence) {
        (Some(doom), Some(evidence)) => return format!("{doom}; {evidence}"),
        (Some(reason), None) | (None, Some(reason)) => return reason.clone(),
        (None, None) => {}
    }
    let words = match (child.stage, how) {
        (WorkerStage::Draining { .. }, Exit::Code(_)) => "failed while it drained",
        (WorkerStage::Draining { .. }, how) if how.is_signal(Signal::SIGKILL) => {
            "killed from outside while it drained"
        }
        (WorkerStage::Draining { .. }, _) => "crashed while it drained",
        (WorkerStage::Starting, _) => "died before it was ready",
        (WorkerStage::Ready, Exit::Code(0)) => "left unasked, by a SIGQUIT or by its own exit",
        (WorkerStage::Ready, Exit::Code(_)) => "left unasked",
        (WorkerStage::Ready, how) if how.is_signal(Signal::SIGKILL) => {
            "killed from outside, by hand or by the kernel for want of memory"
        }
        (WorkerStage::Ready, _) => "crashed",
    };
    words.to_owned()
}

/// A method's name as it may stand in a log line.
pub(crate) fn clean(method: &str) -> String {
    method
        .chars()
        .take(LONGEST_METHOD)
        .map(|c| if c.is_control() || c == ' ' { '?' } else { c })
        .collect()
}

/// A text of others' words as it may stand in a log line and be kept.
pub(crate) fn clean_text(text: &str) -> String {
    text.chars()
        .take(LONGEST_TEXT)
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn death(pid: i32) -> Death {
        Death {
            slot: Slot(2),
            pid: Pid(pid),
            generation: Generation(1),
            how: Exit::Signal {
                number: 11,
                core_dumped: true,
            },
            uptime: 3250,
            method: Some(clean("add\n[fake] line")),
            rss_bytes: 1 << 20,
            reason: "crashed".into(),
            at: 1_700_000_000,
        }
    }

    #[test]
    fn a_death_is_told_in_words_and_in_pairs_on_one_line() {
        assert_eq!(
            death(77).sentence(),
            "worker 77 (slot 2) ended by SIGSEGV (core dumped) after 3.2 s: crashed, last method \
             add?[fake]?line"
        );
        assert_eq!(
            death(77).log_fields(),
            "slot=2 pid=77 generation=1 signal=SIGSEGV core=true uptime_ms=3250 \
             method=add?[fake]?line"
        );
    }

    #[test]
    fn the_last_hundred_are_kept_and_all_are_counted() {
        let mut deaths = Deaths::default();
        (0..250).for_each(|pid| deaths.keep(death(pid)));
        assert_eq!(deaths.iter().len(), MAX_DEATH_RECORDS);
        assert_eq!(deaths.iter().next().unwrap().pid, Pid(150));
        assert_eq!(deaths.total(), 250);
    }
}
