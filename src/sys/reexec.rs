//! Executes another program in this process (execve(2)), which keeps only the named descriptors.
//!
//! All our descriptors are close-on-exec. The flag is cleared on the passed ones right before the exec,
//! and the new program sets it again. Callers decide which descriptors are passed and what they mean.
//! Fails with the system's error; then the old program continues.

#![allow(unsafe_code)]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::ffi::{CStr, CString, OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::ptr;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::libc;

/// Returns the file that this process runs, even if its path has changed. It is useful only for
/// [`Image::Open`] (O_PATH, open(2)).
///
/// # Errors
/// If /proc is not mounted or no descriptor is left.
pub fn own_image() -> io::Result<OwnedFd> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_CLOEXEC)
        .open("/proc/self/exe")?;
    Ok(file.into())
}

/// Removes a variable from the environment, so that no child sees it, and returns its value.
///
/// # Safety
/// The process must have one thread: removing a variable while another thread reads the environment
/// is undefined behaviour (setenv(3)).
pub unsafe fn take_variable(name: &str) -> Option<OsString> {
    let value = env::var_os(name);
    if value.is_some() {
        // SAFETY: the caller promises that there is one thread.
        unsafe { env::remove_var(name) };
    }
    value
}

/// Returns the environment of this process for exec, without the variables in `without` and with those in
/// `more`.
pub fn environment(without: &[&str], more: &[(&str, &OsStr)]) -> Vec<CString> {
    let replaced = |name: &OsStr| more.iter().any(|(other, _)| name == *other);
    let left_out = |name: &OsStr| without.iter().any(|other| name == *other);
    let own = env::vars_os().filter(|(name, _)| !replaced(name) && !left_out(name));
    let more = more
        .iter()
        .map(|(name, value)| (OsString::from(name), value.to_os_string()));
    own.chain(more)
        .filter_map(|(mut pair, value)| {
            pair.push("=");
            pair.push(value);
            // A string with a NUL cannot come from an environment.
            CString::new(pair.into_vec()).ok()
        })
        .collect()
}

/// Converts a path or an argument for exec.
///
/// # Errors
/// If it contains a NUL.
pub fn c_string(text: impl AsRef<OsStr>) -> io::Result<CString> {
    Ok(CString::new(text.as_ref().as_bytes())?)
}

/// The program to execute.
#[derive(Debug, Clone, Copy)]
pub enum Image<'a> {
    /// The program that is at a path now.
    At(&'a Path),
    /// A program that [`own_image`] has opened.
    Open(BorrowedFd<'a>),
}

/// Executes the program with the descriptors in `through` and the standard streams. Returns only on
/// failure; then nothing has changed.
pub fn exec_image(
    image: Image<'_>,
    arguments: &[CString],
    environment: &[CString],
    through: &[RawFd],
) -> io::Error {
    let let_through = || set_flags(through, FdFlag::empty());
    let error = match let_through() {
        Ok(()) => exec(image, arguments, environment),
        Err(error) => error,
    };
    let _ = set_flags(through, FdFlag::FD_CLOEXEC);
    error
}

fn exec(image: Image<'_>, arguments: &[CString], environment: &[CString]) -> io::Error {
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        let strings = strings.iter().map(|string| string.as_ptr());
        strings.chain([ptr::null()]).collect()
    };
    let (argv, envp) = (pointers(arguments), pointers(environment));
    match image {
        Image::At(path) => match c_string(path) {
            Ok(path) => {
                // SAFETY: strings and arrays terminated as execve(2) requires, alive until it returns.
                unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
            }
            Err(error) => return error,
        },
        Image::Open(fd) => {
            let empty: &CStr = c"";
            // SAFETY: likewise; with this flag the empty path means the descriptor itself.
            unsafe {
                libc::syscall(
                    libc::SYS_execveat,
                    fd.as_raw_fd(),
                    empty.as_ptr(),
                    argv.as_ptr(),
                    envp.as_ptr(),
                    libc::AT_EMPTY_PATH,
                )
            };
        }
    }
    io::Error::last_os_error()
}

fn set_flags(numbers: &[RawFd], flags: FdFlag) -> io::Result<()> {
    for &number in numbers {
        // SAFETY: only the flags are read, without taking ownership; a closed descriptor is an error.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        fcntl(fd, FcntlArg::F_SETFD(flags))?;
    }
    Ok(())
}

