//! Serves metrics and status of a running server over HTTP, from shared memory and the answers of its master.
//!
//! It only reads: nothing here changes the server, and nothing here uses the code of workers. [`run`] is the code of
//! the forked observer from its first instruction to `_exit`; [`serve`] runs the same in the foreground.

mod answer;
mod board_figures;
pub mod board_source;
mod connection;
pub mod content;
pub mod exposition;
mod facts;
mod families;
pub mod master_facts;
pub mod metric_table;
pub mod model;
mod page;
mod page_server;
mod post_fork;
pub mod process_rates;
pub mod routes;
pub mod totals;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use nix::sys::signal::Signal;

use self::board_source::BoardSource;
use crate::config::ObserveConfig;
use crate::link::metrics_board::BoardReader;
use crate::logging;
use crate::sys::process::exit_now;
use crate::sys::signal::SignalPipe;
use crate::worker_init::ObserverInit;
use content::Content;
use master_facts::MasterFacts;
use page_server::PageServer;
use routes::RouteRules;

/// The exit code of an observer that could not start (EX_OSERR, sysexits(3head)).
const CANT_START: i32 = 71;
/// The exit code for a bug of preforkd (EX_SOFTWARE).
const BUG: i32 = 70;

/// Runs the observer in a new child, with all signals blocked.
pub fn run(init: ObserverInit<'_>) -> ! {
    logging::init_observer_log();
    let lived = catch_unwind(AssertUnwindSafe(|| live(init)));
    exit_now(match lived {
        Ok(Ok(())) => 0,
        Ok(Err((attempt, error))) => {
            log::error!(
                "the observer could not {attempt}: {error}; it exits, and the master starts another one"
            );
            CANT_START
        }
        // The panic hook has logged it.
        Err(_) => BUG,
    })
}

fn live(mut init: ObserverInit<'_>) -> Result<(), (&'static str, io::Error)> {
    let own = post_fork::init_observer_process(&mut init)?;
    let is_unix = init.is_unix();
    let config = init.settings.observe.clone();
    let facts = MasterFacts::linked(UnixStream::from(init.link));
    let facts = facts.map_err(|error| ("use its socket to the master", error))?;
    // If the board has another version, the observer serves without it.
    let board = own.board.and_then(|file| BoardReader::new(file).ok());
    let content = Content::new(facts, BoardSource::of(board), config.clone());
    let listener = (own.listener, is_unix);
    let mut server = PageServer::new(listener, own.signals, rules(&config, is_unix), content);
    server.serve().map_err(|error| ("serve", error))
}

/// Serves the figures of the server with this control socket until a signal ends the process.
///
/// # Errors
/// If signals cannot be caught, or poll(2) fails.
pub fn serve(
    (listener, is_unix): (OwnedFd, bool),
    control_socket: PathBuf,
    board: BoardSource,
    config: &ObserveConfig,
) -> io::Result<()> {
    let signals = SignalPipe::new(&[Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT])?;
    let content = Content::new(MasterFacts::at(control_socket), board, config.clone());
    PageServer::new(
        (listener, is_unix),
        signals,
        rules(config, is_unix),
        content,
    )
    .serve()
}

fn rules(config: &ObserveConfig, is_unix: bool) -> RouteRules {
    RouteRules {
        hosts: (!is_unix).then(|| config.hosts.clone()),
        has_page: config.page,
    }
}
