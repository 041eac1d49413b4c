//! Writes jobs as JSON, and reads exported ones.
//!
//! Params, results and errors pass through byte for byte. Members without a value are left out.

use super::policy::UnixMs;
use super::policy::enqueue::{MAX_ATTEMPTS, PRIORITIES};
use super::policy::members::JsonMembers;
use super::policy::states::{AttemptCause, EndReason, JobCounters, JobState};
use crate::protocol::job_id::JobId;

/// The id of an instance: a UUID that is new at each start.
pub type InstanceId = JobId;

/// The largest token of an imported job. Claims count further from it.
const MAX_TOKEN: i64 = 1 << 53;
/// The largest counter of an imported job, likewise.
const MAX_COUNT: i64 = 1_000_000;

/// Who runs an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttemptOwner {
    pub instance: InstanceId,
    /// The pid of the worker or pool process.
    pub executor: i32,
}

/// A process that cannot be mistaken for a later one with the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ProcessMark {
    pub pid: i32,
    /// Its start time in clock ticks since boot (proc_pid_stat(5), field 22).
    pub start_time: u64,
}

/// What clients see of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobRecord {
    pub id: JobId,
    pub method: String,
    pub state: JobState,
    pub counters: JobCounters,
    pub priority: i8,
    pub key: Option<String>,
    pub created_ms: UnixMs,
    pub due_ms: UnixMs,
    /// When the last attempt began.
    pub started_ms: Option<UnixMs>,
    /// `Some` iff the job has ended.
    pub finished_ms: Option<UnixMs>,
    pub expires_ms: Option<UnixMs>,
    /// `Some` iff the job is dead.
    pub reason: Option<EndReason>,
    /// Why the last attempt ended; `None` before the first one has ended.
    pub cause: Option<AttemptCause>,
    /// The result if the job is done, else the error of the last attempt that had one.
    pub json: Option<Box<str>>,
}

/// A job with all that the store has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobDetails {
    pub record: JobRecord,
    pub params: Box<str>,
    pub timeout_ms: u64,
    /// The number of claims so far.
    pub token: u64,
    pub trace: Option<String>,
    /// `Some` iff an attempt runs.
    pub owner: Option<AttemptOwner>,
    /// The process of a command or program that runs the attempt.
    pub process: Option<ProcessMark>,
}

/// Appends the members of an object one by one.
struct ObjectWriter<'a> {
    out: &'a mut Vec<u8>,
    is_first: bool,
}

impl ObjectWriter<'_> {
    fn raw(&mut self, name: &str, json: &str) {
        self.out.push(if self.is_first { b'{' } else { b',' });
        self.is_first = false;
        self.out.push(b'"');
        self.out.extend_from_slice(name.as_bytes());
        self.out.extend_from_slice(b"\":");
        self.out.extend_from_slice(json.as_bytes());
    }

    fn number(&mut self, name: &str, number: impl Into<i128>) {
        self.raw(name, &number.into().to_string());
    }

    fn time(&mut self, name: &str, time: Option<UnixMs>) {
        if let Some(time) = time {
            self.number(name, time);
        }
    }

    fn text(&mut self, name: &str, text: &str) {
        // Encoding a string cannot fail.
        self.raw(name, &serde_json::to_string(text).unwrap_or_default());
    }
}

impl JobRecord {
    /// Appends the record as a JSON object.
    pub fn write(&self, out: &mut Vec<u8>) {
        self.write_members(&mut ObjectWriter {
            out,
            is_first: true,
        });
        out.push(b'}');
    }

    fn write_members(&self, object: &mut ObjectWriter<'_>) {
        object.text("job", &self.id.to_string());
        object.text("method", &self.method);
        object.text("state", self.state.name());
        object.raw(
            "ended",
            if self.state.is_ended() {
                "true"
            } else {
                "false"
            },
        );
        object.number("attempt", self.counters.attempt);
        object.number("max_attempts", self.counters.max_attempts);
        object.number("crashes", self.counters.crashes);
        object.number("interruptions", self.counters.interruptions);
        object.number("priority", self.priority);
        if let Some(key) = &self.key {
            object.text("key", key);
        }
        object.number("created_at_ms", self.created_ms);
        object.number("due_at_ms", self.due_ms);
        object.time("started_at_ms", self.started_ms);
        object.time("finished_at_ms", self.finished_ms);
        object.time("expires_at_ms", self.expires_ms);
        if let Some(reason) = self.reason {
            object.text("reason", reason.name());
        }
        if let Some(cause) = self.cause {
            object.text("cause", cause.name());
        }
        if let Some(json) = &self.json {
            let is_result = self.state == JobState::Done;
            object.raw(if is_result { "result" } else { "error" }, json);
        }
    }
}

