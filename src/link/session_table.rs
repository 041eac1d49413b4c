//! Holds the table of the sessions of all isolated listeners in shared memory. An acceptor records there which of its
//! children are sessions, and how they ended.
//!
//! Each listener has a range of records. An acceptor claims a record before it forks a session, the session writes
//! what it does, and the process that reaps the session releases the record. So when an acceptor dies, the master
//! knows which of the children that it adopts are sessions. The contents are not trusted, because a session can write
//! all of it.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{
    AtomicI32, AtomicU32, AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release,
};

use super::ids::{Generation, Pid};
use super::metrics_board::layout::OTHER;
use super::scoreboard::WorkerRecord;
use super::session_limits::ExceededTime;
use crate::link::source_table::peer_name;
use crate::sys::process::Exit;
use crate::sys::shared_memory::shared_record;

/// The largest number of sessions of one listener: of all generations, including processes that wait for a connection.
pub const SESSIONS: usize = 4096;
/// The largest number of isolated listeners. Each has a range of records.
pub const RANGES: usize = 64;

/// The number of entries for methods in a record. If more methods have calls, the last entry has the sum of the rest.
const SHOWN_METHODS: usize = 16;
/// The shortest time between two warnings of the sessions of one listener, in milliseconds.
const WARNING_MS: u64 = 10_000;

/// The largest number of unwritten lines of the access log that are counted for a session.
const MOST_LINES: u64 = 16 * 1024;

/// Values of `SessionRecord::state`.
const FREE: u32 = 0;
const SPARE: u32 = 1;
const OPEN: u32 = 2;
const CRASHED: u32 = 3;

shared_record! {
    /// The record of one session. All zero: it is free.
    #[derive(Debug)]
    pub struct SessionRecord {
        /// The part that a worker has in its scoreboard record.
        pub worker: WorkerRecord,
        state: AtomicU32,
        pid: AtomicI32,
        /// When the process began, in clock ticks since boot (proc_pid_stat(5)). It tells a session from a later
        /// process with the same pid.
        start_ticks: AtomicU64,
        acceptor: AtomicI32,
        generation: AtomicU32,
        /// When the session got its connection, in milliseconds (CLOCK_MONOTONIC); 0 before.
        pub since_ms: AtomicU64,
        /// The address of the client as an IPv6 address (IPv4 addresses are mapped), and its port plus one. All zero:
        /// none.
        peer: [AtomicU64; 3],
        /// The key of the client's source, as in `source_table`; 0 if there is none, or if its connection does not
        /// count any more.
        source: AtomicU64,
        /// How a crashed session ended, and its highest resident memory in KiB.
        exit: AtomicU32,
        peak_rss_kib: AtomicU32,
        /// Only in the first record of a range: the number of sessions of the listener that have crashed, and the
        /// number of records that were ever used.
        pub crashes: AtomicU32,
        claimed: AtomicU32,
        /// In the first record of a range: connections of the listener that got no process in time.
        pub unserved: AtomicU32,
        /// The master's order to a session whose acceptor is gone, and its deadline.
        order: AtomicU32,
        order_until_ms: AtomicU64,
        /// Whether a pool process from before an upgrade has ended and none follows.
        pool_ended: AtomicU32,
        /// In the first record of a range: how often all `processes` of the listener were in use.
        pub full: AtomicU32,
        /// Why its acceptor has killed it: 0 if it has not, 1 for `ExceededTime::Open`, other values are the
        /// milliseconds of `ExceededTime::Silent`.
        exceeded: AtomicU64,
        /// Only in the first record of a range: when a session last logged the warning that threads are missing, in
        /// milliseconds (CLOCK_MONOTONIC).
        warned_ms: AtomicU64,
        /// Its running and waiting calls by method. Each entry has the place of the method plus one in the upper 16
        /// bits, then 24 bits for running and 24 bits for waiting calls.
        methods: [AtomicU64; SHOWN_METHODS],
        /// Lines of the access log that it has to write.
        lines: AtomicU64,
    }
}
const _: () = assert!(size_of::<SessionRecord>() == 2 * super::scoreboard::STRIDE);

