//! The floor against real sockets.

#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::*;

/// Writes down what it is told; adopts what is accepted.
#[derive(Default)]
struct Log {
    tokens: Vec<Token>,
    received: Vec<u8>,
    ended: usize,
    hung_up: usize,
    failed: usize,
    sent: usize,
    readable: Vec<u16>,
}

impl Driver for Log {
    fn complete(&mut self, floor: &mut Reactor, completion: Completion<'_>) {
        match completion {
            Completion::Accepted { socket } => self.tokens.push(floor.register(socket).unwrap()),
            Completion::Adopted { .. } => unreachable!("nobody gives"),
            Completion::AcceptFailed { error } => panic!("{error}"),
            Completion::Received { bytes, .. } => self.received.extend_from_slice(bytes),
            Completion::Ended { .. } => self.ended += 1,
            Completion::HungUp { .. } => self.hung_up += 1,
            Completion::Sent { .. } => self.sent += 1,
            Completion::Failed { token, .. } => {
                self.failed += 1;
                floor.close(token);
            }
            Completion::Readable { watch } => self.readable.push(watch),
        }
    }
}

fn turn_until(floor: &mut Reactor, log: &mut Log, done: impl Fn(&Log) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !done(log) {
        assert!(Instant::now() < deadline, "nothing came in 10 s");
        floor.poll_once(50, log).unwrap();
    }
}

/// A floor that listens, one client, and the token of its connection.
fn connected() -> (Reactor, Log, TcpStream, Token) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut floor = Reactor::new().unwrap();
    let (_giving, taking) = crate::sys::socket::packet_pair().unwrap();
    floor
        .listen(vec![Rc::new(listener.into())], (Rc::new(taking), 64))
        .unwrap();
    let client = TcpStream::connect(address).unwrap();
    let mut log = Log::default();
    turn_until(&mut floor, &mut log, |log| log.tokens.len() == 1);
    let token = log.tokens[0];
    (floor, log, client, token)
}

#[test]
fn bytes_come_and_go_and_the_end_is_told_once() {
    let (mut floor, mut log, mut client, token) = connected();
    client.write_all(b"hello").unwrap();
    turn_until(&mut floor, &mut log, |log| log.received == b"hello");
    floor.send(token, &mut b"world".to_vec());
    let mut answer = [0; 5];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"world");
    client.shutdown(Shutdown::Write).unwrap();
    turn_until(&mut floor, &mut log, |log| log.ended == 1);
    // A half-closed peer still reads, and its end does not wake the loop again.
    floor.poll_once(20, &mut log).unwrap();
    assert_eq!((log.ended, log.failed), (1, 0));
    floor.send(token, &mut b"later".to_vec());
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"later");
}

#[test]
fn what_the_kernel_does_not_take_is_sent_later_in_order() {
    let (mut floor, mut log, mut client, token) = connected();
    let whole: Vec<u8> = (0..20_000_000_u32).map(|n| n as u8).collect();
    for part in whole.chunks(5_000_000) {
        floor.send(token, &mut part.to_vec());
    }
    assert!(floor.unsent(token) > 0);
    let reader = std::thread::spawn(move || {
        let mut all = vec![0; 20_000_000];
        client.read_exact(&mut all).unwrap();
        (client, all)
    });
    turn_until(&mut floor, &mut log, |_| reader.is_finished());
    let (_client, all) = reader.join().unwrap();
    assert_eq!(floor.unsent(token), 0);
    assert!(log.sent > 0);
    assert!(all == whole);
}

#[test]
fn a_paused_connection_is_not_read_and_a_reset_is_told() {
    let (mut floor, mut log, mut client, token) = connected();
    floor.set_reading(token, false);
    client.write_all(b"held back").unwrap();
    floor.poll_once(20, &mut log).unwrap();
    assert!(log.received.is_empty());
    floor.set_reading(token, true);
    turn_until(&mut floor, &mut log, |log| log.received == b"held back");
    floor.send(token, &mut b"unread, so closing resets".to_vec());
    client.set_nodelay(true).unwrap();
    drop(client);
    turn_until(&mut floor, &mut log, |log| log.failed + log.ended > 0);
    floor.close(token);
    assert_eq!(floor.connections(), 0);
}

