//! The sources of an acceptor's connections: the listener, and the adoption queue of the listener.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};

use crate::config::IsolationConfig;
use crate::link::adoption_queue::is_packet;
use crate::link::source_table::{SourceLimit, SourceTables};
use crate::sys::event::is_queue_shut_down;
use crate::sys::process::{descriptors_left, process_limit};
use crate::sys::{memory_file, socket};
use crate::worker_init::WorkerInit;

/// Descriptors for refused connections and for links on their way.
const KEPT_BACK: usize = 128;

/// Both sources, and which of them are watched.
pub struct Sources {
    /// `None` once nothing more is accepted.
    listener: Option<Rc<OwnedFd>>,
    queue: Rc<OwnedFd>,
    has_queue_ended: bool,
    is_listening: bool,
    /// When to watch them again after a pause.
    resume_at_ms: u64,
}

impl Sources {
    pub fn new(listener: Option<Rc<OwnedFd>>, queue: Rc<OwnedFd>) -> Self {
        Sources {
            listener,
            queue,
            has_queue_ended: false,
            is_listening: false,
            resume_at_ms: 0,
        }
    }

    pub fn is_listening(&self) -> bool {
        self.is_listening
    }

    /// Returns when to call `watch` again; `None` while the sources are watched.
    pub fn resume_at_ms(&self) -> Option<u64> {
        (!self.is_listening).then_some(self.resume_at_ms)
    }

    /// Watches the queue, and the listener if `has_room`, with their event numbers. Connections from other
    /// generations are adopted without room too, because they are counted already.
    ///
    /// # Errors
    /// If epoll refuses one.
    pub fn watch(
        &mut self,
        epoll: &Epoll,
        (listener, queue): (u64, u64),
        has_room: bool,
    ) -> io::Result<()> {
        let Some(socket) = &self.listener else {
            return Ok(());
        };
        self.restore_nonblocking();
        let listener = has_room.then_some((socket.as_fd(), listener));
        // The acceptor of another generation may accept too. With EPOLLEXCLUSIVE, the kernel wakes one of the
        // acceptors for each connection.
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLEXCLUSIVE;
        let queue = (!self.has_queue_ended).then_some((self.queue.as_fd(), queue));
        for (fd, number) in [queue, listener].into_iter().flatten() {
            match epoll.add(fd, EpollEvent::new(flags, number)) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.is_listening = has_room;
        Ok(())
    }

    /// Stops watching the listener until `resume_at_ms`, and the queue too if `all` is set. The kernel
    /// queues connections.
    pub fn pause(&mut self, epoll: &Epoll, resume_at_ms: u64, all: bool) {
        if let Some(listener) = &self.listener {
            let _ = epoll.delete(listener.as_fd());
        }
        if all {
            let _ = epoll.delete(self.queue.as_fd());
        }
        self.is_listening = false;
        self.resume_at_ms = resume_at_ms;
    }

    /// Stops accepting for ever.
    pub fn leave(&mut self, epoll: &Epoll) {
        self.pause(epoll, u64::MAX, true);
        self.listener = None;
    }

    /// Sets O_NONBLOCK again, because a process of another service that shares the listener may have
    /// cleared it. Then accept4(2) would wait.
    pub fn restore_nonblocking(&self) {
        if let Some(listener) = &self.listener {
            let _ = socket::restore_nonblocking(&**listener);
        }
    }

    /// Accepts one connection.
    ///
    /// # Errors
    /// EAGAIN if there is no connection, or nothing is accepted any more; other errors of accept4(2).
    pub fn accept(&self) -> Result<OwnedFd, Errno> {
        match &self.listener {
            Some(listener) => socket::accept(&**listener),
            None => Err(Errno::EAGAIN),
        }
    }

    /// Adopts one connection that another generation has handed over. Returns the length of the packet, and
    /// its descriptors.
    ///
    /// # Errors
    /// EAGAIN if there is no packet, EMFILE if there is no descriptor for it, EPIPE if the queue was shut down; other
    /// errors of recvmsg(2).
    pub fn adopt(&self, packet: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        if !socket::has_room_for_packet(&*self.queue) {
            return Err(Errno::EMFILE.into());
        }
        let received = socket::receive_packet(&*self.queue, packet)?;
        match received.0 == 0 && received.1.is_empty() && is_queue_shut_down(&*self.queue) {
            true => Err(Errno::EPIPE.into()),
            false => Ok(received),
        }
    }

    /// Stops watching the queue for ever, because a process has shut it down: it would always be readable.
    pub fn leave_queue(&mut self, epoll: &Epoll) {
        let _ = epoll.delete(self.queue.as_fd());
        self.has_queue_ended = true;
    }
}

/// Returns whether the master has died. An error of poll(2), such as EINTR for a pending signal, says nothing: ask
/// again soon.
pub fn has_master_died(boot: &WorkerInit<'_>) -> bool {
    boot.isolated.as_ref().is_none_or(|isolated| {
        let mut master = [PollFd::new(isolated.master_pipe.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut master, PollTimeout::ZERO), Ok(1..))
    })
}

/// Returns whether a packet of the adoption queue is a connection. Each session can send there, and must not
/// give an order or another kind of descriptor to another session.
pub fn is_connection(packet: &[u8], client: &[OwnedFd]) -> bool {
    match client {
        [socket] => socket::is_stream_socket(socket) && is_packet(packet, false),
        [socket, rest] => {
            socket::is_stream_socket(socket) && memory_file::is_one(rest) && is_packet(packet, true)
        }
        _ => false,
    }
}

/// Returns the limit of connections of a source, and the tables in which refusals are counted; `None` if there is no
/// limit.
pub fn limit_of<'b>(boot: &'b WorkerInit<'_>) -> Option<(&'b SourceLimit, &'static SourceTables)> {
    let sources = boot.sources.as_ref()?;
    let limit = sources.limits.first().filter(|limit| limit.most > 0)?;
    Some((limit, sources.tables))
}

/// Warns if the limits of this process have no room for all connections that the listener allows.
pub fn warn_of_limits(boot: &WorkerInit<'_>, isolation: &IsolationConfig) {
    let processes = isolation.processes;
    let address = boot.isolated.as_ref().map_or("", |it| it.address.as_str());
    // A descriptor for each session, and those of this process.
    let (files, left) = descriptors_left();
    let room = left.saturating_sub(KEPT_BACK);
    let tasks = process_limit();
    let (limit, room, remedy) = if room < processes + isolation.spare {
        (format!("open files, {files}"), room, "LimitNOFILE")
    } else if let Some(tasks) = tasks.filter(|tasks| *tasks < processes) {
        (
            format!("processes of this user, {tasks}"),
            tasks,
            "LimitNPROC",
        )
    } else {
        return;
    };
    log::warn!(
        "processes of the listener {address} is {processes}, but the limit of {limit}, has room for {room} \
         connections: further ones wait, and get overloaded after limits.read-timeout; raise the limit \
         ({remedy} in a unit), or lower processes"
    );
}
