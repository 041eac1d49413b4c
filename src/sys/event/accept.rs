//! Accepts connections from shared listeners and from the adoption queue, in fair shares.

use std::io;
use std::mem;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};

use super::io_progress::{IoProgress, PendingAccept};
use crate::sys::{closer, memory_file, socket};

/// The number of accepts after which a worker goes to the end of the kernel's queue of waiters.
/// EPOLLEXCLUSIVE wakes the first of that queue. Without this, one worker would get all connections that
/// arrive slowly. A smaller number is fairer, but each round costs two calls of epoll_ctl(2).
pub(super) const FAIR_SHARE: u32 = 8;

/// Event data from here up to `WATCH_BASE` of the reactor name sources of connections.
pub(super) const LISTENER_BASE: u64 = u64::MAX - 0xFF_FFFF;

/// How a source delivers connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SourceKind {
    /// A listening socket: accept4(2).
    Listener,
    /// A packet socket whose packets carry connections: recvmsg(2).
    Queue,
}

/// A source of connections, shared with the sibling workers.
#[derive(Debug)]
struct AcceptSource {
    fd: Rc<OwnedFd>,
    kind: SourceKind,
    watched: bool,
    /// The number of accepts since this worker was last put at the end of the kernel's queue of waiters.
    accepts: u32,
}

/// The result of one attempt to accept.
pub(super) enum Taken {
    /// A client connected.
    Fresh(OwnedFd),
    /// A sibling handed a connection over: its socket, the length of the packet, a second descriptor.
    Adopted(OwnedFd, usize, Option<OwnedFd>),
    Nothing,
    /// This source is not watched, because the driver paused it after the wake-up.
    Paused,
    /// A connection that failed before it was accepted.
    Gone,
    /// The system cannot accept now, and all sources were paused. With EPIPE only the adoption queue was paused: it
    /// was shut down.
    Failed(Errno),
}

/// The listening sockets and the adoption queue of one worker.
#[derive(Debug, Default)]
pub(super) struct AcceptSources {
    sources: Vec<AcceptSource>,
    /// Whether the adoption queue stays unwatched, even when the other sources are resumed.
    is_queue_left: bool,
    /// Whether a process has shut the adoption queue down. It is not watched any more: it would always be readable.
    has_queue_ended: bool,
}

impl AcceptSources {
    /// Replaces all sources. None is watched until `resume`.
    pub fn set(&mut self, listeners: Vec<Rc<OwnedFd>>, queue: Rc<OwnedFd>) {
        let source = |kind, fd| AcceptSource {
            fd,
            kind,
            watched: false,
            accepts: 0,
        };
        self.sources = listeners
            .into_iter()
            .map(|fd| source(SourceKind::Listener, fd))
            .collect();
        self.sources.push(source(SourceKind::Queue, queue));
    }

    pub fn len(&self) -> usize {
        self.sources.len()
    }

    /// Watches all sources again, except a queue that was left. Returns whether another process had made
    /// a listener block in accept4(2).
    ///
    /// # Errors
    /// If epoll refuses one.
    pub fn resume(&mut self, epoll: &Epoll) -> io::Result<bool> {
        let was_blocking = self.restore_nonblocking()?;
        for index in 0..self.sources.len() {
            let source = &self.sources[index];
            let is_left =
                (self.is_queue_left || self.has_queue_ended) && source.kind == SourceKind::Queue;
            if !source.watched && !is_left {
                self.watch(index, epoll)?;
            }
        }
        Ok(was_blocking)
    }

    /// Sets O_NONBLOCK of the listeners, because another process can clear it. Returns whether it was
    /// cleared.
    ///
    /// # Errors
    /// If fcntl(2) fails.
    pub fn restore_nonblocking(&self) -> io::Result<bool> {
        let mut was_blocking = false;
        // The queue is read with MSG_DONTWAIT; accept4(2) has no such flag.
        for source in &self.sources {
            if source.kind == SourceKind::Listener {
                was_blocking |= socket::restore_nonblocking(&source.fd)?;
            }
        }
        Ok(was_blocking)
    }

    /// Watches no source until `resume`. Siblings continue to accept.
    pub fn pause(&mut self, epoll: &Epoll) {
        self.pause_kind(epoll, None);
    }

    /// Starts or stops adopting connections of siblings. A start takes effect at the next `resume`. Listeners stay as
    /// they are.
    pub fn set_adopting(&mut self, adopts: bool, epoll: &Epoll) {
        self.is_queue_left = !adopts;
        if !adopts {
            self.pause_queue(epoll);
        }
    }

    /// Watches no listener until `resume`. The adoption queue is still watched.
    pub fn pause_only_listeners(&mut self, epoll: &Epoll) {
        self.pause_kind(epoll, Some(SourceKind::Listener));
    }

    pub fn pause_queue(&mut self, epoll: &Epoll) {
        self.pause_kind(epoll, Some(SourceKind::Queue));
    }

    fn pause_kind(&mut self, epoll: &Epoll, kind: Option<SourceKind>) {
        for source in &mut self.sources {
            if kind.is_none_or(|kind| source.kind == kind) && mem::take(&mut source.watched) {
                let _ = epoll.delete(source.fd.as_fd());
            }
        }
    }

