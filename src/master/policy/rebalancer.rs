//! Lasting connections spread over the workers again: who gives how many, who takes how many, and
//! when to look.
//!
//! Pure. New connections are shared out as they come; those that last stay where they are, so after a
//! scale-up, a reload or a replaced worker they can lie unevenly. A change of the workers starts a
//! few seconds of looks, each at most one round of orders; between changes nothing is looked at.
//! A round that is not obeyed (a worker that is stopped, connections that never rest) is simply
//! planned anew at the next look.

use std::collections::BTreeSet;

use super::event::Millis;
use crate::link::ids::Pid;

/// From a change to the first look: those that drain have given most of theirs by then.
const FIRST_LOOK: Millis = 250;
/// Between two looks: a round is over by then.
const NEXT_LOOK: Millis = 250;
/// From a report of a worker to the first look: the burst that it is in is mostly accepted by then.
const LOOK_SOON: Millis = 50;
/// How long after such a report it is looked.
const LOOKS_AFTER_ACCEPTS: Millis = 1_500;
/// How long after a change it is looked.
const LOOKS_FOR: Millis = 5_000;
/// One worker with more than this over the mean, or with more than that below it, in percent, and it is
/// not even: well within the quarter that is promised, and so far from even that what comes and
/// goes starts no round.
const MORE_PERCENT: usize = 10;
const LESS_PERCENT: usize = 25;

/// What one worker is to do with its connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// The worker.
    pub pid: Pid,
    /// So many it gives away, as far as they rest.
    pub give: usize,
    /// So many it takes, and no more for a moment.
    pub take: usize,
}

/// When to look.
#[derive(Debug, Default)]
pub struct Rebalancer {
    /// Who was there at the last look at them.
    workers: BTreeSet<Pid>,
    next: Option<Millis>,
    until: Millis,
    /// Until when looks are those after a change of the workers.
    change_until: Millis,
}

impl Rebalancer {
    /// Who lives now, those that drain included: whoever comes or goes may leave things uneven.
    pub fn note(&mut self, workers: impl Iterator<Item = Pid>, now: Millis) {
        let workers: BTreeSet<Pid> = workers.collect();
        if workers != self.workers {
            self.workers = workers;
            self.next.get_or_insert(now + FIRST_LOOK);
            self.until = now + LOOKS_FOR;
            self.change_until = self.until;
        }
    }

    /// Whether the workers have changed lately, so that evenness may need connections that were moved
    /// already.
    pub fn is_after_change(&self, now: Millis) -> bool {
        now <= self.change_until
    }

    /// A worker has accepted more than its share: connections may lie unevenly.
    pub fn look_soon(&mut self, now: Millis) {
        self.next.get_or_insert(now + LOOK_SOON);
        self.until = self.until.max(now + LOOKS_AFTER_ACCEPTS);
    }

    /// When `plan` is due.
    pub fn next(&self) -> Option<Millis> {
        self.next
    }

    /// If a look is due: the orders of one round, none where all is even enough. `counts` tells the
    /// connections of each worker that serves.
    pub fn plan(&mut self, counts: impl FnOnce() -> Vec<(Pid, usize)>, now: Millis) -> Vec<Share> {
        if self.next.is_none_or(|at| at > now) {
            return Vec::new();
        }
        self.next = Some(now + NEXT_LOOK).filter(|&at| at <= self.until);
        shares(counts())
    }
}

/// The orders that make them even; none where they are so already. Those that give are told last, or others
/// might take it before they are told to leave it.
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
    // What can't be shared out evenly stays with those that have most.
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
        // A fresh one gets its share, though nobody has much too much.
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
        // Nobody came or went: the time goes on.
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