/// Members of an exported job that an import does not read.
const NOT_IMPORTED: [&str; 4] = ["ended", "executor", "pid", "pid_start"];

impl JobDetails {
    /// Appends the job as a JSON object: the record, and behind it what only operators see.
    pub fn write(&self, out: &mut Vec<u8>) {
        let mut object = ObjectWriter {
            out,
            is_first: true,
        };
        self.record.write_members(&mut object);
        object.raw("params", &self.params);
        object.number("timeout_ms", self.timeout_ms);
        object.number("token", self.token);
        if let Some(trace) = &self.trace {
            object.text("trace", trace);
        }
        if let Some(owner) = &self.owner {
            object.number("executor", owner.executor);
        }
        if let Some(process) = &self.process {
            object.number("pid", process.pid);
            object.number("pid_start", process.start_time);
        }
        out.push(b'}');
    }

    /// Returns about how many bytes the job has.
    pub fn size(&self) -> usize {
        let json = self.record.json.as_ref().map_or(0, |json| json.len());
        512 + self.params.len() + json
    }

    /// Reads a line of an export. The attempt of a running job is not part of it, because its instance does
    /// not use the store that the job is imported into.
    ///
    /// # Errors
    /// A sentence that names the member.
    pub fn read(line: &str) -> Result<Self, String> {
        let mut members = JsonMembers::parse(line)?;
        let record = read_record(&mut members)?;
        let params = members.raw("params").ok_or("`params` is required")?;
        let job = JobDetails {
            params: params.into(),
            timeout_ms: required(&mut members, "timeout_ms", (1, i64::MAX))? as u64,
            token: required(&mut members, "token", (0, MAX_TOKEN))? as u64,
            trace: members.string("trace")?,
            owner: None,
            process: None,
            record,
        };
        for name in NOT_IMPORTED {
            members.raw(name);
        }
        members.finish(&["the members of `preforkd job export`"], &[])?;
        Ok(job)
    }
}

fn read_record(members: &mut JsonMembers<'_>) -> Result<JobRecord, String> {
    let id = members.id("job")?.ok_or("`job` is required")?;
    let method = members.string("method")?;
    let method = method.filter(|method| !method.is_empty());
    let method = method.ok_or("`method` is required")?;
    let state = named(members, "state", JobState::from_name)?.ok_or("`state` is required")?;
    let count = (0, MAX_COUNT);
    let counters = JobCounters {
        attempt: required(members, "attempt", count)? as u32,
        max_attempts: required(members, "max_attempts", (1, MAX_ATTEMPTS))? as u32,
        crashes: required(members, "crashes", count)? as u32,
        interruptions: required(members, "interruptions", count)? as u32,
    };
    let mut time = |name| -> Result<Option<UnixMs>, String> {
        let time = members.integer(name, (0, i64::MAX))?;
        Ok(time.map(|time| time as UnixMs))
    };
    let created_ms = time("created_at_ms")?.ok_or("`created_at_ms` is required")?;
    let due_ms = time("due_at_ms")?.ok_or("`due_at_ms` is required")?;
    let (started_ms, finished_ms) = (time("started_at_ms")?, time("finished_at_ms")?);
    let expires_ms = time("expires_at_ms")?;
    if state.is_ended() != finished_ms.is_some() {
        return Err("`finished_at_ms` belongs to ended jobs, and to all of them".to_owned());
    }
    let reason = named(members, "reason", EndReason::from_name)?;
    if reason.is_some() != (state == JobState::Dead) {
        return Err("`reason` belongs to dead jobs, and to all of them".to_owned());
    }
    let is_done = state == JobState::Done;
    let json = members.raw(if is_done { "result" } else { "error" });
    if is_done && json.is_none() {
        return Err("`result` is required".to_owned());
    }
    Ok(JobRecord {
        id,
        method,
        state,
        counters,
        priority: required(members, "priority", PRIORITIES)? as i8,
        key: members.string("key")?,
        created_ms,
        due_ms,
        started_ms,
        finished_ms,
        expires_ms,
        reason,
        cause: named(members, "cause", AttemptCause::from_name)?,
        json: json.map(Into::into),
    })
}

