//! Resolves `[jobs]` and `[methods.NAME.job]`.
//!
//! It opens no store, but looks at the directory of its file. A password in `store` never appears in an
//! error. Keys of a later version are refused as not supported yet.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use super::check::{Check, KeyValue, MILLISECOND};
use super::job_config::{JobRules, JobStore, JobsConfig};
use super::raw::{Raw, RawJobs, RawMethodJob, RawRetention, StrictTable};
use super::settings::{LimitsConfig, WorkersConfig};
use super::source_map::join;
use super::units::{ByteSize, DurationValue};
use crate::error::{Error, Result};

const DAY: Duration = Duration::from_secs(86_400);

/// The largest number of attempts and crashes that a key may set.
const MOST_ATTEMPTS: i64 = 1_000;

/// Returns the settings of `[jobs]`; `None` without that table.
pub(super) fn resolve(
    check: &Check<'_>,
    raw: &Raw,
    workers: &WorkersConfig,
    limits: &LimitsConfig,
) -> Result<Option<JobsConfig>> {
    let tables = raw.methods.iter();
    let tables = tables.filter_map(|(name, method)| Some((name, method.job.as_ref()?)));
    let Some(jobs) = &raw.jobs else {
        return match tables.into_iter().next() {
            None => Ok(None),
            Some((name, _)) => Err(check.places.error(
                &join(&join("methods", name), "job"),
                "this table has no effect without [jobs]",
                "add the table [jobs], or remove this one",
            )),
        };
    };
    if jobs.schedules.is_some() {
        return Err(unsupported(check, "jobs.schedules"));
    }
    let store = store(check, jobs)?;
    let defaults = defaults(check, jobs, workers)?;
    let mut methods = BTreeMap::new();
    for (name, table) in tables {
        let key = join(&join("methods", name), "job");
        if let Some(pool) = pool_of_connections(raw, name) {
            return Err(check.places.error(
                &key,
                format!("the pool {pool:?} has scope = \"connection\", so its methods cannot run as jobs"),
                "remove this table, or take scope out of the pool",
            ));
        }
        methods.insert(name.clone(), method(check, &key, table, &defaults)?);
    }
    Ok(Some(JobsConfig {
        store,
        concurrency: concurrency(check, jobs, workers)?,
        defaults,
        methods,
        lease: lease(check, jobs)?,
        poll: jobs.poll.value(check, "jobs.poll")?,
        enqueue_timeout: jobs.enqueue_timeout.value(check, "jobs.enqueue-timeout")?,
        max_jobs: jobs.max_jobs.value(check, "jobs.max-jobs")?,
        max_size: check.size(
            "jobs.max-size",
            jobs.max_size.unwrap_or(ByteSize(10 << 30)),
            1 << 20,
            1 << 50,
            "",
        )?,
        result: result(check, jobs, limits)?,
    }))
}

/// Returns the pool of a method whose programs belong to connections; jobs have none.
fn pool_of_connections<'a>(raw: &'a Raw, method: &str) -> Option<&'a String> {
    let pool = raw.methods.get(method)?.pool.as_ref()?;
    let scope = raw.pools.get(pool)?.scope.as_deref();
    (scope == Some("connection")).then_some(pool)
}

fn store(check: &Check<'_>, jobs: &RawJobs) -> Result<JobStore> {
    const KEY: &str = "jobs.store";
    let error = |problem: String, remedy: &str| Err(check.places.error(KEY, problem, remedy));
    let write = "write \"sqlite:PATH\", such as \"sqlite:jobs.db\"";
    let Some(text) = &jobs.store else {
        return Err(check.places.error(
            "jobs",
            "store is missing: it names the database of the jobs",
            write,
        ));
    };
    let masked = masked(text);
    let Some((scheme, path)) = text.split_once(':') else {
        return error(
            format!("{masked:?} has no scheme"),
            &format!("write \"sqlite:{masked}\""),
        );
    };
    match scheme {
        "sqlite" => {}
        "postgres" | "postgresql" => {
            return error(format!("{masked:?} is not supported yet"), write);
        }
        _ => return error(format!("{masked:?} has an unknown scheme"), write),
    }
    if jobs.password_file.is_some() {
        return Err(check.places.error(
            "jobs.password-file",
            "a SQLite store has no password",
            "remove it",
        ));
    }
    if !cfg!(feature = "jobs-sqlite") {
        return error(
            "this program was built without SQLite".to_owned(),
            "build it with the cargo feature jobs-sqlite",
        );
    }
    let path = check.path(KEY, path)?;
    let directory = path.parent().unwrap_or(Path::new("/"));
    if path.is_dir() {
        return error(
            format!("{} is a directory", path.display()),
            "name a file in it",
        );
    }
    if !directory.exists() {
        return error(
            format!("there is no directory {}", directory.display()),
            "create it with mode 0700 for the server's user, or store the jobs elsewhere",
        );
    }
    if !directory.is_dir() {
        return error(
            format!("{} is not a directory", directory.display()),
            "name a file in a directory",
        );
    }
    Ok(JobStore::Sqlite(path))
}

