use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};

use super::super::closer;
use super::super::process::monotonic;
use super::super::socket::{packet_pair, send_packet};
use super::*;

/// The time that the close of `lingering` takes.
const LINGER: Duration = Duration::from_secs(4);

/// Returns a socket whose last close waits, and its peer, which reads nothing.
fn lingering() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (deaf, _) = listener.accept().unwrap();
    client.set_nonblocking(true).unwrap();
    while client.write(&[0; 1 << 16]).is_ok() {}
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: LINGER.as_secs() as c_int,
    };
    setsockopt(&client, sockopt::Linger, &linger).unwrap();
    (client.into(), deaf)
}

fn end_of(mut peer: &UnixStream) -> bool {
    peer.set_read_timeout(Some(LINGER / 2)).unwrap();
    match peer.read(&mut [0]) {
        Ok(length) => length == 0,
        // The bytes that it sent were not received.
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

#[test]
fn a_socket_refuses_descriptors_where_the_kernel_can() {
    let (one, other) = packet_pair().unwrap();
    assert!(may_arrive(&one));
    if !refuse(&one) {
        return; // This kernel cannot refuse descriptors.
    }
    assert!(
        !may_arrive(&one) && may_arrive(&other),
        "each end for itself"
    );
    let refused = send_packet(&other, &[b"x"], &[one.as_fd()]).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
    send_packet(&one, &[b"x"], &[one.as_fd()]).unwrap();
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    assert!(!may_arrive(&listener), "no unix socket");
}

#[test]
fn a_message_with_descriptors_stays_and_earlier_ones_are_received() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let socket = GuardedSocket::new(ours.into(), closer::close);
    let mut buffer = [0; 16];
    assert_eq!(socket.receive(&mut buffer), Err(Errno::EAGAIN));
    send_packet(&theirs, &[b"before"], &[]).unwrap();
    assert_eq!(socket.receive(&mut buffer), Ok(6));
    let (fd, _deaf) = lingering();
    send_packet(&theirs, &[b"bad"], &[fd.as_fd()]).unwrap();
    drop(fd);
    let begin = Instant::now();
    for _ in 0..2 {
        assert_eq!(socket.receive(&mut buffer), Err(Errno::EBADMSG));
        assert_eq!(&buffer[..3], b"bad");
    }
    drop(socket);
    assert!(begin.elapsed() < LINGER / 2, "{:?}", begin.elapsed());
    assert!(end_of(&theirs), "it is closed all the same");
}

/// A peer must not block the thread that closes, or the next socket would stay open.
#[test]
fn a_blocking_close_keeps_no_other_socket_open() {
    for _ in 0..3 {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (fd, _deaf) = lingering();
        send_packet(&theirs, &[b"bad"], &[fd.as_fd()]).unwrap();
        drop(fd);
        let begin = monotonic();
        closer::close(ours.into());
        assert!(end_of(&theirs));
        assert!(monotonic() - begin < LINGER / 2);
    }
}

#[test]
fn the_end_of_a_packet_socket_is_not_a_packet() {
    let (one, other) = packet_pair().unwrap();
    let socket = GuardedSocket::new(one, closer::close);
    send_packet(&other, &[b"last"], &[]).unwrap();
    drop(other);
    let mut buffer = [0; 16];
    assert_eq!(socket.receive(&mut buffer), Ok(4));
    let end = loop {
        match socket.receive(&mut buffer) {
            // A child that another test starts has a copy of the descriptor until its exec.
            Err(Errno::EAGAIN) => {}
            other => break other,
        }
    };
    assert_eq!(end, Ok(0));
}
