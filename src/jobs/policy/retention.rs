//! Decides which ended jobs are old enough to be removed.
//!
//! Each method may keep its jobs for another time than the others, so the oldest job is not always the next
//! one to go. [`RetentionScan`] goes through the ended jobs of a state by their end, once for each distinct
//! retention. A pass looks only at jobs that became old enough since the previous pass.

use std::collections::BTreeMap;

use super::UnixMs;
use super::states::JobState;

/// How long ended jobs are kept, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    pub done_ms: u64,
    pub dead_ms: u64,
    pub cancelled_ms: u64,
}

impl Retention {
    /// Returns how long jobs of this state are kept; `None` for a live job.
    pub fn of(&self, state: JobState) -> Option<u64> {
        match state {
            JobState::Done => Some(self.done_ms),
            JobState::Dead => Some(self.dead_ms),
            JobState::Cancelled => Some(self.cancelled_ms),
            JobState::Waiting | JobState::Running => None,
        }
    }
}

/// The retention of all methods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetentionRules {
    /// For methods without an entry, also those that exist no more.
    pub default: Retention,
    pub methods: BTreeMap<String, Retention>,
}

impl RetentionRules {
    /// Returns how long ended jobs of a method are kept.
    pub fn of(&self, method: &str) -> Retention {
        self.methods.get(method).copied().unwrap_or(self.default)
    }

    /// Returns whether an ended job is to be removed, for the model. An engine does it with [`RetentionStep`].
    #[cfg(test)]
    pub fn is_over(&self, method: &str, state: JobState, end: UnixMs, now: UnixMs) -> bool {
        let kept = self.of(method).of(state);
        kept.is_some_and(|kept| end.saturating_add(kept) < now)
    }
}

/// A place among the ended jobs of a state: the end of a job and its sequence number.
pub type EndPlace = (UnixMs, u64);

/// One query of a pass: the ended jobs of `state` behind the place `after` that ended before `before`. Those
/// whose method keeps them for `kept_ms` are removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetentionStep {
    pub state: JobState,
    pub kept_ms: u64,
    pub after: EndPlace,
    pub before: UnixMs,
}

/// How far the passes have come.
#[derive(Debug, Default)]
pub struct RetentionScan {
    rules: Option<RetentionRules>,
    /// The place up to which the jobs of a state and a retention were looked at.
    looked_at: BTreeMap<(JobState, u64), EndPlace>,
}

impl RetentionScan {
    /// Says that jobs end at `now`. Call it for each transaction: if the clock was set back, they end before the
    /// place that was reached, and must be looked at later.
    pub fn clock(&mut self, now: UnixMs) {
        for place in self.looked_at.values_mut() {
            *place = (now, 0).min(*place);
        }
    }

    /// Looks at all jobs again, because some were added that ended long ago.
    pub fn restart(&mut self) {
        self.looked_at.clear();
    }

    /// Returns the queries of a pass at `now`. All jobs are looked at again if the rules have changed.
    pub fn steps(&mut self, rules: &RetentionRules, now: UnixMs) -> Vec<RetentionStep> {
        if self.rules.as_ref() != Some(rules) {
            self.rules = Some(rules.clone());
            self.restart();
        }
        self.clock(now);
        let mut steps = Vec::new();
        for state in [JobState::Done, JobState::Dead, JobState::Cancelled] {
            let all = rules.methods.values().chain([&rules.default]);
            let mut kept: Vec<u64> = all.filter_map(|kept| kept.of(state)).collect();
            kept.sort_unstable();
            kept.dedup();
            steps.extend(kept.into_iter().filter_map(|kept_ms| {
                let after = self.looked_at.get(&(state, kept_ms)).copied();
                let after = after.unwrap_or_default();
                let before = now.checked_sub(kept_ms)?;
                (after < (before, 0)).then_some(RetentionStep {
                    state,
                    kept_ms,
                    after,
                    before,
                })
            }));
        }
        steps
    }

