//! Sockets: listening ones with their options, the packet pairs between processes, who is there.
//!
//! Leaves reading and writing of client connections to `event`. Fails with the system's error;
//! the caller adds the address and the remedy.

#![allow(unsafe_code)]

use std::io::{self, IoSlice, IoSliceMut};
use std::mem;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::cmsg_space;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType,
    SockaddrStorage, UnixAddr, bind, connect, getpeername, getsockname, getsockopt, listen, recv,
    recvmsg, sendmsg, setsockopt, socket, socketpair, sockopt,
};
use nix::sys::stat::{Mode, fchmod};

use super::rights;

/// How long half-open peers are kept (design.md, `limits.idle-timeout`).
const KEEPALIVE_IDLE_S: u32 = 60;
const KEEPALIVE_INTERVAL_S: u32 = 10;
const KEEPALIVE_PROBES: u32 = 6;

/// The most that a backlog can be; the kernel caps it at net.core.somaxconn.
pub const MOST_BACKLOG: u32 = i32::MAX as u32;

/// Binds a TCP socket, not listening yet.
///
/// # Errors
/// EADDRINUSE, EADDRNOTAVAIL, EACCES, and what else bind(2) knows.
pub fn bind_tcp(address: SocketAddr) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let fd = stream_socket(family)?;
    // So that a restart need not wait for the old connections' TIME_WAIT.
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    if address.is_ipv6() {
        // Or [::] would take the IPv4 port too, and depend on a sysctl.
        setsockopt(&fd, sockopt::Ipv6V6Only, &true)?;
    }
    bind(fd.as_raw_fd(), &SockaddrStorage::from(address))?;
    Ok(fd)
}

/// Binds a unix stream socket, not listening yet. The path must be free. The file gets `mode` less the
/// umask: it takes the mode of the socket, so that no path has to be changed afterwards.
///
/// # Errors
/// EADDRINUSE when the path exists, EACCES, ENOENT, ENAMETOOLONG.
pub fn bind_unix(path: &Path, mode: u32) -> io::Result<OwnedFd> {
    let fd = stream_socket(AddressFamily::Unix)?;
    fchmod(&fd, Mode::from_bits_truncate(mode))?;
    // Before anybody can connect: connections have this from the beginning.
    rights::refuse(&fd);
    bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(fd)
}

/// Where the other end of a connection is; `None` where that is no address, as over a unix socket,
/// and where it has gone.
pub fn peer(fd: &impl AsRawFd) -> Option<SocketAddr> {
    let peer: SockaddrStorage = getpeername(fd.as_raw_fd()).ok()?;
    let v4 = peer
        .as_sockaddr_in()
        .map(|&peer| SocketAddr::V4(peer.into()));
    v4.or_else(|| {
        peer.as_sockaddr_in6()
            .map(|&peer| SocketAddr::V6(peer.into()))
    })
}

fn stream_socket(family: AddressFamily) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket(family, SockType::Stream, flags, None)?)
}

/// Connects to a unix stream socket, and waits at most so long for room in its backlog; `None` for ever.
///
/// # Errors
/// `TimedOut` when there was none; ECONNREFUSED, ENOENT, EACCES, and what else connect(2) knows.
pub fn connect_unix(path: &Path, limit: Option<Duration>) -> io::Result<UnixStream> {
    let fd = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let stream = UnixStream::from(fd);
    let address = UnixAddr::new(path)?;
    // SO_SNDTIMEO holds for connect(2) too, and zero would be no limit (socket(7)).
    stream.set_write_timeout(limit.map(|limit| limit.max(Duration::from_millis(1))))?;
    loop {
        match connect(stream.as_raw_fd(), &address) {
            Ok(()) => break,
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            Err(error) => return Err(error.into()),
        }
    }
    stream.set_write_timeout(None)?;
    Ok(stream)
}

/// Connects to a unix stream socket and lets go again, without waiting: `Ok`, and every error but
/// ECONNREFUSED, mean that it is somebody's.
///
/// # Errors
/// ECONNREFUSED: nobody listens. EAGAIN: somebody does, and is busy. EPROTOTYPE: another kind.
pub fn try_unix(path: &Path) -> io::Result<()> {
    let fd = stream_socket(AddressFamily::Unix)?;
    Ok(connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?)
}

