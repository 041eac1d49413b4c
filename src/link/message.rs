//! Encodes and decodes the messages between master and workers: packets of fixed size with pid and
//! generation.
//!
//! The format depends on nothing else (little-endian numbers, zero for unused fields), so that a master
//! can communicate with workers of another version. The receiver logs an invalid packet, because a child
//! is never trusted.

use std::time::Duration;

use super::executor_end::ExecutorEnd;
use super::ids::{Generation, Pid};

pub const PACKET: usize = 32;
/// The first bytes of each packet: "pfd" and the version of the format.
const MAGIC: u32 = u32::from_le_bytes(*b"pfd\x01");

/// How many connections a worker must send to its siblings, and adopt from them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RebalanceOrder {
    /// Send this many, if they are quiescent.
    pub give: u32,
    /// Adopt this many, and then no more for a short time.
    pub take: u32,
    /// Whether the workers have changed. Then recently moved connections may move too, if there are no
    /// others.
    pub after_change: bool,
}

/// Stands for the lane of the jobs process in an order, because its number depends on the generation.
pub const JOBS_LANE: u16 = u16::MAX;

/// A link between a worker and a pool process, or between one of these and the jobs process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolLink {
    /// The scoreboard record of the other process.
    pub record: u16,
    /// The lane of the pool in the generation of the worker, or [`JOBS_LANE`].
    pub lane: u16,
    /// The generation of the worker, or of the jobs process.
    pub generation: Generation,
}

/// A link between a session and a pool process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionLink {
    /// The index of the session in the table of sessions.
    pub session: u32,
    /// The record of the pool process in the scoreboard.
    pub record: u16,
    /// The lane of the pool in the generation of the session, or [`JOBS_LANE`]; 0 in a report.
    pub lane: u16,
}

impl SessionLink {
    fn encode(self) -> u64 {
        u64::from(self.session) << 32 | u64::from(self.record) << 16 | u64::from(self.lane)
    }

    fn decode(value: u64) -> Self {
        SessionLink {
            session: (value >> 32) as u32,
            record: (value >> 16) as u16,
            lane: value as u16,
        }
    }
}

/// The bit of the number of connections to give that says that the workers have changed.
const AFTER_CHANGE: u32 = 1 << 31;

/// An order of the master to a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Accept nothing more, serve the open connections, and close them before this time.
    Drain(Duration),
    /// The server stops: answer the calls that were read, refuse others, close, and exit before this time.
    Stop(Duration),
    /// Log to the file whose descriptor is attached.
    ReopenLog,
    /// Write the access log to the file whose descriptor is attached.
    ReopenAccessLog,
    /// Move connections, so that they are spread evenly over the workers.
    Rebalance(RebalanceOrder),
    /// A stop is scheduled: continue to serve, but answer health checks with "not ready".
    StopPending,
    /// Use the attached link to the worker with this record of the scoreboard.
    Link(u32),
    /// Use the attached link between a worker and a pool process, or to the jobs process.
    LinkPool(PoolLink),
    /// For a pool process that stays at a reload. The attached memory file has the pool's table in the generation
    /// after this one.
    UpdatePool(Generation),
    /// The reload to this generation has ended. True if it has succeeded.
    EndUpdate(Generation, bool),
    /// A pool process from before an upgrade has ended, and none follows.
    PoolEnded,
    /// For a jobs process: serve the attached connection of a command.
    JobCommand,
    /// For an acceptor: pass the attached link on to one of its sessions. For a pool process: it leads to that session.
    SessionLink(SessionLink),
    /// For a jobs process: this worker or pool process has ended.
    ExecutorEnded(ExecutorEnd),
    /// For a jobs process: claim nothing more, because the executors of its generation leave.
    EndClaims,
}

