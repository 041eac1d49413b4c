//! Does what operators ask for: retry, purge, pause. And removes old jobs.

use super::super::request::{JobSelection, LeftAlone, ListCursor, Selected};
use super::batch::{SqlBatch, sql_int};
use super::rows;
use crate::jobs::policy::retention::{RetentionRules, RetentionScan, RetentionStep};
use crate::jobs::policy::states::JobState;
use crate::protocol::job_id::JobId;

/// The largest number of rows that a request by state looks at, so that other requests do not wait long.
const MOST_ROWS: usize = 2_000;

/// An ended job, or a live one whose state is `Waiting` or `Running`.
struct Chosen {
    seq: i64,
    id: JobId,
    method: String,
    state: JobState,
    key: Option<String>,
    end: ListCursor,
}

/// Lets dead and cancelled jobs wait again.
pub fn retry(batch: &mut SqlBatch<'_>, selection: &JobSelection) -> rusqlite::Result<Selected> {
    for_each(batch, selection, |batch, job| {
        if !job.state.may_wait_again() {
            return Ok(Some(LeftAlone::Is(job.state)));
        }
        if let Some(key) = &job.key {
            let sql = "SELECT 1 FROM queue WHERE method = ?1 AND key = ?2";
            let twin = batch.first(sql, (&job.method, key), |_| Ok(()))?;
            if twin.is_some() {
                return Ok(Some(LeftAlone::KeyInUse));
            }
        }
        if batch.live >= batch.limits.max_jobs {
            return Ok(Some(LeftAlone::TooMany));
        }
        // The expiry is over or close, so it would end the job at once.
        let sql = "UPDATE job SET state = 0, reason = NULL, attempt = 0, crashes = 0, interruptions = 0, \
                   finished_at = NULL, expires_at = NULL, due_at = ?2 WHERE seq = ?1";
        batch.execute(sql, (job.seq, batch.now_sql()))?;
        let sql = "INSERT INTO queue (seq, id, method, key, priority, due_at, max_attempts, timeout_ms, \
                   token, cause, started_at) SELECT seq, id, method, key, priority, due_at, max_attempts, \
                   timeout_ms, token, cause, started_at FROM job WHERE seq = ?1";
        batch.execute(sql, [job.seq])?;
        batch.live += 1;
        Ok(None)
    })
}

/// Removes ended jobs.
pub fn purge(batch: &mut SqlBatch<'_>, selection: &JobSelection) -> rusqlite::Result<Selected> {
    for_each(batch, selection, |batch, job| {
        if !job.state.is_ended() {
            return Ok(Some(LeftAlone::Is(job.state)));
        }
        batch.execute("DELETE FROM job WHERE seq = ?1", [job.seq])?;
        Ok(None)
    })
}

/// Stops or resumes the claims of a method.
pub fn pause(batch: &mut SqlBatch<'_>, method: &str, is_paused: bool) -> rusqlite::Result<()> {
    let sql = "INSERT INTO method (name, paused) VALUES (?1, ?2) \
               ON CONFLICT (name) DO UPDATE SET paused = excluded.paused";
    batch.execute(sql, (method, is_paused))?;
    Ok(())
}

/// Removes ended jobs that are old enough, and looks at about `most` rows. Returns the number of removed jobs,
/// and whether the pass is complete.
pub fn remove_old(
    batch: &mut SqlBatch<'_>,
    scan: &mut RetentionScan,
    rules: &RetentionRules,
    most: usize,
) -> rusqlite::Result<(u64, bool)> {
    let (mut removed, mut left) = (0, most);
    for step in scan.steps(rules, batch.now) {
        if left == 0 {
            return Ok((removed, false));
        }
        let rows = step_rows(batch, &step, left)?;
        for (_, seq, method) in &rows {
            if rules.of(method).of(step.state) == Some(step.kept_ms) {
                removed += batch.execute("DELETE FROM job WHERE seq = ?1", [seq])? as u64;
            }
        }
        let last = rows.last().filter(|_| rows.len() == left);
        let last = last.map(|(end, seq, _)| (end.unsigned_abs(), seq.unsigned_abs()));
        scan.reached(&step, last);
        left -= rows.len();
    }
    Ok((removed, left > 0))
}