/// An order of the master to a session whose acceptor has died.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DirectOrder {
    /// Hand the connection over to a process of the new generation.
    Drain,
    /// Close the connection after the answers.
    Stop,
}

impl SessionRecord {
    /// Claims the record for the next process of an acceptor. Returns false if the record is not free.
    pub fn claim(&self, acceptor: Pid, generation: Generation) -> bool {
        let state = self.state.compare_exchange(FREE, SPARE, Acquire, Relaxed);
        if state.is_ok() {
            self.begin(acceptor, generation);
        }
        state.is_ok()
    }

    /// Takes a record for the next process of an acceptor, although it seems to be used.
    pub fn seize(&self, acceptor: Pid, generation: Generation) {
        self.state.store(SPARE, Release);
        self.begin(acceptor, generation);
    }

    fn begin(&self, acceptor: Pid, generation: Generation) {
        self.worker.clear();
        self.worker.allow_requests();
        self.pid.store(0, Relaxed);
        self.order.store(0, Relaxed);
        self.pool_ended.store(0, Relaxed);
        self.exceeded.store(0, Relaxed);
        self.set_methods(std::iter::empty());
        self.lines.store(0, Relaxed);
        self.set_peer(None);
        self.set_source(None);
        self.since_ms.store(0, Relaxed);
        self.acceptor.store(acceptor.0, Relaxed);
        self.generation.store(generation.0, Relaxed);
    }

    /// Records the process that was forked for this record.
    pub fn set_process(&self, pid: Pid, start_ticks: u64) {
        self.start_ticks.store(start_ticks, Relaxed);
        self.pid.store(pid.0, Release);
    }

    /// Records that the process gets a connection from `peer`. `source` is the key of the source, if it is counted.
    pub fn open(&self, (peer, source): (Option<SocketAddr>, Option<u64>), now_ms: u64) {
        self.set_peer(peer);
        self.set_source(source);
        self.since_ms.store(now_ms, Relaxed);
        self.state.store(OPEN, Release);
    }

    /// Records that the connection could not be sent to the process, which waits for another one.
    pub fn wait_again(&self) {
        self.state.store(SPARE, Release);
        self.set_peer(None);
        self.set_source(None);
        self.since_ms.store(0, Relaxed);
    }

    /// Frees the record, because the process has ended and was reaped.
    pub fn release(&self) {
        self.worker.clear_capacity();
        self.pid.store(0, Relaxed);
        self.start_ticks.store(0, Relaxed);
        self.state.store(FREE, Release);
    }

    /// Records that the process has crashed and was reaped. The record is not free until the master has read it.
    pub fn crash(&self, exit: Exit, peak_rss_bytes: u64) {
        self.worker.clear_capacity();
        self.exit.store(encode_exit(exit), Relaxed);
        let kib = u32::try_from(peak_rss_bytes / 1024).unwrap_or(u32::MAX);
        self.peak_rss_kib.store(kib, Relaxed);
        self.state.store(CRASHED, Release);
    }

    /// Returns how the process has crashed, and its highest resident memory in bytes; `None` if it has not crashed.
    pub fn crashed(&self) -> Option<(Exit, u64)> {
        let is_crashed = self.state.load(Acquire) == CRASHED;
        let rss = u64::from(self.peak_rss_kib.load(Relaxed)) * 1024;
        is_crashed.then(|| (decode_exit(self.exit.load(Relaxed)), rss))
    }

    /// Returns whether a process should exist for this record.
    pub fn is_used(&self) -> bool {
        matches!(self.state.load(Acquire), SPARE | OPEN)
    }

    /// Returns whether the process has a connection.
    pub fn is_open(&self) -> bool {
        self.state.load(Acquire) == OPEN
    }

    pub fn pid(&self) -> Pid {
        Pid(self.pid.load(Acquire))
    }

