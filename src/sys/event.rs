//! The event floor: sockets, in completions, over epoll.
//!
//! Above it nobody knows of readiness. It says that a connection was accepted, that these bytes
//! were received, that so many were sent; received bytes are lent for the length of the call, so
//! that an idle connection owns no buffer. io_uring can serve the same words.
//!
//! Three rules keep it from spinning: interest in writing lives only while something waits to be
//! written, a connection whose end was seen is not read again, and a listener that can't accept
//! (no descriptor left) is taken out until `resume_listeners`. Errors of one connection are a
//! completion; only `Floor::new` and `turn` fail, when epoll itself does.

#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::rc::Rc;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{MsgFlags, SockFlag, accept4, recv, send};
use slab::Slab;

/// Bytes read at once, for all connections of a worker together.
const RECEIVE_BUFFER: usize = 64 * 1024;
/// Events taken from the kernel at once.
const BATCH: usize = 256;
/// Accepts after which a worker goes to the end of the kernel's queue of waiters. EPOLLEXCLUSIVE
/// wakes the first of that queue, so without this one worker would get all that comes slowly;
/// a smaller number is fairer, and costs two epoll_ctl(2) per that many accepts.
const FAIR_SHARE: u32 = 8;

/// The events' data above this value are not connections.
const WATCH_BASE: u64 = u64::MAX - 0xFFFF;
const LISTENER_BASE: u64 = u64::MAX - 0xFF_FFFF;

/// A connection of a floor. Never reused: its lower half is a place, its upper half a count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(u64);

impl Token {
    /// The place of this connection: small, dense, and reused after it was closed.
    pub fn index(self) -> usize {
        (self.0 & 0xFFFF_FFFF) as usize
    }

    /// A token of no floor, for tests of what only keeps it.
    #[cfg(test)]
    pub fn for_test(index: usize) -> Self {
        Token::new(index, 0)
    }

    fn new(index: usize, tag: u32) -> Self {
        Token(u64::from(tag) << 32 | index as u64)
    }
}

/// What has happened.
#[derive(Debug)]
pub enum Completion<'a> {
    /// A client has connected; `Floor::adopt` makes a connection of it.
    Accepted {
        /// Its socket.
        socket: OwnedFd,
    },
    /// The system can't accept at the moment (EMFILE, ENFILE, ENOBUFS, ENOMEM). No listener is
    /// watched until `Floor::resume_listeners`.
    AcceptFailed {
        /// What it answered.
        error: io::Error,
    },
    /// Bytes have come, lent until the call returns.
    Received {
        /// From whom.
        token: Token,
        /// What.
        bytes: &'a [u8],
    },
    /// The peer sends no more, but may still read.
    Ended {
        /// The connection.
        token: Token,
    },
    /// Some of what waited has been sent; `Floor::unsent` tells what is left.
    Sent {
        /// The connection.
        token: Token,
    },
    /// The connection is broken; nothing can be sent or received. It has to be closed.
    Failed {
        /// The connection.
        token: Token,
        /// How.
        error: io::Error,
    },
    /// A watched descriptor is readable.
    Readable {
        /// The number it was watched under.
        watch: u16,
    },
}

/// Who is told.
pub trait Driver {
    /// Called once a turn, after the wait and before the completions: time has passed.
    fn woken(&mut self) {}

