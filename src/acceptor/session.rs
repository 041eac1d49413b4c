//! Defines what an acceptor knows about a session: its own child, or a session of a dead acceptor.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use nix::sys::epoll::Epoll;

use super::held::HeldConnection;
use crate::link::channel::MasterEnd;
use crate::link::ids::{Generation, Pid};
use crate::link::message::{Message, Order};
use crate::link::metrics_board::layout::CloseReason;
use crate::sys::process_tree::{self, PidFd};
use crate::sys::shared_memory::OwnedArray;
use crate::worker_init::{IsolatedInit, WorkerInit};

/// The shortest time between two requests of a session for the same link.
const ASK_AGAIN_MS: u64 = 100;

/// Returns the parameters of a session, with the memory in which it records its heartbeat. The memory is never
/// unmapped in the session.
pub fn isolated_init(
    boot: &WorkerInit<'_>,
    heartbeat: OwnedArray<AtomicU64>,
) -> Option<IsolatedInit> {
    let heartbeat: &'static OwnedArray<AtomicU64> = Box::leak(Box::new(heartbeat));
    Some(IsolatedInit {
        heartbeat_ms: heartbeat.first(),
        ..boot.isolated.clone()?
    })
}

/// A child of the acceptor, or a session that has rejoined.
pub struct Session {
    pub pid: Pid,
    /// The link to the session; `None` once the session was ordered to end, or has closed its end of the link.
    pub link: Option<MasterEnd>,
    pub is_open: bool,
    /// When it got its connection, in milliseconds. Like the heartbeat, it is not in the table that other sessions can
    /// write.
    pub opened_ms: u64,
    heartbeat: Option<OwnedArray<AtomicU64>>,
    pub is_ready: bool,
    /// Whether this process has killed it.
    pub is_killed: bool,
    /// Whether it was killed because it had not exited in time.
    pub is_late: bool,
    /// The pool processes (by record) for which it has asked for a link, and when, in milliseconds.
    asked: Vec<(u32, u64)>,
}

/// The result of giving a connection to a session.
pub enum HandOver {
    Done,
    /// This session has ended. The connection comes back.
    Again(HeldConnection),
    /// The system has no room for its descriptors now. The connection comes back, and the session waits again.
    Later(HeldConnection, io::Error),
    /// The connection was closed.
    Lost(io::Error),
}

/// What became of sessions that have ended.
#[derive(Default)]
pub struct SessionEnds {
    /// The numbers of the records of crashed ones.
    pub crashed: Vec<u32>,
    /// The sessions that could not count the end of their connection, and why it ended.
    pub lost: Vec<(CloseReason, Pid)>,
}

impl Session {
    /// Creates the record of a session. Only this session and the acceptor share `heartbeat`; `None` for a session
    /// that has rejoined.
    pub fn new(pid: Pid, link: MasterEnd, heartbeat: Option<OwnedArray<AtomicU64>>) -> Self {
        Session {
            pid,
            link: Some(link),
            is_open: false,
            opened_ms: 0,
            heartbeat,
            is_ready: false,
            is_killed: false,
            is_late: false,
            asked: Vec::new(),
        }
    }

    /// Returns when its event loop last ran, in milliseconds; 0 if it never has.
    pub fn heartbeat_ms(&self) -> u64 {
        let heartbeat = self.heartbeat.as_ref();
        heartbeat.map_or(0, |heartbeat| heartbeat[0].load(Relaxed))
    }

    /// Returns whether the session may ask the master for a link to the pool process with this record. The number of
    /// requests is limited, because each creates a link and a session is not trusted.
    pub fn may_ask(&mut self, record: u32, now_ms: u64) -> bool {
        match self.asked.iter_mut().find(|(it, _)| *it == record) {
            Some((_, at)) if now_ms < *at + ASK_AGAIN_MS => return false,
            Some((_, at)) => *at = now_ms,
            None => self.asked.push((record, now_ms)),
        }
        true
    }

    /// Sends it an order.
    pub fn order(&self, generation: Generation, body: Order, descriptor: Option<BorrowedFd<'_>>) {
        let message = Message {
            pid: self.pid,
            generation,
            body,
        };
        if let Some(link) = &self.link
            && let Err(error) = link.send(message, descriptor)
            && error.kind() != io::ErrorKind::BrokenPipe
        {
            log::warn!(
                "could not send the order {body:?} to connection process {}: {error}",
                self.pid
            );
        }
    }

    /// Closes the link to it.
    pub fn unwatch(&mut self, epoll: &Epoll) {
        if let Some(link) = self.link.take() {
            // A new child may have a duplicate of it, so closing it would not end the watch.
            let _ = epoll.delete(link.as_fd());
        }
    }

    /// Kills it and what it has started.
    pub fn kill_tree(&self) {
        let held = process_tree::open_with_descendants(&[self.pid], |_| true);
        held.iter().for_each(PidFd::kill);
    }
}
