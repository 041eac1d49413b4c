//! What a worker knows of one method: how many of its calls it has, what its rate still allows, and
//! what its calls took of late. Pure.

use std::time::Duration;

/// What the programs of a pool have ahead is done within this time, as far as can be expected; and this
/// number of calls at most for each.
const SHORT_AHEAD: Duration = Duration::from_millis(1);
const MOST_AHEAD_EACH: usize = 16;
/// The estimate of a run time follows each run by so much: a part of itself.
const STEP: u64 = 8;

/// A method's calls of late.
#[derive(Debug, Clone, Default)]
pub struct MethodStats {
    /// Where its calls wait and run.
    pub lane: usize,
    /// Waiting and running ones.
    pub current: usize,
    /// Bytes of its last result: what the next one is expected to be.
    pub last_result: usize,
    /// Calls that the rate still allows, in thousandths.
    credit: u64,
    credited_ms: u64,
    /// How long a call runs, in microseconds: half of the last ones took longer. 0 where none ran.
    median_us: u64,
}

impl MethodStats {
    /// That of a method which has had no call.
    pub fn in_lane(lane: usize) -> Self {
        MethodStats {
            lane,
            ..MethodStats::default()
        }
    }

    /// Counts one more call at `rate` a second, if that allows it.
    pub fn admit(&mut self, rate: u32, now_ms: u64) -> bool {
        let rate = u64::from(rate);
        // Thousandths a millisecond are calls a second; a second's worth can be saved up.
        let earned = now_ms.saturating_sub(self.credited_ms).saturating_mul(rate);
        self.credit = self.credit.saturating_add(earned).min(rate * 1000);
        self.credited_ms = now_ms;
        let admitted = self.credit >= 1000;
        if admitted {
            self.credit -= 1000;
        }
        admitted
    }

    /// A call has run for so long; `cut`: it was given up, so it might have run for longer.
    pub fn record_run(&mut self, took: Duration, cut: bool) {
        let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
        let step = (self.median_us / STEP).max(1);
        // The median, not the mean: one call of ten seconds says nothing about the next.
        self.median_us = match self.median_us {
            // The first one may be the one that hangs: it is no reason to refuse the next.
            0 if cut => 0,
            0 => took_us,
            typical if took_us > typical => typical.saturating_add(step).min(took_us),
            typical if cut => typical,
            typical => typical.saturating_sub(step).max(took_us),
        };
    }

    /// How long a call is expected to run; `None` where none has run yet.
    pub fn expected(&self) -> Option<Duration> {
        (self.median_us > 0).then(|| Duration::from_micros(self.median_us))
    }
}

/// How many calls `programs` programs of a pool with these methods may have ahead. A call that goes to
/// another process and back costs more than a short call takes, so several of those go at once.
pub fn ahead_of_programs<'a>(
    methods: impl Iterator<Item = &'a MethodStats>,
    programs: usize,
) -> usize {
    let slowest = methods.filter_map(MethodStats::expected).max();
    let Some(slowest) = slowest.filter(|_| programs > 0) else {
        return 0;
    };
    let in_time = SHORT_AHEAD.as_micros() / slowest.as_micros().max(1);
    let each = usize::try_from(in_time).unwrap_or(MOST_AHEAD_EACH);
    programs * each.min(MOST_AHEAD_EACH)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn programs_have_short_calls_ahead_and_none_where_one_method_is_slow() {
        let of = |runs_us: &[u64]| {
            let mut load = MethodStats::in_lane(1);
            for run in runs_us {
                load.record_run(Duration::from_micros(*run), false);
            }
            load
        };
        let ahead = |loads: &[MethodStats]| ahead_of_programs(loads.iter(), 2);
        assert_eq!(ahead(&[of(&[])]), 0, "nothing is known");
        assert_eq!(ahead(&[of(&[10]), of(&[])]), 32);
        assert_eq!(ahead(&[of(&[250])]), 8);
        assert_eq!(ahead(&[of(&[10]), of(&[2000])]), 0);
        assert_eq!(ahead_of_programs([of(&[10])].iter(), 0), 0);
    }

    fn after(load: &mut MethodStats, runs: impl IntoIterator<Item = u64>) -> u64 {
        for run in runs {
            load.record_run(Duration::from_millis(run), false);
        }
        u64::try_from(load.expected().unwrap().as_millis()).unwrap()
    }

    #[test]
    fn the_expectation_follows_what_most_calls_take() {
        let mut load = MethodStats::default();
        assert_eq!(load.expected(), None);
        assert_eq!(after(&mut load, [5]), 5);
        assert_eq!(after(&mut load, [30_000, 5]), 5, "one of half a minute");
        let rare = (0..1000).map(|run| if run % 10 == 0 { 1000 } else { 5 });
        assert!((5..8).contains(&after(&mut load, rare)));
        assert_eq!(after(&mut load, [50; 30]), 50, "it has become slower");
        assert_eq!(after(&mut load, [1; 60]), 1, "and faster again");
    }

    #[test]
    fn a_call_that_was_cut_off_is_no_proof_of_speed() {
        let mut load = MethodStats::default();
        load.record_run(Duration::from_secs(4), true);
        assert_eq!(load.expected(), None);
        after(&mut load, [100]);
        (0..50).for_each(|_| load.record_run(Duration::from_millis(10), true));
        assert_eq!(load.expected(), Some(Duration::from_millis(100)));
        load.record_run(Duration::from_millis(900), true);
        assert!(load.expected() > Some(Duration::from_millis(100)));
    }

    #[test]
    fn a_rate_lets_a_seconds_worth_be_saved_up() {
        let mut load = MethodStats::default();
        assert_eq!((0..20).filter(|_| load.admit(10, 1_000_000)).count(), 10);
        assert!(load.admit(10, 1_000_100));
        assert!(!load.admit(10, 1_000_100));
    }
}