/// A floor with one end of a unix socket, the token of that end, and the other end.
fn unix_pair() -> (Reactor, UnixStream, Token) {
    let mut floor = Reactor::new().unwrap();
    let (client, server) = UnixStream::pair().unwrap();
    server.set_nonblocking(true).unwrap();
    let token = floor.register(server.into()).unwrap();
    (floor, client, token)
}

#[test]
fn what_a_unix_peer_sent_before_it_closed_is_read_to_the_end() {
    let (mut floor, mut client, token) = unix_pair();
    let mut log = Log::default();
    let whole = vec![7; 150_000];
    client.set_nonblocking(true).unwrap();
    let sent = client.write(&whole).unwrap();
    assert!(sent > 100_000, "more than one turn reads: {sent}");
    drop(client);
    // An answer to a peer that has closed is dropped, and nothing else is.
    floor.send(token, &mut b"answer".to_vec());
    assert_eq!(floor.unsent(token), 0);
    turn_until(&mut floor, &mut log, |log| log.hung_up == 1);
    assert_eq!((log.received.len(), log.ended, log.failed), (sent, 1, 0));
    // And the loop is not woken again.
    let begun = Instant::now();
    floor.poll_once(50, &mut log).unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(45));
    assert_eq!((log.ended, log.hung_up, log.failed), (1, 1, 0));
    floor.close(token);
    assert_eq!(floor.connections(), 0);
}

#[test]
fn a_unix_peer_that_closes_while_it_is_not_read_is_read_later() {
    let (mut floor, mut client, token) = unix_pair();
    let mut log = Log::default();
    floor.set_reading(token, false);
    client.write_all(b"held back").unwrap();
    drop(client);
    turn_until(&mut floor, &mut log, |log| log.hung_up == 1);
    let begun = Instant::now();
    floor.poll_once(50, &mut log).unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(45), "it spins");
    assert!(log.received.is_empty());
    floor.set_reading(token, true);
    turn_until(&mut floor, &mut log, |log| log.ended == 1);
    assert_eq!(log.received, b"held back");
    assert_eq!((log.hung_up, log.failed), (1, 0));
}

#[test]
fn a_unix_peer_that_closes_with_an_answer_unread_has_reset_the_connection() {
    let (mut floor, client, token) = unix_pair();
    let mut log = Log::default();
    floor.send(token, &mut b"never read".to_vec());
    drop(client);
    turn_until(&mut floor, &mut log, |log| log.failed == 1);
    assert_eq!((log.ended, log.hung_up), (0, 0));
}

#[test]
fn a_stale_token_reaches_nobody() {
    let (mut floor, mut log, client, token) = connected();
    floor.close(token);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let other = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    other.set_nonblocking(true).unwrap();
    let next = floor.register(other.into()).unwrap();
    assert_eq!(next.index(), token.index());
    assert_ne!(next, token);
    floor.send(token, &mut b"to the dead".to_vec());
    assert_eq!(floor.unsent(token), 0);
    floor.close(token);
    assert_eq!(floor.connections(), 1);
    floor.poll_once(0, &mut log).unwrap();
    drop(client);
}

#[test]
fn a_waker_is_told_and_cleared() {
    let waker = crate::sys::waker::Waker::new().unwrap();
    let mut floor = Reactor::new().unwrap();
    floor.watch(7, &waker, Interest::Read).unwrap();
    let mut log = Log::default();
    waker.wake();
    waker.wake();
    turn_until(&mut floor, &mut log, |log| log.readable == [7]);
    waker.clear();
    floor.poll_once(10, &mut log).unwrap();
    assert_eq!(log.readable, [7]);
    floor.unwatch(7);
    waker.wake();
    floor.poll_once(10, &mut log).unwrap();
    assert_eq!(log.readable, [7]);
}

#[test]
fn paused_listeners_leave_clients_in_the_queue() {
    let (mut floor, mut log, client, _) = connected();
    floor.pause_listeners();
    assert!(!floor.is_listening());
    let _second = TcpStream::connect(client.peer_addr().unwrap()).unwrap();
    floor.poll_once(20, &mut log).unwrap();
    assert_eq!(log.tokens.len(), 1);
    floor.resume_listeners().unwrap();
    turn_until(&mut floor, &mut log, |log| log.tokens.len() == 2);
}
