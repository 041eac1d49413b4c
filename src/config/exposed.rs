//! Warns about files and sockets in directories that another user can write.
//!
//! That user can replace them. Then the master follows a link or reads a configuration of that user, or commands reach
//! a server of that user. Only root and the server's own user may write to such directories. Nothing here fails: what
//! cannot be read is skipped.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::address::Address;
use super::programs::Ids;
use super::raw::Raw;
use super::settings::Settings;
use super::source_map::SourceMap;
use crate::sys::other_writer::{self, OtherWriter};

const CONFIGURATION: &str = "the configuration";

/// Returns the warnings, one for each directory. `own` are the ids of the master.
pub(super) fn warnings(
    settings: &Settings,
    raw: &Raw,
    places: &SourceMap<'_>,
    own: Ids,
) -> Vec<String> {
    let mut found: BTreeMap<(PathBuf, OtherWriter), Vec<String>> = BTreeMap::new();
    let mut note = |at: PathBuf, writer, what: String| {
        let names = found.entry((at, writer)).or_default();
        if !names.contains(&what) {
            names.push(what);
        }
    };
    for (path, what) in paths(settings, raw, places) {
        if let Some(exposed) = other_writer::of_path(&path, own) {
            note(exposed.directory, exposed.writer, what);
        }
    }
    for file in places.files() {
        let writer = file.metadata();
        if let Some(writer) = writer
            .ok()
            .and_then(|it| other_writer::of_metadata(&it, own))
        {
            note(file.to_owned(), writer, CONFIGURATION.to_owned());
        }
    }
    let user = match own.0 {
        0 => "root".to_owned(),
        uid => format!("root and user {uid}"),
    };
    let text = |((at, writer), names): ((PathBuf, OtherWriter), Vec<String>)| {
        format!(
            "{}: {} can be written by {writer}, so it or the files in it can be replaced; let only {user} \
             write there, or take another path",
            names.join(", "),
            at.display()
        )
    };
    found.into_iter().map(text).collect()
}

/// Returns all paths to check, and what they are.
fn paths(settings: &Settings, raw: &Raw, places: &SourceMap<'_>) -> Vec<(PathBuf, String)> {
    let mut paths = vec![
        (settings.pid_file.clone(), "pid-file".to_owned()),
        (settings.control_socket.clone(), "control-socket".to_owned()),
    ];
    let log = settings.log.file.iter();
    paths.extend(log.map(|path| (path.clone(), "log.file".to_owned())));
    let access_log = settings.access_log_file();
    paths.extend(access_log.map(|path| (path.to_owned(), "access-log.file".to_owned())));
    if let Some(jobs) = &settings.jobs {
        paths.push((jobs.path().to_owned(), "jobs.store".to_owned()));
    }
    for listen in &settings.listen {
        if let Address::Unix(path) = &listen.address {
            paths.push((path.clone(), format!("the listener {}", listen.address)));
        }
    }
    let observe = settings.observe.path().into_iter();
    paths.extend(observe.map(|path| (path.to_owned(), "observe.address".to_owned())));
    let main = places.main().and_then(Path::parent);
    let patterns = raw.include.iter().flatten();
    // A file that another user adds to the directory would be included.
    let included = patterns.filter_map(|pattern| {
        let fixed = pattern.split(['*', '?', '[']).next()?;
        let directory = fixed
            .rsplit_once('/')
            .map_or("", |(directory, _)| directory);
        Some(main?.join(directory).join("*"))
    });
    let files = places.files().map(Path::to_owned);
    let configuration = files.chain(included);
    paths.extend(configuration.map(|path| (path, CONFIGURATION.to_owned())));
    paths
}
