//! Sends and receives messages over one end of the socketpair between the master and a worker.
//!
//! Neither side waits for the other. A full queue is an error for the sender, and the end of the stream
//! means that the other side is gone. Each side knows only its own two kinds of messages. Only the master
//! sends descriptors. The master's end refuses them if the kernel can, and otherwise does not receive
//! them (`sys::rights`), because an attacker may control a worker.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;

use super::message::{Message, MessageBody, Order, PACKET, Report};
use crate::sys::rights::{self, GuardedSocket};
use crate::sys::{closer, socket};

/// One end, which sends `S` and receives `R`.
#[derive(Debug)]
pub struct Channel<S, R> {
    fd: GuardedSocket,
    bodies: PhantomData<fn(S) -> R>,
}

pub type MasterEnd = Channel<Order, Report>;
pub type WorkerEnd = Channel<Report, Order>;

/// The result of a receive.
#[derive(Debug)]
pub enum Received<T> {
    /// A message, with a descriptor if it has one. Only a worker receives descriptors.
    Message(Message<T>, Option<OwnedFd>),
    /// A message with descriptors for the master. It stays in the socket, and nothing behind it can be
    /// received. Workers of older versions send one when all their threads are stuck.
    WithDescriptors(Message<T>),
    /// An invalid message.
    Garbage,
    /// There is no message now.
    Empty,
    /// The other side is gone.
    End,
}

/// Creates two connected ends.
///
/// # Errors
/// If no descriptor is left.
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
    /// Takes an end that the master before an upgrade has passed on. If the end accepts descriptors, it
    /// continues to do so, because a worker of an older version could not report stuck threads otherwise.
    pub fn of(fd: OwnedFd) -> Self {
        Channel {
            fd: GuardedSocket::new(fd, closer::close_in_child),
            bodies: PhantomData,
        }
    }

    /// Receives the next message.
    pub fn receive(&self) -> Received<Report> {
        let mut packet = [0; PACKET];
        let received = match self.fd.receive(&mut packet) {
            // The other side ended with unread messages. The kernel reports that once, before the messages that it
            // had sent.
            Err(Errno::ECONNRESET) => self.fd.receive(&mut packet),
            other => other,
        };
        match received {
            Ok(0) => Received::End,
            Ok(length) => match Message::decode(&packet[..length]) {
                Some(message) => Received::Message(message, None),
                None => Received::Garbage,
            },
            Err(Errno::EBADMSG) => match Message::decode(&packet) {
                Some(message) => Received::WithDescriptors(message),
                None => Received::Garbage,
            },
            // A temporary lack of memory is not the end: the next wake-up tries again.
            Err(_) => Received::Empty,
        }
    }
}

impl<S: MessageBody, R> Channel<S, R> {
    /// Sends a message, with a descriptor if it needs one.
    ///
    /// # Errors
    /// If the other side does not read, or is gone.
    pub fn send(&self, message: Message<S>, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        socket::send_packet(&self.fd, &[&message.encode()], descriptor.as_slice())
    }
}

impl WorkerEnd {
    /// Receives the next message.
    pub fn receive(&self) -> Received<Order> {
        let mut packet = [0; PACKET];
        match socket::receive_packet(&self.fd, &mut packet) {
            Ok((0, _)) => Received::End,
            Ok((length, mut descriptors)) => match Message::decode(&packet[..length]) {
                Some(message) => Received::Message(message, descriptors.pop()),
                None => Received::Garbage,
            },
            // A temporary lack of memory is not the end: the next wake-up tries again.
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

    use std::time::{Duration, Instant};

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
        wait_until(|| matches!(master.receive(), Received::End));
    }

    #[test]
    fn messages_are_received_although_the_other_side_ended_with_unread_ones() {
        let (master, worker) = pair().unwrap();
        worker.send(report(Report::Ready), None).unwrap();
        let order = Message {
            pid: Pid(7),
            generation: Generation(1),
            body: Order::StopPending,
        };
        master.send(order, None).unwrap();
        drop(master);
        assert!(matches!(worker.receive(), Received::Message(it, None) if it == order));
        wait_until(|| matches!(worker.receive(), Received::End));
        let (master, worker) = pair().unwrap();
        master.send(order, None).unwrap();
        worker.send(report(Report::Uneven), None).unwrap();
        drop(worker);
        let sent = report(Report::Uneven);
        assert!(matches!(master.receive(), Received::Message(it, None) if it == sent));
        wait_until(|| matches!(master.receive(), Received::End));
    }

    /// A child that another test has just forked has the other end, too, until it exits.
    fn wait_until(is_so: impl Fn() -> bool) {
        let end = Instant::now() + Duration::from_secs(10);
        while !is_so() {
            assert!(Instant::now() < end, "waited 10 s in vain");
            std::thread::yield_now();
        }
    }

    /// The channel as an older version or an older kernel has it.
    #[test]
    fn a_report_with_descriptors_is_read_but_not_received() {
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
