//! Creates and configures sockets: listeners with their options, packet socketpairs between processes,
//! peer identity.
//!
//! `event` reads and writes client connections. Fails with the system's error; the caller adds the
//! address and the remedy.

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
    SockaddrStorage, UnixAddr, accept4, bind, connect, getpeername, getsockname, getsockopt,
    listen, recv, recvmsg, sendmsg, setsockopt, socket, socketpair, sockopt,
};
use nix::sys::stat::{Mode, fchmod};

use super::rights;

/// Seconds of silence after which a half-open peer is probed (SO_KEEPALIVE, `limits.idle-timeout`).
const KEEPALIVE_IDLE_S: u32 = 60;
const KEEPALIVE_INTERVAL_S: u32 = 10;
const KEEPALIVE_PROBES: u32 = 6;

/// The highest backlog; the kernel caps it at net.core.somaxconn.
pub const MOST_BACKLOG: u32 = i32::MAX as u32;

/// Binds a TCP socket that does not listen yet.
///
/// # Errors
/// EADDRINUSE, EADDRNOTAVAIL, EACCES, and other errors of bind(2).
pub fn bind_tcp(address: SocketAddr) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let fd = stream_socket(family)?;
    // Without it a restart would wait for the TIME_WAIT of old connections.
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    if address.is_ipv6() {
        // Otherwise [::] would also take the IPv4 port, depending on a sysctl.
        setsockopt(&fd, sockopt::Ipv6V6Only, &true)?;
    }
    bind(fd.as_raw_fd(), &SockaddrStorage::from(address))?;
    Ok(fd)
}

/// Binds a unix stream socket that does not listen yet. The path must be free. The file gets the mode of
/// the socket, which is `mode` less the umask, so no mode has to be changed afterwards.
///
/// # Errors
/// EADDRINUSE when the path exists, EACCES, ENOENT, ENAMETOOLONG.
pub fn bind_unix(path: &Path, mode: u32) -> io::Result<OwnedFd> {
    let fd = stream_socket(AddressFamily::Unix)?;
    fchmod(&fd, Mode::from_bits_truncate(mode))?;
    // Set it before a client can connect, because connections inherit it.
    rights::refuse(&fd);
    bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(fd)
}

/// Returns the address of the peer. Returns `None` if it has none, as on a unix socket, and if it is
/// gone.
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

/// Connects to a unix stream socket. Waits at most `limit` for room in its backlog; `None` waits for
/// ever.
///
/// # Errors
/// `TimedOut` if there was no room; ECONNREFUSED, ENOENT, EACCES, and other errors of connect(2).
pub fn connect_unix(path: &Path, limit: Option<Duration>) -> io::Result<UnixStream> {
    let fd = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let stream = UnixStream::from(fd);
    let address = UnixAddr::new(path)?;
    // SO_SNDTIMEO also limits connect(2); zero would mean no limit (socket(7)).
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

/// Connects to a unix stream socket without waiting and closes the connection. `Ok` and every error
/// except ECONNREFUSED mean that the socket is in use.
///
/// # Errors
/// ECONNREFUSED if no process listens. EAGAIN if a process listens but is busy. EPROTOTYPE for another
/// kind of socket.
pub fn try_unix(path: &Path) -> io::Result<()> {
    let fd = stream_socket(AddressFamily::Unix)?;
    Ok(connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?)
}

/// Listens, or changes the backlog of a socket that already listens (listen(2)). The kernel caps it at
/// net.core.somaxconn.
///
/// # Errors
/// EADDRINUSE if another socket took the port meanwhile.
pub fn start_listening(fd: &impl AsFd, backlog: u32) -> io::Result<()> {
    let backlog = i32::try_from(backlog).unwrap_or(i32::MAX);
    // Plain listen(2) caps silently; `Backlog::new` refuses more than SOMAXCONN, an old constant.
    let backlog = Backlog::new(backlog).unwrap_or(Backlog::MAXALLOWABLE);
    Ok(listen(fd, backlog)?)
}

/// Sets the options of accepted connections. On Linux they inherit these from the listener, so an accept
/// costs no further system call. A unix socket has none of these options.
///
/// # Errors
/// If the socket is no TCP socket.
pub fn set_tcp_options(fd: &impl AsFd, write_timeout: Duration) -> io::Result<()> {
    // Nagle's algorithm with delayed acknowledgements costs 44 ms for an answer in two writes.
    setsockopt(fd, sockopt::TcpNoDelay, &true)?;
    setsockopt(fd, sockopt::KeepAlive, &true)?;
    setsockopt(fd, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE_S)?;
    setsockopt(fd, sockopt::TcpKeepInterval, &KEEPALIVE_INTERVAL_S)?;
    setsockopt(fd, sockopt::TcpKeepCount, &KEEPALIVE_PROBES)?;
    let timeout_ms = u32::try_from(write_timeout.as_millis()).unwrap_or(u32::MAX);
    setsockopt(fd, sockopt::TcpUserTimeout, &timeout_ms)?;
    Ok(())
}

/// Acknowledges received bytes at once (TCP_QUICKACK, tcp(7)). An error only affects latency.
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

/// Sets O_NONBLOCK (fcntl(2)). All processes that have the socket share this flag, so any of them can
/// clear it, and then accept4(2) would wait. Returns whether it was cleared.
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

/// Returns whether it is a listening stream socket.
pub fn is_listening(fd: &impl AsFd) -> bool {
    getsockopt(fd, sockopt::SockType) == Ok(SockType::Stream)
        && getsockopt(fd, sockopt::AcceptConn) == Ok(true)
}

/// Returns whether it is a connected stream socket.
pub fn is_connected(fd: &impl AsFd) -> bool {
    getsockopt(fd, sockopt::SockType) == Ok(SockType::Stream)
        && getpeername::<SockaddrStorage>(fd.as_fd().as_raw_fd()).is_ok()
}

/// The address to which a socket is bound.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Bound {
    /// An IP address and port; the actual port if port 0 was requested.
    Tcp(SocketAddr),
    /// A path in the file system.
    Unix(std::path::PathBuf),
}

