//! One end of the socket pair between the master and a worker.
//!
//! Neither side ever waits for the other: a full queue is an error for the sender, and the end of
//! the stream means that the other one is gone. Each side knows only its own two kinds of message.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use super::message::{Body, Message, Order, PACKET, Report};
use crate::sys::socket;

/// One end: sends `S`, receives `R`.
#[derive(Debug)]
pub struct Channel<S, R> {
    fd: OwnedFd,
    bodies: PhantomData<fn(S) -> R>,
}

/// The master's end.
pub type MasterEnd = Channel<Order, Report>;
/// The worker's end.
pub type WorkerEnd = Channel<Report, Order>;

/// What came in.
#[derive(Debug)]
pub enum Received<T> {
    /// A message, with a descriptor if one came along.
    Message(Message<T>, Option<OwnedFd>),
    /// Something that is no message of this side's.
    Garbage,
    /// Nothing more for now.
    Empty,
    /// The other side is gone.
    End,
}

/// Two connected ends.
///
/// # Errors
/// When there is no descriptor left.
pub fn pair() -> io::Result<(MasterEnd, WorkerEnd)> {
    let (master, worker) = socket::packet_pair()?;
    Ok((Channel::of(master), Channel::of(worker)))
}

impl<S: Body, R: Body> Channel<S, R> {
    /// The end that this descriptor is, which came from a program before this one.
    pub fn of(fd: OwnedFd) -> Self {
        Channel {
            fd,
            bodies: PhantomData,
        }
    }

    /// Sends a message, with a descriptor if it needs one.
    ///
    /// # Errors
    /// When the other side does not read, or is gone.
    pub fn send(&self, message: Message<S>, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        socket::send_packet(&self.fd, &[&message.encode()], descriptor.as_slice())
    }

    /// Takes the next message.
    pub fn receive(&self) -> Received<R> {
        let mut packet = [0; PACKET];
        match socket::receive_packet(&self.fd, &mut packet) {
            Ok((0, _)) => Received::End,
            Ok((length, mut descriptors)) => match Message::decode(&packet[..length]) {
                Some(message) => Received::Message(message, descriptors.pop()),
                None => Received::Garbage,
            },
            // ECONNRESET: the other side ended with messages unread.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Received::End,
            // Out of memory for a moment is no end: the next wake-up asks again.
            Err(_) => Received::Empty,
        }
    }
}

impl<S, R> AsFd for Channel<S, R> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl<S, R> AsRawFd for Channel<S, R> {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}
