//! Tracks a file that the master has created, and uses its path only while it leads to that file.
//!
//! The directory may have been cleaned, and another master may have created a file of the same name. That file must
//! not be removed.

use std::fmt::Display;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::libc;
use serde::{Deserialize, Serialize};

/// A file or socket, by its path and identity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnedPath {
    path: PathBuf,
    /// Device and inode; `None` if it was gone before it was read.
    identity: Option<(u64, u64)>,
}

/// What is at the path now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathState {
    /// It is the file that was created.
    Ours,
    /// There is no file, or it cannot be read.
    Gone,
    /// There is another file.
    Foreign,
}

impl OwnedPath {
    /// Records the file at `path`, which this process has just created.
    pub fn of(path: &Path) -> Self {
        OwnedPath {
            path: path.to_owned(),
            identity: identity(path),
        }
    }

    /// Returns what is at the path now. This is reliable while the file or socket is open, because no other file gets
    /// its inode.
    pub fn state(&self) -> PathState {
        match identity(&self.path) {
            None => PathState::Gone,
            found if found == self.identity => PathState::Ours,
            Some(_) => PathState::Foreign,
        }
    }

    /// Returns whether the file is gone and may be recreated. If there is another file, logs a warning with `name`, and
    /// then `what`: which file was there, and what follows.
    pub fn warn_if_replaced(&self, name: &dyn Display, what: &str) -> bool {
        let state = self.state();
        if state == PathState::Foreign {
            log::warn!("there is another file at {name}, where {what}");
        }
        state == PathState::Gone
    }

    /// Opens this socket's path (O_PATH, open(2)) to change its owner and mode. A descriptor cannot be
    /// redirected, but a path can: a user who owns the directory can put a link to any file there.
    ///
    /// # Errors
    /// If there is another file, or none.
    pub fn open_socket(&self) -> io::Result<File> {
        let mut options = File::options();
        let flags = libc::O_PATH | libc::O_NOFOLLOW;
        let file = options.read(true).custom_flags(flags).open(&self.path)?;
        let found = file.metadata()?;
        let is_same = self.identity == Some((found.dev(), found.ino()));
        // With a second name it may be a socket of another directory.
        if !is_same || !found.file_type().is_socket() || found.nlink() != 1 {
            let text = "there is another file, which is left alone";
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
        }
        Ok(file)
    }

    /// Removes the file, if it is the one that was created.
    pub fn remove(&self) {
        if self.state() == PathState::Ours {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl AsRef<Path> for OwnedPath {
    fn as_ref(&self) -> &Path {
        &self.path
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let found = fs::symlink_metadata(path).ok()?;
    Some((found.dev(), found.ino()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_link_in_place_of_a_socket_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let socket = UnixListener::bind(&path).unwrap();
        let own = OwnedPath::of(&path);
        own.open_socket().unwrap();
        // A second name of it.
        let name = directory.path().join("name");
        fs::hard_link(&path, &name).unwrap();
        own.open_socket().unwrap_err();
        // A link to it, and one to a file.
        for target in [&name, &directory.path().join("secret")] {
            fs::write(directory.path().join("secret"), "").unwrap();
            fs::remove_file(&path).unwrap();
            std::os::unix::fs::symlink(target, &path).unwrap();
            own.open_socket().unwrap_err();
        }
        drop(socket);
    }

    #[test]
    fn only_the_same_file_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "ours").unwrap();
        let own = OwnedPath::of(&path);
        // Create the other file first, while ours exists, so that it cannot get the same inode.
        let other = directory.path().join("other");
        fs::write(&other, "theirs").unwrap();
        fs::rename(&other, &path).unwrap();
        assert_eq!(own.state(), PathState::Foreign);
        own.remove();
        assert_eq!(fs::read_to_string(&path).unwrap(), "theirs");
        let own = OwnedPath::of(&path);
        assert_eq!(own.state(), PathState::Ours);
        own.remove();
        assert!(!path.exists());
        assert_eq!(own.state(), PathState::Gone);
    }
}
