//! Collects what the machine adds to the file: user, directories, number of CPUs.
//!
//! It is read once for each load and passed down. So the other files are functions of their arguments, and
//! are tested as root and as a user. Nothing here fails: every value has a fallback.

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use crate::sys::{account, guard, memory, process};

/// The file that is read if none is named.
const DEFAULT_FILE: &str = "/etc/preforkd/preforkd.toml";

/// Variables of programs, by the table of each: `pools.NAME`, `methods.NAME`.
pub type KeptVariables = BTreeMap<String, BTreeMap<String, String>>;

#[derive(Debug, Clone)]
pub(super) struct Environment {
    /// The effective user id.
    pub uid: u32,
    /// The effective group id.
    pub gid: u32,
    /// Where the directory of a server may be, as parent and suffix: PARENT/NAME followed by the suffix. That directory
    /// has the pid file and the control socket if the file does not name them. The most likely one is first.
    pub runtime_roots: Vec<(PathBuf, String)>,
    /// The file that is read if none is named.
    pub default_file: PathBuf,
    /// The directory for relative paths of the command line.
    pub directory: PathBuf,
    /// The number of CPUs that this process may use.
    pub cpus: usize,
    /// The memory that this process may use, in bytes.
    pub memory: u64,
    /// Why programs cannot be guarded on this system; `None` if they can.
    pub guard_missing: Option<&'static str>,
    /// Whether setuid files and file capabilities have no effect in this process anyway.
    pub no_new_privs: bool,
    /// Whether the settings have been in use already. Then missing programs and directories are no error
    /// here; they are reported when a program is started.
    pub has_served: bool,
    /// The variables from each `environment-file` as it was read last. If there are some, it is not read
    /// again.
    pub kept_variables: KeptVariables,
    /// Returns a variable of the server, if it is set and is UTF-8.
    pub variable: fn(&str) -> Option<String>,
    /// Whether this is `check`. The server may be started later with other variables than this process has.
    pub is_check: bool,
}

impl Environment {
    /// Reads the environment of this process.
    pub fn here() -> Self {
        let (uid, gid) = account::effective_ids();
        let xdg = env::var_os("XDG_RUNTIME_DIR");
        Environment {
            uid,
            gid,
            runtime_roots: runtime_roots(uid, xdg.as_deref(), &env::temp_dir()),
            default_file: DEFAULT_FILE.into(),
            // A deleted directory has no name. Only relative paths would need it.
            directory: process::current_directory().unwrap_or_else(|_| "/".into()),
            cpus: num_cpus::get(),
            memory: memory::memory_limit(),
            guard_missing: guard::missing(),
            no_new_privs: guard::has_no_new_privs(),
            has_served: false,
            kept_variables: KeptVariables::default(),
            variable: |name| env::var(name).ok(),
            is_check: false,
        }
    }

    /// Returns the possible directories of a server with this name. A new master uses the first one.
    pub fn runtime_directories(&self, name: &str) -> impl Iterator<Item = PathBuf> {
        let roots = self.runtime_roots.iter();
        roots.map(move |(root, suffix)| root.join(format!("{name}{suffix}")))
    }

    /// Returns the main file to read: `named`, or the default file if it exists.
    pub fn main_file(&self, named: Option<&Path>) -> Option<PathBuf> {
        match named {
            // An empty name stays empty, and reading it fails.
            Some(name) if name.as_os_str().is_empty() => Some(name.to_owned()),
            Some(name) => Some(self.absolute(name)),
            // If it is unknown whether it exists, reading it gives the reason.
            None => self
                .default_file
                .try_exists()
                .unwrap_or(true)
                .then(|| self.default_file.clone()),
        }
    }

    /// Makes a `path` of the command line absolute. Symbolic links stay, so the next reload sees when one
    /// is replaced.
    pub fn absolute(&self, path: &Path) -> PathBuf {
        clean(&self.directory.join(path))
    }
}

/// Returns an absolute path without its `.` parts. `..` stays, because it may follow a symbolic link.
pub(super) fn clean(path: &Path) -> PathBuf {
    path.components().collect()
}

/// Returns the possible parents of a server's directory, the most likely one first: /run for root, the
/// directory of the session for a user, or the temporary directory.
fn runtime_roots(uid: u32, xdg: Option<&OsStr>, temporary: &Path) -> Vec<(PathBuf, String)> {
    if uid == 0 {
        return vec![("/run".into(), String::new())];
    }
    // The XDG Base Directory Specification says to ignore relative ones.
    let session = xdg.map(Path::new).filter(|path| path.is_absolute());
    session
        .map(|path| (path.to_owned(), String::new()))
        .into_iter()
        .chain([(temporary.to_owned(), format!("-{uid}"))])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directories(uid: u32, xdg: Option<&str>, name: &str) -> Vec<PathBuf> {
        let here = Environment {
            runtime_roots: runtime_roots(uid, xdg.map(OsStr::new), Path::new("/var/tmp")),
            ..Environment::here()
        };
        here.runtime_directories(name).collect()
    }

    #[test]
    fn root_keeps_its_files_under_run() {
        for name in ["preforkd", "second"] {
            let expected = Path::new("/run").join(name);
            assert_eq!(directories(0, Some("/run/user/0"), name), [expected]);
        }
    }

    #[test]
    fn a_user_keeps_them_in_the_session_else_in_a_directory_of_its_own() {
        let of = |xdg: Option<&str>| directories(1000, xdg, "preforkd");
        let session = Path::new("/run/user/1000/preforkd");
        let own = Path::new("/var/tmp/preforkd-1000");
        assert_eq!(of(Some("/run/user/1000")), [session, own]);
        for none in [None, Some(""), Some("run/user")] {
            assert_eq!(of(none), [own]);
        }
    }

    #[test]
    fn paths_become_absolute_and_keep_their_double_dots() {
        let here = Environment {
            directory: "/home/me".into(),
            ..Environment::here()
        };
        for (path, absolute) in [
            ("a.toml", "/home/me/a.toml"),
            ("./a.toml", "/home/me/a.toml"),
            ("../a.toml", "/home/me/../a.toml"),
            ("/a/./b", "/a/b"),
        ] {
            assert_eq!(here.absolute(Path::new(path)), Path::new(absolute));
        }
    }
}
