//! Keeps the statistics of one method: the number of its calls, what its rate still allows, and its
//! recent run times. Pure.

use std::time::Duration;

use super::turns::Turns;

/// How many calls the programs of a pool may have in advance: only as many as are expected to be done within this
/// time, and at most this number for each program.
const SHORT_AHEAD: Duration = Duration::from_millis(1);
const MOST_AHEAD_EACH: usize = 16;
/// The estimate of the run time moves by this fraction of itself (1/8) after each run.
const STEP: u64 = 8;

/// The recent calls of a method.
#[derive(Debug, Clone, Default)]
pub struct MethodStats {
    /// The lane in which its calls wait and run.
    pub lane: usize,
    /// The number of waiting and running calls.
    pub current: usize,
    /// The size of its last result in bytes; the next one is expected to be as large.
    pub last_result: usize,
    /// Which source gets the next free place when a limit of the method is reached.
    pub turns: Turns,
    /// Calls that the rate still allows, in thousandths.
    credit: u64,
    credited_ms: u64,
    /// The estimated median run time in microseconds; 0 if none has run.
    median_us: u64,
}

impl MethodStats {
    /// Creates the statistics of a method without calls.
    pub fn in_lane(lane: usize) -> Self {
        MethodStats {
            lane,
            ..MethodStats::default()
        }
    }

    /// Returns how many calls a limit of `rate` calls per second allows now.
    pub fn allowed(&mut self, rate: u32, now_ms: u64) -> usize {
        let rate = u64::from(rate);
        // Thousandths per millisecond equal calls per second. Up to one second's calls can be saved up.
        let earned = now_ms.saturating_sub(self.credited_ms).saturating_mul(rate);
        self.credit = self.credit.saturating_add(earned).min(rate * 1000);
        self.credited_ms = now_ms;
        usize::try_from(self.credit / 1000).unwrap_or(usize::MAX)
    }

    /// Counts a call that the rate allows.
    pub fn count_call(&mut self) {
        self.credit = self.credit.saturating_sub(1000);
    }

    /// Records a run time. `cut` says that the call was given up, so it might have run longer.
    pub fn record_run(&mut self, took: Duration, cut: bool) {
        let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
        let step = (self.median_us / STEP).max(1);
        // Use the median and not the mean, because one call of ten seconds says nothing about the next.
        self.median_us = match self.median_us {
            // The first call may be one that hangs, which is no reason to refuse the next.
            0 if cut => 0,
            0 => took_us,
            typical if took_us > typical => typical.saturating_add(step).min(took_us),
            typical if cut => typical,
            typical => typical.saturating_sub(step).max(took_us),
        };
    }

    /// Returns the expected run time; `None` if no call has run yet.
    pub fn expected(&self) -> Option<Duration> {
        (self.median_us > 0).then(|| Duration::from_micros(self.median_us))
    }
}

/// Returns how many calls the `programs` programs of a pool with these methods may get in advance. Sending a call to
/// another process costs more than a short call takes. So several short calls are sent at once.
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
    fn programs_get_short_calls_ahead_but_none_if_one_method_is_slow() {
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
    fn the_expected_run_time_follows_the_median() {
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
    fn a_call_that_was_given_up_does_not_lower_the_expected_run_time() {
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
    fn a_rate_allows_a_burst_of_one_second() {
        let mut load = MethodStats::default();
        assert_eq!(load.allowed(10, 1_000_000), 10);
        (0..10).for_each(|_| load.count_call());
        assert_eq!(load.allowed(10, 1_000_099), 0);
        assert_eq!(load.allowed(10, 1_000_100), 1);
    }
}
