//! Keeps jobs in a SQLite file: the engine for one machine.
//!
//! One connection writes, with one transaction for each group. The log is synced by each commit
//! (`synchronous=FULL`). Checkpoints are this file's own work and happen after the answers of a group were
//! sent. The caller holds the instance lock, so no other instance writes. During a reload a second process of the
//! instance may write ([`Opening::Beside`]). So each transaction looks whether another connection has changed the file,
//! and then reads again what is kept in memory.
//!
//! [`open`] refuses what is no usable store. Later faults are reported and never retried here.

mod batch;
mod claim;
mod connection;
mod enqueue;
mod fault;
pub mod file;
mod operator;
mod read;
mod rows;
pub mod schema;
mod settle;
#[cfg(test)]
mod sqlite_tests;
mod wal;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags, TransactionBehavior};

use super::error::{OpenError, StoreError, StoreFault};
use super::request::{Maintained, StoreFacts, StoreLimits, StoreReply, StoreRequest};
use super::{Engine, Opening, StoreReader};
use crate::jobs::kill_point::{self, KillPoint};
use crate::jobs::policy::UnixMs;
use crate::jobs::policy::retention::{RetentionRules, RetentionScan};
use crate::jobs::record::{InstanceId, ProcessMark};
use batch::SqlBatch;
use connection::{checkpoint, connect, data_version, set_up};
use read::SqliteReader;

/// A checkpoint follows this number of changed rows.
const CHECKPOINT_ROWS: u64 = 8_000;

/// A checkpoint follows this number of commits. Behind it the log is written from its begin again. The sync of a log
/// that does not grow takes half as long, because the file system has no new size and blocks to record.
const CHECKPOINT_COMMITS: u32 = 200;

/// A checkpoint follows this number of bytes of params and results.
const CHECKPOINT_BYTES: usize = 8 << 20;

/// From this number of pages on, a checkpoint waits for the reader, so that the log does not grow forever.
const LONG_LOG: i64 = 32_768;

/// The largest number of rows of one kind that a pass of maintenance handles.
const MAINTENANCE_ROWS: usize = 1_000;

/// Returns the milliseconds since 1970.
pub type WallClock = Box<dyn Fn() -> UnixMs + Send>;

/// An open store.
pub struct SqliteEngine {
    connection: Connection,
    path: PathBuf,
    clock: WallClock,
    facts: StoreFacts,
    secret: Vec<u8>,
    limits: StoreLimits,
    is_full: bool,
    live: u64,
    /// It differs after another connection has changed the file.
    data_version: i64,
    scan: RetentionScan,
    /// The device and the number of the file, to notice that it was moved or deleted.
    file: (u64, u64),
    /// Whether the disk was full at the last write.
    had_no_room: bool,
    /// Changed rows at the last checkpoint; bytes and commits since then.
    rows_at_checkpoint: u64,
    written: usize,
    commits: u32,
}

