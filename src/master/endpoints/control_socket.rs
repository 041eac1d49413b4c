//! Serves the control socket: a client sends one JSON line and gets one JSON line.
//!
//! Clients are commands, so there are few at a time. The master reads and writes without waiting, and
//! closes a client that takes too long. Only the master's user and root are accepted, by the mode of the
//! socket and by the peer's credentials. The main loop carries out the requests.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind::Interrupted, ErrorKind::WouldBlock};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{Shutdown, shutdown};

use super::audit::{PendingRequest, may_ask};
pub use super::control_client::{ClientId, ControlState};
use super::control_client::{ClientState, ControlClient};
use super::listeners::bind_path;
use super::owned_path::OwnedPath;
use super::pid_file::make_directory;
use crate::error::{Error, Result};
use crate::logging::ControlPeer;
use crate::master::policy::event::Millis;
use crate::protocol::control::{ControlRequest, ControlResponse, to_line};
use crate::sys::account::effective_ids;
use crate::sys::attached;
use crate::sys::closer::close_in_child;
use crate::sys::rights::{self, GuardedSocket};
use crate::sys::socket;

/// The largest number of clients at one time. More wait in the socket's queue.
const MOST_CLIENTS: usize = 32;
/// The longest request in bytes. It may contain a path.
const LONGEST_REQUEST: usize = 16_384;
/// The longest time for a client to send its request, and then to read its answer.
const CLIENT_TIMEOUT_MS: Millis = 5000;
/// The time until the next accept when the system had no descriptor.
const RETRY_MS: Millis = 200;

#[derive(Debug)]
pub struct ControlSocket {
    path: OwnedPath,
    listener: UnixListener,
    clients: BTreeMap<ClientId, ControlClient>,
    /// The requests without an answer. The client may have disconnected.
    pending: BTreeMap<ClientId, PendingRequest>,
    next: u64,
    /// Nothing is accepted before this time, because the system had no descriptor.
    closed_until: Millis,
}

impl ControlSocket {
    /// Binds the socket. Call it while the pid file is locked.
    ///
    /// # Errors
    /// If the path cannot be bound.
    pub fn bind(path: &Path) -> Result<Self> {
        if let Some(directory) = path.parent() {
            make_directory(directory)?;
        }
        let refused = |error: io::Error| {
            let remedy = if error.kind() == io::ErrorKind::AddrInUse {
                "another master answers there: start a second server with --name NAME, or set \
                 pid-file and control-socket; else stop the other one"
            } else if path.exists() {
                "remove the file there if nothing else needs it; or set control-socket to another path"
            } else {
                "set control-socket to a path that this user may write"
            };
            let attempt = format!("create the control socket {}", path.display());
            Error::system_with(attempt, error, remedy)
        };
        let fd = bind_path(path, Some(0o600)).map_err(refused)?;
        socket::start_listening(&fd, 16).map_err(refused)?;
        Ok(ControlSocket {
            path: OwnedPath::of(path),
            listener: fd.into(),
            clients: BTreeMap::new(),
            pending: BTreeMap::new(),
            next: 0,
            closed_until: 0,
        })
    }

    /// Returns the state for an upgrade.
    pub fn export(&self) -> ControlState {
        let client = |(id, client): (&ClientId, &ControlClient)| ClientState {
            id: id.0,
            fd: client.stream.as_raw_fd(),
            received: client.received.clone(),
            unsent: client.unsent.clone(),
            asked: client.asked,
            ended: client.ended,
            keep: client.keep,
            deadline: client.deadline,
        };
        ControlState {
            path: self.path.clone(),
            fd: self.listener.as_raw_fd(),
            next: self.next,
            // The next program connects an observer of its own.
            clients: (self
                .clients
                .iter()
                .filter(|(_, client)| !client.is_observer))
            .map(client)
            .collect(),
            pending: (self.pending.iter())
                .map(|(id, request)| (id.0, request.clone()))
                .collect(),
        }
    }

    /// Restores the state after an upgrade. `take` returns the descriptors.
    ///
    /// # Errors
    /// Those of `take`.
    pub fn import(
        state: ControlState,
        mut take: impl FnMut(RawFd) -> Result<OwnedFd>,
    ) -> Result<Self> {
        let mut clients = BTreeMap::new();
        for client in state.clients {
            let id = ClientId(client.id);
            let stream = GuardedSocket::new(take(client.fd)?, close_in_child);
            let client = ControlClient {
                peer: peer_of(&stream).unwrap_or_else(|_| ControlPeer::new(effective_ids().0, 0)),
                stream,
                received: client.received,
                unsent: client.unsent,
                attached: Vec::new(),
                asked: client.asked,
                is_refused: false,
                ended: client.ended,
                is_observer: false,
                keep: client.keep,
                deadline: client.deadline,
            };
            clients.insert(id, client);
        }
        let listener = take(state.fd)?;
        // A socket of an older version still accepts descriptors.
        rights::refuse(&listener);
        Ok(ControlSocket {
            path: state.path,
            listener: listener.into(),
            clients,
            pending: (state.pending.into_iter())
                .map(|(id, request)| (ClientId(id), request))
                .collect(),
            next: state.next,
            closed_until: 0,
        })
    }

