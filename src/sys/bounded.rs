//! Reads files whose length another process chooses, up to a limit.
//!
//! The owner of a process can make its environment very long without using memory (PR_SET_MM_MAP,
//! PR_SET_MM(2const)), and the process name may contain any bytes. The read of an environment can also
//! block for as long as that owner wants. It takes the memory lock of the process, which a thread of that
//! process may hold. So code that must not block does the read in another thread or in a child. SIGKILL
//! ends a blocked read. Fails with the system's error.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// The largest number of bytes of a /proc file that the kernel fills, such as `stat` and `status`.
pub const RECORD: usize = 64 * 1024;
/// The largest number of bytes that are read of the environment of a process.
pub const ENVIRONMENT: usize = 128 * 1024;
/// The largest number of bytes of a list of pids.
pub const PIDS: usize = 1024 * 1024;

/// Reads at most `most` bytes of a file that consists of pieces, each followed by `end`. A piece that the
/// limit cuts is left out, because it could be taken for a whole one.
///
/// # Errors
/// Those of open(2) and read(2).
pub fn read_pieces(path: impl AsRef<Path>, end: u8, most: usize) -> io::Result<Vec<u8>> {
    // Room for most of these files: the read of a file in /proc is slow.
    let mut bytes = Vec::with_capacity(most.min(1024));
    let mut file = File::open(path)?.take(most as u64);
    file.read_to_end(&mut bytes)?;
    if bytes.len() == most {
        let last = bytes.iter().rposition(|&byte| byte == end);
        bytes.truncate(last.map_or(0, |at| at + 1));
    }
    Ok(bytes)
}

/// Reads lines of text, at most [`RECORD`] bytes. Bytes that are not UTF-8 are replaced, because a
/// process must not become invisible by its name.
///
/// # Errors
/// As [`read_pieces`].
pub fn read_lines(path: impl AsRef<Path>) -> io::Result<String> {
    let bytes = read_pieces(path, b'\n', RECORD)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn reads_stop_at_the_limit_without_half_a_piece() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"one\0two\0three").unwrap();
        let read = |most| read_pieces(file.path(), 0, most).unwrap();
        assert_eq!(read(100), b"one\0two\0three");
        assert_eq!(read(12), b"one\0two\0");
        assert_eq!(read(8), b"one\0two\0");
        assert_eq!(read(7), b"one\0");
        assert_eq!(read(2), b"");
    }

    #[test]
    fn an_endless_file_is_read_up_to_the_limit() {
        assert_eq!(read_pieces("/dev/zero", 0, 4096).unwrap().len(), 4096);
        assert_eq!(read_lines("/dev/zero").unwrap(), "");
    }

    #[test]
    fn invalid_utf8_hides_no_line() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"7 (\xff\xfe) S 1\n").unwrap();
        let text = read_lines(file.path()).unwrap();
        assert!(text.ends_with(") S 1\n"), "{text}");
    }
}
