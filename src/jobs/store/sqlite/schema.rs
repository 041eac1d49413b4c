//! Defines the tables of a SQLite store, creates them, and migrates older versions.
//!
//! A newer release may add tables, indexes, and columns with a default: a new minor version. It never drops,
//! renames or reinterprets. So a store of a newer minor version can be used, and two versions can work on one
//! store. Another major version is refused.

use rusqlite::{Connection, TransactionBehavior};

use super::super::error::OpenError;
use super::fault;
use std::path::Path;

/// Marks the file as a store of preforkd ("pfjb"; `PRAGMA application_id`).
pub const APPLICATION_ID: i32 = 0x7066_6a62;

/// The major version of the schema. A store with another one is refused.
pub const MAJOR: u32 = 1;

/// What a minor version adds.
pub struct SchemaStep {
    pub minor: u32,
    pub sql: &'static str,
}

/// All steps in their order. A released step never changes.
pub const STEPS: &[SchemaStep] = &[SchemaStep {
    minor: 0,
    sql: VERSION_1_0,
}];

/// The schema 1.0. States, reasons and causes are the numbers of `jobs::policy::states`. Times are
/// milliseconds since 1970 (UTC). Ids are the 16 bytes of a UUID.
const VERSION_1_0: &str = "
-- Each job until its removal. While a job is live, its state here is 0 and its counters are in queue.
CREATE TABLE job (
    seq INTEGER PRIMARY KEY,
    id BLOB NOT NULL,
    method TEXT NOT NULL,
    params TEXT NOT NULL,
    key TEXT,
    priority INTEGER NOT NULL,
    max_attempts INTEGER NOT NULL,
    timeout_ms INTEGER NOT NULL,
    trace TEXT,
    created_at INTEGER NOT NULL,
    due_at INTEGER NOT NULL,
    expires_at INTEGER,
    state INTEGER NOT NULL DEFAULT 0,
    reason INTEGER,
    cause INTEGER,
    outcome TEXT,
    attempt INTEGER NOT NULL DEFAULT 0,
    crashes INTEGER NOT NULL DEFAULT 0,
    interruptions INTEGER NOT NULL DEFAULT 0,
    token INTEGER NOT NULL DEFAULT 0,
    started_at INTEGER,
    finished_at INTEGER
) STRICT;
CREATE UNIQUE INDEX job_id ON job (id);
CREATE INDEX job_end ON job (state, finished_at, seq, method) WHERE state > 0;

-- Each live job.
CREATE TABLE queue (
    seq INTEGER PRIMARY KEY,
    id BLOB NOT NULL,
    method TEXT NOT NULL,
    key TEXT,
    running INTEGER NOT NULL DEFAULT 0,
    priority INTEGER NOT NULL,
    due_at INTEGER NOT NULL,
    attempt INTEGER NOT NULL DEFAULT 0,
    max_attempts INTEGER NOT NULL,
    timeout_ms INTEGER NOT NULL,
    crashes INTEGER NOT NULL DEFAULT 0,
    interruptions INTEGER NOT NULL DEFAULT 0,
    token INTEGER NOT NULL DEFAULT 0,
    cause INTEGER,
    started_at INTEGER,
    owner BLOB,
    executor INTEGER,
    pid INTEGER,
    pid_start INTEGER,
    cancel INTEGER NOT NULL DEFAULT 0,
    expires_at INTEGER
) STRICT;
CREATE UNIQUE INDEX queue_id ON queue (id);
CREATE INDEX queue_due ON queue (method, priority DESC, due_at, seq) WHERE running = 0;
CREATE UNIQUE INDEX queue_key ON queue (method, key) WHERE key IS NOT NULL;
CREATE INDEX queue_owner ON queue (owner) WHERE running = 1;
CREATE INDEX queue_expiry ON queue (expires_at) WHERE expires_at IS NOT NULL AND running = 0;

