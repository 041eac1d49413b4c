//! Finds out whether a user other than root and the user of this process can change what a path names.
//!
//! A process with more rights than that user must not follow what it finds at such a path. It checks
//! owners and modes of directories. An access control list is visible in the group bits (acl(5)). What
//! cannot be read is skipped.

use std::fmt;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const WRITABLE_BY_GROUP: u32 = 0o020;
const WRITABLE_BY_ALL: u32 = 0o002;
/// In such a directory only the owner of an entry can rename or remove it.
const STICKY: u32 = 0o1000;

/// The users who can write to a file or directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum OtherWriter {
    /// The owner, by user id.
    User(u32),
    /// The members of the group with this id.
    Group(u32),
    /// All users.
    All,
}

impl fmt::Display for OtherWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OtherWriter::User(uid) => write!(f, "user {uid}, its owner"),
            OtherWriter::Group(gid) => write!(f, "group {gid}"),
            OtherWriter::All => f.write_str("all users"),
        }
    }
}

/// Returns which users can write to this file or directory, other than root and the user and group in
/// `own`.
pub fn of_metadata(found: &Metadata, own: (u32, u32)) -> Option<OtherWriter> {
    let is_other_group = found.gid() != 0 && found.gid() != own.1;
    if !is_own(found, own) {
        Some(OtherWriter::User(found.uid()))
    } else if found.mode() & WRITABLE_BY_ALL != 0 {
        Some(OtherWriter::All)
    } else if found.mode() & WRITABLE_BY_GROUP != 0 && is_other_group {
        Some(OtherWriter::Group(found.gid()))
    } else {
        None
    }
}

/// A part of a path that another user can change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExposedPath {
    /// The topmost directory in which that user can replace the next part of the path.
    pub directory: PathBuf,
    /// The path from there on.
    pub rest: PathBuf,
    pub writer: OtherWriter,
}

/// Returns the part of the absolute path `path` that another user can change, or `None`.
pub fn of_path(path: &Path, own: (u32, u32)) -> Option<ExposedPath> {
    let (parent, name) = (path.parent()?, path.file_name()?);
    // Symbolic links may lead through other directories.
    let real = parent.canonicalize().map(|real| real.join(name));
    let ways = [real.ok(), Some(path.to_owned())];
    ways.iter().flatten().find_map(|way| {
        let mut parts: Vec<&Path> = way.ancestors().collect();
        parts.reverse();
        parts.windows(2).find_map(|parts| {
            let writer = of_entry(parts[0], parts[1], parts[1] == way, own)?;
            Some(ExposedPath {
                directory: parts[0].to_owned(),
                rest: way.strip_prefix(parts[0]).ok()?.to_owned(),
                writer,
            })
        })
    })
}

/// Returns who can replace the entry at the path `entry` of `directory`. The last entry of a path may not
/// exist yet; then any user who can write to the directory can create it.
fn of_entry(directory: &Path, entry: &Path, is_last: bool, own: (u32, u32)) -> Option<OtherWriter> {
    let found = directory.metadata().ok()?;
    let writer = of_metadata(&found, own)?;
    let is_sticky = is_own(&found, own) && found.mode() & STICKY != 0;
    if is_last || !is_sticky {
        return Some(writer);
    }
    let entry = entry.symlink_metadata().ok()?;
    (!is_own(&entry, own)).then(|| OtherWriter::User(entry.uid()))
}

fn is_own(found: &Metadata, own: (u32, u32)) -> bool {
    found.uid() == 0 || found.uid() == own.0
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn owner_and_mode_of_a_directory_decide() {
        let directory = tempfile::tempdir().unwrap();
        let top = directory.path().canonicalize().unwrap();
        let found = top.metadata().unwrap();
        let own = (found.uid(), found.gid());
        let (sub, file) = (top.join("sub"), top.join("sub/file"));
        fs::create_dir(&sub).unwrap();
        set_mode(&top, 0o755);
        set_mode(&sub, 0o755);
        let exposed = |path: &Path, own| of_path(path, own).map(|it| (it.directory, it.writer));
        let by_all = Some((sub.clone(), OtherWriter::All));
        assert_eq!(exposed(&file, own), None);
        set_mode(&sub, 0o777);
        assert_eq!(exposed(&file, own), by_all);
        assert_eq!(of_path(&file, own).unwrap().rest, Path::new("file"));
        // In a sticky directory another user can create the last entry, but cannot replace existing ones.
        set_mode(&sub, 0o1777);
        assert_eq!(exposed(&file, own), by_all);
        fs::create_dir(sub.join("own")).unwrap();
        assert_eq!(exposed(&sub.join("own/file"), own), None);
        assert_eq!(exposed(&sub.join("missing/file"), own), None);
        // The path through a symbolic link is exposed as well.
        symlink(&sub, top.join("link")).unwrap();
        let linked = of_path(&top.join("link/file"), own).unwrap();
        assert_eq!(linked.writer, OtherWriter::All);
        set_mode(&sub, 0o775);
        assert_eq!(exposed(&file, own), None, "its own group");
        let group = (own.1 != 0).then_some((sub.clone(), OtherWriter::Group(own.1)));
        assert_eq!(exposed(&file, (own.0, own.1 + 1)), group);
        set_mode(&sub, 0o755);
        if own.0 != 0 {
            let by_owner = Some((top.clone(), OtherWriter::User(own.0)));
            assert_eq!(exposed(&file, (own.0 + 1, own.1)), by_owner);
        }
    }
}
