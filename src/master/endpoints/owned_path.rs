//! A path that the master has made, and touches again only as long as it is the same file.
//!
//! Somebody may have cleaned the directory, and another master may have made its own file there:
//! that one is not ours to remove.

use std::fmt::Display;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// A file or socket by its path and its identity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnedPath {
    path: PathBuf,
    /// Device and inode; `None` when it was gone before it could be looked at.
    identity: Option<(u64, u64)>,
}

/// What has become of such a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathState {
    /// It is as it was made.
    Ours,
    /// Nothing is there, or nothing that can be looked at.
    Gone,
    /// Somebody has put something else there.
    Foreign,
}

impl OwnedPath {
    /// What stands at `path` now, which this process has just made.
    pub fn of(path: &Path) -> Self {
        OwnedPath {
            path: path.to_owned(),
            identity: identity(path),
        }
    }

    /// What stands there now. Sure of a socket that is still open, for its inode is not given to
    /// another file.
    pub fn standing(&self) -> PathState {
        match identity(&self.path) {
            None => PathState::Gone,
            found if found == self.identity => PathState::Ours,
            Some(_) => PathState::Foreign,
        }
    }

    /// Whether it is gone, and may be made again. What somebody has put in its place is left alone, with a
    /// warning that calls it `name` and says `what` it stands in for.
    pub fn warn_if_replaced(&self, name: &dyn Display, what: &str) -> bool {
        let standing = self.standing();
        if standing == PathState::Foreign {
            log::warn!("something else stands at {name}, where {what}");
        }
        standing == PathState::Gone
    }

    /// Removes it, if it is still there.
    pub fn remove(&self) {
        if self.standing() == PathState::Ours {
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

    #[test]
    fn only_the_same_file_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "ours").unwrap();
        let own = OwnedPath::of(&path);
        // made beside it first, so that it can't get the same inode
        let other = directory.path().join("other");
        fs::write(&other, "theirs").unwrap();
        fs::rename(&other, &path).unwrap();
        assert_eq!(own.standing(), PathState::Foreign);
        own.remove();
        assert_eq!(fs::read_to_string(&path).unwrap(), "theirs");
        let own = OwnedPath::of(&path);
        assert_eq!(own.standing(), PathState::Ours);
        own.remove();
        assert!(!path.exists());
        assert_eq!(own.standing(), PathState::Gone);
    }
}
