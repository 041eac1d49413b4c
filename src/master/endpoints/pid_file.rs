//! Locks and writes the pid file. The lock decides; the number in the file is only a hint.
//!
//! The lock (flock(2)) lives as long as the master, even if the file is removed. A file without a lock
//! never prevents a start, whatever it contains. A lock always does.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::libc;

use super::owned_path::OwnedPath;
use crate::error::{Error, Result};
use crate::sys::lock::{lock_file, unlock_file};
use crate::sys::process::Pid;

/// The largest number of bytes that a pid file can have.
const LONGEST: u64 = 256;

/// A locked pid file. Dropping it closes the descriptor. The lock stays if another descriptor has it, as
/// after a failed upgrade.
#[derive(Debug)]
pub struct PidFile {
    path: OwnedPath,
    file: File,
}

impl PidFile {
    /// Creates the file at `path` and its directory if needed, and locks it.
    ///
    /// # Errors
    /// `AlreadyRunning` if another process holds the lock; a system error if the path cannot be opened, or
    /// is a symbolic link or no file.
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
            match lock_file(&file) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(Error::AlreadyRunning {
                        pid_file: path.to_owned(),
                        pid: read_pid(&file),
                        is_configured: false,
                    });
                }
                Err(error) => return Err(refused("lock", path, error)),
            }
            // The previous owner may have removed the file between open and lock. Then this lock is on a
            // file that no other process will find.
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
    /// If the disk is full.
    pub fn write(&mut self) -> Result<()> {
        let text = own_pid();
        let mut write = || {
            // Written before it is shortened, so that a reader never finds it empty.
            self.file.rewind()?;
            self.file.write_all(text.as_bytes())?;
            self.file.set_len(text.len() as u64)
        };
        write().map_err(|error| refused("write", self.path.as_ref(), error))
    }

    /// Recreates the file if it was removed, with a lock.
    pub fn renew(&mut self) {
        let path = AsRef::<Path>::as_ref(&self.path).to_owned();
        let name = path.display();
        let what = "the pid file was: commands may not find this master; remove that file and reload to restore the pid file";
        if !self.path.warn_if_replaced(&name, what) {
            return;
        }
        let made = PidFile::lock(&path).and_then(|mut made| made.write().map(|()| made));
        match made {
            Ok(made) => {
                // This drops the lock of the old file, which no process can find.
                *self = made;
                log::warn!("the pid file {name} was removed: recreated it");
            }
            Err(error) => {
                log::warn!("the pid file {name} was removed, and recreating it failed: {error}")
            }
        }
    }

    /// Returns the file and its descriptor, for the program that continues with the lock.
    pub fn export(&self) -> (OwnedPath, RawFd) {
        (self.path.clone(), self.raw_descriptor())
    }

    /// Takes over the file and its locked descriptor.
    ///
    /// # Errors
    /// If the descriptor does not hold the lock.
    pub fn import(path: OwnedPath, fd: OwnedFd) -> Result<Self> {
        let file = File::from(fd);
        // Locking again changes nothing, because the lock belongs to the open file.
        match lock_file(&file) {
            Ok(()) => Ok(PidFile { path, file }),
            Err(error) => Err(refused("take over the lock of", path.as_ref(), error)),
        }
    }

    /// Removes the file, while it is locked.
    pub fn remove(self) {
        self.path.remove();
        unlock_file(&self.file);
    }

    /// Returns the descriptor, which a child must close first: flock(2) belongs to the open file, so the
    /// child would hold the lock after the master's death.
    pub fn raw_descriptor(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Creates the file if there is none, already locked and with its content, so that a reader never finds it
/// empty. Returns `None` if the file exists, or if this is not possible (a file system without
/// RENAME_NOREPLACE, rename(2)). Then `open` creates it, or returns the error.
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
        lock_file(&file)?;
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

/// Returns the content of the file.
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
    // An old pid or garbage does not matter, but a whole document would be lost.
    if file.metadata().is_ok_and(|found| found.len() > LONGEST) {
        return Err(refused(
            "use as the pid file",
            path,
            io::Error::other("it has other content, which would be lost"),
        ));
    }
    if !is_file {
        return Err(refused(
            "open",
            path,
            io::Error::other("it is not a regular file"),
        ));
    }
    Ok(file)
}

/// Creates the directory of a pid file or socket if needed.
///
/// # Errors
/// If it cannot be created; if it is the default directory under the temporary directory, where any user
/// could have created it, and others can write to it.
pub fn make_directory(directory: &Path) -> Result<()> {
    if directory.as_os_str().is_empty() {
        return Ok(());
    }
    let own = nix::unistd::geteuid();
    if !directory.is_dir() {
        // Root's run directory is readable for all, that of another user only for that user.
        let mode = if own.is_root() { 0o755 } else { 0o700 };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(mode)
            .create(directory)
            .map_err(|error| refused("create directory", directory, error))?;
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
        "other users can write to {}, so they could replace the pid file and the control socket; \
         remove that directory, or set pid-file and control-socket to other paths",
        directory.display()
    )))
}

fn read_pid(file: &File) -> Option<i32> {
    let mut text = Vec::new();
    file.take(32).read_to_end(&mut text).ok()?;
    pid_in(&text)
}

/// Returns the pid in the content of a pid file; `None` for any other content.
pub fn pid_in(content: &[u8]) -> Option<i32> {
    let text = std::str::from_utf8(content).ok()?;
    text.trim().parse().ok().filter(|pid| *pid > 0)
}

fn refused(what: &str, path: &Path, error: io::Error) -> Error {
    let remedy = match error.raw_os_error() {
        Some(libc::ELOOP) => {
            "it is a symbolic link, which is not followed: remove it, or set pid-file to another path"
        }
        Some(libc::EISDIR) => "it is a directory: name a file in pid-file",
        Some(libc::EACCES | libc::EROFS) => "set pid-file to a path that this user may write",
        Some(libc::ENOSPC | libc::EDQUOT) => "free disk space, or set pid-file to another path",
        _ => "set pid-file to another path",
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
