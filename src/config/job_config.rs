//! Defines the settings of durable jobs, and writes them back for `check`.
//!
//! `jobs` resolves them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::keys::{Integer, Time};
use super::raw::{RawJobs, RawMethodJob, RawRetention, StrictTable};
use super::units::{ByteSize, DurationValue};

/// `[jobs]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobsConfig {
    pub store: JobStore,
    /// The largest number of attempts at once on the handler threads of a worker: 1 to `workers.threads`.
    pub concurrency: usize,
    /// The rules of methods that have no table of their own.
    pub defaults: JobRules,
    /// The rules of methods that have one.
    pub methods: BTreeMap<String, JobRules>,
    /// How long an instance owns its attempts without renewing; for PostgreSQL. 5 s to 10 min.
    pub lease: Duration,
    /// How often an instance looks for jobs that others have stored; for PostgreSQL. At least 10 ms.
    pub poll: Duration,
    /// How long an enqueue waits for its commit; at least 1 ms.
    pub enqueue_timeout: Duration,
    /// The largest number of live jobs.
    pub max_jobs: u64,
    /// The largest number of bytes of data and indexes, at least 1 MiB.
    pub max_size: u64,
    /// The largest number of bytes of a result, up to `limits.frame`.
    pub result: usize,
}

/// Where jobs are stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobStore {
    /// A SQLite file. Absolute; its directory exists.
    Sqlite(PathBuf),
}

/// The rules for the jobs of a method.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobRules {
    /// 1 to 1000.
    pub max_attempts: u32,
    /// The delay after the first failed attempt; it doubles up to `max_backoff`.
    pub backoff: Duration,
    pub max_backoff: Duration,
    /// The counted crashes that end a job, 1 to 1000.
    pub max_crashes: u32,
    /// The longest time of an attempt; at least 1 ms.
    pub timeout: Duration,
    /// How long a draining worker lets attempts run.
    pub drain_timeout: Duration,
    /// The priority of jobs that set none, -9 to 9.
    pub priority: i8,
    /// How long ended jobs are kept.
    pub keep_done: Duration,
    pub keep_dead: Duration,
    pub keep_cancelled: Duration,
}

impl JobsConfig {
    /// Returns the rules for the jobs of a method.
    pub fn rules(&self, method: &str) -> &JobRules {
        self.methods.get(method).unwrap_or(&self.defaults)
    }

    /// Returns the path of the store.
    pub fn path(&self) -> &Path {
        match &self.store {
            JobStore::Sqlite(path) => path,
        }
    }

    /// Returns the name of the engine of the store.
    pub fn engine(&self) -> &'static str {
        match &self.store {
            JobStore::Sqlite(_) => "sqlite",
        }
    }

    pub(super) fn to_raw(&self) -> RawJobs {
        let rules = &self.defaults;
        RawJobs {
            store: Some(format!("sqlite:{}", self.path().to_string_lossy())),
            concurrency: Some(self.concurrency as i64),
            max_attempts: Some(rules.max_attempts.into()),
            backoff: Some(DurationValue(rules.backoff)),
            max_backoff: Some(DurationValue(rules.max_backoff)),
            max_crashes: Some(rules.max_crashes.into()),
            timeout: Some(DurationValue(rules.timeout)),
            drain_timeout: Some(DurationValue(rules.drain_timeout)),
            lease: Time(Some(DurationValue(self.lease))),
            poll: Time(Some(DurationValue(self.poll))),
            enqueue_timeout: Time(Some(DurationValue(self.enqueue_timeout))),
            max_jobs: Integer::of(self.max_jobs),
            max_size: Some(ByteSize(self.max_size)),
            result: Some(ByteSize(self.result as u64)),
            retention: Some(rules.retention_to_raw()),
            ..RawJobs::default()
        }
    }

    /// Returns the table of a method that has one.
    pub(super) fn method_to_raw(&self, method: &str) -> Option<RawMethodJob> {
        let rules = self.methods.get(method)?;
        Some(RawMethodJob {
            max_attempts: Some(rules.max_attempts.into()),
            backoff: Some(DurationValue(rules.backoff)),
            max_backoff: Some(DurationValue(rules.max_backoff)),
            max_crashes: Some(rules.max_crashes.into()),
            timeout: Some(DurationValue(rules.timeout)),
            drain_timeout: Some(DurationValue(rules.drain_timeout)),
            priority: Some(rules.priority.into()),
            retention: Some(rules.retention_to_raw()),
            ..RawMethodJob::default()
        })
    }
}

impl JobRules {
    fn retention_to_raw(&self) -> StrictTable<RawRetention> {
        StrictTable(RawRetention {
            done: Some(DurationValue(self.keep_done)),
            dead: Some(DurationValue(self.keep_dead)),
            cancelled: Some(DurationValue(self.keep_cancelled)),
        })
    }
}
