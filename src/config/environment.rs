//! What the machine adds to the file: who runs this, where its directories are, how many CPUs.
//!
//! Taken once per load and handed down, so that everything else is a function of its arguments and
//! is tested as root and as a user alike. Nothing here fails: what can't be had has a fallback.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use crate::sys::{account, guard, memory, process};

/// What is read when no file is named.
const DEFAULT_FILE: &str = "/etc/preforkd/preforkd.toml";

#[derive(Debug, Clone)]
pub(super) struct Environment {
    /// The effective user.
    pub uid: u32,
    /// The effective group.
    pub gid: u32,
    /// Where the directory of a server is, with its pid file and control socket, unless the file says
    /// otherwise: a directory, and what follows the server's name there. The likeliest first.
    pub runtime_roots: Vec<(PathBuf, String)>,
    /// What is read when no file is named.
    pub default_file: PathBuf,
    /// What relative paths of the command line are relative to.
    pub directory: PathBuf,
    /// How many CPUs this process may use.
    pub cpus: usize,
    /// How much memory it may use, in bytes.
    pub memory: u64,
    /// Why programs cannot be guarded here; `None`: they can be.
    pub guard_missing: Option<&'static str>,
    /// Whether setuid files and file capabilities have no effect in this process anyway.
    pub no_new_privs: bool,
    /// Whether what is read has served already: programs and directories that have gone since are told when one
    /// of them is started, and are no reason to end a server.
    pub has_served: bool,
    /// A variable of the server, if it is set and UTF-8.
    pub variable: fn(&str) -> Option<String>,
    /// Whether no server is to be started: its variables may be others than those of this process.
    pub is_check: bool,
}

impl Environment {
    /// Those of this process, now.
    pub fn here() -> Self {
        let (uid, gid) = account::effective_ids();
        let xdg = env::var_os("XDG_RUNTIME_DIR");
        Environment {
            uid,
            gid,
            runtime_roots: runtime_roots(uid, xdg.as_deref(), &env::temp_dir()),
            default_file: DEFAULT_FILE.into(),
            // A directory that was deleted has no name; only relative paths would need it.
            directory: process::current_directory().unwrap_or_else(|_| "/".into()),
            cpus: num_cpus::get(),
            memory: memory::memory_limit(),
            guard_missing: guard::missing(),
            no_new_privs: guard::has_no_new_privs(),
            has_served: false,
            variable: |name| env::var(name).ok(),
            is_check: false,
        }
    }

    /// Where the directory of a server of this name may be. The first one is that of a new master.
    pub fn runtime_directories(&self, name: &str) -> impl Iterator<Item = PathBuf> {
        let roots = self.runtime_roots.iter();
        roots.map(move |(root, suffix)| root.join(format!("{name}{suffix}")))
    }

    /// The main file to read: the one that was named, else the default one if it is there.
    pub fn main_file(&self, named: Option<&Path>) -> Option<PathBuf> {
        match named {
            // An empty name stays empty, and is a file that is not there.
            Some(name) if name.as_os_str().is_empty() => Some(name.to_owned()),
            Some(name) => Some(self.absolute(name)),
            // If even that can't be told, let the attempt to read it say why.
            None => self
                .default_file
                .try_exists()
                .unwrap_or(true)
                .then(|| self.default_file.clone()),
        }
    }

    /// `path` made absolute as one of the command line. Symbolic links stay, so that exchanging
    /// one is seen by the next reload.
    pub fn absolute(&self, path: &Path) -> PathBuf {
        clean(&self.directory.join(path))
    }
}

/// An absolute path without its `.` parts; `..` stays, for it may follow a symbolic link.
pub(super) fn clean(path: &Path) -> PathBuf {
    path.components().collect()
}

/// Where directories of servers may be for a user, the likeliest first: root's are under /run, a
/// user's in the directory of the session, or where there is none in the temporary one.
fn runtime_roots(uid: u32, xdg: Option<&OsStr>, temporary: &Path) -> Vec<(PathBuf, String)> {
    if uid == 0 {
        return vec![("/run".into(), String::new())];
    }
    // The XDG Base Directory Specification has relative ones ignored.
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
