//! `observe`: serves metrics and status of a running server over HTTP, in the foreground.
//!
//! Runs the server of the observer process, which gets the master's facts over the control socket here. Uses
//! the `[observe]` keys of the server's configuration if this user can read it. If the control socket does not
//! answer, the command fails before it binds an address.

use std::fs;
use std::os::fd::OwnedFd;

use super::args::ServerSelector;
use super::metrics::{self, Observed};
use super::{control, output};
use crate::config::{Address, ObserveConfig, Overrides, USUAL_PORT};
use crate::error::{Error, Result};
use crate::observe;
use crate::sys::socket::{self, Bound};

/// Connections that may wait.
const BACKLOG: u32 = 128;

/// Serves at `address` until a signal ends the process.
///
/// # Errors
/// If there is no such server, if this user may not ask it, or if the address cannot be bound.
pub(super) fn observe(
    name: &str,
    place: &ServerSelector,
    address: &str,
    overrides: &Overrides,
) -> Result<()> {
    let usage = |problem| Error::Usage(format!("--address: {problem}"));
    let address = Address::parse(address, USUAL_PORT).map_err(usage)?;
    let control_socket = control::locate(place)?;
    let Observed { answered, board } = metrics::observe(place)?;
    if let Err(problem) = &board {
        output::print_error(name, &format!("warning: {problem}"));
    }
    let config = ObserveConfig {
        address: Some(address.clone()),
        ..metrics::observe_config(&answered.status, overrides)
    };
    if let Some(warning) = config.warning() {
        output::print_error(name, &format!("warning: {warning}"));
    }
    let refused = |error| {
        let remedy = "choose another --address";
        Error::system_with(format!("listen at {address}"), error, remedy)
    };
    let listener = bind(&address).map_err(refused)?;
    socket::start_listening(&listener, BACKLOG).map_err(refused)?;
    output::print(&match (socket::bound_address(&listener), &address) {
        (Some(Bound::Tcp(bound)), _) => format!("http://{bound}/\n"),
        _ => format!("{address}\n"),
    })?;
    let is_unix = matches!(address, Address::Unix(_));
    let board = metrics::board_source(place.clone(), &answered.status.master, board.ok());
    let served = observe::serve((listener, is_unix), control_socket, board, &config);
    if let Address::Unix(path) = &address {
        // This process has created the socket: bind(2) would have failed if the path had existed.
        let _ = fs::remove_file(path);
    }
    served.map_err(|error| Error::system("serve", error))
}

fn bind(address: &Address) -> std::io::Result<OwnedFd> {
    match address {
        Address::Tcp(address) => socket::bind_tcp(*address),
        Address::Unix(path) => socket::bind_unix(path, 0o660),
    }
}
