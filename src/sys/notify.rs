//! Talking to the service manager: sd_notify(3), the watchdog, passed listeners.
//!
//! Never blocks and never fails: without a service manager nothing happens, and a manager that
//! does not read its socket must not stop the master.

#![allow(unsafe_code)]

use std::env;
use std::fmt::Write;
use std::io::ErrorKind;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

pub use sd_notify::NotifyState;

/// The way to the service manager.
#[derive(Debug)]
pub struct Notifier {
    target: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// Reads NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID.
    pub fn from_environment() -> Self {
        Notifier {
            target: target(),
            watchdog: sd_notify::watchdog_enabled(),
        }
    }

    /// How often the watchdog wants to hear of us, if at all.
    pub fn watchdog(&self) -> Option<Duration> {
        self.watchdog
    }

    /// Sends what has changed, in one message.
    pub fn tell(&self, states: &[NotifyState<'_>]) {
        let Some((socket, address)) = &self.target else {
            return;
        };
        let mut message = String::new();
        for state in states {
            let _ = writeln!(message, "{state}");
        }
        // A ready that is not heard ends in a start that is given up.
        while socket
            .send_to_addr(message.as_bytes(), address)
            .is_err_and(|error| error.kind() == ErrorKind::Interrupted)
        {}
    }
}

fn target() -> Option<(UnixDatagram, SocketAddr)> {
    let path = env::var_os("NOTIFY_SOCKET")?;
    let address = match path.as_bytes().split_first()? {
        (b'@', name) => SocketAddr::from_abstract_name(name).ok()?,
        _ => SocketAddr::from_pathname(&path).ok()?,
    };
    let socket = UnixDatagram::unbound().ok()?;
    socket.set_nonblocking(true).ok()?;
    Some((socket, address))
}

/// A listener that was passed, with its name ("unknown" where none was given).
#[derive(Debug)]
pub struct PassedListener {
    /// The socket, now close-on-exec.
    pub fd: OwnedFd,
    /// FileDescriptorName= of the socket unit.
    pub name: String,
}

/// Takes the listeners that the service manager has passed (sd_listen_fds(3)) and clears the
/// variables, so that no child takes them for its own. To be called once, while the process has
/// one thread.
///
/// # Errors
/// When the variables make no sense or name descriptors that are not open.
pub fn take_listeners() -> std::io::Result<Vec<PassedListener>> {
    let named = sd_notify::listen_fds_with_names().map(Iterator::collect::<Vec<_>>);
    for variable in ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"] {
        // SAFETY: there is one thread, so nobody reads the environment meanwhile.
        unsafe { env::remove_var(variable) };
    }
    Ok(named?
        .into_iter()
        .map(|(fd, name)| PassedListener {
            // SAFETY: the service manager has passed it to this process; the variables that say
            // so are gone, so it is taken once.
            fd: unsafe { OwnedFd::from_raw_fd(fd) },
            name,
        })
        .collect())
}