    /// Closes the listening sockets, and the queue unless `keep_queue`.
    pub fn leave(&mut self, keep_queue: bool) {
        self.sources
            .retain(|source| keep_queue && source.kind == SourceKind::Queue);
    }

    fn watch(&mut self, index: usize, epoll: &Epoll) -> io::Result<()> {
        let source = &mut self.sources[index];
        // EPOLL_CTL_MOD cannot change EPOLLEXCLUSIVE, so it has to be removed and added.
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLEXCLUSIVE;
        let event = EpollEvent::new(flags, LISTENER_BASE + index as u64);
        epoll.add(source.fd.as_fd(), event)?;
        source.watched = true;
        source.accepts = 0;
        Ok(())
    }

    /// Accepts one connection from a source. `packet` receives the bytes that a sibling sends with it.
    pub fn take(
        &mut self,
        index: usize,
        packet: &mut [u8],
        progress: Option<&IoProgress>,
        epoll: &Epoll,
    ) -> Taken {
        let Some(source) = self.sources.get_mut(index).filter(|one| one.watched) else {
            return Taken::Paused;
        };
        let pending = match source.kind {
            SourceKind::Listener => PendingAccept::Fresh,
            SourceKind::Queue => PendingAccept::Used,
        };
        if let Some(progress) = progress {
            progress.comes(pending);
        }
        let taken = match source.kind {
            SourceKind::Listener => socket::accept(&*source.fd).map(Taken::Fresh),
            SourceKind::Queue => take_one(&source.fd, packet),
        };
        match taken {
            Ok(taken) => {
                source.accepts += 1;
                if source.accepts >= FAIR_SHARE {
                    self.requeue(index, epoll);
                }
                taken
            }
            Err(error) => {
                if let Some(progress) = progress {
                    progress.comes(PendingAccept::None);
                }
                match error {
                    Errno::EAGAIN => Taken::Nothing,
                    error if is_connection_gone(error) => Taken::Gone,
                    Errno::EPIPE if pending == PendingAccept::Used => {
                        self.has_queue_ended = true;
                        self.pause_queue(epoll);
                        Taken::Failed(error)
                    }
                    error => {
                        // A level-triggered listener that stays watched would use 100 % CPU.
                        self.pause(epoll);
                        Taken::Failed(error)
                    }
                }
            }
        }
    }

    /// Puts this worker at the end of the kernel's queue of waiters for a source.
    fn requeue(&mut self, index: usize, epoll: &Epoll) {
        let _ = epoll.delete(self.sources[index].fd.as_fd());
        self.sources[index].watched = false;
        // If memory is short, `resume` at the next tick tries again.
        let _ = self.watch(index, epoll);
    }
}

/// Returns whether an error of accept4(2) means that the connection or its network was gone before it was
/// accepted, so that the next connection may be accepted.
pub fn is_connection_gone(error: Errno) -> bool {
    matches!(
        error,
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
            | Errno::EPERM
    )
}

/// Returns whether an adoption queue can receive nothing more: all processes have closed the sending end, or one has
/// shut it down (shutdown(2)). An empty packet does not mean that.
pub fn is_queue_shut_down(queue: &impl AsFd) -> bool {
    let end = PollFlags::from_bits_retain(libc::POLLRDHUP);
    let mut polled = [PollFd::new(queue.as_fd(), end)];
    let count = poll(&mut polled, PollTimeout::ZERO);
    count.is_ok_and(|count| count > 0)
}

/// Returns the descriptor if it is of the right kind. Otherwise the closer thread closes it: a sibling is
/// not trusted, and the close of another kind may block.
fn expect(fd: Option<OwnedFd>, is_right: impl Fn(&OwnedFd) -> bool) -> Option<OwnedFd> {
    let fd = fd?;
    if is_right(&fd) {
        return Some(fd);
    }
    closer::close(fd);
    None
}

/// Receives one packet. If its descriptors cannot be opened, the packet stays in the queue for a sibling,
/// because they would be lost. The first byte of the buffer is cleared before. So a process that finds a
/// packet in the buffer finds a whole one.
fn take_one(fd: &OwnedFd, packet: &mut [u8]) -> Result<Taken, Errno> {
    if !socket::has_room_for_packet(fd) {
        return Err(Errno::EMFILE);
    }
    if let Some(first) = packet.first_mut() {
        *first = 0;
    }
    let received = socket::receive_packet(fd, packet);
    let (length, descriptors) =
        received.map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    if length == 0 && descriptors.is_empty() && is_queue_shut_down(fd) {
        return Err(Errno::EPIPE);
    }
    let mut descriptors = descriptors.into_iter();
    let socket = descriptors.next();
    let socket = expect(socket, socket::is_stream_socket);
    let rest = descriptors.next();
    let has_rest = rest.is_some();
    let rest = expect(rest, memory_file::is_one);
    descriptors.for_each(closer::close);
    match socket {
        Some(socket) if rest.is_some() == has_rest => Ok(Taken::Adopted(socket, length, rest)),
        // A packet without a connection is useless, but the next one may have one.
        socket => {
            socket.into_iter().for_each(closer::close);
            Err(Errno::EPROTO)
        }
    }
}
