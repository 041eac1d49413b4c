//! Stores how attempts ended: settlements, cancel requests, and attempts of instances that are gone.

use super::super::request::{
    CancelReply, EndedJob, FreedAttempt, InstanceInfo, SettleReply, Settlement,
};
use super::batch::{JobEnd, SqlBatch, sql_int};
use super::rows::{self, LiveRow};
use crate::jobs::policy::states::{
    self, AttemptCause, AttemptEnd, EndReason, JobFate, JobState, RetryRules,
};
use crate::jobs::record::InstanceId;
use crate::protocol::job_id::JobId;

/// The error that a job keeps if its instance ended during the attempt.
const LOST: &str = r#"{"code":-32003,"name":"crashed","message":"the server that ran this attempt ended","started":true}"#;

/// Stores the end of an attempt, if the attempt is the current one.
pub fn settle(batch: &mut SqlBatch<'_>, settlement: &Settlement) -> rusqlite::Result<SettleReply> {
    let token = sql_int(settlement.token);
    let live = match batch.live(settlement.id)? {
        Some(live) if live.is_running && live.token == token => live,
        Some(live) => {
            return Ok(not_current(settlement, live.token, live.cause));
        }
        None => {
            let sql = "SELECT token, cause FROM job WHERE id = ?1";
            let ended = batch.first(sql, [&settlement.id.0[..]], |row| {
                Ok((row.get(0)?, rows::cause(row, 1)?))
            })?;
            return Ok(match ended {
                Some((current, cause)) => not_current(settlement, current, cause),
                None => SettleReply::Stale { current: None },
            });
        }
    };
    let now_and_jitter = (batch.now, settlement.jitter);
    let fate = end_attempt(
        batch,
        live,
        &settlement.end,
        (&settlement.rules, now_and_jitter),
    )?;
    Ok(SettleReply::Stored(fate))
}

/// Cancels a waiting job, or records the request for a running one.
pub fn cancel(batch: &mut SqlBatch<'_>, id: JobId) -> rusqlite::Result<CancelReply> {
    let Some(live) = batch.live(id)? else {
        let sql = "SELECT 1 FROM job WHERE id = ?1";
        let is_known = batch.first(sql, [&id.0[..]], |_| Ok(()))?.is_some();
        return Ok(match is_known {
            true => CancelReply::WasEnded,
            false => CancelReply::NoSuchJob,
        });
    };
    let Some(owner) = live.owner else {
        let end = JobEnd {
            state: JobState::Cancelled,
            reason: None,
            cause: None,
            json: None,
        };
        batch.end(&live, &end)?;
        let method = live.method;
        return Ok(CancelReply::Ended { method });
    };
    batch.execute("UPDATE queue SET cancel = 1 WHERE seq = ?1", [live.seq])?;
    Ok(CancelReply::Requested {
        owner,
        token: live.token.unsigned_abs(),
    })
}

/// Registers an instance and frees the attempts of all others. The caller holds the instance lock, so the
/// others have ended.
pub fn join(
    batch: &mut SqlBatch<'_>,
    instance: &InstanceInfo,
) -> rusqlite::Result<Vec<FreedAttempt>> {
    let id = &instance.id.0[..];
    batch.execute("DELETE FROM instance WHERE id <> ?1", [id])?;
    let sql = "INSERT OR IGNORE INTO instance (id, host, pid, version) VALUES (?1, ?2, ?3, ?4)";
    let params = (id, &instance.host, instance.pid, &instance.version);
    batch.execute(sql, params)?;
    let end = AttemptEnd::without_answer(AttemptCause::Lost, Some(LOST.into()));
    // Without a backoff and without a counted crash, only the number of attempts matters.
    let rules = RetryRules {
        backoff_ms: 0,
        max_backoff_ms: 0,
        max_crashes: u32::MAX,
        max_result: usize::MAX,
    };
    let mut freed = Vec::new();
    for live in lost_attempts(batch, instance.id)? {
        let (id, method, token) = (live.id, live.method.clone(), live.token.unsigned_abs());
        let fate = end_attempt(batch, live, &end, (&rules, (batch.now, 0)))?;
        freed.push(FreedAttempt {
            id,
            method,
            token,
            fate,
        });
    }
    Ok(freed)
}

