//! Files of memory, which carry bytes to another process or through an exec.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Puts bytes into a file of memory, to pass them on where a packet is too small (memfd_create(2)).
///
/// # Errors
/// When there is no descriptor or no memory left.
pub fn create(bytes: &[u8]) -> io::Result<OwnedFd> {
    let fd = memfd_create(c"preforkd-handoff", MFdFlags::MFD_CLOEXEC)?;
    let mut file = File::from(fd);
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file.into())
}

/// Takes back what `create` has put into one. The sender is not trusted, for it may be a worker
/// that a client has taken over: at most `most` bytes are read, and only from a file of memory, because the
/// read of any other file can block (F_GET_SEALS, fcntl(2)).
///
/// # Errors
/// When it is longer or no such file, or can't be read.
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

/// Whether it is a file of memory, whose reading and closing wait for nobody (F_GET_SEALS, fcntl(2)).
pub fn is_one(fd: &impl AsFd) -> bool {
    fcntl(fd.as_fd(), FcntlArg::F_GET_SEALS).is_ok()
}
