//! Counts the connections of each source over all processes that accept, in shared memory, for `per-source`.
//!
//! Each process that accepts from a shared listener publishes its own counts, and the sum is compared with the limit.
//! The master clears the table of a dead process, so its connections do not count any more. The connections of
//! isolated listeners are in the table of sessions instead. The contents are not trusted, because a worker can write
//! all of it.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::sync::atomic::{
    AtomicU32, AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release,
};

use super::scoreboard::RECORDS;
use crate::sys::shared_memory::{self, shared_record};

/// The largest number of sources that a process can publish. It counts further sources too, but other processes do not
/// see these counts.
const SOURCES: usize = 2048;
/// The number of places where a source may be, from its first place on.
const WINDOW: usize = 32;
/// Listeners whose refusals are counted.
const LISTENERS: usize = 256;
const WORDS: usize = RECORDS / 64;
/// The shortest time between two log lines about refused connections, of all processes together.
const LOG_PERIOD_MS: u64 = 10_000;

/// Returns the address of a peer as it is shown: `unix` for one without an address.
pub fn peer_name(peer: Option<SocketAddr>) -> String {
    peer.map_or("unix".to_owned(), |peer| peer.to_string())
}

/// Where connections come from. Connections with the same source are counted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    V4(Ipv4Addr),
    /// The first 64 bits of an IPv6 address.
    V6(u64),
    /// The user of the peer of a unix socket.
    User(u32),
    /// The client disconnected before its source was read.
    Unknown,
}

impl Source {
    /// Returns the source of a connection. `user` is called if there is no address.
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

    /// Returns a number that no other source has; `None` if the source is unknown.
    fn number(self) -> Option<u64> {
        // No IPv6 address of a client begins with the 16 bits 1, 2 or 3 (RFC 4291, 2.4), so these numbers are free.
        match self {
            Source::V4(ip) => Some(1 << 48 | u64::from(u32::from(ip))),
            Source::User(user) => Some(2 << 48 | u64::from(user)),
            Source::V6(0) => Some(3 << 48),
            Source::V6(network) => Some(network),
            Source::Unknown => None,
        }
    }

    /// Returns the key under which its connections to a listener are counted; `None` if they are not counted.
    pub fn key_at(self, listener: u64) -> Option<u64> {
        Some((self.number()? ^ listener).max(1))
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::V4(ip) => ip.fmt(f),
            Source::V6(network) => {
                let network = Ipv6Addr::from(u128::from(*network) << 64);
                write!(f, "{network}/64")
            }
            Source::User(user) => write!(f, "user {user}"),
            Source::Unknown => f.write_str("unknown"),
        }
    }
}

/// Returns the number of a listener in keys, a hash (FNV-1a) of its address. All versions must use the same hash.
pub fn listener_number(address: &str) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3);
    address.bytes().fold(0xCBF2_9CE4_8422_2325, step)
}

shared_record! {
    /// A source and its connections. A count of 0: the place is free.
    #[derive(Debug)]
    struct SourceCount {
        key: AtomicU64,
        count: AtomicU32,
        unused: AtomicU32,
    }
}

shared_record! {
    /// The connections that a listener has refused. All zero: the place is free.
    #[derive(Debug)]
    struct RefusalCount {
        listener: AtomicU64,
        count: AtomicU64,
    }
}

shared_record! {
    /// The tables of all processes.
    #[derive(Debug)]
    pub struct SourceTables {
        /// A bit for each process that has published a source.
        used: [AtomicU64; WORDS],
        logged_ms: AtomicU64,
        refusals: [RefusalCount; LISTENERS],
        /// By the index of the process in the scoreboard.
        processes: [[SourceCount; SOURCES]; RECORDS],
    }
}

impl SourceTables {
    /// Creates empty tables. Also returns the file that they lie in.
    ///
    /// # Errors
    /// If there is no memory or no descriptor.
    pub fn new() -> io::Result<(&'static Self, OwnedFd)> {
        let (tables, file) = shared_memory::array(NonZeroUsize::MIN)?;
        Ok((&tables[0], file))
    }

