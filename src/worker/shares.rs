//! Who pays when something is used up that all clients share: the source that has the most of it.
//!
//! A source is an address, a network of IPv6 (/64) or a user. Sources come first, then the connections of a
//! source. So a client with many connections, or with much on one of them, makes room for clients with
//! little. Pure.

use std::net::{Ipv4Addr, SocketAddr};

use rustc_hash::FxHashMap;

use crate::sys::event::Token;

/// Where connections come from, as far as they share a share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Source {
    V4(Ipv4Addr),
    /// The first 64 bits of an IPv6 address.
    V6(u64),
    /// The user at the other end of a unix socket.
    User(u32),
    /// It has left before it could be seen.
    Unknown,
}

impl Source {
    /// That of a connection. `user` is asked where there is no address.
    pub fn of(peer: Option<SocketAddr>, user: impl FnOnce() -> Option<u32>) -> Self {
        match peer {
            Some(SocketAddr::V4(peer)) => Source::V4(*peer.ip()),
            Some(SocketAddr::V6(peer)) => match peer.ip().to_ipv4_mapped() {
                Some(ip) => Source::V4(ip),
                None => Source::V6((u128::from(*peer.ip()) >> 64) as u64),
            },
            None => user().map_or(Source::Unknown, Source::User),
        }
    }
}

/// What each source and each of its connections has of something shared.
#[derive(Debug, Default)]
pub struct Shares {
    sources: FxHashMap<Source, Share>,
}

#[derive(Debug, Default)]
struct Share {
    total: usize,
    connections: FxHashMap<Token, usize>,
}

impl Shares {
    /// A connection has `amount` more.
    pub fn add(&mut self, (source, token): (Source, Token), amount: usize) {
        if amount > 0 {
            let share = self.sources.entry(source).or_default();
            share.total += amount;
            *share.connections.entry(token).or_default() += amount;
        }
    }

    /// A connection has `amount` less. What has nothing left is forgotten.
    pub fn remove(&mut self, (source, token): (Source, Token), amount: usize) {
        let Some(share) = self.sources.get_mut(&source) else {
            return;
        };
        share.total = share.total.saturating_sub(amount);
        if let Some(has) = share.connections.get_mut(&token) {
            *has = has.saturating_sub(amount);
            if *has == 0 {
                share.connections.remove(&token);
            }
        }
        if share.connections.is_empty() {
            self.sources.remove(&source);
        }
    }

    /// All is used up and a connection wants `amount` more: the connection at whose cost it gets that;
    /// `None` if it is to be refused itself. It looks at all connections, so it is for the rare case.
    pub fn payer(&self, (source, token): (Source, Token), amount: usize) -> Option<Token> {
        let own = self.sources.get(&source);
        let own_total = own.map_or(0, |share| share.total) + amount;
        let most = self.sources.values().max_by_key(|share| share.total)?;
        if most.total > own_total {
            return most.largest().map(|(token, _)| token);
        }
        let own = own?;
        let own_amount = own.connections.get(&token).map_or(0, |has| *has) + amount;
        let (largest, has) = own.largest()?;
        (has > own_amount).then_some(largest)
    }

    /// All that may pay instead of `payer`, if that has nothing to pay with: those with the most first.
    pub fn other_payers(&self, (source, token): (Source, Token), amount: usize) -> Vec<Token> {
        let own = self.sources.get(&source);
        let total = own.map_or(0, |share| share.total) + amount;
        let has = own.and_then(|own| own.connections.get(&token));
        let has = has.copied().unwrap_or(0) + amount;
        let richer = self.sources.iter().filter(|(_, share)| share.total > total);
        let of_others = richer.flat_map(|(_, share)| &share.connections);
        let of_own = own.into_iter().flat_map(|own| &own.connections);
        let of_own = of_own.filter(|(_, amount)| **amount > has);
        let mut all: Vec<(usize, Token)> = (of_others.chain(of_own))
            .map(|(token, has)| (*has, *token))
            .collect();
        all.sort_unstable_by_key(|(has, _)| std::cmp::Reverse(*has));
        all.into_iter().map(|(_, token)| token).collect()
    }

    /// Whether a connection and its source have at least half as much as those that have the most.
    pub fn is_heavy(&self, (source, token): (Source, Token)) -> bool {
        let Some(own) = self.sources.get(&source) else {
            return false;
        };
        let most = self.sources.values().map(|share| share.total).max();
        let largest = own.largest().map(|(_, has)| has);
        let amount = own.connections.get(&token).copied().unwrap_or(0);
        2 * own.total >= most.unwrap_or(0) && 2 * amount >= largest.unwrap_or(0)
    }

