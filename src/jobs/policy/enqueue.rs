//! Checks the params of `rpc.job.enqueue` and makes jobs of them.
//!
//! Each error names the member, and nothing of an array is stored if one of its items is refused. The other
//! methods of `rpc.job` have simple params, which are read here too.

use super::UnixMs;
use super::members::JsonMembers;
use super::states::MAX_DELAY_MS;
use crate::protocol::call::is_reserved;
use crate::protocol::http::respond_async::{self, AsyncRequest};
use crate::protocol::job_id::JobId;
use crate::protocol::jsonrpc;
use crate::protocol::rpc_error::excerpt;
use crate::protocol::{Code, RpcError};

/// The largest number of bytes of a `key`.
pub const MAX_KEY: usize = 255;

/// The bounds of a priority.
pub const PRIORITIES: (i64, i64) = (-9, 9);

/// The largest `max_attempts` of a job: the limit of the configuration.
pub const MAX_ATTEMPTS: i64 = 1_000;

/// The members of an enqueue.
const KNOWN: [&str; 10] = [
    "method",
    "params",
    "id",
    "key",
    "delay_ms",
    "at_ms",
    "priority",
    "max_attempts",
    "timeout_ms",
    "expires_ms",
];

/// Members of an enqueue that a later version will have.
const RESERVED: [&str; 1] = ["group"];

/// The greatest number of milliseconds in a member. It leaves room for sums.
const MOST_MS: i64 = i64::MAX / 4;

/// When a job is due. The engine adds its own time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DueTime {
    Now,
    /// After this number of milliseconds.
    After(u64),
    /// At this time, or now if it has passed.
    At(UnixMs),
}

impl DueTime {
    /// Returns the due time of a job that is stored at `now`. A time that has passed becomes `now`, so that
    /// no job can be placed before those that wait already.
    pub fn at(self, now: UnixMs) -> UnixMs {
        match self {
            DueTime::Now => now,
            DueTime::After(delay) => now.saturating_add(delay),
            DueTime::At(time) => time.max(now),
        }
    }
}

/// A checked job that is not stored yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewJob {
    pub id: JobId,
    pub method: String,
    /// JSON, byte for byte as it was sent.
    pub params: Box<str>,
    /// At most one live job of the method has this key.
    pub key: Option<String>,
    pub due: DueTime,
    /// -9 to 9; a higher one begins first.
    pub priority: i8,
    pub max_attempts: u32,
    /// The timeout of an attempt.
    pub timeout_ms: u64,
    /// The time after the enqueue at which the job is dead unless an attempt has begun.
    pub expires_ms: Option<u64>,
    /// The trace context of the enqueue, if there is one.
    pub trace: Option<String>,
}

/// What the configuration says about the jobs of a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EnqueueDefaults {
    pub priority: i8,
    /// Used if an enqueue has no `max_attempts`. Also the largest value that one may have.
    pub max_attempts: u32,
    /// The same for `timeout_ms`.
    pub timeout_ms: u64,
}

/// What an enqueue is checked against.
pub struct EnqueueRules<'a> {
    /// Returns the defaults of a method; `None` if this generation has no such method.
    pub method: &'a dyn Fn(&str) -> Option<EnqueueDefaults>,
    /// `limits.batch`: the largest number of items of an array.
    pub most_items: usize,
    /// `limits.frame`: the largest number of bytes of the params of a job.
    pub most_params: usize,
    /// The secret of the store, for the id that belongs to an `Idempotency-Key`. `None` if the store was not open
    /// yet.
    pub secret: Option<&'a [u8]>,
    pub now: UnixMs,
}

