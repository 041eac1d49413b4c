//! Communicates with the service manager: sd_notify(3), watchdog, passed listeners.
//!
//! It never blocks and never fails. Without a service manager nothing happens, and a manager that does
//! not read its socket must not stop the master. If there is no room for a message, the message is kept
//! and sent later.

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

/// The largest number of unsent messages; beyond that the oldest is dropped.
const MOST_UNSENT: usize = 64;

/// Sends states to the service manager.
#[derive(Debug, Default)]
pub struct Notifier {
    target: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
    /// When the next watchdog message is due, in milliseconds (CLOCK_MONOTONIC).
    watchdog_due: u64,
    /// The last status that was sent.
    status: String,
    /// The messages that the manager had no room for, oldest first.
    unsent: VecDeque<String>,
}

impl Notifier {
    /// Reads NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID.
    pub fn from_environment() -> Self {
        Notifier {
            target: target(),
            watchdog: sd_notify::watchdog_enabled(),
            ..Notifier::default()
        }
    }

    /// Returns when the next watchdog message is due, in milliseconds (CLOCK_MONOTONIC); `None` without a
    /// watchdog.
    pub fn watchdog_due(&self) -> Option<u64> {
        self.watchdog.map(|_| self.watchdog_due)
    }

    /// Sends the watchdog message if it is due at `now` and `is_healthy` returns true.
    pub fn keep_alive(&mut self, now: u64, is_healthy: impl FnOnce() -> bool) {
        if let Some(interval) = self.watchdog
            && now >= self.watchdog_due
        {
            if is_healthy() {
                self.notify(&[NotifyState::Watchdog]);
            }
            self.watchdog_due = now + interval.as_millis() as u64 / 2;
        }
    }

    /// Sends the text that `systemctl status` shows, if it has changed.
    pub fn show_status(&mut self, text: String) {
        if text != self.status {
            self.notify(&[NotifyState::Status(&text)]);
            self.status = text;
        }
    }

    /// Sends the given states in one message. If there is no room now (the manager may be busy), `retry`
    /// sends it: a lost READY message would make the start time out.
    pub fn notify(&mut self, states: &[NotifyState<'_>]) {
        let mut message = String::new();
        for state in states {
            let _ = writeln!(message, "{state}");
        }
        // Only the latest of these matters.
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

    /// Returns whether a message waits for room.
    pub fn has_unsent_states(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Sends the waiting messages in order, until there is no room.
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

/// Returns whether a later attempt may succeed. Without a manager it cannot.
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

/// A listener that the service manager passed, and its name ("unknown" if it has none).
#[derive(Debug)]
pub struct PassedListener {
    /// The socket, now close-on-exec.
    pub fd: OwnedFd,
    /// FileDescriptorName= of the socket unit.
    pub name: String,
}

/// Takes the listeners that the service manager passed (sd_listen_fds(3)) and clears the variables,
/// because a child could use them too. If LISTEN_PID names another process, no listener is passed to this
/// one, and their names are not checked.
///
/// # Safety
/// The process must have one thread, because the environment is changed. Call it once, before
/// anything else takes ownership of the passed descriptors.
///
/// # Errors
/// If the variables are invalid or name descriptors that are not open.
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
            // SAFETY: the service manager has passed it to this process. The variables are removed, so it
            // is taken only once.
            fd: unsafe { OwnedFd::from_raw_fd(fd) },
            name,
        })
        .collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn received(manager: &UnixDatagram) -> Vec<String> {
        let mut room = [0; 256];
        std::iter::from_fn(|| {
            let length = manager.recv(&mut room).ok()?;
            Some(String::from_utf8(room[..length].to_vec()).unwrap())
        })
        .collect()
    }

    #[test]
    fn messages_to_a_busy_manager_are_sent_later_in_order() {
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
            ..Notifier::default()
        };
        notifier.notify(&[NotifyState::Status("well")]);
        notifier.notify(&[NotifyState::Ready]);
        notifier.notify(&[NotifyState::Status("fine")]);
        assert!(notifier.has_unsent_states());
        assert!(received(&manager).iter().all(|message| message == "other"));
        notifier.retry();
        assert!(!notifier.has_unsent_states());
        assert_eq!(received(&manager), ["READY=1\n", "STATUS=fine\n"]);
        // A manager that never reads must not block us, and the memory for unsent messages is limited.
        for _ in 0..10_000 {
            notifier.notify(&[NotifyState::Watchdog]);
            notifier.notify(&[NotifyState::Ready]);
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