/// Listens, or changes the backlog of a socket that listens already (listen(2)). The kernel caps
/// it at net.core.somaxconn.
///
/// # Errors
/// EADDRINUSE when another socket took the port meanwhile.
pub fn start_listening(fd: &impl AsFd, backlog: u32) -> io::Result<()> {
    let backlog = i32::try_from(backlog).unwrap_or(i32::MAX);
    // Plain listen(2) caps silently; `Backlog::new` refuses more than SOMAXCONN, an old constant.
    let backlog = Backlog::new(backlog).unwrap_or(Backlog::MAXALLOWABLE);
    Ok(listen(fd, backlog)?)
}

/// Sets what every accepted connection shall have. Linux hands these down from the listening
/// socket, so that an accept costs no further system call. A unix socket has none of them.
///
/// # Errors
/// When the socket is no TCP socket.
pub fn set_tcp_options(fd: &impl AsFd, write_timeout: Duration) -> io::Result<()> {
    // Nagle's algorithm against delayed acknowledgements costs 44 ms for an answer in two parts.
    setsockopt(fd, sockopt::TcpNoDelay, &true)?;
    setsockopt(fd, sockopt::KeepAlive, &true)?;
    setsockopt(fd, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE_S)?;
    setsockopt(fd, sockopt::TcpKeepInterval, &KEEPALIVE_INTERVAL_S)?;
    setsockopt(fd, sockopt::TcpKeepCount, &KEEPALIVE_PROBES)?;
    let timeout_ms = u32::try_from(write_timeout.as_millis()).unwrap_or(u32::MAX);
    setsockopt(fd, sockopt::TcpUserTimeout, &timeout_ms)?;
    Ok(())
}

/// Sends the acknowledgement of received bytes at once (TCP_QUICKACK, tcp(7)). An error changes nothing but
/// the time.
pub fn acknowledge_now(fd: &impl AsFd) {
    let on: libc::c_int = 1;
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the pointer and the length describe `on`, which outlives the call.
    unsafe {
        libc::setsockopt(
            fd.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_QUICKACK,
            (&raw const on).cast(),
            length,
        );
    }
}

/// Sets O_NONBLOCK (fcntl(2)). All processes that have the socket share this flag, so any of them can have
/// cleared it, and accept4(2) would wait then. Returns whether that was so.
///
/// # Errors
/// If fcntl(2) fails.
pub fn restore_nonblocking(fd: &impl AsFd) -> io::Result<bool> {
    let flags = OFlag::from_bits_retain(fcntl(fd.as_fd(), FcntlArg::F_GETFL)?);
    let was_cleared = !flags.contains(OFlag::O_NONBLOCK);
    if was_cleared {
        fcntl(fd.as_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    }
    Ok(was_cleared)
}

/// Whether it is a stream socket that listens.
pub fn is_listening(fd: &impl AsFd) -> bool {
    getsockopt(fd, sockopt::SockType) == Ok(SockType::Stream)
        && getsockopt(fd, sockopt::AcceptConn) == Ok(true)
}

/// Whether it is a stream socket with another end.
pub fn is_connected(fd: &impl AsFd) -> bool {
    getsockopt(fd, sockopt::SockType) == Ok(SockType::Stream)
        && getpeername::<SockaddrStorage>(fd.as_fd().as_raw_fd()).is_ok()
}

/// Where a socket is bound.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Bound {
    /// An IP address and port, the real port where 0 was asked for.
    Tcp(SocketAddr),
    /// A path in the file system.
    Unix(std::path::PathBuf),
}

/// Where `fd` is bound, if that is an address of ours.
pub fn bound_address(fd: &impl AsFd) -> Option<Bound> {
    let storage: SockaddrStorage = getsockname(fd.as_fd().as_raw_fd()).ok()?;
    if let Some(v4) = storage.as_sockaddr_in() {
        return Some(Bound::Tcp(SocketAddr::V4((*v4).into())));
    }
    if let Some(v6) = storage.as_sockaddr_in6() {
        return Some(Bound::Tcp(SocketAddr::V6((*v6).into())));
    }
    let path = storage.as_unix_addr()?.path()?;
    Some(Bound::Unix(path.to_owned()))
}

/// Connections that wait to be accepted, and how many may: of a listening TCP socket, from
/// TCP_INFO (tcp(7); on a listening socket tcpi_unacked is the queue and tcpi_sacked its limit).
pub fn accept_queue(fd: &impl AsFd) -> Option<(u32, u32)> {
    tcp_info(fd).map(|info| (info.tcpi_unacked, info.tcpi_sacked))
}