/// Opens a store, and creates it at the [`Opening::First`] if its file does not exist. The caller holds the instance
/// lock. `secret` are random bytes for a new store. No other connection to the store may be open in this process:
/// closing any descriptor of a file releases all locks that the process has on it (fcntl(2)).
///
/// # Errors
/// Each says what is wrong with the store and what to change.
pub fn open(
    configured: &Path,
    limits: StoreLimits,
    clock: WallClock,
    (opening, secret): (Opening, [u8; 32]),
) -> Result<SqliteEngine, OpenError> {
    let place = file::locate(configured)?;
    let path = place.path;
    if opening != Opening::First && !place.has_content {
        // An empty store in its place would hide that jobs are missing.
        return Err(OpenError::new(
            &path,
            "the file was moved, deleted or emptied while the server used it",
            "stop the server and put the file back; a server that starts without it creates an empty store",
        )
        .damaged());
    }
    file::refuse_lone_log(&path, place.has_content)?;
    // A process that uses the store has checked the log. It syncs each commit, or exits.
    let is_shared = opening == Opening::Beside;
    if !is_shared {
        file::check_log(&path)?;
    }
    file::create(&path)?;
    let refused = |error: rusqlite::Error| fault::refused(&error, &path);
    let mut connection = connect(&path, OpenFlags::SQLITE_OPEN_READ_WRITE).map_err(refused)?;
    let found = schema::version(&connection, &path)?;
    set_up(&connection).map_err(refused)?;
    let schema = schema::migrate(&mut connection, found, schema::STEPS, secret).map_err(refused)?;
    // The log may have frames that were never synced, although they can be read. They are written to the
    // database now, which is synced. So an acknowledged commit never follows a frame that may be lost. Beside another
    // process, the log cannot be emptied: that would keep the other one from writing until all readers have ended.
    let mode = if is_shared { "PASSIVE" } else { "TRUNCATE" };
    let (is_busy, _) = checkpoint(&connection, mode).map_err(refused)?;
    if is_busy && !is_shared {
        return Err(OpenError::new(&path, "another process uses it", "stop that process").away());
    }
    check_pages(&connection, &path)?;
    let data_version = data_version(&connection).map_err(refused)?;
    let (waiting, running) = read::live_counts(&connection).map_err(refused)?;
    let secret = meta(&connection, "secret").map_err(refused)?;
    let is_full = is_full(&connection).map_err(refused)?;
    let facts = StoreFacts {
        location: path.display().to_string(),
        schema,
        is_durable: place.is_durable,
        waiting,
        running,
    };
    Ok(SqliteEngine {
        rows_at_checkpoint: connection.total_changes(),
        connection,
        clock,
        facts,
        secret,
        limits,
        is_full,
        live: waiting + running,
        data_version,
        scan: RetentionScan::default(),
        file: file::identity(&path).unwrap_or_default(),
        had_no_room: false,
        path,
        written: 0,
        commits: 0,
    })
}

/// Looks at a store without changing it, also while a server uses it. `None`: there is no file yet, or it is
/// empty. `is_thorough` reads the whole file, which takes seconds for each gigabyte.
///
/// # Errors
/// As for [`open`].
pub fn inspect(configured: &Path, is_thorough: bool) -> Result<Option<StoreFacts>, OpenError> {
    let place = file::locate(configured)?;
    let path = place.path;
    file::refuse_lone_log(&path, place.has_content)?;
    if !place.has_content {
        return Ok(None);
    }
    file::check_log(&path)?;
    let refused = |error: rusqlite::Error| fault::refused(&error, &path);
    let connection = connect(&path, OpenFlags::SQLITE_OPEN_READ_ONLY).map_err(refused)?;
    let Some(schema) = schema::version(&connection, &path)? else {
        return Ok(None);
    };
    check_pages(&connection, &path)?;
    if is_thorough {
        let check = "PRAGMA integrity_check(1)";
        let said: String = connection
            .query_row(check, [], |row| row.get(0))
            .map_err(refused)?;
        if said != "ok" {
            return Err(fault::damaged(&path, &said));
        }
    }
    let (waiting, running) = read::live_counts(&connection).map_err(|error| {
        let error = read::failed(&error);
        OpenError::new(&path, format!("it cannot be read ({error})"), "restore it")
    })?;
    Ok(Some(StoreFacts {
        location: path.display().to_string(),
        schema,
        is_durable: place.is_durable,
        waiting,
        running,
    }))
}

/// Returns a value that the store keeps of itself.
fn meta(connection: &Connection, name: &str) -> rusqlite::Result<Vec<u8>> {
    let sql = "SELECT value FROM meta WHERE name = ?1";
    connection.query_row(sql, [name], |row| row.get(0))
}

/// Returns whether the store was over `max-size` when it was measured last.
fn is_full(connection: &Connection) -> rusqlite::Result<bool> {
    let full = meta(connection, "full")?;
    Ok(full.first().is_some_and(|byte| *byte != 0))
}

/// Refuses a file that is shorter than its pages.
fn check_pages(connection: &Connection, path: &Path) -> Result<(), OpenError> {
    let pragma = |name| connection::pragma(connection, name);
    let read = || Ok((pragma("page_count")?, pragma("page_size")?));
    let (pages, size) = read().map_err(|error| fault::refused(&error, path))?;
    // Pages that are in the log alone are not missing.
    let has_log = std::fs::metadata(file::log_of(path)).is_ok_and(|log| log.len() > 0);
    match has_log {
        true => Ok(()),
        false => file::check_length(path, pages, size),
    }
}