/// Returns the address of `fd`, if it is an IP address or a path.
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

/// Returns the number of connections that wait in the accept queue of a listening TCP socket, and its
/// limit. They come from TCP_INFO (tcp(7)): on a listener tcpi_unacked is the queue and tcpi_sacked its
/// limit.
pub fn accept_queue(fd: &impl AsFd) -> Option<(u32, u32)> {
    tcp_info(fd).map(|info| (info.tcpi_unacked, info.tcpi_sacked))
}

/// Returns how many milliseconds ago the last bytes arrived at a connected TCP socket
/// (tcpi_last_data_recv, tcp(7)). If nothing was read from it yet, its first bytes have waited for at
/// least this time. Returns 0 if it is unknown.
pub fn waited_ms(fd: &impl AsFd) -> u64 {
    // The kernel counts in ticks of up to 10 ms. Subtract one tick to get a lower bound.
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

/// Accepts one connection: non-blocking, close-on-exec.
///
/// # Errors
/// EAGAIN if there is none; the other errors of accept4(2).
pub fn accept(listener: &impl AsRawFd) -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = accept4(listener.as_raw_fd(), flags)?;
    // SAFETY: accept4 has just created this descriptor, so it has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(socket) })
}

/// Returns the user of the peer of a connected unix socket (SO_PEERCRED, unix(7)).
///
/// # Errors
/// If it is no unix socket.
pub fn peer_user(fd: &impl AsFd) -> io::Result<u32> {
    peer_process(fd).map(|(user, _)| user)
}

/// Returns user and pid of the process that connected a unix socket, or made a socketpair (SO_PEERCRED,
/// unix(7)). It may have ended since.
///
/// # Errors
/// If it is no unix socket.
pub fn peer_process(fd: &impl AsFd) -> io::Result<(u32, i32)> {
    let peer = getsockopt(fd, sockopt::PeerCredentials)?;
    Ok((peer.uid(), peer.pid()))
}

/// Chooses whether a connection is reset or ends normally when its last descriptor is closed, by any
/// process and also at the end of a process (SO_LINGER, socket(7)).
pub fn reset_when_closed(fd: &impl AsFd, reset: bool) {
    let at_once = libc::linger {
        l_onoff: reset.into(),
        l_linger: 0,
    };
    // Other sockets than TCP refuse it and end normally.
    let _ = setsockopt(fd, sockopt::Linger, &at_once);
}

/// Returns whether a connection without unread bytes was closed by its peer or is broken. Unread bytes
/// stay in the socket.
pub fn has_ended(fd: &impl AsFd) -> bool {
    let mut byte = [0];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    match recv(fd.as_fd().as_raw_fd(), &mut byte, flags) {
        Ok(length) => length == 0,
        Err(error) => !matches!(error, Errno::EAGAIN | Errno::EINTR),
    }
}

/// Creates two connected stream sockets. The first one is for this process: it is non-blocking and, if
/// the kernel supports it, refuses descriptors. The second one is for another program and blocks.
///
/// # Errors
/// If no descriptor is left.
pub fn stream_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags)?;
    fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    rights::refuse(&ours);
    Ok((ours, theirs))
}

/// Returns whether the peer of a unix stream socket has not read everything (SIOCOUTQ, unix(7)).
pub fn has_unread(fd: &impl AsFd) -> bool {
    queued(fd, libc::TIOCOUTQ).is_some_and(|bytes| bytes > 0)
}

