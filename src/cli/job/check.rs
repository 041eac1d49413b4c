//! Tests the store of durable jobs, and prints its schema (`job check`, `job schema`).
//!
//! Both change nothing. `check` also works while a server uses the store, and while none does.

use std::path::Path;

#[cfg(feature = "jobs-sqlite")]
use crate::cli::output;
use crate::config::{self, JobsConfig, Overrides};
use crate::error::{Error, Result};

/// Reads the configuration and tests the store that it names. Returns what is known about the store.
///
/// # Errors
/// All errors of the configuration, or the reason why the store cannot be used.
pub(crate) fn check(
    config: Option<&Path>,
    overrides: &Overrides,
) -> std::result::Result<String, Vec<Error>> {
    let settings = config::load_or_faults(config, overrides)?;
    let Some(jobs) = settings.jobs else {
        return Err(vec![Error::Config {
            file: settings.file,
            position: None,
            key: "jobs".into(),
            problem: "this configuration has no table [jobs]".into(),
            remedy: "name the configuration with --config FILE, or add [jobs] and its store".into(),
        }]);
    };
    report(&jobs).map_err(|error| vec![error])
}

#[cfg(feature = "jobs-sqlite")]
fn report(jobs: &JobsConfig) -> Result<String> {
    use crate::config::JobStore;
    use crate::jobs::store::error::OpenError;
    use crate::jobs::store::sqlite;
    use crate::sys::instance_lock::{self, InstanceLock};

    let JobStore::Sqlite(path) = &jobs.store;
    let lock = InstanceLock::path_for(&sqlite::file::resolve(path)?);
    // Without the right to read the lock file there is no right to read the store either, and the store
    // gives the better message.
    let master = instance_lock::master(&lock).ok().flatten();
    let user = match master {
        Some(pid) => format!("used by the server with pid {pid}"),
        None => "not used by a server".to_owned(),
    };
    let inspected = sqlite::inspect(path, true).map_err(|error| match master {
        // What the remedy says must not be done while the server uses the store.
        Some(pid) => OpenError {
            remedy: format!(
                "stop the server with pid {pid} first; then {}",
                error.remedy
            ),
            ..error
        },
        None => error,
    });
    let text = match (inspected?, master) {
        // The lock file is never removed.
        (None, None) if lock.exists() => format!(
            "{}: there is no store, although a server has used one there; put it back, or the next start creates \
             an empty one\n",
            path.display()
        ),
        (None, None) => format!(
            "{}: does not exist yet; the server creates it\n",
            path.display()
        ),
        (None, Some(pid)) => {
            return Err(OpenError::new(
                path,
                format!("there is no store, although the server with pid {pid} uses this path"),
                "if the file was moved or deleted, stop the server and put the file back; if the server is starting, run this \
                 again when it has created the file",
            )
            .into());
        }
        (Some(facts), _) => {
            let (major, minor) = facts.schema;
            format!(
                "{}: intact, {user}\nschema={major}.{minor} waiting={} running={} durable={}\n",
                facts.location, facts.waiting, facts.running, facts.is_durable
            )
        }
    };
    Ok(output::printable(&text).into_owned())
}

#[cfg(not(feature = "jobs-sqlite"))]
fn report(_: &JobsConfig) -> Result<String> {
    Err(without_sqlite())
}

/// Returns the SQL of the schema, for a database administrator.
///
/// # Errors
/// The program was built without an engine.
#[cfg(feature = "jobs-sqlite")]
pub(crate) fn schema() -> Result<String> {
    Ok(crate::jobs::store::sqlite::schema::sql())
}

/// Without an engine there is no schema.
#[cfg(not(feature = "jobs-sqlite"))]
pub(crate) fn schema() -> Result<String> {
    Err(without_sqlite())
}

#[cfg(not(feature = "jobs-sqlite"))]
fn without_sqlite() -> Error {
    Error::Usage(
        "this program was built without SQLite; build it with the cargo feature jobs-sqlite".into(),
    )
}