/// A report of a worker to the master.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Report {
    /// It accepts connections.
    Ready,
    /// It got TERM and drains; it needs a successor.
    Retiring,
    /// It has read this many calls, its limit. It needs a successor and serves until then.
    MaxCallsReached(u64),
    /// All its handler threads (this many) are past their deadlines. It needs a successor. Their calls
    /// are in shared memory ([`super::stuck_calls`]).
    AllThreadsStuck(u64),
    /// It needs a link to the worker with this record of the scoreboard.
    LinkWanted(u32),
    /// It has accepted more than its share of the connections.
    Uneven,
    /// Whether a pool process can also serve this generation. If it cannot, the reason is in the memory file.
    PoolUpdated(Generation, bool),
    /// An acceptor needs a link between one of its sessions and a pool process.
    SessionLink(SessionLink),
    /// The session at this index of the table of sessions has crashed. From its acceptor.
    SessionCrashed(u32),
    /// Records of slow calls of this process wait for facts that only the master may read.
    SlowCalls,
}

/// A packet: the pid and generation of the worker, and the content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message<T> {
    /// The worker that sends or receives it.
    pub pid: Pid,
    pub generation: Generation,
    pub body: T,
}

/// A body that fits a packet: a number for its kind, and a value.
pub trait MessageBody: Sized {
    /// Returns the kind and the value.
    fn encode(self) -> (u32, u64);
    /// Decodes a kind and a value; `None` if the kind is unknown.
    fn decode(kind: u32, value: u64) -> Option<Self>;
}

impl MessageBody for Order {
    fn encode(self) -> (u32, u64) {
        let millis = |limit: Duration| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        match self {
            Order::Drain(limit) => (1, millis(limit)),
            Order::Stop(limit) => (2, millis(limit)),
            Order::ReopenLog => (3, 0),
            Order::ReopenAccessLog => (8, 0),
            Order::StopPending => (5, 0),
            Order::Link(record) => (6, record.into()),
            Order::SessionLink(link) => (7, link.encode()),
            Order::LinkPool(link) => {
                let ends = u64::from(link.record) << 16 | u64::from(link.lane);
                (21, u64::from(link.generation.0) << 32 | ends)
            }
            Order::UpdatePool(generation) => (22, generation.0.into()),
            Order::EndUpdate(generation, has_succeeded) => (23, outcome(generation, has_succeeded)),
            Order::PoolEnded => (24, 0),
            Order::JobCommand => (31, 0),
            Order::ExecutorEnded(end) => (30, end.encode()),
            Order::EndClaims => (32, 0),
            Order::Rebalance(order) => {
                let flag = if order.after_change { AFTER_CHANGE } else { 0 };
                let give = order.give.min(AFTER_CHANGE - 1) | flag;
                (4, u64::from(give) << 32 | u64::from(order.take))
            }
        }
    }

    fn decode(kind: u32, value: u64) -> Option<Self> {
        match kind {
            1 => Some(Order::Drain(Duration::from_millis(value))),
            2 => Some(Order::Stop(Duration::from_millis(value))),
            3 => Some(Order::ReopenLog),
            8 => Some(Order::ReopenAccessLog),
            4 => Some(Order::Rebalance(RebalanceOrder {
                give: (value >> 32) as u32 & !AFTER_CHANGE,
                take: value as u32,
                after_change: (value >> 32) as u32 & AFTER_CHANGE != 0,
            })),
            5 => Some(Order::StopPending),
            6 => u32::try_from(value).ok().map(Order::Link),
            7 => Some(Order::SessionLink(SessionLink::decode(value))),
            21 => Some(Order::LinkPool(PoolLink {
                record: (value >> 16) as u16,
                lane: value as u16,
                generation: Generation((value >> 32) as u32),
            })),
            22 => u32::try_from(value)
                .ok()
                .map(Generation)
                .map(Order::UpdatePool),
            23 => Some(Order::EndUpdate(Generation(value as u32), value >> 32 != 0)),
            24 => Some(Order::PoolEnded),
            31 => Some(Order::JobCommand),
            32 => Some(Order::EndClaims),
            30 => ExecutorEnd::decode(value).map(Order::ExecutorEnded),
            _ => None,
        }
    }
}

impl MessageBody for Report {
    fn encode(self) -> (u32, u64) {
        match self {
            Report::Ready => (101, 0),
            Report::Retiring => (102, 0),
            Report::MaxCallsReached(calls) => (103, calls),
            Report::AllThreadsStuck(threads) => (104, threads),
            Report::LinkWanted(record) => (105, record.into()),
            Report::Uneven => (106, 0),
            Report::SessionLink(link) => (107, link.encode()),
            Report::SessionCrashed(session) => (108, session.into()),
            Report::SlowCalls => (109, 0),
            Report::PoolUpdated(generation, is_ready) => (121, outcome(generation, is_ready)),
        }
    }

