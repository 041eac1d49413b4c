//! The event floor: sockets, in completions, over epoll.
//!
//! Above it nobody knows of readiness. It says that a connection was accepted, that these bytes
//! were received, that so many were sent; received bytes are lent for the length of the call, so
//! that an idle connection owns no buffer. io_uring can serve the same words.
//!
//! Three rules keep it from spinning: interest in writing lives only while something waits to be
//! written, a connection whose end was seen is not read again, and a listener that can't accept
//! (no descriptor left) is taken out until `resume_listeners`. Errors of one connection are a
//! completion; only `Reactor::new` and `turn` fail, when epoll itself does.

mod accept;
pub mod io_progress;
mod output;
mod reactor;
mod send_buffer;

use std::io;
use std::os::fd::OwnedFd;

pub use io_progress::{IoProgress, UnsentData};
pub use reactor::Reactor;

/// A connection of a floor. Never reused: its lower half is a place, its upper half a count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(u64);

impl Token {
    /// The place of this connection: small, dense, and reused after it was closed.
    pub fn index(self) -> usize {
        (self.0 & 0xFFFF_FFFF) as usize
    }

    /// The token as a number, for what is kept outside of this process.
    pub fn number(self) -> u64 {
        self.0
    }

    /// A token of no floor, for tests of what only keeps it.
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
    Accepted {
        /// Its socket.
        socket: OwnedFd,
    },
    /// A sibling has passed a connection on.
    Adopted {
        /// The client's socket.
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
        /// What.
        bytes: &'a [u8],
    },
    /// The peer sends no more, but may still read.
    Ended {
        /// The connection.
        token: Token,
    },
    /// The peer has closed the connection, and it was read to its end, or it is not read at the moment.
    /// What it sent before can still be read; what is sent to it is dropped.
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
        /// How.
        error: io::Error,
    },
    /// A watched descriptor is readable.
    Readable {
        /// The number it was watched under.
        watch: u16,
    },
}

/// Who is told.
pub trait Driver {
    /// Called once a turn, after the wait and before the completions: time has passed.
    fn woken(&mut self) {}

    /// Called once for each completion.
    fn complete(&mut self, floor: &mut Reactor, completion: Completion<'_>);
}

#[cfg(test)]
mod tests;
