//! Holds the values of the command line and the program. They have precedence over the file.

use std::collections::BTreeSet;
use std::path::Path;

use super::environment::Environment;

/// The default name of a server.
pub const DEFAULT_NAME: &str = "preforkd";

/// The values of the command line and the program.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overrides {
    /// The name of the server (`--name`, else that of the program). The default paths of its pid file and
    /// control socket contain it. `None` means "preforkd".
    pub name: Option<String>,
    /// `--daemon`.
    pub daemon: bool,
    /// Each `--listen`. If there is one, all `[[listen]]` of the file are ignored.
    pub listen: Vec<String>,
    /// The names of the handlers that the program has registered.
    pub functions: BTreeSet<String>,
}

/// Returns the name of a server as a part of paths. Characters that do not fit there are replaced.
pub fn server_name(name: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let replaced: String = name
        .chars()
        .map(|c| if plain(c) { c } else { '-' })
        .collect();
    match replaced.trim_start_matches(['.', '-']) {
        "" => DEFAULT_NAME.to_owned(),
        name => name.to_owned(),
    }
}

impl Overrides {
    /// Returns the name of the server as a part of paths.
    pub fn name(&self) -> &str {
        self.name.as_deref().unwrap_or(DEFAULT_NAME)
    }

    /// Makes relative socket paths absolute by the current directory. Call it before the master leaves that
    /// directory, so that a reload means the same sockets as the start.
    pub fn make_absolute(&mut self) {
        let here = Environment::here();
        for address in &mut self.listen {
            if let Some(path) = address
                .strip_prefix("unix:")
                .filter(|path| !path.is_empty())
            {
                *address = format!("unix:{}", here.absolute(Path::new(path)).display());
            }
        }
    }
}
