//! Decides which calls have a line: a share of them, all errors, and all slow ones. Pure.
//!
//! The share is decided by a hash of the trace id, or of the call id without one. So all processes decide the same
//! for a trace, and a trace that is there is complete.

use crate::config::AccessLogConfig;
use crate::link::metrics_board::layout::{NAMES, OTHER};
use crate::protocol::trace_context::{sample_hash, sample_limit};

/// The rules of a process.
#[derive(Debug)]
pub struct AccessRules {
    /// Calls with a hash below this have a line; `None`: all.
    limit: Option<u64>,
    /// Calls that take longer have one; `None`: there is no such rule.
    above_ns: Option<u64>,
    /// Whether calls of a method may have a line, by its place on the metrics board; empty: all may.
    places: Box<[bool]>,
    /// The names of such methods, for those without a place of their own.
    names: Box<[String]>,
}

impl AccessRules {
    /// Creates the rules of `config`. `place` returns the place of a method by its name.
    pub fn new(config: &AccessLogConfig, place: impl Fn(&str) -> usize) -> Self {
        let mut places = Vec::new();
        if !config.methods.is_empty() {
            places.resize(NAMES, false);
        }
        for name in &config.methods {
            if let Some(is_in) = places.get_mut(place(name)) {
                *is_in = true;
            }
        }
        let above = config.always_above;
        AccessRules {
            limit: sample_limit(config.sample),
            above_ns: (!above.is_zero()).then_some(above.as_nanos() as u64),
            places: places.into(),
            names: config.methods.clone().into(),
        }
    }

    /// Returns whether the time of a call matters.
    #[inline]
    pub fn has_time(&self) -> bool {
        self.above_ns.is_some()
    }

    /// Returns whether a call has a line. `place` and `name` are those of its method. `trace_id` is 0 without a trace;
    /// `pid` and `number` are the parts of the call's own id.
    #[inline]
    pub fn takes(
        &self,
        (place, name): (usize, &str),
        (trace_id, pid, number): (u128, i32, u64),
        is_error: bool,
        total_ns: u64,
    ) -> bool {
        if !self.places.is_empty() && !self.is_listed(place, name) {
            return false;
        }
        let Some(limit) = self.limit else { return true };
        let id = match trace_id {
            0 => u128::from(pid.unsigned_abs()) << 64 | u128::from(number),
            trace_id => trace_id,
        };
        is_error || sample_hash(id) < limit || self.above_ns.is_some_and(|above| total_ns > above)
    }

    fn is_listed(&self, place: usize, name: &str) -> bool {
        match place {
            OTHER => self.names.iter().any(|it| it == name),
            place => self.places.get(place).is_some_and(|is_in| *is_in),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::LogFormat;

    fn rules(sample: f64, above_ms: u64, methods: &[&str]) -> AccessRules {
        let config = AccessLogConfig {
            file: None,
            format: LogFormat::Json,
            sample,
            always_above: Duration::from_millis(above_ms),
            methods: methods.iter().map(|name| (*name).to_owned()).collect(),
        };
        AccessRules::new(&config, |name| name.len())
    }

    fn count(rules: &AccessRules, is_error: bool, total_ns: u64) -> usize {
        let takes = |number: &u64| rules.takes((3, "abc"), (0, 4712, *number), is_error, total_ns);
        (0..10_000).filter(takes).count()
    }

    #[test]
    fn a_share_of_the_calls_all_errors_and_all_slow_ones_have_a_line() {
        for (sample, least, most) in [(1.0, 10_000, 10_000), (0.0, 0, 0), (0.1, 900, 1100)] {
            let rules = rules(sample, 5, &[]);
            let taken = count(&rules, false, 5_000_000);
            assert!((least..=most).contains(&taken), "{sample}: {taken}");
            assert_eq!(count(&rules, true, 0), 10_000);
            assert_eq!(count(&rules, false, 5_000_001), 10_000);
        }
        assert_eq!(count(&rules(0.0, 0, &[]), false, u64::MAX), 0);
    }

    #[test]
    fn all_processes_decide_the_same_for_a_trace() {
        let rules = rules(0.5, 0, &[]);
        for trace_id in 1..100 {
            let first = rules.takes((1, ""), (trace_id, 1, 1), false, 0);
            let again = rules.takes((2, ""), (trace_id, 2, 9), false, 0);
            assert_eq!(first, again, "{trace_id}");
        }
    }

    #[test]
    fn only_calls_of_listed_methods_have_a_line_errors_included() {
        let rules = rules(1.0, 0, &["abc", "rpc.cancel"]);
        for (place, name, is_taken) in [
            (3, "", true),
            (4, "", false),
            (OTHER, "rpc.cancel", true),
            (OTHER, "other", false),
        ] {
            assert_eq!(
                rules.takes((place, name), (0, 1, 1), true, 0),
                is_taken,
                "{name}"
            );
        }
    }
}
