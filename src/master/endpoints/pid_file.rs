//! The pid file: a lock that is the truth, and a number that is a hint.
//!
//! The lock (flock(2)) lives as long as the master, whatever becomes of the file. A stale file,
//! or one that names somebody else's pid, never stops a start; a live lock always does.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::libc;

use super::owned_path::OwnedPath;
use crate::error::{Error, Result};
use crate::sys::lock::{lock, unlock};
use crate::sys::process::Pid;

/// The longest content, in bytes, that may have been a pid file's.
const LONGEST: u64 = 256;

/// A locked pid file. Dropped, it is closed, and the lock is another descriptor's where there is one:
/// a program that could not take over leaves it to the one before.
#[derive(Debug)]
pub struct PidFile {
    path: OwnedPath,
    file: File,
}

impl PidFile {
    /// Locks the file at `path`, which is made if it is not there, with its directory.
    ///
    /// # Errors
    /// `AlreadyRunning` when somebody else holds the lock; a system error for a path that can't
    /// be opened, or that is a symbolic link or no file.
    pub fn lock(path: &Path) -> Result<Self> {
        if let Some(directory) = path.parent() {
            make_directory(directory)?;
        }
        loop {
            if let Some(file) = make_whole(path) {
                return Ok(PidFile {
                    path: OwnedPath::of(path),
                    file,
                });
            }
            let file = open(path)?;
            match lock(&file) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(Error::AlreadyRunning {
                        pid_file: path.to_owned(),
                        pid: read_pid(&file),
                    });
                }
                Err(error) => return Err(refused("lock", path, error)),
            }
            // The one before us may have removed the file between our open and our lock: then we
            // hold the lock on a file that nobody else will ever find.
            let held = file
                .metadata()
                .map_err(|error| refused("stat", path, error))?;
            match fs::symlink_metadata(path) {
                Ok(found) if (found.dev(), found.ino()) == (held.dev(), held.ino()) => {
                    return Ok(PidFile {
                        path: OwnedPath::of(path),
                        file,
                    });
                }
                _ => continue,
            }
        }
    }

    /// Writes this process's pid.
    ///
    /// # Errors
    /// A full disk.
    pub fn write(&mut self) -> Result<()> {
        let text = own_pid();
        let mut write = || {
            // Written before it is cut: a reader never finds it empty.
            self.file.rewind()?;
            self.file.write_all(text.as_bytes())?;
            self.file.set_len(text.len() as u64)
        };
        write().map_err(|error| refused("write", self.path.as_ref(), error))
    }

    /// Makes the file again where somebody has removed it, locked as the first one was.
    pub fn renew(&mut self) {
        let path = AsRef::<Path>::as_ref(&self.path).to_owned();
        let name = path.display();
        let what = "the pid file was: it is left alone, and does not name this master; remove it and reload";
        if !self.path.warn_if_replaced(&name, what) {
            return;
        }
        let made = PidFile::lock(&path).and_then(|mut made| made.write().map(|()| made));
        match made {
            Ok(made) => {
                // The lock of the old one, which nobody finds any more, goes with it.
                *self = made;
                log::warn!("somebody has removed the pid file {name}: it is made again");
            }
            Err(error) => log::warn!(
                "somebody has removed the pid file {name}, and it can't be made again: {error}"
            ),
        }
    }

    /// The file and its descriptor, for the program that goes on with the lock.
    pub fn export(&self) -> (OwnedPath, RawFd) {
        (self.path.clone(), self.raw_descriptor())
    }

    /// The file whose lock came with its descriptor.
    ///
    /// # Errors
    /// When it does not hold the lock.
    pub fn import(path: OwnedPath, fd: OwnedFd) -> Result<Self> {
        let file = File::from(fd);
        // Locked once more, which changes nothing: the lock belongs to the open file.
        match lock(&file) {
            Ok(()) => Ok(PidFile { path, file }),
            Err(error) => Err(refused("keep the lock of", path.as_ref(), error)),
        }
    }

    /// Removes the file, under the lock.
    pub fn remove(self) {
        self.path.remove();
        unlock(&self.file);
    }

    /// The descriptor that a child has to close first: flock belongs to the open file, so a
    /// child that keeps it would hold the lock beyond the master's death.
    pub fn raw_descriptor(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Makes the file where there is none: it appears locked and with the pid in it, so that nobody
/// ever finds it empty. `None` when there is one, or where it can't be made in this way (a file
/// system without RENAME_NOREPLACE, rename(2)): `open` makes it then, or says why not.
fn make_whole(path: &Path) -> Option<File> {
    if fs::symlink_metadata(path).is_ok() {
        return None;
    }
    let mut name = path.file_name()?.to_owned();
    name.push(format!(".{}", Pid::current()));
    let beside = path.with_file_name(name);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(&beside)
        .ok()?;
    let publish = || {
        lock(&file)?;
        file.write_all(own_pid().as_bytes())?;
        let flags = RenameFlags::RENAME_NOREPLACE;
        renameat2(AT_FDCWD, &beside, AT_FDCWD, path, flags)?;
        io::Result::Ok(file)
    };
    let published = publish();
    if published.is_err() {
        let _ = fs::remove_file(&beside);
    }
    published.ok()
}

/// What stands in the file.
fn own_pid() -> String {
    format!("{}\n", Pid::current())
}

fn open(path: &Path) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o644)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(|error| refused("open", path, error))?;
    let is_file = file.metadata().is_ok_and(|found| found.is_file());
    // A stale pid, or garbage in its place, is no reason to stop; a whole document is.
    if file.metadata().is_ok_and(|found| found.len() > LONGEST) {
        return Err(refused(
            "take for a pid file:",
            path,
            io::Error::other("it holds something else, which would be lost"),
        ));
    }
    if !is_file {
        return Err(refused(
            "open",
            path,
            io::Error::other("it is no regular file"),
        ));
    }
    Ok(file)
}