    /// Recreates the socket if its path was removed. Connected and waiting clients stay. Call it while the
    /// pid file is locked.
    pub fn renew(&mut self, now: Millis) {
        let path = AsRef::<Path>::as_ref(&self.path).to_owned();
        let name = path.display();
        let what = "the control socket was: no command can reach this master; remove that file and send SIGHUP";
        if !self.path.warn_if_replaced(&name, what) {
            return;
        }
        match ControlSocket::bind(&path) {
            Ok(made) => {
                // Ends, because no client can join the queue of the old socket.
                while self.accept(now) {}
                self.listener = made.listener;
                self.path = made.path;
                log::warn!("the control socket {name} was removed: recreated it");
            }
            Err(error) => {
                log::warn!("the control socket was removed, and recreating it failed: {error}")
            }
        }
    }

    pub fn remove(&self) {
        self.path.remove();
    }

    /// Returns the listening socket for poll(2), unless there are too many clients or the system had no
    /// descriptor.
    pub fn listener(&self, now: Millis) -> Option<BorrowedFd<'_>> {
        let people = self.clients.values().filter(|client| !client.is_observer);
        (people.count() < MOST_CLIENTS && now >= self.closed_until).then(|| self.listener.as_fd())
    }

    /// Returns the clients, and the events for which each is polled.
    pub fn clients(&self) -> impl Iterator<Item = (ClientId, BorrowedFd<'_>, PollFlags)> {
        self.clients.iter().map(|(id, client)| {
            let wanted = if !client.unsent.is_empty() {
                PollFlags::POLLOUT
            } else if client.ended {
                // POLLHUP is reported all the same.
                PollFlags::empty()
            } else {
                PollFlags::POLLIN
            };
            (*id, client.stream.as_fd(), wanted)
        })
    }

    /// Returns when the first client is closed, or clients are accepted again.
    pub fn next_deadline(&self, now: Millis) -> Option<Millis> {
        self.clients
            .values()
            .filter_map(|client| client.deadline)
            .chain(Some(self.closed_until).filter(|&until| until > now))
            .min()
    }

    /// Closes the clients that take too long.
    pub fn expire(&mut self, now: Millis) {
        self.clients
            .retain(|_, client| client.deadline.is_none_or(|deadline| deadline > now));
    }

    /// Accepts one client. Returns whether there was one.
    pub fn accept(&mut self, now: Millis) -> bool {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if matches!(error.kind(), WouldBlock | Interrupted) => return false,
            Err(error) => {
                // Otherwise the socket would be readable all the time, and the master would spin.
                self.closed_until = now + RETRY_MS;
                log::debug!("the control socket cannot accept a client: {error}");
                return false;
            }
        };
        let is_nonblocking = stream.set_nonblocking(true).is_ok();
        // Before the check of the user, so that a refused client is closed in the same way.
        let stream = GuardedSocket::new(stream.into(), close_in_child);
        if let Ok(peer) = peer_of(&stream)
            && may_ask(&peer)
            && is_nonblocking
        {
            self.insert(stream, peer, Some(now + CLIENT_TIMEOUT_MS));
        }
        true
    }

    fn insert(&mut self, stream: GuardedSocket, peer: ControlPeer, deadline: Option<Millis>) {
        let id = ClientId(self.next);
        self.next += 1;
        self.clients.insert(
            id,
            ControlClient {
                stream,
                peer,
                received: Vec::new(),
                unsent: Vec::new(),
                attached: Vec::new(),
                asked: false,
                is_refused: false,
                ended: false,
                is_observer: deadline.is_none(),
                keep: false,
                deadline,
            },
        );
    }

    /// Creates a lasting client for the observer. Returns the observer's end of the connection.
    ///
    /// # Errors
    /// If no descriptor is left.
    pub fn connect_observer(&mut self) -> io::Result<OwnedFd> {
        let (own, other) = socket::stream_pair()?;
        let own = GuardedSocket::new(own, close_in_child);
        let peer = peer_of(&own)?;
        self.insert(own, peer, None);
        Ok(other)
    }

    /// Returns whether a client is the observer, which may ask for the status only.
    pub fn is_observer(&self, id: ClientId) -> bool {
        let client = self.clients.get(&id);
        client.is_some_and(|client| client.is_observer)
    }

    /// Handles a client that is ready: sends the rest of its answer, or reads its request.
    pub fn serve(&mut self, id: ClientId, now: Millis) -> Option<ControlRequest> {
        let client = self.clients.get_mut(&id)?;
        if !client.unsent.is_empty() {
            self.send(id);
            return None;
        }
        let mut bytes = [0; 1024];
        // EBADMSG means that descriptors are attached. Then the client is closed.
        match client.stream.receive(&mut bytes) {
            Ok(0) if client.asked && !client.ended && !client.is_refused => {
                client.ended = true;
                return None;
            }
            Ok(1..) if client.is_refused => return None,
            Ok(length @ 1..) => client.received.extend_from_slice(&bytes[..length]),
            Err(Errno::EAGAIN | Errno::EINTR) => return None,
            // The client has closed the connection, or receiving failed.
            Ok(0) | Err(_) => {
                self.clients.remove(&id);
                return None;
            }
        }
        if client.asked {
            self.clients.remove(&id);
            return None;
        }
        if client.received.len() > LONGEST_REQUEST {
            (client.asked, client.is_refused, client.received) = (true, true, Vec::new());
            (self.pending).insert(id, PendingRequest::new(client.peer.clone(), None, now));
            let text = format!("the request is longer than {LONGEST_REQUEST} bytes");
            self.answer(id, &ControlResponse::refused(text, 64), now);
            return None;
        }
        let end = client.received.iter().position(|&byte| byte == b'\n')?;
        client.asked = true;
        client.deadline = None;
        let line: Vec<u8> = client.received.drain(..=end).collect();
        let request: serde_json::Result<ControlRequest> = serde_json::from_slice(&line);
        let pending = PendingRequest::new(client.peer.clone(), request.as_ref().ok(), now);
        self.pending.insert(id, pending);
        match request {
            Ok(request) => Some(request),
            Err(error) => {
                let text = format!("this master does not know the command: {error}");
                self.answer(id, &ControlResponse::refused(text, 64), now);
                None
            }
        }
    }

    /// Sends descriptors with the answer that follows.
    pub fn attach(&mut self, id: ClientId, files: Vec<OwnedFd>) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.attached = files;
        }
    }

    /// Returns the connection of a client, to pass it on to another process.
    pub fn connection(&self, id: ClientId) -> Option<BorrowedFd<'_>> {
        Some(self.clients.get(&id)?.stream.as_fd())
    }

    /// Drops a client without closing the connection, because another process has it now. That process answers the
    /// client and logs the request.
    pub fn forget(&mut self, id: ClientId) {
        self.pending.remove(&id);
        if let Some(client) = self.clients.remove(&id) {
            client.stream.mark_shared();
        }
    }

    /// Answers a client, and closes it when it has the answer.
    pub fn answer(&mut self, id: ClientId, response: &ControlResponse, now: Millis) {
        if let Some(request) = self.pending.remove(&id) {
            request.log(response, now);
        }
        if let Some(client) = self.clients.get_mut(&id) {
            client.unsent = to_line(response).unwrap_or_default();
            client.deadline = Some(now + CLIENT_TIMEOUT_MS);
            self.send(id);
        }
    }

    /// Answers a client that stays until the master exits.
    pub fn answer_and_keep(&mut self, id: ClientId, response: &ControlResponse, now: Millis) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.keep = true;
            self.answer(id, response, now);
        }
    }

    fn send(&mut self, id: ClientId) {
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        match attached::send(&client.stream, &client.unsent, &client.attached) {
            Ok(sent) => {
                client.attached.clear();
                client.unsent.drain(..sent);
            }
            Err(Errno::EAGAIN | Errno::EINTR) => return,
            Err(_) => drop(self.clients.remove(&id)),
        }
        if let Some(client) = self.clients.get_mut(&id)
            && client.unsent.is_empty()
        {
            if client.is_refused {
                let _ = shutdown(client.stream.as_raw_fd(), Shutdown::Write);
                return;
            }
            client.deadline = None;
            if client.is_observer {
                client.asked = false;
            } else if !client.keep {
                self.clients.remove(&id);
            }
        }
    }
}

fn peer_of(stream: &GuardedSocket) -> io::Result<ControlPeer> {
    let (uid, pid) = socket::peer_process(stream)?;
    Ok(ControlPeer::new(uid, pid))
}
