//! Installs a program for one test, and replaces it as a package manager does: with a new file and a
//! rename.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Builder, Daemon, Dir, PATIENCE, binary, process, wait_for};

/// An installed program that can be replaced.
pub struct Installed {
    pub dir: Dir,
}

impl Installed {
    /// Returns a daemon that runs it.
    pub fn daemon(&self, config: &str) -> Builder {
        Daemon::builder().program(self.path()).config(config)
    }

    /// Installs the binary under test.
    pub fn new() -> Self {
        let installed = Installed { dir: Dir::new() };
        installed.renew();
        installed
    }

    /// Returns its path.
    pub fn path(&self) -> PathBuf {
        self.dir.join("preforkd")
    }

    /// Replaces it by a new copy of the binary under test.
    pub fn renew(&self) {
        self.put(&binary());
    }

    /// Replaces it by a copy of a program.
    pub fn put(&self, program: &Path) {
        let new = self.dir.join("new");
        // Copy the file in another process. Otherwise a process that another test starts would inherit the file open
        // for writing for a short time, and such a file cannot be executed (ETXTBSY).
        let copied = Command::new("cp").arg(program).arg(&new).status().unwrap();
        assert!(copied.success(), "{copied}");
        fs::rename(new, self.path()).unwrap();
    }

    /// Replaces it by these bytes, executable or not.
    pub fn write(&self, bytes: &[u8], mode: u32) {
        let bytes = self.dir.write("bytes", bytes);
        fs::set_permissions(&bytes, fs::Permissions::from_mode(mode)).unwrap();
        self.put(&bytes);
    }

    /// Replaces it by a script. In it, `$good` is the binary under test, `$dir` a directory of the test,
    /// and `$1` of `when` the reason for its start: probe, exec or back.
    pub fn script(&self, text: &str) {
        let script = format!(
            "#!/bin/sh\ngood={}\ndir={}\nset -- ${{PREFORKD_UPGRADE%% *}} \"$@\"\nwhen=$1\nshift\n{text}\n",
            binary().display(),
            self.dir.display()
        );
        self.write(script.as_bytes(), 0o755);
    }

    /// Returns the path of a file in its directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Returns the inode of the installed program.
    pub fn inode(&self) -> u64 {
        fs::metadata(self.path()).unwrap().ino()
    }
}

/// Upgrades with the command, which must succeed.
#[track_caller]
pub fn upgrade(daemon: &Daemon) {
    let done = daemon.command(&["upgrade"]);
    assert!(done.status.success(), "{done:?}\n{}", daemon.log());
}

/// Waits until the master has `count` workers, including draining ones.
#[track_caller]
pub fn wait_for_children(daemon: &Daemon, count: usize) {
    wait_for("the old workers gone", PATIENCE, || {
        process::workers(daemon.pid()).len() == count
    });
}

/// Waits until a master has descriptors of these kinds. It closes the connection of the last command
/// shortly after its answer.
#[track_caller]
pub fn wait_kinds(pid: i32, kinds: &[String]) {
    wait_for(&format!("these open: {kinds:?}"), PATIENCE, || {
        process::kinds(pid) == kinds
    });
}
