//! Remembers which processes have a link to each other, so that two requests at the same time make one
//! link.

use std::collections::HashMap;

use crate::link::ids::Pid;
use crate::master::policy::event::Millis;

/// The most links of a worker to other workers. Each needs a descriptor in both.
const MAX_LINKS: usize = 64;
/// The time after which a request means that the link was lost, in milliseconds.
const LINK_AGAIN_MS: Millis = 1000;

/// The links between living processes.
#[derive(Debug, Default)]
pub struct Links {
    /// When each link was made, by the two pids, the lower one first.
    made: HashMap<(Pid, Pid), Millis>,
}

impl Links {
    /// Returns whether the two are to be linked now, and remembers the link. A link to a pool process does
    /// not count for a worker's limit.
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

    /// Forgets the links of a process that has ended.
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