    pub fn start_ticks(&self) -> u64 {
        self.start_ticks.load(Relaxed)
    }

    pub fn acceptor(&self) -> Pid {
        Pid(self.acceptor.load(Relaxed))
    }

    pub fn generation(&self) -> Generation {
        Generation(self.generation.load(Relaxed))
    }

    /// Counts the connection for the source with this key; `None`: for no source.
    pub fn set_source(&self, key: Option<u64>) {
        self.source.store(key.unwrap_or(0), Relaxed);
    }

    fn set_peer(&self, peer: Option<SocketAddr>) {
        let [high, low, port] = &self.peer;
        let (ip, number) = match peer {
            Some(peer) => {
                let ip = match peer.ip() {
                    IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                    IpAddr::V6(ip) => ip,
                };
                (u128::from(ip), u64::from(peer.port()) + 1)
            }
            None => (0, 0),
        };
        high.store((ip >> 64) as u64, Relaxed);
        low.store(ip as u64, Relaxed);
        port.store(number, Relaxed);
    }

    /// Returns the client's address; `None` for a client of a unix socket.
    pub fn peer(&self) -> Option<SocketAddr> {
        let [high, low, port] = self.peer.each_ref().map(|word| word.load(Relaxed));
        let port = port.checked_sub(1)? as u16;
        let ip = Ipv6Addr::from(u128::from(high) << 64 | u128::from(low));
        Some(SocketAddr::new(ip.to_canonical(), port))
    }

    /// Returns when the session got its connection, in milliseconds; `None` if it never had one.
    pub fn opened_ms(&self) -> Option<u64> {
        Some(self.since_ms.load(Relaxed)).filter(|at| *at > 0)
    }

    /// Returns when the session got its connection, and when its event loop last ran, in milliseconds.
    pub fn times(&self) -> (u64, u64) {
        (
            self.since_ms.load(Relaxed),
            self.worker.heartbeat_ms.load(Relaxed),
        )
    }

    /// Returns the client as text, for logs and `status`.
    pub fn peer_name(&self) -> String {
        peer_name(self.peer())
    }

    /// Gives an order to a session without an acceptor. Only the master calls it. `until_ms` is the deadline of the
    /// order.
    pub fn set_order(&self, order: DirectOrder, until_ms: u64) {
        self.order_until_ms.store(until_ms, Relaxed);
        let number = match order {
            DirectOrder::Drain => 1,
            DirectOrder::Stop => 2,
        };
        self.order.store(number, Release);
    }

    /// Marks that a pool process of the session's generation has ended and no other one follows. Otherwise calls of
    /// the session would wait for it forever. Only the master calls it.
    pub fn set_pool_ended(&self) {
        self.pool_ended.store(1, Release);
    }

    /// Returns whether the master has called `set_pool_ended`.
    pub fn has_pool_ended(&self) -> bool {
        self.pool_ended.load(Acquire) != 0
    }

    /// Records why the acceptor kills the session: it has exceeded this time.
    pub fn set_exceeded(&self, exceeded: ExceededTime) {
        let number = match exceeded {
            ExceededTime::Open => 1,
            ExceededTime::Silent(ms) => ms.max(2),
        };
        self.exceeded.store(number, Relaxed);
    }

    /// Returns which time the session had exceeded when its acceptor killed it; `None` if it was not killed.
    pub fn exceeded(&self) -> Option<ExceededTime> {
        match self.exceeded.load(Relaxed) {
            0 => None,
            1 => Some(ExceededTime::Open),
            ms => Some(ExceededTime::Silent(ms)),
        }
    }

    /// For the session: adds to the number of access log lines that it must still write, or subtracts from it.
    pub fn add_lines(&self, lines: i64) {
        self.lines.fetch_add(lines as u64, Relaxed);
    }

    /// Takes the number of lines that an ended session had not written. It is not trusted, so it is limited.
    pub fn take_lines(&self) -> u64 {
        self.lines.swap(0, Relaxed).min(MOST_LINES)
    }

