//! Finds the file of a store, and refuses places that cannot keep jobs.
//!
//! Symlinks are resolved once, so two names are one store. The directory must exist: a missing one is most
//! likely misspelled. Each refusal names the path, the reason and the remedy.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::sys::statfs::{FsType, statfs};
use nix::unistd::{AccessFlags, access};

use super::super::error::OpenError;
use super::fault::RESTORE;
use super::wal::{self, WalState};

/// The first bytes of each SQLite database.
const MAGIC: &[u8; 16] = b"SQLite format 3\0";

/// How often a write-ahead log that looks damaged is read.
const LOG_READS: usize = 10;

/// The first bytes of a rollback journal that is complete.
const JOURNAL_MAGIC: [u8; 8] = [0xd9, 0xd5, 0x05, 0xf9, 0x20, 0xa1, 0x63, 0xd7];

/// Network file systems: their locks and syncs are not reliable enough (SQLite's FAQ, question 5).
const NETWORK: [(i64, &str); 10] = [
    (0x6969, "NFS"),
    (0x517b, "SMB"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB2"),
    (0x00c3_6400, "Ceph"),
    (0x5346_414f, "AFS"),
    (0x0102_1997, "9P"),
    (0x0bd0_0bd0, "Lustre"),
    (0x0116_1970, "GFS2"),
    (0x4750_4653, "GPFS"),
];

/// File systems that are lost with the machine.
const VOLATILE: [i64; 2] = [0x0102_1994, 0x8584_58f6];

/// The path of a store, without symlinks, and what kind of place it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StorePath {
    pub path: PathBuf,
    /// Whether the file exists and is not empty.
    pub has_content: bool,
    /// Whether its file system survives a power failure.
    pub is_durable: bool,
}

/// Resolves the path of a store and looks at its directory and file. Creates nothing.
///
/// # Errors
/// The directory is missing, is no directory, or cannot be written; the file is no regular file or no SQLite
/// database, or is shorter than it says; the file system is one of a network.
pub fn locate(configured: &Path) -> Result<StorePath, OpenError> {
    let path = resolve(configured)?;
    let directory = path.parent().unwrap_or(Path::new("/"));
    if access(directory, AccessFlags::W_OK | AccessFlags::X_OK).is_err() {
        return Err(OpenError::new(
            &path,
            format!(
                "the directory {} cannot be written by this user",
                directory.display()
            ),
            "let the server's user own the directory, with mode 0700",
        ));
    }
    let kind = file_system(directory).map_err(|error| unreadable(&path, &error))?;
    if let Some((_, name)) = NETWORK.iter().find(|(magic, _)| *magic == kind) {
        return Err(OpenError::new(
            &path,
            format!(
                "it is on a network file system ({name}), whose locks and syncs are not reliable"
            ),
            "put it on a local disk",
        ));
    }
    let has_content = match fs::metadata(&path) {
        Ok(metadata) => check_file(&path, &metadata)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(unreadable(&path, &error)),
    };
    Ok(StorePath {
        path,
        has_content,
        is_durable: !VOLATILE.contains(&kind),
    })
}

/// Returns the path without symlinks. Only the file itself may be missing.
///
/// # Errors
/// As for [`locate`].
pub fn resolve(configured: &Path) -> Result<PathBuf, OpenError> {
    match fs::canonicalize(configured) {
        Ok(path) => return Ok(path),
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(unreadable(configured, &error));
        }
        Err(_) => {}
    }
    if configured.is_symlink() {
        return Err(OpenError::new(
            configured,
            "it is a symlink to a file that does not exist",
            "remove the symlink, or name its target in jobs.store",
        ));
    }
    let directory = configured.parent().unwrap_or(Path::new("/"));
    let Some(name) = configured.file_name() else {
        return Err(OpenError::new(
            configured,
            "it is not a path of a file",
            "name a file",
        ));
    };
    match fs::canonicalize(directory) {
        Ok(directory) if directory.is_dir() => Ok(directory.join(name)),
        Ok(directory) => Err(OpenError::new(
            configured,
            format!("{} is not a directory", directory.display()),
            "name a file in a directory",
        )),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(OpenError::new(
            configured,
            format!("there is no directory {}", directory.display()),
            "create it with mode 0700 for the server's user, or name another one",
        )),
        Err(error) => Err(unreadable(configured, &error)),
    }
}

/// Creates the file with mode 0600 unless it exists, and corrects the mode of an existing one. SQLite gives
/// the mode of the file to its log.
///
/// # Errors
/// The file cannot be created, or belongs to another user.
pub fn create(path: &Path) -> Result<(), OpenError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).mode(0o600);
    let file = options
        .open(path)
        .map_err(|error| unreadable(path, &error))?;
    let mode = file
        .metadata()
        .map(|data| data.permissions().mode() & 0o777);
    if mode.map_err(|error| unreadable(path, &error))? != 0o600 {
        let changed = file.set_permissions(Permissions::from_mode(0o600));
        changed.map_err(|error| unreadable(path, &error))?;
    }
    Ok(())
}