    /// Maps the tables that the master before an upgrade has made.
    ///
    /// # Errors
    /// If there is no memory, or the file is too short.
    pub fn of(file: &OwnedFd) -> io::Result<&'static Self> {
        Ok(&shared_memory::array_in(file, NonZeroUsize::MIN)?[0])
    }

    /// Returns the places where a process may publish a key.
    fn places(&self, process: usize, key: u64) -> impl Iterator<Item = &SourceCount> {
        let first = (key.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as usize;
        let table = &self.processes[process];
        (first..first + WINDOW).map(|place| &table[place % SOURCES])
    }

    /// Returns the number of connections with this key of all processes except `own`.
    pub fn count_of_others(&self, own: usize, key: u64) -> usize {
        let words = self.used.iter().enumerate();
        let used = words.flat_map(|(word, bits)| {
            let bits = bits.load(Acquire);
            (0..64).filter_map(move |bit| (bits >> bit & 1 == 1).then_some(word * 64 + bit))
        });
        used.filter(|process| *process != own)
            .filter_map(|process| {
                let mut places = self.places(process, key);
                places.find(|place| place.key.load(Relaxed) == key)
            })
            .map(|place| place.count.load(Acquire) as usize)
            .sum()
    }

    /// Publishes how many connections with this key a process has. If its table has no place, the others do
    /// not count them.
    pub fn publish(&self, process: usize, key: u64, count: u32) {
        let is_its = |place: &&SourceCount| place.key.load(Relaxed) == key;
        let found = self.places(process, key).find(is_its);
        if let Some(place) = found {
            return place.count.store(count, Release);
        }
        let is_free = |place: &&SourceCount| place.count.load(Relaxed) == 0;
        if count > 0
            && let Some(place) = self.places(process, key).find(is_free)
        {
            // First: the process may be killed after it has written the count, which must then be cleared.
            let (word, bit) = (&self.used[process / 64], 1 << (process % 64));
            if word.load(Relaxed) & bit == 0 {
                word.fetch_or(bit, Release);
            }
            place.key.store(key, Relaxed);
            place.count.store(count, Release);
        }
    }

    /// For the master: forgets all that a process has published.
    pub fn clear(&self, process: usize) {
        let bit = 1 << (process % 64);
        if self.used[process / 64].fetch_and(!bit, Acquire) & bit != 0 {
            for place in &self.processes[process] {
                place.count.store(0, Relaxed);
                place.key.store(0, Relaxed);
            }
        }
    }

    /// Counts a refused connection of a listener. Returns how many there were.
    pub fn count_refusal(&self, listener: u64) -> u64 {
        let is_its = |one: &&RefusalCount| {
            let claimed = one.listener.compare_exchange(0, listener, Relaxed, Relaxed);
            claimed.is_ok() || claimed == Err(listener)
        };
        let found = self.refusals.iter().find(is_its);
        found.map_or(0, |one| one.count.fetch_add(1, Relaxed) + 1)
    }

    /// Returns how many connections a listener has refused.
    pub fn refusals_of(&self, listener: u64) -> u64 {
        let mut all = self.refusals.iter();
        let found = all.find(|one| one.listener.load(Relaxed) == listener);
        found.map_or(0, |one| one.count.load(Relaxed))
    }

    /// Returns whether a refusal may be logged now. If so, no process logs another one within the next 10 s.
    pub fn may_log(&self, now_ms: u64) -> bool {
        let before = self.logged_ms.load(Relaxed);
        // A time in the future is not trusted: it would silence all processes.
        let is_due = before == 0 || now_ms.abs_diff(before) >= LOG_PERIOD_MS;
        is_due
            && (self.logged_ms)
                .compare_exchange(before, now_ms.max(1), Relaxed, Relaxed)
                .is_ok()
    }
}

/// The limit of a listener.
#[derive(Debug, Clone)]
pub struct SourceLimit {
    address: String,
    /// The number of the listener in keys.
    pub listener: u64,
    /// Connections of one source at one time; 0 is no limit.
    pub most: usize,
}