/// Returns the text of `store` with `***` for each password: behind the user's name, and as a parameter.
fn masked(text: &str) -> String {
    let (scheme, rest) = text.split_once(':').unwrap_or(("", text));
    if scheme == "sqlite" {
        return text.to_owned();
    }
    let mut shown = text.to_owned();
    // The password may have an @ that is not escaped, so it ends at the last one.
    if let Some(end) = shown.rfind('@') {
        let from = match rest.strip_prefix("//") {
            Some(address) => text.len() - address.len(),
            None => 0,
        };
        if let Some(colon) = shown.get(from..end).and_then(|user| user.find(':')) {
            shown.replace_range(from + colon + 1..end, "***");
        }
    }
    let mut from = 0;
    while let Some(at) = shown[from..].to_ascii_lowercase().find("password=") {
        let start = from + at + "password=".len();
        let end = shown[start..]
            .find(['&', ' '])
            .map_or(shown.len(), |end| start + end);
        shown.replace_range(start..end, "***");
        from = start;
    }
    shown
}

fn concurrency(check: &Check<'_>, jobs: &RawJobs, workers: &WorkersConfig) -> Result<usize> {
    let Some(number) = jobs.concurrency else {
        return Ok((workers.threads / 2).max(1));
    };
    let most = workers.threads as i64;
    if number > most {
        return Err(check.places.error(
            "jobs.concurrency",
            format!("{number} is more than workers.threads ({most})"),
            format!("give {most} at most, or raise workers.threads"),
        ));
    }
    check.integer("jobs.concurrency", number, 1..=most, "")
}

fn lease(check: &Check<'_>, jobs: &RawJobs) -> Result<Duration> {
    let lease = jobs.lease.value(check, "jobs.lease")?;
    match lease > Duration::from_secs(600) {
        true => Err(check.places.error(
            "jobs.lease",
            format!("{} is out of range", DurationValue(lease)),
            "give 5s to 10m",
        )),
        false => Ok(lease),
    }
}

fn result(check: &Check<'_>, jobs: &RawJobs, limits: &LimitsConfig) -> Result<usize> {
    let frame = limits.frame as u64;
    let set = jobs.result.unwrap_or(ByteSize(frame.min(64 << 10)));
    let bytes = check.size("jobs.result", set, 1, frame, " (limits.frame)")?;
    Ok(bytes as usize)
}

fn defaults(check: &Check<'_>, jobs: &RawJobs, workers: &WorkersConfig) -> Result<JobRules> {
    let seconds = Duration::from_secs;
    let built_in = JobRules {
        max_attempts: 10,
        backoff: seconds(5),
        max_backoff: seconds(3_600),
        max_crashes: 3,
        timeout: seconds(600),
        drain_timeout: workers.drain_timeout,
        priority: 0,
        keep_done: DAY,
        keep_dead: 30 * DAY,
        keep_cancelled: DAY,
    };
    let table = RawMethodJob {
        max_attempts: jobs.max_attempts,
        backoff: jobs.backoff,
        max_backoff: jobs.max_backoff,
        max_crashes: jobs.max_crashes,
        timeout: jobs.timeout,
        drain_timeout: jobs.drain_timeout,
        ..RawMethodJob::default()
    };
    rules(check, "jobs", (&table, jobs.retention.as_ref()), &built_in)
}

