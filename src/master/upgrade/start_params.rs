//! Records how this server was started: program, arguments, directory, and the options that a reload needs.
//!
//! They are read once at the start, because the title later overwrites the arguments and a daemon leaves
//! its directory. An upgrade starts the program at that path in the same way.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::Overrides;
use crate::sys::process::{current_directory, is_same_file};

/// The variable with which an upgrade starts a program.
pub(super) const VARIABLE: &str = "PREFORKD_UPGRADE";
/// The variable with the reason why the new program gave up.
pub(super) const REASON: &str = "PREFORKD_UPGRADE_REASON";
/// The line that a probe writes if it could take over.
pub const PROBE_PASSED: &str = "preforkd: this program can take the running server over";
const OWN_IMAGE: &str = "/proc/self/exe";

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartParams {
    /// The absolute path of the program. Symbolic links are kept, because they may be changed later.
    pub path: PathBuf,
    /// Its arguments, with its own name first.
    pub arguments: Vec<OsString>,
    /// Its directory. Symbolic links are kept, because a deployment may change them.
    pub directory: PathBuf,
    /// The absolute path of the configuration file, if there is one.
    pub file: Option<PathBuf>,
    /// The name in the paths of its pid file and control socket. `None` if it was started by a version that
    /// had no names.
    #[serde(default)]
    pub name: Option<String>,
    /// `--daemon`.
    pub daemon: bool,
    /// Each `--listen`, with absolute paths.
    pub listen: Vec<String>,
}

impl StartParams {
    /// Reads the parameters of this process. Call it before the title or the directory changes.
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

/// Returns the path by which this program was called, or the path of its file.
fn program(name: &OsStr, directory: &Path, search: Option<&OsStr>) -> PathBuf {
    let path = Path::new(name);
    let called = if name.is_empty() {
        None
    } else if path.components().count() > 1 || path.is_absolute() {
        // Without its `.` parts.
        Some(directory.join(path).components().collect())
    } else {
        let search = search.unwrap_or(OsStr::new("/usr/local/bin:/usr/bin:/bin"));
        env::split_paths(search)
            .map(|place| directory.join(place).join(path))
            .find(|candidate| is_this(candidate))
    };
    // The caller can write any name (`exec -a`), so it counts only if it leads to this program.
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
