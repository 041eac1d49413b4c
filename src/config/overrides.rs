//! Holds what the command line and the program set; it takes precedence over the file.

use std::collections::BTreeSet;
use std::path::Path;

use super::environment::Environment;

/// The name of a server that has no other.
pub const DEFAULT_NAME: &str = "preforkd";

/// What the command line and the program itself say; it has precedence over the file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overrides {
    /// The name of the server (`--name`, else that of the program), by which its pid file and control socket
    /// are found unless the file names them. `None`: "preforkd".
    pub name: Option<String>,
    /// `--daemon`.
    pub daemon: bool,
    /// Each `--listen`; any takes the place of all `[[listen]]`.
    pub listen: Vec<String>,
    /// The names of the handlers that the program registered.
    pub functions: BTreeSet<String>,
}

/// The name of a server as a part of paths: characters that do not belong into one are replaced.
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
    /// The name of the server as a part of paths.
    pub fn name(&self) -> &str {
        self.name.as_deref().unwrap_or(DEFAULT_NAME)
    }

    /// Makes relative socket paths absolute by the current directory. To be called before the
    /// master leaves that directory, so that a reload means the same sockets as the start did.
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
