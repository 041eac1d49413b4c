//! The adoption queue: how a draining worker passes a live client connection on.
//!
//! One socket pair for all workers, made by the master: who drains gives at one end, who accepts
//! takes at the other. So does the keeper of a worker that died. A packet is a header, the answers
//! that are to be sent first, the bytes that were received and not consumed (all of it in a file of
//! memory where they are many), and the client's descriptor. What can't be given now is
//! an error for the giver, who keeps the connection and tries again; what can't be understood
//! closes the connection, with a line in the log.

use std::borrow::Cow;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use crate::protocol::Dialect;
use crate::sys::{memory_file, socket};

/// First in each packet: "pfh" and the version of the format. The second one has answers to send
/// first; what can be said in the first one is, so that older workers understand it.
const MAGIC: [u8; 4] = *b"pfh\x01";
const MAGIC_2: [u8; 4] = *b"pfh\x02";
/// Beside the dialect: the connection is to be closed once the answers are sent.
const CLOSING: u8 = 0x80;
const HEADER: usize = 16;
/// The longest idle time that crosses: four hours and a half, in three bytes.
pub const MOST_IDLE_MS: u32 = 0x00FF_FFFF;
/// Most unread bytes in the packet itself: a few such packets fit the socket's default buffer.
const MOST_INLINE: usize = 64 * 1024;
/// Most bytes in the file of memory beside a packet: the largest frame that can be configured, with as
/// much again for the answers before it.
const MOST_BESIDE: usize = 256 << 20;
/// Bytes of the longest packet.
pub const LONGEST: usize = HEADER + MOST_INLINE;

/// Both ends of the queue, shared by all workers.
#[derive(Debug, Clone)]
pub struct AdoptionQueue {
    /// Where connections are given.
    pub tx: Rc<OwnedFd>,
    /// Where they are taken.
    pub rx: Rc<OwnedFd>,
}

/// What crosses with a connection, besides its unread bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HandoffState {
    /// What it speaks, once that is known.
    pub dialect: Option<Dialect>,
    /// For how many milliseconds nothing has come from it, at most [`MOST_IDLE_MS`]: its idle time
    /// goes on.
    pub idle_ms: u32,
    /// It is to be closed once the answers that come along are sent.
    pub closing: bool,
}

/// A connection that was taken, all but its socket.
#[derive(Debug, PartialEq, Eq)]
pub struct AdoptedConnection<'a> {
    pub state: HandoffState,
    /// Answers that it has not been sent: they go first.
    pub unsent: Cow<'a, [u8]>,
    /// What it had sent that nobody has consumed.
    pub unread: Cow<'a, [u8]>,
}

impl AdoptionQueue {
    /// An empty queue.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn new() -> io::Result<Self> {
        let (giving, taking) = socket::packet_pair()?;
        Ok(AdoptionQueue {
            tx: Rc::new(giving),
            rx: Rc::new(taking),
        })
    }

    /// Gives a connection away. On success the queue holds it, and the giver may close its own
    /// descriptor.
    ///
    /// # Errors
    /// EAGAIN and ETOOMANYREFS: not now.
    pub fn send(
        &self,
        client: BorrowedFd<'_>,
        state: HandoffState,
        unsent: &[u8],
        unread: &[u8],
    ) -> io::Result<()> {
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(&MAGIC);
        header[4] = dialect_code(state.dialect);
        let idle_ms = state.idle_ms.min(MOST_IDLE_MS);
        header[5..8].copy_from_slice(&idle_ms.to_le_bytes()[..3]);
        header[8..].copy_from_slice(&(unread.len() as u64).to_le_bytes());
        if state.closing || !unsent.is_empty() {
            header[..4].copy_from_slice(&MAGIC_2);
            header[4] |= if state.closing { CLOSING } else { 0 };
            let length = |part: &[u8]| u32::try_from(part.len()).map_err(io::Error::other);
            header[8..12].copy_from_slice(&length(unread)?.to_le_bytes());
            header[12..].copy_from_slice(&length(unsent)?.to_le_bytes());
        }
        if unsent.len() + unread.len() <= MOST_INLINE {
            return socket::send_packet(&self.tx, &[&header, unsent, unread], &[client]);
        }
        let rest = memory_file::create(&[unsent, unread].concat())?;
        socket::send_packet(&self.tx, &[&header], &[client, rest.as_fd()])
    }
}

impl AdoptionQueue {
    /// Gives a connection away as it came, with the packet that it came with.
    ///
    /// # Errors
    /// As of `give`.
    pub fn resend(&self, client: BorrowedFd<'_>, packet: &[u8]) -> io::Result<()> {
        socket::send_packet(&self.tx, &[packet], &[client])
    }
}

