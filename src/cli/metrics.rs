//! Reads what commands show of a running server: the answer of its master and the metrics board. `metrics`
//! prints all of it, or writes it to a file, in the format of `observe::exposition`.
//!
//! The master sends its own facts and the descriptors. The figures of the board are summed here, so a command
//! costs the master little.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use super::args::ServerSelector;
use super::control::{self, Answered, ControlConnection};
use crate::config::{self, ObserveConfig, Overrides};
use crate::error::{Error, Result};
use crate::link::metrics_board::BoardReader;
use crate::observe::board_source::BoardSource;
use crate::observe::exposition::exposition;
use crate::observe::totals::BoardMembers;
use crate::protocol::control::{MasterStatus, Status};
use crate::sys::process::{monotonic, monotonic_ms, unix_seconds_exact};

/// The status, and the metrics board or why there is none.
pub(super) struct Observed {
    pub answered: Answered,
    pub board: std::result::Result<BoardReader, String>,
}

/// Asks a server for both.
pub(super) fn observe(place: &ServerSelector) -> Result<Observed> {
    let Some((answered, files)) = ControlConnection::find(place)?.observe()? else {
        return Ok(Observed {
            answered: control::status(place)?,
            board: Err(
                "the running version has no metrics board, so the figures of calls and connections are \
                 left out; run `upgrade` to start the installed version"
                    .to_owned(),
            ),
        });
    };
    let board = match files.into_iter().next().map(BoardReader::new) {
        Some(Ok(board)) => Ok(board),
        Some(Err(error)) => Err(format!("the metrics board cannot be read: {error}")),
        None => Err("the master has sent no metrics board".to_owned()),
    };
    let left_out =
        |problem| format!("{problem}; the figures of calls and connections are left out");
    Ok(Observed {
        answered,
        board: board.map_err(left_out),
    })
}

/// Returns the board that a server has sent, and how to ask the same place for the board of the next master.
pub(super) fn board_source(
    place: ServerSelector,
    master: &MasterStatus,
    board: Option<BoardReader>,
) -> BoardSource {
    let find = move || match observe(&place) {
        Ok(observed) => Ok(observed.board.ok()),
        Err(error) => Err(io::Error::other(error)),
    };
    BoardSource::following(board, (master, monotonic_ms()), Box::new(find))
}

/// Returns the status as JSON, with the members that are read from the metrics board. If that cannot be read, it also
/// returns a warning.
pub(super) fn status_json(place: &ServerSelector) -> Result<(String, Option<String>)> {
    let Observed { answered, board } = observe(place)?;
    Ok(match board {
        Ok(board) => (BoardMembers::of(&board).add_to(&answered.json), None),
        Err(problem) => (answered.json, Some(problem)),
    })
}

/// Returns the `[observe]` keys of a running server, if this user can read its configuration; else the
/// defaults.
pub(super) fn observe_config(status: &Status, overrides: &Overrides) -> ObserveConfig {
    let file = status.master.config.as_deref().map(Path::new);
    let load = |file| config::load(Some(file), overrides).ok();
    let settings = file.and_then(load);
    settings.map(|it| it.observe).unwrap_or_default()
}

/// Returns the metrics as Prometheus text, and a warning if they are not complete. The histograms are those of
/// the server's configuration.
pub(super) fn metrics(
    place: &ServerSelector,
    overrides: &Overrides,
) -> Result<(String, Option<String>)> {
    let begun = monotonic();
    let Observed { answered, board } = observe(place)?;
    let took = || monotonic().saturating_sub(begun);
    let (board, warning) = match board {
        Ok(board) => (Some(board), None),
        Err(warning) => (None, Some(warning)),
    };
    let text = exposition(
        board.as_ref(),
        Some(&answered.status),
        &observe_config(&answered.status, overrides),
        unix_seconds_exact(),
        took,
    );
    Ok((text, warning))
}

/// Replaces a file by rename(2): it is written whole or not at all, and a reader sees the old text or the new one.
pub(super) fn replace_file(path: &Path, text: &str) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let next = path.with_file_name(name);
    let failed = |error| Error::system(format!("write {}", path.display()), error);
    // Never through a link that another user has put there.
    let file = File::options().write(true).create_new(true).open(&next);
    let mut file = file.map_err(failed)?;
    let written = file.write_all(text.as_bytes());
    written
        .and_then(|()| fs::rename(&next, path))
        .map_err(|error| {
            let _ = fs::remove_file(&next);
            failed(error)
        })
}
