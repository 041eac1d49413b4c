//! Decides when connections are moved between workers, and how many each worker sends or adopts.
//!
//! Pure. New connections are distributed when they are accepted, but lasting ones stay. So after a
//! scale-up, a reload or the replacement of a worker the numbers can be uneven. After such a change the
//! numbers are checked for a few seconds, and each check orders at most one round of moves. At other times
//! nothing is checked. If a worker does not obey (it is stopped, or its connections are never quiescent),
//! the next check orders a new round.

use std::collections::BTreeSet;

use super::event::Millis;
use crate::link::ids::Pid;

/// The time from a change to the first check. Draining workers have handed over most connections by then.
const FIRST_LOOK: Millis = 250;
/// The time between two checks. A round of moves is completed within it.
const NEXT_LOOK: Millis = 250;
/// The time from a worker's report to the first check. Most of the burst is accepted by then.
const LOOK_SOON: Millis = 50;
/// How long the numbers are checked after a worker's report.
const LOOKS_AFTER_ACCEPTS: Millis = 1_500;
/// How long the numbers are checked after a change of the workers.
const LOOKS_FOR: Millis = 5_000;
/// How far above the mean a worker may be, in percent. [`LESS_PERCENT`]: how far below. Within these bounds no round is
/// started, so that normal changes move no connections.
const MORE_PERCENT: usize = 10;
const LESS_PERCENT: usize = 25;

/// The order to one worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    pub pid: Pid,
    /// The number of connections to send, if that many are quiescent.
    pub give: usize,
    /// The number of connections to adopt. After that the worker adopts no more for a short time.
    pub take: usize,
}

/// The times of the checks.
#[derive(Debug, Default)]
pub struct Rebalancer {
    /// The workers at the last [`Rebalancer::note`].
    workers: BTreeSet<Pid>,
    next: Option<Millis>,
    until: Millis,
    /// Until when a check counts as one after a change of the workers.
    change_until: Millis,
}

impl Rebalancer {
    /// Takes the pids of all living workers, including those that drain. If the set has changed since the last call,
    /// checks start.
    pub fn note(&mut self, workers: impl Iterator<Item = Pid>, now: Millis) {
        let workers: BTreeSet<Pid> = workers.collect();
        if workers != self.workers {
            self.workers = workers;
            self.next.get_or_insert(now + FIRST_LOOK);
            self.until = now + LOOKS_FOR;
            self.change_until = self.until;
        }
    }

    /// Returns whether the workers have changed recently. Then connections that were moved before may have
    /// to be moved again.
    pub fn is_after_change(&self, now: Millis) -> bool {
        now <= self.change_until
    }

    /// Starts checks because a worker has accepted more than its share.
    pub fn look_soon(&mut self, now: Millis) {
        self.next.get_or_insert(now + LOOK_SOON);
        self.until = self.until.max(now + LOOKS_AFTER_ACCEPTS);
    }

    /// Returns when the next check is due.
    pub fn next(&self) -> Option<Millis> {
        self.next
    }

    /// If a check is due, returns the orders of one round; none if the numbers are within the bounds. `counts` gives
    /// the number of connections of each worker that serves.
    pub fn plan(&mut self, counts: impl FnOnce() -> Vec<(Pid, usize)>, now: Millis) -> Vec<Share> {
        if self.next.is_none_or(|at| at > now) {
            return Vec::new();
        }
        self.next = Some(now + NEXT_LOOK).filter(|&at| at <= self.until);
        shares(counts())
    }
}

