//! The sessions of all isolated listeners: shared memory in which an acceptor says which of its children
//! are connection processes, and what became of them.
//!
//! Each listener has a range of records. An acceptor claims a record before it forks a session, the session
//! writes what it does, and the process that reaps the session releases the record. So when an acceptor
//! dies, the master knows which of the children that it adopts are sessions. Nothing in here is trusted: a
//! session can write any of it.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::sync::atomic::{
    AtomicI32, AtomicU32, AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release,
};

use super::ids::{Generation, Pid};
use super::metrics_board::layout::OTHER;
use super::scoreboard::{RECORDS, WorkerRecord};
use super::session_limits::ExceededTime;
use crate::link::source_table::peer_name;
use crate::sys::process::Exit;
use crate::sys::shared_memory::{self, shared_record};

/// Sessions of one listener, those of all generations and the processes that wait for a connection.
pub const SESSIONS: usize = 4096;
/// Listeners that have a range.
pub const RANGES: usize = 64;
const LENGTH: NonZeroUsize = NonZeroUsize::new(SESSIONS * RANGES).expect("there are some");

/// Methods of a session whose running and waiting calls are shown one by one.
const SHOWN_METHODS: usize = 16;
/// The time between two warnings of all sessions of a listener, in milliseconds.
const WARNING_MS: u64 = 10_000;

/// Values of `SessionRecord::state`.
const FREE: u32 = 0;
const SPARE: u32 = 1;
const OPEN: u32 = 2;
const CRASHED: u32 = 3;

shared_record! {
    /// One connection process. All zero: none.
    #[derive(Debug)]
    pub struct SessionRecord {
        /// What it shows, as a worker does.
        pub worker: WorkerRecord,
        state: AtomicU32,
        pid: AtomicI32,
        /// When the process began, in clock ticks since boot (proc_pid_stat(5)): a pid may be used again.
        start_ticks: AtomicU64,
        acceptor: AtomicI32,
        generation: AtomicU32,
        /// When the connection came, in milliseconds (CLOCK_MONOTONIC).
        pub since_ms: AtomicU64,
        /// The client: an IPv6 address, or an IPv4 one mapped into that, and its port. All zero: none.
        peer: [AtomicU64; 3],
        /// The key of its source, as in `source_table`; 0: none, or it does not count any more.
        source: AtomicU64,
        /// How a crashed session ended, and its most memory in bytes.
        exit: AtomicU32,
        peak_rss_kib: AtomicU32,
        /// In the first record of a range: connection processes of the listener that have crashed, and how
        /// many records have ever been used.
        pub crashes: AtomicU32,
        claimed: AtomicU32,
        /// Padding: not used any more.
        spare: AtomicU32,
        /// What the master orders a session whose acceptor is gone, and when it is to be done.
        order: AtomicU32,
        order_until_ms: AtomicU64,
        /// Whether a pool process of the program before an upgrade has ended.
        pool_ended: AtomicU32,
        /// Why its acceptor has killed it: 0 it has not, 1 for `ExceededTime::Open`, else the milliseconds of
        /// `ExceededTime::Silent`.
        exceeded: AtomicU64,
        /// In the first record of a range: when a session last logged the warning that threads are missing.
        warned_ms: AtomicU64,
        /// Its running and waiting calls by method: the place of the method plus one, then 24 bits each.
        methods: [AtomicU64; SHOWN_METHODS],
    }
}
const _: () = assert!(size_of::<SessionRecord>() == 2 * super::scoreboard::STRIDE);

/// What the master orders a session that has no acceptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DirectOrder {
    /// Its connection goes to a new generation's process.
    Drain,
    /// Its connection is closed after the answers.
    Stop,
}

impl SessionRecord {
    /// Claims a free record for the next process of an acceptor. Returns false if it is used.
    pub fn claim(&self, acceptor: Pid, generation: Generation) -> bool {
        if self
            .state
            .compare_exchange(FREE, SPARE, Acquire, Relaxed)
            .is_err()
        {
            return false;
        }
        self.worker.clear();
        self.worker.allow_requests();
        self.pid.store(0, Relaxed);
        self.order.store(0, Relaxed);
        self.pool_ended.store(0, Relaxed);
        self.exceeded.store(0, Relaxed);
        self.set_methods(std::iter::empty());
        self.set_peer(None);
        self.set_source(None);
        self.since_ms.store(0, Relaxed);
        self.acceptor.store(acceptor.0, Relaxed);
        self.generation.store(generation.0, Relaxed);
        true
    }