    /// The largest connection of the source with the most.
    pub fn heaviest(&self) -> Option<Token> {
        let most = self.sources.values().max_by_key(|share| share.total)?;
        most.largest().map(|(token, _)| token)
    }
}

impl Share {
    fn largest(&self) -> Option<(Token, usize)> {
        let connections = self.connections.iter().map(|(token, has)| (*token, *has));
        connections.max_by_key(|(_, has)| *has)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(source: u8, connection: usize) -> (Source, Token) {
        let token = Token::for_test(usize::from(source) * 10 + connection);
        (Source::User(source.into()), token)
    }

    #[test]
    fn networks_and_users_are_sources() {
        let of = |text: &str| Source::of(Some(text.parse().unwrap()), || None);
        assert_eq!(of("10.0.0.1:1"), of("10.0.0.1:2"));
        assert_ne!(of("10.0.0.1:1"), of("10.0.0.2:1"));
        assert_eq!(of("[2001:db8::1]:1"), of("[2001:db8::ffff:0:2]:2"));
        assert_ne!(of("[2001:db8::1]:1"), of("[2001:db8:0:1::1]:1"));
        assert_eq!(of("[::ffff:10.0.0.1]:1"), of("10.0.0.1:1"));
        assert_eq!(Source::of(None, || Some(7)), Source::User(7));
        assert_eq!(Source::of(None, || None), Source::Unknown);
    }

    #[test]
    fn the_source_with_the_most_pays_with_its_largest_connection() {
        let mut shares = Shares::default();
        shares.add(of(1, 0), 5);
        shares.add(of(1, 1), 6);
        shares.add(of(2, 0), 7);
        assert_eq!(shares.payer(of(3, 0), 1), Some(of(1, 1).1));
        assert_eq!(shares.payer(of(2, 0), 1), Some(of(1, 1).1));
        assert_eq!(shares.payer(of(2, 0), 4), None, "it would have as much");
        assert_eq!(
            shares.payer(of(1, 0), 1),
            None,
            "its other one would have as much"
        );
        assert_eq!(shares.payer(of(1, 2), 1), Some(of(1, 1).1));
        let others = shares.other_payers(of(3, 0), 1);
        assert_eq!(others, [of(2, 0).1, of(1, 1).1, of(1, 0).1]);
        assert_eq!(shares.other_payers(of(1, 0), 0), [of(1, 1).1]);
        assert!(shares.is_heavy(of(1, 0)) && shares.is_heavy(of(2, 0)));
        assert!(!shares.is_heavy(of(1, 2)) && !shares.is_heavy(of(3, 0)));
        shares.remove(of(1, 1), 6);
        assert_eq!(shares.payer(of(3, 0), 1), Some(of(2, 0).1));
        shares.remove(of(1, 0), 5);
        shares.remove(of(2, 0), 7);
        assert_eq!(shares.payer(of(3, 0), 1), None);
        assert!(shares.sources.is_empty());
    }

    proptest! {
        /// The payer has more than the newcomer will have, as a source or within it.
        #[test]
        fn the_payer_has_more_than_the_newcomer(
            steps in prop::collection::vec((0..4_u8, 0..3_usize, 0..5_usize), 1..60), more in 0..5_usize,
        ) {
            let mut shares = Shares::default();
            let mut has = FxHashMap::<(u8, usize), usize>::default();
            for (source, connection, amount) in &steps {
                shares.add(of(*source, *connection), *amount);
                *has.entry((*source, *connection)).or_default() += amount;
            }
            let total = |of: u8| has.iter().filter(|(key, _)| key.0 == of).map(|(_, has)| has).sum::<usize>();
            let largest = (0..4).map(total).max().unwrap();
            for ((source, connection), own) in &has {
                match shares.payer(of(*source, *connection), more) {
                    Some(payer) => {
                        let payer = (payer.index() / 10) as u8;
                        let is_richer = total(payer) == largest && largest > total(*source) + more;
                        prop_assert!(payer == *source || is_richer);
                    }
                    None => {
                        prop_assert!(total(*source) + more >= largest);
                        prop_assert!(has.iter().all(|(key, it)| key.0 != *source || *it <= own + more));
                    }
                }
            }
            for ((source, connection), amount) in has {
                shares.remove(of(source, connection), amount);
            }
            prop_assert!(shares.sources.is_empty());
        }
    }
}
