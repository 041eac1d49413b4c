//! Runs the service manager's end of NOTIFY_SOCKET (sd_notify(3)). It reads continuously, as systemd
//! does, because a full queue would block the sender.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The received lines, and when each was read.
#[derive(Default)]
struct Inbox {
    lines: Mutex<Vec<(Instant, String)>>,
    more: Condvar,
}

/// A socket that is read until it is dropped.
pub struct Notifications {
    path: PathBuf,
    inbox: Arc<Inbox>,
    reader: Option<JoinHandle<()>>,
}

impl Notifications {
    /// Binds the socket.
    pub fn at(path: PathBuf) -> Self {
        let socket = UnixDatagram::bind(&path).unwrap();
        let inbox = Arc::new(Inbox::default());
        let into = Arc::clone(&inbox);
        let reader = std::thread::spawn(move || read(&socket, &into));
        Notifications {
            path,
            inbox,
            reader: Some(reader),
        }
    }

    /// Returns its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns all lines so far, in order.
    pub fn lines(&self) -> Vec<String> {
        let lines = self.inbox.lines.lock();
        let lines = lines.unwrap_or_else(PoisonError::into_inner);
        lines.iter().map(|(_, line)| line.clone()).collect()
    }

    /// Returns the number of lines so far.
    pub fn count(&self) -> usize {
        let lines = self.inbox.lines.lock();
        lines.unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Waits for a line behind the first `seen` for which `is_it` is true. Returns when it was read, and
    /// the number of lines up to it.
    pub fn wait(
        &self,
        seen: usize,
        deadline: Duration,
        is_it: impl Fn(&str) -> bool,
    ) -> Option<(Instant, usize)> {
        let end = Instant::now() + deadline;
        let lines = self.inbox.lines.lock();
        let mut lines = lines.unwrap_or_else(PoisonError::into_inner);
        let mut looked_at = seen;
        loop {
            let new = lines.get(looked_at..).unwrap_or_default();
            if let Some(at) = new.iter().position(|(_, line)| is_it(line)) {
                return Some((new[at].0, looked_at + at + 1));
            }
            looked_at = looked_at.max(lines.len());
            let left = end.checked_duration_since(Instant::now())?;
            let woken = self.inbox.more.wait_timeout(lines, left);
            lines = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Reads until an empty message comes, which no service sends.
fn read(socket: &UnixDatagram, into: &Inbox) {
    let mut message = [0; 4096];
    while let Ok(length @ 1..) = socket.recv(&mut message) {
        let text = String::from_utf8_lossy(&message[..length]);
        let now = Instant::now();
        let lines = into.lines.lock();
        let mut lines = lines.unwrap_or_else(PoisonError::into_inner);
        lines.extend(text.lines().map(|line| (now, line.to_owned())));
        into.more.notify_all();
    }
}

impl Drop for Notifications {
    fn drop(&mut self) {
        let socket = UnixDatagram::unbound().unwrap();
        if socket.send_to(b"", &self.path).is_ok() {
            let _ = self.reader.take().map(JoinHandle::join);
        }
    }
}
