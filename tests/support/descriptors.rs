//! Creates descriptors as an attacker uses them: one whose close blocks, and copies of another process's
//! descriptors.
#![allow(unsafe_code)]

use std::fs;
use std::io::{self, IoSlice, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg, setsockopt, sockopt};

/// The time for which the last close of a `lingering` socket blocks.
pub const LINGER: Duration = Duration::from_secs(5);
/// SO_PASSRIGHTS (asm/socket.h, Linux 6.16).
const SO_PASSRIGHTS: libc::c_int = 83;

/// Returns a socket whose last close blocks (SO_LINGER with unsent bytes), and its peer, which reads
/// nothing.
pub fn lingering() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (deaf, _) = listener.accept().unwrap();
    client.set_nonblocking(true).unwrap();
    while client.write(&[0; 1 << 16]).is_ok() {}
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: LINGER.as_secs() as libc::c_int,
    };
    setsockopt(&client, sockopt::Linger, &linger).unwrap();
    (client.into(), deaf)
}

/// Sends bytes with descriptors attached (SCM_RIGHTS, unix(7)).
pub fn send(to: &impl AsRawFd, bytes: &[u8], fds: &[RawFd]) -> nix::Result<usize> {
    let rights = [ControlMessage::ScmRights(fds)];
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    sendmsg::<()>(to.as_raw_fd(), &[IoSlice::new(bytes)], &rights, flags, None)
}

/// Lets a socket accept descriptors, as every socket does before Linux 6.16. Returns false on such a
/// kernel.
pub fn allow(fd: &impl AsFd) -> bool {
    let yes: libc::c_int = 1;
    // SAFETY: the pointer and the length describe `yes`, which outlives the call.
    let done = unsafe {
        libc::setsockopt(
            fd.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PASSRIGHTS,
            (&raw const yes).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    done == 0
}

/// Returns the sockets of another process, by inode.
pub fn sockets_of(pid: i32) -> Vec<(String, RawFd)> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let socket = |path: std::path::PathBuf| {
        let target = fs::read_link(&path)
            .ok()?
            .into_os_string()
            .into_string()
            .ok()?;
        let number = path.file_name()?.to_str()?.parse().ok()?;
        target.starts_with("socket:").then_some((target, number))
    };
    entries
        .filter_map(|entry| socket(entry.ok()?.path()))
        .collect()
}

/// Returns a copy of another process's descriptor (pidfd_getfd(2)), as an attacker in that process has
/// it.
///
/// # Errors
/// EPERM if this process may not trace that one.
pub fn borrow(pid: i32, fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: no pointer is passed.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    // SAFETY: the kernel has just created it, so it has no other owner.
    let pidfd = unsafe { OwnedFd::from_raw_fd(Errno::result(pidfd)? as RawFd) };
    // SAFETY: no pointer is passed.
    let copy = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) };
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(Errno::result(copy)? as RawFd) })
}
