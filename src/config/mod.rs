//! The configuration: one TOML file, what it includes, the command line, and a default for all.
//!
//! [`load`] is the one way in, for start and reload alike; [`load_or_faults`] is it for `check`, which tells
//! more than the first fault (`faults`). It goes in steps, a file each:
//! `files` reads the text, `document` merges it and knows where each key stands, `raw` is serde's
//! mirror of it, `resolve` with `listeners`, `methods` and `pools` makes [`Settings`] of the mirror, where
//! nothing is left unsaid. [`Settings::to_toml`] goes the same way back, and [`keep_restart_only_keys`] says what no reload changes.
//!
//! It reads files, looks up users and looks at paths; it creates, binds and changes nothing. Every
//! error is [`Error::Config`] with file, line, column and key, but for a
//! file that may not be read, which is an error of the system.

mod address;
mod check;
mod commands;
mod diagnostics;
mod effective;
mod environment;
mod exposed;
mod files;
mod guarded;
mod listeners;
mod methods;
mod overrides;
mod pools;
mod program_text;
mod programs;
mod raw;
mod resolve;
mod restart;
mod settings;
mod source_map;
mod units;
mod variables;

use std::path::{Path, PathBuf};

pub use commands::{literal, placeholder};
pub use overrides::{DEFAULT_NAME, Overrides, server_name};
pub use programs::SEARCH_PATH;
pub use restart::keep_restart_only_keys;
pub use settings::{
    Address, Builtin, CommandConfig, HttpMethods, LimitsConfig, ListenConfig, LogFormat,
    MethodConfig, MethodKind, OutputFormat, PoolConfig, ProgramConfig, Settings, Stdin,
    WorkersConfig,
};

use crate::error::{Error, Result};
use check::Check;
use environment::Environment;
use files::Files;

/// Reads and checks the whole configuration. Without a `file` it is that of
/// /etc/preforkd/preforkd.toml, and without that one the defaults.
pub fn load(file: Option<&Path>, overrides: &Overrides) -> Result<Settings> {
    load_in(&Environment::here(), file, overrides)
}

/// [`load`] for who wants to know all that is wrong at once: where something is, as much of it as can be
/// told, in the order of the files.
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

/// The listeners of the server that has this configuration, for who needs nothing else and does not mind
/// what else is wrong there.
///
/// # Errors
/// When it can't be told where that server is: no call for one server is to reach another.
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
        // Nobody named that file, which may be for the server's own user alone.
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
        // Who says nothing means the default, if that was all.
        let says_all = is_whole || raw.listen.is_some();
        says_all.then(|| listeners::resolve(&check, &raw).ok())?
    };
    // What is included may be for that user alone, too.
    let whole = Files::read(&main).ok();
    let whole = whole.as_ref().and_then(|files| said(files, true));
    whole
        .or_else(|| said(&alone, false))
        .map_or_else(|| Ok(settings()?.listen), Ok)
}

/// The absolute path of the main file that is read if this one is named.
pub fn main_file(file: Option<&Path>) -> Option<PathBuf> {
    Environment::here().main_file(file)
}

/// The settings that [`Settings::to_toml`] has written, perhaps in another version; `file` is where
/// they were read from.
///
/// # Errors
/// What this version would not read.
pub fn from_effective(
    text: String,
    file: Option<PathBuf>,
    overrides: &Overrides,
) -> Result<Settings> {
    let place = file.clone().unwrap_or_else(|| "/".into());
    let files = Files::of_text(&place, text)?;
    let here = Environment {
        has_served: true,
        ..Environment::here()
    };
    let settings = settings_of(&here, &files, overrides)?;
    Ok(Settings { file, ..settings })
}

/// [`load`] with nothing taken from the process.
fn load_in(here: &Environment, file: Option<&Path>, overrides: &Overrides) -> Result<Settings> {
    let files = match here.main_file(file) {
        Some(path) => Files::read(&path)?,
        None => Files::default(),
    };
    settings_of(here, &files, overrides)
}

/// [`load`] with `text` for the content of the file, which need not be there.
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

/// Where the control socket of a running master may be, the likeliest first: where the file says,
/// and if it says nothing, in the default places of a server of this name.
///
/// It works on a broken file too, for that is when `reload` is needed to say so: the key is looked
/// for in what can be read of it. A file that names its socket has no other candidate, so that no
/// command for one server ever reaches another.
///
/// # Errors
/// When a file was asked for that can't be read, or seems to name its socket in a way that can't be.
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
    // Nobody named the default file, which may be one that only the server's own user can read.
    if file.is_some() && (!is_read || all().any(files::File::may_name_control_socket)) {
        return Err(Error::Config {
            file: main,
            position: None,
            key: if is_read {
                "control-socket".into()
            } else {
                String::new()
            },
            problem: "it can't be read, so it can't tell which server is meant".into(),
            remedy: "mend it, or name the server's socket with --control-socket".into(),
        });
    }
    // A user may ask for root's server; the answer is then a clear refusal and not "no server".
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
