//! A temporary directory that goes with its test, unless the test fails: then it stays, and says
//! where it is.

use std::ops::Deref;
use std::path::{Path, PathBuf};

use nix::unistd::mkdtemp;

/// A directory of one test.
pub struct Dir {
    path: PathBuf,
}

impl Dir {
    /// A new one, directly under the temporary directory: a unix socket's path has 107 bytes.
    pub fn new() -> Self {
        let path = mkdtemp(&std::env::temp_dir().join("preforkd-test-XXXXXX")).unwrap();
        // symlinks on the way would make relative paths of a configuration look different
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

    /// What is in a file of it; empty when it is not there.
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
            // of no consequence: the next reboot empties it
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}
