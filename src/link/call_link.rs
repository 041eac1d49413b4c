//! Sends and receives call frames over one end of an internal link, a stream socket, without waiting.
//!
//! Bytes that the socket does not take are kept and sent when it is writable. The sender of calls stops
//! at `is_congested`, so a peer that does not read costs a bounded amount of memory. An attacker may
//! control the peer: if it attaches descriptors, the link ends.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, Shutdown, send, shutdown};

use super::call_frame::Frame;
use crate::sys::event::{Interest, Reactor};
use crate::sys::rights::{self, GuardedSocket};
use crate::sys::{closer, socket};

/// With more unsent bytes than this, no further call is sent.
const CONGESTED_LEN: usize = 1024 * 1024;
/// The largest number of links of a process to workers. Each needs a descriptor in both processes.
pub const MAX_LINKS: usize = 64;
/// The largest number of reads from one link before the others get their turn.
pub const MAX_READS: usize = 16;
/// An empty buffer that is larger than this is freed.
const KEPT_LEN: usize = 256 * 1024;

/// Creates two connected ends for two processes.
///
/// # Errors
/// If no descriptor is left.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (one, other) = socket::stream_pair()?;
    rights::refuse(&one);
    rights::refuse(&other);
    Ok((one, other))
}

/// One end, in the process that uses it.
#[derive(Debug)]
pub struct CallLink {
    fd: GuardedSocket,
    unsent: Vec<u8>,
    sent: usize,
    received: Vec<u8>,
    is_closed: bool,
    /// The events that it is watched for; `None` before the first `settle`.
    interest: Option<Interest>,
}

impl CallLink {
    pub fn new(fd: OwnedFd) -> Self {
        CallLink {
            fd: GuardedSocket::received(fd, closer::close),
            unsent: Vec::new(),
            sent: 0,
            received: Vec::new(),
            is_closed: false,
            interest: None,
        }
    }

    /// Queues a frame; `flush` sends it. Returns false if it is too long.
    pub fn queue(&mut self, frame: &Frame<'_>) -> bool {
        frame.encode(&mut self.unsent)
    }

    pub fn flush(&mut self) {
        while self.sent < self.unsent.len() {
            let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
            match send(self.fd.as_raw_fd(), &self.unsent[self.sent..], flags) {
                Ok(count) => self.sent += count,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    if self.sent > KEPT_LEN {
                        self.unsent.drain(..self.sent);
                        self.sent = 0;
                    }
                    return;
                }
                // The peer is gone, or there is no memory. Sending ends, because no frame may arrive after one that
                // was not sent. Both sides still read what was sent before.
                Err(_) => {
                    let _ = shutdown(self.fd.as_raw_fd(), Shutdown::Both);
                    break;
                }
            }
        }
        self.unsent.clear();
        self.unsent.shrink_to(KEPT_LEN);
        self.sent = 0;
    }

    /// Sends queued frames, and watches the link under this number for the needed events. If `stops_reading`, a
    /// congested link is not read. Returns whether only reading is left to do.
    pub fn settle(&mut self, watch: u16, stops_reading: bool, reactor: &mut Reactor) -> bool {
        if self.has_unsent() {
            self.flush();
        }
        let wanted = match self.has_unsent() {
            true if stops_reading && self.is_congested() => Interest::Write,
            true => Interest::Both,
            false => Interest::Read,
        };
        if self.interest != Some(wanted) {
            match reactor.watch(watch, &*self, wanted) {
                Ok(()) => self.interest = Some(wanted),
                Err(error) => log::debug!("an internal link cannot be watched: {error}"),
            }
        }
        self.interest == Some(Interest::Read)
    }

    pub fn has_unsent(&self) -> bool {
        self.unsent_len() > 0
    }

    /// Returns the number of queued bytes.
    pub fn unsent_len(&self) -> usize {
        self.unsent.len() - self.sent
    }

    /// Returns whether the peer reads so slowly that no further call should be sent to it.
    pub fn is_congested(&self) -> bool {
        self.unsent_len() > CONGESTED_LEN
    }

    /// Receives once, at most `piece.len()` bytes. Returns whether more bytes may be waiting.
    pub fn receive(&mut self, piece: &mut [u8]) -> bool {
        if self.is_closed {
            return false;
        }
        match self.fd.receive(piece) {
            Ok(0) => self.is_closed = true,
            Ok(count) => {
                self.received.extend_from_slice(&piece[..count]);
                return count == piece.len();
            }
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            // Also EBADMSG: descriptors are attached.
            Err(_) => self.is_closed = true,
        }
        false
    }

    /// Takes the received bytes, so that they can be decoded while the link is used. Call `put_back`
    /// afterwards.
    pub fn take_received(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.received)
    }

    /// Puts the bytes of `take_received` back, without the first `consumed` bytes.
    pub fn put_back(&mut self, mut received: Vec<u8>, consumed: usize) {
        received.drain(..consumed);
        if received.is_empty() {
            received.shrink_to(KEPT_LEN);
        }
        self.received = received;
    }

    /// Returns whether the peer is gone.
    pub fn is_closed(&self) -> bool {
        self.is_closed
    }
}

impl AsFd for CallLink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::borrow::Cow;

    use super::*;
    use crate::link::call_frame::{AnswerFrame, DecodedCallFrame};

    fn answer(id: u64, length: usize) -> Frame<'static> {
        Frame::Answer(AnswerFrame {
            id,
            took_us: 1,
            runner: Default::default(),
            name: None,
            outcome: Ok(Cow::Owned(vec![b'1'; length])),
        })
    }

    #[test]
    fn frames_larger_than_the_socket_arrive_whole_and_the_end_after_them() {
        let (one, other) = pair().unwrap();
        let (mut one, mut other) = (CallLink::new(one), CallLink::new(other));
        for id in 0..4 {
            assert!(one.queue(&answer(id, 700_000)));
        }
        assert!(one.is_congested());
        let (mut piece, mut seen) = (vec![0; 64 * 1024], Vec::new());
        while seen.len() < 4 {
            one.flush();
            while other.receive(&mut piece) {}
            let (received, mut at) = (other.take_received(), 0);
            while let DecodedCallFrame::Whole(Frame::Answer(answer), used) =
                Frame::decode(&received[at..], 1_000_000)
            {
                assert_eq!(answer.outcome.unwrap().len(), 700_000);
                seen.push(answer.id);
                at += used;
            }
            other.put_back(received, at);
        }
        assert_eq!(seen, [0, 1, 2, 3]);
        assert!(!one.has_unsent() && !other.is_closed());
        drop(one);
        other.receive(&mut piece);
        assert!(other.is_closed());
    }
}