fn required(members: &mut JsonMembers<'_>, name: &str, bounds: (i64, i64)) -> Result<i64, String> {
    let number = members.integer(name, bounds)?;
    number.ok_or_else(|| format!("`{name}` is required"))
}

fn named<T>(
    members: &mut JsonMembers<'_>,
    name: &str,
    from_name: impl FnOnce(&str) -> Option<T>,
) -> Result<Option<T>, String> {
    let Some(text) = members.string(name)? else {
        return Ok(None);
    };
    match from_name(&text) {
        Some(value) => Ok(Some(value)),
        None => Err(format!("`{name}` has no value {text:?}")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn record() -> JobRecord {
        JobRecord {
            id: JobId([1; 16]),
            method: "mail".into(),
            state: JobState::Waiting,
            counters: JobCounters {
                attempt: 1,
                max_attempts: 10,
                crashes: 2,
                interruptions: 3,
            },
            priority: -1,
            key: None,
            created_ms: 5,
            due_ms: 6,
            started_ms: None,
            finished_ms: None,
            expires_ms: None,
            reason: None,
            cause: None,
            json: None,
        }
    }

    fn text(record: &JobRecord) -> String {
        let mut out = Vec::new();
        record.write(&mut out);
        String::from_utf8_lossy(&out).into_owned()
    }

    #[test]
    fn a_record_has_the_members_of_the_protocol_in_their_order() {
        assert_eq!(
            text(&record()),
            concat!(
                r#"{"job":"01010101-0101-0101-0101-010101010101","method":"mail","state":"waiting","#,
                r#""ended":false,"attempt":1,"max_attempts":10,"crashes":2,"interruptions":3,"#,
                r#""priority":-1,"created_at_ms":5,"due_at_ms":6}"#
            )
        );
        let dead = JobRecord {
            state: JobState::Dead,
            key: Some("a\"b".into()),
            started_ms: Some(7),
            finished_ms: Some(8),
            expires_ms: Some(9),
            reason: Some(EndReason::Attempts),
            cause: Some(AttemptCause::Error),
            json: Some(r#"{"code": 7}"#.into()),
            ..record()
        };
        let text = text(&dead);
        let rest = concat!(
            r#""priority":-1,"key":"a\"b","created_at_ms":5,"due_at_ms":6,"started_at_ms":7,"#,
            r#""finished_at_ms":8,"expires_at_ms":9,"reason":"attempts","cause":"error","#,
            r#""error":{"code": 7}}"#
        );
        assert!(text.contains(r#""state":"dead","ended":true"#), "{text}");
        assert!(text.ends_with(rest), "{text}");
    }

    #[test]
    fn only_a_done_job_has_a_result() {
        let done = JobRecord {
            state: JobState::Done,
            json: Some("[1e0,  2]".into()),
            ..record()
        };
        assert!(
            text(&done).ends_with(r#","result":[1e0,  2]}"#),
            "{}",
            text(&done)
        );
    }

    #[test]
    fn an_imported_job_has_counters_that_claims_can_count_further() {
        let line = |token: u64, attempt: u32| {
            let mut out = Vec::new();
            let mut record = record();
            record.counters.attempt = attempt;
            let job = JobDetails {
                record,
                params: "[1]".into(),
                timeout_ms: 1,
                token,
                trace: None,
                owner: None,
                process: None,
            };
            job.write(&mut out);
            JobDetails::read(&String::from_utf8_lossy(&out)).map(|job| job.token)
        };
        assert_eq!(line(MAX_TOKEN as u64, 1_000_000), Ok(MAX_TOKEN as u64));
        let refused = |token, attempt| line(token, attempt).unwrap_err();
        assert!(refused(i64::MAX as u64, 1).contains("`token`"));
        assert!(refused(1, u32::MAX).contains("`attempt`"));
    }
}