    /// Records how far a step came: to the job at `last`, or to its end (`None`).
    pub fn reached(&mut self, step: &RetentionStep, last: Option<EndPlace>) {
        let place = last.unwrap_or((step.before, 0));
        self.looked_at.insert((step.state, step.kept_ms), place);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const DAY: u64 = 86_400_000;

    fn rules(special_ms: u64) -> RetentionRules {
        let kept = |done_ms| Retention {
            done_ms,
            dead_ms: 30 * DAY,
            cancelled_ms: DAY,
        };
        RetentionRules {
            default: kept(DAY),
            methods: BTreeMap::from([("special".to_owned(), kept(special_ms))]),
        }
    }

    #[test]
    fn a_job_is_removed_after_the_retention_of_its_method_and_state() {
        let rules = rules(2 * DAY);
        for (method, state, kept) in [
            ("other", JobState::Done, DAY),
            ("special", JobState::Done, 2 * DAY),
            ("other", JobState::Dead, 30 * DAY),
            ("other", JobState::Cancelled, DAY),
        ] {
            assert!(!rules.is_over(method, state, 1_000, 1_000 + kept));
            assert!(rules.is_over(method, state, 1_000, 1_001 + kept));
        }
        assert!(!rules.is_over("other", JobState::Waiting, 0, u64::MAX));
    }

    #[test]
    fn each_pass_continues_where_the_last_one_ended() {
        let (mut scan, rules) = (RetentionScan::default(), rules(2 * DAY));
        let now = 100 * DAY;
        let steps = scan.steps(&rules, now);
        let of = |steps: &[RetentionStep]| -> Vec<(JobState, u64)> {
            steps
                .iter()
                .map(|step| (step.state, step.kept_ms))
                .collect()
        };
        assert_eq!(
            of(&steps),
            [
                (JobState::Done, DAY),
                (JobState::Done, 2 * DAY),
                (JobState::Dead, 30 * DAY),
                (JobState::Cancelled, DAY)
            ]
        );
        assert!(steps.iter().all(|step| step.after == (0, 0)));
        for step in &steps[1..] {
            scan.reached(step, None);
        }
        scan.reached(&steps[0], Some((50 * DAY, 7)));
        let again = scan.steps(&rules, now);
        assert_eq!(of(&again), [(JobState::Done, DAY)]);
        assert_eq!(again[0].after, (50 * DAY, 7));
        scan.reached(&again[0], None);
        assert_eq!(scan.steps(&rules, now), []);
        let later = scan.steps(&rules, now + 1);
        assert_eq!(later.len(), 4);
        assert_eq!(later[0].after, (99 * DAY, 0));
        assert_eq!(later[0].before, 99 * DAY + 1);
    }

    #[test]
    fn new_rules_begin_again() {
        let (mut scan, now) = (RetentionScan::default(), 100 * DAY);
        let mut complete = |rules: &RetentionRules, now| {
            let steps = scan.steps(rules, now);
            steps.iter().for_each(|step| scan.reached(step, None));
            steps.iter().filter(|step| step.after == (0, 0)).count()
        };
        assert_eq!(complete(&rules(2 * DAY), now), 4);
        assert_eq!(complete(&rules(2 * DAY), now + 1), 0);
        assert_eq!(complete(&rules(3 * DAY), now + 1), 4);
        scan.restart();
        assert_eq!(scan.steps(&rules(3 * DAY), now + 1).len(), 4);
    }

    #[test]
    fn jobs_that_ended_while_the_clock_was_set_back_are_not_skipped() {
        let (mut scan, rules, now) = (RetentionScan::default(), rules(2 * DAY), 100 * DAY);
        for step in scan.steps(&rules, now) {
            scan.reached(&step, None);
        }
        // A job ends while the clock is three days slow, and then the clock is right again.
        scan.clock(now - 3 * DAY);
        scan.clock(now + 1);
        let steps = scan.steps(&rules, now + 1);
        let done = steps.iter().filter(|step| step.state == JobState::Done);
        let after: Vec<EndPlace> = done.map(|step| step.after).collect();
        assert_eq!(after, [(97 * DAY, 0), (97 * DAY, 0)]);
        let dead = steps.iter().find(|step| step.state == JobState::Dead);
        assert_eq!(dead.unwrap().after, (70 * DAY, 0), "an older place stays");
    }
}
