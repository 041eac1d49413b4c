//! Which processes have a link to each other, so that two that ask at once get one.

use std::collections::HashMap;

use crate::link::ids::Pid;
use crate::master::policy::event::Millis;

/// Links of a worker to other workers, at most: each costs it a descriptor.
const MAX_LINKS: usize = 64;
/// A pair that asks again later than this has lost its link. Milliseconds.
const LINK_AGAIN_MS: Millis = 1000;

/// The links that were made between processes that live.
#[derive(Debug, Default)]
pub struct Links {
    /// When, by the two ends, the lower pid first.
    made: HashMap<(Pid, Pid), Millis>,
}

impl Links {
    /// Whether the two are to be linked now; then they count as linked. A link to a pool process does
    /// not count to a worker's limit.
    pub fn begin(&mut self, one: Pid, other: Pid, is_pool: bool, now: Millis) -> bool {
        let pair = (one.min(other), one.max(other));
        let is_new = |at: &Millis| now.saturating_sub(*at) < LINK_AGAIN_MS;
        if self.made.get(&pair).is_some_and(is_new) {
            return false;
        }
        if !is_pool && (self.count(one) >= MAX_LINKS || self.count(other) >= MAX_LINKS) {
            return false;
        }
        self.made.insert(pair, now);
        true
    }

    fn count(&self, pid: Pid) -> usize {
        let ends = self.made.keys();
        ends.filter(|(one, other)| *one == pid || *other == pid)
            .count()
    }

    /// A process has ended, and its links with it.
    pub fn forget(&mut self, pid: Pid) {
        self.made
            .retain(|(one, other), _| *one != pid && *other != pid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_that_ask_at_once_get_one_link() {
        let mut links = Links::default();
        assert!(links.begin(Pid(1), Pid(2), false, 10));
        assert!(!links.begin(Pid(2), Pid(1), false, 20));
        assert!(links.begin(Pid(2), Pid(1), false, 10 + LINK_AGAIN_MS));
    }

    #[test]
    fn a_worker_has_so_many_links_to_workers_and_those_to_pools_besides() {
        let mut links = Links::default();
        for other in 0..MAX_LINKS as i32 {
            assert!(links.begin(Pid(1), Pid(100 + other), false, 0));
        }
        assert!(!links.begin(Pid(1), Pid(2), false, 0));
        assert!(!links.begin(Pid(2), Pid(1), false, 0));
        assert!(links.begin(Pid(1), Pid(2), true, 0));
        links.forget(Pid(100));
        links.forget(Pid(2));
        assert!(links.begin(Pid(1), Pid(3), false, 0));
    }
}
