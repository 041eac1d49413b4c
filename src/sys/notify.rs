//! Talking to the service manager: sd_notify(3), the watchdog, passed listeners.
//!
//! Never blocks and never fails: without a service manager nothing happens, and a manager that
//! does not read its socket must not stop the master. What it has no room for is kept, and said later.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::env;
use std::fmt::Write;
use std::io::{self, ErrorKind};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use nix::errno::Errno;
pub use sd_notify::NotifyState;

/// Messages that wait for room; beyond, the oldest is given up.
const MOST_UNSENT: usize = 64;

/// The way to the service manager.
#[derive(Debug)]
pub struct Notifier {
    target: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
    /// What the manager had no room for, the oldest first.
    unsent: VecDeque<String>,
}

impl Notifier {
    /// Reads NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID.
    pub fn from_environment() -> Self {
        Notifier {
            target: target(),
            watchdog: sd_notify::watchdog_enabled(),
            unsent: VecDeque::new(),
        }
    }

    /// How often the watchdog wants to hear of us, if at all.
    pub fn watchdog(&self) -> Option<Duration> {
        self.watchdog
    }

    /// Sends what has changed, in one message. Where there is no room for it now, as while the manager
    /// is busy with others, `retry` sends it: a ready that is not heard ends in a start that is given up.
    pub fn tell(&mut self, states: &[NotifyState<'_>]) {
        let mut message = String::new();
        for state in states {
            let _ = writeln!(message, "{state}");
        }
        // Of these the latest alone is of interest.
        if let [NotifyState::Status(_) | NotifyState::Watchdog] = states {
            let kind = message.split('=').next().unwrap_or_default();
            self.unsent.retain(|other| !other.starts_with(kind));
        }
        if self.unsent.len() == MOST_UNSENT {
            self.unsent.pop_front();
        }
        self.unsent.push_back(message);
        self.retry();
    }

    /// Whether something waits for room.
    pub fn has_unsent_states(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Sends what was left, in its order, as far as there is room.
    pub fn retry(&mut self) {
        while let Some(message) = self.unsent.front() {
            if is_full(self.send(message)) {
                return;
            }
            self.unsent.pop_front();
        }
    }

    fn send(&self, message: &str) -> io::Result<()> {
        let Some((socket, address)) = &self.target else {
            return Ok(());
        };
        loop {
            match socket.send_to_addr(message.as_bytes(), address) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                sent => return sent.map(drop),
            }
        }
    }
}

/// Whether it may go well later. Where nobody is, nobody waits for it.
fn is_full(sent: io::Result<()>) -> bool {
    let passing = |kind| matches!(kind, ErrorKind::WouldBlock | ErrorKind::OutOfMemory);
    let no_buffers = Some(Errno::ENOBUFS as i32);
    sent.is_err_and(|error| passing(error.kind()) || error.raw_os_error() == no_buffers)
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
/// variables, so that no child takes them for its own. Variables that are meant for another process
/// (LISTEN_PID) are none of ours: they pass nothing, and so their names are not looked at.
///
/// # Safety
/// The process must have one thread, because the environment is changed. Call it once, before
/// anything else takes ownership of the passed descriptors.
///
/// # Errors
/// When the variables make no sense or name descriptors that are not open.
pub unsafe fn take_listeners() -> io::Result<Vec<PassedListener>> {
    let named = match sd_notify::listen_fds() {
        Ok(fds) if fds.len() == 0 => Ok(Vec::new()),
        _ => sd_notify::listen_fds_with_names().map(Iterator::collect),
    };
    for variable in ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"] {
        // SAFETY: the caller promises that there is one thread.
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn heard(manager: &UnixDatagram) -> Vec<String> {
        let mut room = [0; 256];
        std::iter::from_fn(|| {
            let length = manager.recv(&mut room).ok()?;
            Some(String::from_utf8(room[..length].to_vec()).unwrap())
        })
        .collect()
    }

    #[test]
    fn what_a_busy_manager_has_no_room_for_is_said_later_in_order() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        manager.set_nonblocking(true).unwrap();
        let socket = UnixDatagram::unbound().unwrap();
        socket.set_nonblocking(true).unwrap();
        let address = SocketAddr::from_pathname(&path).unwrap();
        while socket.send_to_addr(b"other", &address).is_ok() {}
        let mut notifier = Notifier {
            target: Some((socket, address)),
            watchdog: None,
            unsent: VecDeque::new(),
        };
        notifier.tell(&[NotifyState::Status("well")]);
        notifier.tell(&[NotifyState::Ready]);
        notifier.tell(&[NotifyState::Status("fine")]);
        assert!(notifier.has_unsent_states());
        assert!(heard(&manager).iter().all(|message| message == "other"));
        notifier.retry();
        assert!(!notifier.has_unsent_states());
        assert_eq!(heard(&manager), ["READY=1\n", "STATUS=fine\n"]);
        // One that never reads holds nothing up, and is not remembered without end.
        for _ in 0..10_000 {
            notifier.tell(&[NotifyState::Watchdog]);
            notifier.tell(&[NotifyState::Ready]);
        }
        assert_eq!(notifier.unsent.len(), MOST_UNSENT);
        let dogs = notifier
            .unsent
            .iter()
            .filter(|one| one.starts_with("WATCHDOG"));
        assert_eq!(dogs.count(), 1);
        drop(manager);
        notifier.retry();
        assert!(!notifier.has_unsent_states());
    }
}
