//! Claims due jobs, and records which processes run them.

use super::super::request::{ClaimRequest, ClaimedJob};
use super::batch::{SqlBatch, sql_int};
use super::rows;
use crate::jobs::policy::turns;
use crate::jobs::record::{AttemptOwner, ProcessMark};
use crate::protocol::job_id::JobId;

/// Claims due jobs of the queues in their turn. Paused queues have none.
pub fn claim(
    batch: &mut SqlBatch<'_>,
    request: &ClaimRequest,
) -> rusqlite::Result<Vec<ClaimedJob>> {
    let mut paused = Vec::new();
    for share in &request.shares {
        if is_paused(batch, &share.method)? {
            paused.push(share.method.as_str());
        }
    }
    turns::deal(&request.shares, request.most, |method| {
        if paused.contains(&method) {
            return Ok(None);
        }
        match next_due(batch, method)? {
            Some(due) => take(batch, &due, method, request.owner).map(Some),
            None => Ok(None),
        }
    })
}

/// Records the process that runs an attempt. Returns false if the attempt is not the current one.
pub fn note_process(
    batch: &mut SqlBatch<'_>,
    (id, token): (JobId, u64),
    process: ProcessMark,
) -> rusqlite::Result<bool> {
    let sql =
        "UPDATE queue SET pid = ?3, pid_start = ?4 WHERE id = ?1 AND token = ?2 AND running = 1";
    let params = (
        &id.0[..],
        sql_int(token),
        process.pid,
        sql_int(process.start_time),
    );
    Ok(batch.execute(sql, params)? > 0)
}

/// Returns whether a method is paused.
pub fn is_paused(batch: &SqlBatch<'_>, method: &str) -> rusqlite::Result<bool> {
    let sql = "SELECT paused FROM method WHERE name = ?1";
    let paused = batch.first(sql, [method], |row| row.get(0))?;
    Ok(paused.unwrap_or(false))
}

/// A due job.
struct DueRow {
    seq: i64,
    id: JobId,
    token: i64,
    attempt: u32,
    max_attempts: u32,
    timeout_ms: u64,
    due_at: i64,
}

/// Returns the job of a queue that is to begin next. Jobs of a high priority that are not due yet stand in
/// front of due jobs in the index. So each priority is looked up on its own: at most 19 look-ups, however many
/// delayed jobs there are.
fn next_due(batch: &SqlBatch<'_>, method: &str) -> rusqlite::Result<Option<DueRow>> {
    let now = batch.now_sql();
    let mut below = i64::from(i8::MAX);
    loop {
        let sql = "SELECT priority FROM queue WHERE method = ?1 AND running = 0 AND priority < ?2 \
                   ORDER BY priority DESC LIMIT 1";
        let priority = batch.first(sql, (method, below), |row| row.get::<_, i64>(0))?;
        let Some(priority) = priority else {
            return Ok(None);
        };
        let sql = "SELECT seq, id, token, attempt, max_attempts, timeout_ms, due_at FROM queue \
                   WHERE method = ?1 AND running = 0 AND priority = ?2 AND due_at <= ?3 \
                   AND (expires_at IS NULL OR expires_at > ?3) ORDER BY due_at, seq LIMIT 1";
        let due = batch.first(sql, (method, priority, now), |row| {
            Ok(DueRow {
                seq: row.get(0)?,
                id: rows::id(row, 1)?,
                token: row.get(2)?,
                attempt: row.get(3)?,
                max_attempts: row.get(4)?,
                timeout_ms: rows::number(row, 5)?,
                due_at: row.get(6)?,
            })
        })?;
        if due.is_some() {
            return Ok(due);
        }
        below = priority;
    }
}

fn take(
    batch: &mut SqlBatch<'_>,
    due: &DueRow,
    method: &str,
    owner: AttemptOwner,
) -> rusqlite::Result<ClaimedJob> {
    let sql = "UPDATE queue SET running = 1, token = token + 1, attempt = attempt + 1, started_at = ?2, \
               owner = ?3, executor = ?4, pid = NULL, pid_start = NULL WHERE seq = ?1";
    let params = (
        due.seq,
        batch.now_sql(),
        &owner.instance.0[..],
        owner.executor,
    );
    batch.execute(sql, params)?;
    let sql = "SELECT params, trace FROM job WHERE seq = ?1";
    let content = batch.first(sql, [due.seq], |row| Ok((row.get(0)?, row.get(1)?)))?;
    let (params, trace) = content.ok_or(rusqlite::Error::QueryReturnedNoRows)?;
    Ok(ClaimedJob {
        id: due.id,
        token: due.token.unsigned_abs() + 1,
        method: method.to_owned(),
        params,
        attempt: due.attempt + 1,
        max_attempts: due.max_attempts,
        timeout_ms: due.timeout_ms,
        trace,
        due_ms: due.due_at.unsigned_abs(),
    })
}
