//! Gives free capacity to the queues in turn, so that no queue delays the claims of another.
//!
//! [`QueueTurns`] remembers which queue was served least recently. [`deal`] takes one job of each queue, then
//! a second one of each, until the capacity is used up or no queue has a due job. Engines call `deal` inside
//! a claim's transaction.

use std::collections::BTreeMap;

/// What one queue may take in a claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueShare {
    /// The name of the method.
    pub method: String,
    /// The largest number of jobs of this queue: what `concurrency` and `rate` of the method leave.
    pub most: usize,
}

/// When each queue was last served.
#[derive(Debug, Default)]
pub struct QueueTurns {
    served: BTreeMap<String, u64>,
    turn: u64,
}

impl QueueTurns {
    /// Sorts the shares of a claim: the queue that was served least recently comes first. Queues that were
    /// never served keep their order, before all others.
    pub fn sort(&self, shares: &mut [QueueShare]) {
        shares.sort_by_key(|share| self.served.get(&share.method).copied().unwrap_or(0));
    }

    /// Records that a job of this queue was claimed. Call it in the order of the claimed jobs.
    pub fn served(&mut self, method: &str) {
        self.turn += 1;
        match self.served.get_mut(method) {
            Some(turn) => *turn = self.turn,
            None => {
                self.served.insert(method.to_owned(), self.turn);
            }
        }
    }
}

/// Takes at most `most` jobs from the queues, one of each in turn. `take` returns the next due job of a
/// queue, or `None` if it has none; then it is not asked again.
///
/// # Errors
/// The first error of `take`.
pub fn deal<T, E>(
    shares: &[QueueShare],
    most: usize,
    mut take: impl FnMut(&str) -> Result<Option<T>, E>,
) -> Result<Vec<T>, E> {
    let mut taken = Vec::new();
    let mut open: Vec<(&str, usize)> = (shares.iter())
        .filter(|share| share.most > 0)
        .map(|share| (share.method.as_str(), share.most))
        .collect();
    while !open.is_empty() && taken.len() < most {
        let mut next = Vec::with_capacity(open.len());
        for (method, left) in open {
            if taken.len() == most {
                break;
            }
            if let Some(job) = take(method)? {
                taken.push(job);
                if left > 1 {
                    next.push((method, left - 1));
                }
            }
        }
        open = next;
    }
    Ok(taken)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::convert::Infallible;

    fn share(method: &str, most: usize) -> QueueShare {
        QueueShare {
            method: method.to_owned(),
            most,
        }
    }

    /// Deals from queues with these numbers of due jobs.
    fn dealt(due: &[(&str, usize)], shares: &[QueueShare], most: usize) -> Vec<String> {
        let mut due: BTreeMap<&str, usize> = due.iter().copied().collect();
        let take = |method: &str| {
            let left = due.get_mut(method).filter(|left| **left > 0);
            Ok::<_, Infallible>(left.map(|left| {
                *left -= 1;
                method.to_owned()
            }))
        };
        deal(shares, most, take).unwrap()
    }

    #[test]
    fn a_long_queue_does_not_delay_a_short_one() {
        let shares = [share("long", 9), share("short", 9)];
        let due = [("long", 1_000_000), ("short", 2)];
        assert_eq!(
            dealt(&due, &shares, 5),
            ["long", "short", "long", "short", "long"]
        );
    }

    #[test]
    fn a_queue_takes_at_most_its_share_and_no_queue_more_than_is_due() {
        let shares = [share("a", 1), share("b", 0), share("c", 5)];
        let due = [("a", 5), ("b", 5), ("c", 2)];
        assert_eq!(dealt(&due, &shares, 10), ["a", "c", "c"]);
        assert_eq!(dealt(&due, &shares, 0), [""; 0]);
        assert_eq!(dealt(&[], &shares, 10), [""; 0]);
    }

    #[test]
    fn with_capacity_for_one_the_queues_are_served_in_turn() {
        let mut turns = QueueTurns::default();
        let mut order = Vec::new();
        for _ in 0..6 {
            let mut shares = [share("a", 9), share("b", 9), share("c", 9)];
            turns.sort(&mut shares);
            for method in dealt(&[("a", 9), ("b", 9), ("c", 9)], &shares, 1) {
                turns.served(&method);
                order.push(method);
            }
        }
        assert_eq!(order, ["a", "b", "c", "a", "b", "c"]);
    }
}
