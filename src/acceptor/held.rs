//! Holds connections that were accepted while no process could be forked, or while they could not be sent to one.
//! They wait for a process, but not longer than `limits.read-timeout`. They are not closed at once, so that their
//! clients get an answer.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use crate::link::adoption_queue::FRESH;

/// The largest number of connections that wait here. Others stay in the kernel's queue.
const MAX_HELD: usize = 256;

/// The client's address, and the key of its source if that is counted.
pub type ConnectionSource = (Option<SocketAddr>, Option<u64>);

/// A connection without a process.
pub struct HeldConnection {
    /// Its socket, and a memory file if its unread bytes are many.
    pub client: Vec<OwnedFd>,
    /// The packet that is sent to its process with the connection, in the format of the adoption queue.
    pub packet: Cow<'static, [u8]>,
    pub from: ConnectionSource,
    until_ms: u64,
}

impl HeldConnection {
    /// Creates a connection that waits until `until_ms` at most.
    pub fn new(
        client: Vec<OwnedFd>,
        packet: Cow<'static, [u8]>,
        from: ConnectionSource,
        until_ms: u64,
    ) -> Self {
        HeldConnection {
            client,
            packet,
            from,
            until_ms,
        }
    }

    /// Returns whether nothing was read from it.
    pub fn is_fresh(&self) -> bool {
        *self.packet == FRESH
    }
}

/// All held connections, oldest first.
#[derive(Default)]
pub struct HeldConnections {
    waiting: VecDeque<HeldConnection>,
}

impl HeldConnections {
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    pub fn is_full(&self) -> bool {
        self.waiting.len() >= MAX_HELD
    }

    /// Returns the number of held connections from the source with this key.
    pub fn count_of_source(&self, key: u64) -> usize {
        let is_its = |held: &&HeldConnection| held.from.1 == Some(key);
        self.waiting.iter().filter(is_its).count()
    }

    /// Adds a connection.
    pub fn add(&mut self, held: HeldConnection) {
        self.waiting.push_back(held);
    }

    /// Takes the oldest one.
    pub fn take(&mut self) -> Option<HeldConnection> {
        self.waiting.pop_front()
    }

    /// Puts a connection back to the front, because there is still no process for it.
    pub fn put_back(&mut self, held: HeldConnection) {
        self.waiting.push_front(held);
    }

    /// Takes the oldest connection if its time is over at `now_ms`.
    pub fn take_expired(&mut self, now_ms: u64) -> Option<HeldConnection> {
        let is_over = self
            .waiting
            .front()
            .is_some_and(|held| held.until_ms <= now_ms);
        is_over.then(|| self.take()).flatten()
    }
}
