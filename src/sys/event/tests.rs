//! Tests the reactor with real sockets.

#![allow(clippy::unwrap_used)]

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::*;
use crate::sys::socket as sockets;

/// Records all completions; adopts accepted connections.
#[derive(Default)]
struct Log {
    tokens: Vec<Token>,
    received: Vec<u8>,
    ended: usize,
    hung_up: usize,
    failed: usize,
    sent: usize,
    readable: Vec<u16>,
    accept_errors: Vec<ErrorKind>,
}

impl Driver for Log {
    fn complete(&mut self, reactor: &mut Reactor, completion: Completion<'_>) {
        match completion {
            Completion::Accepted { socket } => self.tokens.push(reactor.register(socket).unwrap()),
            Completion::Adopted { .. } => unreachable!("no connection is handed over"),
            Completion::AcceptFailed { error } => self.accept_errors.push(error.kind()),
            Completion::Received { bytes, .. } => self.received.extend_from_slice(bytes),
            Completion::Ended { .. } => self.ended += 1,
            Completion::HungUp { .. } => self.hung_up += 1,
            Completion::Sent { .. } => self.sent += 1,
            Completion::Failed { token, .. } => {
                self.failed += 1;
                reactor.close(token);
            }
            Completion::Readable { watch } => self.readable.push(watch),
        }
    }
}

fn turn_until(reactor: &mut Reactor, log: &mut Log, done: impl Fn(&Log) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !done(log) {
        assert!(Instant::now() < deadline, "nothing came in 10 s");
        reactor.poll_once(50, log).unwrap();
    }
}

/// Returns a reactor that listens, one client, and the token of its connection.
fn connected() -> (Reactor, Log, TcpStream, Token) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut reactor = Reactor::new().unwrap();
    let (_giving, taking) = crate::sys::socket::packet_pair().unwrap();
    reactor
        .listen(vec![Rc::new(listener.into())], (Rc::new(taking), 64))
        .unwrap();
    let client = TcpStream::connect(address).unwrap();
    let mut log = Log::default();
    turn_until(&mut reactor, &mut log, |log| log.tokens.len() == 1);
    let token = log.tokens[0];
    (reactor, log, client, token)
}

#[test]
fn bytes_are_received_and_sent_and_the_end_is_reported_once() {
    let (mut reactor, mut log, mut client, token) = connected();
    client.write_all(b"hello").unwrap();
    turn_until(&mut reactor, &mut log, |log| log.received == b"hello");
    reactor.send(token, &mut b"world".to_vec());
    let mut answer = [0; 5];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"world");
    client.shutdown(Shutdown::Write).unwrap();
    turn_until(&mut reactor, &mut log, |log| log.ended == 1);
    // A half-closed peer still reads, and its end does not wake the loop again.
    reactor.poll_once(20, &mut log).unwrap();
    assert_eq!((log.ended, log.failed), (1, 0));
    reactor.send(token, &mut b"later".to_vec());
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"later");
}

#[test]
fn bytes_that_the_kernel_does_not_take_are_sent_later_in_order() {
    let (mut reactor, mut log, mut client, token) = connected();
    let whole: Vec<u8> = (0..20_000_000_u32).map(|n| n as u8).collect();
    for part in whole.chunks(5_000_000) {
        reactor.send(token, &mut part.to_vec());
    }
    assert!(reactor.unsent(token) > 0);
    let reader = std::thread::spawn(move || {
        let mut all = vec![0; 20_000_000];
        client.read_exact(&mut all).unwrap();
        (client, all)
    });
    turn_until(&mut reactor, &mut log, |_| reader.is_finished());
    let (_client, all) = reader.join().unwrap();
    assert_eq!(reactor.unsent(token), 0);
    assert!(log.sent > 0);
    assert!(all == whole);
}

