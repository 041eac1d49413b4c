//! Accepting, from shared listeners and from the queue in which siblings pass connections on: a
//! fair share of what comes.

#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::rc::Rc;

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use nix::sys::socket::{SockFlag, accept4};

use super::io_progress::PendingAccept;
use super::reactor::{LISTENER_BASE, Reactor};
use super::{Completion, Driver};
use crate::sys::{closer, rights, socket};

/// Accepts after which a worker goes to the end of the kernel's queue of waiters. EPOLLEXCLUSIVE
/// wakes the first of that queue, so without this one worker would get all that comes slowly;
/// a smaller number is fairer, and costs two epoll_ctl(2) per that many accepts.
const FAIR_SHARE: u32 = 8;

/// How connections come out of a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SourceKind {
    /// A listening socket: accept4(2).
    Listener,
    /// A packet socket whose packets carry them: recvmsg(2).
    Queue,
}

/// Where connections come from, shared with the sibling workers.
#[derive(Debug)]
pub(super) struct AcceptSource {
    fd: Rc<OwnedFd>,
    source: SourceKind,
    watched: bool,
    /// Accepts since this worker last went to the end of the queue.
    accepts: u32,
}

impl Reactor {
    /// Takes part in accepting from `listeners`, and in taking what siblings pass on in packets of
    /// at most `longest` bytes through `queue`.
    ///
    /// # Errors
    /// When epoll refuses one.
    pub fn listen(
        &mut self,
        listeners: Vec<Rc<OwnedFd>>,
        (queue, longest): (Rc<OwnedFd>, usize),
    ) -> io::Result<()> {
        let source = |source| {
            move |fd| AcceptSource {
                fd,
                source,
                watched: false,
                accepts: 0,
            }
        };
        self.has_unix = listeners.iter().any(|fd| rights::is_unix(&**fd));
        self.listeners = listeners
            .into_iter()
            .map(source(SourceKind::Listener))
            .collect();
        self.listeners.push(source(SourceKind::Queue)(queue));
        if self.packet.len() < longest {
            self.packet = Vec::leak(vec![0; longest]);
        }
        self.resume_listeners()
    }

    /// Watches the listeners again, after `AcceptFailed` or `pause_listeners`.
    ///
    /// # Errors
    /// When epoll refuses one.
    pub fn resume_listeners(&mut self) -> io::Result<()> {
        for index in 0..self.listeners.len() {
            let listener = &self.listeners[index];
            let is_left = self.queue_is_left && listener.source != SourceKind::Listener;
            if !listener.watched && !is_left {
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

    /// Takes part in taking what siblings pass on, or does not until told again; the listening sockets
    /// are left as they are.
    pub fn set_adopting(&mut self, takes: bool) {
        self.queue_is_left = !takes;
        if !takes {
            self.pause_queue();
        }
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

    /// Accepts all that waits in the listening sockets, and leaves them: the last owner's closing
    /// would reset who is in there. The queue of siblings is left at once, or, with `keep_queue`,
    /// taken from now and further on.
    pub fn drain_accept_queues(&mut self, keep_queue: bool, driver: &mut impl Driver) {
        if !keep_queue {
            self.pause_queue();
        }
        let mut before = usize::MAX;
        while self.is_listening() && self.connections() != before {
            before = self.connections();
            self.try_accept(driver);
        }
        self.pause_listeners();
        self.listeners
            .retain(|listener| keep_queue && listener.source != SourceKind::Listener);
        // Refused for want of memory: what is in there ends with the last of us.
        let _ = self.resume_listeners();
    }

    fn pause_queue(&mut self) {
        for listener in &mut self.listeners {
            if listener.source != SourceKind::Listener && mem::take(&mut listener.watched) {
                let _ = self.epoll.delete(listener.fd.as_fd());
            }
        }
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

    pub(super) fn accept(&mut self, index: usize, driver: &mut impl Driver) {
        for round in 0..FAIR_SHARE {
            // The driver may have closed or paused the listeners in between.
            let Some(listener) = self.listeners.get_mut(index).filter(|l| l.watched) else {
                return;
            };
            if let Some(witness) = &self.witness {
                witness.comes(match listener.source {
                    SourceKind::Listener => PendingAccept::Fresh,
                    SourceKind::Queue => PendingAccept::Used,
                });
            }
            let taken = match listener.source {
                SourceKind::Listener => accept_one(&listener.fd).map(|socket| (socket, None)),
                SourceKind::Queue => take_one(&listener.fd, self.packet),
            };
            if let (Some(witness), Err(_)) = (&self.witness, &taken) {
                witness.comes(PendingAccept::Nobody);
            }
            match taken {
                Ok((socket, passed)) => {
                    listener.accepts += 1;
                    if listener.accepts >= FAIR_SHARE {
                        self.requeue_listener(index);
                    }
                    let mut packet: &'static mut [u8] = &mut [];
                    let completion = match passed {
                        None => Completion::Accepted { socket },
                        Some((length, rest)) => {
                            packet = mem::take(&mut self.packet);
                            Completion::Adopted {
                                socket,
                                packet: &packet[..length],
                                rest,
                            }
                        }
                    };
                    driver.complete(self, completion);
                    if !packet.is_empty() {
                        self.packet = packet;
                    }
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

    fn requeue_listener(&mut self, index: usize) {
        let _ = self.epoll.delete(self.listeners[index].fd.as_fd());
        self.listeners[index].watched = false;
        // Refused for want of memory: the next tick's `resume_listeners` tries again.
        let _ = self.watch_listener(index);
    }
}

/// What a packet brought along with a connection: so many bytes, and a second descriptor.
type Passed = (usize, Option<OwnedFd>);

/// The descriptor, if it is of the kind that belongs there. A sibling is not trusted: the close of
/// another kind may block.
fn expect(fd: Option<OwnedFd>, is_right: impl Fn(&OwnedFd) -> bool) -> Option<OwnedFd> {
    let fd = fd?;
    if is_right(&fd) {
        return Some(fd);
    }
    closer::close(fd);
    None
}

fn accept_one(fd: &OwnedFd) -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = accept4(fd.as_raw_fd(), flags)?;
    // SAFETY: accept4 has just made this descriptor, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(socket) })
}

/// Takes one packet. Without room for its descriptors it is left for a sibling: received, they
/// would be lost. What the packet before has left begins with nothing then: whoever finds this one in
/// there finds it whole.
fn take_one(fd: &OwnedFd, packet: &mut [u8]) -> Result<(OwnedFd, Option<Passed>), Errno> {
    if !socket::has_room_for_packet(fd) {
        return Err(Errno::EMFILE);
    }
    if let Some(first) = packet.first_mut() {
        *first = 0;
    }
    let received = socket::receive_packet(fd, packet);
    let (length, descriptors) =
        received.map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    let mut descriptors = descriptors.into_iter();
    let socket = descriptors.next();
    let socket = expect(socket, socket::is_stream_socket);
    let rest = descriptors.next();
    let has_rest = rest.is_some();
    let rest = expect(rest, socket::is_memory_file);
    descriptors.for_each(closer::close);
    match socket {
        Some(socket) if rest.is_some() == has_rest => Ok((socket, Some((length, rest)))),
        // A packet without a connection brings nothing to anybody; the next one.
        socket => {
            socket.into_iter().for_each(closer::close);
            Err(Errno::EPROTO)
        }
    }
}
