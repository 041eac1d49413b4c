//! The client's end of a connection, TCP or unix, with a deadline for each step.
//!
//! It transfers bytes and knows no frames. Every failure is an `io::Error`. Only the deadline gives the
//! kind `TimedOut`.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use super::error::ClientError;
use crate::sys::socket;

/// A TCP or unix connection.
#[derive(Debug)]
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    /// Connects to `HOST:PORT` or `unix:PATH`.
    pub(super) fn connect(address: &str, timeout: Option<Duration>) -> Result<Self, ClientError> {
        let no_server = |source| ClientError::NoServer {
            address: address.to_owned(),
            source,
        };
        if let Some(path) = address.strip_prefix("unix:") {
            let connected = socket::connect_unix(Path::new(path), timeout);
            return connected.map(Stream::Unix).map_err(no_server);
        }
        let wrong = || {
            let remedy = match address.split_once("://") {
                Some((scheme, _)) => format!("leave out {scheme}://"),
                None if address
                    .rsplit_once(':')
                    .is_some_and(|(_, port)| port.parse::<u64>().is_ok()) =>
                {
                    format!("a port is 1 to {}", u16::MAX)
                }
                None => "write it as in \"127.0.0.1:8080\", \"localhost:8080\" or \
                         \"unix:/run/preforkd/rpc.sock\""
                    .into(),
            };
            ClientError::Address(format!("{address:?} is not an address; {remedy}"))
        };
        let (host, port) = address.rsplit_once(':').ok_or_else(wrong)?;
        if host.is_empty() || host.contains('/') || !port.parse().is_ok_and(|port: u16| port > 0) {
            return Err(wrong());
        }
        let mut failure = io::Error::new(ErrorKind::NotFound, "the name has no address");
        for place in address.to_socket_addrs().map_err(no_server)? {
            let connected = match timeout {
                // std refuses zero.
                Some(limit) => {
                    TcpStream::connect_timeout(&place, limit.max(Duration::from_millis(1)))
                }
                None => TcpStream::connect(place),
            };
            match connected.and_then(|tcp| tcp.set_nodelay(true).map(|()| tcp)) {
                Ok(tcp) => return Ok(Stream::Tcp(tcp)),
                Err(error) => failure = error,
            }
        }
        Err(no_server(failure))
    }

    /// Returns the socket for an event loop, in non-blocking mode.
    pub(super) fn into_nonblocking(self) -> io::Result<OwnedFd> {
        match self {
            Stream::Tcp(tcp) => tcp.set_nonblocking(true).map(|()| tcp.into()),
            Stream::Unix(unix) => unix.set_nonblocking(true).map(|()| unix.into()),
        }
    }

    /// Returns a second handle of the connection, to read from it or to end it from outside.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        match self {
            Stream::Tcp(tcp) => tcp.try_clone().map(Stream::Tcp),
            Stream::Unix(unix) => unix.try_clone().map(Stream::Unix),
        }
    }

    /// Ends the connection in both directions. Blocked reads and writes return.
    pub(super) fn end(&self) {
        // ENOTCONN means that it has ended already.
        let _ = match self {
            Stream::Tcp(tcp) => tcp.shutdown(Shutdown::Both),
            Stream::Unix(unix) => unix.shutdown(Shutdown::Both),
        };
    }

    /// Sets whether closing the connection, or the end of this process, tells the server that the client
    /// does not wait for an answer. A normal close looks like that of a client that has sent its last call
    /// and still waits. On a unix socket each close tells this.
    pub(super) fn set_abort_on_close(&self, forsakes: bool) {
        if let Stream::Tcp(tcp) = self {
            socket::reset_when_closed(tcp, forsakes);
        }
    }

    /// Returns whether the server has closed the connection.
    pub(super) fn has_ended(&self) -> bool {
        match self {
            Stream::Tcp(tcp) => socket::has_ended(tcp),
            Stream::Unix(unix) => socket::has_ended(unix),
        }
    }

    /// Sends all bytes, in one write(2) if the socket accepts them. After an error not all were sent.
    pub(super) fn send(&mut self, mut bytes: &[u8], deadline: Option<Instant>) -> io::Result<()> {
        while !bytes.is_empty() {
            let limit = remaining(deadline)?;
            let written = match self {
                Stream::Tcp(tcp) => tcp.set_write_timeout(limit).and_then(|()| tcp.write(bytes)),
                Stream::Unix(unix) => unix
                    .set_write_timeout(limit)
                    .and_then(|()| unix.write(bytes)),
            };
            match unless_interrupted(written)? {
                Some(0) => return Err(ErrorKind::WriteZero.into()),
                Some(count) => bytes = &bytes[count..],
                None => {}
            }
        }
        Ok(())
    }

    /// Appends received bytes, at least one and at most `room`. The end of the stream is an error.
    pub(super) fn receive(
        &mut self,
        inbox: &mut Vec<u8>,
        room: usize,
        deadline: Option<Instant>,
    ) -> io::Result<()> {
        let held = inbox.len();
        inbox.resize(held + room, 0);
        let count = self.read(&mut inbox[held..], deadline);
        inbox.truncate(held + *count.as_ref().unwrap_or(&0));
        match count? {
            0 => Err(io::Error::new(
                ErrorKind::UnexpectedEof,
                "the server closed it",
            )),
            _ => Ok(()),
        }
    }

    fn read(&mut self, buffer: &mut [u8], deadline: Option<Instant>) -> io::Result<usize> {
        loop {
            let limit = remaining(deadline)?;
            let received = match self {
                Stream::Tcp(tcp) => tcp.set_read_timeout(limit).and_then(|()| tcp.read(buffer)),
                Stream::Unix(unix) => unix
                    .set_read_timeout(limit)
                    .and_then(|()| unix.read(buffer)),
            };
            if let Some(count) = unless_interrupted(received)? {
                return Ok(count);
            }
        }
    }
}

/// Returns the time until the deadline. It is never zero, which setsockopt(2) takes for "no limit".
fn remaining(deadline: Option<Instant>) -> io::Result<Option<Duration>> {
    let Some(deadline) = deadline else {
        return Ok(None);
    };
    match deadline.checked_duration_since(Instant::now()) {
        Some(left) if !left.is_zero() => Ok(Some(left)),
        _ => Err(ErrorKind::TimedOut.into()),
    }
}

/// Returns `None` if the step must be repeated: a signal came, or the socket's own limit was over and the
/// deadline is checked again.
fn unless_interrupted(outcome: io::Result<usize>) -> io::Result<Option<usize>> {
    match outcome {
        Ok(count) => Ok(Some(count)),
        Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
