//! Holds the state of a connection's socket: its interest in events, and its unsent bytes.

use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{AddressFamily, MsgFlags, SockaddrLike, SockaddrStorage, getsockname, send};

use super::send_buffer::SendBuffer;
use crate::sys::rights::GuardedSocket;

#[derive(Debug)]
pub(super) struct Socket {
    pub fd: GuardedSocket,
    pub tag: u32,
    /// The events that epoll watches for. After a change it equals `wanted`.
    pub interest: EpollFlags,
    pub reading: bool,
    /// The end of the peer's stream was seen, so nothing more can be read.
    pub ended: bool,
    /// A failure was reported or will be.
    pub failed: bool,
    /// The peer reads nothing any more, so bytes for it are dropped.
    pub output_closed: bool,
    /// `HungUp` was reported. EPOLLHUP cannot be masked, so epoll watches the socket only while it is
    /// read.
    pub hung_up: bool,
    /// Whether epoll watches it.
    pub watched: bool,
    /// Bytes that the kernel has not taken yet.
    pub unsent: SendBuffer,
    /// Bytes of the whole stream that were received and sent; used only for the I/O record.
    pub received_in_all: u64,
    pub sent_in_all: u64,
}

impl Socket {
    /// Returns the events that epoll must watch for now.
    pub fn wanted(&self) -> EpollFlags {
        let mut wanted = EpollFlags::empty();
        if self.reading && !self.ended {
            wanted |= EpollFlags::EPOLLIN;
        }
        if self.unsent.len() > 0 {
            wanted |= EpollFlags::EPOLLOUT;
        }
        wanted
    }

    /// Sends what the kernel takes now. Returns the number of bytes: 0 if the socket is full.
    pub fn send_some(&self, bytes: &[u8]) -> Result<usize, Errno> {
        // MSG_NOSIGNAL: the host program decides whether SIGPIPE is ignored. MSG_DONTWAIT: another
        // process that has the socket can clear O_NONBLOCK.
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        loop {
            return match send(self.fd.as_raw_fd(), bytes, flags) {
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => Ok(0),
                other => other,
            };
        }
    }

    /// Returns whether `error` of send(2) says that the peer has closed a unix socket. What it sent
    /// before can still be read. On TCP, EPIPE may stand for a reset.
    pub fn is_closed_unix(&self, error: Errno) -> bool {
        let name = || getsockname::<SockaddrStorage>(self.fd.as_raw_fd());
        error == Errno::EPIPE && name().is_ok_and(|name| name.family() == Some(AddressFamily::Unix))
    }
}