#[test]
fn a_paused_connection_is_not_read_and_a_reset_is_reported() {
    let (mut reactor, mut log, mut client, token) = connected();
    reactor.set_reading(token, false);
    client.write_all(b"held back").unwrap();
    reactor.poll_once(20, &mut log).unwrap();
    assert!(log.received.is_empty());
    reactor.set_reading(token, true);
    turn_until(&mut reactor, &mut log, |log| log.received == b"held back");
    reactor.send(token, &mut b"unread, so closing resets".to_vec());
    client.set_nodelay(true).unwrap();
    drop(client);
    turn_until(&mut reactor, &mut log, |log| log.failed + log.ended > 0);
    reactor.close(token);
    assert_eq!(reactor.connections(), 0);
}

/// Returns a reactor with one end of a unix socket, the token of that end, and the other end.
fn unix_pair() -> (Reactor, UnixStream, Token) {
    let mut reactor = Reactor::new().unwrap();
    let (client, server) = UnixStream::pair().unwrap();
    server.set_nonblocking(true).unwrap();
    let token = reactor.register(server.into()).unwrap();
    (reactor, client, token)
}

#[test]
fn bytes_that_a_unix_peer_sent_before_its_close_are_all_read() {
    let (mut reactor, mut client, token) = unix_pair();
    let mut log = Log::default();
    let whole = vec![7; 150_000];
    client.set_nonblocking(true).unwrap();
    let sent = client.write(&whole).unwrap();
    assert!(sent > 100_000, "more than one turn reads: {sent}");
    drop(client);
    // Only an answer to a peer that has closed is dropped.
    reactor.send(token, &mut b"answer".to_vec());
    assert_eq!(reactor.unsent(token), 0);
    turn_until(&mut reactor, &mut log, |log| log.hung_up == 1);
    assert_eq!((log.received.len(), log.ended, log.failed), (sent, 1, 0));
    // The loop is not woken again.
    let begun = Instant::now();
    reactor.poll_once(50, &mut log).unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(45));
    assert_eq!((log.ended, log.hung_up, log.failed), (1, 1, 0));
    reactor.close(token);
    assert_eq!(reactor.connections(), 0);
}

#[test]
fn a_unix_peer_that_closes_while_it_is_not_read_is_read_later() {
    let (mut reactor, mut client, token) = unix_pair();
    let mut log = Log::default();
    reactor.set_reading(token, false);
    client.write_all(b"held back").unwrap();
    drop(client);
    turn_until(&mut reactor, &mut log, |log| log.hung_up == 1);
    let begun = Instant::now();
    reactor.poll_once(50, &mut log).unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(45), "it spins");
    assert!(log.received.is_empty());
    reactor.set_reading(token, true);
    turn_until(&mut reactor, &mut log, |log| log.ended == 1);
    assert_eq!(log.received, b"held back");
    assert_eq!((log.hung_up, log.failed), (1, 0));
}

#[test]
fn a_unix_peer_that_closes_with_an_answer_unread_has_reset_the_connection() {
    let (mut reactor, client, token) = unix_pair();
    let mut log = Log::default();
    reactor.send(token, &mut b"never read".to_vec());
    drop(client);
    turn_until(&mut reactor, &mut log, |log| log.failed == 1);
    assert_eq!((log.ended, log.hung_up), (0, 0));
}

#[test]
fn a_stale_token_reaches_no_connection() {
    let (mut reactor, mut log, client, token) = connected();
    reactor.close(token);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let other = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    other.set_nonblocking(true).unwrap();
    let next = reactor.register(other.into()).unwrap();
    assert_eq!(next.index(), token.index());
    assert_ne!(next, token);
    reactor.send(token, &mut b"to the dead".to_vec());
    assert_eq!(reactor.unsent(token), 0);
    reactor.close(token);
    assert_eq!(reactor.connections(), 1);
    reactor.poll_once(0, &mut log).unwrap();
    drop(client);
}

#[test]
fn a_waker_is_reported_and_cleared() {
    let waker = crate::sys::waker::Waker::new().unwrap();
    let mut reactor = Reactor::new().unwrap();
    reactor.watch(7, &waker, Interest::Read).unwrap();
    let mut log = Log::default();
    waker.wake();
    waker.wake();
    turn_until(&mut reactor, &mut log, |log| log.readable == [7]);
    waker.clear();
    reactor.poll_once(10, &mut log).unwrap();
    assert_eq!(log.readable, [7]);
    reactor.unwatch(7);
    waker.wake();
    reactor.poll_once(10, &mut log).unwrap();
    assert_eq!(log.readable, [7]);
}

