//! Reads files whose length another process chooses: up to a limit, and never further.
//!
//! The owner of a process can make its environment as long as it likes without using memory
//! (PR_SET_MM_MAP, PR_SET_MM(2const)), and its name may hold any bytes. The read of an environment can also
//! block for as long as that owner likes: it takes the lock of the process's memory, which a thread of that
//! process may hold. So who must not wait leaves it to a thread or a child. SIGKILL ends such a
//! read. Fails with the system's error.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// Bytes of a file of /proc that the kernel fills by itself, such as `stat` and `status`.
pub const RECORD: usize = 64 * 1024;
/// Bytes of the environment that a process was started with.
pub const ENVIRONMENT: usize = 128 * 1024;
/// Bytes of a list of pids.
pub const PIDS: usize = 1024 * 1024;

/// Reads a file that consists of pieces, each followed by `end`: at most `most` bytes. A piece that
/// the limit cuts is left out, so that half of it is not taken for the whole.
///
/// # Errors
/// What open(2) and read(2) answer.
pub fn read_pieces(path: impl AsRef<Path>, end: u8, most: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut file = File::open(path)?.take(most as u64);
    file.read_to_end(&mut bytes)?;
    if bytes.len() == most {
        let last = bytes.iter().rposition(|&byte| byte == end);
        bytes.truncate(last.map_or(0, |at| at + 1));
    }
    Ok(bytes)
}

/// Reads lines of text, [`RECORD`] bytes at most. What is no UTF-8 is replaced: a process must not
/// become invisible by its name.
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
    fn no_more_is_read_than_the_limit_and_no_piece_is_cut() {
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
    fn a_file_without_end_is_read_up_to_the_limit() {
        assert_eq!(read_pieces("/dev/zero", 0, 4096).unwrap().len(), 4096);
        assert_eq!(read_lines("/dev/zero").unwrap(), "");
    }

    #[test]
    fn bytes_that_are_no_text_hide_nothing() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"7 (\xff\xfe) S 1\n").unwrap();
        let text = read_lines(file.path()).unwrap();
        assert!(text.ends_with(") S 1\n"), "{text}");
    }
}
