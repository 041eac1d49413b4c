//! Reads the configuration: one TOML file, the files that it includes, the command line, and defaults.
//!
//! [`load`] is used at start and reload. [`load_or_faults`] is used by `check` and reports more than the
//! first error (`diagnostics`). The steps have a file each:
//!
//! - `files` reads the text.
//! - `source_map` merges it and records the position of each key.
//! - `remedies` suggests corrections of syntax errors and unknown keys.
//! - `raw` has serde's types for it; `keys` those of single keys, with defaults and bounds.
//! - `resolve` with `listeners`, `methods`, `pools` and `jobs` makes [`Settings`], in which every value is set.
//!
//! [`Settings::to_toml`] goes the same way back. [`keep_restart_only_keys`] drops what a reload cannot
//! change.
//!
//! Nothing here creates, binds or changes anything. Every error is [`Error::Config`], with file, line, column
//! and key where they are known. A file that cannot be read is a system error, except in
//! [`control_socket_candidates`].

mod access_log;
mod address;
mod check;
mod commands;
mod diagnostics;
mod effective;
mod environment;
mod exposed;
mod files;
mod guarded;
mod isolation;
mod job_config;
mod jobs;
mod keys;
mod listeners;
mod methods;
mod missing;
mod observe;
mod overrides;
mod pools;
mod program_config;
mod program_text;
mod programs;
mod raw;
mod remedies;
mod resolve;
mod restart;
mod settings;
mod source_map;
mod units;
mod variables;

use std::path::{Path, PathBuf};

pub use commands::{literal, placeholder};
pub use environment::KeptVariables;
pub use job_config::JobStore;
pub use observe::{Histogram, USUAL_PORT};
pub use overrides::{DEFAULT_NAME, Overrides, server_name};
pub use programs::SEARCH_PATH;
pub use restart::keep_restart_only_keys;
pub use settings::{
    AccessLogConfig, Address, Builtin, CommandConfig, HttpMethods, IsolationConfig, JobRules,
    JobsConfig, LimitsConfig, ListenConfig, LogFormat, MethodConfig, MethodKind, ObserveConfig,
    OutputFormat, PoolConfig, PoolReload, PoolScope, ProgramConfig, Settings, StackSignal, Stdin,
    WorkersConfig,
};
pub use variables::secrets_of;

use crate::error::{Error, Result};
use check::Check;
use environment::Environment;
use files::Files;

/// Reads and checks the whole configuration: that of `file`, else that of /etc/preforkd/preforkd.toml, else
/// the defaults.
///
/// # Errors
/// The first error in it.
pub fn load(file: Option<&Path>, overrides: &Overrides) -> Result<Settings> {
    load_in(&Environment::here(), file, overrides)
}

/// Reads and checks the whole configuration, and returns as many errors as possible, in the order of the
/// files.
///
/// # Errors
/// At least one.
pub fn load_or_faults(
    file: Option<&Path>,
    overrides: &Overrides,
) -> std::result::Result<Settings, Vec<Error>> {
    let here = Environment {
        is_check: true,
        ..Environment::here()
    };
    let files = match here.main_file(file) {
        Some(path) => Files::read(&path).map_err(|error| vec![error])?,
        None => Files::default(),
    };
    diagnostics::settings_or_faults(&here, &files, overrides)
}

/// Returns only the listeners of the server with this configuration. Errors in other keys do not matter.
///
/// # Errors
/// If the listeners are unknown: a call must not reach another server.
pub fn listeners(file: Option<&Path>, overrides: &Overrides) -> Result<Vec<ListenConfig>> {
    listeners_in(&Environment::here(), file, overrides)
}

fn listeners_in(
    here: &Environment,
    file: Option<&Path>,
    overrides: &Overrides,
) -> Result<Vec<ListenConfig>> {
    let settings = || load_in(here, file, overrides);
    let Some(main) = here.main_file(file) else {
        return Ok(settings()?.listen);
    };
    let alone = match Files::read_alone(&main) {
        // The default file may be readable only for the server's user.
        Err(Error::System { .. }) if file.is_none() => return Ok(listeners::default()),
        alone => alone?,
    };
    let said = |files: &Files, is_whole: bool| {
        let (raw, places) = source_map::parse_only(files, "listen").ok()?;
        let check = Check {
            places: &places,
            overrides,
            here,
        };
        // If the whole configuration has no listener, it is the default one.
        let says_all = is_whole || raw.listen.is_some();
        says_all.then(|| listeners::resolve(&check, &raw).ok())?
    };
    // Included files may be readable only for that user, too.
    let whole = Files::read(&main).ok();
    let whole = whole.as_ref().and_then(|files| said(files, true));
    whole
        .or_else(|| said(&alone, false))
        .map_or_else(|| Ok(settings()?.listen), Ok)
}

