//! Stores new jobs and imported ones.

use super::super::request::{EnqueueReply, EnqueuedJob};
use super::batch::{SqlBatch, sql_int};
use super::rows;
use crate::jobs::policy::enqueue::NewJob;
use crate::jobs::policy::states::{AttemptCause, EndReason, JobState};
use crate::jobs::record::JobDetails;
use crate::protocol::job_id::JobId;

/// Stores all of these jobs or none.
pub fn enqueue(batch: &mut SqlBatch<'_>, jobs: &[NewJob]) -> rusqlite::Result<EnqueueReply> {
    let mut stored = Vec::with_capacity(jobs.len());
    let mut refusal = None;
    let mut store_all = |batch: &mut SqlBatch<'_>| -> rusqlite::Result<bool> {
        for (index, job) in jobs.iter().enumerate() {
            refusal = Some(match store(batch, job)? {
                StoreOutcome::Stored(job) => {
                    stored.push(job);
                    continue;
                }
                StoreOutcome::Conflict => EnqueueReply::Conflict { index, id: job.id },
                StoreOutcome::TooMany => EnqueueReply::TooMany,
                StoreOutcome::StoreFull => EnqueueReply::StoreFull,
            });
            return Ok(false);
        }
        Ok(true)
    };
    match jobs.len() {
        // A single job is refused before anything is written.
        1 => {
            store_all(batch)?;
        }
        _ => batch.undoable(store_all)?,
    }
    Ok(refusal.unwrap_or(EnqueueReply::Stored(stored)))
}

/// Stores exported jobs, except those that the store already has. A live job is also left out if another live job has
/// its method and key. Returns how many were stored.
pub fn import(batch: &mut SqlBatch<'_>, jobs: &[JobDetails]) -> rusqlite::Result<usize> {
    let mut stored = 0;
    for job in jobs {
        let record = &job.record;
        let is_live = !record.state.is_ended();
        let is_known = known(batch, record.id)?.is_some();
        let has_key_twin = match &record.key {
            Some(key) if is_live => live_with_key(batch, &record.method, key)?.is_some(),
            _ => false,
        };
        if is_known || has_key_twin {
            continue;
        }
        insert_imported(batch, job)?;
        stored += 1;
    }
    Ok(stored)
}

/// What became of one job.
enum StoreOutcome {
    Stored(EnqueuedJob),
    Conflict,
    TooMany,
    StoreFull,
}

fn store(batch: &mut SqlBatch<'_>, job: &NewJob) -> rusqlite::Result<StoreOutcome> {
    if let Some((method, params, existing)) = known(batch, job.id)? {
        let is_same = method == job.method && params == job.params;
        return Ok(if is_same {
            StoreOutcome::Stored(existing)
        } else {
            StoreOutcome::Conflict
        });
    }
    if let Some(key) = &job.key
        && let Some(existing) = live_with_key(batch, &job.method, key)?
    {
        return Ok(StoreOutcome::Stored(existing));
    }
    if batch.is_full {
        return Ok(StoreOutcome::StoreFull);
    }
    if batch.live >= batch.limits.max_jobs {
        return Ok(StoreOutcome::TooMany);
    }
    let due_ms = job.due.at(batch.now);
    insert(batch, job, sql_int(due_ms))?;
    Ok(StoreOutcome::Stored(EnqueuedJob {
        id: job.id,
        state: JobState::Waiting,
        is_new: true,
        due_ms,
    }))
}

fn insert(batch: &mut SqlBatch<'_>, job: &NewJob, due_at: i64) -> rusqlite::Result<()> {
    let expires_at = (job.expires_ms).map(|expires| sql_int(batch.now.saturating_add(expires)));
    let sql = "INSERT INTO job (id, method, params, key, priority, max_attempts, timeout_ms, trace, \
               created_at, due_at, expires_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)";
    let params = (
        &job.id.0[..],
        &job.method,
        &job.params,
        &job.key,
        job.priority,
        job.max_attempts,
        sql_int(job.timeout_ms),
        &job.trace,
        batch.now_sql(),
        due_at,
        expires_at,
    );
    batch.execute(sql, params)?;
    let sql = "INSERT INTO queue (seq, id, method, key, priority, due_at, max_attempts, timeout_ms, \
               expires_at) VALUES (last_insert_rowid(), ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
    let params = (
        &job.id.0[..],
        &job.method,
        &job.key,
        job.priority,
        due_at,
        job.max_attempts,
        sql_int(job.timeout_ms),
        expires_at,
    );
    batch.execute(sql, params)?;
    batch.live += 1;
    batch.written += job.params.len();
    Ok(())
}

