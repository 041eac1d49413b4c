//! The progress bar, on stderr if that is a terminal.
//!
//! Of a file the size is known, so that there is a bar and a guess at the end; of a pipe only how
//! much is done.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::time::Duration;

use indicatif::{ProgressDrawTarget, ProgressStyle};

use super::super::units::count;
/// How often the bar is drawn by itself, so that the clock goes on while nothing ends.
const TICK: Duration = Duration::from_millis(200);

pub(super) struct ProgressBar(Option<indicatif::ProgressBar>);

impl ProgressBar {
    /// A bar for stdin's lines; none when stderr is no terminal.
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
        // Words of ours, so never an error; without them the bar is merely plainer.
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.enable_steady_tick(TICK);
        ProgressBar(Some(bar))
    }

    /// So many lines are done, and so many have failed, which were in the first `passed` bytes of the
    /// input. (More of it was read: a window ahead.)
    pub(super) fn show(&self, done: u64, failed: u64, passed: u64) {
        if let Some(bar) = &self.0 {
            bar.set_message(match failed {
                0 => format!("{} done", count(done)),
                _ => format!("{} done, {} failed", count(done), count(failed)),
            });
            bar.set_position(passed);
        }
    }

    /// Does something that writes to the terminal, with the bar out of its way.
    pub(super) fn aside(&self, write: impl FnOnce()) {
        match &self.0 {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    /// Takes the bar away.
    pub(super) fn clear(&self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

/// How large the input is, if it is a file.
fn input_size() -> Option<u64> {
    let input = File::from(io::stdin().as_fd().try_clone_to_owned().ok()?);
    let metadata = input.metadata().ok()?;
    metadata.is_file().then_some(metadata.len())
}
