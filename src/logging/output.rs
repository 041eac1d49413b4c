//! Writes log lines to a descriptor without ever waiting.
//!
//! A pipe or terminal is opened again, which gives it its own non-blocking mode. To set that mode on the
//! inherited descriptor would also change it for the shell and every other process that shares it. A
//! socket gets MSG_DONTWAIT with each send. A file is written directly. A line that cannot be written is
//! lost and counted.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
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

/// Lines that could not be written.
#[derive(Debug)]
pub struct LostLines {
    /// Lost lines that the log does not report yet.
    unreported: AtomicU64,
    /// Lost lines that `take_uncounted` has not returned yet.
    uncounted: AtomicU64,
}

impl LostLines {
    pub const fn new() -> Self {
        LostLines {
            unreported: AtomicU64::new(0),
            uncounted: AtomicU64::new(0),
        }
    }

    pub fn add(&self, lines: u64) {
        self.uncounted.fetch_add(lines, Ordering::Relaxed);
        self.put_back(lines);
    }

    pub fn reset(&self) {
        self.uncounted.store(0, Ordering::Relaxed);
        self.unreported.store(0, Ordering::Relaxed);
    }

    pub fn take_uncounted(&self) -> u64 {
        self.uncounted.swap(0, Ordering::Relaxed)
    }

    pub fn unreported(&self) -> u64 {
        self.unreported.load(Ordering::Relaxed)
    }

    fn take_unreported(&self) -> u64 {
        self.unreported.swap(0, Ordering::Relaxed)
    }

    fn put_back(&self, lines: u64) {
        self.unreported.fetch_add(lines, Ordering::Relaxed);
    }
}

/// How a descriptor is written to without waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WriteMode {
    /// Directly: a file, or our own open file description, which is non-blocking.
    Write,
    /// With MSG_DONTWAIT.
    Send,
    /// Only if poll(2) reports room, because other processes share the open file description.
    WhenReady,
}

/// Returns whether this is a regular file without a name.
pub(super) fn is_nameless(found: &Metadata) -> bool {
    found.is_file() && found.nlink() == 0
}

/// Returns whether this open file has no name any more, so that `path` names another file or none. A path such as
/// /dev/stdout may name a file without a name.
pub(super) fn was_removed(open: &File, path: &Path) -> bool {
    let is_same = |open: &Metadata| {
        fs::metadata(path).is_ok_and(|named| (named.dev(), named.ino()) == (open.dev(), open.ino()))
    };
    open.metadata()
        .is_ok_and(|open| is_nameless(&open) && !is_same(&open))
}

/// The destination of log lines.
#[derive(Debug)]
pub struct LogOutput {
    file: File,
    manner: WriteMode,
    is_terminal: bool,
    /// Whether the last line there is incomplete. Then the next line starts with a line feed.
    torn: PartialLine,
}

impl LogOutput {
    /// Appends to the file at `path` and creates it if needed. If root opens it in a directory that
    /// another user can write, no symbolic link is followed, because that user may have made it.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn file(path: &Path) -> io::Result<Self> {
        let own = account::effective_ids();
        let exposed = (own.0 == 0).then(|| other_writer::of_path(path, own));
        let file = match exposed.flatten() {
            None => open_file(path, 0)?,
            Some(exposed) => open_exposed(path, &exposed)?,
        };
        Ok(LogOutput::of(file, WriteMode::Write))
    }

    /// Checks whether the file ends with an incomplete line. Call it before another process writes to the
    /// file, because that process may complete the line meanwhile.
    pub fn look_at_end(&self) {
        self.torn.look(&self.file);
    }

    /// Opens standard error, of any type.
    ///
    /// # Errors
    /// If no descriptor is left.
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
            // Not permitted if the inherited terminal or pipe belongs to another user.
            _ => match again() {
                Ok(file) => LogOutput::of(file, WriteMode::Write),
                Err(_) => LogOutput::of(own, WriteMode::WhenReady),
            },
        })
    }

    /// Returns whether it is a file that was removed from this path.
    pub(super) fn is_removed(&self, path: &Path) -> bool {
        was_removed(&self.file, path)
    }

    /// Takes a log file of `LogOutput::file` that another process has sent.
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

    /// Returns the same destination with another descriptor.
    ///
    /// # Errors
    /// If no descriptor is left.
    pub fn duplicate(&self) -> io::Result<Self> {
        Ok(LogOutput::of(self.file.try_clone()?, self.manner))
    }

    /// Uses no memory that other processes share from now on.
    pub(super) fn leave_shared_memory(&mut self) {
        self.torn = PartialLine::private(&self.file);
    }

    /// Writes one whole line, or counts it as lost. When writing works again, it first writes the number
    /// of lost lines in the line that `notice` makes. An empty line only reports that number.
    pub fn write_line(
        &mut self,
        line: &[u8],
        lost: &LostLines,
        notice: impl FnOnce(u64) -> Vec<u8>,
    ) {
        let missing = lost.take_unreported();
        let mut text = Vec::new();
        let torn = self.torn.get();
        if torn.is_some() {
            text.push(b'\n');
        }
        if missing > 0 {
            text.extend_from_slice(&notice(missing));
        }
        let notice_end = text.len();
        text.extend_from_slice(line);
        let written = self.write(&text);
        match (text[..written].last(), torn) {
            // Clear the mark only now: another process that writes meanwhile also ends the line. An empty
            // line is better than two merged ones.
            (Some(b'\n'), Some(mark)) => self.torn.clear(mark),
            (Some(b'\n'), None) | (None, _) => {}
            (Some(_), _) => self.torn.set(),
        }
        if written < text.len() {
            let unreported = if written < notice_end { missing } else { 0 };
            lost.put_back(unreported);
            lost.add(u64::from(!line.is_empty()));
        }
    }

    fn write(&mut self, bytes: &[u8]) -> usize {
        // A background process of a terminal with `tostop` gets SIGTTOU when it writes. The master
        // handles that signal, so the line would never be written. With the signal blocked, it is written
        // (termios(3)).
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
                // POLLOUT means room for PIPE_BUF bytes (pipe(7)).
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
    let fifo = fs::metadata(path).is_ok_and(|found| found.file_type().is_fifo());
    OpenOptions::new()
        .append(true)
        // Without a reader, a FIFO cannot be opened write-only (fifo(7)).
        .read(fifo)
        .create(true)
        .mode(0o640)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | flags)
        .open(path)
}

