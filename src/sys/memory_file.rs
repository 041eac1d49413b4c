//! Creates and reads memory files, which carry bytes to another process or through an exec.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Puts bytes into a memory file, to send what does not fit into a packet (memfd_create(2)).
///
/// # Errors
/// If no descriptor or no memory is left.
pub fn create(bytes: &[u8]) -> io::Result<OwnedFd> {
    let fd = memfd_create(c"preforkd-handoff", MFdFlags::MFD_CLOEXEC)?;
    let mut file = File::from(fd);
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file.into())
}

/// Reads the bytes that `create` has put into a memory file. The sender is not trusted, because a client
/// may control that worker. So at most `most` bytes are read, and only from a memory file: the read of
/// any other file can block (F_GET_SEALS, fcntl(2)).
///
/// # Errors
/// If it is longer than `most`, is no memory file, or cannot be read.
pub fn read(fd: OwnedFd, most: u64) -> io::Result<Vec<u8>> {
    fcntl(&fd, FcntlArg::F_GET_SEALS)?;
    let mut bytes = Vec::new();
    let mut file = File::from(fd);
    file.rewind()?;
    (&file).take(most + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > most {
        true => Err(io::ErrorKind::FileTooLarge.into()),
        false => Ok(bytes),
    }
}

/// Replaces the content of a file that `create` has made.
///
/// # Errors
/// If there is no descriptor or no memory left.
pub fn replace(fd: &OwnedFd, bytes: &[u8]) -> io::Result<()> {
    let file = File::from(fd.try_clone()?);
    file.set_len(0)?;
    file.write_all_at(bytes, 0)
}

/// Returns whether it is a file in memory. Reading and closing one never block (F_GET_SEALS, fcntl(2)).
pub fn is_one(fd: &impl AsFd) -> bool {
    fcntl(fd.as_fd(), FcntlArg::F_GET_SEALS).is_ok()
}