    /// Publishes how many calls of each method run and wait: `counts` has the place of the method and both numbers.
    /// If there are more methods than entries, the rest is added up as calls of other methods.
    pub fn set_methods(&self, counts: impl Iterator<Item = (usize, u64, u64)>) {
        let mut counts = counts.filter(|(_, running, queued)| running + queued > 0);
        let [first @ .., last] = &self.methods;
        for shown in first {
            shown.store(counts.next().map_or(0, pack), Relaxed);
        }
        let rest = counts.reduce(|(_, run, wait), (_, more_run, more_wait)| {
            (OTHER, run + more_run, wait + more_wait)
        });
        last.store(rest.map_or(0, pack), Relaxed);
    }

    /// Returns what `set_methods` has written; nothing if the session has no connection.
    pub fn methods(&self) -> impl Iterator<Item = (usize, u64, u64)> {
        let is_open = self.is_open();
        let shown = self.methods.iter().map(|shown| shown.load(Relaxed));
        shown.filter_map(move |word| {
            let place = usize::try_from(word >> 48).ok()?.checked_sub(1)?;
            (is_open && place <= OTHER).then_some((place, word >> 24 & MAX_SHOWN, word & MAX_SHOWN))
        })
    }

    /// Takes the order of the master and its deadline in milliseconds. Returns each order once.
    pub fn take_order(&self) -> Option<(DirectOrder, u64)> {
        let order = match self.order.swap(0, Acquire) {
            1 => DirectOrder::Drain,
            2 => DirectOrder::Stop,
            _ => return None,
        };
        Some((order, self.order_until_ms.load(Relaxed)))
    }
}

/// The largest number of calls of a method that are shown.
const MAX_SHOWN: u64 = (1 << 24) - 1;

fn pack((place, running, queued): (usize, u64, u64)) -> u64 {
    (place as u64 + 1) << 48 | running.min(MAX_SHOWN) << 24 | queued.min(MAX_SHOWN)
}

/// Returns whether a session may log a warning. All sessions of a listener together log at most one in ten seconds.
pub fn may_warn(range: &[SessionRecord], now_ms: u64) -> bool {
    range.first().is_none_or(|first| {
        let last = first.warned_ms.load(Relaxed);
        let is_due = last == 0 || now_ms.abs_diff(last) >= WARNING_MS;
        let set = || (first.warned_ms).compare_exchange(last, now_ms.max(1), Relaxed, Relaxed);
        is_due && set().is_ok()
    })
}

/// Returns the records of a range that were ever used.
pub fn claimed(range: &[SessionRecord]) -> &[SessionRecord] {
    let count = range.first().map_or(0, |first| first.claimed.load(Relaxed));
    &range[..(count as usize).min(range.len())]
}

/// Returns how many connections of the source with this key the sessions of a range have.
pub fn count_of_source(range: &[SessionRecord], key: u64) -> usize {
    let is_its = |it: &&SessionRecord| it.source.load(Relaxed) == key && it.is_open();
    claimed(range).iter().filter(is_its).count()
}

/// Records that the record at `index` is used.
pub fn note_claim(range: &[SessionRecord], index: usize) {
    range[0].claimed.fetch_max(index as u32 + 1, Relaxed);
}

const SIGNALLED: u32 = 1 << 8;
const DUMPED: u32 = 1 << 9;

fn encode_exit(exit: Exit) -> u32 {
    match exit {
        Exit::Code(code) => code as u32 & 0xFF,
        Exit::Signal {
            number,
            core_dumped,
        } => {
            let dumped = if core_dumped { DUMPED } else { 0 };
            number as u32 & 0xFF | SIGNALLED | dumped
        }
    }
}

