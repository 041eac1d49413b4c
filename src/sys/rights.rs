//! Protects a receiver from descriptors that its peer attaches to a message (SCM_RIGHTS, unix(7)).
//!
//! Closing a descriptor can block for as long as its sender wants (SO_LINGER with unsent bytes,
//! socket(7)). A receiver that expects none would close it inside recv(2), in its own thread. Since Linux
//! 6.16 a socket can refuse descriptors: the peer's sendmsg(2) fails with EPERM. On older kernels each
//! message is checked before it is received, and another thread or process closes the socket, because
//! close(2) also closes descriptors that were not received. A pipe is no solution. Its writer holds the
//! reader's lock while the kernel copies the writer's memory. A page fault there can last as long as the
//! writer wants.

#![allow(unsafe_code)]

use std::cell::Cell;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc::{self, c_int};
use nix::sys::socket::{MsgFlags, Shutdown, getsockopt, recv, shutdown, sockopt};

/// Whether a unix socket accepts descriptors (asm/socket.h, Linux 6.16); libc does not define it yet.
const SO_PASSRIGHTS: c_int = if cfg!(any(target_arch = "sparc", target_arch = "sparc64")) {
    0x005c
} else {
    83
};
/// Defined in asm/socket.h since Linux 6.5; libc does not define it yet.
const SO_PASSPIDFD: c_int = if cfg!(any(target_arch = "sparc", target_arch = "sparc64")) {
    0x0055
} else {
    76
};

/// Makes a unix socket refuse descriptors. A listening socket passes that on to all later connections.
/// Returns whether it worked: `false` before Linux 6.16 and for other kinds of sockets.
pub fn refuse(fd: &impl AsFd) -> bool {
    set_option(fd, SO_PASSRIGHTS, 0).is_ok()
}

/// Returns whether a peer can attach descriptors to what it sends to this socket.
pub fn may_arrive(fd: &impl AsFd) -> bool {
    match option(fd, SO_PASSRIGHTS) {
        Ok(allowed) => allowed != 0,
        Err(_) => is_unix(fd),
    }
}

/// Returns whether it is a unix socket (SO_DOMAIN, socket(7)).
pub fn is_unix(fd: &impl AsFd) -> bool {
    option(fd, libc::SO_DOMAIN) == Ok(libc::AF_UNIX)
}

/// A socket whose peer is not trusted. Neither a receive nor a close waits for a descriptor that the peer
/// has attached.
#[derive(Debug)]
pub struct GuardedSocket {
    /// Taken only by `drop`.
    fd: ManuallyDrop<OwnedFd>,
    /// Whether each message is checked before it is received.
    looks_first: bool,
    /// Closes the socket if this thread must not.
    close: Cell<Option<fn(OwnedFd)>>,
}

impl GuardedSocket {
    /// Wraps a connected socket. If it may contain unreceived descriptors, `close` closes it.
    pub fn new(fd: OwnedFd, close: fn(OwnedFd)) -> Self {
        let looks_first = may_arrive(&fd);
        if looks_first {
            // Each of these would look like an attached descriptor in `look`. A service manager may have
            // set them.
            for name in [libc::SO_PASSCRED, libc::SO_PASSSEC, SO_PASSPIDFD] {
                let _ = set_option(&fd, name, 0);
            }
            // Otherwise recv(2) would drop an urgent byte and its attached descriptors without a check.
            let _ = set_option(&fd, libc::SO_OOBINLINE, 1);
        }
        GuardedSocket {
            fd: ManuallyDrop::new(fd),
            looks_first,
            close: Cell::new(looks_first.then_some(close)),
        }
    }

    /// Wraps an accepted socket. `has_unix` is false if no listener is a unix socket, which saves a
    /// system call.
    pub fn accepted(fd: OwnedFd, has_unix: bool, close: fn(OwnedFd)) -> Self {
        match has_unix {
            true => GuardedSocket::new(fd, close),
            false => GuardedSocket::trusted(fd),
        }
    }

