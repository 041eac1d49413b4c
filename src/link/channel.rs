//! One end of the socket pair between the master and a worker.
//!
//! Neither side ever waits for the other: a full queue is an error for the sender, and the end of
//! the stream means that the other one is gone. Each side knows only its own two kinds of message.
//! Descriptors cross to the worker alone. The master's end refuses them where the kernel can, and
//! receives none elsewhere (`sys::rights`), because a worker may be in an attacker's hands.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;

use super::message::{Message, MessageBody, Order, PACKET, Report};
use crate::sys::rights::{self, GuardedSocket};
use crate::sys::{closer, socket};

/// One end: sends `S`, receives `R`.
#[derive(Debug)]
pub struct Channel<S, R> {
    fd: GuardedSocket,
    bodies: PhantomData<fn(S) -> R>,
}

pub type MasterEnd = Channel<Order, Report>;
pub type WorkerEnd = Channel<Report, Order>;

/// What came in.
#[derive(Debug)]
pub enum Received<T> {
    /// A message, with a descriptor if one came along, which only a worker takes.
    Message(Message<T>, Option<OwnedFd>),
    /// A message with descriptors for the master. It stays in the socket, and nothing behind it can be
    /// received. Workers of older versions send one when all their threads are stuck.
    WithDescriptors(Message<T>),
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
    rights::refuse(&master);
    let worker = Channel {
        fd: GuardedSocket::trusted(worker),
        bodies: PhantomData,
    };
    Ok((Channel::of(master), worker))
}

impl MasterEnd {
    /// The end that this descriptor is, which came from a program before this one. If it takes
    /// descriptors, it goes on to do so, because a worker of an older version could not report that
    /// its threads are stuck otherwise.
    pub fn of(fd: OwnedFd) -> Self {
        Channel {
            fd: GuardedSocket::new(fd, closer::close_in_child),
            bodies: PhantomData,
        }
    }

    /// Takes the next message.
    pub fn receive(&self) -> Received<Report> {
        let mut packet = [0; PACKET];
        match self.fd.receive(&mut packet) {
            Ok(0) => Received::End,
            Ok(length) => match Message::decode(&packet[..length]) {
                Some(message) => Received::Message(message, None),
                None => Received::Garbage,
            },
            Err(Errno::EBADMSG) => match Message::decode(&packet) {
                Some(message) => Received::WithDescriptors(message),
                None => Received::Garbage,
            },
            // ECONNRESET: the other side ended with messages unread.
            Err(Errno::ECONNRESET) => Received::End,
            // Out of memory for a moment is no end: the next wake-up asks again.
            Err(_) => Received::Empty,
        }
    }
}

impl<S: MessageBody, R> Channel<S, R> {
    /// Sends a message, with a descriptor if it needs one.
    ///
    /// # Errors
    /// When the other side does not read, or is gone.
    pub fn send(&self, message: Message<S>, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        socket::send_packet(&self.fd, &[&message.encode()], descriptor.as_slice())
    }
}

impl WorkerEnd {
    /// Takes the next message.
    pub fn receive(&self) -> Received<Order> {
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::pipe;

    use super::*;
    use crate::link::ids::{Generation, Pid};

    fn report(body: Report) -> Message<Report> {
        Message {
            pid: Pid(7),
            generation: Generation(1),
            body,
        }
    }

    #[test]
    fn a_master_receives_reports_and_no_descriptors_and_a_worker_does() {
        let (master, worker) = pair().unwrap();
        worker.send(report(Report::Ready), None).unwrap();
        assert!(matches!(
            master.receive(),
            Received::Message(
                Message {
                    body: Report::Ready,
                    ..
                },
                None
            )
        ));
        let (reader, _writer) = pipe().unwrap();
        let order = Message {
            pid: Pid(7),
            generation: Generation(1),
            body: Order::ReopenLog,
        };
        master.send(order, Some(reader.as_fd())).unwrap();
        assert!(matches!(worker.receive(), Received::Message(_, Some(_))));
        drop(worker);
        assert!(matches!(master.receive(), Received::End));
    }

    /// As an older version has made it, or an older kernel.
    #[test]
    fn a_report_with_descriptors_is_read_where_it_lies() {
        let (master, worker) = socket::packet_pair().unwrap();
        let master = MasterEnd::of(master);
        let (reader, _writer) = pipe().unwrap();
        let packet = report(Report::AllThreadsStuck(3)).encode();
        socket::send_packet(&worker, &[&packet], &[reader.as_fd()]).unwrap();
        for _ in 0..2 {
            let Received::WithDescriptors(message) = master.receive() else {
                panic!("no report with descriptors");
            };
            assert_eq!(message, report(Report::AllThreadsStuck(3)));
        }
    }
}
