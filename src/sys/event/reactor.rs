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
use super::io_progress::{IoProgress, PendingAccept, RECEIVE_BUFFER, UnsentData, receive_buffer};
use super::send_buffer::SendBuffer;
use super::socket::Socket;
use crate::sys::rights::{self, GuardedSocket};
use crate::sys::{clone_files, closer, socket as sockets};

/// The largest number of events taken from the kernel at once.
const BATCH: usize = 256;
/// The largest number of rounds in which accept queues are drained. A round accepts up to `FAIR_SHARE` connections of
/// each listener.
const MOST_ROUNDS: usize = 8192;

/// Event data from here up belong to watches, not to connections.
const WATCH_BASE: u64 = u64::MAX - 0xFFFF;

/// The stream position of an adopted connection. No count of the kernel is as large, so a calculation with it cannot
/// give a plausible result.
const UNKNOWN: (u64, u64) = (u64::MAX / 2, u64::MAX / 2);

/// Receives the completions of a [`Reactor`].
pub trait Driver {
    /// Called once per turn, after the wait and before the completions, because time has passed.
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
    /// Whether clients may connect over a unix socket.
    has_unix: bool,
    watched: Vec<(u16, OwnedFd)>,
    /// Failures that occurred outside `poll_once`; the next `poll_once` reports them.
    failures: Vec<(Token, io::Error)>,
    next_tag: u32,
    buffer: &'static mut [u8],
    /// Receives the packets of siblings.
    packet: &'static mut [u8],
    /// Where the current I/O is recorded, if at all.
    progress: Option<IoProgress>,
    events: Vec<EpollEvent>,
    /// How often a listener was readable but another worker had taken the connection.
    pub spurious_wakes: u64,
    /// Whether `drain_accept_queues` runs.
    drains_queues: bool,
}

impl Reactor {
    /// Creates a reactor with its own epoll instance. Call it after the fork, because an inherited
    /// instance would be shared with the parent.
    ///
    /// # Errors
    /// If no descriptor is left.
    pub fn new() -> io::Result<Self> {
        Ok(Reactor {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            sockets: Slab::new(),
            sources: AcceptSources::default(),
            has_unix: false,
            watched: Vec::new(),
            failures: Vec::new(),
            next_tag: 0,
            // A reactor lives as long as its process or thread.
            buffer: receive_buffer()?,
            packet: &mut [],
            progress: None,
            events: vec![EpollEvent::empty(); BATCH],
            spurious_wakes: 0,
            drains_queues: false,
        })
    }

    /// Records the I/O of this reactor in `progress` from now on, and receives into its `buffer`. Call it
    /// before there is a connection.
    pub fn attach_progress(&mut self, progress: IoProgress, buffer: &'static mut [u8]) {
        self.progress = Some(progress);
        (self.buffer, self.packet) = buffer.split_at_mut(RECEIVE_BUFFER);
    }

