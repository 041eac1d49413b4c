//! Reads the store for clients and operators, on a connection of its own.
//!
//! Each query is a transaction of its own. So it sees all groups that were committed before, and never delays
//! the next one.

use rusqlite::{Connection, OptionalExtension, Row};

use super::super::StoreReader;
use super::super::error::StoreError;
use super::super::request::{
    ListCursor, ListFilter, ListPage, QueueCounts, RunningAttempt, StoreCounts,
};
use super::super::{EXPORT_PAGE, LIST_PAGE};
use super::batch::sql_int;
use super::{fault, rows};
use crate::jobs::policy::UnixMs;
use crate::jobs::policy::states::JobState;
use crate::jobs::record::{InstanceId, JobDetails, JobRecord, ProcessMark};
use crate::protocol::job_id::JobId;

/// The largest number of rows that a page of a list reads.
const MOST_ROWS: usize = 20_000;

const FROM: &str = "FROM job j LEFT JOIN queue q USING (seq)";

/// The reading side of a SQLite store.
pub struct SqliteReader {
    connection: Connection,
}

impl SqliteReader {
    pub fn new(connection: Connection) -> Self {
        SqliteReader { connection }
    }

    fn one<T>(
        &mut self,
        sql: &str,
        id: JobId,
        read: impl FnOnce(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Option<T>, StoreError> {
        let first = || {
            let mut statement = self.connection.prepare_cached(sql)?;
            statement.query_row([&id.0[..]], read).optional()
        };
        first().map_err(|error| failed(&error))
    }
}

/// Returns the numbers of waiting and running jobs.
pub fn live_counts(connection: &Connection) -> rusqlite::Result<(u64, u64)> {
    let sql = "SELECT count(*) FILTER (WHERE running = 0), count(*) FILTER (WHERE running = 1) FROM queue";
    connection.query_row(sql, [], |row| {
        Ok((rows::number(row, 0)?, rows::number(row, 1)?))
    })
}

impl StoreReader for SqliteReader {
    fn record(&mut self, id: JobId) -> Result<Option<JobRecord>, StoreError> {
        let sql = format!("SELECT {} {FROM} WHERE j.id = ?1", rows::RECORD);
        self.one(&sql, id, rows::record)
    }

    fn details(&mut self, id: JobId) -> Result<Option<JobDetails>, StoreError> {
        let (record, more) = (rows::RECORD, rows::DETAILS);
        let sql = format!("SELECT {record}{more} {FROM} WHERE j.id = ?1");
        self.one(&sql, id, rows::details)
    }

    fn list(&mut self, filter: &ListFilter, most: usize) -> Result<ListPage, StoreError> {
        list(&self.connection, filter, most.min(LIST_PAGE)).map_err(|error| failed(&error))
    }

    fn counts(&mut self, now: UnixMs) -> Result<StoreCounts, StoreError> {
        counts(&self.connection, sql_int(now)).map_err(|error| failed(&error))
    }

    fn running(&mut self, owner: InstanceId) -> Result<Vec<RunningAttempt>, StoreError> {
        let read = || {
            let sql = "SELECT id, token, method, executor, cancel, pid, pid_start FROM queue \
                       WHERE running = 1 AND owner = ?1 ORDER BY seq";
            let mut statement = self.connection.prepare_cached(sql)?;
            let found = statement.query_map([&owner.0[..]], |row| {
                Ok(RunningAttempt {
                    id: rows::id(row, 0)?,
                    token: rows::number(row, 1)?,
                    method: row.get(2)?,
                    executor: row.get(3)?,
                    is_cancel_requested: row.get(4)?,
                    process: rows::process(row, 5)?,
                })
            })?;
            found.collect::<rusqlite::Result<_>>()
        };
        read().map_err(|error| failed(&error))
    }

    fn export(&mut self, after: u64) -> Result<(Vec<JobDetails>, u64), StoreError> {
        export(&self.connection, after).map_err(|error| failed(&error))
    }
}

pub fn failed(error: &rusqlite::Error) -> StoreError {
    fault::store_error("read the store", error)
}

/// Returns a page of a list. Each kind of list goes along an index: ended jobs by their end, live jobs by
/// their number.
fn list(connection: &Connection, filter: &ListFilter, most: usize) -> rusqlite::Result<ListPage> {
    let after = filter.after.unwrap_or_default();
    let source = match filter.state {
        None => format!("{FROM} WHERE j.seq > ?2 AND ?1 >= 0 ORDER BY j.seq"),
        Some(state) if state.is_ended() => format!(
            "{FROM} WHERE j.state > 0 AND j.state = {} AND (j.finished_at, j.seq) > (?1, ?2) \
             ORDER BY j.finished_at, j.seq",
            state.number()
        ),
        Some(state) => format!(
            "FROM queue q JOIN job j USING (seq) WHERE q.running = {} AND q.seq > ?2 AND ?1 >= 0 \
             ORDER BY q.seq",
            u8::from(state == JobState::Running)
        ),
    };
    let sql = format!("SELECT {} {source} LIMIT ?3", rows::RECORD);
    let mut statement = connection.prepare_cached(&sql)?;
    let limit = sql_int(MOST_ROWS as u64);
    let params = (sql_int(after.end_ms), sql_int(after.seq), limit);
    let mut found = statement.query(params)?;
    let (mut page, mut seen) = (ListPage::default(), 0);
    let mut last = None;
    while page.jobs.len() < most {
        let Some(row) = found.next()? else {
            page.next = last.filter(|_| seen == MOST_ROWS);
            return Ok(page);
        };
        seen += 1;
        let record = rows::record(row)?;
        last = Some(ListCursor {
            end_ms: match filter.state {
                Some(state) if state.is_ended() => record.finished_ms.unwrap_or_default(),
                _ => 0,
            },
            seq: rows::number(row, 0)?,
        });
        if filter
            .method
            .as_ref()
            .is_none_or(|method| *method == record.method)
        {
            page.jobs.push(record);
        }
    }
    page.next = last;
    Ok(page)
}

fn export(connection: &Connection, after: u64) -> rusqlite::Result<(Vec<JobDetails>, u64)> {
    let (record, more) = (rows::RECORD, rows::DETAILS);
    let sql = format!("SELECT {record}{more} {FROM} WHERE j.seq > ?1 ORDER BY j.seq");
    let mut statement = connection.prepare_cached(&sql)?;
    let mut found = statement.query([sql_int(after)])?;
    let (mut jobs, mut last, mut size) = (Vec::new(), after, 0);
    while size < EXPORT_PAGE
        && let Some(row) = found.next()?
    {
        let job = rows::details(row)?;
        size += job.size();
        last = rows::number(row, 0)?;
        jobs.push(job);
    }
    Ok((jobs, last))
}

fn counts(connection: &Connection, now: i64) -> rusqlite::Result<StoreCounts> {
    // Two partial indexes have all columns of these queries: no row of the tables is read.
    let sql = "SELECT method, 0, count(*), count(*) FILTER (WHERE due_at <= ?1), 0, 0, \
                   min(due_at) FILTER (WHERE due_at <= ?1), 0 \
                   FROM queue WHERE running = 0 GROUP BY method \
               UNION ALL SELECT method, 1, 0, 0, count(*), 0, NULL, 0 \
                   FROM queue WHERE running = 1 GROUP BY method \
               UNION ALL SELECT method, 2, 0, 0, 0, count(*), NULL, 0 \
                   FROM job WHERE state > 0 AND state = ?2 GROUP BY method \
               UNION ALL SELECT name, 3, 0, 0, 0, 0, NULL, paused FROM method WHERE paused = 1 \
               ORDER BY 1, 2";
    let mut statement = connection.prepare_cached(sql)?;
    let mut found = statement.query((now, JobState::Dead.number()))?;
    let mut queues: Vec<QueueCounts> = Vec::new();
    while let Some(row) = found.next()? {
        let method: String = row.get(0)?;
        if queues.last().is_none_or(|last| last.method != method) {
            queues.push(QueueCounts {
                method,
                ..QueueCounts::default()
            });
        }
        let Some(counts) = queues.last_mut() else {
            break;
        };
        counts.waiting += rows::number(row, 2)?;
        counts.due += rows::number(row, 3)?;
        counts.running += rows::number(row, 4)?;
        counts.dead += rows::number(row, 5)?;
        counts.oldest_due_ms = counts.oldest_due_ms.or(rows::time(row, 6)?);
        counts.is_paused |= row.get::<_, bool>(7)?;
    }
    Ok(StoreCounts { queues })
}

/// Returns when the next waiting job of these methods is due, or any job expires.
pub fn next_event(connection: &Connection, methods: &[&str]) -> rusqlite::Result<Option<UnixMs>> {
    let sql = "SELECT min(expires_at) FROM queue WHERE expires_at IS NOT NULL AND running = 0";
    let mut expiry = connection.prepare_cached(sql)?;
    let mut next: Option<i64> = expiry.query_row([], |row| row.get(0))?;
    let mut paused = connection.prepare_cached("SELECT paused FROM method WHERE name = ?1")?;
    // Like a claim: one look-up for each priority that occurs.
    let sql = "SELECT priority FROM queue WHERE method = ?1 AND running = 0 AND priority < ?2 \
               ORDER BY priority DESC LIMIT 1";
    let mut priorities = connection.prepare_cached(sql)?;
    let sql = "SELECT due_at FROM queue WHERE method = ?1 AND running = 0 AND priority = ?2 \
               ORDER BY due_at LIMIT 1";
    let mut due = connection.prepare_cached(sql)?;
    for method in methods {
        let is_paused = paused.query_row([method], |row| row.get(0)).optional()?;
        if is_paused.unwrap_or(false) {
            continue;
        }
        let mut below = i64::from(i8::MAX);
        loop {
            let priority = priorities.query_row((method, below), |row| row.get(0));
            let Some(priority) = priority.optional()? else {
                break;
            };
            below = priority;
            let first: i64 = due.query_row((method, below), |row| row.get(0))?;
            next = Some(next.map_or(first, |next| next.min(first)));
        }
    }
    Ok(next.map(i64::unsigned_abs))
}

/// Returns the processes that run attempts of other instances than `own`.
pub fn leftovers(connection: &Connection, own: InstanceId) -> rusqlite::Result<Vec<ProcessMark>> {
    let sql = "SELECT pid, pid_start FROM queue INDEXED BY queue_owner WHERE running = 1 AND owner <> ?1 \
               AND pid IS NOT NULL ORDER BY seq";
    let mut statement = connection.prepare_cached(sql)?;
    let found = statement.query_map([&own.0[..]], |row| rows::process(row, 0))?;
    let found: Vec<Option<ProcessMark>> = found.collect::<Result<_, _>>()?;
    Ok(found.into_iter().flatten().collect())
}
