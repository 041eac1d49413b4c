//! Provides a temporary directory that is removed at the end of the test. If the test fails, it is kept
//! and its path is printed.

use std::ops::Deref;
use std::path::{Path, PathBuf};

use nix::unistd::mkdtemp;

pub struct Dir {
    path: PathBuf,
}

impl Dir {
    /// Creates it directly in the temporary directory, because the path of a unix socket has at most 107
    /// bytes.
    pub fn new() -> Self {
        Self::inside(&std::env::temp_dir())
    }

    /// Creates it in another directory.
    pub fn inside(parent: &Path) -> Self {
        let path = mkdtemp(&parent.join("preforkd-test-XXXXXX")).unwrap();
        // Symbolic links in the path would make relative paths of a configuration look different.
        Dir {
            path: path.canonicalize().unwrap(),
        }
    }

    /// Writes a file in it and returns its path.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path.join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    /// Returns the content of a file in it; empty if the file does not exist.
    pub fn read(&self, name: &str) -> String {
        let bytes = std::fs::read(self.path.join(name)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Deref for Dir {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.path
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("kept for a look: {}", self.path.display());
        } else {
            // An error does not matter, because the next reboot empties the temporary directory.
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}
