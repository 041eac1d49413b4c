//! The lock of a whole file (flock(2)): it belongs to the open file, so every descriptor that was
//! duplicated or inherited from the one it was taken by holds it, and it ends when the last of them
//! is closed, or when somebody says so. std can do it from Rust 1.89 on, nix's guard ends the
//! lock for all of them when it is dropped. Fails with the system's error.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::libc;

/// Locks an open file for itself alone, without waiting. Locked already by itself, nothing changes.
///
/// # Errors
/// `WouldBlock` when another open file has it locked.
pub fn lock(file: &File) -> io::Result<()> {
    // SAFETY: no pointer is passed, and the descriptor is open for as long as the call.
    let done = unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) };
    Errno::result(done)?;
    Ok(())
}

/// Ends the lock, for all that hold it.
pub fn unlock(file: &File) {
    // SAFETY: as above.
    unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_UN) };
}
