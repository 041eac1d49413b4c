//! Reads the configuration like a start, and shows the values in effect (`check`).

use std::path::Path;

use crate::config::{self, Overrides};
use crate::error::Error;

/// The result for a valid configuration.
pub(super) struct Checked {
    /// The whole configuration, as TOML.
    pub effective: String,
    /// The warnings: a sentence each.
    pub warnings: Vec<String>,
}

/// Reads and checks the configuration. The error has all that is wrong.
pub(super) fn check(config: Option<&Path>, overrides: &Overrides) -> Result<Checked, Vec<Error>> {
    let settings = config::load_or_faults(config, overrides)?;
    Ok(Checked {
        effective: settings.to_toml(),
        warnings: settings.warnings,
    })
}