    /// The process is there.
    pub fn set_process(&self, pid: Pid, start_ticks: u64) {
        self.start_ticks.store(start_ticks, Relaxed);
        self.pid.store(pid.0, Release);
    }

    /// It gets a connection; `source` is the key of its source.
    pub fn open(&self, (peer, source): (Option<SocketAddr>, Option<u64>), now_ms: u64) {
        self.set_peer(peer);
        self.set_source(source);
        self.since_ms.store(now_ms, Relaxed);
        self.state.store(OPEN, Release);
    }

    /// The connection could not be sent to it: it waits for another one.
    pub fn wait_again(&self) {
        self.state.store(SPARE, Release);
        self.set_peer(None);
        self.set_source(None);
        self.since_ms.store(0, Relaxed);
    }

    /// The process has ended and was reaped.
    pub fn release(&self) {
        self.worker.clear_capacity();
        self.pid.store(0, Relaxed);
        self.start_ticks.store(0, Relaxed);
        self.state.store(FREE, Release);
    }

    /// Likewise, by a crash: the record stays until the master has taken note of it.
    pub fn crash(&self, exit: Exit, peak_rss_bytes: u64) {
        self.worker.clear_capacity();
        self.exit.store(encode_exit(exit), Relaxed);
        let kib = u32::try_from(peak_rss_bytes / 1024).unwrap_or(u32::MAX);
        self.peak_rss_kib.store(kib, Relaxed);
        self.state.store(CRASHED, Release);
    }

    /// How it has crashed; `None` if it has not.
    pub fn crashed(&self) -> Option<(Exit, u64)> {
        let is_crashed = self.state.load(Acquire) == CRASHED;
        let rss = u64::from(self.peak_rss_kib.load(Relaxed)) * 1024;
        is_crashed.then(|| (decode_exit(self.exit.load(Relaxed)), rss))
    }

    /// Whether a process is expected behind it.
    pub fn is_used(&self) -> bool {
        matches!(self.state.load(Acquire), SPARE | OPEN)
    }

    /// Whether it has a connection.
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

    /// Counts its connection for the source with this key.
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

    /// The client's address; `None` for one of a unix socket.
    pub fn peer(&self) -> Option<SocketAddr> {
        let [high, low, port] = self.peer.each_ref().map(|word| word.load(Relaxed));
        let port = port.checked_sub(1)? as u16;
        let ip = Ipv6Addr::from(u128::from(high) << 64 | u128::from(low));
        Some(SocketAddr::new(ip.to_canonical(), port))
    }

    /// When its connection came; `None`: it has had none.
    pub fn opened_ms(&self) -> Option<u64> {
        Some(self.since_ms.load(Relaxed)).filter(|at| *at > 0)
    }

    /// When its connection came, and when its event loop last ran.
    pub fn times(&self) -> (u64, u64) {
        (
            self.since_ms.load(Relaxed),
            self.worker.heartbeat_ms.load(Relaxed),
        )
    }

    /// The client as it is shown.
    pub fn peer_name(&self) -> String {
        peer_name(self.peer())
    }

    /// For the master: gives an order to a session without an acceptor.
    pub fn set_order(&self, order: DirectOrder, until_ms: u64) {
        self.order_until_ms.store(until_ms, Relaxed);
        let number = match order {
            DirectOrder::Drain => 1,
            DirectOrder::Stop => 2,
        };
        self.order.store(number, Release);
    }

    /// For the master: marks that a pool process of the session's generation has ended, so that calls may
    /// wait for it without end.
    pub fn set_pool_ended(&self) {
        self.pool_ended.store(1, Release);
    }

    /// Returns whether the master has marked that.
    pub fn has_pool_ended(&self) -> bool {
        self.pool_ended.load(Acquire) != 0
    }

    /// Its acceptor kills it, because it has exceeded this time.
    pub fn set_exceeded(&self, exceeded: ExceededTime) {
        let number = match exceeded {
            ExceededTime::Open => 1,
            ExceededTime::Silent(ms) => ms.max(2),
        };
        self.exceeded.store(number, Relaxed);
    }

