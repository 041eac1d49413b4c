//! Decides who makes room when a limit is reached that all clients share: the source with the most.
//!
//! A source is an IPv4 address, an IPv6 network (/64) or a user. Sources are compared first, then the
//! connections of a source. So a client with many connections, or with much on one of them, makes room
//! for clients with little. Pure.

use super::ranking::Ranking;
pub use crate::link::source_table::Source;
use crate::sys::event::Token;

/// How much of a shared limit each source and each of its connections uses.
#[derive(Debug, Default)]
pub struct Shares {
    sources: Ranking<Source, Ranking<Token>>,
}

impl Shares {
    /// Adds `amount` to a connection.
    pub fn add(&mut self, (source, token): (Source, Token), amount: usize) {
        if amount > 0 {
            self.sources.add(source, amount).add(token, amount);
        }
    }

    /// Subtracts `amount` from a connection. A connection or source without any is removed.
    pub fn remove(&mut self, (source, token): (Source, Token), amount: usize) {
        if let Some(connections) = self.sources.value_mut(source) {
            let less = connections.remove(token, amount);
            self.sources.remove(source, less);
        }
    }

    /// Returns the connections that must make room, in this order, if this one needs `amount` more and nothing is
    /// left. They belong to sources with more, those with the most first, and then to the own source. If there are
    /// none, the caller must refuse the connection itself.
    pub fn victims(
        &self,
        (source, token): (Source, Token),
        amount: usize,
    ) -> impl Iterator<Item = Token> {
        let own = self.sources.get(source);
        let total = amount + own.map_or(0, |own| own.amount);
        let has = amount + own.map_or(0, |own| own.value.amount(token));
        let larger = self.sources.descending();
        let larger = larger.take_while(move |share| share.amount > total);
        let of_others = larger.flat_map(|share| share.value.descending());
        let of_own = own.into_iter().flat_map(|own| own.value.descending());
        let of_own = of_own.take_while(move |connection| connection.amount > has);
        of_others.chain(of_own).map(|connection| connection.key)
    }

    /// Returns whether a connection and its source use at least half as much as the largest ones.
    pub fn is_heavy(&self, (source, token): (Source, Token)) -> bool {
        let Some(own) = self.sources.get(source) else {
            return false;
        };
        let most = self.sources.first().map_or(0, |share| share.amount);
        let largest = own.value.first().map_or(0, |largest| largest.amount);
        2 * own.amount >= most && 2 * own.value.amount(token) >= largest
    }

    /// Returns the largest connection of the source with the most.
    pub fn heaviest(&self) -> Option<Token> {
        Some(self.sources.first()?.value.first()?.key)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rustc_hash::FxHashMap;

    fn of(source: u8, connection: usize) -> (Source, Token) {
        let token = Token::for_test(usize::from(source) * 10 + connection);
        (Source::User(source.into()), token)
    }

    #[test]
    fn the_largest_connection_of_the_largest_source_makes_room() {
        let mut shares = Shares::default();
        let victims = |shares: &Shares, of: (Source, Token), amount| -> Vec<Token> {
            shares.victims(of, amount).collect()
        };
        shares.add(of(1, 0), 5);
        shares.add(of(1, 1), 6);
        shares.add(of(2, 0), 7);
        let all = [of(1, 1).1, of(1, 0).1, of(2, 0).1];
        assert_eq!(victims(&shares, of(3, 0), 1), all);
        assert_eq!(victims(&shares, of(2, 0), 1), all[..2]);
        assert_eq!(victims(&shares, of(2, 0), 4), [], "it would have as much");
        let reason = "its other one would have as much";
        assert_eq!(victims(&shares, of(1, 0), 1), [], "{reason}");
        assert_eq!(victims(&shares, of(1, 0), 0), all[..1]);
        assert_eq!(victims(&shares, of(1, 2), 1), all[..2]);
        assert!(shares.is_heavy(of(1, 0)) && shares.is_heavy(of(2, 0)));
        assert!(!shares.is_heavy(of(1, 2)) && !shares.is_heavy(of(3, 0)));
        shares.remove(of(1, 1), 6);
        assert_eq!(victims(&shares, of(3, 0), 1), [of(2, 0).1, of(1, 0).1]);
        assert_eq!(shares.heaviest(), Some(of(2, 0).1));
        shares.remove(of(1, 0), 5);
        shares.remove(of(2, 0), 7);
        assert_eq!(victims(&shares, of(3, 0), 1), []);
        assert!(shares.sources.is_empty());
    }

    proptest! {
        /// The victims are those that a search of all connections finds: they have more than the newcomer will
        /// have, as a source or within it.
        #[test]
        fn victims_are_those_of_a_search(
            steps in prop::collection::vec((0..4_u8, 0..3_usize, 0..5_usize, any::<bool>()), 1..60),
            more in 0..5_usize,
        ) {
            let mut shares = Shares::default();
            let mut has = FxHashMap::<(u8, usize), usize>::default();
            for (source, connection, amount, is_more) in steps {
                let own = has.entry((source, connection)).or_default();
                if is_more {
                    shares.add(of(source, connection), amount);
                    *own += amount;
                } else {
                    shares.remove(of(source, connection), amount.min(*own));
                    *own -= amount.min(*own);
                }
            }
            let total = |of: u8| has.iter().filter(|(key, _)| key.0 == of).map(|(_, has)| has).sum::<usize>();
            for ((source, connection), own) in &has {
                let pays = |it: &(u8, usize), amount: usize| match it.0 == *source {
                    true => amount > own + more,
                    false => amount > 0 && total(it.0) > total(*source) + more,
                };
                let mut found: Vec<_> = (has.iter().filter(|(it, amount)| pays(it, **amount)))
                    .map(|(it, amount)| (it.0 != *source, total(it.0), *amount))
                    .collect();
                found.sort_unstable_by(|one, other| other.cmp(one));
                let victims = shares.victims(of(*source, *connection), more).map(|victim| {
                    let it = ((victim.index() / 10) as u8, victim.index() % 10);
                    (it.0 != *source, total(it.0), has[&it])
                });
                let victims: Vec<_> = victims.collect();
                // Sources with the same total come one after the other, in any order.
                let mut sorted = victims.clone();
                sorted.sort_unstable_by(|one, other| other.cmp(one));
                prop_assert_eq!(&sorted, &found);
                prop_assert!(victims.is_sorted_by_key(|it| std::cmp::Reverse((it.0, it.1))));
                if let (Some(first), Some(best)) = (victims.first(), found.first()) {
                    prop_assert_eq!((first.0, first.1), (best.0, best.1));
                }
            }
            for ((source, connection), amount) in has {
                shares.remove(of(source, connection), amount);
            }
            prop_assert!(shares.sources.is_empty());
        }
    }
}
