//! Holds the terminal of `top`: raw mode and the alternate screen, from `open` until it is dropped.
//!
//! A panic restores the terminal before its message is printed, because the message would be lost with the
//! alternate screen. Fails with the system's error, for example if the terminal is gone.

use std::io::{self, stdin};
use std::os::fd::{AsFd, BorrowedFd};
use std::thread;
use std::time::Duration;

use crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use ratatui::DefaultTerminal;
use ratatui::buffer::Buffer;

use super::feed::Feed;
use crate::sys::process::monotonic_ms;
use crate::sys::signal::SignalPipe;

pub(super) struct Screen {
    terminal: DefaultTerminal,
}

/// What a wait ended with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Woken {
    /// A signal or the end of the terminal: leave.
    Ended,
    /// Keys can be read.
    Keys,
    /// Time, an answer, or a new size.
    Other,
}

impl Screen {
    pub(super) fn open() -> io::Result<Self> {
        match ratatui::try_init() {
            Ok(terminal) => Ok(Screen { terminal }),
            Err(error) => {
                let _ = ratatui::try_restore();
                Err(error)
            }
        }
    }

    /// Draws a frame of the size that the terminal has now.
    pub(super) fn draw(&mut self, frame: impl FnOnce(&mut Buffer)) -> io::Result<()> {
        self.terminal.draw(|all| frame(all.buffer_mut())).map(drop)
    }

    /// Returns the keys that were typed. Ctrl-C is `q`.
    pub(super) fn keys(&mut self) -> io::Result<Vec<KeyCode>> {
        let mut keys = Vec::new();
        // With a timeout of zero, `poll` would not look at the input.
        while event::poll(Duration::from_millis(1))? {
            if let Event::Key(key) = event::read()?
                && key.kind == KeyEventKind::Press
            {
                match (key.code, key.modifiers.contains(KeyModifiers::CONTROL)) {
                    (KeyCode::Char('c'), true) => keys.push(KeyCode::Char('q')),
                    (_, true) => {}
                    (code, false) => keys.push(code),
                }
            }
        }
        Ok(keys)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // A panic has restored the terminal already. A second time would put the cursor over its message.
        if !thread::panicking() {
            let _ = ratatui::try_restore();
        }
    }
}

fn input(fd: BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::new(fd, PollFlags::POLLIN)
}

/// Waits for a signal, an answer or the time `until_ms` (CLOCK_MONOTONIC), and with `has_keys` also for a key.
pub(super) fn wait(
    signals: &SignalPipe,
    feed: &Feed,
    until_ms: u64,
    has_keys: bool,
) -> io::Result<Woken> {
    let stdin = stdin();
    let until_ms = until_ms.min(feed.deadline_ms().unwrap_or(u64::MAX));
    let mut fds = vec![input(signals.as_fd())];
    if has_keys {
        fds.push(input(stdin.as_fd()));
    }
    fds.extend(feed.descriptor().map(input));
    // One more millisecond, so that the time is over when poll(2) returns.
    let left = Duration::from_millis(until_ms.saturating_sub(monotonic_ms()) + 1);
    match poll(
        &mut fds,
        PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX),
    ) {
        Ok(_) => {}
        // A signal, or a new size of the terminal.
        Err(Errno::EINTR) => {
            return Ok(if signals.take().is_empty() {
                Woken::Other
            } else {
                Woken::Ended
            });
        }
        Err(error) => return Err(error.into()),
    }
    let events: Vec<PollFlags> = fds.iter().filter_map(PollFd::revents).collect();
    let is_gone = PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL;
    Ok(match has_keys {
        _ if !events[0].is_empty() => Woken::Ended,
        true if events[1].intersects(is_gone) => Woken::Ended,
        true if !events[1].is_empty() => Woken::Keys,
        _ => Woken::Other,
    })
}
