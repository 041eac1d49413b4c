//! Where log lines go: a descriptor that is written to without ever waiting.
//!
//! A pipe or terminal is opened once more, for a non-blocking mode of its own: setting it on the
//! inherited one would change it for the shell and every other process that shares it. A socket
//! is asked not to wait with each send. A file is simply written to. A line that can't be written
//! is lost and counted.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, send};

/// How a descriptor is written to without waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    /// As it is: a file, or a description of our own that is non-blocking.
    Write,
    /// MSG_DONTWAIT.
    Send,
    /// Only when poll(2) says that there is room: a description that others share.
    WhenReady,
}

/// Where lines go.
#[derive(Debug)]
pub struct Output {
    file: File,
    manner: Manner,
    /// The last line was cut short: the next one starts afresh.
    torn: bool,
}

impl Output {
    /// Appends to the file at `path`, which is made if it is not there.
    ///
    /// # Errors
    /// When it can't be opened.
    pub fn file(path: &Path) -> io::Result<Self> {
        let fifo = std::fs::metadata(path).is_ok_and(|found| found.file_type().is_fifo());
        let file = OpenOptions::new()
            .append(true)
            // A fifo that nobody reads can't be opened for writing alone (fifo(7)).
            .read(fifo)
            .create(true)
            .mode(0o640)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)?;
        Ok(Output::of(file, Manner::Write))
    }

    /// Standard error, whatever it is.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn standard_error() -> io::Result<Self> {
        let own = io::stderr().as_fd().try_clone_to_owned()?;
        let kind = File::from(own.try_clone()?)
            .metadata()
            .map(|found| found.file_type());
        let again = || {
            OpenOptions::new()
                .append(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                .open("/proc/self/fd/2")
        };
        Ok(match kind {
            Ok(kind) if kind.is_socket() => Output::of(own, Manner::Send),
            Ok(kind) if kind.is_file() => Output::of(own, Manner::Write),
            // Not allowed where another user's terminal or pipe was inherited.
            _ => match again() {
                Ok(file) => Output::of(file, Manner::Write),
                Err(_) => Output::of(own, Manner::WhenReady),
            },
        })
    }

    /// What another process has passed: always a log file of `Output::file`.
    pub fn received(fd: OwnedFd) -> Self {
        Output::of(fd, Manner::Write)
    }

    fn of(file: impl Into<OwnedFd>, manner: Manner) -> Self {
        Output {
            file: File::from(file.into()),
            manner,
            torn: false,
        }
    }

    /// The same place under another descriptor.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn duplicate(&self) -> io::Result<Self> {
        Ok(Output::of(self.file.try_clone()?, self.manner))
    }

    /// Writes one whole line, or counts it as lost. Says how many were lost once it can again.
    pub fn write_line(&mut self, line: &[u8], lost: &AtomicU64) {
        let missing = lost.swap(0, Ordering::Relaxed);
        let mut text = Vec::new();
        if self.torn {
            text.push(b'\n');
        }
        if missing > 0 {
            text.extend_from_slice(
                format!("{missing} log lines were lost: the log could not be written\n").as_bytes(),
            );
        }
        text.extend_from_slice(line);
        let written = self.write(&text);
        if written < text.len() {
            lost.fetch_add(missing + 1, Ordering::Relaxed);
            self.torn |= written > 0;
        } else {
            self.torn = false;
        }
    }

    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut written = 0;
        while written < bytes.len() {
            match self.write_some(&bytes[written..]) {
                Ok(0) => break,
                Ok(length) => written += length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        written
    }

    fn write_some(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.manner {
            Manner::Write => self.file.write(bytes),
            Manner::Send => {
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                Ok(send(self.file.as_raw_fd(), bytes, flags)?)
            }
            Manner::WhenReady => {
                let mut wanted = [PollFd::new(self.file.as_fd(), PollFlags::POLLOUT)];
                poll(&mut wanted, PollTimeout::ZERO)?;
                let ready = wanted[0]
                    .revents()
                    .is_some_and(|found| found.contains(PollFlags::POLLOUT));
                // Ready means room for PIPE_BUF bytes (pipe(7)).
                let most = bytes.len().min(libc::PIPE_BUF);
                if ready {
                    self.file.write(&bytes[..most])
                } else {
                    Ok(0)
                }
            }
        }
    }
}

impl AsFd for Output {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_full_pipe_loses_lines_and_says_how_many() {
        let (mut reader, writer) = io::pipe().unwrap();
        let raw = writer.as_raw_fd();
        let again = OpenOptions::new()
            .append(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(format!("/proc/self/fd/{raw}"))
            .unwrap();
        drop(writer);
        let mut output = Output::of(again, Manner::Write);
        let lost = AtomicU64::new(0);
        let line = [b"x".repeat(999), b"\n".to_vec()].concat();
        for _ in 0..1000 {
            output.write_line(&line, &lost);
        }
        let missing = lost.load(Ordering::Relaxed);
        assert!((900..1000).contains(&missing), "{missing}");
        let mut room = vec![0; 1 << 20];
        let read = reader.read(&mut room).unwrap();
        assert!(read > 0);
        output.write_line(b"after\n", &lost);
        let read = reader.read(&mut room).unwrap();
        let text = String::from_utf8_lossy(&room[..read]);
        assert!(
            text.ends_with(&format!(
                "{missing} log lines were lost: the log could not be written\nafter\n"
            )),
            "{text}"
        );
        assert_eq!(lost.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_full_device_is_no_error() {
        let mut output = Output::file(Path::new("/dev/full")).unwrap();
        let lost = AtomicU64::new(0);
        output.write_line(b"nobody will read this\n", &lost);
        assert_eq!(lost.load(Ordering::Relaxed), 1);
    }
}