/// Returns the orders that make the numbers even; none if they are within the bounds. Orders to send come last:
/// otherwise a worker that has no order yet could adopt the connections that are sent.
fn shares(mut counts: Vec<(Pid, usize)>) -> Vec<Share> {
    let total: usize = counts.iter().map(|(_, count)| count).sum();
    let fullest = counts.iter().map(|(_, count)| *count).max().unwrap_or(0);
    let emptiest = counts.iter().map(|(_, count)| *count).min().unwrap_or(0);
    let workers = counts.len();
    let is_full = fullest > total.div_ceil(workers.max(1))
        && fullest * workers * 100 > total * (100 + MORE_PERCENT);
    let is_empty = emptiest + 1 < total / workers.max(1)
        && emptiest * workers * 100 < total * (100 - LESS_PERCENT);
    if !is_full && !is_empty {
        return Vec::new();
    }
    // The workers that have the most connections keep the remainder, so that fewer connections move.
    counts.sort_by_key(|&(pid, count)| (std::cmp::Reverse(count), pid));
    let (each, more) = (total / workers, total % workers);
    let share = |(index, (pid, count)): (usize, (Pid, usize))| {
        let target = each + usize::from(index < more);
        Share {
            pid,
            give: count.saturating_sub(target),
            take: target.saturating_sub(count),
        }
    };
    let mut orders: Vec<Share> = counts.into_iter().enumerate().map(share).collect();
    orders.reverse();
    orders
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_report_of_a_worker_starts_a_few_looks_and_no_more() {
        let mut spread = Rebalancer::default();
        assert_eq!(spread.next(), None);
        spread.look_soon(1000);
        spread.look_soon(1010);
        assert_eq!(spread.next(), Some(1050));
        assert_eq!(spread.plan(|| of(&[20, 0]), 1050).len(), 2);
        let mut looks = 0;
        while let Some(at) = spread.next() {
            assert!(spread.plan(|| of(&[10, 10]), at).is_empty());
            looks += 1;
        }
        assert!((1..10).contains(&looks), "{looks}");
    }

    fn of(counts: &[usize]) -> Vec<(Pid, usize)> {
        let pids = (1..).map(Pid);
        pids.zip(counts.iter().copied()).collect()
    }

    #[test]
    fn what_is_even_enough_is_left_alone() {
        for counts in [
            &[][..],
            &[7],
            &[0, 0],
            &[1, 0],
            &[2, 1, 1, 1],
            &[105, 95, 100, 100],
            &[110, 90],
            &[105, 105, 105, 80],
        ] {
            assert!(shares(of(counts)).is_empty(), "{counts:?}");
        }
    }

    #[test]
    fn the_full_give_what_the_empty_take() {
        let told = |pid, give, take| Share {
            pid: Pid(pid),
            give,
            take,
        };
        assert_eq!(
            shares(of(&[10, 201, 0])),
            [told(3, 0, 70), told(1, 0, 60), told(2, 130, 0)]
        );
        assert_eq!(shares(of(&[2, 0])), [told(2, 0, 1), told(1, 1, 0)]);
        // A new worker gets its share even if no other worker is far above the mean.
        let mut many = vec![100; 19];
        many.push(0);
        assert_eq!(shares(of(&many)).first(), Some(&told(20, 0, 95)));
    }

    #[test]
    fn it_looks_for_a_while_after_a_change_and_then_no_more() {
        let mut spread = Rebalancer::default();
        let workers = || [Pid(1), Pid(2)].into_iter();
        assert_eq!(spread.next(), None);
        spread.note(workers(), 1000);
        assert_eq!(spread.next(), Some(1250));
        let uneven = || of(&[9, 0]);
        assert!(spread.plan(uneven, 1249).is_empty());
        assert_eq!(spread.plan(uneven, 1250).len(), 2);
        // The workers are the same, so the time of the checks is not extended.
        spread.note(workers(), 1300);
        let mut now = 1250;
        while let Some(at) = spread.next() {
            now = at;
            spread.plan(|| of(&[5, 5]), now);
        }
        assert!((5_500..=6_000).contains(&now), "{now}");
        assert!(spread.plan(uneven, now + 1).is_empty());
        spread.note([Pid(1)].into_iter(), 9000);
        assert_eq!(spread.next(), Some(9250));
    }

    proptest! {
        #[test]
        fn a_round_that_is_obeyed_leaves_them_even(counts in prop::collection::vec(0..500_usize, 1..20)) {
            let orders = shares(of(&counts));
            let mut after = counts.clone();
            for Share { pid, give, take } in &orders {
                let held = &mut after[pid.0 as usize - 1];
                prop_assert!(*give == 0 || *take == 0);
                *held = *held + take - give;
            }
            prop_assert_eq!(after.iter().sum::<usize>(), counts.iter().sum::<usize>());
            prop_assert!(shares(of(&after)).is_empty());
            if !orders.is_empty() {
                let (least, most) = (after.iter().min().unwrap(), after.iter().max().unwrap());
                prop_assert!(most - least <= 1);
            }
        }
    }
}
