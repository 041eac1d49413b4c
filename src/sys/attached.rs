//! Sends and receives bytes of a stream socket with attached descriptors (SCM_RIGHTS, unix(7)).
//!
//! Only for a peer that is expected to attach them; `rights` protects all other sockets. They come with the
//! first byte of a message.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::socket::receive_packet;

/// Sends bytes over a stream socket without waiting, with descriptors attached to the first one. Returns the
/// number of bytes sent.
///
/// # Errors
/// Those of sendmsg(2), among them EAGAIN.
pub fn send(fd: &impl AsRawFd, bytes: &[u8], descriptors: &[OwnedFd]) -> Result<usize, Errno> {
    let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    sendmsg::<()>(fd.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None)
}

/// Receives a line from a stream socket, with the descriptors that came with it. `limit` is the longest pause.
///
/// # Errors
/// `WouldBlock` after a pause; `UnexpectedEof` if the peer closed the socket; those of recvmsg(2).
pub fn receive_line(fd: &impl AsFd, limit: Duration) -> io::Result<(String, Vec<OwnedFd>)> {
    let (mut line, mut received) = (Vec::new(), Vec::new());
    let mut buffer = vec![0; 64 * 1024];
    while !line.ends_with(b"\n") {
        let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        if poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], timeout)? == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let (length, descriptors) = receive_packet(fd, &mut buffer)?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        line.extend_from_slice(&buffer[..length]);
        received.extend(descriptors);
    }
    let line = String::from_utf8(line).map_err(|_| io::ErrorKind::InvalidData)?;
    Ok((line, received))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_line_comes_with_its_descriptors() {
        let (one, other) = UnixStream::pair().unwrap();
        let file = File::open("/dev/null").unwrap();
        let limit = Duration::from_millis(10);
        let paused = receive_line(&other, limit).unwrap_err();
        assert_eq!(paused.kind(), io::ErrorKind::WouldBlock);
        let file = OwnedFd::from(file);
        assert_eq!(send(&one, b"a", &[file]), Ok(1));
        assert_eq!(send(&one, b"b\n", &[]), Ok(2));
        let (line, received) = receive_line(&other, limit).unwrap();
        assert_eq!((line.as_str(), received.len()), ("ab\n", 1));
        drop(one);
        let ended = receive_line(&other, limit).unwrap_err();
        assert_eq!(ended.kind(), io::ErrorKind::UnexpectedEof);
    }
}