    /// Reports `Readable` with the number `watch` while `fd` is ready for `interest` (level-triggered).
    /// If this number is already watched, `fd` must be the same.
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
        // The reactor owns this duplicate, so the watch cannot outlive its descriptor.
        let fd = fd.as_fd().try_clone_to_owned()?;
        self.epoll.add(&fd, event)?;
        self.watched.push((watch, fd));
        Ok(())
    }

    pub fn unwatch(&mut self, watch: u16) {
        self.watched.retain(|(number, fd)| {
            let found = *number == watch;
            if found {
                let _ = self.epoll.delete(fd);
            }
            !found
        });
    }

    /// Makes a connection of a client's non-blocking socket, and reads from it.
    ///
    /// # Errors
    /// If epoll refuses it (ENOMEM, ENOSPC); then the socket is closed.
    pub fn register(&mut self, socket: OwnedFd) -> io::Result<Token> {
        let socket = GuardedSocket::accepted(socket, self.has_unix, closer::close);
        self.insert_socket(socket, (0, 0), (UnsentData::Nothing, 0))
    }

    /// Makes a connection of a socket that another process has used before. The I/O record has this note from the
    /// beginning, and says until the call of `clear_carried_output` that unsent bytes are in the packet.
    ///
    /// # Errors
    /// As for `register`.
    pub fn register_adopted(
        &mut self,
        socket: OwnedFd,
        owed: UnsentData,
        note: u32,
    ) -> io::Result<Token> {
        // The sender may have cleared the flag.
        sockets::restore_nonblocking(&socket)?;
        let socket = GuardedSocket::received(socket, closer::close);
        let passed = self
            .progress
            .and_then(|_| clone_files::stream_offsets(&socket));
        self.insert_socket(socket, passed.unwrap_or(UNKNOWN), (owed, note))
    }

    /// Records that the bytes that came with a connection are no longer needed in the packet.
    pub fn clear_carried_output(&mut self, token: Token) {
        let owes = self.unsent(token) > 0;
        if let Some(progress) = self.progress
            && self.socket(token).is_some()
        {
            progress.owes(
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
        // The upper numbers belong to listeners and watches.
        self.next_tag = (tag + 1) % 0xFFFF_0000;
        if let Some(progress) = &self.progress {
            progress.opened(token, socket.as_raw_fd(), seen);
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

    /// Reads from a connection, or leaves its bytes in the kernel, which slows the peer down.
    pub fn set_reading(&mut self, token: Token, reading: bool) {
        if let Some(socket) = self.socket(token)
            && socket.reading != reading
        {
            socket.reading = reading;
            self.update(token);
        }
    }

    /// Sends `bytes` after those that still wait. Bytes that the kernel does not take at once are kept,
    /// and `Sent` is reported when they are sent. `bytes` is empty afterwards. Its memory stays with it, unless
    /// the bytes are kept.
    pub fn send(&mut self, token: Token, bytes: &mut Vec<u8>) {
        let progress = self.progress;
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
        if let Some(progress) = &progress {
            progress.begin_send(token, socket.sent_in_all, bytes.len());
        }
        match socket.send_some(bytes) {
            Ok(sent) if sent == bytes.len() => {
                socket.sent_in_all += sent as u64;
                if let Some(progress) = &progress {
                    progress.end_send(sent);
                }
                bytes.clear();
            }
            Ok(sent) => {
                socket.sent_in_all += sent as u64;
                if let Some(progress) = &progress {
                    progress.owes(token, UnsentData::Here);
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

    /// Returns the number of bytes given to `send` that the kernel has not taken.
    pub fn unsent(&self, token: Token) -> usize {
        match self.sockets.get(token.index()) {
            Some(socket) => socket.unsent.len(),
            None => 0,
        }
    }

    /// Returns the memory in bytes that the unsent bytes of a connection use.
    pub fn unsent_memory(&self, token: Token) -> usize {
        let socket = self.sockets.get(token.index());
        socket.map_or(0, |socket| socket.unsent.memory())
    }

    /// Ends the sending direction of a connection (shutdown(2)).
    pub fn shutdown(&mut self, token: Token) {
        if let Some(socket) = self.socket(token) {
            let _ = nix::sys::socket::shutdown(
                socket.fd.as_raw_fd(),
                nix::sys::socket::Shutdown::Write,
            );
        }
    }

    /// Closes a connection. Unsent bytes are lost.
    pub fn close(&mut self, token: Token) {
        if self.socket(token).is_some() {
            if let Some(progress) = &self.progress {
                progress.closes(token);
            }
            let socket = self.sockets.remove(token.index());
            // A child of a handler may briefly hold a duplicate, which would keep the descriptor in
            // epoll. So remove it before the close (epoll(7), question 6).
            let _ = self.epoll.delete(&socket.fd);
        }
    }

    pub fn descriptor(&self, token: Token) -> Option<&GuardedSocket> {
        let socket = self.sockets.get(token.index())?;
        (Token::new(token.index(), socket.tag) == token).then_some(&socket.fd)
    }

    /// Accepts from `listeners`, and adopts connections that siblings send through `queue` in packets of
    /// at most `longest` bytes.
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

    /// Watches the listeners again, after `AcceptFailed` or `pause_listeners`. If another process had
    /// made one of them block in accept4(2), this makes it non-blocking again and returns `true`.
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

    /// Leaves accepting to siblings until `resume_listeners`. Continues to adopt their connections. Has no effect while
    /// the accept queues are drained.
    pub fn pause_only_listeners(&mut self) {
        if !self.drains_queues {
            self.sources.pause_only_listeners(&self.epoll);
        }
    }

    /// Records that the driver keeps no connection of the last accept. So if this process dies now, its keeper looks
    /// for none.
    pub fn note_refused(&self) {
        if let Some(progress) = &self.progress {
            progress.comes(PendingAccept::None);
        }
    }

    /// Starts or stops adopting connections of siblings. Listeners stay as they are.
    pub fn set_adopting(&mut self, adopts: bool) {
        self.sources.set_adopting(adopts, &self.epoll);
    }

    /// Accepts all connections that wait at the listening sockets, then closes those sockets. If the last
    /// owner closed one with waiting connections, the kernel would reset them. The adoption queue is
    /// closed at once, or kept with `keep_queue`.
    pub fn drain_accept_queues(&mut self, keep_queue: bool, driver: &mut impl Driver) {
        if !keep_queue {
            self.sources.pause_queue(&self.epoll);
        }
        self.drains_queues = true;
        // Bounded, because clients may connect without end.
        let _ = (0..MOST_ROUNDS).find(|_| self.try_accept(driver) == 0);
        self.drains_queues = false;
        self.pause_listeners();
        self.sources.leave(keep_queue);
        // If memory is short, the kernel closes the queued connections when the last owner closes the
        // socket.
        let _ = self.resume_listeners();
    }

    /// Accepts a bounded number of waiting connections from every watched listener, because a stopped
    /// sibling may have consumed the wake-up. Returns how many were taken from the queues.
    pub fn try_accept(&mut self, driver: &mut impl Driver) -> u32 {
        let _ = self.sources.restore_nonblocking();
        let all = 0..self.sources.len();
        all.map(|index| self.accept(index, driver)).sum()
    }

    fn accept(&mut self, index: usize, driver: &mut impl Driver) -> u32 {
        for round in 0..FAIR_SHARE {
            // Taken out, because the driver gets the reactor while it reads the packet.
            let packet = mem::take(&mut self.packet);
            let progress = self.progress.as_ref();
            let mut taken = self.sources.take(index, packet, progress, &self.epoll);
            if let Taken::Adopted(socket, length, rest) = taken {
                let packet = &packet[..length];
                let adopted = Completion::Adopted {
                    socket,
                    packet,
                    rest,
                };
                driver.complete(self, adopted);
                taken = Taken::Gone;
            }
            self.packet = packet;
            match taken {
                Taken::Fresh(socket) => driver.complete(self, Completion::Accepted { socket }),
                Taken::Adopted(..) | Taken::Gone => {}
                Taken::Paused => return round,
                Taken::Nothing => {
                    self.spurious_wakes += u64::from(round == 0);
                    return round;
                }
                Taken::Failed(error) => {
                    let error = error.into();
                    driver.complete(self, Completion::AcceptFailed { error });
                    return round;
                }
            }
        }
        FAIR_SHARE
    }

    /// Waits at most `timeout_ms` and reports events to `driver`. Returns whether more events may wait
    /// than fit in one turn.
    ///
    /// # Errors
    /// If epoll_wait(2) fails for another reason than a signal.
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
        let progress = self.progress;
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
        // Bytes before the end are read first. The end then follows as an error or as zero bytes.
        if socket.reading && !socket.ended && (broken || flags.contains(EpollFlags::EPOLLIN)) {
            if let Some(progress) = &progress {
                progress.begin_recv(token, socket.received_in_all);
            }
            // EBADMSG: descriptors are attached, so the connection ends.
            match socket.fd.receive(buffer) {
                Ok(0) => {
                    if let Some(progress) = &progress {
                        progress.end_recv(0);
                    }
                    socket.ended = true;
                    driver.complete(self, Completion::Ended { token });
                    // Most connections are closed by now, and need no change in epoll.
                    self.update(token);
                }
                Ok(length) => {
                    if let Some(progress) = &progress {
                        progress.end_recv(length);
                    }
                    socket.received_in_all += length as u64;
                    let bytes = &buffer[..length];
                    driver.complete(self, Completion::Received { token, bytes });
                }
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(error) => self.fail(token, error),
            }
            if let Some(progress) = &progress {
                progress.clear_recv();
            }
        } else if broken && !hung_up {
            self.fail(token, Errno::ECONNRESET);
        }
        if hung_up {
            self.report_hang_up(token, driver);
        }
    }

    fn send_unsent(&mut self, token: Token, driver: &mut impl Driver) {
        let progress = self.progress;
        let Some(socket) = self.socket(token).filter(|socket| !socket.failed) else {
            return;
        };
        match socket.send_some(socket.unsent.pending()) {
            Ok(sent) => {
                socket.unsent.consume(sent);
                socket.sent_in_all += sent as u64;
                if socket.unsent.len() == 0 {
                    if let Some(progress) = &progress {
                        progress.owes(token, UnsentData::Nothing);
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

    /// Reports that the peer has closed the connection, once everything was read or if the connection is
    /// not being read.
    fn report_hang_up(&mut self, token: Token, driver: &mut impl Driver) {
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

    /// Drops all unsent bytes, and all bytes sent from now on, because the peer reads nothing.
    fn drop_output(&mut self, token: Token) {
        let progress = self.progress;
        let Some(socket) = self.socket(token).filter(|socket| !socket.output_closed) else {
            return;
        };
        socket.output_closed = true;
        socket.unsent = SendBuffer::default();
        if let Some(progress) = &progress {
            progress.owes(token, UnsentData::Nothing);
        }
        self.update(token);
    }

    /// Records a failure, to be reported at the end of the turn. The driver calls `send`, so `send` must not call the
    /// driver.
    fn fail(&mut self, token: Token, error: Errno) {
        if let Some(socket) = self.socket(token) {
            socket.failed = true;
            socket.ended = true;
            socket.unsent = SendBuffer::default();
            // EPOLLERR and EPOLLHUP cannot be masked, so remove the descriptor from epoll.
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