    fn decode(kind: u32, value: u64) -> Option<Self> {
        match kind {
            101 => Some(Report::Ready),
            102 => Some(Report::Retiring),
            103 => Some(Report::MaxCallsReached(value)),
            104 => Some(Report::AllThreadsStuck(value)),
            105 => u32::try_from(value).ok().map(Report::LinkWanted),
            106 => Some(Report::Uneven),
            107 => Some(Report::SessionLink(SessionLink::decode(value))),
            108 => u32::try_from(value).ok().map(Report::SessionCrashed),
            109 => Some(Report::SlowCalls),
            121 => Some(Report::PoolUpdated(
                Generation(value as u32),
                value >> 32 != 0,
            )),
            _ => None,
        }
    }
}

/// A generation and whether something succeeded in it.
fn outcome(generation: Generation, is_good: bool) -> u64 {
    u64::from(is_good) << 32 | u64::from(generation.0)
}

impl<T: MessageBody> Message<T> {
    pub fn encode(self) -> [u8; PACKET] {
        let (kind, value) = self.body.encode();
        let mut packet = [0; PACKET];
        packet[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        packet[4..8].copy_from_slice(&kind.to_le_bytes());
        packet[8..12].copy_from_slice(&self.pid.0.to_le_bytes());
        packet[12..16].copy_from_slice(&self.generation.0.to_le_bytes());
        packet[16..24].copy_from_slice(&value.to_le_bytes());
        packet
    }

    /// Decodes a packet; `None` if it is not of this kind.
    pub fn decode(packet: &[u8]) -> Option<Self> {
        let packet: &[u8; PACKET] = packet.try_into().ok()?;
        let word = |at: usize| {
            let bytes = packet[at..at + 4]
                .try_into()
                .expect("four bytes of thirty-two");
            u32::from_le_bytes(bytes)
        };
        let value = u64::from(word(20)) << 32 | u64::from(word(16));
        if word(0) != MAGIC {
            return None;
        }
        Some(Message {
            pid: Pid(word(8) as i32),
            generation: Generation(word(12)),
            body: T::decode(word(4), value)?,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::link::executor_end::ExecutorCause;

    const ENDED: ExecutorEnd = ExecutorEnd {
        pid: 5,
        cause: ExecutorCause::Attempt(3),
    };

    const POOL_LINK: PoolLink = PoolLink {
        record: 4095,
        lane: 2,
        generation: Generation(7),
    };

    #[test]
    fn messages_are_decoded_unchanged_and_other_packets_are_refused() {
        let about = |body| Message {
            pid: Pid(4242),
            generation: Generation(7),
            body,
        };
        for order in [
            Order::Drain(Duration::from_millis(30_000)),
            Order::Stop(Duration::from_millis(u64::MAX)),
            Order::ReopenLog,
            Order::ReopenAccessLog,
            Order::StopPending,
            Order::Link(4095),
            Order::LinkPool(POOL_LINK),
            Order::UpdatePool(Generation(u32::MAX)),
            Order::EndUpdate(Generation(u32::MAX), true),
            Order::EndUpdate(Generation(2), false),
            Order::PoolEnded,
            Order::JobCommand,
            Order::EndClaims,
            Order::ExecutorEnded(ENDED),
            Order::SessionLink(SessionLink {
                session: u32::MAX,
                record: 4095,
                lane: u16::MAX,
            }),
            Order::Rebalance(RebalanceOrder {
                give: AFTER_CHANGE - 1,
                take: 7,
                after_change: true,
            }),
        ] {
            let packet = about(order).encode();
            assert_eq!(Message::decode(&packet), Some(about(order)));
            assert_eq!(Message::<Report>::decode(&packet), None);
            assert_eq!(Message::<Order>::decode(&packet[1..]), None);
        }
        for report in [
            Report::Ready,
            Report::Retiring,
            Report::MaxCallsReached(u64::MAX),
            Report::AllThreadsStuck(8),
            Report::LinkWanted(4095),
            Report::Uneven,
            Report::PoolUpdated(Generation(u32::MAX), true),
            Report::PoolUpdated(Generation(2), false),
            Report::SessionCrashed(u32::MAX),
            Report::SessionLink(SessionLink {
                session: 1,
                record: u16::MAX,
                lane: 0,
            }),
        ] {
            let packet = Message {
                pid: Pid(1),
                generation: Generation(0),
                body: report,
            }
            .encode();
            assert_eq!(Message::<Report>::decode(&packet).unwrap().body, report);
            assert_eq!(Message::<Order>::decode(&packet), None);
        }
        assert_eq!(Message::<Report>::decode(&[0; PACKET]), None);
        assert_eq!(Message::<Report>::decode(&[]), None);
    }

    /// Master and workers of two versions exchange these bytes.
    #[test]
    fn every_message_has_the_bytes_that_other_versions_know() {
        fn check<T: MessageBody + Copy + PartialEq + std::fmt::Debug>(
            body: T,
            kind: u8,
            value: [u8; 8],
        ) {
            let mut bytes = [0; 32];
            bytes[..4].copy_from_slice(b"pfd\x01");
            bytes[4] = kind;
            bytes[8..12].copy_from_slice(b"\x92\x10\0\0");
            bytes[12..16].copy_from_slice(b"\x07\0\0\0");
            bytes[16..24].copy_from_slice(&value);
            let message = Message {
                pid: Pid(4242),
                generation: Generation(7),
                body,
            };
            assert_eq!(message.encode(), bytes);
            assert_eq!(Message::decode(&bytes), Some(message));
        }
        let shares = RebalanceOrder {
            give: 1,
            take: 2,
            after_change: false,
        };
        let limit = Duration::from_millis(30_000);
        check(Order::Drain(limit), 1, *b"\x30\x75\0\0\0\0\0\0");
        check(Order::Stop(limit), 2, *b"\x30\x75\0\0\0\0\0\0");
        check(Order::ReopenLog, 3, [0; 8]);
        check(Order::ReopenAccessLog, 8, [0; 8]);
        check(Order::Rebalance(shares), 4, *b"\x02\0\0\0\x01\0\0\0");
        check(Order::StopPending, 5, [0; 8]);
        check(Order::Link(3), 6, *b"\x03\0\0\0\0\0\0\0");
        check(Order::LinkPool(POOL_LINK), 21, *b"\x02\0\xff\x0f\x07\0\0\0");
        check(Order::UpdatePool(Generation(3)), 22, *b"\x03\0\0\0\0\0\0\0");
        let succeeded = Order::EndUpdate(Generation(3), true);
        check(succeeded, 23, *b"\x03\0\0\0\x01\0\0\0");
        check(Order::PoolEnded, 24, [0; 8]);
        check(Order::JobCommand, 31, [0; 8]);
        check(Order::EndClaims, 32, [0; 8]);
        let ended = Order::ExecutorEnded(ENDED);
        check(ended, 30, *b"\x03\0\0\x80\x05\0\0\0");
        check(Report::Ready, 101, [0; 8]);
        check(Report::Retiring, 102, [0; 8]);
        check(Report::MaxCallsReached(258), 103, *b"\x02\x01\0\0\0\0\0\0");
        check(Report::AllThreadsStuck(8), 104, *b"\x08\0\0\0\0\0\0\0");
        check(Report::LinkWanted(3), 105, *b"\x03\0\0\0\0\0\0\0");
        check(Report::Uneven, 106, [0; 8]);
        let failed = Report::PoolUpdated(Generation(3), false);
        check(failed, 121, *b"\x03\0\0\0\0\0\0\0");
        let link = SessionLink {
            session: 258,
            record: 3,
            lane: 5,
        };
        let value = *b"\x05\0\x03\0\x02\x01\0\0";
        check(Order::SessionLink(link), 7, value);
        check(Report::SessionLink(link), 107, value);
        check(Report::SessionCrashed(3), 108, *b"\x03\0\0\0\0\0\0\0");
    }
}