/// Returns the absolute path of the main file: `file`, or the default file if `file` is `None` and the default exists.
pub fn main_file(file: Option<&Path>) -> Option<PathBuf> {
    Environment::here().main_file(file)
}

/// Returns whether the configuration sets this key. Without an error: a file that cannot be read sets none.
pub fn is_set(file: Option<&Path>, key: &str) -> bool {
    let main = main_file(file);
    let files = main.as_deref().map(Files::read_leniently);
    source_map::places(&files.unwrap_or_default()).is_ok_and(|places| places.is_set(key))
}

/// Reads settings that [`Settings::to_toml`] has written, possibly in another version. `file` is the configuration
/// file that they came from at first, and `secrets` are their [`secrets_of`].
///
/// # Errors
/// What this version would refuse.
pub fn from_effective(
    (text, secrets): (String, KeptVariables),
    file: Option<PathBuf>,
    overrides: &Overrides,
) -> Result<Settings> {
    let place = file.clone().unwrap_or_else(|| "/".into());
    let files = Files::of_text(&place, text)?;
    let here = Environment {
        has_served: true,
        kept_variables: secrets,
        ..Environment::here()
    };
    let settings = settings_of(&here, &files, overrides)?;
    Ok(Settings { file, ..settings })
}

/// Loads the configuration as [`load`], but with the environment `here`.
fn load_in(here: &Environment, file: Option<&Path>, overrides: &Overrides) -> Result<Settings> {
    let files = match here.main_file(file) {
        Some(path) => Files::read(&path)?,
        None => Files::default(),
    };
    settings_of(here, &files, overrides)
}

/// Loads the configuration as [`load`], but with `text` as the content of the file. The file need not exist.
///
/// # Errors
/// As for [`load`].
#[cfg(feature = "internals")]
pub fn load_text(file: &Path, text: String, overrides: &Overrides) -> Result<Settings> {
    let files = Files::of_text(file, text)?;
    settings_of(&Environment::here(), &files, overrides)
}

fn settings_of(here: &Environment, files: &Files, overrides: &Overrides) -> Result<Settings> {
    let (raw, places) = source_map::parse(files)?;
    resolve::resolve(&raw, &places, overrides, here)
}

/// Returns the paths where the control socket of a running master may be, the most likely one first: the
/// path in the file, or else the default paths of a server with this name.
///
/// Works on an invalid file too, because `reload` must report its errors: the key is looked for in what can
/// be parsed. If the file names the socket, there is no other candidate, so a command never reaches another
/// server.
///
/// # Errors
/// If `file` was named and cannot be read, or seems to set the key in a way that cannot be parsed.
pub fn control_socket_candidates(file: Option<&Path>, name: &str) -> Result<Vec<PathBuf>> {
    candidates_in(&Environment::here(), file, name)
}

fn candidates_in(here: &Environment, file: Option<&Path>, name: &str) -> Result<Vec<PathBuf>> {
    let main = here.main_file(file);
    let files = main.as_deref().map(Files::read_leniently);
    let all = || files.iter().flat_map(Files::iter);
    if let Some(path) = all().find_map(files::File::control_socket) {
        return Ok(vec![path]);
    }
    let is_read = all().next().is_some();
    // The default file may be readable only for the server's user.
    if file.is_some() && (!is_read || all().any(files::File::may_name_control_socket)) {
        return Err(Error::Config {
            file: main,
            position: None,
            key: if is_read {
                "control-socket".into()
            } else {
                String::new()
            },
            problem: "it can't be read, so it is unknown which server is meant".into(),
            remedy: "correct it, or name the server's socket with --control-socket".into(),
        });
    }
    // A user may mean root's server. Then the answer is a clear refusal instead of "no server".
    let system = Path::new("/run").join(name);
    let mut directories: Vec<PathBuf> = here.runtime_directories(name).collect();
    if !directories.contains(&system) {
        directories.push(system);
    }
    let socket = |directory: PathBuf| directory.join("control.sock");
    let candidates = directories.into_iter().map(socket).collect();
    Ok(candidates)
}

#[cfg(test)]
mod tests;