    /// Why its acceptor has killed it.
    pub fn exceeded(&self) -> Option<ExceededTime> {
        match self.exceeded.load(Relaxed) {
            0 => None,
            1 => Some(ExceededTime::Open),
            ms => Some(ExceededTime::Silent(ms)),
        }
    }

    /// Shows how many calls of each method run and wait, by the places of the methods. Those of methods for
    /// which there is no room count as calls of other methods.
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

    /// Returns what `set_methods` shows, if it has a connection.
    pub fn methods(&self) -> impl Iterator<Item = (usize, u64, u64)> {
        let is_open = self.is_open();
        let shown = self.methods.iter().map(|shown| shown.load(Relaxed));
        shown.filter_map(move |word| {
            let place = usize::try_from(word >> 48).ok()?.checked_sub(1)?;
            (is_open && place <= OTHER).then_some((place, word >> 24 & MAX_SHOWN, word & MAX_SHOWN))
        })
    }

    /// The order of the master, once.
    pub fn take_order(&self) -> Option<(DirectOrder, u64)> {
        let order = match self.order.swap(0, Acquire) {
            1 => DirectOrder::Drain,
            2 => DirectOrder::Stop,
            _ => return None,
        };
        Some((order, self.order_until_ms.load(Relaxed)))
    }
}

/// The most calls of a method that are shown.
const MAX_SHOWN: u64 = (1 << 24) - 1;

fn pack((place, running, queued): (usize, u64, u64)) -> u64 {
    (place as u64 + 1) << 48 | running.min(MAX_SHOWN) << 24 | queued.min(MAX_SHOWN)
}

/// Returns whether a session may log a warning that others of its listener log too: at most one in ten seconds.
pub fn may_warn(range: &[SessionRecord], now_ms: u64) -> bool {
    range.first().is_none_or(|first| {
        let last = first.warned_ms.load(Relaxed);
        let is_due = last == 0 || now_ms.abs_diff(last) >= WARNING_MS;
        let set = || (first.warned_ms).compare_exchange(last, now_ms.max(1), Relaxed, Relaxed);
        is_due && set().is_ok()
    })
}

/// The records of a range that have ever been used.
pub fn claimed(range: &[SessionRecord]) -> &[SessionRecord] {
    let count = range.first().map_or(0, |first| first.claimed.load(Relaxed));
    &range[..(count as usize).min(range.len())]
}

/// How many connections of the source with this key the sessions of a range have.
pub fn count_of_source(range: &[SessionRecord], key: u64) -> usize {
    let is_its = |it: &&SessionRecord| it.source.load(Relaxed) == key && it.is_open();
    claimed(range).iter().filter(is_its).count()
}

/// The record at `index` is used.
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

/// All records, and the file that they lie in.
#[derive(Debug)]
pub struct SessionTable {
    records: &'static [SessionRecord],
    file: OwnedFd,
}

impl SessionTable {
    /// An empty table.
    ///
    /// # Errors
    /// If there is no memory or no descriptor.
    pub fn new() -> io::Result<Self> {
        let (records, file) = shared_memory::array(LENGTH)?;
        Ok(SessionTable { records, file })
    }

    /// The table that another program has made.
    ///
    /// # Errors
    /// If there is no memory, or the file is too short.
    pub fn of(file: OwnedFd) -> io::Result<Self> {
        let records = shared_memory::array_in(&file, LENGTH)?;
        Ok(SessionTable { records, file })
    }

    pub fn file(&self) -> &OwnedFd {
        &self.file
    }

    pub fn records(&self) -> &'static [SessionRecord] {
        self.records
    }

    /// The records of one listener. `range` is below `RANGES`.
    pub fn range(&self, range: usize) -> &'static [SessionRecord] {
        &self.records[range * SESSIONS..][..SESSIONS]
    }
}

/// The index by which links name the record of a session: behind those of the scoreboard.
pub fn link_index(session: usize) -> usize {
    RECORDS + session
}

/// What a process shows, by the index that links use.
pub fn shown<'a>(
    records: &'a [WorkerRecord],
    sessions: &'a [SessionRecord],
    index: usize,
) -> Option<&'a WorkerRecord> {
    match index.checked_sub(RECORDS) {
        None => records.get(index),
        Some(session) => sessions.get(session).map(|session| &session.worker),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

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
