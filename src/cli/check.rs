//! `check`: reads the configuration as a start would, and shows what is in effect.

use std::path::Path;

use crate::config::{self, Overrides};
use crate::error::Error;

/// What there is to say about a configuration that is in order.
pub(super) struct Checked {
    /// The whole of it, as TOML.
    pub effective: String,
    /// What is allowed and yet worth a word, a sentence each.
    pub warnings: Vec<String>,
}

/// Reads and checks it; an error is all that is wrong, at least one thing.
pub(super) fn check(config: Option<&Path>, overrides: &Overrides) -> Result<Checked, Vec<Error>> {
    let settings = config::load_or_faults(config, overrides)?;
    Ok(Checked {
        effective: settings.to_toml(),
        warnings: settings.warnings,
    })
}