    /// Called once for each completion.
    fn complete(&mut self, floor: &mut Floor, completion: Completion<'_>);
}

/// One connection's socket.
#[derive(Debug)]
struct Socket {
    fd: OwnedFd,
    tag: u32,
    /// What epoll watches for; always what `wanted` says after a change.
    interest: EpollFlags,
    reading: bool,
    /// The peer's end was seen; there is nothing more to read, ever.
    ended: bool,
    /// A failure was told or is about to be.
    failed: bool,
    /// What the kernel did not take yet, from `sent` on.
    unsent: Vec<u8>,
    sent: usize,
}

impl Socket {
    fn wanted(&self) -> EpollFlags {
        let mut wanted = EpollFlags::empty();
        if self.reading && !self.ended {
            wanted |= EpollFlags::EPOLLIN;
        }
        if self.sent < self.unsent.len() {
            wanted |= EpollFlags::EPOLLOUT;
        }
        wanted
    }
}

/// A listening socket, shared with the sibling workers.
#[derive(Debug)]
struct Listener {
    fd: Rc<OwnedFd>,
    watched: bool,
    /// Accepts since this worker last went to the end of the queue.
    accepts: u32,
}

/// The event floor of one worker.
#[derive(Debug)]
pub struct Floor {
    epoll: Epoll,
    sockets: Slab<Socket>,
    listeners: Vec<Listener>,
    watched: Vec<(u16, OwnedFd)>,
    /// Failures met outside of `turn`, told in the next one.
    failures: Vec<(Token, io::Error)>,
    next_tag: u32,
    buffer: Box<[u8]>,
    events: Vec<EpollEvent>,
    /// Times that a listener was readable and somebody else had taken the connection.
    pub spurious_wakes: u64,
}

impl Floor {
    /// A floor with its own epoll: to be made after fork, because an inherited one would be
    /// shared with the parent.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Floor {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            sockets: Slab::new(),
            listeners: Vec::new(),
            watched: Vec::new(),
            failures: Vec::new(),
            next_tag: 0,
            buffer: vec![0; RECEIVE_BUFFER].into_boxed_slice(),
            events: vec![EpollEvent::empty(); BATCH],
            spurious_wakes: 0,
        })
    }

    /// Takes part in accepting from `listeners`.
    ///
    /// # Errors
    /// When epoll refuses one.
    pub fn listen(&mut self, listeners: Vec<Rc<OwnedFd>>) -> io::Result<()> {
        self.listeners = listeners
            .into_iter()
            .map(|fd| Listener {
                fd,
                watched: false,
                accepts: 0,
            })
            .collect();
        self.resume_listeners()
    }

    /// Watches the listeners again, after `AcceptFailed` or `pause_listeners`.
    ///
    /// # Errors
    /// When epoll refuses one.
    pub fn resume_listeners(&mut self) -> io::Result<()> {
        for index in 0..self.listeners.len() {
            if !self.listeners[index].watched {
                self.watch_listener(index)?;
            }
        }
        Ok(())
    }

    /// Accepts nothing until `resume_listeners`; the siblings go on.
    pub fn pause_listeners(&mut self) {
        for listener in &mut self.listeners {
            if mem::take(&mut listener.watched) {
                let _ = self.epoll.delete(listener.fd.as_fd());
            }
        }
    }

    /// Accepts nothing more, ever. Only this process's descriptors are closed.
    pub fn close_listeners(&mut self) {
        self.pause_listeners();
        self.listeners.clear();
    }

    /// Whether any listener is watched.
    pub fn is_listening(&self) -> bool {
        self.listeners.iter().any(|listener| listener.watched)
    }

    fn watch_listener(&mut self, index: usize) -> io::Result<()> {
        let listener = &mut self.listeners[index];
        // EPOLLEXCLUSIVE can't be changed by EPOLL_CTL_MOD: leaving and joining is the only way.
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLEXCLUSIVE;
        let event = EpollEvent::new(flags, LISTENER_BASE + index as u64);
        self.epoll.add(listener.fd.as_fd(), event)?;
        listener.watched = true;
        listener.accepts = 0;
        Ok(())
    }

    /// Tells of `fd` being readable, under the number `watch`; it is level-triggered.
    ///
    /// # Errors
    /// When epoll refuses it or there is no descriptor left.
    pub fn watch(&mut self, watch: u16, fd: impl AsFd) -> io::Result<()> {
        // A duplicate that the floor owns: the watch can't outlive the descriptor it is for.
        let fd = fd.as_fd().try_clone_to_owned()?;
        let event = EpollEvent::new(EpollFlags::EPOLLIN, WATCH_BASE + u64::from(watch));
        self.epoll.add(&fd, event)?;
        self.watched.push((watch, fd));
        Ok(())
    }

    /// Stops watching what is watched under `watch`.
    pub fn unwatch(&mut self, watch: u16) {
        self.watched.retain(|(number, fd)| {
            let found = *number == watch;
            if found {
                let _ = self.epoll.delete(fd);
            }
            !found
        });
    }

    /// Makes a connection of a client's socket, which has to be non-blocking, and reads from it.
    ///
    /// # Errors
    /// When epoll refuses it (ENOMEM, ENOSPC); the socket is closed then.
    pub fn adopt(&mut self, socket: OwnedFd) -> io::Result<Token> {
        let tag = self.next_tag;
        let entry = self.sockets.vacant_entry();
        let token = Token::new(entry.key(), tag);
        let interest = EpollFlags::EPOLLIN;
        self.epoll
            .add(&socket, EpollEvent::new(interest, token.0))?;
        // The upper end of the numbers belongs to listeners and watches.
        self.next_tag = (tag + 1) % 0xFFFF_0000;
        entry.insert(Socket {
            fd: socket,
            tag,
            interest,
            reading: true,
            ended: false,
            failed: false,
            unsent: Vec::new(),
            sent: 0,
        });
        Ok(token)
    }

    /// Connections that are open.
    pub fn connections(&self) -> usize {
        self.sockets.len()
    }

    /// Reads from a connection, or leaves what comes in the kernel so that the peer is held back.
    pub fn set_reading(&mut self, token: Token, reading: bool) {
        if let Some(socket) = self.socket(token)
            && socket.reading != reading
        {
            socket.reading = reading;
            self.update(token);
        }
    }

    /// Sends `bytes`, after what still waits. What the kernel does not take at once is kept, and
    /// told by `Sent` when it goes; `bytes` comes back empty, its capacity where it was not
    /// needed.
    pub fn send(&mut self, token: Token, bytes: &mut Vec<u8>) {
        let Some(socket) = self.socket(token) else {
            return bytes.clear();
        };
        if socket.failed || bytes.is_empty() {
            return bytes.clear();
        }
        if socket.sent < socket.unsent.len() {
            // A peer that always leaves something unread must not make the sent part pile up.
            if socket.sent > socket.unsent.len() / 2 {
                socket.unsent.drain(..mem::take(&mut socket.sent));
            }
            socket.unsent.extend_from_slice(bytes);
            return bytes.clear();
        }
        match send_some(socket, bytes) {
            Ok(sent) if sent == bytes.len() => bytes.clear(),
            Ok(sent) => {
                socket.unsent = mem::take(bytes);
                socket.sent = sent;
                self.update(token);
            }
            Err(error) => {
                bytes.clear();
                self.fail(token, error);
            }
        }
    }

    /// Bytes given to `send` that the kernel has not taken.
    pub fn unsent(&self, token: Token) -> usize {
        match self.sockets.get(token.index()) {
            Some(socket) => socket.unsent.len() - socket.sent,
            None => 0,
        }
    }

    /// Tells the peer that nothing more will come (shutdown(2)).
    pub fn shutdown(&mut self, token: Token) {
        if let Some(socket) = self.socket(token) {
            let _ = nix::sys::socket::shutdown(
                socket.fd.as_raw_fd(),
                nix::sys::socket::Shutdown::Write,
            );
        }
    }

    /// Closes a connection; what was not sent is lost.
    pub fn close(&mut self, token: Token) {
        if self.socket(token).is_some() {
            let socket = self.sockets.remove(token.index());
            // A child of a handler may hold a duplicate for a moment, which would keep the
            // descriptor in epoll: take it out before it is closed (epoll(7), question 6).
            let _ = self.epoll.delete(&socket.fd);
        }
    }

    /// The socket of a connection.
    pub fn descriptor(&self, token: Token) -> Option<&OwnedFd> {
        let socket = self.sockets.get(token.index())?;
        (Token::new(token.index(), socket.tag) == token).then_some(&socket.fd)
    }

    /// Waits at most `timeout_ms` and tells `driver` what has happened.
    ///
    /// # Errors
    /// When epoll_wait(2) fails, other than by a signal.
    pub fn turn(&mut self, timeout_ms: u64, driver: &mut impl Driver) -> io::Result<()> {
        let timeout = if self.failures.is_empty() {
            u16::try_from(timeout_ms).unwrap_or(u16::MAX)
        } else {
            0
        };
        let mut events = mem::take(&mut self.events);
        let ready = match self.epoll.wait(&mut events, EpollTimeout::from(timeout)) {
            Ok(ready) => ready,
            Err(Errno::EINTR) => 0,
            Err(error) => {
                self.events = events;
                return Err(error.into());
            }
        };
        driver.woken();
        let mut buffer = mem::take(&mut self.buffer);
        for event in &events[..ready] {
            let data = event.data();
            if data >= WATCH_BASE {
                let watch = (data - WATCH_BASE) as u16;
                driver.complete(self, Completion::Readable { watch });
            } else if data >= LISTENER_BASE {
                self.accept((data - LISTENER_BASE) as usize, driver);
            } else {
                self.serve(Token(data), event.events(), &mut buffer, driver);
            }
        }
        self.buffer = buffer;
        self.events = events;
        for (token, error) in mem::take(&mut self.failures) {
            driver.complete(self, Completion::Failed { token, error });
        }
        Ok(())
    }

    /// Accepts whatever waits, a bounded number, from every watched listener: a sibling that was
    /// stopped may have swallowed the wake-up.
    pub fn try_accept(&mut self, driver: &mut impl Driver) {
        for index in 0..self.listeners.len() {
            if self.listeners.get(index).is_some_and(|l| l.watched) {
                self.accept(index, driver);
            }
        }
    }

    fn accept(&mut self, index: usize, driver: &mut impl Driver) {
        for round in 0..FAIR_SHARE {
            // The driver may have closed or paused the listeners in between.
            let Some(listener) = self.listeners.get_mut(index).filter(|l| l.watched) else {
                return;
            };
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            match accept4(listener.fd.as_raw_fd(), flags) {
                Ok(fd) => {
                    // SAFETY: accept4 has just made this descriptor, nobody else owns it.
                    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
                    listener.accepts += 1;
                    if listener.accepts >= FAIR_SHARE {
                        self.go_to_the_end(index);
                    }
                    driver.complete(self, Completion::Accepted { socket });
                }
                Err(Errno::EAGAIN) => {
                    self.spurious_wakes += u64::from(round == 0);
                    return;
                }
                // The connection was gone before we came, or its network was: the next one.
                Err(
                    Errno::EINTR
                    | Errno::ECONNABORTED
                    | Errno::ENETDOWN
                    | Errno::EPROTO
                    | Errno::ENOPROTOOPT
                    | Errno::EHOSTDOWN
                    | Errno::ENONET
                    | Errno::EHOSTUNREACH
                    | Errno::EOPNOTSUPP
                    | Errno::ENETUNREACH
                    | Errno::EPERM,
                ) => {}
                Err(error) => {
                    // Left in, a level-triggered listener would spin at 100 %.
                    self.pause_listeners();
                    let error = error.into();
                    return driver.complete(self, Completion::AcceptFailed { error });
                }
            }
        }
    }

    fn go_to_the_end(&mut self, index: usize) {
        let _ = self.epoll.delete(self.listeners[index].fd.as_fd());
        self.listeners[index].watched = false;
        // Refused for want of memory: the next tick's `resume_listeners` tries again.
        let _ = self.watch_listener(index);
    }

    fn serve(
        &mut self,
        token: Token,
        flags: EpollFlags,
        buffer: &mut [u8],
        driver: &mut impl Driver,
    ) {
        let broken = flags.intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP);
        if flags.contains(EpollFlags::EPOLLOUT) {
            self.send_unsent(token, driver);
        }
        let Some(socket) = self.socket(token) else {
            return;
        };
        if socket.failed {
            return;
        }
        // What came before the end is read first; the end itself then comes as an error or as
        // zero bytes.
        if socket.reading && !socket.ended && (broken || flags.contains(EpollFlags::EPOLLIN)) {
            match recv(socket.fd.as_raw_fd(), buffer, MsgFlags::empty()) {
                Ok(0) => {
                    socket.ended = true;
                    self.update(token);
                    driver.complete(self, Completion::Ended { token });
                }
                Ok(length) => {
                    let bytes = &buffer[..length];
                    driver.complete(self, Completion::Received { token, bytes });
                }
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(error) => self.fail(token, error),
            }
        } else if broken {
            self.fail(token, Errno::ECONNRESET);
        }
    }

    fn send_unsent(&mut self, token: Token, driver: &mut impl Driver) {
        let Some(socket) = self.socket(token).filter(|socket| !socket.failed) else {
            return;
        };
        let unsent = mem::take(&mut socket.unsent);
        match send_some(socket, &unsent[socket.sent..]) {
            Ok(sent) => {
                socket.sent += sent;
                if socket.sent < unsent.len() {
                    socket.unsent = unsent;
                } else {
                    socket.sent = 0;
                    self.update(token);
                }
                if sent > 0 {
                    driver.complete(self, Completion::Sent { token });
                }
            }
            Err(error) => {
                socket.sent = 0;
                self.fail(token, error);
            }
        }
    }

    /// Remembers a failure, to be told at the end of the turn: `send` is called by the driver,
    /// which must not be called from within.
    fn fail(&mut self, token: Token, error: Errno) {
        if let Some(socket) = self.socket(token) {
            socket.failed = true;
            socket.ended = true;
            socket.unsent = Vec::new();
            socket.sent = 0;
            // EPOLLERR and EPOLLHUP can't be masked: out of epoll altogether.
            let _ = self.epoll.delete(&self.sockets[token.index()].fd);
            self.failures.push((token, error.into()));
        }
    }

    fn update(&mut self, token: Token) {
        let Some(socket) = self.socket(token) else {
            return;
        };
        let wanted = socket.wanted();
        if wanted != socket.interest && !socket.failed {
            socket.interest = wanted;
            let mut event = EpollEvent::new(wanted, token.0);
            let index = token.index();
            if let Err(error) = self.epoll.modify(&self.sockets[index].fd, &mut event) {
                self.fail(token, error);
            }
        }
    }

    fn socket(&mut self, token: Token) -> Option<&mut Socket> {
        self.sockets
            .get_mut(token.index())
            .filter(|socket| Token::new(token.index(), socket.tag) == token)
    }
}

/// Sends what the kernel takes now: 0 when it is full.
fn send_some(socket: &Socket, bytes: &[u8]) -> Result<usize, Errno> {
    loop {
        // MSG_NOSIGNAL: whether SIGPIPE is ignored is the host program's affair.
        return match send(socket.fd.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL) {
            Err(Errno::EINTR) => continue,
            Err(Errno::EAGAIN) => Ok(0),
            other => other,
        };
    }
}

#[cfg(test)]
#[path = "event_tests.rs"]
mod tests;