/// How many milliseconds ago the last bytes came, of a connected TCP socket from which nothing
/// was read yet: its first bytes have waited for at least so long (tcpi_last_data_recv, tcp(7)).
/// 0 where that can't be told.
pub fn waited_ms(fd: &impl AsFd) -> u64 {
    // Counted in the kernel's ticks, up to 10 ms long: without one it is a lower bound.
    let info = tcp_info(fd);
    info.map_or(0, |info| {
        u64::from(info.tcpi_last_data_recv.saturating_sub(10))
    })
}

fn tcp_info(fd: &impl AsFd) -> Option<libc::tcp_info> {
    // SAFETY: the structure is plain data for the kernel to fill; zero is a valid value.
    let mut info: libc::tcp_info = unsafe { mem::zeroed() };
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the pointer and the length describe `info`, which outlives the call.
    let done = unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    (done == 0).then_some(info)
}

/// The user at the other end of a connected unix socket (SO_PEERCRED, unix(7)).
///
/// # Errors
/// When it is no unix socket.
pub fn peer_user(fd: &impl AsFd) -> io::Result<u32> {
    Ok(getsockopt(fd, sockopt::PeerCredentials)?.uid())
}

/// Has a connection reset, or else merely ended, when its last descriptor is closed, by whomever:
/// the end of a process closes it, too (SO_LINGER, socket(7)).
pub fn reset_when_closed(fd: &impl AsFd, reset: bool) {
    let at_once = libc::linger {
        l_onoff: reset.into(),
        l_linger: 0,
    };
    // Refused by what is no TCP socket, which just ends.
    let _ = setsockopt(fd, sockopt::Linger, &at_once);
}

/// Whether a connection that has nothing to say was ended by its peer, or broken. What it has to
/// say stays where it is.
pub fn has_ended(fd: &impl AsFd) -> bool {
    let mut byte = [0];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    match recv(fd.as_fd().as_raw_fd(), &mut byte, flags) {
        Ok(length) => length == 0,
        Err(error) => !matches!(error, Errno::EAGAIN | Errno::EINTR),
    }
}

/// Two stream sockets that are each other's peers: ours, which does not wait and takes no
/// descriptors where the kernel can refuse them, and another program's, which waits.
///
/// # Errors
/// When there is no descriptor left.
pub fn stream_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags)?;
    fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    rights::refuse(&ours);
    Ok((ours, theirs))
}

/// Whether the peer of a unix stream socket has not read all that was sent (SIOCOUTQ, unix(7)).
pub fn has_unread(fd: &impl AsFd) -> bool {
    queued(fd, libc::TIOCOUTQ).is_some_and(|bytes| bytes > 0)
}

/// Whether nothing is on its way, neither what has come and was not read nor what was sent and its
/// peer's kernel has not taken.
pub fn is_silent(fd: &impl AsFd) -> bool {
    [libc::FIONREAD, libc::TIOCOUTQ]
        .into_iter()
        .all(|which| queued(fd, which).is_none_or(|bytes| bytes == 0))
}

/// SIOCINQ and SIOCOUTQ (tcp(7), unix(7)), under their other names.
pub(super) fn queued(fd: &impl AsFd, which: libc::Ioctl) -> Option<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the pointer is to a live integer, which is what both requests write.
    let done = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), which, &raw mut bytes) };
    (done == 0).then(|| u64::try_from(bytes).ok()).flatten()
}

/// Two connected ends that keep packets whole and tell when the other one is gone
/// (SOCK_SEQPACKET, unix(7)); non-blocking, close-on-exec.
///
/// # Errors
/// EMFILE, ENFILE.
pub fn packet_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        flags,
    )?)
}

/// Most descriptors in one packet of anybody's (SCM_MAX_FD, unix(7)): the kernel would close what
/// finds no room, and its close may block.
const MOST_DESCRIPTORS: usize = 253;

/// How often a packet is sent again at once.
const MOST_TRIES: u32 = 3;

/// Sends one packet, made of `parts`, with descriptors (SCM_RIGHTS, unix(7)).
///
/// # Errors
/// EAGAIN when the queue is full, EPIPE when the other end is gone, ETOOMANYREFS when too many
/// descriptors are on their way.
pub fn send_packet(
    fd: &impl AsFd,
    parts: &[&[u8]],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let parts: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
    let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    let mut tries = 0;
    loop {
        match sendmsg::<()>(fd.as_fd().as_raw_fd(), &parts, control, flags, None) {
            Err(Errno::EINTR) => continue,
            // Short of memory for a moment; an order that is lost would cost a worker.
            Err(Errno::ENOBUFS | Errno::ENOMEM) if tries < MOST_TRIES => tries += 1,
            other => return Ok(other.map(drop)?),
        }
    }
}