/// Refuses a store whose write-ahead log has lost commits.
///
/// # Errors
/// The log is damaged or cannot be read.
pub fn check_log(path: &Path) -> Result<(), OpenError> {
    let log = log_of(path);
    match first_damage(|| read_log(&log)) {
        Ok(None) => Ok(()),
        Ok(Some(frame)) => Err(OpenError::new(
            path,
            format!(
                "its write-ahead log {} is damaged at frame {frame}, so the changes after this frame cannot be read",
                log.display()
            ),
            "restore both files from a copy; or move the log away to continue: then all changes that are only in this \
             log are lost",
        )
        .damaged()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(unreadable(&log, &error)),
    }
}

/// Reads a log until its state is certain. Returns the number of its first damaged frame. Another process may write the
/// log meanwhile. Then a frame can look damaged, but not at the same place a second time in the same log. A log that
/// looks different each time is in use, and not damaged.
///
/// # Errors
/// That of `read`.
pub fn first_damage(
    mut read: impl FnMut() -> io::Result<([u8; wal::HEADER], WalState)>,
) -> io::Result<Option<u64>> {
    let mut before = None;
    for _ in 0..LOG_READS {
        let found = read()?;
        let WalState::Damaged { frame } = found.1 else {
            return Ok(None);
        };
        if before == Some(found) {
            return Ok(Some(frame));
        }
        before = Some(found);
    }
    Ok(None)
}

/// Reads a write-ahead log. Returns its header, which changes when the log begins again, and its state.
fn read_log(log: &Path) -> io::Result<([u8; wal::HEADER], WalState)> {
    let mut header = [0; wal::HEADER];
    let read = File::open(log)?.read_at(&mut header, 0)?;
    header[read..].fill(0);
    let mut file = io::BufReader::with_capacity(1 << 16, File::open(log)?);
    Ok((header, wal::scan(&mut file)?))
}

/// Refuses a file that is shorter than its own header says. `pages` is the size by that header.
///
/// # Errors
/// The file was cut off, or cannot be read.
pub fn check_length(path: &Path, pages: u64, page_size: u64) -> Result<(), OpenError> {
    let length = fs::metadata(path).map_err(|error| unreadable(path, &error))?;
    match length.len() < pages * page_size {
        true => Err(truncated(path, length.len(), pages * page_size)),
        false => Ok(()),
    }
}

/// Returns the device and the inode number of a file. It opens no descriptor, because closing that would release all
/// locks of this process on the file (fcntl(2)).
///
/// # Errors
/// As for stat(2).
pub fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Returns the path of the write-ahead log.
pub fn log_of(path: &Path) -> PathBuf {
    beside(path, "-wal")
}

/// Refuses to create a database beside a write-ahead log: SQLite would delete the log, whose database is missing.
pub fn refuse_lone_log(path: &Path, has_content: bool) -> Result<(), OpenError> {
    let log = log_of(path);
    // A log that has only a header holds nothing. The power may have failed while the store was created.
    let has_frames = || fs::metadata(&log).is_ok_and(|log| log.len() > wal::HEADER as u64);
    let is_alone = !has_content && has_frames();
    if !is_alone {
        return Ok(());
    }
    Err(OpenError::new(
        path,
        format!(
            "it is missing or empty, but its write-ahead log {} has jobs",
            log.display()
        ),
        "put it back; or move the write-ahead log away to begin with an empty store",
    )
    .damaged())
}

/// Returns the path of a file that SQLite keeps beside a database.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Checks an existing file without SQLite. Returns whether it has content.
fn check_file(path: &Path, metadata: &fs::Metadata) -> Result<bool, OpenError> {
    let kind = metadata.file_type();
    if !kind.is_file() {
        let what = match () {
            () if kind.is_dir() => "a directory",
            () if kind.is_socket() => "a socket",
            () => "no regular file",
        };
        return Err(OpenError::new(
            path,
            format!("it is {what}"),
            "name a file in jobs.store; preforkd creates it",
        ));
    }
    let read = || -> io::Result<Vec<u8>> {
        let mut header = Vec::new();
        File::open(path)?.take(100).read_to_end(&mut header)?;
        Ok(header)
    };
    let header = read().map_err(|error| unreadable(path, &error))?;
    if access(path, AccessFlags::R_OK | AccessFlags::W_OK).is_err() {
        let denied = io::Error::from(io::ErrorKind::PermissionDenied);
        return Err(unreadable(path, &denied));
    }
    if header.is_empty() || is_creation_cut_off(path) {
        return Ok(false);
    }
    let is_begun = MAGIC.starts_with(&header[..header.len().min(MAGIC.len())]);
    if !is_begun {
        return Err(OpenError::new(
            path,
            "it is no SQLite database",
            "name a file of its own in jobs.store; preforkd creates it",
        ));
    }
    if header.len() < 100 {
        return Err(truncated(path, header.len() as u64, 100));
    }
    Ok(true)
}

/// Returns whether the power failed while SQLite wrote the first page of a new database. Then the file may hold
/// anything. SQLite empties it by the rollback journal when it is opened for writing. The journal of a new database
/// says that it had no pages ("The Rollback Journal" in SQLite's "Database File Format").
fn is_creation_cut_off(path: &Path) -> bool {
    let mut header = [0; 20];
    let journal = File::open(beside(path, "-journal"));
    let read = journal.and_then(|mut journal| journal.read_exact(&mut header));
    read.is_ok() && header[..8] == JOURNAL_MAGIC && header[16..] == [0; 4]
}

fn truncated(path: &Path, length: u64, expected: u64) -> OpenError {
    OpenError::new(
        path,
        format!("it was cut off: it has {length} bytes of {expected}"),
        RESTORE,
    )
    .damaged()
}

fn unreadable(path: &Path, error: &io::Error) -> OpenError {
    let remedy = match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "let the server's user own the file and its directory, or name another file"
        }
        _ => "correct the path in jobs.store",
    };
    OpenError::new(path, format!("it cannot be opened ({error})"), remedy)
}

fn file_system(directory: &Path) -> io::Result<i64> {
    let FsType(kind) = statfs(directory)?.filesystem_type();
    // The type has another width on each platform.
    #[allow(clippy::unnecessary_cast)]
    Ok(kind as i64)
}
