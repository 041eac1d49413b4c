//! The service manager's end of NOTIFY_SOCKET (sd_notify(3)): it reads all along, as systemd
//! does, for a queue that nobody empties would block its sender.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// A socket that is read until it is dropped.
pub struct Notifications {
    path: PathBuf,
    messages: Arc<Mutex<Vec<String>>>,
    reader: Option<JoinHandle<()>>,
}

impl Notifications {
    /// Binds the socket.
    pub fn at(path: PathBuf) -> Self {
        let socket = UnixDatagram::bind(&path).unwrap();
        let messages = Arc::new(Mutex::new(Vec::new()));
        let into = Arc::clone(&messages);
        let reader = std::thread::spawn(move || read(&socket, &into));
        Notifications {
            path,
            messages,
            reader: Some(reader),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All lines that came so far, in their order.
    pub fn lines(&self) -> Vec<String> {
        let messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        messages.clone()
    }
}

/// Until an empty message comes, which no service sends.
fn read(socket: &UnixDatagram, into: &Mutex<Vec<String>>) {
    let mut message = [0; 4096];
    while let Ok(length @ 1..) = socket.recv(&mut message) {
        let text = String::from_utf8_lossy(&message[..length]);
        let mut lines = into.lock().unwrap_or_else(PoisonError::into_inner);
        lines.extend(text.lines().map(str::to_owned));
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