/// Inserts an exported job. If the job was running at the export, its attempt counts as lost and the job waits again.
fn insert_imported(batch: &mut SqlBatch<'_>, job: &JobDetails) -> rusqlite::Result<()> {
    let record = &job.record;
    let counters = &record.counters;
    let is_live = !record.state.is_ended();
    let state = if is_live {
        JobState::Waiting
    } else {
        record.state
    };
    let due_at = sql_int(record.due_ms);
    let expires_at = record.expires_ms.map(sql_int);
    let started_at = record.started_ms.map(sql_int);
    let cause = match record.state {
        JobState::Running => Some(AttemptCause::Lost.number()),
        _ => record.cause.map(AttemptCause::number),
    };
    let sql = "INSERT INTO job (id, method, params, key, priority, max_attempts, timeout_ms, trace, \
               created_at, due_at, expires_at, state, reason, cause, outcome, finished_at) \
               VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16)";
    let params = (
        &record.id.0[..],
        &record.method,
        &job.params,
        &record.key,
        record.priority,
        counters.max_attempts,
        sql_int(job.timeout_ms),
        &job.trace,
        sql_int(record.created_ms),
        due_at,
        expires_at,
        state.number(),
        record.reason.map(EndReason::number),
        cause,
        &record.json,
        record.finished_ms.map(sql_int),
    );
    batch.execute(sql, params)?;
    batch.written += job.params.len() + record.json.as_ref().map_or(0, |json| json.len());
    let token = sql_int(job.token);
    if !is_live {
        let sql = "UPDATE job SET attempt = ?1, crashes = ?2, interruptions = ?3, token = ?4, \
                   started_at = ?5 WHERE seq = last_insert_rowid()";
        let (attempt, crashes) = (counters.attempt, counters.crashes);
        let params = (attempt, crashes, counters.interruptions, token, started_at);
        batch.execute(sql, params)?;
        return Ok(());
    }
    let sql = "INSERT INTO queue (seq, id, method, key, priority, due_at, attempt, max_attempts, \
               timeout_ms, crashes, interruptions, token, cause, started_at, expires_at) \
               VALUES (last_insert_rowid(), ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14)";
    let params = (
        &record.id.0[..],
        &record.method,
        &record.key,
        record.priority,
        due_at,
        counters.attempt,
        counters.max_attempts,
        sql_int(job.timeout_ms),
        counters.crashes,
        counters.interruptions,
        token,
        cause,
        started_at,
        expires_at,
    );
    batch.execute(sql, params)?;
    batch.live += 1;
    Ok(())
}

/// Returns method, params and state of the job with this id.
fn known(
    batch: &SqlBatch<'_>,
    id: JobId,
) -> rusqlite::Result<Option<(String, Box<str>, EnqueuedJob)>> {
    let sql = "SELECT j.method, j.params, j.state, q.running, coalesce(q.due_at, j.due_at) \
               FROM job j LEFT JOIN queue q USING (seq) WHERE j.id = ?1";
    batch.first(sql, [&id.0[..]], |row| {
        let state = rows::state(row, 2, 3)?;
        let existing = EnqueuedJob {
            id,
            state,
            is_new: false,
            due_ms: rows::number(row, 4)?,
        };
        Ok((row.get(0)?, row.get(1)?, existing))
    })
}

/// Returns the live job of a method with this key.
fn live_with_key(
    batch: &SqlBatch<'_>,
    method: &str,
    key: &str,
) -> rusqlite::Result<Option<EnqueuedJob>> {
    let sql = "SELECT id, running, due_at FROM queue WHERE method = ?1 AND key = ?2";
    batch.first(sql, (method, key), |row| {
        let is_running: bool = row.get(1)?;
        Ok(EnqueuedJob {
            id: rows::id(row, 0)?,
            state: if is_running {
                JobState::Running
            } else {
                JobState::Waiting
            },
            is_new: false,
            due_ms: rows::number(row, 2)?,
        })
    })
}