/// The packet at the beginning of these bytes; `None` when there is none, or not all of it stands there.
pub fn packet_in(bytes: &[u8]) -> Option<&[u8]> {
    let (header, rest) = bytes.split_at_checked(HEADER)?;
    let (unread, unsent) = lengths(header)?;
    let inline = unsent.checked_add(unread).filter(|it| *it <= MOST_INLINE)?;
    (inline <= rest.len()).then(|| &bytes[..HEADER + inline])
}

/// How many bytes a header says are unread, and unsent.
fn lengths(header: &[u8]) -> Option<(usize, usize)> {
    let word = |at: usize| Some(u32::from_le_bytes(header[at..at + 4].try_into().ok()?) as usize);
    match header[..4].try_into().ok()? {
        // A length of eight bytes, of which no frame needs more than four.
        MAGIC if word(12)? == 0 => Some((word(8)?, 0)),
        MAGIC_2 => Some((word(8)?, word(12)?)),
        _ => None,
    }
}

/// Whether an error of `give` is one that passes.
pub fn is_full(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            nix::libc::EAGAIN
                | nix::libc::ETOOMANYREFS
                | nix::libc::ENOBUFS
                | nix::libc::ENOMEM
                | nix::libc::EMFILE
                | nix::libc::ENFILE
        )
    )
}

/// A dialect's number in a packet; 0 while it is not known.
pub fn dialect_code(dialect: Option<Dialect>) -> u8 {
    match dialect {
        None => 0,
        Some(Dialect::Frame) => 1,
        Some(Dialect::Line) => 2,
        Some(Dialect::Http) => 3,
        Some(Dialect::Unknown) => 4,
    }
}

pub fn dialect(number: u8) -> Option<Dialect> {
    match number {
        1 => Some(Dialect::Frame),
        2 => Some(Dialect::Line),
        3 => Some(Dialect::Http),
        4 => Some(Dialect::Unknown),
        _ => None,
    }
}

