//! Links to sessions whose acceptor has died. Over them these sessions ask the master for links to pool processes,
//! and get the reopened log.
//!
//! Each session can send into the adoption queue. So the kernel says which process has made a link
//! (SO_PEERCRED), and only a session of this generation without an acceptor is taken. Each process and each record
//! has one link at most: the last one. So each watched link is read. A link that is refused is closed, and
//! its session tries again later.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};

use super::records::OwnRecords;
use super::session::Session;
use crate::link::channel::{MasterEnd, Received};
use crate::link::ids::Pid;
use crate::link::message::Report;
use crate::sys::{closer, rights, socket};

/// The sessions, by the numbers of their records.
#[derive(Default)]
pub struct RejoinedSessions {
    linked: BTreeMap<usize, Session>,
}

impl RejoinedSessions {
    /// Takes a link. `is_living` says which records the acceptor's own sessions have. The link gets the event
    /// number `first_event` plus the number of its record.
    pub fn add(
        &mut self,
        (records, is_living): (&OwnRecords, impl Fn(usize) -> bool),
        link: Vec<OwnedFd>,
        epoll: &Epoll,
        first_event: u64,
    ) {
        let made_by = match &link[..] {
            [fd] if socket::is_packet_socket(fd) => socket::peer_process(fd).ok(),
            _ => None,
        };
        let mut link = link.into_iter();
        if let Some((_, pid)) = made_by
            && let Some(index) = records.orphan(Pid(pid), is_living)
            && let Some(fd) = link.next()
        {
            rights::refuse(&fd);
            self.linked.retain(|at, before| {
                let stays = *at != index && before.pid != Pid(pid);
                if !stays {
                    before.unwatch(epoll);
                }
                stays
            });
            let event = EpollEvent::new(EpollFlags::EPOLLIN, first_event + index as u64);
            // If this fails, the session notices the end of the link.
            if epoll.add(fd.as_fd(), event).is_ok() {
                let session = Session::new(Pid(pid), MasterEnd::of(fd), None);
                self.linked.insert(index, session);
            }
        }
        link.for_each(closer::close_in_child);
    }

    /// Returns whether the session with this record has a link.
    pub fn has(&self, index: usize) -> bool {
        self.linked.contains_key(&index)
    }

    pub fn get(&self, index: usize) -> Option<&Session> {
        self.linked.get(&index)
    }

    pub fn get_mut(&mut self, index: usize) -> Option<&mut Session> {
        self.linked.get_mut(&index)
    }

    pub fn all(&self) -> impl Iterator<Item = &Session> {
        self.linked.values()
    }

    /// Reads at most `most` reports of a session. At the end of its link it is forgotten.
    pub fn reports(&mut self, index: usize, epoll: &Epoll, most: usize) -> Vec<Report> {
        let mut reports = Vec::new();
        while reports.len() < most
            && let Some(session) = self.linked.get_mut(&index)
            && let Some(link) = &session.link
        {
            match link.receive() {
                // A session of an earlier acceptor does not decide whether this acceptor is ready.
                Received::Message(message, _) if message.body == Report::Ready => {}
                Received::Message(message, _) => reports.push(message.body),
                Received::Empty => break,
                Received::WithDescriptors(_) | Received::Garbage | Received::End => {
                    session.unwatch(epoll);
                    self.linked.remove(&index);
                }
            }
        }
        reports
    }
}