#[test]
fn paused_listeners_leave_clients_in_the_queue() {
    let (mut reactor, mut log, client, _) = connected();
    reactor.pause_listeners();
    let _second = TcpStream::connect(client.peer_addr().unwrap()).unwrap();
    reactor.poll_once(20, &mut log).unwrap();
    assert_eq!(log.tokens.len(), 1);
    reactor.resume_listeners().unwrap();
    turn_until(&mut reactor, &mut log, |log| log.tokens.len() == 2);
}

/// Another process can clear O_NONBLOCK of sockets that it shares or hands over.
#[test]
fn a_blocking_socket_stops_neither_adoption_nor_sending() {
    let mut reactor = Reactor::new().unwrap();
    let (_client, server) = UnixStream::pair().unwrap();
    let shared = server.try_clone().unwrap();
    let owed = UnsentData::Nothing;
    let token = reactor.register_adopted(server.into(), owed, 0).unwrap();
    assert!(!sockets::restore_nonblocking(&shared).unwrap());
    shared.set_nonblocking(false).unwrap();
    let length = 16 << 20;
    reactor.send(token, &mut vec![1; length]);
    assert!(reactor.unsent(token) > 0);
}

/// Refuses all connections, and wants to leave accepting to others.
#[derive(Default)]
struct Refusing(usize);

impl Driver for Refusing {
    fn complete(&mut self, reactor: &mut Reactor, completion: Completion<'_>) {
        if let Completion::Accepted { socket } = completion {
            drop(socket);
            self.0 += 1;
            reactor.pause_only_listeners();
        }
    }
}

#[test]
fn an_accept_queue_is_drained_also_if_all_its_connections_are_refused() {
    let mut reactor = Reactor::new().unwrap();
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let (_sender, queue) = sockets::packet_pair().unwrap();
    listener.set_nonblocking(true).unwrap();
    let sources = vec![Rc::new(listener.into())];
    reactor.listen(sources, (Rc::new(queue), 16)).unwrap();
    let clients: Vec<_> = (0..20)
        .map(|_| TcpStream::connect(address).unwrap())
        .collect();
    let mut refusing = Refusing::default();
    reactor.drain_accept_queues(false, &mut refusing);
    assert_eq!(refusing.0, clients.len());
}

#[test]
fn an_adoption_queue_that_was_shut_down_is_not_watched() {
    let mut reactor = Reactor::new().unwrap();
    let (sender, queue) = sockets::packet_pair().unwrap();
    reactor.listen(Vec::new(), (Rc::new(queue), 16)).unwrap();
    UnixStream::from(sender).shutdown(Shutdown::Both).unwrap();
    let mut log = Log::default();
    reactor.poll_once(1000, &mut log).unwrap();
    assert_eq!(log.accept_errors, [ErrorKind::BrokenPipe]);
    reactor.resume_listeners().unwrap();
    let begun = Instant::now();
    reactor.poll_once(50, &mut log).unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(45));
}

#[test]
fn a_blocking_listener_is_repaired_before_an_accept() {
    let mut reactor = Reactor::new().unwrap();
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let shared = listener.try_clone().unwrap();
    let (_sender, queue) = sockets::packet_pair().unwrap();
    let sources = vec![Rc::new(listener.into())];
    reactor.listen(sources, (Rc::new(queue), 16)).unwrap();
    assert!(!reactor.resume_listeners().unwrap());
    shared.set_nonblocking(false).unwrap();
    // This would wait for a client for ever.
    reactor.try_accept(&mut Log::default());
    shared.set_nonblocking(false).unwrap();
    assert!(reactor.resume_listeners().unwrap());
    assert!(!reactor.resume_listeners().unwrap());
}
