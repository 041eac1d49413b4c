//! Where log lines go: a descriptor that is written to without ever waiting.
//!
//! A pipe or terminal is opened once more, for a non-blocking mode of its own: setting it on the
//! inherited one would change it for the shell and every other process that shares it. A socket
//! is asked not to wait with each send. A file is simply written to. A line that can't be written
//! is lost and counted.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::socket::{MsgFlags, send};
use nix::sys::stat::Mode;

use super::partial_line::PartialLine;
use crate::sys::account;
use crate::sys::other_writer::{self, ExposedPath};
use crate::sys::signal::SignalBlock;

/// How a descriptor is written to without waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WriteMode {
    /// As it is: a file, or a description of our own that is non-blocking.
    Write,
    /// MSG_DONTWAIT.
    Send,
    /// Only when poll(2) says that there is room: a description that others share.
    WhenReady,
}

/// Where lines go.
#[derive(Debug)]
pub struct LogOutput {
    file: File,
    manner: WriteMode,
    is_terminal: bool,
    /// Whether the last line there was cut short: the next one starts afresh.
    torn: PartialLine,
}

impl LogOutput {
    /// Appends to the file at `path`, which is made if it is not there. Where root opens it in a directory
    /// that another user can write, no symbolic link is followed: that user may have made it.
    ///
    /// # Errors
    /// When it can't be opened.
    pub fn file(path: &Path) -> io::Result<Self> {
        let own = account::effective_ids();
        let exposed = (own.0 == 0).then(|| other_writer::of_path(path, own));
        let file = match exposed.flatten() {
            None => open_file(path, 0)?,
            Some(exposed) => open_exposed(path, &exposed)?,
        };
        Ok(LogOutput::of(file, WriteMode::Write))
    }

