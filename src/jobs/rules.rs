//! Translates the configuration into the rules of the policy and the limits of a store.
//!
//! The policy knows no configuration, so that it can be tested without one.

use std::collections::BTreeMap;
use std::time::Duration;

use super::policy::enqueue::EnqueueDefaults;
use super::policy::retention::{Retention, RetentionRules};
use super::policy::states::RetryRules;
use super::store::request::StoreLimits;
use crate::config::{JobRules, JobsConfig};

/// Returns the limits of the store.
pub fn store_limits(jobs: &JobsConfig) -> StoreLimits {
    StoreLimits {
        max_jobs: jobs.max_jobs,
        max_size: jobs.max_size,
    }
}

/// Returns what an enqueue of this method gets.
pub fn enqueue_defaults(jobs: &JobsConfig, method: &str) -> EnqueueDefaults {
    let rules = jobs.rules(method);
    EnqueueDefaults {
        priority: rules.priority,
        max_attempts: rules.max_attempts,
        timeout_ms: milliseconds(rules.timeout).max(1),
    }
}

/// Returns the rules for the retries of this method.
pub fn retry_rules(jobs: &JobsConfig, method: &str) -> RetryRules {
    let rules = jobs.rules(method);
    RetryRules {
        backoff_ms: milliseconds(rules.backoff),
        max_backoff_ms: milliseconds(rules.max_backoff),
        max_crashes: rules.max_crashes,
        max_result: jobs.result,
    }
}

/// Returns how long ended jobs are kept.
pub fn retention_rules(jobs: &JobsConfig) -> RetentionRules {
    let own = jobs.methods.iter();
    RetentionRules {
        default: retention(&jobs.defaults),
        methods: own
            .map(|(method, rules)| (method.clone(), retention(rules)))
            .collect::<BTreeMap<_, _>>(),
    }
}

fn retention(rules: &JobRules) -> Retention {
    Retention {
        done_ms: milliseconds(rules.keep_done),
        dead_ms: milliseconds(rules.keep_dead),
        cancelled_ms: milliseconds(rules.keep_cancelled),
    }
}

/// Returns a duration in milliseconds.
pub fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
pub mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::config::JobStore;

    /// Any configuration.
    pub fn config() -> JobsConfig {
        let seconds = Duration::from_secs;
        let defaults = JobRules {
            max_attempts: 10,
            backoff: seconds(5),
            max_backoff: seconds(60),
            max_crashes: 3,
            timeout: seconds(600),
            drain_timeout: seconds(30),
            priority: 0,
            keep_done: seconds(1),
            keep_dead: seconds(3),
            keep_cancelled: seconds(2),
        };
        let mail = JobRules {
            priority: 4,
            timeout: Duration::from_micros(10),
            keep_done: seconds(9),
            ..defaults.clone()
        };
        JobsConfig {
            store: JobStore::Sqlite("/jobs.db".into()),
            concurrency: 4,
            defaults,
            methods: BTreeMap::from([("mail".to_owned(), mail)]),
            lease: seconds(30),
            poll: seconds(1),
            enqueue_timeout: seconds(5),
            max_jobs: 7,
            max_size: 1 << 20,
            result: 64,
        }
    }

    #[test]
    fn each_method_has_its_own_rules_or_the_defaults() {
        let jobs = config();
        let (mail, other) = (
            enqueue_defaults(&jobs, "mail"),
            enqueue_defaults(&jobs, "x"),
        );
        assert_eq!((mail.priority, mail.timeout_ms), (4, 1));
        assert_eq!((other.priority, other.timeout_ms), (0, 600_000));
        assert_eq!(retry_rules(&jobs, "x").max_backoff_ms, 60_000);
        assert_eq!(retry_rules(&jobs, "x").max_result, 64);
        let retention = retention_rules(&jobs);
        assert_eq!(retention.of("mail").done_ms, 9_000);
        assert_eq!(retention.of("x").done_ms, 1_000);
        assert_eq!(retention.of("x").dead_ms, 3_000);
        assert_eq!(store_limits(&jobs).max_jobs, 7);
    }
}