/// Receives one packet: its length and the descriptors that came along. A length of 0 means that
/// the other end is gone. To be called only while as many descriptors can be had: the kernel
/// drops what does not fit.
///
/// # Errors
/// EAGAIN when there is none.
pub fn receive_packet(fd: &impl AsFd, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    loop {
        let mut control = cmsg_space!([RawFd; MOST_DESCRIPTORS]);
        let mut parts = [IoSliceMut::new(buffer)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let raw = fd.as_fd().as_raw_fd();
        let message = match recvmsg::<()>(raw, &mut parts, Some(&mut control), flags) {
            Err(Errno::EINTR) => continue,
            other => other?,
        };
        let mut received = Vec::new();
        // A packet whose descriptors found no room is a packet without them, and no end.
        for control in message.cmsgs().into_iter().flatten() {
            if let ControlMessageOwned::ScmRights(descriptors) = control {
                received.extend(descriptors.into_iter().map(|descriptor| {
                    // SAFETY: the kernel has just installed it for us; nobody else knows it.
                    unsafe { OwnedFd::from_raw_fd(descriptor) }
                }));
            }
        }
        return Ok((message.bytes, received));
    }
}

/// Whether so many descriptors as one packet of ours carries can be had right now.
pub fn has_room_for_packet(any: &impl AsFd) -> bool {
    let first = any.as_fd().try_clone_to_owned();
    let second = any.as_fd().try_clone_to_owned();
    first.is_ok() && second.is_ok()
}

/// A pipe whose reading end does not wait; close-on-exec.
///
/// # Errors
/// When there is no descriptor left.
pub fn nonblocking_pipe() -> io::Result<(io::PipeReader, io::PipeWriter)> {
    let (reader, writer) = io::pipe()?;
    fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok((reader, writer))
}

/// Whether it is a stream socket, with or without another end.
pub fn is_stream_socket(fd: &impl AsFd) -> bool {
    getsockopt(fd, sockopt::SockType) == Ok(SockType::Stream)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::io::{Read, Write};

    #[test]
    fn a_packet_carries_a_descriptor_and_the_end_is_an_empty_one() {
        let (one, other) = packet_pair().unwrap();
        let (reader, writer) = io::pipe().unwrap();
        send_packet(&one, &[b"or", b"der"], &[writer.as_fd()]).unwrap();
        drop(writer);
        let mut buffer = [0; 16];
        let (length, descriptors) = receive_packet(&other, &mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"order");
        assert_eq!(descriptors.len(), 1);
        drop(descriptors);
        // Both writers are closed now, so the pipe is at its end.
        let mut reader = reader;
        assert_eq!(reader.read(&mut buffer).unwrap(), 0);
        let empty = receive_packet(&other, &mut buffer).unwrap_err();
        assert_eq!(empty.kind(), io::ErrorKind::WouldBlock);
        drop(one);
        // A child that another test starts has a copy until its exec.
        let mut end = [PollFd::new(other.as_fd(), PollFlags::POLLIN)];
        poll(&mut end, PollTimeout::MAX).unwrap();
        assert_eq!(receive_packet(&other, &mut buffer).unwrap().0, 0);
    }

    #[test]
    fn a_listening_socket_tells_its_queue() {
        let fd = bind_tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        start_listening(&fd, 7).unwrap();
        set_tcp_options(&fd, Duration::from_secs(30)).unwrap();
        let Some(Bound::Tcp(address)) = bound_address(&fd) else {
            panic!("no TCP address");
        };
        let mut client = std::net::TcpStream::connect(address).unwrap();
        assert_eq!(accept_queue(&fd), Some((1, 7)));
        let begin = std::time::Instant::now();
        client.write_all(b"x").unwrap();
        let server = std::net::TcpListener::from(fd).accept().unwrap().0;
        let waited = loop {
            match waited_ms(&server) {
                0 => assert!(begin.elapsed() < Duration::from_secs(5)),
                waited => break waited,
            }
        };
        assert!(
            u128::from(waited) <= begin.elapsed().as_millis() + 1,
            "{waited}"
        );
    }
}
