//! Holds what the command line and the program set; it takes precedence over the file.

use std::collections::BTreeSet;
use std::path::Path;

use super::environment::Environment;

/// What the command line and the program itself say; it has precedence over the file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overrides {
    /// `--daemon`.
    pub daemon: bool,
    /// Each `--listen`; any takes the place of all `[[listen]]`.
    pub listen: Vec<String>,
    /// The names of the handlers that the program registered.
    pub functions: BTreeSet<String>,
}

impl Overrides {
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
