//! Shows a progress bar on stderr, if that is a terminal.
//!
//! The size of a file is known, so there is a bar with the remaining time. For a pipe only the number of
//! lines is shown.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::time::Duration;

use indicatif::{ProgressDrawTarget, ProgressStyle};

use super::super::units::count;

/// How often the bar is redrawn while no call ends.
const TICK: Duration = Duration::from_millis(200);

pub(super) struct ProgressBar(Option<indicatif::ProgressBar>);

impl ProgressBar {
    /// Makes a bar for the lines of stdin; none if stderr is no terminal.
    pub(super) fn new() -> Self {
        if !io::stderr().is_terminal() {
            return ProgressBar(None);
        }
        let size = input_size();
        let bar = indicatif::ProgressBar::with_draw_target(size, ProgressDrawTarget::stderr());
        let template = if size.is_some() {
            "{percent:>3}% {wide_bar} {msg}  {elapsed} + {eta}"
        } else {
            "{spinner} {msg}  {elapsed}"
        };
        // The template is ours, so it is valid. Otherwise the default bar is shown.
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.enable_steady_tick(TICK);
        ProgressBar(Some(bar))
    }

    /// Shows the number of lines that are done, the number that have failed, and the bytes of the input
    /// with these lines. More input was read ahead.
    pub(super) fn show(&self, done: u64, failed: u64, passed: u64) {
        if let Some(bar) = &self.0 {
            bar.set_message(match failed {
                0 => format!("{} done", count(done)),
                _ => format!("{} done, {} failed", count(done), count(failed)),
            });
            bar.set_position(passed);
        }
    }

    /// Calls a function that writes to the terminal, with the bar hidden.
    pub(super) fn aside(&self, write: impl FnOnce()) {
        match &self.0 {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    /// Removes the bar.
    pub(super) fn clear(&self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

/// Returns the size of the input, if it is a file.
fn input_size() -> Option<u64> {
    let input = File::from(io::stdin().as_fd().try_clone_to_owned().ok()?);
    let metadata = input.metadata().ok()?;
    metadata.is_file().then_some(metadata.len())
}