/// Opens the file without following a symbolic link below the first directory that another user can
/// write.
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
        // Before Linux 5.6 at least the last component is not followed.
        Err(Errno::ENOSYS) => open_file(path, libc::O_NOFOLLOW),
        opened => opened.map(File::from).map_err(io::Error::from),
    };
    opened.map_err(|error| match error.raw_os_error() {
        Some(libc::ELOOP) => io::Error::other(format!(
            "it is a symbolic link, or below one, in {}, which {} can write: root follows no link \
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

    fn count_line(missing: u64) -> Vec<u8> {
        format!("{missing} lost\n").into_bytes()
    }

    /// Creates a pipe with a non-blocking writing end and its own mark, because tests run side by side.
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
    fn the_next_writer_ends_an_incomplete_line_once() {
        let (mut reader, mut first) = pipe();
        let mut second = first.duplicate().unwrap();
        second.torn = first.torn;
        let (lost, others) = (LostLines::new(), LostLines::new());
        // Longer than PIPE_BUF, so a pipe may take a part of it.
        let line = [b"x".repeat(9_999), b"\n".to_vec()].concat();
        while lost.unreported() < 3 {
            first.write_line(&line, &lost, count_line);
        }
        let full = read(&mut reader);
        assert!(full.ends_with('x'), "nothing was torn");
        second.write_line(b"other\n", &others, count_line);
        first.write_line(b"after\n", &lost, count_line);
        assert_eq!(read(&mut reader), "\nother\n3 lost\nafter\n");
        first.write_line(b"last\n", &lost, count_line);
        assert_eq!(read(&mut reader), "last\n");
    }

    #[test]
    fn an_incomplete_line_of_an_earlier_server_is_ended() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let lost = LostLines::new();
        for (before, after) in [
            ("whole\nto", "whole\nto\nline\n"),
            ("whole\n", "whole\nline\n"),
            ("", "line\n"),
        ] {
            fs::write(&path, before).unwrap();
            let mut output = LogOutput::file(&path).unwrap();
            output.torn = PartialLine::by(Box::leak(Box::default()), &output.file);
            output.look_at_end();
            output.write_line(b"line\n", &lost, count_line);
            assert_eq!(fs::read_to_string(&path).unwrap(), after);
        }
    }

    #[test]
    fn a_full_pipe_loses_lines_and_reports_how_many() {
        let (mut reader, mut output) = pipe();
        let lost = LostLines::new();
        let line = [b"x".repeat(999), b"\n".to_vec()].concat();
        for _ in 0..1000 {
            output.write_line(&line, &lost, count_line);
        }
        let missing = lost.unreported();
        assert!((900..1000).contains(&missing), "{missing}");
        assert!(!read(&mut reader).is_empty());
        output.write_line(b"after\n", &lost, count_line);
        let text = read(&mut reader);
        assert!(
            text.ends_with(&format!("{missing} lost\nafter\n")),
            "{text}"
        );
        assert_eq!(lost.unreported(), 0);
    }

    #[test]
    fn a_full_device_is_no_error() {
        let mut output = LogOutput::file(Path::new("/dev/full")).unwrap();
        let lost = LostLines::new();
        output.write_line(b"no reader\n", &lost, count_line);
        assert_eq!(lost.unreported(), 1);
    }
}
