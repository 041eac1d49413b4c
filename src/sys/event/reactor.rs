//! Waits for events of sockets with epoll and reports them as completions: the `Reactor`.

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::rc::Rc;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use slab::Slab;

use super::accept::{AcceptSources, FAIR_SHARE, LISTENER_BASE, Taken};
use super::completion::{Completion, Interest, Token};
use super::io_progress::{IoProgress, RECEIVE_BUFFER, UnsentData};
use super::send_buffer::SendBuffer;
use super::socket::Socket;
use crate::sys::rights::{self, GuardedSocket};
use crate::sys::{clone_files, closer, socket as sockets};

/// Events taken from the kernel at once.
const BATCH: usize = 256;

/// The events' data from here up are not connections.
const WATCH_BASE: u64 = u64::MAX - 0xFFFF;

/// Where a stream stands of which nobody knows: behind all that a kernel has counted, so that what was
/// received or sent can't be told by counting from here.
const UNKNOWN: (u64, u64) = (u64::MAX / 2, u64::MAX / 2);

/// Receives the completions of a [`Reactor`].
pub trait Driver {
    /// Called once a turn, after the wait and before the completions: time has passed.
    fn woken(&mut self) {}

    /// Called once for each completion.
    fn complete(&mut self, reactor: &mut Reactor, completion: Completion<'_>);
}

/// The event loop's view of the kernel: one epoll instance and its sockets.
#[derive(Debug)]
pub struct Reactor {
    epoll: Epoll,
    sockets: Slab<Socket>,
    sources: AcceptSources,
    /// Clients may connect over a unix socket.
    has_unix: bool,
    watched: Vec<(u16, OwnedFd)>,
    /// Failures met outside of `poll_once`, told in the next one.
    failures: Vec<(Token, io::Error)>,
    next_tag: u32,
    buffer: &'static mut [u8],
    /// Room for what siblings pass on.
    packet: &'static mut [u8],
    /// Who sees what this reactor does, if anybody.
    witness: Option<IoProgress>,
    events: Vec<EpollEvent>,
    /// Times that a listener was readable and somebody else had taken the connection.
    pub spurious_wakes: u64,
}

impl Reactor {
    /// A reactor with its own epoll: to be made after fork, because an inherited one would be
    /// shared with the parent.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Reactor {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            sockets: Slab::new(),
            sources: AcceptSources::default(),
            has_unix: false,
            watched: Vec::new(),
            failures: Vec::new(),
            next_tag: 0,
            // A reactor lives as long as its process, or its thread.
            buffer: Vec::leak(vec![0; RECEIVE_BUFFER]),
            packet: &mut [],
            witness: None,
            events: vec![EpollEvent::empty(); BATCH],
            spurious_wakes: 0,
        })
    }

    /// Lets a witness see what this reactor does from now on, and receives into `buffer`, which is of the
    /// witness's making. To be called before there is a connection.
    pub fn attach_progress(&mut self, witness: IoProgress, buffer: &'static mut [u8]) {
        self.witness = Some(witness);
        (self.buffer, self.packet) = buffer.split_at_mut(RECEIVE_BUFFER);
    }

    /// Reports `Readable` with the number `watch` while `fd` is ready for what `interest` says
    /// (level-triggered). If this number is watched already, `fd` must be the same.
    ///
    /// # Errors
    /// If epoll refuses it, or no descriptor is left.
    pub fn watch(&mut self, watch: u16, fd: impl AsFd, interest: Interest) -> io::Result<()> {
        let flags = match interest {
            Interest::Read => EpollFlags::EPOLLIN,
            Interest::Write => EpollFlags::EPOLLOUT,
            Interest::Both => EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT,
        };
        let mut event = EpollEvent::new(flags, WATCH_BASE + u64::from(watch));
        if let Some((_, fd)) = self.watched.iter().find(|(number, _)| *number == watch) {
            return Ok(self.epoll.modify(fd, &mut event)?);
        }
        // A duplicate that the reactor owns, so the watch cannot outlive its descriptor.
        let fd = fd.as_fd().try_clone_to_owned()?;
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
    pub fn register(&mut self, socket: OwnedFd) -> io::Result<Token> {
        let socket = GuardedSocket::accepted(socket, self.has_unix, closer::close);
        self.insert_socket(socket, (0, 0), (UnsentData::Nothing, 0))
    }

    /// The same with a socket that another process has used before. The witness sees it with this
    /// note from the beginning, and as one that is owed what came along, until `clear_carried_output` is called.
    ///
    /// # Errors
    /// As of `register`.
    pub fn register_adopted(
        &mut self,
        socket: OwnedFd,
        owed: UnsentData,
        note: u32,
    ) -> io::Result<Token> {
        // Its sender may have cleared the flag.
        sockets::restore_nonblocking(&socket)?;
        let socket = GuardedSocket::received(socket, closer::close);
        let passed = self
            .witness
            .and_then(|_| clone_files::stream_offsets(&socket));
        self.insert_socket(socket, passed.unwrap_or(UNKNOWN), (owed, note))
    }

    /// What came along with a connection is where it belongs.
    pub fn clear_carried_output(&mut self, token: Token) {
        let owes = self.unsent(token) > 0;
        if let Some(witness) = self.witness
            && self.socket(token).is_some()
        {
            witness.owes(
                token,
                if owes {
                    UnsentData::Here
                } else {
                    UnsentData::Nothing
                },
            );
        }
    }

    fn insert_socket(
        &mut self,
        socket: GuardedSocket,
        (received_in_all, sent_in_all): (u64, u64),
        seen: (UnsentData, u32),
    ) -> io::Result<Token> {
        let tag = self.next_tag;
        let entry = self.sockets.vacant_entry();
        let token = Token::new(entry.key(), tag);
        let interest = EpollFlags::EPOLLIN;
        self.epoll
            .add(&socket, EpollEvent::new(interest, token.0))?;
        // The upper end of the numbers belongs to listeners and watches.
        self.next_tag = (tag + 1) % 0xFFFF_0000;
        if let Some(witness) = &self.witness {
            witness.opened(token, socket.as_raw_fd(), seen);
        }
        entry.insert(Socket {
            fd: socket,
            tag,
            interest,
            reading: true,
            ended: false,
            failed: false,
            output_closed: false,
            hung_up: false,
            watched: true,
            unsent: SendBuffer::default(),
            received_in_all,
            sent_in_all,
        });
        Ok(token)
    }

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
        let witness = self.witness;
        let Some(socket) = self.socket(token) else {
            return bytes.clear();
        };
        if socket.failed || socket.output_closed || bytes.is_empty() {
            return bytes.clear();
        }
        if socket.unsent.len() > 0 {
            socket.unsent.append(bytes);
            return bytes.clear();
        }
        if let Some(witness) = &witness {
            witness.begin_send(token, socket.sent_in_all, bytes.len());
        }
        match socket.send_some(bytes) {
            Ok(sent) if sent == bytes.len() => {
                socket.sent_in_all += sent as u64;
                if let Some(witness) = &witness {
                    witness.end_send(sent);
                }
                bytes.clear();
            }
            Ok(sent) => {
                socket.sent_in_all += sent as u64;
                if let Some(witness) = &witness {
                    witness.owes(token, UnsentData::Here);
                }
                socket.unsent.fill(bytes, sent);
                self.update(token);
            }
            Err(error) => {
                bytes.clear();
                if socket.is_closed_unix(error) {
                    self.drop_output(token);
                } else {
                    self.fail(token, error);
                }
            }
        }
    }

    /// Bytes given to `send` that the kernel has not taken.
    pub fn unsent(&self, token: Token) -> usize {
        match self.sockets.get(token.index()) {
            Some(socket) => socket.unsent.len(),
            None => 0,
        }
    }

    /// The memory in bytes that these need.
    pub fn unsent_memory(&self, token: Token) -> usize {
        let socket = self.sockets.get(token.index());
        socket.map_or(0, |socket| socket.unsent.memory())
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
            if let Some(witness) = &self.witness {
                witness.closes(token);
            }
            let socket = self.sockets.remove(token.index());
            // A child of a handler may hold a duplicate for a moment, which would keep the
            // descriptor in epoll: take it out before it is closed (epoll(7), question 6).
            let _ = self.epoll.delete(&socket.fd);
        }
    }

    pub fn descriptor(&self, token: Token) -> Option<&GuardedSocket> {
        let socket = self.sockets.get(token.index())?;
        (Token::new(token.index(), socket.tag) == token).then_some(&socket.fd)
    }

    /// Accepts from `listeners`, and adopts what siblings send through `queue` in packets of at
    /// most `longest` bytes.
    ///
    /// # Errors
    /// If epoll refuses one.
    pub fn listen(
        &mut self,
        listeners: Vec<Rc<OwnedFd>>,
        (queue, longest): (Rc<OwnedFd>, usize),
    ) -> io::Result<()> {
        self.has_unix = listeners.iter().any(|fd| rights::is_unix(&**fd));
        self.sources.set(listeners, queue);
        if self.packet.len() < longest {
            self.packet = Vec::leak(vec![0; longest]);
        }
        self.resume_listeners().map(drop)
    }

    /// Watches the listeners again, after `AcceptFailed` or `pause_listeners`. Returns whether another
    /// process had made one of them wait in accept4(2), which is undone.
    ///
    /// # Errors
    /// If epoll refuses one.
    pub fn resume_listeners(&mut self) -> io::Result<bool> {
        self.sources.resume(&self.epoll)
    }

    /// Accepts nothing until `resume_listeners`. Siblings continue to accept.
    pub fn pause_listeners(&mut self) {
        self.sources.pause(&self.epoll);
    }

    /// Leaves accepting to siblings until `resume_listeners`. Goes on to adopt connections of theirs.
    pub fn leave_listeners(&mut self) {
        self.sources.leave_listeners(&self.epoll);
    }

    /// Adopts connections of siblings, or stops until called again. Listeners stay as they are.
    pub fn set_adopting(&mut self, adopts: bool) {
        self.sources.set_adopting(adopts, &self.epoll);
    }

    /// Whether any listener is watched.
    pub fn is_listening(&self) -> bool {
        self.sources.is_any_watched()
    }

    /// Accepts all connections that wait at the listening sockets and closes those: if the last
    /// owner closed one with connections waiting, they would be reset. The adoption queue is left
    /// at once, or kept with `keep_queue`.
    pub fn drain_accept_queues(&mut self, keep_queue: bool, driver: &mut impl Driver) {
        if !keep_queue {
            self.sources.pause_queue(&self.epoll);
        }
        let mut before = usize::MAX;
        while self.is_listening() && self.connections() != before {
            before = self.connections();
            self.try_accept(driver);
        }
        self.pause_listeners();
        self.sources.leave(keep_queue);
        // If memory is short, what is in the queue ends with its last owner.
        let _ = self.resume_listeners();
    }

    /// Accepts a bounded number of waiting connections from every watched listener: a sibling that
    /// was stopped may have swallowed the wake-up.
    pub fn try_accept(&mut self, driver: &mut impl Driver) {
        let _ = self.sources.restore_nonblocking();
        for index in 0..self.sources.len() {
            if self.sources.is_watched(index) {
                self.accept(index, driver);
            }
        }
    }

    fn accept(&mut self, index: usize, driver: &mut impl Driver) {
        for round in 0..FAIR_SHARE {
            // Taken out, because the driver gets the reactor while it reads the packet.
            let packet = mem::take(&mut self.packet);
            let taken = self
                .sources
                .take(index, packet, self.witness.as_ref(), &self.epoll);
            match taken {
                Taken::Fresh(socket) => {
                    self.packet = packet;
                    driver.complete(self, Completion::Accepted { socket });
                }
                Taken::Adopted(socket, length, rest) => {
                    let completion = Completion::Adopted {
                        socket,
                        packet: &packet[..length],
                        rest,
                    };
                    driver.complete(self, completion);
                    self.packet = packet;
                }
                Taken::Gone => self.packet = packet,
                Taken::Paused => {
                    self.packet = packet;
                    return;
                }
                Taken::Nothing => {
                    self.packet = packet;
                    self.spurious_wakes += u64::from(round == 0);
                    return;
                }
                Taken::Failed(error) => {
                    self.packet = packet;
                    let error = error.into();
                    return driver.complete(self, Completion::AcceptFailed { error });
                }
            }
        }
    }

    /// Waits at most `timeout_ms` and tells `driver` what has happened. Returns whether more may
    /// have happened than fits one turn.
    ///
    /// # Errors
    /// When epoll_wait(2) fails, other than by a signal.
    pub fn poll_once(&mut self, timeout_ms: u64, driver: &mut impl Driver) -> io::Result<bool> {
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
        let buffer = mem::take(&mut self.buffer);
        for event in &events[..ready] {
            let data = event.data();
            if data >= WATCH_BASE {
                let watch = (data - WATCH_BASE) as u16;
                driver.complete(self, Completion::Readable { watch });
            } else if data >= LISTENER_BASE {
                self.accept((data - LISTENER_BASE) as usize, driver);
            } else {
                self.serve(Token(data), event.events(), buffer, driver);
            }
        }
        self.buffer = buffer;
        self.events = events;
        for (token, error) in mem::take(&mut self.failures) {
            driver.complete(self, Completion::Failed { token, error });
        }
        Ok(ready == BATCH)
    }

    fn serve(
        &mut self,
        token: Token,
        flags: EpollFlags,
        buffer: &mut [u8],
        driver: &mut impl Driver,
    ) {
        let witness = self.witness;
        let broken = flags.intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP);
        let hung_up = broken && !flags.contains(EpollFlags::EPOLLERR);
        if hung_up {
            self.drop_output(token);
        } else if flags.contains(EpollFlags::EPOLLOUT) {
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
            if let Some(witness) = &witness {
                witness.begin_recv(token, socket.received_in_all);
            }
            // EBADMSG: descriptors are attached, so the connection ends.
            match socket.fd.receive(buffer) {
                Ok(0) => {
                    if let Some(witness) = &witness {
                        witness.end_recv(0);
                    }
                    socket.ended = true;
                    self.update(token);
                    driver.complete(self, Completion::Ended { token });
                }
                Ok(length) => {
                    if let Some(witness) = &witness {
                        witness.end_recv(length);
                    }
                    socket.received_in_all += length as u64;
                    let bytes = &buffer[..length];
                    driver.complete(self, Completion::Received { token, bytes });
                }
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(error) => self.fail(token, error),
            }
            if let Some(witness) = &witness {
                witness.clear_recv();
            }
        } else if broken && !hung_up {
            self.fail(token, Errno::ECONNRESET);
        }
        if hung_up {
            self.tell_hang_up(token, driver);
        }
    }

    fn send_unsent(&mut self, token: Token, driver: &mut impl Driver) {
        let witness = self.witness;
        let Some(socket) = self.socket(token).filter(|socket| !socket.failed) else {
            return;
        };
        match socket.send_some(socket.unsent.pending()) {
            Ok(sent) => {
                socket.unsent.consume(sent);
                socket.sent_in_all += sent as u64;
                if socket.unsent.len() == 0 {
                    if let Some(witness) = &witness {
                        witness.owes(token, UnsentData::Nothing);
                    }
                    self.update(token);
                }
                if sent > 0 {
                    driver.complete(self, Completion::Sent { token });
                }
            }
            Err(error) if socket.is_closed_unix(error) => {
                self.drop_output(token);
                driver.complete(self, Completion::Sent { token });
            }
            Err(error) => self.fail(token, error),
        }
    }

    /// The peer has closed the connection. That is told once everything was read, or if it is not read
    /// at the moment.
    fn tell_hang_up(&mut self, token: Token, driver: &mut impl Driver) {
        let Some(socket) = self.socket(token).filter(|socket| !socket.failed) else {
            return;
        };
        let is_read = socket.reading && !socket.ended;
        if !is_read && !socket.hung_up {
            socket.hung_up = true;
            self.update(token);
            driver.complete(self, Completion::HungUp { token });
        }
    }

    /// Drops what was to be sent, and from now on whatever is to be sent: the peer takes nothing.
    fn drop_output(&mut self, token: Token) {
        let witness = self.witness;
        let Some(socket) = self.socket(token).filter(|socket| !socket.output_closed) else {
            return;
        };
        socket.output_closed = true;
        socket.unsent = SendBuffer::default();
        if let Some(witness) = &witness {
            witness.owes(token, UnsentData::Nothing);
        }
        self.update(token);
    }

    /// Remembers a failure, to be told at the end of the turn: `send` is called by the driver,
    /// which must not be called from within.
    fn fail(&mut self, token: Token, error: Errno) {
        if let Some(socket) = self.socket(token) {
            socket.failed = true;
            socket.ended = true;
            socket.unsent = SendBuffer::default();
            // EPOLLERR and EPOLLHUP can't be masked: out of epoll altogether.
            let _ = self.epoll.delete(&self.sockets[token.index()].fd);
            self.failures.push((token, error.into()));
        }
    }

    fn update(&mut self, token: Token) {
        let Some(socket) = self.socket(token).filter(|socket| !socket.failed) else {
            return;
        };
        let wanted = socket.wanted();
        let is_watched = !socket.hung_up || wanted.contains(EpollFlags::EPOLLIN);
        let was_watched = mem::replace(&mut socket.watched, is_watched);
        let before = mem::replace(&mut socket.interest, wanted);
        let mut event = EpollEvent::new(wanted, token.0);
        let fd = &self.sockets[token.index()].fd;
        let changed = match (was_watched, is_watched) {
            (true, true) if wanted == before => Ok(()),
            (true, true) => self.epoll.modify(fd, &mut event),
            (true, false) => self.epoll.delete(fd),
            (false, true) => self.epoll.add(fd, event),
            (false, false) => Ok(()),
        };
        if let Err(error) = changed {
            self.fail(token, error);
        }
    }

    fn socket(&mut self, token: Token) -> Option<&mut Socket> {
        self.sockets
            .get_mut(token.index())
            .filter(|socket| Token::new(token.index(), socket.tag) == token)
    }
}
