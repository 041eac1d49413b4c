//! A program that a test has for itself, and replaces as a package manager does: by a file beside it
//! and a rename.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Builder, Daemon, Dir, PATIENCE, binary, process, wait_for};

/// A program at a path of its own, which can be replaced.
pub struct Installed {
    pub dir: Dir,
}

impl Installed {
    /// A daemon that runs it.
    pub fn daemon(&self, config: &str) -> Builder {
        Daemon::builder().program(self.path()).config(config)
    }

    /// The binary under test.
    pub fn new() -> Self {
        let installed = Installed { dir: Dir::new() };
        installed.renew();
        installed
    }

    /// Where it stands.
    pub fn path(&self) -> PathBuf {
        self.dir.join("preforkd")
    }

    /// Puts a fresh copy of the binary under test there.
    pub fn renew(&self) {
        self.put(&binary());
    }

    /// Puts a copy of a program there.
    pub fn put(&self, program: &Path) {
        let new = self.dir.join("new");
        // By a process of its own: what this one has open for writing is open for a moment in each
        // process that another test starts, and a file that is written to can't be executed.
        let copied = Command::new("cp").arg(program).arg(&new).status().unwrap();
        assert!(copied.success(), "{copied}");
        fs::rename(new, self.path()).unwrap();
    }

    /// Puts bytes there, and makes them executable or not.
    pub fn write(&self, bytes: &[u8], mode: u32) {
        let bytes = self.dir.write("bytes", bytes);
        fs::set_permissions(&bytes, fs::Permissions::from_mode(mode)).unwrap();
        self.put(&bytes);
    }

    /// Puts a script there, in which `$good` is the binary under test, `$dir` a directory of the
    /// test's, and `$1` of `when` what it is started for: probe, exec or back.
    pub fn script(&self, text: &str) {
        let script = format!(
            "#!/bin/sh\ngood={}\ndir={}\nset -- ${{PREFORKD_UPGRADE%% *}} \"$@\"\nwhen=$1\nshift\n{text}\n",
            binary().display(),
            self.dir.display()
        );
        self.write(script.as_bytes(), 0o755);
    }

    /// A file in its directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The inode of what stands there.
    pub fn inode(&self) -> u64 {
        fs::metadata(self.path()).unwrap().ino()
    }
}

/// Upgrades by the command, which must succeed.
#[track_caller]
pub fn upgrade(daemon: &Daemon) {
    let done = daemon.command(&["upgrade"]);
    assert!(done.status.success(), "{done:?}\n{}", daemon.log());
}

/// Waits until the master has so many workers, those that drain included.
#[track_caller]
pub fn wait_for_children(daemon: &Daemon, count: usize) {
    wait_for("the old workers gone", PATIENCE, || {
        process::workers(daemon.pid()).len() == count
    });
}

/// Waits until a master has these descriptors, by what they are: it closes that of who gave it the
/// last command a moment after it has answered.
#[track_caller]
pub fn wait_kinds(pid: i32, kinds: &[String]) {
    wait_for(&format!("these open: {kinds:?}"), PATIENCE, || {
        process::kinds(pid) == kinds
    });
}
