//! Handles one connection of the observer: reads a request, keeps it until it is answered, and sends the answer.
//!
//! A client has 5 s to send a request, counted from its first byte, and 5 s to take the answer. A refused connection
//! stays open for a short time after the answer: closing it with unread bytes would reset it, and the client could
//! lose the answer. Between two requests a connection may be idle without a limit. The observer closes it if another
//! connection needs its place.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{MsgFlags, Shutdown, send, shutdown};

use super::answer::PageAnswer;
use crate::protocol::http::get::{PageRefusal, PageRequest, blank_lines, decode_page};
use crate::protocol::http::{HEAD_MAX, HttpDate, ParseProgress};
use crate::sys::rights::GuardedSocket;

/// The longest time for a request, and again for its answer, in milliseconds.
const LIMIT_MS: u64 = 5_000;
/// How long a refused connection stays open after its answer, in milliseconds.
const LINGER_MS: u64 = 1_000;
/// Bytes read at once.
const PIECE: usize = 4096;

#[derive(Debug)]
enum Stage {
    /// Waits for a request, or for the rest of one.
    Reading,
    /// The request is complete and not answered yet.
    Asked(PageRequest),
    /// The answer is being sent. True if the connection ends after it.
    Sending {
        close: bool,
    },
    /// The last answer is sent. Further bytes of the client are dropped.
    Lingering,
    Ended,
}

#[derive(Debug)]
pub struct PageConnection {
    socket: GuardedSocket,
    received: Vec<u8>,
    progress: ParseProgress,
    unsent: Vec<u8>,
    sent: usize,
    stage: Stage,
    /// When it is closed if nothing changes.
    deadline_ms: Option<u64>,
    /// Whether the client sends nothing more. It still gets the answers to what it has sent.
    is_half_closed: bool,
    /// When it last became idle.
    pub idle_since_ms: u64,
    /// Whether a request was answered.
    pub has_answered: bool,
}

impl PageConnection {
    pub fn new(socket: GuardedSocket, now_ms: u64) -> Self {
        PageConnection {
            socket,
            received: Vec::new(),
            progress: ParseProgress::default(),
            unsent: Vec::new(),
            sent: 0,
            stage: Stage::Reading,
            deadline_ms: None,
            is_half_closed: false,
            idle_since_ms: now_ms,
            has_answered: false,
        }
    }

    /// Returns the events for poll(2).
    pub fn interest(&self) -> PollFlags {
        match self.stage {
            Stage::Reading | Stage::Lingering => PollFlags::POLLIN,
            Stage::Sending { .. } => PollFlags::POLLOUT,
            Stage::Asked(_) | Stage::Ended => PollFlags::empty(),
        }
    }

    pub fn deadline_ms(&self) -> Option<u64> {
        self.deadline_ms
    }

    pub fn has_ended(&self) -> bool {
        matches!(self.stage, Stage::Ended)
    }

    /// Returns whether no byte of a request has arrived.
    pub fn is_idle(&self) -> bool {
        matches!(self.stage, Stage::Reading) && self.received.is_empty()
    }

    /// Returns when the first byte of an unfinished request arrived, in milliseconds; `None` if there is no
    /// unfinished request.
    pub fn unfinished_since_ms(&self) -> Option<u64> {
        let is_unfinished = matches!(self.stage, Stage::Reading) && !self.received.is_empty();
        let deadline_ms = self.deadline_ms.filter(|_| is_unfinished);
        deadline_ms.map(|at| at.saturating_sub(LIMIT_MS))
    }

    /// Returns whether an answer is being sent, or the last answer was sent.
    pub fn is_answered(&self) -> bool {
        !matches!(self.stage, Stage::Reading | Stage::Asked(_))
    }

    /// Returns the request that waits for its answer.
    pub fn request(&self) -> Option<&PageRequest> {
        match &self.stage {
            Stage::Asked(request) => Some(request),
            _ => None,
        }
    }

    /// Closes it if its time is over.
    pub fn expire(&mut self, now_ms: u64) {
        if self.deadline_ms.is_some_and(|at| at <= now_ms) && self.request().is_none() {
            self.stage = Stage::Ended;
        }
    }

    /// Reads or sends what is possible, because the socket is ready.
    pub fn advance(&mut self, now_ms: u64, date: HttpDate) {
        match self.stage {
            Stage::Reading => self.read(now_ms, date),
            Stage::Sending { .. } => {
                self.send(now_ms);
                self.decode(now_ms, date);
            }
            Stage::Lingering => self.discard(),
            // poll(2) reports only the end of such a connection.
            Stage::Asked(_) | Stage::Ended => self.stage = Stage::Ended,
        }
    }