fn method(
    check: &Check<'_>,
    key: &str,
    table: &RawMethodJob,
    defaults: &JobRules,
) -> Result<JobRules> {
    for (name, is_set) in [
        ("concurrency", table.concurrency.is_some()),
        ("rate", table.rate.is_some()),
    ] {
        if is_set {
            return Err(unsupported(check, &join(key, name)));
        }
    }
    rules(check, key, (table, table.retention.as_ref()), defaults)
}

/// Returns the rules of the table `key`. A key that is not set has the value of `defaults`.
fn rules(
    check: &Check<'_>,
    key: &str,
    (table, retention): (&RawMethodJob, Option<&StrictTable<RawRetention>>),
    defaults: &JobRules,
) -> Result<JobRules> {
    let number = |name: &str, set: Option<i64>, default: u32| {
        let value = set.unwrap_or(default.into());
        check.integer(&join(key, name), value, 1..=MOST_ATTEMPTS, "")
    };
    let time = |name: &str, set: Option<DurationValue>, default: Duration, least: Duration| {
        check.duration(
            &join(key, name),
            set.unwrap_or(DurationValue(default)),
            least,
        )
    };
    let backoff = time("backoff", table.backoff, defaults.backoff, Duration::ZERO)?;
    let max_backoff = time(
        "max-backoff",
        table.max_backoff,
        defaults.max_backoff,
        Duration::ZERO,
    )?;
    if backoff > max_backoff {
        let set = if table.max_backoff.is_some() {
            "max-backoff"
        } else {
            "backoff"
        };
        return Err(check.places.error(
            &join(key, set),
            format!(
                "backoff ({}) is longer than max-backoff ({})",
                DurationValue(backoff),
                DurationValue(max_backoff)
            ),
            "give a max-backoff that is not shorter than backoff",
        ));
    }
    let priority = i64::from(defaults.priority);
    let priority = table.priority.unwrap_or(priority);
    let keep = |name: &str, set: Option<DurationValue>, default: Duration| {
        let key = join(&join(key, "retention"), name);
        check.duration(&key, set.unwrap_or(DurationValue(default)), Duration::ZERO)
    };
    let kept = retention.map(|table| &table.0);
    let drain = defaults.drain_timeout;
    Ok(JobRules {
        max_attempts: number("max-attempts", table.max_attempts, defaults.max_attempts)?,
        backoff,
        max_backoff,
        max_crashes: number("max-crashes", table.max_crashes, defaults.max_crashes)?,
        timeout: time("timeout", table.timeout, defaults.timeout, MILLISECOND)?,
        drain_timeout: time("drain-timeout", table.drain_timeout, drain, MILLISECOND)?,
        priority: check.integer(&join(key, "priority"), priority, -9..=9, "")?,
        keep_done: keep("done", kept.and_then(|kept| kept.done), defaults.keep_done)?,
        keep_dead: keep("dead", kept.and_then(|kept| kept.dead), defaults.keep_dead)?,
        keep_cancelled: keep(
            "cancelled",
            kept.and_then(|kept| kept.cancelled),
            defaults.keep_cancelled,
        )?,
    })
}

fn unsupported(check: &Check<'_>, key: &str) -> Error {
    check
        .places
        .error(key, "it is not supported yet", "remove it")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_masked_wherever_they_stand() {
        for (text, shown) in [
            (
                "postgres://jobs:secret@db.example/app",
                "postgres://jobs:***@db.example/app",
            ),
            (
                "postgres://jobs:se@cr/et@db/app",
                "postgres://jobs:***@db/app",
            ),
            ("postgres://jobs@db/app", "postgres://jobs@db/app"),
            ("postgres:jobs:secret@db", "postgres:***@db"),
            ("jobs:secret@db", "jobs:***@db"),
            (
                "postgres://db/app?password=secret&x=1",
                "postgres://db/app?password=***&x=1",
            ),
            (
                "postgres:host=db Password=secret",
                "postgres:host=db Password=***",
            ),
            ("mysql://root:secret@db/x", "mysql://root:***@db/x"),
            ("mysql://db/x", "mysql://db/x"),
            ("@", "@"),
            ("", ""),
            ("sqlite:a@b:c@d.db", "sqlite:a@b:c@d.db"),
        ] {
            let masked = masked(text);
            assert!(!masked.contains("secret"), "{masked}");
            assert_eq!(masked, shown, "{text}");
        }
    }
}