impl SourceLimit {
    /// Creates the limit of the listener at this address.
    pub fn new(address: &str, most: usize) -> Self {
        SourceLimit {
            address: address.to_owned(),
            listener: listener_number(address),
            most,
        }
    }

    /// Counts a refusal, and logs it if none was logged recently. Returns the reason for the client.
    pub fn refuse(
        &self,
        tables: &SourceTables,
        (peer, source): (Option<SocketAddr>, Source),
        now_ms: u64,
    ) -> String {
        let (most, address) = (self.most, &self.address);
        let refused = tables.count_refusal(self.listener);
        if tables.may_log(now_ms) {
            let peer = peer_name(peer);
            log::warn!(
                "{source} has {most} connections to {address}, as many as per-source of the listener allows: \
                 another one is refused; let its clients share connections, or raise per-source peer={peer} \
                 refused={refused}"
            );
        }
        format!(
            "{source} has {most} connections already, as many as this listener allows; close one, or try again later"
        )
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn ipv6_networks_and_users_are_sources() {
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
    fn the_tables_of_all_processes_count_until_they_are_cleared() {
        let (tables, file) = SourceTables::new().unwrap();
        let listener = listener_number("127.0.0.1:1");
        let key = |text: &str| {
            let source = Source::of(Some(text.parse().unwrap()), || None);
            source.key_at(listener).unwrap()
        };
        let (one, other) = (key("10.0.0.1:1"), key("10.0.0.2:1"));
        tables.publish(3, one, 2);
        tables.publish(RECORDS - 1, one, 5);
        tables.publish(RECORDS - 1, other, 1);
        let again = SourceTables::of(&file).unwrap();
        assert_eq!(again.count_of_others(0, one), 7);
        assert_eq!(again.count_of_others(3, one), 5);
        assert_eq!(again.count_of_others(0, other), 1);
        tables.publish(3, one, 1);
        assert_eq!(again.count_of_others(0, one), 6);
        tables.clear(RECORDS - 1);
        assert_eq!(again.count_of_others(0, one), 1);
        assert_eq!(again.count_of_others(0, other), 0);
        tables.publish(RECORDS - 1, other, 4);
        assert_eq!(again.count_of_others(0, one), 1);
        assert_eq!(again.count_of_others(0, other), 4);
    }

    #[test]
    fn places_of_sources_that_are_gone_are_used_again() {
        let (tables, _file) = SourceTables::new().unwrap();
        for number in 1..20_000 {
            tables.publish(0, number, 1);
            assert_eq!(tables.count_of_others(1, number), 1);
            tables.publish(0, number, 0);
            assert_eq!(tables.count_of_others(1, number), 0);
        }
    }

    #[test]
    fn refusals_are_counted_by_listener_and_logged_rarely() {
        let (tables, _file) = SourceTables::new().unwrap();
        assert_eq!(tables.count_refusal(7), 1);
        assert_eq!(tables.count_refusal(8), 1);
        assert_eq!(tables.count_refusal(7), 2);
        assert_eq!([7, 8, 9].map(|it| tables.refusals_of(it)), [2, 1, 0]);
        assert!(tables.may_log(5));
        assert!(!tables.may_log(10_004));
        assert!(tables.may_log(10_005));
        tables.logged_ms.store(u64::MAX, Relaxed);
        assert!(tables.may_log(20_000));
    }

    #[test]
    fn no_two_sources_have_one_number() {
        let user = |id| Source::User(id).number();
        let of = |text: &str| Source::of(Some(text.parse().unwrap()), || None).number();
        let all = [
            of("[::1]:1"),
            of("0.0.0.0:1"),
            user(0),
            of("[2001:db8::]:1"),
        ];
        for (index, one) in all.iter().enumerate() {
            assert!(one.is_some() && !all[..index].contains(one));
        }
        assert_eq!(Source::Unknown.number(), None);
    }
}