    /// Wraps a socket that another process has made and sent. It is always closed by `close`, because close(2) of
    /// such a socket may block.
    pub fn received(fd: OwnedFd, close: fn(OwnedFd)) -> Self {
        let socket = GuardedSocket::new(fd, close);
        socket.close.set(Some(close));
        socket
    }

    /// Wraps a socket that accepts no descriptors, or whose peer is trusted.
    pub fn trusted(fd: OwnedFd) -> Self {
        GuardedSocket {
            fd: ManuallyDrop::new(fd),
            looks_first: false,
            close: Cell::new(None),
        }
    }

    /// Records that another process also has this socket and keeps it open, so this process can close it
    /// without blocking.
    pub fn mark_shared(&self) {
        self.close.set(None);
    }

    /// Receives at most `buffer.len()` bytes, or one packet, without waiting. Returns 0 at the end.
    ///
    /// # Errors
    /// EBADMSG if descriptors are attached to the next message. Then `buffer` has its bytes, and they
    /// also stay in the socket, which can only be used for sending from then on. EAGAIN if there is
    /// nothing to receive. Other errors of recv(2).
    #[inline]
    pub fn receive(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        let flags = MsgFlags::MSG_DONTWAIT;
        if !self.looks_first {
            return recv(self.fd.as_raw_fd(), buffer, flags);
        }
        match self.look(buffer)? {
            0 => Ok(0),
            // Bytes that arrived behind it were not checked.
            length => recv(self.fd.as_raw_fd(), &mut buffer[..length], flags),
        }
    }

    /// Copies the next message and leaves it in the socket. Descriptors are not installed, because there
    /// is no room for them. The kernel reports that (MSG_CTRUNC) and closes none of them (MSG_PEEK).
    fn look(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        let mut part = libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        };
        // SAFETY: the structure is plain data; zero means no address and no control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
        // SAFETY: the message names `buffer` with its length, and both outlive the call.
        let length = unsafe { libc::recvmsg(self.fd.as_raw_fd(), &raw mut message, flags) };
        let length = Errno::result(length)?;
        match message.msg_flags & libc::MSG_CTRUNC {
            0 => Ok(length.unsigned_abs()),
            _ => Err(Errno::EBADMSG),
        }
    }
}

impl GuardedSocket {
    /// Returns whether close(2) may block because of unreceived descriptors or SO_LINGER. If the socket
    /// accepts descriptors, nothing can be received afterwards.
    fn may_block(&self) -> bool {
        if !self.looks_first {
            let linger = getsockopt(&*self.fd, sockopt::Linger);
            return linger.is_ok_and(|linger| linger.l_onoff != 0 && linger.l_linger > 0);
        }
        // After this the peer can add nothing.
        let _ = shutdown(self.fd.as_raw_fd(), Shutdown::Read);
        // On a packet socket an empty packet looks like the end.
        let is_stream = option(&*self.fd, libc::SO_TYPE) == Ok(libc::SOCK_STREAM);
        !is_stream || self.look(&mut [0]) != Ok(0)
    }
}

impl Drop for GuardedSocket {
    fn drop(&mut self) {
        let close = self.close.get().filter(|_| self.may_block());
        // SAFETY: only this line takes it, and it is not used after the drop.
        let fd = unsafe { ManuallyDrop::take(&mut self.fd) };
        match close {
            Some(close) => close(fd),
            None => drop(fd),
        }
    }
}

impl AsFd for GuardedSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for GuardedSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

fn set_option(fd: &impl AsFd, name: c_int, value: c_int) -> Result<(), Errno> {
    // SAFETY: the pointer and the length describe `value`, which outlives the call.
    let done = unsafe {
        libc::setsockopt(
            fd.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            name,
            (&raw const value).cast(),
            size_of::<c_int>() as libc::socklen_t,
        )
    };
    Errno::result(done).map(drop)
}

fn option(fd: &impl AsFd, name: c_int) -> Result<c_int, Errno> {
    let mut value: c_int = 0;
    let mut length = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: the pointer and the length describe `value`, which outlives the call.
    let done = unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            name,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    Errno::result(done).map(|_| value)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "rights_tests.rs"]
mod tests;
