//! Takes the two locks of a store: one of the instance, and one of its master.
//!
//! - The lock of the instance is a flock(2). It belongs to the open file, so all processes that inherit the
//!   descriptor share it. It is free when the last of them has ended.
//! - The lock of the master is a record lock (fcntl(2)) on the first byte. It belongs to the process: children
//!   do not inherit it, and it survives an exec. So another process can see whether the master lives, and
//!   which one it is.
//!
//! Closing any descriptor of the file ends the record lock. So the master opens the file once. The file is
//! never removed, because a process could then lock a file that no other process finds.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use super::lock::lock_file;
use super::process::Pid;

/// The lock of an instance, held by this process and all that inherited its descriptor.
#[derive(Debug)]
pub struct InstanceLock {
    file: File,
}

/// Why a lock was not taken.
#[derive(Debug)]
pub enum LockRefusal {
    /// This master of another instance uses the store.
    Held(Pid),
    /// The file cannot be opened or locked.
    System(io::Error),
}

impl fmt::Display for LockRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LockRefusal::Held(pid) => write!(f, "the server with pid {pid} uses it"),
            LockRefusal::System(error) => write!(f, "its lock cannot be taken: {error}"),
        }
    }
}

impl From<io::Error> for LockRefusal {
    fn from(error: io::Error) -> Self {
        LockRefusal::System(error)
    }
}

impl InstanceLock {
    /// Returns the path of the lock file of a store.
    pub fn path_for(store: &Path) -> PathBuf {
        let mut path = store.as_os_str().to_owned();
        path.push(".lock");
        PathBuf::from(path)
    }

    /// Opens the lock file with mode 0600, and marks this process as the master of the instance. Then takes the lock,
    /// unless processes of a killed master hold it. Returns whether it was taken: if not, call [`Self::try_lock`]
    /// later. The descriptor has close-on-exec.
    ///
    /// # Errors
    /// Another master lives, or the file cannot be opened.
    pub fn open(path: &Path) -> Result<(Self, bool), LockRefusal> {
        let lock = InstanceLock { file: open(path)? };
        if let Err(error) = lock.mark_master() {
            return Err(match master_of(&lock.file)? {
                Some(pid) => LockRefusal::Held(pid),
                None => error.into(),
            });
        }
        let is_taken = lock.try_lock()?;
        Ok((lock, is_taken))
    }

