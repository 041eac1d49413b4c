//! Creates a process with its own memory that shares the descriptor table of this process (clone(2) with
//! CLONE_FILES). A descriptor that one of them opens or closes is open or closed in both. When one of
//! them ends, nothing is closed: the descriptors live as long as either process.
//!
//! The clone is a sibling, not a child (CLONE_PARENT), so that one parent reaps both. The callers decide
//! what the clone does. Fails with the system's error.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::AtomicI32;

use nix::errno::Errno;
use nix::libc;

use super::process::{Fork, Pid, thread_count};
use super::socket::queued;

/// Clones this process. Its pid is in `pid` before the clone runs its first instruction. So processes
/// that share that memory know the pid even if this process ends at once.
///
/// While this process lives, the clone must not use descriptor numbers that it remembers, because they
/// may have been reused.
///
/// # Panics
/// If this process has more than one thread, as `process::fork` does.
///
/// # Errors
/// EAGAIN or ENOMEM if no process can be created, EINVAL in the first process of a pid namespace, EPERM
/// if a seccomp filter forbids it.
pub fn clone_process(pid: &AtomicI32) -> io::Result<Fork> {
    let threads = thread_count();
    assert!(
        threads <= 1,
        "a clone with {threads} threads alive: it would inherit their locks"
    );
    let flags = libc::CLONE_FILES | libc::CLONE_PARENT | libc::CLONE_PARENT_SETTID | libc::SIGCHLD;
    // SAFETY: without CLONE_VM the clone continues on its own copy of this stack, as after fork(2). There
    // is one thread, so no other thread holds a lock. The kernel writes the pid to an integer that
    // outlives the call. With these flags the later arguments are unused. The clone leaves by `_exit` and
    // never asks libc for its thread id, because libc still has the old one.
    let made = unsafe { libc::syscall(libc::SYS_clone, flags, 0, pid.as_ptr(), 0, 0) };
    match Errno::result(made)? {
        0 => Ok(Fork::Child),
        made => Ok(Fork::Parent(Pid(i32::try_from(made).unwrap_or(0)))),
    }
}

/// Returns a descriptor of this process that becomes readable when it has ended (pidfd_open(2), Linux
/// 5.3).
///
/// # Errors
/// ENOSYS before Linux 5.3, EMFILE.
pub fn pidfd_self() -> io::Result<OwnedFd> {
    // SAFETY: no pointer is passed.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, Pid::current().0, 0) };
    let fd = RawFd::try_from(Errno::result(fd)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just created it, so it has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Has the kernel send SIGKILL to this process when its parent ends (PR_SET_PDEATHSIG(2const)). Returns
/// whether `parent` was still alive after that.
///
/// # Errors
/// None known.
pub fn end_with_parent(parent: Pid) -> io::Result<bool> {
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
    Ok(Pid::parent() == parent)
}

/// Takes ownership of a descriptor by its number. Returns `None` if it is not open.
///
/// # Safety
/// No value of this process may own the descriptor. A keeper keeps this after its worker, which
/// shared the descriptor table and owned it, has ended.
pub unsafe fn take_fd(fd: RawFd) -> Option<OwnedFd> {
    // SAFETY: F_GETFD takes no argument; a number that is not open is an error.
    let open = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    // SAFETY: it is open, and the caller promises that nothing here owns it.
    (open >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Calls `look` with a descriptor by its number. Returns `None` if it is not open.
///
/// # Safety
/// The descriptor must stay open until `look` returns.
pub unsafe fn borrow_fd<T>(fd: RawFd, look: impl FnOnce(BorrowedFd<'_>) -> T) -> Option<T> {
    // SAFETY: ownership is given up below, so the descriptor never has two owners.
    let held = unsafe { take_fd(fd) }?;
    let seen = look(held.as_fd());
    // The descriptor is not ours to close.
    let _ = std::os::fd::IntoRawFd::into_raw_fd(held);
    Some(seen)
}

/// Returns how many bytes were received from and sent to a TCP stream, as seen by the process that has it
/// (tcp(7), tcp_info in linux/tcp.h). Returns `None` if the kernel does not count them, or if it has
/// counted the end of the stream (FIN) like a byte.
pub fn stream_offsets(fd: &impl AsFd) -> Option<(u64, u64)> {
    // Both counters may change while they are read: the peer sends and acknowledges.
    for _ in 0..16 {
        let before = counters(fd)?;
        let (unread, unacknowledged) = (queued(fd, libc::FIONREAD)?, queued(fd, libc::TIOCOUTQ)?);
        let after = counters(fd)?;
        if before == after {
            return Some((
                before.received.checked_sub(unread)?,
                before.acknowledged + unacknowledged,
            ));
        }
    }
    None
}

#[derive(PartialEq, Eq)]
struct Counters {
    received: u64,
    acknowledged: u64,
}

/// The value of tcpi_state for an established connection. In any other state a FIN may be counted like a
/// byte.
const ESTABLISHED: u8 = 1;
/// The offsets of tcpi_bytes_acked and tcpi_bytes_received (Linux 4.1).
const ACKNOWLEDGED_AT: usize = 120;
const RECEIVED_AT: usize = 128;

fn counters(fd: &impl AsFd) -> Option<Counters> {
    let mut info = [0_u8; 256];
    let mut length = info.len() as libc::socklen_t;
    // SAFETY: the pointer and the length describe `info`, which outlives the call.
    let done = unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if done != 0 || (length as usize) < RECEIVED_AT + 8 || info[0] != ESTABLISHED {
        return None;
    }
    let number = |at: usize| Some(u64::from_ne_bytes(info[at..at + 8].try_into().ok()?));
    Some(Counters {
        received: number(RECEIVED_AT)?,
        acknowledged: number(ACKNOWLEDGED_AT)?,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn stream_offsets_count_also_bytes_in_transit() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        assert_eq!(stream_offsets(&server), Some((0, 0)));
        client.write_all(&[7; 1000]).unwrap();
        let mut some = [0; 300];
        server.read_exact(&mut some).unwrap();
        assert_eq!(stream_offsets(&server), Some((300, 0)));
        server.write_all(&[1; 5000]).unwrap();
        assert_eq!(stream_offsets(&server), Some((300, 5000)));
        let mut answer = [0; 5000];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(stream_offsets(&server), Some((300, 5000)));
        drop(client);
        let mut rest = Vec::new();
        server.read_to_end(&mut rest).unwrap_or_default();
        assert_eq!(stream_offsets(&server), None, "a FIN is not a byte");
    }

    #[test]
    fn a_unix_stream_has_no_offsets() {
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(stream_offsets(&one), None);
    }
}
