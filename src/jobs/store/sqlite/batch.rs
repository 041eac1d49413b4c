//! Holds the state of a group while its transaction runs.
//!
//! The functions for the single requests are in the files beside this one. They change the tables through
//! [`SqlBatch`]. Counts that the engine keeps in memory are changed here, and become valid with the commit.

use rusqlite::{CachedStatement, Connection, OptionalExtension, Params, Row};

use super::super::request::StoreLimits;
use super::rows::LiveRow;
use crate::jobs::policy::UnixMs;
use crate::jobs::policy::states::{AttemptCause, EndReason, JobState};
use crate::protocol::job_id::JobId;

/// The state of a group.
pub struct SqlBatch<'c> {
    pub(super) connection: &'c Connection,
    /// The time of the whole group.
    pub now: UnixMs,
    pub limits: StoreLimits,
    /// Whether the store is over `max-size`.
    pub is_full: bool,
    /// The number of live jobs.
    pub live: u64,
    /// Bytes of params and results that were written.
    pub written: usize,
}

/// How a job ends.
pub struct JobEnd<'a> {
    pub state: JobState,
    pub reason: Option<EndReason>,
    /// `None` leaves the cause of an earlier attempt.
    pub cause: Option<AttemptCause>,
    /// The result or the error; `None` leaves the error of an earlier attempt.
    pub json: Option<&'a str>,
}

impl<'c> SqlBatch<'c> {
    /// Executes a statement. Returns the number of changed rows.
    pub fn execute(&self, sql: &str, params: impl Params) -> rusqlite::Result<usize> {
        self.connection.prepare_cached(sql)?.execute(params)
    }

    /// Returns the first row, if there is one.
    pub fn first<T>(
        &self,
        sql: &str,
        params: impl Params,
        read: impl FnOnce(&Row<'_>) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<Option<T>> {
        let mut statement = self.connection.prepare_cached(sql)?;
        statement.query_row(params, read).optional()
    }

    /// Returns a statement for a query of many rows.
    pub fn prepare(&self, sql: &str) -> rusqlite::Result<CachedStatement<'c>> {
        self.connection.prepare_cached(sql)
    }

    /// Returns the time as it is stored.
    pub fn now_sql(&self) -> i64 {
        sql_int(self.now)
    }

    /// Returns the row of a live job.
    pub fn live(&self, id: JobId) -> rusqlite::Result<Option<LiveRow>> {
        let sql = "SELECT seq, id, method, running, due_at, attempt, max_attempts, crashes, interruptions, \
                   token, cause, started_at, owner, executor, cancel FROM queue WHERE id = ?1";
        self.first(sql, [&id.0[..]], LiveRow::read)
    }

    /// Ends a live job: removes it from the queue and completes its row.
    pub fn end(&mut self, live: &LiveRow, end: &JobEnd<'_>) -> rusqlite::Result<()> {
        self.execute("DELETE FROM queue WHERE seq = ?1", [live.seq])?;
        let sql = "UPDATE job SET state = ?2, reason = ?3, cause = ?4, outcome = coalesce(?5, outcome), \
                   attempt = ?6, crashes = ?7, interruptions = ?8, token = ?9, started_at = ?10, \
                   finished_at = ?11, due_at = ?12 WHERE seq = ?1";
        let counters = &live.counters;
        let params = (
            live.seq,
            end.state.number(),
            end.reason.map(EndReason::number),
            end.cause.or(live.cause).map(AttemptCause::number),
            end.json,
            counters.attempt,
            counters.crashes,
            counters.interruptions,
            live.token,
            live.started_at,
            self.now_sql(),
            live.due_at,
        );
        self.execute(sql, params)?;
        self.live = self.live.saturating_sub(1);
        self.written += end.json.map_or(0, str::len);
        Ok(())
    }

    /// Does something that is undone if it returns false.
    pub fn undoable(
        &mut self,
        act: impl FnOnce(&mut Self) -> rusqlite::Result<bool>,
    ) -> rusqlite::Result<()> {
        self.execute("SAVEPOINT part", [])?;
        let live = self.live;
        if !act(self)? {
            self.execute("ROLLBACK TO part", [])?;
            self.live = live;
        }
        self.execute("RELEASE part", [])?;
        Ok(())
    }
}

/// Returns a number as SQLite stores it. A greater one becomes the greatest.
pub fn sql_int(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
