//! Remembers which processes have a link to each other. So if both ask at the same time, only one link is made.

use std::collections::HashMap;

use crate::link::call_link::MAX_LINKS;
use crate::link::ids::Pid;
use crate::master::policy::event::Millis;

/// If a process asks again after this time, in milliseconds, the link was lost, and another one is made.
const LINK_AGAIN_MS: Millis = 1000;

/// The links between living processes.
#[derive(Debug, Default)]
pub struct Links {
    /// When each link was made, and whether it counts for the limit, by the two pids, the lower one first.
    made: HashMap<(Pid, Pid), (Millis, bool)>,
}

impl Links {
    /// Returns whether to link the two processes now, and remembers the link. `is_pool` says whether one of them is a
    /// pool process or jobs process: such a link does not count for the limit, because each pool needs one.
    pub fn begin(&mut self, one: Pid, other: Pid, is_pool: bool, now: Millis) -> bool {
        let pair = (one.min(other), one.max(other));
        let is_new = |(at, _): &(Millis, bool)| now.saturating_sub(*at) < LINK_AGAIN_MS;
        if self.made.get(&pair).is_some_and(is_new) {
            return false;
        }
        // The lost link does not count.
        self.made.remove(&pair);
        if !is_pool && (self.count(one) >= MAX_LINKS || self.count(other) >= MAX_LINKS) {
            return false;
        }
        self.made.insert(pair, (now, !is_pool));
        true
    }

    fn count(&self, pid: Pid) -> usize {
        let counted = self.made.iter().filter(|(_, (_, counts))| *counts);
        counted
            .filter(|((one, other), _)| *one == pid || *other == pid)
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
        for pool in 0..MAX_LINKS as i32 {
            assert!(links.begin(Pid(1), Pid(1000 + pool), true, 0));
        }
        for other in 0..MAX_LINKS as i32 {
            assert!(links.begin(Pid(1), Pid(100 + other), false, 0));
        }
        assert!(!links.begin(Pid(1), Pid(2), false, 0));
        assert!(!links.begin(Pid(2), Pid(1), false, 0));
        assert!(links.begin(Pid(1), Pid(2), true, 0));
        // A lost link is made again: it does not count twice.
        assert!(links.begin(Pid(1), Pid(101), false, LINK_AGAIN_MS));
        assert!(!links.begin(Pid(1), Pid(2), false, LINK_AGAIN_MS));
        links.forget(Pid(100));
        links.forget(Pid(2));
        assert!(links.begin(Pid(1), Pid(3), false, 0));
    }
}
