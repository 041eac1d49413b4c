//! Sends what waits, and notices that a peer has closed its end.
//!
//! A peer that has closed may have sent bytes before, which are read to the end. So only what was to be
//! sent to it is dropped. An error of the connection itself is left to `Reactor::fail`.

use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockaddrLike, SockaddrStorage, getsockname, send};

use super::io_progress::UnsentData;
use super::reactor::{Reactor, Socket};
use super::send_buffer::SendBuffer;
use super::{Completion, Driver, Token};

impl Reactor {
    pub(super) fn send_unsent(&mut self, token: Token, driver: &mut impl Driver) {
        let witness = self.witness;
        let Some(socket) = self.socket(token).filter(|socket| !socket.failed) else {
            return;
        };
        match send_some(socket, socket.unsent.pending()) {
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
            Err(error) if is_closed_unix(socket, error) => {
                self.drop_output(token);
                driver.complete(self, Completion::Sent { token });
            }
            Err(error) => self.fail(token, error),
        }
    }

    /// The peer has closed the connection. That is told once everything was read, or if it is not read
    /// at the moment.
    pub(super) fn tell_hang_up(&mut self, token: Token, driver: &mut impl Driver) {
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
    pub(super) fn drop_output(&mut self, token: Token) {
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
}

/// Returns whether `error` of send(2) says that the peer has closed a unix socket. What it sent before
/// can still be read. On TCP, EPIPE may stand for a reset.
pub(super) fn is_closed_unix(socket: &Socket, error: Errno) -> bool {
    let name = || getsockname::<SockaddrStorage>(socket.fd.as_raw_fd());
    error == Errno::EPIPE && name().is_ok_and(|name| name.family() == Some(AddressFamily::Unix))
}

/// Sends what the kernel takes now: 0 when it is full.
pub(super) fn send_some(socket: &Socket, bytes: &[u8]) -> Result<usize, Errno> {
    loop {
        // MSG_NOSIGNAL: whether SIGPIPE is ignored is the host program's affair.
        return match send(socket.fd.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL) {
            Err(Errno::EINTR) => continue,
            Err(Errno::EAGAIN) => Ok(0),
            other => other,
        };
    }
}
