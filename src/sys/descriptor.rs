//! Lists descriptors by number, closes all except a few, and reads and sets their close-on-exec flag.
//!
//! A new worker keeps a short list and closes all other descriptors of the master (the pid-file lock, the
//! control socket, the other workers' links). It never fails. Without close_range(2) (Linux before 5.9)
//! it closes each number in turn. Without /proc it checks each number.

#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::{fs, io};

use nix::errno::Errno;
use nix::libc;

use super::socket::queued;

/// The highest number that is checked if /proc does not list the open descriptors.
const MAX_PROBED: RawFd = 1 << 16;

/// Returns the numbers of all open descriptors from 3 up (proc_pid_fd(5)).
pub fn list_open() -> BTreeSet<RawFd> {
    let is_open = |fd: &RawFd| *fd >= 3 && flags(*fd).is_some();
    let listed: Option<Vec<RawFd>> = fs::read_dir("/proc/self/fd").ok().map(|entries| {
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        names.filter_map(|name| name.parse().ok()).collect()
    });
    match listed {
        // The descriptor used for the listing is closed by now.
        Some(listed) => listed.into_iter().filter(is_open).collect(),
        None => (3..MAX_PROBED).filter(is_open).collect(),
    }
}

/// Returns whether an exec closes this descriptor (FD_CLOEXEC, fcntl(2)). If not, it may come from the
/// process that executed this program. Returns `false` if the number is not open.
pub fn is_closed_on_exec(fd: RawFd) -> bool {
    flags(fd).is_some_and(|flags| flags & libc::FD_CLOEXEC != 0)
}

/// Sets FD_CLOEXEC of this descriptor. Does nothing if the number is not open.
pub fn close_on_exec(fd: RawFd) {
    if let Some(flags) = flags(fd) {
        // SAFETY: plain numbers; the descriptor stays open and keeps its owner.
        unsafe { libc::fcntl(fd, libc::F_SETFD, flags | libc::FD_CLOEXEC) };
    }
}

/// Returns the descriptor's flags, or `None` if it is not open.
fn flags(fd: RawFd) -> Option<libc::c_int> {
    // SAFETY: plain numbers; the call only reads the flags.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    (flags >= 0).then_some(flags)
}

/// Replaces the file behind `fd` by that of `by` in one step (dup3(2)). Another thread that writes meanwhile writes to
/// the old file or to the new one. Processes that share the descriptor table see the same.
///
/// # Errors
/// EBUSY while another thread opens this number.
pub fn replace(fd: &impl AsFd, by: &impl AsFd) -> io::Result<()> {
    let (from, to) = (by.as_fd().as_raw_fd(), fd.as_fd().as_raw_fd());
    // SAFETY: plain numbers; `fd` owns its number before and after.
    let done = unsafe { libc::dup3(from, to, libc::O_CLOEXEC) };
    Errno::result(done)?;
    Ok(())
}

/// Closes every descriptor from 3 up that is not in `keep`.
///
/// # Safety
/// No value that owns a closed descriptor may be used or dropped afterwards. A forked child satisfies
/// this if it never returns to the code that owns the values.
pub unsafe fn close_all_but(keep: &[RawFd]) {
    let mut keep: Vec<u32> = keep
        .iter()
        .filter_map(|&fd| u32::try_from(fd).ok())
        .collect();
    keep.sort_unstable();
    let mut from = 3;
    for fd in keep {
        if fd >= from {
            if fd > from {
                // SAFETY: the caller promises that no owner of these numbers is left.
                unsafe { close_between(from, fd - 1) };
            }
            from = fd + 1;
        }
    }
    // SAFETY: likewise.
    unsafe { close_between(from, u32::MAX) };
}

/// Returns the number of bytes that can be read from a pipe or socket (FIONREAD, pipe(7)); 0 if it is
/// unknown.
pub fn readable_bytes(fd: &OwnedFd) -> usize {
    let bytes = queued(fd, libc::FIONREAD).unwrap_or_default();
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// Closes one descriptor.
///
/// # Safety
/// As for [`close_all_but`].
pub unsafe fn close(fd: RawFd) {
    if let Ok(fd) = u32::try_from(fd) {
        // SAFETY: the caller promises that no owner of this number is left.
        unsafe { close_between(fd, fd) };
    }
}

/// Closes the descriptors `first` to `last`, both included.
///
/// # Safety
/// As for [`close_all_but`].
unsafe fn close_between(first: u32, last: u32) {
    // SAFETY: no pointer is passed. The caller promises that these numbers are not used again.
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::sys::memory_file;

    #[test]
    fn open_descriptors_are_listed_and_close_on_exec_is_read() {
        let file = memory_file::create(b"").unwrap();
        let number = file.as_raw_fd();
        assert!(list_open().contains(&number));
        assert!(is_closed_on_exec(number));
        // SAFETY: plain numbers.
        unsafe { libc::fcntl(number, libc::F_SETFD, 0) };
        assert!(!is_closed_on_exec(number));
        close_on_exec(number);
        assert!(is_closed_on_exec(number));
        assert!(!list_open().iter().any(|&fd| fd < 3));
        assert!(!is_closed_on_exec(RawFd::MAX));
    }
}
