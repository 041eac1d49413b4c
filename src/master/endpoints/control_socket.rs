//! The control socket: one JSON line asks, one JSON line answers.
//!
//! For people's commands, so a few clients at a time; each is read and written without waiting,
//! and given up when it dawdles. Only the master's own user and root are let in, by the socket's
//! mode and by who the kernel says is there. What a request does is the master's affair.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{MsgFlags, send};
use serde::{Deserialize, Serialize};

use super::listeners::bind_path;
use super::owned_path::OwnedPath;
use super::pid_file::make_directory;
use crate::error::{Error, Result};
use crate::master::policy::event::Millis;
use crate::protocol::control::{ControlRequest, ControlResponse, to_line};
use crate::sys::account::effective_ids;
use crate::sys::closer::close_in_child;
use crate::sys::rights::{self, GuardedSocket};
use crate::sys::socket;
use crate::throttle::limiter::SharedLimiter;

/// Clients at one time; more wait in the socket's queue.
const MOST_CLIENTS: usize = 32;
/// The longest request, in bytes: it may hold a path.
const LONGEST_REQUEST: usize = 16_384;
/// How long a client may take to ask, and then to take its answer.
const CLIENT_TIMEOUT_MS: Millis = 5000;
/// Between two tries to let somebody in when the system had no descriptor left.
const RETRY_MS: Millis = 200;

/// Names a client of the control socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClientId(pub(crate) u64);

#[derive(Debug)]
struct ControlClient {
    stream: GuardedSocket,
    received: Vec<u8>,
    /// What it has not taken yet of its answer.
    unsent: Vec<u8>,
    asked: bool,
    /// It sends nothing more, and may wait for its answer.
    ended: bool,
    /// Closed once its answer is sent; a `stop` keeps it, for its end tells of the master's.
    keep: bool,
    deadline: Option<Millis>,
}

#[derive(Debug)]
pub struct ControlSocket {
    path: OwnedPath,
    listener: UnixListener,
    clients: BTreeMap<ClientId, ControlClient>,
    next: u64,
    /// Nobody is let in before: the system could not.
    closed_until: Millis,
}

/// The control socket as it crosses an upgrade.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlState {
    pub path: OwnedPath,
    /// Its descriptor's number.
    pub fd: RawFd,
    /// The number that the next client gets.
    pub next: u64,
    pub clients: Vec<ClientState>,
}

/// A client of the control socket, likewise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientState {
    /// Its number.
    pub id: u64,
    /// Its descriptor's number.
    pub fd: RawFd,
    /// What it has sent of its request.
    pub received: Vec<u8>,
    /// What it has not taken yet of its answer.
    pub unsent: Vec<u8>,
    pub asked: bool,
    /// Whether it sends nothing more.
    pub ended: bool,
    /// Whether it stays once it is answered.
    pub keep: bool,
    /// When it is given up.
    pub deadline: Option<Millis>,
}

impl ControlSocket {
    /// Binds the socket. To be called under the pid file's lock.
    ///
    /// # Errors
    /// When the path can't be bound.
    pub fn bind(path: &Path) -> Result<Self> {
        if let Some(directory) = path.parent() {
            make_directory(directory)?;
        }
        let refused = |error: io::Error| {
            let remedy = if error.kind() == io::ErrorKind::AddrInUse {
                "another master answers there: start a second server with --name NAME, or set \
                 pid-file and control-socket; else stop the other one"
            } else {
                "name a place that this user may write to in control-socket"
            };
            let attempt = format!("make the control socket {}", path.display());
            Error::system_with(attempt, error, remedy)
        };
        let fd = bind_path(path, Some(0o600)).map_err(refused)?;
        socket::start_listening(&fd, 16).map_err(refused)?;
        Ok(ControlSocket {
            path: OwnedPath::of(path),
            listener: fd.into(),
            clients: BTreeMap::new(),
            next: 0,
            closed_until: 0,
        })
    }