/// Returns end, sequence number and method of the next rows of a step.
fn step_rows(
    batch: &SqlBatch<'_>,
    step: &RetentionStep,
    most: usize,
) -> rusqlite::Result<Vec<(i64, i64, String)>> {
    let sql = "SELECT finished_at, seq, method FROM job WHERE state > 0 AND state = ?1 \
               AND (finished_at, seq) > (?2, ?3) AND finished_at < ?4 \
               ORDER BY finished_at, seq LIMIT ?5";
    let mut statement = batch.prepare(sql)?;
    let (end, seq) = step.after;
    let params = (
        step.state.number(),
        sql_int(end),
        sql_int(seq),
        sql_int(step.before),
        sql_int(most as u64),
    );
    let rows = statement.query_map(params, |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
    rows.collect()
}

/// Does something with each selected job: `act` returns why a job was left alone.
fn for_each(
    batch: &mut SqlBatch<'_>,
    selection: &JobSelection,
    mut act: impl FnMut(&mut SqlBatch<'_>, &Chosen) -> rusqlite::Result<Option<LeftAlone>>,
) -> rusqlite::Result<Selected> {
    let mut selected = Selected::default();
    let mut apply = |batch: &mut SqlBatch<'_>, job: Chosen| {
        match act(batch, &job)? {
            None => selected.done.push(job.id),
            Some(why) => selected.left.push((job.id, why)),
        }
        Ok::<_, rusqlite::Error>(())
    };
    let mut unknown = Vec::new();
    match selection {
        // Each is looked up when its turn comes, because an id may be named twice.
        JobSelection::Ids(ids) => {
            for id in ids {
                match by_id(batch, *id)? {
                    Some(job) => apply(batch, job)?,
                    None => unknown.push((*id, LeftAlone::NoSuchJob)),
                }
            }
        }
        JobSelection::Ended {
            state,
            method,
            most,
            after,
        } => {
            let (chosen, next) = by_state(batch, *state, method.as_deref(), (*most, *after))?;
            for job in chosen {
                apply(batch, job)?;
            }
            selected.next = next;
        }
    }
    selected.left.extend(unknown);
    Ok(selected)
}

const CHOSEN: &str = "SELECT j.seq, j.id, j.method, j.state, q.running, j.key, j.finished_at \
                      FROM job j LEFT JOIN queue q USING (seq)";

fn read_chosen(row: &rusqlite::Row<'_>) -> rusqlite::Result<Chosen> {
    let seq: i64 = row.get(0)?;
    Ok(Chosen {
        seq,
        id: rows::id(row, 1)?,
        method: row.get(2)?,
        state: rows::state(row, 3, 4)?,
        key: row.get(5)?,
        end: ListCursor {
            end_ms: rows::time(row, 6)?.unwrap_or_default(),
            seq: seq.unsigned_abs(),
        },
    })
}

fn by_id(batch: &SqlBatch<'_>, id: JobId) -> rusqlite::Result<Option<Chosen>> {
    batch.first(
        &format!("{CHOSEN} WHERE j.id = ?1"),
        [&id.0[..]],
        read_chosen,
    )
}

/// Returns ended jobs of a state, and where to continue.
fn by_state(
    batch: &SqlBatch<'_>,
    state: JobState,
    method: Option<&str>,
    (most, after): (usize, Option<ListCursor>),
) -> rusqlite::Result<(Vec<Chosen>, Option<ListCursor>)> {
    if !state.is_ended() {
        return Ok((Vec::new(), None));
    }
    let after = after.unwrap_or_default();
    let sql = format!(
        "{CHOSEN} WHERE j.state > 0 AND j.state = ?1 AND (j.finished_at, j.seq) > (?2, ?3) \
         ORDER BY j.finished_at, j.seq LIMIT ?4"
    );
    let mut statement = batch.prepare(&sql)?;
    let limit = sql_int(MOST_ROWS as u64);
    let params = (
        state.number(),
        sql_int(after.end_ms),
        sql_int(after.seq),
        limit,
    );
    let mut rows = statement.query_map(params, read_chosen)?;
    let (mut chosen, mut seen, mut last) = (Vec::new(), 0, None);
    while chosen.len() < most {
        let Some(job) = rows.next().transpose()? else {
            return Ok((chosen, last.filter(|_| seen == MOST_ROWS)));
        };
        seen += 1;
        last = Some(job.end);
        if method.is_none_or(|method| method == job.method) {
            chosen.push(job);
        }
    }
    Ok((chosen, last))
}
