//! Hands live client connections from a draining worker to another worker: the adoption queue.
//!
//! It is one socketpair for all workers, made by the master. A draining worker sends at one end, and an
//! accepting worker receives at the other. The keeper of a dead worker also sends. A packet consists of a
//! header, answers to send first, bytes that were received but not consumed, and the client's descriptor.
//! Many bytes are in a memory file instead. If a connection cannot be sent now, the sender gets an error,
//! keeps the connection and tries again. If a packet is invalid, its connection is closed, with a line in
//! the log.

use std::borrow::Cow;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use crate::protocol::Dialect;
use crate::sys::{memory_file, socket};

/// The first bytes of each packet: "pfh" and the version of the format. Version 2 also has answers that are sent
/// first, and the flag `CLOSING`. A packet without both uses version 1, so that older workers understand it.
const MAGIC: [u8; 4] = *b"pfh\x01";
const MAGIC_2: [u8; 4] = *b"pfh\x02";
/// A flag beside the dialect: close the connection after the answers are sent.
const CLOSING: u8 = 0x80;
/// Another flag: an HTTP request must name its method in the path. Older versions ignore it, and detect the dialect
/// again.
const NEEDS_PATH: u8 = 0x40;
const HEADER: usize = 16;
/// The longest idle time that a packet can hold: four and a half hours, in three bytes.
pub const MOST_IDLE_MS: u32 = 0x00FF_FFFF;
/// The largest number of unread bytes in the packet itself; a few such packets fit into the default socket buffer.
const MOST_INLINE: usize = 64 * 1024;
/// The largest number of bytes in the memory file of a packet: the largest configurable frame, and the same again for
/// the answers before it.
const MOST_BESIDE: usize = 256 << 20;
/// The largest number of bytes of a packet.
pub const LONGEST: usize = HEADER + MOST_INLINE;

/// The packet of a connection of which nothing was received yet.
pub const FRESH: [u8; HEADER] = *b"pfh\x01\0\0\0\0\0\0\0\0\0\0\0\0";

/// A packet with the link of a session whose acceptor has died, for the next acceptor of its listener.
pub const REJOIN: [u8; 4] = *b"pfr\x01";

/// Both ends of the queue. All workers share it.
#[derive(Debug, Clone)]
pub struct AdoptionQueue {
    /// Sends connections.
    pub tx: Rc<OwnedFd>,
    /// Receives connections.
    pub rx: Rc<OwnedFd>,
}

/// The state that is handed over with a connection, besides its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HandoffState {
    /// The dialect, if it is known.
    pub dialect: Option<Dialect>,
    /// The time since its last received bytes in milliseconds, at most [`MOST_IDLE_MS`]. The receiver
    /// continues to count from this value.
    pub idle_ms: u32,
    /// Whether to close the connection after the answers of the packet are sent.
    pub closing: bool,
    /// Whether an HTTP request must name its method in the path. Only used if the receiver does not have the
    /// listener of the connection.
    pub needs_path: bool,
}

/// A received connection without its socket.
#[derive(Debug, PartialEq, Eq)]
pub struct AdoptedConnection<'a> {
    pub state: HandoffState,
    /// Answers that were not sent to it yet; they are sent first.
    pub unsent: Cow<'a, [u8]>,
    /// Received bytes that were not consumed.
    pub unread: Cow<'a, [u8]>,
}

impl AdoptionQueue {
    /// Creates an empty queue.
    ///
    /// # Errors
    /// If no descriptor is left.
    pub fn new() -> io::Result<Self> {
        let (giving, taking) = socket::packet_pair()?;
        Ok(AdoptionQueue {
            tx: Rc::new(giving),
            rx: Rc::new(taking),
        })
    }

    /// Sends a connection. On success the queue holds it, and the sender may close its own descriptor.
    ///
    /// # Errors
    /// EAGAIN and ETOOMANYREFS if the queue has no room now. [`is_full`] has all errors that are temporary.
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
        header[4] |= if state.needs_path { NEEDS_PATH } else { 0 };
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

    /// Sends a connection with the packet that it arrived with.
    ///
    /// # Errors
    /// As for `send`.
    pub fn resend(&self, client: BorrowedFd<'_>, packet: &[u8]) -> io::Result<()> {
        socket::send_packet(&self.tx, &[packet], &[client])
    }
}

