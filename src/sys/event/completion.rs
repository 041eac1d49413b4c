//! Names what happens at sockets: the token of a connection, and completions.

use std::io;
use std::os::fd::OwnedFd;

/// Identifies a connection of a reactor. Never reused: the lower half is the index, the upper half a
/// count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub(super) u64);

/// Connections have lower tags; see `Reactor`.
const PROCESS_TAG: u32 = 0xFFFF_0000;

impl Token {
    /// The index of this connection: small, dense, and reused after the connection was closed.
    pub fn index(self) -> usize {
        (self.0 & 0xFFFF_FFFF) as usize
    }

    /// The token as a number, for what is kept outside of this process.
    pub fn number(self) -> u64 {
        self.0
    }

    /// The token of another process with this number (below 2^32), for tables that hold what belongs
    /// to connections and to processes. It equals no connection's token.
    pub fn of_process(number: usize) -> Self {
        Token::new(number, PROCESS_TAG)
    }

    /// The number of the process that this is the token of; `None` for a connection's.
    pub fn process(self) -> Option<usize> {
        ((self.0 >> 32) as u32 == PROCESS_TAG).then_some(self.index())
    }

    /// A token without a connection, for tests.
    #[cfg(test)]
    pub fn for_test(index: usize) -> Self {
        Token::new(index, 0)
    }

    pub(super) fn new(index: usize, tag: u32) -> Self {
        Token(u64::from(tag) << 32 | index as u64)
    }
}

/// What has happened.
#[derive(Debug)]
pub enum Completion<'a> {
    /// A client has connected; `Reactor::register` makes a connection of it.
    Accepted { socket: OwnedFd },
    /// A sibling has passed a connection on.
    Adopted {
        socket: OwnedFd,
        /// The packet that it came with, lent until the call returns.
        packet: &'a [u8],
        /// A second descriptor of that packet.
        rest: Option<OwnedFd>,
    },
    /// The system can't accept at the moment (EMFILE, ENFILE, ENOBUFS, ENOMEM). No listener is
    /// watched until `Reactor::resume_listeners`.
    AcceptFailed {
        /// What it answered.
        error: io::Error,
    },
    /// Bytes have come, lent until the call returns.
    Received {
        /// From whom.
        token: Token,
        bytes: &'a [u8],
    },
    /// The peer sends no more, but may still read.
    Ended {
        /// The connection.
        token: Token,
    },
    /// The peer has closed the connection, and it was read to its end, or it is not being read.
    /// What the peer sent before can still be read. What is sent to it is dropped.
    HungUp {
        /// The connection.
        token: Token,
    },
    /// Some of what waited has been sent; `Reactor::unsent` tells what is left.
    Sent {
        /// The connection.
        token: Token,
    },
    /// The connection is broken; nothing can be sent or received. It has to be closed.
    Failed {
        /// The connection.
        token: Token,
        error: io::Error,
    },
    /// A watched descriptor is readable.
    Readable {
        /// The number it was watched under.
        watch: u16,
    },
}

/// What a watched descriptor is watched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    /// It is readable.
    Read,
    /// It is writable.
    Write,
    /// Either.
    Both,
}
