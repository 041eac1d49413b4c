//! The client's end of a connection, TCP or unix, with a deadline for each step.
//!
//! It moves bytes and knows no frames. Every failure is an `io::Error`; one of kind `TimedOut` is
//! the deadline's and nobody else's.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use super::error::ClientError;
use crate::sys::socket;

/// See the module.
#[derive(Debug)]
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    /// Connects to `HOST:PORT` or `unix:PATH`.
    pub(super) fn connect(address: &str, timeout: Option<Duration>) -> Result<Self, ClientError> {
        let nobody = |source| ClientError::NoServer {
            address: address.to_owned(),
            source,
        };
        if let Some(path) = address.strip_prefix("unix:") {
            let connected = socket::connect_unix(Path::new(path), timeout);
            return connected.map(Stream::Unix).map_err(nobody);
        }
        let wrong = || {
            ClientError::Address(format!(
                "{address:?} is no address; write it as in \"127.0.0.1:8080\", \
                 \"localhost:8080\" or \"unix:/run/preforkd/rpc.sock\""
            ))
        };
        let (host, port) = address.rsplit_once(':').ok_or_else(wrong)?;
        if host.is_empty() || !port.parse().is_ok_and(|port: u16| port > 0) {
            return Err(wrong());
        }
        let mut failure = io::Error::new(ErrorKind::NotFound, "the name stands for no address");
        for place in address.to_socket_addrs().map_err(nobody)? {
            let connected = match timeout {
                // Zero is refused by std; a limit that short is over before it begins.
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
        Err(nobody(failure))
    }

    /// The socket itself, for an event loop: it waits for nothing any more.
    pub(super) fn into_nonblocking(self) -> io::Result<OwnedFd> {
        match self {
            Stream::Tcp(tcp) => tcp.set_nonblocking(true).map(|()| tcp.into()),
            Stream::Unix(unix) => unix.set_nonblocking(true).map(|()| unix.into()),
        }
    }

    /// A second handle of the same connection, for whoever reads, or ends it from outside.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        match self {
            Stream::Tcp(tcp) => tcp.try_clone().map(Stream::Tcp),
            Stream::Unix(unix) => unix.try_clone().map(Stream::Unix),
        }
    }

    /// Ends the connection in both directions: whoever waits in it wakes up.
    pub(super) fn end(&self) {
        // ENOTCONN says that it has ended already.
        let _ = match self {
            Stream::Tcp(tcp) => tcp.shutdown(Shutdown::Both),
            Stream::Unix(unix) => unix.shutdown(Shutdown::Both),
        };
    }

    /// Whether its end, when it is closed or this process is, tells the server that nobody waits for
    /// an answer any more: a mere end could be that of a client that has said all it had to say. On
    /// a unix socket each end of a process tells so.
    pub(super) fn set_abort_on_close(&self, forsakes: bool) {
        if let Stream::Tcp(tcp) = self {
            socket::reset_when_closed(tcp, forsakes);
        }
    }

    /// Whether the server has closed it while nobody looked.
    pub(super) fn has_ended(&self) -> bool {
        match self {
            Stream::Tcp(tcp) => socket::has_ended(tcp),
            Stream::Unix(unix) => socket::has_ended(unix),
        }
    }

    /// Sends all the bytes, in one write(2) if the socket takes them. After an error they were
    /// never sent whole.
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

    /// Appends what there is, at least one byte and at most `room`. The end of the stream is an
    /// error.
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

/// What is left until the deadline, never zero, which setsockopt(2) takes for "no limit".
fn remaining(deadline: Option<Instant>) -> io::Result<Option<Duration>> {
    let Some(deadline) = deadline else {
        return Ok(None);
    };
    match deadline.checked_duration_since(Instant::now()) {
        Some(left) if !left.is_zero() => Ok(Some(left)),
        _ => Err(ErrorKind::TimedOut.into()),
    }
}

/// `None` when the step is to be done again: a signal came, or a socket's own limit was over, for
/// which the deadline is looked at once more.
fn unless_interrupted(outcome: io::Result<usize>) -> io::Result<Option<usize>> {
    match outcome {
        Ok(count) => Ok(Some(count)),
        Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
