//! Answers connections that are over `per-source` with `overloaded`, and closes them.
//!
//! The answer depends on the dialect, so a connection waits for its first bytes: at most 64 of them at once,
//! one second each. Others are closed without an answer. They have an epoll instance of their own, which the
//! event loop of a worker or of an acceptor watches. No error leaves this module: a connection that fails is
//! closed.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{MsgFlags, Shutdown, send, shutdown};

use crate::protocol::code::Code;
use crate::protocol::detect::{self, Dialect};
use crate::protocol::http::{HttpDate, ResponseContext, ResponseOptions, response};
use crate::protocol::rpc_error::RpcError;
use crate::protocol::{answer, frame};
use crate::sys::process::unix_seconds;
use crate::sys::rights::GuardedSocket;

/// The largest number of refused connections that wait for their first bytes or their end.
const MAX_WAITING: usize = 64;
/// How long a refused connection may wait in all, in milliseconds.
const WAIT_MS: u64 = 1000;
/// The largest number of bytes that are read and dropped after the answer.
const MAX_DROPPED: usize = 256 * 1024;
/// The largest number of reads of one connection in one turn.
const MAX_READS: usize = 8;

/// The refused connections of one process.
#[derive(Debug)]
pub struct RefusedConnections {
    epoll: Epoll,
    /// In the order in which they came, which is that of their ends.
    waiting: BTreeMap<u64, RefusedConnection>,
    next_number: u64,
    /// Closes a socket whose close may block.
    close: fn(OwnedFd),
}

#[derive(Debug)]
struct RefusedConnection {
    socket: GuardedSocket,
    /// Why it is refused.
    text: String,
    until_ms: u64,
    /// The first bytes of the client, as far as they have arrived.
    head: [u8; 4],
    length: usize,
    is_answered: bool,
    dropped: usize,
}

impl RefusedConnections {
    /// Creates an empty set. `close` closes sockets whose close may block.
    ///
    /// # Errors
    /// If no descriptor is left.
    pub fn new(close: fn(OwnedFd)) -> io::Result<Self> {
        Ok(RefusedConnections {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            waiting: BTreeMap::new(),
            next_number: 0,
            close,
        })
    }

    /// Refuses a connection for the reason in `text`.
    pub fn add(&mut self, socket: OwnedFd, text: &str, now_ms: u64) {
        let socket = GuardedSocket::new(socket, self.close);
        let number = self.next_number;
        let event = EpollEvent::new(EpollFlags::EPOLLIN, number);
        if self.waiting.len() >= MAX_WAITING || self.epoll.add(&socket, event).is_err() {
            return;
        }
        self.next_number += 1;
        let one = RefusedConnection {
            socket,
            text: text.to_owned(),
            until_ms: now_ms + WAIT_MS,
            head: [0; 4],
            length: 0,
            is_answered: false,
            dropped: 0,
        };
        self.waiting.insert(number, one);
    }

    /// Serves the connections that have sent something. Call it when the descriptor is readable.
    pub fn serve(&mut self) {
        let mut events = [EpollEvent::empty(); MAX_WAITING];
        let count = self.epoll.wait(&mut events, EpollTimeout::ZERO);
        for event in &events[..count.unwrap_or(0)] {
            let number = event.data();
            if let Some(one) = self.waiting.get_mut(&number)
                && !one.advance()
            {
                self.remove(number);
            }
        }
    }

    /// Returns when to call `expire`, in milliseconds; `None` if no connection waits.
    pub fn next_ms(&self) -> Option<u64> {
        self.waiting.values().next().map(|one| one.until_ms)
    }

    /// Closes the connections whose time is over.
    pub fn expire(&mut self, now_ms: u64) {
        while let Some((&number, one)) = self.waiting.first_key_value()
            && one.until_ms <= now_ms
        {
            self.remove(number);
        }
    }

    fn remove(&mut self, number: u64) {
        if let Some(one) = self.waiting.remove(&number) {
            // A process that was just forked may have a duplicate, which would keep it watched.
            let _ = self.epoll.delete(&one.socket);
        }
    }
}

impl AsFd for RefusedConnections {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

impl RefusedConnection {
    /// Reads what has arrived, and answers once the dialect is known. Returns whether the connection still waits.
    fn advance(&mut self) -> bool {
        let mut dropped = [0; 4096];
        for _ in 0..MAX_READS {
            let into = match self.is_answered {
                true => &mut dropped[..],
                false => &mut self.head[self.length..],
            };
            match self.socket.receive(into) {
                Ok(0) => {
                    // The client has sent less than four bytes of a line and closed its sending side. It only waits
                    // for the answer.
                    if !self.is_answered && self.length > 0 && detect::is_line(self.head[0]) {
                        self.answer(Dialect::Line);
                    }
                    return false;
                }
                Ok(length) if self.is_answered => {
                    self.dropped += length;
                    if self.dropped > MAX_DROPPED {
                        return false;
                    }
                }
                Ok(length) => {
                    self.length += length;
                    if self.length == self.head.len() {
                        self.answer(detect::detect(self.head));
                    }
                }
                Err(Errno::EAGAIN | Errno::EINTR) => return true,
                Err(_) => return false,
            }
        }
        true
    }