fn decode_exit(number: u32) -> Exit {
    let low = (number & 0xFF) as i32;
    match number & SIGNALLED {
        0 => Exit::Code(low),
        _ => Exit::Signal {
            number: low,
            core_dumped: number & DUMPED != 0,
        },
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::link::session_memory::SessionTable;

    #[test]
    fn a_record_is_claimed_once_and_says_who_has_it() {
        let table = SessionTable::new().unwrap();
        let record = &table.range(RANGES - 1)[SESSIONS - 1];
        assert!(record.claim(Pid(7), Generation(3)));
        assert!(!record.claim(Pid(8), Generation(3)));
        record.set_process(Pid(9), 55);
        for peer in ["203.0.113.7:51122", "[2001:db8::1]:0"] {
            let peer = peer.parse().unwrap();
            record.open((Some(peer), None), 1);
            assert_eq!(record.peer(), Some(peer));
        }
        assert!(record.is_open() && record.pid() == Pid(9));
        record.open((None, None), 2);
        assert_eq!(record.peer_name(), "unix");
        record.release();
        assert!(!record.is_used() && record.claim(Pid(8), Generation(4)));
    }

    #[test]
    fn a_source_has_the_connections_of_open_sessions_that_have_not_given_them_away() {
        let table = SessionTable::new().unwrap();
        let range = table.range(1);
        for (index, record) in range[..4].iter().enumerate() {
            assert!(record.claim(Pid(7), Generation(1)));
            note_claim(range, index);
            record.open((None, Some(5 + (index as u64 % 2))), 1);
        }
        assert_eq!([5, 6, 7].map(|key| count_of_source(range, key)), [2, 2, 0]);
        range[0].set_source(None);
        range[1].release();
        assert_eq!([5, 6].map(|key| count_of_source(range, key)), [1, 1]);
    }

    #[test]
    fn a_crash_stays_until_it_is_noted() {
        let table = SessionTable::new().unwrap();
        let record = &table.range(0)[0];
        assert_eq!(record.crashed(), None);
        let ends = [
            Exit::Code(3),
            Exit::Signal {
                number: 11,
                core_dumped: true,
            },
        ];
        for exit in ends {
            record.crash(exit, 1 << 20);
            assert_eq!(record.crashed(), Some((exit, 1 << 20)));
            assert!(!record.claim(Pid(8), Generation(4)));
        }
    }

    #[test]
    fn calls_are_shown_by_method_and_the_rest_together() {
        let table = SessionTable::new().unwrap();
        let record = &table.range(0)[0];
        record.set_methods([(3, 1, 2)].into_iter());
        assert_eq!(record.methods().count(), 0, "it has no connection");
        record.open((None, None), 1);
        let counts = (0..20).map(|place| (place, u64::from(place != 4), 2 * u64::from(place != 4)));
        record.set_methods(counts);
        let shown: Vec<_> = record.methods().collect();
        assert_eq!(shown.len(), SHOWN_METHODS);
        assert_eq!((shown[3], shown[4]), ((3, 1, 2), (5, 1, 2)));
        assert_eq!(shown[SHOWN_METHODS - 1], (OTHER, 4, 8));
        record.set_methods([(7, u64::MAX, 0)].into_iter());
        assert!(record.methods().eq([(7, MAX_SHOWN, 0)]));
        record.release();
        assert_eq!(record.methods().count(), 0);
    }

    #[test]
    fn all_sessions_of_a_listener_log_one_warning_in_ten_seconds() {
        let table = SessionTable::new().unwrap();
        let range = table.range(1);
        let admitted = |now_ms| may_warn(range, now_ms);
        assert_eq!(
            [5, 6, 10_004, 10_005, 10_006].map(admitted),
            [true, false, false, true, false]
        );
        assert!(may_warn(table.range(0), 7) && may_warn(&[], 7));
    }

    #[test]
    fn an_order_is_taken_once() {
        let table = SessionTable::new().unwrap();
        let record = &table.range(0)[0];
        record.set_order(DirectOrder::Stop, 77);
        assert_eq!(record.take_order(), Some((DirectOrder::Stop, 77)));
        assert_eq!(record.take_order(), None);
    }
}
