//! `top`: shows in a terminal what the status page shows, and prints it once or as JSON.
//!
//! The loop waits for keys, signals and the master's answer at the same time. So keys work while the master is stopped.
//! The figures are computed by `observe`.

mod cells;
mod draw;
mod feed;
mod header;
mod panes;
mod screen;
mod text;
mod view;

#[cfg(test)]
mod tests;

use std::env;
use std::io::{self, IsTerminal};
use std::time::Duration;

use crossterm::terminal;
use nix::sys::signal::Signal;

use super::args::ServerSelector;
use super::output;
use crate::error::{Error, Result};
use crate::observe::content::Figures;
use crate::sys::process::{monotonic_ms, unix_seconds};
use crate::sys::signal::SignalPipe;
use feed::Feed;
use screen::{Screen, Woken, wait};
use view::{KeyOutcome, View};

/// The width of `--once` without a terminal and without COLUMNS.
const WIDTH: u16 = 120;
const SIGNALS: [Signal; 4] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGQUIT,
];

/// What is printed, without a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TopOutput {
    /// Only the first frame or line.
    pub once: bool,
    pub json: bool,
}

/// Shows a server until the user leaves, or prints its figures.
///
/// # Errors
/// If there is no terminal and nothing is to be printed, if there is no such server, or if this user may not
/// ask it.
pub(super) fn top(
    name: &str,
    place: ServerSelector,
    interval: Duration,
    output: TopOutput,
) -> Result<()> {
    let prints = output.once || output.json;
    let is_interactive = io::stdin().is_terminal() && io::stdout().is_terminal();
    if !prints && !is_interactive {
        return Err(Error::Usage(
            "top needs a terminal; without one, --once prints one frame and --json one object per line".into(),
        ));
    }
    let (feed, warning) = Feed::open(place, interval)?;
    if prints {
        if let Some(warning) = warning {
            output::print_error(name, &format!("warning: {warning}"));
        }
        return print(feed, interval, output);
    }
    show(feed, interval).map_err(|error| Error::system("use the terminal", error))
}

/// Prints from the second reading on, because rates need two.
fn print(mut feed: Feed, interval: Duration, output: TopOutput) -> Result<()> {
    let failed = |error| Error::system("wait", error);
    let signals = SignalPipe::new(&SIGNALS).map_err(failed)?;
    let mut next_ms = 0;
    let mut is_first = true;
    loop {
        if monotonic_ms() >= next_ms {
            next_ms = monotonic_ms() + interval.as_millis() as u64;
            feed.begin();
        }
        let was_waiting = feed.is_waiting();
        let reading = feed.advance();
        if was_waiting && !feed.is_waiting() {
            feed.check_server(reading.as_ref())?;
        }
        if let Some(figures) = reading {
            if !is_first {
                let text = match output.json {
                    true => figures.to_json().map(|json| json + "\n"),
                    false => Some(draw::page(
                        &View::new(interval, false),
                        &figures,
                        unix_seconds(),
                        width(),
                    )),
                };
                let is_read = output::print_part(&text.unwrap_or_default())?;
                if output.once || !is_read {
                    return Ok(());
                }
            }
            is_first = false;
        }
        if wait(&signals, &feed, next_ms, false).map_err(failed)? == Woken::Ended {
            return Ok(());
        }
    }
}

fn width() -> u16 {
    let of_terminal = || io::stdout().is_terminal().then(terminal::size)?.ok();
    let given = env::var("COLUMNS")
        .ok()
        .and_then(|columns| columns.parse().ok());
    let width = given.or_else(|| of_terminal().map(|(columns, _)| columns));
    width.unwrap_or(WIDTH).clamp(20, 1_000)
}

/// Shows frames until a key or a signal ends it.
fn show(mut feed: Feed, interval: Duration) -> io::Result<()> {
    // Before the terminal changes, so that no signal ends the process in between.
    let signals = SignalPipe::new(&SIGNALS)?;
    let mut screen = Screen::open()?;
    let mut view = View::new(interval, output::wants_colours());
    let mut figures: Option<Figures> = None;
    let (mut next_ms, mut page) = (0, 0);
    loop {
        if monotonic_ms() >= next_ms {
            next_ms = monotonic_ms() + view.interval.as_millis() as u64;
            feed.begin();
        }
        let reading = feed.advance();
        if let Some(reading) = reading.filter(|_| !view.is_paused || figures.is_none()) {
            figures = Some(reading);
        }
        screen.draw(|buffer| page = draw::draw(buffer, &view, figures.as_ref(), unix_seconds()))?;
        match wait(&signals, &feed, next_ms, true)? {
            Woken::Ended => return Ok(()),
            Woken::Other => {}
            Woken::Keys => {
                for key in screen.keys()? {
                    let rows = figures.as_ref().map_or(0, |figures| {
                        view.rows(view.pane, figures, unix_seconds()).len()
                    });
                    if view.key(key, rows, page) == KeyOutcome::Quit {
                        return Ok(());
                    }
                }
                if view.interval != interval {
                    next_ms = next_ms.min(monotonic_ms() + view.interval.as_millis() as u64);
                    feed.set_interval(view.interval);
                }
            }
        }
    }
}
