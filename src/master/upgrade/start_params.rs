//! How this server was started: the path of its program, its arguments, its directory; and what of
//! the command line a reload has to know.
//!
//! Looked up once, at the start, before the title is written over the arguments and a daemon leaves
//! its directory. An upgrade starts what stands at that path then in the same way.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::Overrides;
use crate::sys::process::{current_directory, is_same_file};

const OWN_IMAGE: &str = "/proc/self/exe";

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartParams {
    /// The program, absolute; its symbolic links are kept, for they may lead elsewhere later.
    pub path: PathBuf,
    /// Its arguments, its own name first.
    pub arguments: Vec<OsString>,
    /// Its directory. Symbolic links are kept here too: a deployment exchanges them.
    pub directory: PathBuf,
    /// The configuration file, absolute, if there is one.
    pub file: Option<PathBuf>,
    /// The name by which its pid file and control socket are found; `None`: a version that gave all
    /// servers the same ones has started it.
    #[serde(default)]
    pub name: Option<String>,
    /// `--daemon`.
    pub daemon: bool,
    /// Each `--listen`, its paths absolute.
    pub listen: Vec<String>,
}

impl StartParams {
    /// That of this process, while its arguments and its directory are as at the start.
    pub fn of_this_process(file: Option<PathBuf>, overrides: &Overrides) -> Self {
        let directory = current_directory().unwrap_or_else(|_| "/".into());
        let arguments: Vec<OsString> = env::args_os().collect();
        let name = arguments
            .first()
            .map_or(OsStr::new(""), OsString::as_os_str);
        StartParams {
            path: program(name, &directory, env::var_os("PATH").as_deref()),
            arguments,
            directory,
            file,
            name: overrides.name.clone(),
            daemon: overrides.daemon,
            listen: overrides.listen.clone(),
        }
    }
}

/// The path that this program was called by, else where its file lies.
fn program(name: &OsStr, directory: &Path, search: Option<&OsStr>) -> PathBuf {
    let path = Path::new(name);
    let called = if name.is_empty() {
        None
    } else if path.components().count() > 1 || path.is_absolute() {
        // without its `.` parts
        Some(directory.join(path).components().collect())
    } else {
        let search = search.unwrap_or(OsStr::new("/usr/local/bin:/usr/bin:/bin"));
        env::split_paths(search)
            .map(|place| directory.join(place).join(path))
            .find(|candidate| is_this(candidate))
    };
    // A name is whatever the caller wrote there (exec -a): believed only where it leads to us.
    called
        .filter(|path| is_this(path))
        .or_else(|| fs::read_link(OWN_IMAGE).ok())
        .unwrap_or_else(|| path.to_owned())
}

fn is_this(path: &Path) -> bool {
    is_same_file(path, Path::new(OWN_IMAGE))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn the_path_that_it_was_called_by_is_kept_as_long_as_it_leads_here() {
        let own = fs::read_link(OWN_IMAGE).unwrap();
        let place = tempfile::tempdir().unwrap();
        let link = place.path().join("server");
        symlink(&own, &link).unwrap();
        let called = |name: &str, search: Option<&Path>| {
            program(OsStr::new(name), place.path(), search.map(Path::as_os_str))
        };
        assert_eq!(called("./server", None), link);
        assert_eq!(called(link.to_str().unwrap(), None), link);
        assert_eq!(called("server", Some(place.path())), link);
        for stranger in ["server", "/bin/sh", "no/such", ""] {
            assert_eq!(called(stranger, None), own, "{stranger:?}");
        }
    }
}
