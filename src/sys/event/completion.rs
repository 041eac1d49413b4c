//! Defines the token of a connection, and the completions that the reactor reports.

use std::io;
use std::os::fd::OwnedFd;

/// Identifies a connection of a reactor. The lower half is the index, the upper half a counter. So a token is reused
/// only after four billion further connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub(super) u64);

/// The upper half of the tokens of processes. That of connections is lower; see `Reactor`.
const PROCESS_TAG: u32 = 0xFFFF_0000;

impl Token {
    /// Returns the index of this connection: small, dense, and reused after a close.
    pub fn index(self) -> usize {
        (self.0 & 0xFFFF_FFFF) as usize
    }

    /// Returns the token as a number, to store it outside this process.
    pub fn number(self) -> u64 {
        self.0
    }

    /// Returns the token of another process with this number (below 2^32), for tables that hold entries
    /// of connections and of processes. It never equals the token of a connection.
    pub fn of_process(number: usize) -> Self {
        Token::new(number, PROCESS_TAG)
    }

    /// Returns the number of the process of this token; `None` for a connection.
    pub fn process(self) -> Option<usize> {
        ((self.0 >> 32) as u32 == PROCESS_TAG).then_some(self.index())
    }

    /// Returns a token without a connection, for tests.
    #[cfg(test)]
    pub fn for_test(index: usize) -> Self {
        Token::new(index, 0)
    }

    pub(super) fn new(index: usize, tag: u32) -> Self {
        Token(u64::from(tag) << 32 | index as u64)
    }
}

/// An event at a socket.
#[derive(Debug)]
pub enum Completion<'a> {
    /// A client has connected. `Reactor::register` makes a connection of the socket.
    Accepted { socket: OwnedFd },
    /// A sibling has handed a connection over.
    Adopted {
        socket: OwnedFd,
        /// The packet that came with it, lent until the call returns.
        packet: &'a [u8],
        /// A second descriptor of that packet.
        rest: Option<OwnedFd>,
    },
    /// The system cannot accept now (for example EMFILE or ENOMEM). No listener is watched until
    /// `Reactor::resume_listeners`.
    AcceptFailed { error: io::Error },
    /// Bytes were received, lent until the call returns.
    Received { token: Token, bytes: &'a [u8] },
    /// The peer sends no more bytes, but may still read.
    Ended { token: Token },
    /// The peer has closed the connection, and the connection was read to its end or is not being read.
    /// Bytes that the peer sent before can still be read. Bytes sent to it are dropped.
    HungUp { token: Token },
    /// Some waiting bytes were sent. `Reactor::unsent` returns the number of those that remain.
    Sent { token: Token },
    /// The connection is broken: nothing can be sent or received. The driver has to close it.
    Failed { token: Token, error: io::Error },
    /// A watched descriptor is ready for what it is watched for.
    Readable {
        /// The number under which it is watched.
        watch: u16,
    },
}

/// The readiness for which a descriptor is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    /// It is readable.
    Read,
    /// It is writable.
    Write,
    /// Either.
    Both,
}
