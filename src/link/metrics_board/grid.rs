//! Defines the bounds of every histogram: 36 per decade, from 10 µs to 100 s. Pure.
//!
//! In each decade the bounds are 1.0, 1.25, 1.5, … 9.75 times its beginning. A value counts in the bucket
//! of the lowest bound that is not below it. So the count up to an exported bound is exact if that
//! bound is on the grid. A quantile between 10 µs and 100 s is at most 12.5 % wrong.

/// Bounds in one decade.
const PER_DECADE: u64 = 36;
const DECADES: u64 = 7;
/// The lowest bound in nanoseconds.
const LOWEST_NS: u64 = 10_000;
/// The number of bounds: 10 µs, …, 100 s.
pub const BOUNDS: usize = (PER_DECADE * DECADES + 1) as usize;
/// The number of buckets: one for each bound, and one for longer times.
pub const BUCKETS: usize = BOUNDS + 1;

/// Returns the bound with this index, in nanoseconds.
pub const fn bound_ns(index: usize) -> u64 {
    let index = index as u64;
    let unit = LOWEST_NS / 4 * 10_u64.pow((index / PER_DECADE) as u32);
    unit * (4 + index % PER_DECADE)
}

/// Returns the bucket of a time.
#[inline]
pub fn bucket_of(ns: u64) -> usize {
    // One less, because a value equal to a bound belongs to it.
    let below = ns.saturating_sub(1);
    let Some(decade) = (below / LOWEST_NS).checked_ilog10() else {
        return 0;
    };
    if u64::from(decade) >= DECADES {
        return BUCKETS - 1;
    }
    const UNITS: [u64; DECADES as usize] = {
        let mut units = [0; DECADES as usize];
        let mut decade = 0;
        while decade < units.len() {
            units[decade] = LOWEST_NS / 4 * 10_u64.pow(decade as u32);
            decade += 1;
        }
        units
    };
    let steps = below / UNITS[decade as usize];
    1 + decade as usize * PER_DECADE as usize + (steps as usize - 4)
}

/// Returns the index of a bound; `None` if the time is not on the grid.
pub fn index_of_bound(ns: u64) -> Option<usize> {
    let index = bucket_of(ns);
    (index < BOUNDS && bound_ns(index) == ns).then_some(index)
}

/// Returns a quantile in nanoseconds, from the counts of all buckets; `None` without values. `share` is 0
/// to 1. The answer is the middle of the value's bucket, and the longest bound for longer times.
pub fn quantile_ns(counts: &[u64], share: f64) -> Option<u64> {
    // A process may have written anything.
    let total = counts
        .iter()
        .fold(0, |sum: u64, count| sum.saturating_add(*count));
    if total == 0 {
        return None;
    }
    let rank = ((total as f64 * share).ceil() as u64).clamp(1, total);
    let mut seen = 0_u64;
    let bucket = counts.iter().position(|count| {
        seen = seen.saturating_add(*count);
        seen >= rank
    });
    let bucket = bucket.unwrap_or(BOUNDS).min(BOUNDS);
    Some(match bucket {
        0 => LOWEST_NS / 2,
        BOUNDS => bound_ns(BOUNDS - 1),
        _ => (bound_ns(bucket - 1) + bound_ns(bucket)) / 2,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_bounds_are_those_of_the_contract() {
        assert_eq!(BOUNDS, 253);
        assert_eq!(bound_ns(0), 10_000);
        assert_eq!(bound_ns(BOUNDS - 1), 100_000_000_000);
        let seconds: Vec<u64> = (0..3).map(|step| bound_ns(180 + step)).collect();
        assert_eq!(seconds, [1_000_000_000, 1_250_000_000, 1_500_000_000]);
        assert!((1..BOUNDS).all(|index| bound_ns(index) > bound_ns(index - 1)));
    }

    #[test]
    fn a_bound_counts_in_its_own_bucket() {
        for index in 0..BOUNDS {
            assert_eq!(bucket_of(bound_ns(index)), index);
            assert_eq!(bucket_of(bound_ns(index) + 1), index + 1);
            assert_eq!(index_of_bound(bound_ns(index)), Some(index));
            assert_eq!(index_of_bound(bound_ns(index) + 1), None);
        }
        assert_eq!((bucket_of(0), bucket_of(u64::MAX)), (0, BUCKETS - 1));
    }

    #[test]
    fn a_quantile_of_nothing_is_none() {
        assert_eq!(quantile_ns(&[0; BUCKETS], 0.5), None);
        let mut counts = [0; BUCKETS];
        counts[BUCKETS - 1] = 1;
        assert_eq!(quantile_ns(&counts, 0.99), Some(100_000_000_000));
    }

    proptest! {
        #[test]
        fn a_value_is_between_the_bounds_of_its_bucket(ns in 10_001_u64..100_000_000_000) {
            let bucket = bucket_of(ns);
            prop_assert!(bound_ns(bucket - 1) < ns && ns <= bound_ns(bucket));
        }

        #[test]
        fn a_quantile_is_at_most_an_eighth_wrong(
            mut values in prop::collection::vec(10_001_u64..100_000_000_000, 1..200),
            share in 0.01_f64..1.0,
        ) {
            let mut counts = [0; BUCKETS];
            values.iter().for_each(|&value| counts[bucket_of(value)] += 1);
            values.sort_unstable();
            let rank = ((values.len() as f64 * share).ceil() as usize).clamp(1, values.len());
            let (exact, seen) = (values[rank - 1] as f64, quantile_ns(&counts, share).unwrap() as f64);
            prop_assert!((seen - exact).abs() <= exact * 0.125 + 1.0, "{seen} {exact}");
        }
    }
}