/// Descriptors that were passed through an exec, by number. They stay open as long as this value lives,
/// because a rollback needs all of them. `take` returns a duplicate.
#[derive(Debug, Default)]
pub struct InheritedFds {
    all: RefCell<BTreeMap<RawFd, OwnedFd>>,
    /// No rollback will follow, so `take` returns the descriptor itself.
    for_good: bool,
}

impl InheritedFds {
    /// Takes ownership of `numbers` and makes them close-on-exec.
    ///
    /// # Safety
    /// No value of this process may own one of `numbers`. So call it once, before the program opens any
    /// descriptor that could get one of these numbers.
    ///
    /// # Errors
    /// If one of them is not open, or is a standard stream.
    pub unsafe fn claim(numbers: &BTreeSet<RawFd>, for_good: bool) -> io::Result<Self> {
        let mut claimed = BTreeMap::new();
        let all: Vec<RawFd> = numbers.iter().copied().collect();
        if all.iter().any(|&number| number <= 2) {
            return Err(io::Error::from(Errno::EBADF));
        }
        // Check all of them first, because an error must not close those that are already owned.
        set_flags(&all, FdFlag::FD_CLOEXEC)?;
        for number in all {
            // SAFETY: it is open, as `set_flags` has found. The caller promises that it has no other
            // owner.
            claimed.insert(number, unsafe { OwnedFd::from_raw_fd(number) });
        }
        Ok(InheritedFds {
            all: RefCell::new(claimed),
            for_good,
        })
    }

    /// Returns one of them, or a duplicate.
    ///
    /// # Errors
    /// If it is not among them, or no descriptor is left.
    pub fn take(&self, number: RawFd) -> io::Result<OwnedFd> {
        let missing = || io::Error::from(Errno::EBADF);
        let mut all = self.all.borrow_mut();
        if self.for_good {
            return all.remove(&number).ok_or_else(missing);
        }
        all.get(&number).ok_or_else(missing)?.try_clone()
    }

    pub fn numbers(&self) -> Vec<RawFd> {
        self.all.borrow().keys().copied().collect()
    }
}

/// Reads a whole memory file from its beginning, independent of the shared file offset.
///
/// # Errors
/// If it cannot be read, or is longer than `most` bytes.
pub fn read_whole(file: BorrowedFd<'_>, most: u64) -> io::Result<Vec<u8>> {
    let file = File::from(file.try_clone_to_owned()?);
    let length = file.metadata()?.len();
    if length > most {
        return Err(io::Error::from(Errno::EFBIG));
    }
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::sys::memory_file;
    use std::os::fd::{AsFd, IntoRawFd};

    #[test]
    fn claimed_descriptors_are_duplicated_and_a_closed_number_is_an_error() {
        let file = memory_file::create(b"state").unwrap();
        assert_eq!(read_whole(file.as_fd(), 100).unwrap(), b"state");
        assert!(read_whole(file.as_fd(), 4).is_err());
        let number = file.into_raw_fd();
        set_flags(&[number], FdFlag::empty()).unwrap();
        // SAFETY: the test owns the descriptors and does not use them again, or they are not open.
        let through = unsafe { InheritedFds::claim(&BTreeSet::from([number]), false) }.unwrap();
        let one = through.take(number).unwrap();
        let flags = fcntl(one.as_fd(), FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags, FdFlag::FD_CLOEXEC.bits());
        assert!(through.take(number + 1000).is_err());
        // SAFETY: as above.
        assert!(unsafe { InheritedFds::claim(&BTreeSet::from([1]), false) }.is_err());
        // SAFETY: as above.
        assert!(unsafe { InheritedFds::claim(&BTreeSet::from([i32::MAX]), false) }.is_err());
        let through =
            // SAFETY: likewise.
            unsafe { InheritedFds::claim(&BTreeSet::from([one.into_raw_fd()]), true) }.unwrap();
        let number = through.numbers()[0];
        assert_eq!(through.take(number).unwrap().as_raw_fd(), number);
        assert!(through.take(number).is_err(), "it is gone");
    }

    #[test]
    fn an_exec_that_fails_leaves_everything_as_it_was() {
        let file = memory_file::create(b"").unwrap();
        let number = file.as_raw_fd();
        let error = exec_image(Image::At(Path::new("/nowhere")), &[], &[], &[number]);
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        let flags = fcntl(file.as_fd(), FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags, FdFlag::FD_CLOEXEC.bits());
    }
}
