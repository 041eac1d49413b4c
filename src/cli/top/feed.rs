//! Gets the figures of a running server for `top`: asks its master without waiting, and reads its metrics board.
//!
//! The figures come from the code of the status page. If the master does not answer within 1 s, the figures that only
//! the master knows stay as they were, and their age is shown.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use crate::cli::args::ServerSelector;
use crate::cli::control;
use crate::cli::metrics::{self, Observed};
use crate::config::ObserveConfig;
use crate::error::{Error, Result};
use crate::observe::content::{Content, Figures, Now};
use crate::observe::master_facts::{MasterFacts, Readiness};
use crate::observe::routes::Route;
use crate::sys::process::{monotonic_ms, unix_time};

/// After this time without an answer, it is checked whether there still is a server. Milliseconds.
const SILENT_MS: u64 = 3_000;

pub(super) struct Feed {
    place: ServerSelector,
    content: Content,
    /// Whether an answer is wanted that has not come.
    is_waiting: bool,
}

pub(super) fn now() -> Now {
    Now {
        ms: monotonic_ms(),
        unix: unix_time(),
    }
}

impl Feed {
    /// Finds the server. Returns a warning too if its board cannot be read.
    pub(super) fn open(
        place: ServerSelector,
        interval: Duration,
    ) -> Result<(Self, Option<String>)> {
        let control_socket = control::locate(&place)?;
        let Observed { answered, board } = metrics::observe(&place)?;
        let (board, warning) = match board {
            Ok(board) => (Some(board), None),
            Err(warning) => (None, Some(warning)),
        };
        let facts = MasterFacts::at(control_socket);
        let board = metrics::board_source(place.clone(), &answered.status.master, board);
        let mut content = Content::new(facts, board, ObserveConfig::default());
        content.set_interval(interval);
        let feed = Feed {
            place,
            content,
            is_waiting: false,
        };
        Ok((feed, warning))
    }

    pub(super) fn set_interval(&mut self, interval: Duration) {
        self.content.set_interval(interval);
    }

    /// Begins a reading, which waits for the master.
    pub(super) fn begin(&mut self) {
        self.is_waiting = true;
    }

    /// To be polled for input, until `deadline_ms`.
    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.content.facts.descriptor()
    }

    /// Returns when a reading stops waiting for the master's answer.
    pub(super) fn deadline_ms(&self) -> Option<u64> {
        let deadline = self.content.facts.deadline_ms(monotonic_ms());
        deadline.filter(|_| self.is_waiting)
    }

    /// Receives the answer of the master, if it has arrived. Returns the figures if a reading was made.
    pub(super) fn advance(&mut self) -> Option<Figures> {
        let now = now();
        self.content.facts.receive(now.ms);
        if !self.is_waiting {
            return None;
        }
        match self.content.prepare(&Route::Status, now) {
            Readiness::Until(_) => None,
            Readiness::Now => {
                self.is_waiting = false;
                self.content.record(now);
                self.content.figures(now)
            }
        }
    }

    /// Whether a reading waits for the master.
    pub(super) fn is_waiting(&self) -> bool {
        self.is_waiting
    }

    /// Fails if there is no server any more. Checks this only if the figures are old or there are none yet.
    pub(super) fn check_server(&self, figures: Option<&Figures>) -> Result<()> {
        if figures.is_some_and(|figures| figures.master_age_ms < SILENT_MS) {
            return Ok(());
        }
        match metrics::observe(&self.place) {
            Err(error @ Error::NoServer { .. }) => Err(error),
            _ => Ok(()),
        }
    }
}