/// Makes jobs of the params of `rpc.job.enqueue`: one object, or an array of objects. `new_id` makes the ids
/// of jobs that have none, and `trace` is the trace context of the call. Returns the jobs, and whether the
/// answer is an array too.
///
/// # Errors
/// `method-not-found`, or `invalid-params` with the name of the member; `started` is false.
pub fn parse(
    params: &str,
    rules: &EnqueueRules<'_>,
    trace: Option<&str>,
    mut new_id: impl FnMut() -> JobId,
) -> Result<(Vec<NewJob>, bool), RpcError> {
    if let Some(request) = respond_async::read(params)? {
        let job = of_request(&request, rules, trace, new_id)?;
        return Ok((vec![job], false));
    }
    if !params.trim_start().starts_with('[') {
        let job = one(params, rules, trace, &mut new_id)?;
        return Ok((vec![job], false));
    }
    let items = jsonrpc::elements(params, rules.most_items)
        .map_err(|_| invalid("the params must be an object or an array of objects"))?;
    if items.count == 0 {
        return Err(invalid("the array has no jobs; give at least one"));
    }
    if items.count > rules.most_items {
        return Err(invalid(format!(
            "{} jobs are more than {} (limits.batch); send several arrays",
            items.count, rules.most_items
        )));
    }
    let jobs = items.first.iter().enumerate().map(|(at, item)| {
        one(item, rules, trace, &mut new_id).map_err(|mut error| {
            error.message = format!("params[{at}]: {}", error.message);
            error
        })
    });
    Ok((jobs.collect::<Result<_, _>>()?, true))
}

/// Makes a job of an HTTP request with `Prefer: respond-async`. Its `Idempotency-Key` gives the id together with
/// the secret of the store.
fn of_request(
    request: &AsyncRequest<'_>,
    rules: &EnqueueRules<'_>,
    trace: Option<&str>,
    new_id: impl FnOnce() -> JobId,
) -> Result<NewJob, RpcError> {
    let (method, params) = (&*request.method, request.params);
    let defaults = defaults_of(method, rules)?;
    check_params(params, rules)?;
    let id = match request.key.as_deref() {
        Some(key) if key.is_empty() || key.len() > MAX_KEY => {
            return Err(invalid(format!(
                "`Idempotency-Key` must have 1 to {MAX_KEY} bytes"
            )));
        }
        Some(key) => match rules.secret {
            Some(secret) => JobId::derived(secret, method, key),
            None => {
                let text = "the store of jobs is not open yet, so the id of an Idempotency-Key is unknown; try again";
                return Err(RpcError::of(Code::Unavailable, text, false));
            }
        },
        None => new_id(),
    };
    Ok(NewJob {
        id,
        method: method.to_owned(),
        params: params.into(),
        key: None,
        due: DueTime::Now,
        priority: defaults.priority,
        max_attempts: defaults.max_attempts,
        timeout_ms: defaults.timeout_ms,
        expires_ms: None,
        trace: trace.map(str::to_owned),
    })
}

/// Returns the id in the params of `rpc.job.get`, `rpc.job.cancel` or `rpc.job.wait`, and `timeout_ms` of the
/// last one. For the others `timeout_ms` is an unknown member.
///
/// # Errors
/// `invalid-params` with the name of the member.
pub fn parse_job(params: &str, is_wait: bool) -> Result<(JobId, Option<u64>), RpcError> {
    let read = || {
        let mut members = JsonMembers::parse(params)?;
        let id = members.id("job")?;
        let timeout = match is_wait {
            true => milliseconds(&mut members, "timeout_ms", (0, MOST_MS))?,
            false => None,
        };
        let known: &[&str] = match is_wait {
            true => &["job", "timeout_ms"],
            false => &["job"],
        };
        members.finish(known, &[])?;
        let id = id.ok_or("`job` is required: the id of a job")?;
        Ok((id, timeout))
    };
    read().map_err(|message: String| invalid(message))
}