    /// Takes the lock for all processes that have inherited the descriptor, if no other instance holds it. Returns
    /// whether this instance holds it now.
    ///
    /// # Errors
    /// The error of flock(2).
    pub fn try_lock(&self) -> io::Result<bool> {
        match lock_file(&self.file) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Gives the lock file to a user, so that a server that is started by this user can open it.
    ///
    /// # Errors
    /// EPERM, or the file may be another one: the directory can belong to that user, who could have put a hard link to
    /// a file of root there.
    pub fn give_to(&self, uid: u32, gid: u32) -> io::Result<()> {
        let found = self.file.metadata()?;
        if (found.uid(), found.gid()) == (uid, gid) {
            return Ok(());
        }
        // A lock file has no content.
        let is_lock = found.is_file() && found.nlink() == 1 && found.len() == 0;
        if !is_lock || ![uid, 0].contains(&found.uid()) {
            let text = "it is no lock file of this program: it has content, several names or another owner";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        std::os::unix::fs::fchown(&self.file, Some(uid), Some(gid))
    }

    /// Takes the record lock of the master. Does nothing if this process has it. An exec keeps the lock. Closing any
    /// descriptor of the file ends it.
    ///
    /// # Errors
    /// Another process has the mark, or the kernel has no memory for it.
    pub fn mark_master(&self) -> io::Result<()> {
        let mark = record(libc::F_WRLCK);
        fcntl(&self.file, FcntlArg::F_SETLK(&mark))?;
        Ok(())
    }

    /// Takes over a descriptor that was passed through an exec.
    pub fn import(descriptor: OwnedFd) -> Self {
        InstanceLock {
            file: File::from(descriptor),
        }
    }

    /// Returns the descriptor, for an exec and for the lists of what a child keeps or closes.
    pub fn raw_descriptor(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Returns the living master of the store whose lock file has this path. Takes no lock, so it never disturbs a
/// start.
///
/// # Errors
/// The file exists, and cannot be opened.
pub fn master(path: &Path) -> io::Result<Option<Pid>> {
    match File::open(path) {
        Ok(file) => master_of(&file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
}

/// Returns the process that has the mark of a master.
fn master_of(file: &File) -> io::Result<Option<Pid>> {
    // A lock for reading conflicts with the master's too, and needs no right to write.
    let mut mark = record(libc::F_RDLCK);
    fcntl(file, FcntlArg::F_GETLK(&mut mark))?;
    let is_free = i32::from(mark.l_type) == libc::F_UNLCK;
    Ok((!is_free).then_some(Pid(mark.l_pid)))
}

/// Returns the record lock of the first byte.
fn record(kind: i32) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 1,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::process::{Child, Command, Stdio};

    /// Holds both locks as another server does. With "orphan" a child inherits the descriptor, and the master
    /// ends.
    const SERVER: &str = "
import fcntl, os, sys
file = open(sys.argv[1], 'w')
fcntl.flock(file, fcntl.LOCK_EX)
fcntl.lockf(file, fcntl.LOCK_EX, 1)
if sys.argv[2] == 'orphan':
    master, pid = os.getpid(), os.fork()
    if pid:
        os._exit(0)
    while os.getppid() == master:
        pass
print('locked', flush=True)
sys.stdin.read()
";

    fn server(path: &Path, kind: &str) -> Child {
        let mut child = Command::new("python3")
            .args(["-c", SERVER])
            .arg(path)
            .arg(kind)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        assert_eq!(line, "locked\n");
        child
    }

    #[test]
    fn one_instance_has_the_lock_and_its_children_share_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = InstanceLock::path_for(&directory.path().join("jobs.db"));
        assert!(path.ends_with("jobs.db.lock"));
        assert_eq!(master(&path).unwrap(), None);
        let (lock, is_taken) = InstanceLock::open(&path).unwrap();
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!((is_taken, mode & 0o777), (true, 0o600));
        // Another open file of this process stands for another instance.
        let other = || InstanceLock::open(&path).unwrap();
        assert!(!other().1);
        let inherited = lock.file.try_clone().unwrap();
        drop(lock);
        let (waiting, is_taken) = other();
        assert!(!is_taken && !waiting.try_lock().unwrap());
        let again = InstanceLock::import(inherited.into());
        assert!(again.raw_descriptor() >= 0 && again.try_lock().unwrap());
        drop(again);
        assert!(waiting.try_lock().unwrap());
    }

    #[test]
    fn a_living_master_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let mut child = server(&path, "master");
        let pid = Pid(child.id() as i32);
        let refusal = InstanceLock::open(&path).unwrap_err();
        assert!(matches!(refusal, LockRefusal::Held(of) if of == pid));
        assert_eq!(
            refusal.to_string(),
            format!("the server with pid {pid} uses it")
        );
        assert_eq!(master(&path).unwrap(), Some(pid));
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(InstanceLock::open(&path).unwrap().1);
    }

    #[test]
    fn children_of_a_dead_master_hold_the_lock_without_its_mark() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let mut child = server(&path, "orphan");
        let orphan = child.stdin.take();
        assert!(child.wait().unwrap().success());
        assert_eq!(master(&path).unwrap(), None);
        let (lock, is_taken) = InstanceLock::open(&path).unwrap();
        assert!(!is_taken && !lock.try_lock().unwrap());
        drop(orphan);
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !lock.try_lock().unwrap() {
            assert!(std::time::Instant::now() < end, "the orphan did not end");
            std::thread::yield_now();
        }
    }

    #[test]
    fn only_an_empty_file_with_one_name_is_given_to_another_user() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let (lock, _) = InstanceLock::open(&path).unwrap();
        let owner = path.metadata().unwrap();
        let refused = || {
            let error = lock.give_to(owner.uid() + 1, owner.gid()).unwrap_err();
            error.to_string().starts_with("it is no lock file")
        };
        let other = directory.path().join("other");
        std::fs::hard_link(&path, &other).unwrap();
        assert!(refused());
        assert!(lock.give_to(owner.uid(), owner.gid()).is_ok(), "it has it");
        std::fs::remove_file(&other).unwrap();
        std::fs::write(&path, "x").unwrap();
        assert!(refused());
        assert_eq!(path.metadata().unwrap().uid(), owner.uid());
    }

    #[test]
    fn a_symlink_is_no_lock_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        symlink(directory.path().join("other"), &path).unwrap();
        let refusal = InstanceLock::open(&path).unwrap_err();
        assert!(matches!(refusal, LockRefusal::System(_)), "{refusal:?}");
        assert!(
            refusal
                .to_string()
                .starts_with("its lock cannot be taken: "),
            "{refusal}"
        );
    }
}