-- Each instance that uses the store. alive_until is for engines with a lease.
CREATE TABLE instance (
    id BLOB PRIMARY KEY NOT NULL,
    host TEXT NOT NULL,
    pid INTEGER NOT NULL,
    version TEXT NOT NULL,
    alive_until INTEGER
) STRICT;

-- Methods that were paused once.
CREATE TABLE method (
    name TEXT PRIMARY KEY NOT NULL,
    paused INTEGER NOT NULL DEFAULT 0
) STRICT;

-- secret: 32 random bytes. full: whether the store is over max-size.
CREATE TABLE meta (
    name TEXT PRIMARY KEY NOT NULL,
    value BLOB NOT NULL
) STRICT;
";

/// Returns the SQL of the whole schema, as `preforkd job schema` prints it.
pub fn sql() -> String {
    let mut text = format!(
        "-- A job store of preforkd in SQLite, schema {}.{}\n\
         PRAGMA journal_mode = WAL;\n\
         PRAGMA application_id = {APPLICATION_ID};\n\
         PRAGMA user_version = {};\n",
        MAJOR,
        newest(STEPS),
        number((MAJOR, newest(STEPS)))
    );
    for step in STEPS {
        text.push_str(step.sql);
    }
    text
}

/// Returns the version of an open file: `None` if it is empty.
///
/// # Errors
/// The file is damaged, belongs to another program, or has another major version.
pub fn version(connection: &Connection, path: &Path) -> Result<Option<(u32, u32)>, OpenError> {
    let read = || -> rusqlite::Result<(i32, i64, i64)> {
        let pragma = |name: &str| connection.pragma_query_value(None, name, |row| row.get(0));
        let tables =
            connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
        Ok((
            pragma("application_id")? as i32,
            pragma("user_version")?,
            tables,
        ))
    };
    let (application, version, tables) = read().map_err(|error| fault::refused(&error, path))?;
    if application == 0 && version == 0 && tables == 0 {
        return Ok(None);
    }
    if application != APPLICATION_ID {
        return Err(OpenError::new(
            path,
            "it is a database of another program",
            "name a file of its own in jobs.store; preforkd creates it",
        ));
    }
    let version = u32::try_from(version).unwrap_or(u32::MAX);
    let (major, minor) = (version >> 16, version & 0xffff);
    if major != MAJOR {
        return Err(OpenError::new(
            path,
            format!(
                "it has the schema {major}.{minor}, and this version of preforkd knows {MAJOR}.x"
            ),
            "start the version of preforkd that wrote it, or name another file in jobs.store",
        ));
    }
    Ok(Some((major, minor)))
}

/// Creates the tables in an empty file, or adds what is missing in an older version. Returns the version that
/// the file has then: a newer minor version stays. `secret` is stored in a new file.
///
/// # Errors
/// The error of SQLite. Nothing was changed then.
pub fn migrate(
    connection: &mut Connection,
    found: Option<(u32, u32)>,
    steps: &[SchemaStep],
    secret: [u8; 32],
) -> rusqlite::Result<(u32, u32)> {
    let newest = newest(steps);
    let missing = |step: &&SchemaStep| found.is_none_or(|(_, minor)| step.minor > minor);
    if let Some(found) = found.filter(|(_, minor)| *minor >= newest) {
        return Ok(found);
    }
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    for step in steps.iter().filter(missing) {
        transaction.execute_batch(step.sql)?;
    }
    if found.is_none() {
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        let insert = "INSERT INTO meta (name, value) VALUES ('secret', ?1), ('full', x'00')";
        transaction.execute(insert, [&secret[..]])?;
    }
    let version = (MAJOR, newest);
    transaction.pragma_update(None, "user_version", number(version))?;
    transaction.commit()?;
    Ok(version)
}

fn newest(steps: &[SchemaStep]) -> u32 {
    steps.last().map_or(0, |step| step.minor)
}

/// Returns the version as `PRAGMA user_version` has it.
fn number((major, minor): (u32, u32)) -> i64 {
    i64::from((major << 16) | minor)
}
