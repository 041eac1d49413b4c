//! Reduces a limit by up to a tenth, so that workers that started together do not reach it together.

use crate::sys::random::scatter;

/// At most the limit divided by this is subtracted.
const DIVISOR: u64 = 10;

/// Returns `limit` less up to a tenth of it. The same `seed` (such as a pid) gives the same result.
pub fn with_jitter(limit: u64, seed: u64) -> u64 {
    limit - scatter(seed) % (limit / DIVISOR + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consecutive_seeds_get_spread_limits_at_most_a_tenth_lower() {
        let limits: Vec<u64> = (1..=1000).map(|seed| with_jitter(10_000, seed)).collect();
        assert!(limits.iter().all(|limit| (9_000..=10_000).contains(limit)));
        let lower = limits.iter().filter(|limit| **limit < 9_500).count();
        assert!((400..600).contains(&lower), "{lower} of 1000 in one half");
        let near = |pair: &&[u64]| pair[0].abs_diff(pair[1]) < 50;
        let near = limits.windows(2).filter(near).count();
        assert!(near < 150, "{near} of 999 within a twentieth of the jitter");
        assert_eq!(with_jitter(10_000, 7), limits[6]);
        assert_eq!(with_jitter(3, 7), 3);
    }
}
