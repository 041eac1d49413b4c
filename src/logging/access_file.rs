//! Writes whole lines to the file of the access log, for several processes that append to the same one.
//!
//! Each worker has an open file description of its own, so its position says where its last write ended, also
//! after its death. A full disk or a SIGKILL can cut the last line of a write. The written part becomes
//! spaces, so the next line begins where a reader expects it, from any process. Spaces before a line change
//! neither its JSON nor its text. A FIFO takes lines whole. No write waits.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;

use super::output::{LogOutput, is_nameless, was_removed};
use crate::sys::descriptor;

/// The largest number of bytes that are written at once.
pub const BATCH_BYTES: usize = 64 * 1024;
/// The largest number of bytes of a line. Its texts are bounded, so none is longer.
pub const LINE_BYTES: usize = 4096;

/// The file of the access log, or what stands in its place.
#[derive(Debug)]
pub struct AccessFile {
    file: File,
    /// Its last line is incomplete and could not be erased: the next line begins with a line feed.
    is_cut: AtomicBool,
    /// Whether the file had a name when it was opened. If not, it has no name for another reason than a removal.
    had_name: AtomicBool,
}

impl AccessFile {
    /// Appends to the file at `path` and creates it if needed, by the rules of the log.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn open(path: &Path) -> io::Result<Self> {
        let output = LogOutput::file(path)?;
        Ok(AccessFile::received(output.as_fd().try_clone_to_owned()?))
    }

    /// Takes a descriptor that another process has sent.
    pub fn received(fd: OwnedFd) -> Self {
        let file = File::from(fd);
        AccessFile {
            is_cut: AtomicBool::new(false),
            had_name: AtomicBool::new(has_name(&file)),
            file,
        }
    }

    /// Returns a descriptor for a child. `is_own` says whether the child alone will write with it: then its
    /// position tells where its last write ended.
    ///
    /// # Errors
    /// If no descriptor is left.
    pub fn for_child(&self, is_own: bool) -> io::Result<OwnedFd> {
        // The same file even if it was renamed meanwhile. A child must be able to read what it has written.
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let opened = OpenOptions::new()
            .append(true)
            .read(is_own)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path);
        match opened {
            Ok(file) => Ok(file.into()),
            Err(_) => Ok(self.file.try_clone()?.into()),
        }
    }

    /// Writes to another file from now on, also in the processes that share this descriptor.
    ///
    /// # Errors
    /// EBUSY while another thread opens this number.
    pub fn replace(&self, by: OwnedFd) -> io::Result<()> {
        descriptor::replace(&self.file, &by)?;
        self.is_cut.store(false, Relaxed);
        self.had_name.store(has_name(&self.file), Relaxed);
        Ok(())
    }

    /// Returns whether the file was removed from this path. Then no line is written to it.
    pub fn is_removed(&self, path: &Path) -> bool {
        was_removed(&self.file, path)
    }

    /// Returns the descriptor.
    pub fn into_fd(self) -> OwnedFd {
        self.file.into()
    }

    /// Returns where the last write ended, if no other process writes with this descriptor.
    pub fn position(&self) -> u64 {
        (&self.file).stream_position().unwrap_or(0)
    }

    /// Writes lines, as many as possible without waiting. Returns the number of whole lines.
    pub fn write(&self, lines: &[u8]) -> u64 {
        if self.is_cut.load(Relaxed) && self.write_all(b"\n") == 1 {
            self.is_cut.store(false, Relaxed);
        }
        let found = self.file.metadata();
        if found.as_ref().is_ok_and(is_nameless) && self.had_name.load(Relaxed) {
            // The lines would be lost without being counted.
            return 0;
        }
        let is_regular = found.is_ok_and(|found| found.is_file());
        let mut written = 0;
        while written < lines.len() {
            let rest = &lines[written..];
            // A FIFO takes PIPE_BUF bytes whole or not at all (pipe(7)).
            let part = if is_regular { rest } else { whole_lines(rest) };
            let length = self.write_all(part);
            written += length;
            if length < part.len() {
                break;
            }
        }
        let whole = end_of_lines(&lines[..written]);
        if whole < written {
            self.erase(written - whole);
        }
        count_lines(&lines[..whole])
    }

    /// Checks which of the lines that a dead process was writing with this descriptor are in the file, and erases an
    /// unfinished line. The call of the first line has the number `call` in the process `pid`; `position` is where the
    /// descriptor stood before. Returns the number of whole lines; 0 if the file cannot tell.
    pub fn recover(&self, pid: i32, call: u64, position: u64) -> u64 {
        let end = self.position();
        if !self.is_own() || end == position {
            return 0;
        }
        let from = end.saturating_sub((BATCH_BYTES + LINE_BYTES) as u64);
        let mut text = vec![0; (end - from) as usize];
        if self.file.read_exact_at(&mut text, from).is_err() {
            return 0;
        }
        let whole = end_of_lines(&text);
        if whole < text.len() {
            self.erase(text.len() - whole);
        }
        let text = &text[..whole];
        let Some(at) = find_id(text, format!("{pid}.{call}").as_bytes()) else {
            return 0;
        };
        count_lines(&text[end_of_lines(&text[..at])..])
    }

    /// Makes spaces of the last bytes that were written.
    fn erase(&self, length: usize) {
        let is_erased = self.is_own() && self.overwrite(length).is_ok();
        self.is_cut.store(!is_erased, Relaxed);
    }

    fn overwrite(&self, length: usize) -> io::Result<()> {
        let at = self.position().saturating_sub(length as u64);
        // A descriptor that appends writes to no other place (pwrite(2)). It has no other user.
        let flags = OFlag::from_bits_retain(fcntl(&self.file, FcntlArg::F_GETFL)?);
        fcntl(&self.file, FcntlArg::F_SETFL(flags - OFlag::O_APPEND))?;
        let done = self.file.write_all_at(&vec![b' '; length], at);
        // Also if a process was killed in this place before.
        fcntl(&self.file, FcntlArg::F_SETFL(flags | OFlag::O_APPEND))?;
        done
    }

    fn write_all(&self, bytes: &[u8]) -> usize {
        let mut written = 0;
        while written < bytes.len() {
            match (&self.file).write(&bytes[written..]) {
                Ok(0) => break,
                Ok(length) => written += length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        written
    }

    fn is_regular(&self) -> bool {
        self.file.metadata().is_ok_and(|found| found.is_file())
    }

    /// Returns whether its position is that of this process alone: only such a descriptor can be read.
    fn is_own(&self) -> bool {
        let flags = fcntl(&self.file, FcntlArg::F_GETFL).unwrap_or(0);
        flags & libc::O_ACCMODE == libc::O_RDWR && self.is_regular()
    }
}

impl AsRawFd for AccessFile {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Returns whether a file has a name, or is no regular file.
fn has_name(file: &File) -> bool {
    !file.metadata().as_ref().is_ok_and(is_nameless)
}

/// Returns the first lines, as many as PIPE_BUF bytes have; one at least.
fn whole_lines(lines: &[u8]) -> &[u8] {
    let fits = &lines[..lines.len().min(libc::PIPE_BUF)];
    match end_of_lines(fits) {
        0 => &lines[..memchr::memchr(b'\n', lines).map_or(lines.len(), |at| at + 1)],
        end => &lines[..end],
    }
}

/// Returns the number of bytes up to the last line feed.
fn end_of_lines(text: &[u8]) -> usize {
    memchr::memrchr(b'\n', text).map_or(0, |at| at + 1)
}

fn count_lines(text: &[u8]) -> u64 {
    memchr::memchr_iter(b'\n', text).count() as u64
}

/// Finds the id of a call as lines have it: between quotes in JSON, between spaces in text.
fn find_id(text: &[u8], id: &[u8]) -> Option<usize> {
    let is_end = |at: usize| matches!(text.get(at), Some(b'"' | b' '));
    memchr::memmem::find_iter(text, id)
        .find(|&at| at > 0 && is_end(at - 1) && is_end(at + id.len()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::Read;

    fn line(call: u64, length: usize) -> Vec<u8> {
        let text = format!("{{\"call\":\"12.{call}\",\"x\":\"");
        let fill = "x".repeat(length - text.len() - 3);
        format!("{text}{fill}\"}}\n").into_bytes()
    }

    fn own(path: &Path) -> AccessFile {
        let file = AccessFile::open(path).unwrap();
        AccessFile::received(file.for_child(true).unwrap())
    }

    fn is_json(text: &str) -> bool {
        let mut lines = text.lines();
        lines.all(|line| serde_json::from_str::<serde_json::Value>(line).is_ok())
    }

    #[test]
    fn a_part_of_a_line_becomes_spaces_and_the_whole_ones_are_found() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let lines: Vec<u8> = (5..8).flat_map(|call| line(call, 100)).collect();
        for length in [0, 1, 30, 99, 100, 101, 250, 299, 300] {
            let (file, other) = (own(&path), own(&path));
            file.write(&line(4, 60));
            other.write(&line(9, 50));
            let position = file.position();
            // What a process does that is killed in its write.
            (&file.file).write_all(&lines[..length]).unwrap();
            assert_eq!(
                file.recover(12, 5, position),
                length as u64 / 100,
                "{length}"
            );
            assert_eq!(other.write(&line(1, 70)), 1);
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(is_json(&text), "{length}: {text}");
            assert_eq!(text.lines().count(), 3 + length / 100, "{length}: {text}");
            std::fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn the_id_of_a_call_is_no_part_of_another_one() {
        for (text, found) in [
            ("{\"call\":\"12.5\"}", Some(9)),
            ("12:00 12.5 ping", Some(6)),
            ("{\"call\":\"12.51\"}", None),
            ("{\"call\":\"112.5\"}", None),
            ("12.5", None),
        ] {
            assert_eq!(find_id(text.as_bytes(), b"12.5"), found, "{text}");
        }
    }

    #[test]
    fn a_fifo_takes_lines_whole_and_a_full_device_none() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let file = own(&path);
        let lines: Vec<u8> = (0..1000).flat_map(|call| line(call, 333)).collect();
        let written = file.write(&lines);
        assert!((100..1000).contains(&written), "{written}");
        let mut text = vec![0; 1 << 20];
        let mut reader = OpenOptions::new().read(true).open(&path).unwrap();
        let length = reader.read(&mut text).unwrap();
        assert_eq!(text[..length], lines[..written as usize * 333]);
        assert_eq!(own(Path::new("/dev/full")).write(&lines), 0);
    }

    #[test]
    fn a_removed_file_gets_no_lines() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let file = own(&path);
        let is_removed = || file.is_removed(&path);
        assert_eq!((file.write(&line(1, 50)), is_removed()), (1, false));
        std::fs::remove_file(&path).unwrap();
        assert_eq!((file.write(&line(2, 50)), is_removed()), (0, true));
        let null = Path::new("/dev/null");
        assert!(!own(null).is_removed(null));
        // A file that never had a name is written.
        let nameless = format!("/proc/self/fd/{}", file.as_raw_fd());
        let other = own(Path::new(&nameless));
        assert_eq!(other.write(&line(3, 50)), 1);
        assert!(!other.is_removed(Path::new(&nameless)));
    }

    #[test]
    fn a_replaced_file_gets_the_next_lines() {
        let directory = tempfile::tempdir().unwrap();
        let [old, new] = ["old", "new"].map(|name| directory.path().join(name));
        let file = own(&old);
        file.write(&line(1, 50));
        let next = AccessFile::open(&new).unwrap();
        file.replace(next.for_child(true).unwrap()).unwrap();
        file.write(&line(2, 50));
        assert_eq!(std::fs::read(&old).unwrap(), line(1, 50));
        assert_eq!(std::fs::read(&new).unwrap(), line(2, 50));
    }
}