fn one(
    item: &str,
    rules: &EnqueueRules<'_>,
    trace: Option<&str>,
    new_id: &mut dyn FnMut() -> JobId,
) -> Result<NewJob, RpcError> {
    let mut members = JsonMembers::parse(item).map_err(invalid)?;
    let method = members.string("method").map_err(invalid)?;
    let method = method.ok_or_else(|| invalid("`method` is required: the name of a method"))?;
    let defaults = defaults_of(&method, rules)?;
    let params = members.raw("params").unwrap_or("null");
    check_params(params, rules)?;
    let read = || {
        let id = members.id("id")?;
        let key = members.string("key")?;
        if key
            .as_ref()
            .is_some_and(|key| key.is_empty() || key.len() > MAX_KEY)
        {
            return Err(format!("`key` must have 1 to {MAX_KEY} bytes"));
        }
        let due = due(&mut members, rules.now)?;
        let priority = members.integer("priority", PRIORITIES)?;
        let max_attempts = members.integer("max_attempts", (1, i64::from(u32::MAX)))?;
        let timeout_ms = milliseconds(&mut members, "timeout_ms", (1, MOST_MS))?;
        let expires_ms = expires(&mut members, due, rules.now)?;
        members.finish(&KNOWN, &RESERVED)?;
        Ok(NewJob {
            id: id.unwrap_or_else(new_id),
            params: params.into(),
            key,
            due,
            priority: priority.map_or(defaults.priority, |priority| priority as i8),
            max_attempts: max_attempts.map_or(defaults.max_attempts, |most| {
                defaults.max_attempts.min(most as u32)
            }),
            timeout_ms: timeout_ms.map_or(defaults.timeout_ms, |it| it.min(defaults.timeout_ms)),
            expires_ms,
            trace: trace.map(str::to_owned),
            method,
        })
    };
    read().map_err(invalid)
}

fn defaults_of(method: &str, rules: &EnqueueRules<'_>) -> Result<EnqueueDefaults, RpcError> {
    let refused = |message: String| RpcError::of(Code::MethodNotFound, message, false);
    if is_reserved(method) {
        return Err(refused(format!(
            "`{}` cannot be a job: methods of the server itself run at once",
            excerpt(method)
        )));
    }
    (rules.method)(method)
        .ok_or_else(|| refused(format!("there is no method {:?}", excerpt(method))))
}

fn check_params(params: &str, rules: &EnqueueRules<'_>) -> Result<(), RpcError> {
    if params.len() > rules.most_params {
        return Err(invalid(format!(
            "`params` has {} bytes, more than {} (limits.frame)",
            params.len(),
            rules.most_params
        )));
    }
    Ok(())
}

fn due(members: &mut JsonMembers<'_>, now: UnixMs) -> Result<DueTime, String> {
    let delay = milliseconds(members, "delay_ms", (0, MAX_DELAY_MS as i64))?;
    let at = milliseconds(members, "at_ms", (0, MOST_MS))?;
    match (delay, at) {
        (Some(_), Some(_)) => Err("`delay_ms` and `at_ms` exclude each other".to_owned()),
        (Some(delay), None) => Ok(DueTime::After(delay)),
        (None, Some(at)) if at > now.saturating_add(MAX_DELAY_MS) => {
            Err("`at_ms` is more than 365 days ahead".to_owned())
        }
        (None, Some(at)) => Ok(DueTime::At(at)),
        (None, None) => Ok(DueTime::Now),
    }
}

fn expires(
    members: &mut JsonMembers<'_>,
    due: DueTime,
    now: UnixMs,
) -> Result<Option<u64>, String> {
    // Twice the longest delay, so that each delay can have an expiry.
    let bounds = (1, 2 * MAX_DELAY_MS as i64);
    let expires = milliseconds(members, "expires_ms", bounds)?;
    let delay = due.at(now) - now;
    match expires {
        Some(expires) if expires <= delay => {
            Err("`expires_ms` is over before the job is due".to_owned())
        }
        expires => Ok(expires),
    }
}

fn milliseconds(
    members: &mut JsonMembers<'_>,
    name: &str,
    bounds: (i64, i64),
) -> Result<Option<u64>, String> {
    let number = members.integer(name, bounds)?;
    Ok(number.and_then(|number| u64::try_from(number).ok()))
}

fn invalid(message: impl Into<String>) -> RpcError {
    RpcError::invalid_params(message)
}
