//! Opens connections to the file of a store, and sets what each needs.
//!
//! During a reload several processes of the instance write. SQLite gives its lock to any process that asks when it is
//! free, so a process that waits asks often.

use std::path::Path;
use std::thread;
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};

/// How often a statement tries to get the lock of the store while another process of this instance writes, and the time
/// between two tries.
const BUSY_TRIES: i32 = 1_000;
const BUSY_DELAY: Duration = Duration::from_millis(1);

/// Opens the file, which exists and is no symlink.
pub fn connect(path: &Path, mode: OpenFlags) -> rusqlite::Result<Connection> {
    let flags = mode | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_NOFOLLOW;
    let mut connection = Connection::open_with_flags(path, flags)?;
    connection.busy_handler(Some(wait_for_lock))?;
    connection.set_prepared_statement_cache_capacity(64);
    // Otherwise a statement is prepared again whenever its parameters differ, which takes longer than its execution.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    // A memory map would turn a read error into SIGBUS.
    connection.pragma_update(None, "mmap_size", 0)?;
    connection.pragma_update(None, "trusted_schema", false)?;
    connection.pragma_update(None, "cell_size_check", true)?;
    connection.pragma_update(None, "temp_store", "MEMORY")?;
    Ok(connection)
}

/// Waits a little, because another process has the lock. Returns whether to try again. SQLite's own delays grow to 100
/// ms, so a process that writes often would keep the lock from one that has waited long.
fn wait_for_lock(tries: i32) -> bool {
    thread::park_timeout(BUSY_DELAY);
    tries < BUSY_TRIES
}

/// Sets what a writing connection needs.
pub fn set_up(connection: &Connection) -> rusqlite::Result<()> {
    let mode: String =
        connection.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0))?;
    if !mode.eq_ignore_ascii_case("wal") {
        return Err(rusqlite::Error::InvalidQuery);
    }
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "wal_autocheckpoint", 0)?;
    connection.pragma_update(None, "journal_size_limit", 64 << 20)?;
    // In KiB.
    connection.pragma_update(None, "cache_size", -16_384)?;
    Ok(())
}

/// Writes the log into the database. Returns whether another connection prevented that, and the length of the
/// log in pages.
pub fn checkpoint(connection: &Connection, mode: &str) -> rusqlite::Result<(bool, i64)> {
    let sql = format!("PRAGMA wal_checkpoint({mode})");
    connection.query_row(&sql, [], |row| Ok((row.get(0)?, row.get(1)?)))
}

/// Returns the value of a pragma that is a number.
pub fn pragma(connection: &Connection, name: &str) -> rusqlite::Result<u64> {
    let value = connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
    value.map(i64::unsigned_abs)
}

/// Returns a number that differs after another connection has changed the file.
pub fn data_version(connection: &Connection) -> rusqlite::Result<i64> {
    connection.pragma_query_value(None, "data_version", |row| row.get(0))
}
