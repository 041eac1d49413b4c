//! The cells of a pane: their texts, what they are sorted by, and their tones. Pure.

use std::cmp::Ordering;

use super::text::{UNKNOWN, escaped, micros, rate};
use crate::cli::units;
use crate::protocol::control::{OldestCall, WorkerPhase};

/// How good or bad a figure is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tone {
    Plain,
    Good,
    Warn,
    Bad,
}

/// What a cell is sorted by.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum SortKey {
    Number(f64),
    Text(String),
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct PaneCell {
    pub text: String,
    pub key: SortKey,
    pub tone: Tone,
}

/// A row has a cell for each column of its pane.
pub(super) type PaneRow = Vec<PaneCell>;

impl SortKey {
    pub(super) fn compare(&self, other: &Self) -> Ordering {
        match (self, other) {
            (SortKey::Number(one), SortKey::Number(other)) => one.total_cmp(other),
            (SortKey::Text(one), SortKey::Text(other)) => one.cmp(other),
            (SortKey::Number(_), SortKey::Text(_)) => Ordering::Less,
            (SortKey::Text(_), SortKey::Number(_)) => Ordering::Greater,
        }
    }
}

impl PaneCell {
    pub(super) fn toned(mut self, tone: Tone) -> Self {
        self.tone = tone;
        let symbol = match tone {
            Tone::Plain => return self,
            Tone::Good => '●',
            Tone::Warn => '▲',
            Tone::Bad => '✖',
        };
        self.text = format!("{symbol} {}", self.text);
        self
    }

    /// Marks a figure that should be 0.
    pub(super) fn zero_is_good(self, tone: Tone) -> Self {
        match self.key {
            SortKey::Number(number) if number > 0.0 => self.toned(tone),
            _ => self,
        }
    }
}

pub(super) fn text(words: &str) -> PaneCell {
    let text = escaped(words);
    PaneCell {
        key: SortKey::Text(text.clone()),
        text,
        tone: Tone::Plain,
    }
}

pub(super) fn figure(number: f64, text: String) -> PaneCell {
    PaneCell {
        text,
        key: SortKey::Number(number),
        tone: Tone::Plain,
    }
}

pub(super) fn count(number: u64) -> PaneCell {
    figure(number as f64, units::count(number))
}

pub(super) fn per_s(number: f64) -> PaneCell {
    figure(number, rate(number))
}

pub(super) fn time(us: Option<u64>) -> PaneCell {
    figure(us.map_or(-1.0, |us| us as f64), micros(us))
}

pub(super) fn pid(pid: Option<i32>) -> PaneCell {
    let text = pid.map_or_else(|| UNKNOWN.to_owned(), |pid| pid.to_string());
    figure(pid.unwrap_or(-1).into(), text)
}

pub(super) fn state(phase: WorkerPhase) -> PaneCell {
    text(phase.name()).toned(match phase {
        WorkerPhase::Ready => Tone::Good,
        WorkerPhase::Starting | WorkerPhase::Draining => Tone::Warn,
        WorkerPhase::Throttled | WorkerPhase::Dead => Tone::Bad,
    })
}

pub(super) fn oldest(call: Option<&OldestCall>) -> PaneCell {
    let Some(call) = call else {
        return figure(-1.0, UNKNOWN.to_owned());
    };
    let age = units::milliseconds(call.age_ms);
    figure(
        call.age_ms as f64,
        format!("{} {age}", escaped(&call.method)),
    )
}
