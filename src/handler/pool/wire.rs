//! Sends and receives frames over our end of a program's socket, which is its descriptor 3.
//!
//! Nothing here waits. `program_connection` interprets the bytes; while the program starts, its supervisor
//! does.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};

use crate::protocol::frame::{DecodedFrame, decode};
use crate::protocol::program::{self, CallExtras};
use crate::sys::closer;
use crate::sys::rights::GuardedSocket;
use crate::sys::socket::has_unread;

/// The size of one read in bytes, into a shared buffer.
pub(super) const PIECE: usize = 64 * 1024;
/// A larger buffer is freed when it is empty, because one large call must not use its memory for ever.
const KEPT: usize = 4 * PIECE;
/// The size of one write in bytes.
const AT_ONCE: usize = 256 * 1024;
/// The largest number of reads of the rest in a pipe or socket at its end, because a process that left the group may
/// write for ever.
pub(super) const LEFT: usize = 16;

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

    /// Writes a call; bytes that do not fit are sent later. Returns false if it is too large for a frame.
    pub fn write(&mut self, method: &str, params: &str, extras: CallExtras<'_>) -> bool {
        let whole = program::call(&mut self.unsent, method, params, extras);
        self.flush();
        whole
    }

    /// Sends the program a notification that a call was cancelled.
    pub fn cancel(&mut self, id: u64) {
        program::cancel(&mut self.unsent, id);
        self.flush();
    }

    /// Returns whether the kernel has taken all bytes.
    pub fn has_sent_all(&self) -> bool {
        self.sent == self.unsent.len()
    }

    /// Returns whether the program has not read all sent bytes yet.
    pub fn has_unread(&self) -> bool {
        !self.has_sent_all() || has_unread(&self.fd)
    }

    /// Returns whether the program cannot send any more.
    pub fn is_closed(&self) -> bool {
        self.is_closed
    }

    /// Sends bytes that did not fit before, a limited amount at once, because a program may read as fast
    /// as we write.
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
                // The program reads no more. The bytes that it has sent are still received, up to their
                // end.
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

    /// Reads once, through `piece`. Returns whether there were bytes.
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
            // The kernel reports that the other end was closed with unread bytes (unix(7)).
            Err(Errno::ECONNRESET) => (self.left_unread, self.is_closed) = (true, true),
            // Also EBADMSG: descriptors are attached to a message, so it is not received.
            Ok(0) | Err(_) => self.is_closed = true,
        }
        false
    }

    /// Decodes the frame at the beginning of the received bytes.
    pub fn frame(&self, limit: usize) -> DecodedFrame<'_> {
        decode(&self.received, limit)
    }

    /// Returns whether received bytes are not consumed yet.
    pub fn has_received(&self) -> bool {
        !self.received.is_empty()
    }

    /// Drops the first `used` received bytes.
    pub fn consume(&mut self, used: usize) {
        self.received.drain(..used);
        if self.received.is_empty() {
            self.received.shrink_to(KEPT);
        }
    }

    /// For a program that has ended: returns whether it had not read all bytes, so that the last call
    /// cannot have begun.
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
