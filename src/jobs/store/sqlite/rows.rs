//! Reads rows as the types of the other layers.
//!
//! A value that no version writes is an error of the conversion, which counts as damage of the store.

use rusqlite::types::{FromSqlError, Type};
use rusqlite::{Error, Result, Row};

use crate::jobs::policy::UnixMs;
use crate::jobs::policy::states::{AttemptCause, EndReason, JobCounters, JobState};
use crate::jobs::record::{AttemptOwner, JobDetails, JobRecord, ProcessMark};
use crate::protocol::job_id::JobId;

/// What a decision about a live job needs.
#[derive(Debug, Clone)]
pub struct LiveRow {
    pub seq: i64,
    pub id: JobId,
    pub method: String,
    pub is_running: bool,
    pub due_at: i64,
    pub counters: JobCounters,
    pub token: i64,
    pub cause: Option<AttemptCause>,
    pub started_at: Option<i64>,
    /// `Some` iff it runs.
    pub owner: Option<AttemptOwner>,
    pub is_cancel_requested: bool,
}

impl LiveRow {
    /// Reads the columns in the order of `SqlBatch::live`.
    pub fn read(row: &Row<'_>) -> Result<Self> {
        let is_running = row.get(3)?;
        Ok(LiveRow {
            seq: row.get(0)?,
            id: id(row, 1)?,
            method: row.get(2)?,
            is_running,
            due_at: row.get(4)?,
            counters: counters(row, 5)?,
            token: row.get(9)?,
            cause: cause(row, 10)?,
            started_at: row.get(11)?,
            owner: match is_running {
                true => owner(row, 12)?,
                false => None,
            },
            is_cancel_requested: row.get(14)?,
        })
    }
}

/// The columns of a record, of `job j LEFT JOIN queue q USING (seq)`. Counters of a live job are in its
/// queue.
pub const RECORD: &str = "j.seq, j.id, j.method, j.state, q.running, \
    coalesce(q.attempt, j.attempt), j.max_attempts, coalesce(q.crashes, j.crashes), \
    coalesce(q.interruptions, j.interruptions), j.priority, j.key, j.created_at, \
    coalesce(q.due_at, j.due_at), coalesce(q.started_at, j.started_at), j.finished_at, j.expires_at, \
    j.reason, coalesce(q.cause, j.cause), j.outcome";

/// The columns of [`RECORD`], and the others.
pub const DETAILS: &str = ", j.params, j.timeout_ms, coalesce(q.token, j.token), j.trace, \
    q.owner, q.executor, q.pid, q.pid_start";

/// Reads the columns of [`RECORD`].
pub fn record(row: &Row<'_>) -> Result<JobRecord> {
    Ok(JobRecord {
        id: id(row, 1)?,
        method: row.get(2)?,
        state: state(row, 3, 4)?,
        counters: counters(row, 5)?,
        priority: row.get(9)?,
        key: row.get(10)?,
        created_ms: time(row, 11)?.unwrap_or_default(),
        due_ms: time(row, 12)?.unwrap_or_default(),
        started_ms: time(row, 13)?,
        finished_ms: time(row, 14)?,
        expires_ms: time(row, 15)?,
        reason: named(row, 16, EndReason::from_number)?,
        cause: cause(row, 17)?,
        json: row.get(18)?,
    })
}

/// Reads the columns of [`RECORD`] and [`DETAILS`].
pub fn details(row: &Row<'_>) -> Result<JobDetails> {
    let record = record(row)?;
    let is_running = record.state == JobState::Running;
    Ok(JobDetails {
        params: row.get(19)?,
        timeout_ms: number(row, 20)?,
        token: number(row, 21)?,
        trace: row.get(22)?,
        owner: match is_running {
            true => owner(row, 23)?,
            false => None,
        },
        process: match is_running {
            true => process(row, 25)?,
            false => None,
        },
        record,
    })
}

/// Reads the state of a job from the column of `job`, and `running` of `queue`, which is null if the job has
/// ended.
pub fn state(row: &Row<'_>, column: usize, running: usize) -> Result<JobState> {
    let stored: JobState = required(row, column, JobState::from_number)?;
    Ok(match row.get::<_, Option<bool>>(running)? {
        Some(true) => JobState::Running,
        Some(false) => JobState::Waiting,
        None => stored,
    })
}

/// Reads the cause of the end of an attempt.
pub fn cause(row: &Row<'_>, column: usize) -> Result<Option<AttemptCause>> {
    named(row, column, AttemptCause::from_number)
}

/// Reads an id.
pub fn id(row: &Row<'_>, column: usize) -> Result<JobId> {
    row.get(column).map(JobId)
}

/// Reads a process, which has two columns.
pub fn process(row: &Row<'_>, column: usize) -> Result<Option<ProcessMark>> {
    let pid: Option<i32> = row.get(column)?;
    let Some(pid) = pid else { return Ok(None) };
    let start_time = number(row, column + 1)?;
    Ok(Some(ProcessMark { pid, start_time }))
}

/// Reads a number that is not negative.
pub fn number(row: &Row<'_>, column: usize) -> Result<u64> {
    let number: i64 = row.get(column)?;
    u64::try_from(number).map_err(|_| out_of_range(column, number))
}

/// Reads a time, if there is one.
pub fn time(row: &Row<'_>, column: usize) -> Result<Option<UnixMs>> {
    let number: Option<i64> = row.get(column)?;
    number
        .map(|number| u64::try_from(number).map_err(|_| out_of_range(column, number)))
        .transpose()
}

fn counters(row: &Row<'_>, column: usize) -> Result<JobCounters> {
    Ok(JobCounters {
        attempt: row.get(column)?,
        max_attempts: row.get(column + 1)?,
        crashes: row.get(column + 2)?,
        interruptions: row.get(column + 3)?,
    })
}

fn owner(row: &Row<'_>, column: usize) -> Result<Option<AttemptOwner>> {
    let instance: Option<[u8; 16]> = row.get(column)?;
    let Some(instance) = instance else {
        return Ok(None);
    };
    Ok(Some(AttemptOwner {
        instance: JobId(instance),
        executor: row.get(column + 1)?,
    }))
}

fn named<T>(
    row: &Row<'_>,
    column: usize,
    from_number: impl FnOnce(i64) -> Option<T>,
) -> Result<Option<T>> {
    let number: Option<i64> = row.get(column)?;
    let Some(number) = number else {
        return Ok(None);
    };
    from_number(number)
        .map(Some)
        .ok_or_else(|| out_of_range(column, number))
}

fn required<T>(
    row: &Row<'_>,
    column: usize,
    from_number: impl FnOnce(i64) -> Option<T>,
) -> Result<T> {
    named(row, column, from_number)?.ok_or_else(|| out_of_range(column, 0))
}

fn out_of_range(column: usize, number: i64) -> Error {
    Error::FromSqlConversionFailure(
        column,
        Type::Integer,
        Box::new(FromSqlError::OutOfRange(number)),
    )
}
