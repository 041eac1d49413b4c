//! Asks the master what only it knows: its status, over the control socket.
//!
//! It asks only if a request needs the answer, and at most once per second. The master may be stopped or
//! stuck: nothing here waits. After 1 s a request is answered without these facts. The forked observer has a
//! connection from its start; the one in the foreground connects for each answer.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::protocol::control::{ControlRequest, Status, to_line};
use crate::sys::socket;

/// How long to wait for an answer, and how long an answer is current by default, in milliseconds.
pub const CURRENT_MS: u64 = 1_000;
/// The longest answer that is read. Bytes.
const LONGEST: usize = 64 << 20;

/// An answer of the master.
#[derive(Debug)]
pub struct Facts {
    pub status: Status,
    /// The status as the master wrote it, with members that this version does not know.
    pub json: String,
    /// When it came.
    pub at_ms: u64,
}

/// Whether an answer can be given now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    Now,
    /// The master was asked; at this time it counts as not responding.
    Until(u64),
}

#[derive(Debug)]
pub struct MasterFacts {
    /// The socket to connect to; `None` if the process was forked with a connection.
    path: Option<PathBuf>,
    stream: Option<UnixStream>,
    received: Vec<u8>,
    /// When the master was asked, in milliseconds; `None` if it has answered.
    asked_ms: Option<u64>,
    last: Option<Rc<Facts>>,
    /// How long an answer is current. Milliseconds.
    pub current_ms: u64,
}

#[derive(Deserialize)]
struct Response {
    status: Option<Box<RawValue>>,
}

impl MasterFacts {
    /// Creates the facts of a master that has forked this process.
    ///
    /// # Errors
    /// Those of fcntl(2).
    pub fn linked(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self::with(None, Some(stream)))
    }

    /// Creates the facts of the master with this control socket.
    pub fn at(path: PathBuf) -> Self {
        Self::with(Some(path), None)
    }

    fn with(path: Option<PathBuf>, stream: Option<UnixStream>) -> Self {
        MasterFacts {
            path,
            stream,
            received: Vec::new(),
            asked_ms: None,
            last: None,
            current_ms: CURRENT_MS,
        }
    }

    /// Returns whether the master that has forked this process is connected.
    pub fn is_linked(&self) -> bool {
        self.path.is_none() && self.stream.is_some()
    }

    /// Returns whether the connection to the master that has forked this process has ended.
    pub fn has_lost_link(&self) -> bool {
        self.path.is_none() && self.stream.is_none()
    }

    /// Returns the connection, to be polled for input.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.stream.as_ref().map(AsFd::as_fd)
    }

    /// Asks the master for its facts, because a request needs them. Does nothing if the facts are current.
    pub fn request(&mut self, now_ms: u64) -> Readiness {
        if self.current(now_ms).is_some() {
            return Readiness::Now;
        }
        if self.asked_ms.is_none() && self.ask().is_ok() {
            self.asked_ms = Some(now_ms);
        }
        match self.asked_ms {
            Some(at) if now_ms < at + CURRENT_MS => Readiness::Until(at + CURRENT_MS),
            _ => Readiness::Now,
        }
    }

    /// Returns when requests that wait for the master are answered without its facts, in milliseconds.
    pub fn deadline_ms(&self, now_ms: u64) -> Option<u64> {
        let deadline = self.asked_ms.map(|at| at + CURRENT_MS);
        deadline.filter(|at| *at > now_ms)
    }

    /// Returns the last answer, if it is current.
    pub fn current(&self, now_ms: u64) -> Option<&Rc<Facts>> {
        let last = self.last.as_ref();
        last.filter(|facts| now_ms < facts.at_ms + self.current_ms)
    }

    /// Returns the last answer, however old it is.
    pub fn last(&self) -> Option<&Rc<Facts>> {
        self.last.as_ref()
    }

    fn ask(&mut self) -> io::Result<()> {
        if let Some(path) = &self.path {
            let stream = socket::connect_unix(path, Some(Duration::from_millis(1)))?;
            stream.set_nonblocking(true)?;
            self.received.clear();
            self.stream = Some(stream);
        }
        let mut stream = self.stream.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        // A line of some bytes on an empty socket is sent whole.
        stream.write_all(&to_line(&ControlRequest::Status)?)
    }

    /// Reads from the connection, and takes the answer if it is complete.
    pub fn receive(&mut self, now_ms: u64) {
        let mut piece = vec![0; 64 << 10];
        let mut has_ended = false;
        while !has_ended {
            let Some(mut stream) = self.stream.as_ref() else {
                return;
            };
            match stream.read(&mut piece) {
                // The master closes a control connection after its answer, so the answer may be complete.
                Ok(0) => has_ended = true,
                Ok(length) => self.received.extend_from_slice(&piece[..length]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return self.lose(),
            }
            if self.received.len() > LONGEST {
                return self.lose();
            }
        }
        while let Some(end) = memchr::memchr(b'\n', &self.received) {
            let line: Vec<u8> = self.received.drain(..=end).collect();
            self.asked_ms = None;
            if let Some(facts) = facts(&line, now_ms) {
                self.last = Some(Rc::new(facts));
            }
            if self.path.is_some() {
                self.stream = None;
            }
        }
        if has_ended && self.stream.is_some() {
            self.lose();
        }
    }

    fn lose(&mut self) {
        self.stream = None;
        self.received.clear();
        self.asked_ms = None;
    }
}