    /// Looks whether the file, which this is, ends within a line. Call it before another process
    /// writes to the file, because that one may end the line meanwhile.
    pub fn look_at_end(&self) {
        self.torn.look(&self.file);
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
            Ok(kind) if kind.is_socket() => LogOutput::of(own, WriteMode::Send),
            Ok(kind) if kind.is_file() => LogOutput::of(own, WriteMode::Write),
            // Not allowed where another user's terminal or pipe was inherited.
            _ => match again() {
                Ok(file) => LogOutput::of(file, WriteMode::Write),
                Err(_) => LogOutput::of(own, WriteMode::WhenReady),
            },
        })
    }

    /// What another process has passed: always a log file of `LogOutput::file`.
    pub fn received(fd: OwnedFd) -> Self {
        LogOutput::of(fd, WriteMode::Write)
    }

    fn of(file: impl Into<OwnedFd>, manner: WriteMode) -> Self {
        let file = File::from(file.into());
        LogOutput {
            torn: PartialLine::of(&file),
            is_terminal: file.is_terminal(),
            file,
            manner,
        }
    }

    /// The same place under another descriptor.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn duplicate(&self) -> io::Result<Self> {
        Ok(LogOutput::of(self.file.try_clone()?, self.manner))
    }

    /// Writes one whole line, or counts it as lost. Says how many were lost once it can again, in
    /// the line that `notice` makes of their number; an empty line is for that alone.
    pub fn write_line(
        &mut self,
        line: &[u8],
        lost: &AtomicU64,
        notice: impl FnOnce(u64) -> Vec<u8>,
    ) {
        let missing = lost.swap(0, Ordering::Relaxed);
        let mut text = Vec::new();
        let torn = self.torn.get();
        if torn.is_some() {
            text.push(b'\n');
        }
        if missing > 0 {
            text.extend_from_slice(&notice(missing));
        }
        let told = text.len();
        text.extend_from_slice(line);
        let written = self.write(&text);
        match (text[..written].last(), torn) {
            // Only now: whoever writes meanwhile ends the line too. An empty one is better than one of two.
            (Some(b'\n'), Some(mark)) => self.torn.clear(mark),
            (Some(b'\n'), None) | (None, _) => {}
            (Some(_), _) => self.torn.set(),
        }
        if written < text.len() {
            let untold = if written < told { missing } else { 0 };
            lost.fetch_add(untold + u64::from(!line.is_empty()), Ordering::Relaxed);
        }
    }

    fn write(&mut self, bytes: &[u8]) -> usize {
        // From the background of a terminal with `tostop` a line would bring this signal, which the master
        // heeds in its own way, and never be written; blocked, it is (termios(3)).
        let _held = self.is_terminal.then(|| SignalBlock::of(Signal::SIGTTOU));
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
            WriteMode::Write => self.file.write(bytes),
            WriteMode::Send => {
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                Ok(send(self.file.as_raw_fd(), bytes, flags)?)
            }
            WriteMode::WhenReady => {
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

fn open_file(path: &Path, flags: libc::c_int) -> io::Result<File> {
    let fifo = std::fs::metadata(path).is_ok_and(|found| found.file_type().is_fifo());
    OpenOptions::new()
        .append(true)
        // A fifo without a reader can't be opened for writing alone (fifo(7)).
        .read(fifo)
        .create(true)
        .mode(0o640)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | flags)
        .open(path)
}

/// Opens it without following a link behind the first directory that another user can write.
fn open_exposed(path: &Path, exposed: &ExposedPath) -> io::Result<File> {
    let from = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let directory = nix::fcntl::open(&exposed.directory, from, Mode::empty())?;
    let fifo = path.symlink_metadata();
    let access = match fifo.is_ok_and(|found| found.file_type().is_fifo()) {
        true => OFlag::O_RDWR,
        false => OFlag::O_WRONLY,
    };
    let flags = OFlag::O_APPEND | OFlag::O_CREAT | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let how = OpenHow::new()
        .flags(access | flags | OFlag::O_CLOEXEC)
        .mode(Mode::from_bits_truncate(0o640))
        .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
    let opened = match openat2(&directory, &exposed.rest, how) {
        // Linux before 5.6: at least not the last part of the path.
        Err(Errno::ENOSYS) => open_file(path, libc::O_NOFOLLOW),
        opened => opened.map(File::from).map_err(io::Error::from),
    };
    opened.map_err(|error| match error.raw_os_error() {
        Some(libc::ELOOP) => io::Error::other(format!(
            "it is a symbolic link, or below one, in {}, which can be written by {}: root follows none \
             there; let root alone write to that directory, or name the file itself",
            exposed.directory.display(),
            exposed.writer
        )),
        _ => error,
    })
}

impl AsFd for LogOutput {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::{PipeReader, Read};

    fn told(missing: u64) -> Vec<u8> {
        format!("{missing} lost\n").into_bytes()
    }

    /// A pipe whose writing end does not wait, with a mark of its own: tests run side by side.
    fn pipe() -> (PipeReader, LogOutput) {
        let (reader, writer) = io::pipe().unwrap();
        let raw = writer.as_raw_fd();
        let again = OpenOptions::new()
            .append(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(format!("/proc/self/fd/{raw}"))
            .unwrap();
        let mut output = LogOutput::of(again, WriteMode::Write);
        output.torn = PartialLine::by(Box::leak(Box::default()), &output.file);
        (reader, output)
    }

    fn read(reader: &mut PipeReader) -> String {
        let mut room = vec![0; 1 << 20];
        let length = reader.read(&mut room).unwrap();
        String::from_utf8(room[..length].to_vec()).unwrap()
    }

    #[test]
    fn a_torn_line_is_ended_by_whoever_writes_next_and_once() {
        let (mut reader, mut first) = pipe();
        let mut second = first.duplicate().unwrap();
        second.torn = first.torn;
        let (lost, others) = (AtomicU64::new(0), AtomicU64::new(0));
        // Longer than what a pipe takes wholly or not at all.
        let line = [b"x".repeat(9_999), b"\n".to_vec()].concat();
        while lost.load(Ordering::Relaxed) < 3 {
            first.write_line(&line, &lost, told);
        }
        let full = read(&mut reader);
        assert!(full.ends_with('x'), "nothing was torn");
        second.write_line(b"other\n", &others, told);
        first.write_line(b"after\n", &lost, told);
        assert_eq!(read(&mut reader), "\nother\n3 lost\nafter\n");
        first.write_line(b"last\n", &lost, told);
        assert_eq!(read(&mut reader), "last\n");
    }

    #[test]
    fn a_line_that_an_earlier_server_has_torn_is_ended() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let lost = AtomicU64::new(0);
        for (before, after) in [
            ("whole\nto", "whole\nto\nline\n"),
            ("whole\n", "whole\nline\n"),
            ("", "line\n"),
        ] {
            std::fs::write(&path, before).unwrap();
            let mut output = LogOutput::file(&path).unwrap();
            output.torn = PartialLine::by(Box::leak(Box::default()), &output.file);
            output.look_at_end();
            output.write_line(b"line\n", &lost, told);
            assert_eq!(std::fs::read_to_string(&path).unwrap(), after);
        }
    }

    #[test]
    fn a_full_pipe_loses_lines_and_says_how_many() {
        let (mut reader, mut output) = pipe();
        let lost = AtomicU64::new(0);
        let line = [b"x".repeat(999), b"\n".to_vec()].concat();
        for _ in 0..1000 {
            output.write_line(&line, &lost, told);
        }
        let missing = lost.load(Ordering::Relaxed);
        assert!((900..1000).contains(&missing), "{missing}");
        assert!(!read(&mut reader).is_empty());
        output.write_line(b"after\n", &lost, told);
        let text = read(&mut reader);
        assert!(
            text.ends_with(&format!("{missing} lost\nafter\n")),
            "{text}"
        );
        assert_eq!(lost.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_full_device_is_no_error() {
        let mut output = LogOutput::file(Path::new("/dev/full")).unwrap();
        let lost = AtomicU64::new(0);
        output.write_line(b"nobody will read this\n", &lost, told);
        assert_eq!(lost.load(Ordering::Relaxed), 1);
    }
}