/// What a packet says; `None` when it is none of this format.
pub fn decode_packet(packet: &[u8], rest: Option<OwnedFd>) -> Option<AdoptedConnection<'_>> {
    let (header, inline) = packet.split_at_checked(HEADER)?;
    let (unread, unsent) = lengths(header)?;
    let (unsent, unread) = match rest {
        Some(file) => {
            let length = unsent.checked_add(unread).filter(|it| *it <= MOST_BESIDE)?;
            let mut bytes = memory_file::read(file, length as u64).ok()?;
            let whole = bytes.len() == length;
            let rest = whole.then(|| bytes.split_off(unsent))?;
            (Cow::Owned(bytes), Cow::Owned(rest))
        }
        None if inline.len() == unsent + unread => {
            let (unsent, unread) = inline.split_at(unsent);
            (Cow::Borrowed(unsent), Cow::Borrowed(unread))
        }
        None => return None,
    };
    Some(AdoptedConnection {
        state: HandoffState {
            dialect: dialect(header[4] & !CLOSING),
            idle_ms: u32::from_le_bytes([header[5], header[6], header[7], 0]),
            closing: header[4] & CLOSING != 0,
        },
        unsent,
        unread,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn cross(closing: bool, unsent: &[u8], unread: &[u8]) {
        let queue = AdoptionQueue::new().unwrap();
        let (mut client, server) = UnixStream::pair().unwrap();
        let state = HandoffState {
            dialect: Some(Dialect::Http),
            idle_ms: 3_600_123,
            closing,
        };
        queue.send(server.as_fd(), state, unsent, unread).unwrap();
        drop(server);
        let mut packet = vec![0; LONGEST];
        let (length, descriptors) = socket::receive_packet(&queue.rx, &mut packet).unwrap();
        let inline = unsent.len() + unread.len() <= MOST_INLINE;
        assert_eq!(packet_in(&packet), inline.then_some(&packet[..length]));
        assert_eq!(packet_in(&packet[..length - 1]), None);
        let mut descriptors = descriptors.into_iter();
        let mut server = UnixStream::from(descriptors.next().unwrap());
        let taken = decode_packet(&packet[..length], descriptors.next()).unwrap();
        assert_eq!(taken.state, state);
        assert!(taken.unsent == unsent && taken.unread == unread);
        server.write_all(b"still here").unwrap();
        let mut answer = [0; 10];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"still here");
    }

    #[test]
    fn a_connection_crosses_with_its_unread_bytes_few_or_many() {
        cross(false, b"", b"");
        cross(false, b"", b"\x0e\0\0\0{\"in\"");
        cross(false, b"", &vec![7; MOST_INLINE]);
        cross(false, b"", &vec![8; MOST_INLINE + 1]);
        cross(false, b"", &vec![9; 20 << 20]);
    }

    #[test]
    fn answers_cross_before_what_is_unread_and_a_connection_that_ends_says_so() {
        cross(false, b"an answer", b"");
        cross(true, b"the last one", b"");
        cross(true, b"", b"");
        cross(false, b"an answer", &vec![8; MOST_INLINE]);
        cross(true, &vec![5; MOST_INLINE], b"x");
    }

    #[test]
    fn a_full_queue_is_told_and_loses_nothing() {
        let queue = AdoptionQueue::new().unwrap();
        let (_client, server) = UnixStream::pair().unwrap();
        let give = || queue.send(server.as_fd(), HandoffState::default(), b"", b"x");
        let mut given = 0;
        while give().is_ok() {
            given += 1;
        }
        assert!(given > 0);
        let mut packet = vec![0; LONGEST];
        for _ in 0..given {
            let (length, descriptors) = socket::receive_packet(&queue.rx, &mut packet).unwrap();
            assert_eq!(descriptors.len(), 1);
            assert!(decode_packet(&packet[..length], None).is_some());
        }
        assert!(give().is_ok());
    }

    #[test]
    fn a_file_beside_a_packet_is_as_long_as_the_packet_says_and_of_memory() {
        let header = |unread: u32, unsent: u32| {
            let lengths = [unread.to_le_bytes(), unsent.to_le_bytes()].concat();
            [&MAGIC_2[..], &[0; 4], &lengths].concat()
        };
        let file = |length: u64| {
            let file = std::fs::File::from(memory_file::create(b"").unwrap());
            file.set_len(length).unwrap();
            OwnedFd::from(file)
        };
        let (packet, much) = (header(70_000, 0), header(u32::MAX, u32::MAX));
        assert!(decode_packet(&packet, Some(file(70_000))).is_some());
        // what takes no memory of the sender would take the receiver's
        assert_eq!(decode_packet(&packet, Some(file(1 << 40))), None);
        assert_eq!(
            decode_packet(&much, Some(file(2 * u64::from(u32::MAX)))),
            None
        );
        assert_eq!(decode_packet(&packet, Some(file(69_999))), None);
        let (reader, _writer) = io::pipe().unwrap();
        assert_eq!(
            decode_packet(&packet, Some(reader.into())),
            None,
            "would block"
        );
    }

    #[test]
    fn what_is_no_packet_is_not_taken_for_one() {
        assert_eq!(decode_packet(b"", None), None);
        assert_eq!(decode_packet(&[0; HEADER], None), None);
        let mut short = [0; HEADER + 1];
        short[..4].copy_from_slice(&MAGIC);
        assert_eq!(
            decode_packet(&short, None),
            None,
            "a length that does not match"
        );
    }

    /// Workers of two versions exchange these bytes.
    #[test]
    fn a_packet_has_the_bytes_that_other_versions_know() {
        let check = |state: HandoffState, unsent: &[u8], unread: &[u8], bytes: &[u8]| {
            let queue = AdoptionQueue::new().unwrap();
            let (_client, server) = UnixStream::pair().unwrap();
            queue.send(server.as_fd(), state, unsent, unread).unwrap();
            let mut packet = vec![0; LONGEST];
            let (length, descriptors) = socket::receive_packet(&queue.rx, &mut packet).unwrap();
            assert_eq!((&packet[..length], descriptors.len()), (bytes, 1));
            let taken = decode_packet(bytes, None).unwrap();
            assert_eq!(
                (taken.state, &*taken.unsent, &*taken.unread),
                (state, unsent, unread)
            );
        };
        let state = |dialect, closing| HandoffState {
            dialect,
            idle_ms: 0x0003_0201,
            closing,
        };
        for (number, dialect) in [
            (0, None),
            (1, Some(Dialect::Frame)),
            (2, Some(Dialect::Line)),
            (3, Some(Dialect::Http)),
            (4, Some(Dialect::Unknown)),
        ] {
            let mut bytes = *b"pfh\x01D\x01\x02\x03\x02\0\0\0\0\0\0\0{}";
            bytes[4] = number;
            check(state(dialect, false), b"", b"{}", &bytes);
        }
        let answer_first = b"pfh\x02\x02\x01\x02\x03\x02\0\0\0\x03\0\0\0ok\n{}";
        check(
            state(Some(Dialect::Line), false),
            b"ok\n",
            b"{}",
            answer_first,
        );
        let closing = b"pfh\x02\x83\x01\x02\x03\0\0\0\0\x01\0\0\0x";
        check(state(Some(Dialect::Http), true), b"x", b"", closing);
    }
}