fn facts(line: &[u8], at_ms: u64) -> Option<Facts> {
    let response: Response = serde_json::from_slice(line).ok()?;
    let json = response.status?.get().to_owned();
    Some(Facts {
        status: serde_json::from_str(&json).ok()?,
        json,
        at_ms,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::protocol::control::ControlResponse;

    fn answer(master: &mut UnixStream) {
        let mut question = [0; 256];
        let length = master.read(&mut question).unwrap();
        assert_eq!(question[..length], *b"{\"command\":\"status\"}\n");
        let response = ControlResponse::status(Status::default());
        master.write_all(&to_line(&response).unwrap()).unwrap();
    }

    #[test]
    fn the_master_is_asked_at_most_once_per_second_and_only_if_needed() {
        let (mut master, own) = UnixStream::pair().unwrap();
        let mut facts = MasterFacts::linked(own).unwrap();
        assert_eq!(facts.request(100), Readiness::Until(1_100));
        assert_eq!(facts.request(200), Readiness::Until(1_100));
        answer(&mut master);
        facts.receive(210);
        assert_eq!(facts.request(1_000), Readiness::Now);
        assert!(facts.current(1_209).is_some() && facts.current(1_210).is_none());
        assert_eq!(facts.request(1_300), Readiness::Until(2_300));
        answer(&mut master);
    }

    #[test]
    fn an_answer_counts_although_the_connection_has_ended_with_it() {
        let (mut master, own) = UnixStream::pair().unwrap();
        let mut facts = MasterFacts::linked(own).unwrap();
        facts.path = Some("control.sock".into());
        facts.asked_ms = Some(100);
        let response = ControlResponse::status(Status::default());
        master.write_all(&to_line(&response).unwrap()).unwrap();
        drop(master);
        facts.receive(120);
        assert!(facts.current(120).is_some() && facts.asked_ms.is_none());
        assert!(facts.descriptor().is_none());
    }

    #[test]
    fn a_silent_master_delays_an_answer_by_one_second() {
        let (master, own) = UnixStream::pair().unwrap();
        let mut facts = MasterFacts::linked(own).unwrap();
        facts.request(0);
        assert_eq!(facts.request(1_000), Readiness::Now);
        assert_eq!(
            facts.request(9_000),
            Readiness::Now,
            "it is not asked again"
        );
        assert!(facts.current(9_000).is_none() && !facts.has_lost_link());
        drop(master);
        facts.receive(9_001);
        assert!(facts.has_lost_link());
        assert_eq!(facts.request(9_002), Readiness::Now);
    }
}
