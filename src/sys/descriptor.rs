//! Descriptors that a process must not keep: closed by number, in one sweep; and what waits in one.
//!
//! The sweep is used once, by a new worker, which keeps a short list and drops whatever else the master
//! had open (its pid-file lock, the control socket, the other workers' links). Never fails: where
//! close_range(2) is missing (Linux before 5.9) each number is closed in turn.

#![allow(unsafe_code)]

use std::os::fd::{OwnedFd, RawFd};

use nix::libc;

use super::socket::queued;

/// Closes every descriptor from 3 up that is not in `keep`.
///
/// Values that own one of the closed descriptors must not be used or dropped afterwards: the
/// caller is a forked child that never returns into the code they belong to.
pub fn close_all_but(keep: &[RawFd]) {
    let mut keep: Vec<u32> = keep
        .iter()
        .filter_map(|&fd| u32::try_from(fd).ok())
        .collect();
    keep.sort_unstable();
    let mut from = 3;
    for fd in keep {
        if fd >= from {
            if fd > from {
                close_between(from, fd - 1);
            }
            from = fd + 1;
        }
    }
    close_between(from, u32::MAX);
}

/// How many bytes a pipe or socket has to be read (FIONREAD, pipe(7)); 0 where that can't be told.
pub fn unread(fd: &OwnedFd) -> usize {
    let bytes = queued(fd, libc::FIONREAD).unwrap_or_default();
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// Closes one descriptor, under the same promise.
pub fn close(fd: RawFd) {
    if let Ok(fd) = u32::try_from(fd) {
        close_between(fd, fd);
    }
}

/// Closes the descriptors `first` to `last`, both included.
fn close_between(first: u32, last: u32) {
    // SAFETY: no pointer is passed; that nobody uses these numbers again is the caller's promise.
    let done = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    if done == 0 {
        return;
    }
    let limit = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
        .map_or(1024, |(_, hard)| hard);
    let limit = u32::try_from(limit).unwrap_or(1 << 20).min(1 << 20);
    for fd in first..=last.min(limit) {
        // SAFETY: as above.
        unsafe { libc::close(fd as RawFd) };
    }
}