    fn read(&mut self, now_ms: u64, date: HttpDate) {
        let mut piece = [0; PIECE];
        // At most one head: what follows waits in the socket.
        while self.received.len() <= HEAD_MAX {
            match self.socket.receive(&mut piece) {
                Ok(0) => {
                    self.is_half_closed = true;
                    break;
                }
                Ok(length) => self.received.extend_from_slice(&piece[..length]),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break,
                Err(_) => {
                    self.stage = Stage::Ended;
                    return;
                }
            }
        }
        self.decode(now_ms, date);
    }

    /// Takes a request from what was received, and refuses those before it that cannot be answered.
    fn decode(&mut self, now_ms: u64, date: HttpDate) {
        while matches!(self.stage, Stage::Reading) && self.decode_next(now_ms, date) {}
    }

    /// Returns whether a request was refused, so that another one may follow it.
    fn decode_next(&mut self, now_ms: u64, date: HttpDate) -> bool {
        let blank = blank_lines(&self.received);
        if self.progress.is_unused() && blank > 0 {
            self.received.drain(..blank);
            self.progress = ParseProgress::default();
        }
        match decode_page(&self.received, &mut self.progress) {
            Ok(None) if self.is_half_closed => self.stage = Stage::Ended,
            Ok(None) => {
                if !self.received.is_empty() && self.deadline_ms.is_none() {
                    self.deadline_ms = Some(now_ms + LIMIT_MS);
                }
            }
            Ok(Some(request)) => {
                self.received.drain(..request.used);
                self.deadline_ms = None;
                self.stage = Stage::Asked(request);
            }
            Err(refusal) => {
                self.refuse(&refusal, now_ms, date);
                return true;
            }
        }
        false
    }

    fn refuse(&mut self, refusal: &PageRefusal, now_ms: u64, date: HttpDate) {
        let PageRefusal {
            status,
            text,
            used,
            bodiless,
            close,
        } = refusal;
        let close = *close || used.is_none();
        self.received.drain(..used.unwrap_or(self.received.len()));
        let answer = PageAnswer::text(*status, text);
        self.start_sending(answer.encode(*bodiless, close, date), close, now_ms);
    }

    /// Answers the request; `leaves` closes the connection after that.
    pub fn answer(&mut self, answer: &PageAnswer, leaves: bool, now_ms: u64, date: HttpDate) {
        let (bodiless, close) = match &self.stage {
            Stage::Asked(request) => (request.bodiless, request.close || leaves),
            _ => (false, true),
        };
        self.start_sending(answer.encode(bodiless, close, date), close, now_ms);
        self.decode(now_ms, date);
    }

    fn start_sending(&mut self, bytes: Vec<u8>, close: bool, now_ms: u64) {
        (self.unsent, self.sent) = (bytes, 0);
        self.stage = Stage::Sending { close };
        self.deadline_ms = Some(now_ms + LIMIT_MS);
        self.send(now_ms);
    }

    fn send(&mut self, now_ms: u64) {
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        while self.sent < self.unsent.len() {
            let rest = &self.unsent[self.sent..];
            match send(self.socket.as_fd().as_raw_fd(), rest, flags) {
                Ok(length) => self.sent += length,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                Err(_) => {
                    self.stage = Stage::Ended;
                    return;
                }
            }
        }
        self.unsent = Vec::new();
        if let Stage::Sending { close: true } = self.stage {
            let _ = shutdown(self.socket.as_fd().as_raw_fd(), Shutdown::Write);
            self.stage = Stage::Lingering;
            self.deadline_ms = Some(now_ms + LINGER_MS);
            return self.discard();
        }
        self.stage = Stage::Reading;
        self.deadline_ms = None;
        self.idle_since_ms = now_ms;
        self.has_answered = true;
    }

    fn discard(&mut self) {
        let mut piece = [0; PIECE];
        // A bounded number of reads per turn. A client that never stops sending is disconnected at the deadline.
        for _ in 0..16 {
            match self.socket.receive(&mut piece) {
                Ok(1..) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                Ok(0) | Err(_) => {
                    self.stage = Stage::Ended;
                    return;
                }
            }
        }
    }
}

impl AsFd for PageConnection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