/// Ends waiting jobs whose expiry is over, at most `most` of them.
pub fn expire(batch: &mut SqlBatch<'_>, most: usize) -> rusqlite::Result<Vec<EndedJob>> {
    let sql = "SELECT id FROM queue WHERE expires_at IS NOT NULL AND running = 0 AND expires_at <= ?1 \
               ORDER BY expires_at LIMIT ?2";
    let mut statement = batch.prepare(sql)?;
    let most = sql_int(most as u64);
    let ids = statement.query_map((batch.now_sql(), most), |row| rows::id(row, 0))?;
    let ids: Vec<JobId> = ids.collect::<Result<_, _>>()?;
    drop(statement);
    let mut ended = Vec::with_capacity(ids.len());
    for id in ids {
        let Some(live) = batch.live(id)? else {
            continue;
        };
        let (state, reason) = (JobState::Dead, Some(EndReason::Expired));
        let end = JobEnd {
            state,
            reason,
            cause: None,
            json: None,
        };
        batch.end(&live, &end)?;
        ended.push(EndedJob {
            id,
            method: live.method,
            state,
            reason,
        });
    }
    Ok(ended)
}

/// The end of an attempt came again, or too late. The same cause means that it is the end that was stored.
fn not_current(settlement: &Settlement, current: i64, cause: Option<AttemptCause>) -> SettleReply {
    let current = current.unsigned_abs();
    match current == settlement.token && cause == Some(settlement.end.cause) {
        true => SettleReply::Repeated,
        false => SettleReply::Stale {
            current: Some(current),
        },
    }
}

/// Applies the policy to a running job and stores what follows.
fn end_attempt(
    batch: &mut SqlBatch<'_>,
    mut live: LiveRow,
    end: &AttemptEnd,
    (rules, now_and_jitter): (&RetryRules, (u64, u16)),
) -> rusqlite::Result<JobFate> {
    let (counters, fate) = states::after_attempt(
        live.counters,
        live.is_cancel_requested,
        end,
        rules,
        now_and_jitter,
    );
    live.counters = counters;
    let json = states::kept_json(end, rules);
    let json = json.as_deref();
    match fate {
        JobFate::End { state, reason } => {
            let end = JobEnd {
                state,
                reason,
                cause: Some(end.cause),
                json,
            };
            batch.end(&live, &end)?;
        }
        JobFate::Wait { due_ms } => {
            let sql = "UPDATE queue SET running = 0, due_at = ?2, attempt = ?3, crashes = ?4, \
                       interruptions = ?5, cause = ?6, owner = NULL, executor = NULL, pid = NULL, \
                       pid_start = NULL, cancel = 0 WHERE seq = ?1";
            let params = (
                live.seq,
                sql_int(due_ms),
                counters.attempt,
                counters.crashes,
                counters.interruptions,
                end.cause.number(),
            );
            batch.execute(sql, params)?;
            if let Some(json) = json {
                let sql = "UPDATE job SET outcome = ?2 WHERE seq = ?1";
                batch.execute(sql, (live.seq, json))?;
                batch.written += json.len();
            }
        }
    }
    Ok(fate)
}

/// Returns the running jobs of all instances but this one. There are few: each occupied a thread or a program.
fn lost_attempts(batch: &SqlBatch<'_>, own: InstanceId) -> rusqlite::Result<Vec<LiveRow>> {
    // Without the name of the index, SQLite would read the whole queue.
    let sql = "SELECT id FROM queue INDEXED BY queue_owner WHERE running = 1 AND owner <> ?1 ORDER BY seq";
    let mut statement = batch.prepare(sql)?;
    let ids = statement.query_map([&own.0[..]], |row| rows::id(row, 0))?;
    let ids: Vec<JobId> = ids.collect::<Result<_, _>>()?;
    let rows = ids.into_iter().filter_map(|id| batch.live(id).transpose());
    rows.collect()
}
