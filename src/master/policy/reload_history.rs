//! Remembers the results of reloads: the last one, and a list for `status`. Pure.
//!
//! The history is passed on at an upgrade. The reload that completes an upgrade is part of it. A master of an older
//! version passes on only the last result.

use std::collections::VecDeque;

use super::event::Millis;
use crate::link::ids::Generation;
use crate::protocol::control::{LastReload, ReloadStatus};

/// The largest number of results that are kept.
const KEPT: usize = 20;

#[derive(Debug, Default)]
pub struct ReloadHistory {
    last: Option<LastReload>,
    /// The newest is last.
    all: VecDeque<ReloadStatus>,
    /// When the reload under way began.
    begun: Option<Millis>,
}

impl ReloadHistory {
    /// Creates the history that the program before an upgrade has passed on.
    pub fn new(last: Option<LastReload>, all: Vec<ReloadStatus>) -> Self {
        let mut all = VecDeque::from(all);
        all.drain(..all.len().saturating_sub(KEPT));
        ReloadHistory {
            last,
            all,
            begun: None,
        }
    }

    /// Records that a reload begins.
    pub fn begin(&mut self, now: Millis) {
        self.begun = Some(now);
    }

    /// Records the result of the reload. `generation` is the one that serves now, `error` is the reason of a failure,
    /// and `at` is in seconds since 1970.
    pub fn end(&mut self, generation: Generation, error: Option<String>, now: Millis, at: u64) {
        let begun = self.begun.take().unwrap_or(now);
        self.last = Some(LastReload {
            ok: error.is_none(),
            at,
            error: error.clone(),
        });
        self.all.push_back(ReloadStatus {
            generation: generation.0,
            ok: error.is_none(),
            at,
            took_ms: now.saturating_sub(begun),
            error,
        });
        if self.all.len() > KEPT {
            self.all.pop_front();
        }
    }

    /// Returns the last result; `None` if there was no reload.
    pub fn last(&self) -> Option<&LastReload> {
        self.last.as_ref()
    }

    /// Returns all results that are kept; the newest is last.
    pub fn all(&self) -> Vec<ReloadStatus> {
        self.all.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_last_20_results_are_kept_also_across_an_upgrade() {
        let mut history = ReloadHistory::default();
        assert_eq!((history.last(), history.all().len()), (None, 0));
        for number in 2..27 {
            history.begin(u64::from(number) * 1_000);
            let error = (number == 26).then(|| "refused".to_owned());
            history.end(Generation(number), error, u64::from(number) * 1_000 + 7, 50);
        }
        let crossed = ReloadHistory::new(history.last().cloned(), history.all());
        let all = crossed.all();
        assert_eq!((all.len(), all[0].generation, all[0].took_ms), (20, 7, 7));
        let last = all.last().unwrap();
        assert_eq!((last.generation, last.ok), (26, false));
        assert_eq!(crossed.last().unwrap().error.as_deref(), Some("refused"));
    }

    #[test]
    fn a_reload_that_could_not_begin_took_no_time() {
        let mut history = ReloadHistory::default();
        history.end(Generation(1), Some("no".into()), 5_000, 50);
        assert_eq!(history.all()[0].took_ms, 0);
    }
}