/// Returns whether no bytes are in transit: all received bytes were read, and the peer's kernel has all
/// sent bytes.
pub fn is_silent(fd: &impl AsFd) -> bool {
    [libc::FIONREAD, libc::TIOCOUTQ]
        .into_iter()
        .all(|which| queued(fd, which).is_none_or(|bytes| bytes == 0))
}

/// Queries SIOCINQ or SIOCOUTQ (tcp(7), unix(7)), whose values equal FIONREAD and TIOCOUTQ.
pub(super) fn queued(fd: &impl AsFd, which: libc::Ioctl) -> Option<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the pointer is to a live integer, which is what both requests write.
    let done = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), which, &raw mut bytes) };
    (done == 0).then(|| u64::try_from(bytes).ok()).flatten()
}

/// Creates two connected sockets that keep packet boundaries and report when the peer is gone
/// (SOCK_SEQPACKET, unix(7)). Both are non-blocking and close-on-exec.
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

/// The largest number of descriptors in any packet (SCM_MAX_FD, unix(7)). The kernel would close descriptors without
/// room, and their close may block.
const MOST_DESCRIPTORS: usize = 253;

/// How often a packet is sent again without a pause.
const MOST_TRIES: u32 = 3;

/// Sends one packet, made of `parts`, with descriptors (SCM_RIGHTS, unix(7)).
///
/// # Errors
/// EAGAIN if the queue is full, EPIPE if the peer is gone, ETOOMANYREFS if too many descriptors are in
/// transit.
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
            // The kernel was briefly short of memory. A lost order would cost a worker, so try again.
            Err(Errno::ENOBUFS | Errno::ENOMEM) if tries < MOST_TRIES => tries += 1,
            other => return Ok(other.map(drop)?),
        }
    }
}

/// Receives one packet: its length and its descriptors. A length of 0 means that the peer is gone. Call
/// it only if enough descriptors are free, because the kernel drops those without room.
///
/// # Errors
/// EAGAIN if there is no packet.
pub fn receive_packet(fd: &impl AsFd, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    loop {
        let mut control = cmsg_space!([RawFd; MOST_DESCRIPTORS]);
        let mut parts = [IoSliceMut::new(buffer)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let raw = fd.as_fd().as_raw_fd();
        let message = match recvmsg::<()>(raw, &mut parts, Some(&mut control), flags) {
            // ECONNRESET: the peer has closed its end with unread packets. The kernel reports it once. The packets that
            // the peer had sent follow, and then the end.
            Err(Errno::EINTR | Errno::ECONNRESET) => continue,
            other => other?,
        };
        let mut received = Vec::new();
        // If there was no room for its descriptors, the packet arrives without them. It still has a length, so callers
        // do not take it for the end.
        for control in message.cmsgs().into_iter().flatten() {
            if let ControlMessageOwned::ScmRights(descriptors) = control {
                received.extend(descriptors.into_iter().map(|descriptor| {
                    // SAFETY: the kernel has just installed it, so it has no other owner.
                    unsafe { OwnedFd::from_raw_fd(descriptor) }
                }));
            }
        }
        return Ok((message.bytes, received));
    }
}

/// Returns whether this process can open as many descriptors as one of our packets carries.
pub fn has_room_for_packet(any: &impl AsFd) -> bool {
    let first = any.as_fd().try_clone_to_owned();
    let second = any.as_fd().try_clone_to_owned();
    first.is_ok() && second.is_ok()
}

/// Creates a pipe with a non-blocking reading end; both ends are close-on-exec.
///
/// # Errors
/// If no descriptor is left.
pub fn nonblocking_pipe() -> io::Result<(io::PipeReader, io::PipeWriter)> {
    let (reader, writer) = io::pipe()?;
    fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok((reader, writer))
}

/// Returns whether it is a stream socket, connected or not.
pub fn is_stream_socket(fd: &impl AsFd) -> bool {
    getsockopt(fd, sockopt::SockType) == Ok(SockType::Stream)
}

/// Returns whether it is a socket of packets that are connected (SOCK_SEQPACKET).
pub fn is_packet_socket(fd: &impl AsFd) -> bool {
    getsockopt(fd, sockopt::SockType) == Ok(SockType::SeqPacket)
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
        // A child that another test starts has a copy of the descriptor until its exec.
        let mut end = [PollFd::new(other.as_fd(), PollFlags::POLLIN)];
        poll(&mut end, PollTimeout::MAX).unwrap();
        assert_eq!(receive_packet(&other, &mut buffer).unwrap().0, 0);
    }

    #[test]
    fn a_listening_socket_reports_its_queue() {
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