impl SqliteEngine {
    /// Runs `act` in a transaction and commits it. The counts in memory change only then.
    fn transaction<T>(
        &mut self,
        attempt: &str,
        act: impl FnOnce(&mut SqlBatch<'_>, &mut RetentionScan) -> rusqlite::Result<T>,
    ) -> Result<T, StoreError> {
        let done = self.try_transaction(attempt, act);
        let fault = done.as_ref().err().map(|error| error.fault);
        self.had_no_room = fault == Some(StoreFault::Full);
        done
    }

    fn try_transaction<T>(
        &mut self,
        attempt: &str,
        act: impl FnOnce(&mut SqlBatch<'_>, &mut RetentionScan) -> rusqlite::Result<T>,
    ) -> Result<T, StoreError> {
        let now = (self.clock)();
        self.scan.clock(now);
        let failed = |error: rusqlite::Error| fault::store_error(attempt, &error);
        let transaction = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(failed)?;
        let version = data_version(&transaction).map_err(failed)?;
        if version != self.data_version {
            let count = "SELECT count(*) FROM queue";
            let live = transaction.query_row(count, [], |row| rows::number(row, 0));
            self.live = live.map_err(failed)?;
            self.is_full = is_full(&transaction).map_err(failed)?;
            self.data_version = version;
        }
        let mut batch = SqlBatch {
            connection: &transaction,
            now,
            limits: self.limits,
            is_full: self.is_full,
            live: self.live,
            written: 0,
        };
        let done = act(&mut batch, &mut self.scan).map_err(failed)?;
        let (live, is_full, written) = (batch.live, batch.is_full, batch.written);
        transaction
            .commit()
            .map_err(|error| fault::commit_error(&error))?;
        (self.live, self.is_full) = (live, is_full);
        self.written += written;
        self.commits += 1;
        Ok(done)
    }

    /// # Errors
    /// If the path no longer names the open file. Whatever is stored then is lost when the store is closed.
    fn check_place(&self) -> Result<(), StoreError> {
        let is_in_place = match file::identity(&self.path) {
            Ok(found) => found == self.file,
            Err(error) => error.kind() != ErrorKind::NotFound,
        };
        if is_in_place {
            return Ok(());
        }
        let text = "its file was moved, replaced or deleted while the server used it";
        Err(StoreError::new(StoreFault::Corrupt, text))
    }

    /// Returns bytes of data and indexes, without free pages.
    fn size(&self) -> Result<u64, StoreError> {
        let pragma = |name| connection::pragma(&self.connection, name);
        let read = || {
            let used = pragma("page_count")?.saturating_sub(pragma("freelist_count")?);
            Ok(used * pragma("page_size")?)
        };
        read().map_err(|error| fault::store_error("measure the store", &error))
    }
}

fn run(batch: &mut SqlBatch<'_>, request: &StoreRequest) -> rusqlite::Result<StoreReply> {
    Ok(match request {
        StoreRequest::Join(instance) => StoreReply::Joined(settle::join(batch, instance)?),
        StoreRequest::Leave(instance) => {
            batch.execute("DELETE FROM instance WHERE id = ?1", [&instance.0[..]])?;
            StoreReply::Left
        }
        StoreRequest::Enqueue(jobs) => StoreReply::Enqueued(enqueue::enqueue(batch, jobs)?),
        StoreRequest::Claim(request) => StoreReply::Claimed(claim::claim(batch, request)?),
        StoreRequest::NoteProcess { id, token, process } => {
            StoreReply::Noted(claim::note_process(batch, (*id, *token), *process)?)
        }
        StoreRequest::Settle(settlement) => StoreReply::Settled(settle::settle(batch, settlement)?),
        StoreRequest::Cancel(id) => StoreReply::Cancelled(settle::cancel(batch, *id)?),
        StoreRequest::Retry(selection) => StoreReply::Retried(operator::retry(batch, selection)?),
        StoreRequest::Purge(selection) => StoreReply::Purged(operator::purge(batch, selection)?),
        StoreRequest::Pause { method, is_paused } => {
            operator::pause(batch, method, *is_paused)?;
            StoreReply::Paused
        }
        StoreRequest::Import(jobs) => StoreReply::Imported(enqueue::import(batch, jobs)?),
    })
}

impl Engine for SqliteEngine {
    #[cfg(test)]
    fn now_ms(&mut self) -> Result<UnixMs, StoreError> {
        Ok((self.clock)())
    }

    fn facts(&self) -> &StoreFacts {
        &self.facts
    }

    fn secret(&self) -> &[u8] {
        &self.secret
    }

    #[cfg(test)]
    fn set_limits(&mut self, limits: StoreLimits) {
        self.limits = limits;
    }

    fn execute(&mut self, requests: &[StoreRequest]) -> Result<Vec<StoreReply>, StoreError> {
        self.check_place()?;
        let is_import = |request: &StoreRequest| matches!(request, StoreRequest::Import(_));
        self.transaction("execute a group", |batch, scan| {
            if requests.iter().any(is_import) {
                scan.restart();
            }
            let replies = requests.iter().map(|request| run(batch, request));
            let replies = replies.collect();
            kill_point::reached(KillPoint::BeforeCommit);
            replies
        })
    }

    fn after_commit(&mut self) -> Result<(), StoreError> {
        let rows = self.connection.total_changes();
        let changed = rows.saturating_sub(self.rows_at_checkpoint);
        let is_short = self.written < CHECKPOINT_BYTES && self.commits < CHECKPOINT_COMMITS;
        if changed < CHECKPOINT_ROWS && is_short {
            return Ok(());
        }
        let failed =
            |error: rusqlite::Error| fault::store_error("write the log into the store", &error);
        let (_, pages) = checkpoint(&self.connection, "PASSIVE").map_err(failed)?;
        if pages > LONG_LOG {
            checkpoint(&self.connection, "RESTART").map_err(failed)?;
        }
        (self.rows_at_checkpoint, self.written, self.commits) = (rows, 0, 0);
        Ok(())
    }

    fn maintain(&mut self, rules: &RetentionRules) -> Result<Maintained, StoreError> {
        self.check_place()?;
        let size = self.size()?;
        let probes = self.had_no_room;
        let is_full = size > self.limits.max_size;
        let was_full = self.is_full;
        let (expired, removed, is_complete) = self
            .transaction("maintain the store", |batch, scan| {
                batch.is_full = is_full;
                if is_full != was_full {
                    let sql = "UPDATE meta SET value = ?1 WHERE name = 'full'";
                    batch.execute(sql, [&[u8::from(is_full)][..]])?;
                }
                if probes {
                    // Reads succeed on a full disk. Only a write shows that there is room again.
                    let sql = "INSERT OR REPLACE INTO meta VALUES ('probe', randomblob(8))";
                    batch.execute(sql, [])?;
                }
                let expired = settle::expire(batch, MAINTENANCE_ROWS)?;
                let (removed, is_complete) =
                    operator::remove_old(batch, scan, rules, MAINTENANCE_ROWS)?;
                let is_complete = is_complete && expired.len() < MAINTENANCE_ROWS;
                Ok((expired, removed, is_complete))
            })
            .inspect_err(|_| self.scan = RetentionScan::default())?;
        Ok(Maintained {
            expired,
            removed,
            size,
            is_full,
            is_complete,
        })
    }

    fn next_event_ms(&mut self, methods: &[&str]) -> Result<Option<UnixMs>, StoreError> {
        read::next_event(&self.connection, methods)
            .map_err(|error| fault::store_error("find the next due job", &error))
    }

    fn leftovers(&mut self, own: InstanceId) -> Result<Vec<ProcessMark>, StoreError> {
        read::leftovers(&self.connection, own)
            .map_err(|error| fault::store_error("find processes of another instance", &error))
    }

    fn reader(&self) -> Result<Box<dyn StoreReader>, StoreError> {
        let connection = connect(&self.path, OpenFlags::SQLITE_OPEN_READ_ONLY);
        match connection {
            Ok(connection) => Ok(Box::new(SqliteReader::new(connection))),
            Err(error) => Err(fault::store_error("open the store for reading", &error)),
        }
    }

    fn close(self: Box<Self>) -> Result<(), StoreError> {
        let failed = |error: rusqlite::Error| fault::store_error("close the store", &error);
        checkpoint(&self.connection, "TRUNCATE").map_err(failed)?;
        self.connection.close().map_err(|(_, error)| failed(error))
    }
}