/// Returns the packet at the beginning of these bytes; `None` if there is no complete packet.
pub fn packet_in(bytes: &[u8]) -> Option<&[u8]> {
    let (header, rest) = bytes.split_at_checked(HEADER)?;
    let (unread, unsent) = lengths(header)?;
    let inline = unsent.checked_add(unread).filter(|it| *it <= MOST_INLINE)?;
    (inline <= rest.len()).then(|| &bytes[..HEADER + inline])
}

/// Returns whether a packet has the format of a connection, with a second descriptor if `has_rest`.
pub fn is_packet(packet: &[u8], has_rest: bool) -> bool {
    let lengths = packet
        .split_at_checked(HEADER)
        .and_then(|(header, _)| lengths(header));
    lengths.is_some_and(|(unread, unsent)| match unread.checked_add(unsent) {
        Some(bytes) if has_rest => packet.len() == HEADER && bytes <= MOST_BESIDE,
        Some(bytes) => packet.len() == HEADER + bytes,
        None => false,
    })
}

/// Returns the numbers of unread and unsent bytes in a header.
fn lengths(header: &[u8]) -> Option<(usize, usize)> {
    let word = |at: usize| Some(u32::from_le_bytes(header[at..at + 4].try_into().ok()?) as usize);
    match header[..4].try_into().ok()? {
        // Version 1 has a length of eight bytes, of which four are always enough.
        MAGIC if word(12)? == 0 => Some((word(8)?, 0)),
        MAGIC_2 => Some((word(8)?, word(12)?)),
        _ => None,
    }
}

/// Returns whether an error of `send` is temporary.
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

/// Returns the number of a dialect in a packet; 0 while it is unknown.
pub fn dialect_code(dialect: Option<Dialect>) -> u8 {
    match dialect {
        None => 0,
        Some(Dialect::Frame) => 1,
        Some(Dialect::Line) => 2,
        Some(Dialect::Http) => 3,
        Some(Dialect::Unknown) => 4,
    }
}

/// Returns the dialect with this number in a packet; `None` if it is unknown.
pub fn dialect(number: u8) -> Option<Dialect> {
    match number {
        1 => Some(Dialect::Frame),
        2 => Some(Dialect::Line),
        3 => Some(Dialect::Http),
        4 => Some(Dialect::Unknown),
        _ => None,
    }
}

/// Decodes a packet. `rest` is its memory file, if it has one. Returns `None` if it does not have this format.
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
            dialect: dialect(header[4] & !(CLOSING | NEEDS_PATH)),
            idle_ms: u32::from_le_bytes([header[5], header[6], header[7], 0]),
            closing: header[4] & CLOSING != 0,
            needs_path: header[4] & NEEDS_PATH != 0,
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
            needs_path: !closing,
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
    fn a_connection_is_handed_over_with_its_unread_bytes() {
        cross(false, b"", b"");
        cross(false, b"", b"\x0e\0\0\0{\"in\"");
        cross(false, b"", &vec![7; MOST_INLINE]);
        cross(false, b"", &vec![8; MOST_INLINE + 1]);
        cross(false, b"", &vec![9; 20 << 20]);
    }

    #[test]
    fn answers_are_handed_over_before_unread_bytes_and_with_the_closing_flag() {
        cross(false, b"an answer", b"");
        cross(true, b"the last one", b"");
        cross(true, b"", b"");
        cross(false, b"an answer", &vec![8; MOST_INLINE]);
        cross(true, &vec![5; MOST_INLINE], b"x");
    }

    #[test]
    fn a_full_queue_is_an_error_and_loses_nothing() {
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
    fn the_file_of_a_packet_must_be_a_memory_file_of_the_declared_length() {
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
        // A sparse file needs no memory of the sender, but reading it would need memory of the receiver.
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
    fn invalid_packets_are_refused() {
        assert_eq!(decode_packet(b"", None), None);
        assert_eq!(decode_packet(&[0; HEADER], None), None);
        let mut short = [0; HEADER + 1];
        short[..4].copy_from_slice(&MAGIC);
        assert_eq!(
            decode_packet(&short, None),
            None,
            "a length that does not match"
        );
        assert!(is_packet(&FRESH, false) && is_packet(&FRESH, true));
        assert!(!is_packet(&short, false) && !is_packet(&short, true) && !is_packet(b"", false));
        // An order of the master.
        let order = [&b"pfd\x01\x02"[..], &[0; 27]].concat();
        assert!(!is_packet(&order, false) && !is_packet(&order, true));
        assert!(!is_packet(&REJOIN, false) && !is_packet(&REJOIN, true));
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
            needs_path: false,
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
