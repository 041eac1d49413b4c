//! The way to a program: our end of the socket that it has as descriptor 3, what is to be written
//! there and what has come from it.
//!
//! Nothing here waits. What the bytes mean is for `seat` to say, or for the keeper while the program
//! starts.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};

use crate::protocol::frame::{DecodedFrame, decode};
use crate::protocol::program;
use crate::sys::closer;
use crate::sys::rights::GuardedSocket;
use crate::sys::socket::has_unread;

/// As much as is read at once, into a buffer that is lent.
pub(super) const PIECE: usize = 64 * 1024;
/// A buffer that was larger is given back: one large call need not keep its room for ever.
const KEPT: usize = 4 * PIECE;
/// As much as is written at once.
const AT_ONCE: usize = 256 * 1024;
/// Reads of what is left in a pipe or a socket at the end: what has left the process's group may
/// write on for ever.
pub(super) const LEFT: usize = 16;

/// See the module.
#[derive(Debug)]
pub(super) struct Wire {
    fd: GuardedSocket,
    unsent: Vec<u8>,
    sent: usize,
    received: Vec<u8>,
    is_closed: bool,
    left_unread: bool,
}

impl Wire {
    pub fn new(fd: OwnedFd) -> Self {
        Wire {
            fd: GuardedSocket::new(fd, closer::close),
            unsent: Vec::new(),
            sent: 0,
            received: Vec::new(),
            is_closed: false,
            left_unread: false,
        }
    }

    /// Writes a call; what does not fit goes out as it is read. False when it fits no frame.
    pub fn write(&mut self, method: &str, params: &str, id: Option<u64>) -> bool {
        let whole = program::call(&mut self.unsent, method, params, id);
        self.flush();
        whole
    }

    /// Tells the program that a call was given up.
    pub fn cancel(&mut self, id: u64) {
        program::cancel(&mut self.unsent, id);
        self.flush();
    }

    /// Whether all that was written is with the kernel.
    pub fn has_sent_all(&self) -> bool {
        self.sent == self.unsent.len()
    }

    /// Whether the program has not read all of that yet.
    pub fn has_unread(&self) -> bool {
        !self.has_sent_all() || has_unread(&self.fd)
    }

    /// Whether the program can't send any more.
    pub fn is_closed(&self) -> bool {
        self.is_closed
    }

    /// Writes what did not fit before; of a lot only some, for a program may read as fast as that.
    pub fn flush(&mut self) {
        let end = self.unsent.len().min(self.sent + AT_ONCE);
        while self.sent < self.unsent.len() {
            if self.sent >= end {
                return;
            }
            let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
            match send(self.fd.as_raw_fd(), &self.unsent[self.sent..end], flags) {
                Ok(count) => self.sent += count,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                // It reads no more. What it has sent counts all the same: `receive` finds its end.
                Err(_) => {
                    self.left_unread = true;
                    break;
                }
            }
        }
        self.unsent.clear();
        self.unsent.shrink_to(KEPT);
        self.sent = 0;
    }

    /// Reads once, by way of `piece`; tells whether there was something.
    pub fn receive(&mut self, piece: &mut [u8]) -> bool {
        if self.is_closed {
            return false;
        }
        match self.fd.receive(piece) {
            Ok(count @ 1..) => {
                self.received.extend_from_slice(&piece[..count]);
                return true;
            }
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            // So the kernel says that the other end was closed with bytes unread (unix(7)).
            Err(Errno::ECONNRESET) => (self.left_unread, self.is_closed) = (true, true),
            // EBADMSG among them: descriptors are attached to what it sends, so it is not heard.
            Ok(0) | Err(_) => self.is_closed = true,
        }
        false
    }

    /// The frame at the head of what it has sent.
    pub fn frame(&self, limit: usize) -> DecodedFrame<'_> {
        decode(&self.received, limit)
    }

    /// Whether it has sent something that is not consumed.
    pub fn has_received(&self) -> bool {
        !self.received.is_empty()
    }

    /// Drops the head of what it has sent.
    pub fn consume(&mut self, used: usize) {
        self.received.drain(..used);
        if self.received.is_empty() {
            self.received.shrink_to(KEPT);
        }
    }

    /// The program has ended: whether it had not read all that it was sent, so that what came last
    /// can't have begun.
    pub fn was_left_unread(mut self) -> bool {
        let mut piece = vec![0; PIECE];
        for _ in 0..LEFT {
            if !self.receive(&mut piece) {
                break;
            }
            self.received.clear();
        }
        self.left_unread || !self.has_sent_all()
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