    /// Answers and closes the sending direction. Further bytes of the client are still read: closing with unread
    /// bytes would reset the connection, and the client could lose the answer.
    fn answer(&mut self, dialect: Dialect) {
        self.is_answered = true;
        let bytes = refusal(dialect, &self.head, &self.text);
        let fd = self.socket.as_raw_fd();
        // The answer fits into the empty send buffer of a new connection.
        let _ = send(fd, &bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL);
        let _ = shutdown(fd, Shutdown::Write);
    }
}

/// Returns the answer to a connection that begins with `head`.
fn refusal(dialect: Dialect, head: &[u8], text: &str) -> Vec<u8> {
    let error = RpcError::of(Code::Overloaded, text, false);
    let mut bytes = Vec::new();
    match dialect {
        Dialect::Http => {
            answer::bare_error(&mut bytes, &error, None);
            let options = ResponseOptions {
                bodiless: head == b"HEAD",
                ..ResponseOptions::default()
            };
            let status = response::status_of(error.code);
            let about = ResponseContext {
                origins: &[],
                date: HttpDate(unix_seconds()),
            };
            response::finish(&mut bytes, 0, options, status, true, about);
        }
        Dialect::Line => {
            answer::error(&mut bytes, &error, None, None);
            bytes.push(b'\n');
        }
        Dialect::Frame | Dialect::Unknown => {
            let mark = frame::begin(&mut bytes);
            answer::error(&mut bytes, &error, None, None);
            frame::finish(&mut bytes, mark);
        }
    }
    bytes
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::sys::closer;

    fn refuse(refused: &mut RefusedConnections, now_ms: u64) -> UnixStream {
        let (client, server) = UnixStream::pair().unwrap();
        refused.add(server.into(), "too many", now_ms);
        client
    }

    fn rest(mut client: UnixStream) -> String {
        let mut bytes = Vec::new();
        client.read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    #[test]
    fn each_dialect_gets_its_answer_and_the_end() {
        let mut refused = RefusedConnections::new(closer::close).unwrap();
        let error = r#"{"code":-32005,"name":"overloaded","message":"too many","started":false}"#;
        let code = Code::Overloaded.number();
        let error = error.replace("-32005", &code.to_string());
        let plain = format!(r#"{{"out":"error","result":{error}}}"#);
        for (sent, begin, body) in [
            ("\x11\0\0\0{\"in\"", "", &plain),
            ("{\"in\": \"ping\"}\n", "{", &plain),
            ("POST /ping HTTP/1.1\r\n", "HTTP/1.1 503 Service", &error),
        ] {
            let mut client = refuse(&mut refused, 0);
            client.write_all(sent.as_bytes()).unwrap();
            refused.serve();
            let answer = rest(client);
            assert!(answer.starts_with(begin), "{answer}");
            assert!(answer.trim_end().ends_with(body.as_str()), "{answer}");
            refused.serve();
            assert_eq!(refused.next_ms(), None, "its client has gone");
        }
    }

    #[test]
    fn a_short_line_is_answered_when_its_client_sends_no_more() {
        let mut refused = RefusedConnections::new(closer::close).unwrap();
        let mut client = refuse(&mut refused, 0);
        client.write_all(b"{}").unwrap();
        refused.serve();
        assert!(refused.next_ms().is_some());
        client.shutdown(std::net::Shutdown::Write).unwrap();
        refused.serve();
        assert!(rest(client).ends_with("}\n"));
    }

    #[test]
    fn a_silent_one_waits_for_a_second_and_one_too_many_not_at_all() {
        let mut refused = RefusedConnections::new(closer::close).unwrap();
        let clients: Vec<_> = (0..MAX_WAITING).map(|_| refuse(&mut refused, 5)).collect();
        assert_eq!(rest(refuse(&mut refused, 5)), "");
        assert_eq!(refused.next_ms(), Some(5 + WAIT_MS));
        refused.expire(4 + WAIT_MS);
        assert!(refused.next_ms().is_some());
        refused.expire(5 + WAIT_MS);
        assert_eq!(refused.next_ms(), None);
        clients
            .into_iter()
            .for_each(|client| assert_eq!(rest(client), ""));
    }
}
