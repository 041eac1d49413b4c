//! Takes up to a tenth off a limit, so that workers that started together do not reach it together.

/// At most this part of a limit is taken off.
const PART: u64 = 10;

/// Returns `limit` less up to a tenth of it. The same `seed`, such as a pid, gives the same result.
pub fn with_jitter(limit: u64, seed: u64) -> u64 {
    limit - scatter(seed) % (limit / PART + 1)
}

/// Numbers that follow each other, made to lie anywhere: the finalizer of splitmix64.
fn scatter(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_get_limits_far_apart_and_none_a_tenth_below() {
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
