//! Protects a receiver from descriptors that its peer attaches to a message (SCM_RIGHTS, unix(7)).
//!
//! Closing a descriptor can block for as long as its sender wants (SO_LINGER with unsent bytes,
//! socket(7)). A receiver that expects none would close it inside recv(2), in its own thread.
//! Since Linux 6.16 a socket can refuse descriptors: the peer's sendmsg(2) fails with EPERM. On
//! older kernels each message is looked at before it is received, and the socket is closed by
//! another thread or process, because close(2) also closes what was not received. A pipe is no way
//! out: its writer holds the reader's lock while the kernel copies the writer's memory, and a page
//! fault there can last as long as the writer wants.

#![allow(unsafe_code)]

use std::cell::Cell;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc::{self, c_int};
use nix::sys::socket::{MsgFlags, Shutdown, getsockopt, recv, shutdown, sockopt};

/// Whether a unix socket takes descriptors (asm/socket.h, Linux 6.16); libc does not have it yet.
const SO_PASSRIGHTS: c_int = if cfg!(any(target_arch = "sparc", target_arch = "sparc64")) {
    0x005c
} else {
    83
};
/// asm/socket.h, Linux 6.5; likewise.
const SO_PASSPIDFD: c_int = if cfg!(any(target_arch = "sparc", target_arch = "sparc64")) {
    0x0055
} else {
    76
};

/// Makes a unix socket refuse descriptors, and a listening one those of all connections made from
/// now on. Returns whether it does: false before Linux 6.16, and for a socket of another kind.
pub fn refuse(fd: &impl AsFd) -> bool {
    set_option(fd, SO_PASSRIGHTS, 0).is_ok()
}

/// Whether a peer can attach descriptors to what it sends to this socket.
pub fn may_arrive(fd: &impl AsFd) -> bool {
    match option(fd, SO_PASSRIGHTS) {
        Ok(allowed) => allowed != 0,
        Err(_) => is_unix(fd),
    }
}

/// Whether it is a unix socket (SO_DOMAIN, socket(7)).
pub fn is_unix(fd: &impl AsFd) -> bool {
    option(fd, libc::SO_DOMAIN) == Ok(libc::AF_UNIX)
}

/// A socket whose peer is not trusted: neither receiving nor closing waits for a descriptor that
/// the peer has attached.
#[derive(Debug)]
pub struct GuardedSocket {
    /// Taken by `drop` only.
    fd: ManuallyDrop<OwnedFd>,
    /// Each message is looked at before it is received.
    looks_first: bool,
    /// Closes it, where this thread must not.
    close: Cell<Option<fn(OwnedFd)>>,
}

impl GuardedSocket {
    /// A connected socket. `close` is called with it where descriptors may lie in it unreceived.
    pub fn new(fd: OwnedFd, close: fn(OwnedFd)) -> Self {
        let looks_first = may_arrive(&fd);
        if looks_first {
            // Each of these would look like a descriptor below. A service manager may have set them.
            for name in [libc::SO_PASSCRED, libc::SO_PASSSEC, SO_PASSPIDFD] {
                let _ = set_option(&fd, name, 0);
            }
            // Or recv(2) would drop an urgent byte, and what is attached to it, unseen.
            let _ = set_option(&fd, libc::SO_OOBINLINE, 1);
        }
        GuardedSocket {
            fd: ManuallyDrop::new(fd),
            looks_first,
            close: Cell::new(looks_first.then_some(close)),
        }
    }

    /// A socket that was accepted. `has_unix` is false where no listener is a unix socket, which
    /// saves a system call.
    pub fn accepted(fd: OwnedFd, has_unix: bool, close: fn(OwnedFd)) -> Self {
        match has_unix {
            true => GuardedSocket::new(fd, close),
            false => GuardedSocket::trusted(fd),
        }
    }

    /// A socket that another process has made and sent: `close` closes it also where its own close
    /// would block.
    pub fn received(fd: OwnedFd, close: fn(OwnedFd)) -> Self {
        let socket = GuardedSocket::new(fd, close);
        socket.close.set(Some(close));
        socket
    }

    /// A socket that takes no descriptors, or whose peer is trusted.
    pub fn trusted(fd: OwnedFd) -> Self {
        GuardedSocket {
            fd: ManuallyDrop::new(fd),
            looks_first: false,
            close: Cell::new(None),
        }
    }

    /// Another process has it too, and goes on with it: closing it here closes nothing else.
    pub fn mark_shared(&self) {
        self.close.set(None);
    }

    /// Receives at most `buffer.len()` bytes, or one packet, without waiting; 0 at the end.
    ///
    /// # Errors
    /// EBADMSG when descriptors are attached to what comes next. Then `buffer` has its bytes, and
    /// they stay in the socket, which is good for nothing but sending any more. EAGAIN when there is
    /// nothing; what else recv(2) answers.
    #[inline]
    pub fn receive(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        let flags = MsgFlags::MSG_DONTWAIT;
        if !self.looks_first {
            return recv(self.fd.as_raw_fd(), buffer, flags);
        }
        match self.look(buffer)? {
            0 => Ok(0),
            // What comes behind it meanwhile was not looked at.
            length => recv(self.fd.as_raw_fd(), &mut buffer[..length], flags),
        }
    }

    /// Copies what comes next and leaves it where it is. Descriptors are not installed, because
    /// there is no room for them; the kernel says so, and closes none of them (MSG_PEEK).
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
    /// Whether close(2) may block, for what lies in it or for itself. Where it takes descriptors,
    /// nothing more is received afterwards.
    fn may_block(&self) -> bool {
        if !self.looks_first {
            let linger = getsockopt(&*self.fd, sockopt::Linger);
            return linger.is_ok_and(|linger| linger.l_onoff != 0 && linger.l_linger > 0);
        }
        // The peer can add nothing after that.
        let _ = shutdown(self.fd.as_raw_fd(), Shutdown::Read);
        // Of packets an empty one looks like the end.
        let is_stream = option(&*self.fd, libc::SO_TYPE) == Ok(libc::SOCK_STREAM);
        !is_stream || self.look(&mut [0]) != Ok(0)
    }
}

impl Drop for GuardedSocket {
    fn drop(&mut self) {
        let close = self.close.get().filter(|_| self.may_block());
        // SAFETY: it is taken here alone, and nobody uses it after its drop.
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