    /// What the program after this one has to know.
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
            clients: self.clients.iter().map(client).collect(),
        }
    }

    /// What the program before this one has left; `take` gives the descriptors.
    ///
    /// # Errors
    /// Those of `take`.
    pub fn import(
        state: ControlState,
        mut take: impl FnMut(RawFd) -> Result<OwnedFd>,
    ) -> Result<Self> {
        let mut clients = BTreeMap::new();
        for client in state.clients {
            let stream = GuardedSocket::new(take(client.fd)?, close_in_child);
            let ClientState {
                id,
                fd: _,
                received,
                unsent,
                asked,
                ended,
                keep,
                deadline,
            } = client;
            let client = ControlClient {
                stream,
                received,
                unsent,
                asked,
                ended,
                keep,
                deadline,
            };
            clients.insert(ClientId(id), client);
        }
        let listener = take(state.fd)?;
        // Older versions did not.
        rights::refuse(&listener);
        Ok(ControlSocket {
            path: state.path,
            listener: listener.into(),
            clients,
            next: state.next,
            closed_until: 0,
        })
    }

    /// Makes the socket again where somebody has removed its path. Who is connected stays, and who
    /// waits to be let in is. To be called under the pid file's lock.
    pub fn renew(&mut self, now: Millis) {
        let path = AsRef::<Path>::as_ref(&self.path).to_owned();
        let name = path.display();
        let what = "the control socket was: it is left alone, and no command finds this master; remove it \
                    and reload with a HUP";
        if !self.path.warn_if_replaced(&name, what) {
            return;
        }
        match ControlSocket::bind(&path) {
            Ok(made) => {
                // Bounded by the old socket's queue, which nobody can join any more.
                while self.accept(now) {}
                self.listener = made.listener;
                self.path = made.path;
                log::warn!("somebody has removed the control socket {name}: it is made again");
            }
            Err(error) => log::warn!(
                "somebody has removed the control socket, and it can't be made again: {error}"
            ),
        }
    }

    pub fn remove(&self) {
        self.path.remove();
    }

    /// The listening socket, unless as many clients as allowed are there or the system could not
    /// let one in just now.
    pub fn listener(&self, now: Millis) -> Option<BorrowedFd<'_>> {
        (self.clients.len() < MOST_CLIENTS && now >= self.closed_until)
            .then(|| self.listener.as_fd())
    }

    /// The clients, and what each has to be polled for.
    pub fn clients(&self) -> impl Iterator<Item = (ClientId, BorrowedFd<'_>, PollFlags)> {
        self.clients.iter().map(|(id, client)| {
            let wanted = if !client.unsent.is_empty() {
                PollFlags::POLLOUT
            } else if client.ended {
                // Its leaving altogether is told all the same (POLLHUP).
                PollFlags::empty()
            } else {
                PollFlags::POLLIN
            };
            (*id, client.stream.as_fd(), wanted)
        })
    }

    /// When the first client has to be given up, or others may come again.
    pub fn next_deadline(&self, now: Millis) -> Option<Millis> {
        self.clients
            .values()
            .filter_map(|client| client.deadline)
            .chain(Some(self.closed_until).filter(|&until| until > now))
            .min()
    }

    /// Gives up who dawdles.
    pub fn expire(&mut self, now: Millis) {
        self.clients
            .retain(|_, client| client.deadline.is_none_or(|deadline| deadline > now));
    }

    /// Takes one new client, and says whether there was one.
    pub fn accept(&mut self, now: Millis) -> bool {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if is_transient(&error) => return false,
            Err(error) => {
                // Left in, it would be readable all the time, and the master would spin.
                self.closed_until = now + RETRY_MS;
                log::debug!("the control socket can't let anybody in: {error}");
                return false;
            }
        };
        let is_nonblocking = stream.set_nonblocking(true).is_ok();
        // Before it may be turned away: that closes it.
        let stream = GuardedSocket::new(stream.into(), close_in_child);
        let user = socket::peer_user(&stream);
        let (own, _) = effective_ids();
        if !user.as_ref().is_ok_and(|&user| user == 0 || user == own) {
            static REFUSED: SharedLimiter = SharedLimiter::new();
            let text =
                format!("a client of the control socket was turned away: its user is {user:?}");
            REFUSED.log(log::Level::Warn, text);
            return true;
        }
        if !is_nonblocking {
            return true;
        }
        let id = ClientId(self.next);
        self.next += 1;
        self.clients.insert(
            id,
            ControlClient {
                stream,
                received: Vec::new(),
                unsent: Vec::new(),
                asked: false,
                ended: false,
                keep: false,
                deadline: Some(now + CLIENT_TIMEOUT_MS),
            },
        );
        true
    }

    /// A client is ready: sends it what waits, or reads what it asks.
    pub fn serve(&mut self, id: ClientId, now: Millis) -> Option<ControlRequest> {
        let client = self.clients.get_mut(&id)?;
        if !client.unsent.is_empty() {
            self.send(id);
            return None;
        }
        let mut bytes = [0; 1024];
        // EBADMSG: descriptors are attached, so the client is given up.
        match client.stream.receive(&mut bytes) {
            Ok(0) if client.asked && !client.ended => {
                client.ended = true;
                return None;
            }
            // It has left.
            Ok(0) => {
                self.clients.remove(&id);
                return None;
            }
            Ok(length) => client.received.extend_from_slice(&bytes[..length]),
            Err(Errno::EAGAIN | Errno::EINTR) => return None,
            Err(_) => {
                self.clients.remove(&id);
                return None;
            }
        }
        if client.asked || client.received.len() > LONGEST_REQUEST {
            self.clients.remove(&id);
            return None;
        }
        let end = client.received.iter().position(|&byte| byte == b'\n')?;
        client.asked = true;
        client.deadline = None;
        match serde_json::from_slice(&client.received[..end]) {
            Ok(request) => Some(request),
            Err(error) => {
                let text = format!("this master does not know that command: {error}");
                self.answer(id, &ControlResponse::refused(text, 64), now);
                None
            }
        }
    }

    /// Answers a client, and closes it once it has the answer.
    pub fn answer(&mut self, id: ClientId, response: &ControlResponse, now: Millis) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.unsent = to_line(response).unwrap_or_default();
            client.deadline = Some(now + CLIENT_TIMEOUT_MS);
            self.send(id);
        }
    }

    /// Answers a client that stays until the master leaves.
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
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        match send(client.stream.as_raw_fd(), &client.unsent, flags) {
            Ok(sent) => drop(client.unsent.drain(..sent)),
            Err(Errno::EAGAIN | Errno::EINTR) => return,
            Err(_) => drop(self.clients.remove(&id)),
        }
        if let Some(client) = self.clients.get_mut(&id)
            && client.unsent.is_empty()
        {
            client.deadline = None;
            if !client.keep {
                self.clients.remove(&id);
            }
        }
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