/// Makes the directory of a pid file or socket, if it is not there.
///
/// # Errors
/// When it can't be made; when it is this user's default directory under the temporary one, which
/// anybody may have put there, and is not this user's alone.
pub fn make_directory(directory: &Path) -> Result<()> {
    if directory.as_os_str().is_empty() {
        return Ok(());
    }
    let own = nix::unistd::geteuid();
    if !directory.is_dir() {
        // Root's own run directory is for all to look into, a user's for the user alone.
        let mode = if own.is_root() { 0o755 } else { 0o700 };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(mode)
            .create(directory)
            .map_err(|error| refused("make directory", directory, error))?;
    }
    let name = directory.file_name().unwrap_or_default().as_encoded_bytes();
    let is_default = directory.parent() == Some(&std::env::temp_dir())
        && name.ends_with(format!("-{own}").as_bytes());
    if !is_default {
        return Ok(());
    }
    let safe = fs::symlink_metadata(directory).is_ok_and(|found| {
        found.is_dir() && found.uid() == own.as_raw() && found.mode() & 0o077 == 0
    });
    if safe {
        return Ok(());
    }
    Err(Error::Permission(format!(
        "{} is not a directory of this user's alone, so others could take over what is put there; \
         remove it, or name other places in pid-file and control-socket",
        directory.display()
    )))
}

fn read_pid(file: &File) -> Option<i32> {
    let mut text = Vec::new();
    file.take(32).read_to_end(&mut text).ok()?;
    pid_in(&text)
}

/// The pid that a pid file's content names; `None` for any other content. A hint, whoever wrote it.
pub fn pid_in(content: &[u8]) -> Option<i32> {
    let text = std::str::from_utf8(content).ok()?;
    text.trim().parse().ok().filter(|pid| *pid > 0)
}

fn refused(what: &str, path: &Path, error: io::Error) -> Error {
    let remedy = match error.raw_os_error() {
        Some(libc::ELOOP) => {
            "it is a symbolic link, which is not followed: remove it, or name another pid-file"
        }
        Some(libc::EISDIR) => "it is a directory: name a file in pid-file",
        Some(libc::EACCES | libc::EROFS) => "name a place this user may write to in pid-file",
        Some(libc::ENOSPC | libc::EDQUOT) => "make room there, or name another pid-file",
        _ => "name another pid-file",
    };
    Error::system_with(format!("{what} {}", path.display()), error, remedy)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> std::path::PathBuf {
        let directory =
            std::env::temp_dir().join(format!("preforkd-test-{}-{name}", Pid::current()));
        fs::create_dir_all(&directory).unwrap();
        directory
    }

    #[test]
    fn a_stale_file_does_not_stop_a_start_and_a_held_lock_does() {
        let directory = scratch("pid");
        let path = directory.join("test.pid");
        fs::write(&path, "1\ngarbage that is longer than a pid").unwrap();
        let mut first = PidFile::lock(&path).unwrap();
        first.write().unwrap();
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            format!("{}\n", Pid::current())
        );
        let second = PidFile::lock(&path).unwrap_err();
        assert_eq!(second.exit_code(), 71);
        assert!(
            second.to_string().contains(&Pid::current().to_string()),
            "{second}"
        );
        first.remove();
        assert!(!path.exists());
        PidFile::lock(&path).unwrap().remove();
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn a_take_over_that_fails_leaves_the_lock_to_whoever_had_it() {
        let directory = scratch("handed-on");
        let path = directory.join("test.pid");
        let before = PidFile::lock(&path).unwrap();
        let (own_path, _) = before.export();
        let duplicate = before.file.try_clone().unwrap().into();
        let after = PidFile::import(own_path, duplicate).unwrap();
        drop(after);
        PidFile::lock(&path).unwrap_err();
        before.remove();
        PidFile::lock(&path).unwrap().remove();
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn a_content_names_a_pid_or_none() {
        for (content, pid) in [
            (&b"4711\n"[..], Some(4711)),
            (b" \n7 ", Some(7)),
            (b"", None),
            (b"0\n", None),
            (b"-1\n", None),
            (b"1 2", None),
            (b"\xff1", None),
            (b"99999999999", None),
        ] {
            assert_eq!(pid_in(content), pid, "{}", content.escape_ascii());
        }
    }

    #[test]
    fn links_and_directories_are_refused_with_a_remedy() {
        let directory = scratch("link");
        let link = directory.join("link");
        std::os::unix::fs::symlink("target", &link).unwrap();
        let error = PidFile::lock(&link).unwrap_err().to_string();
        assert!(error.contains("symbolic link"), "{error}");
        assert!(!directory.join("target").exists());
        let error = PidFile::lock(&directory).unwrap_err().to_string();
        assert!(error.contains("directory"), "{error}");
        fs::remove_dir_all(directory).unwrap();
    }
}
