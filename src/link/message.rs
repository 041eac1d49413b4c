//! What master and worker say to each other: fixed-size packets that carry pid and generation.
//!
//! The format stands by itself (numbers, little-endian, zero for what is unused), so that a
//! master can speak with workers of another version. A packet that is none of ours is an error
//! for the receiver to log: a child is never trusted.

use std::time::Duration;

use super::ids::{Generation, Pid};

pub const PACKET: usize = 32;
/// First in each packet: "pfd" and the version of the format.
const MAGIC: u32 = u32::from_le_bytes(*b"pfd\x01");

/// How many of its connections a worker is to give to its siblings, and to take from them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RebalanceOrder {
    /// So many away, as far as they rest.
    pub give: u32,
    /// So many, and no more for a moment.
    pub take: u32,
    /// The workers have changed: if there are no others, also connections that were moved lately.
    pub after_change: bool,
}

/// Stands in the number of those to give if the workers have changed.
const AFTER_CHANGE: u32 = 1 << 31;

/// What the master tells a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Accept nothing more, serve the connections you have, end them by then.
    Drain(Duration),
    /// The server stops: answer what was read, refuse what comes, close, leave by then.
    Stop(Duration),
    /// Log to the file whose descriptor comes along.
    ReopenLog,
    /// Spread the connections that last over the workers.
    Rebalance(RebalanceOrder),
    /// A stop will come: serve on, and tell who asks for your health that you are not ready.
    StopPending,
    /// A link to the worker with this record of the scoreboard; its descriptor comes along.
    Link(u32),
}

/// What a worker tells the master.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Report {
    /// It accepts.
    Ready,
    /// It was told to retire (TERM) and drains: it wants to be replaced.
    Retiring,
    /// It has read so many calls, as many as it may: it wants a successor, and serves until then.
    MaxCallsReached(u64),
    /// All its handler threads, so many, run past their deadlines: it wants a successor. What they
    /// run stands in shared memory ([`super::stuck_calls`]).
    AllThreadsStuck(u64),
    /// It needs a link to the worker with this record of the scoreboard.
    LinkWanted(u32),
    /// After some accepts it has more than its share of the connections.
    Uneven,
}

/// A packet: who it is from or for, and what it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message<T> {
    /// The worker that this is about.
    pub pid: Pid,
    pub generation: Generation,
    /// What is said.
    pub body: T,
}

/// A body that fits a packet: a number that says which, and a value.
pub trait MessageBody: Sized {
    /// Which it is, and its value.
    fn encode(self) -> (u32, u64);
    /// The same back, if it is one.
    fn decode(kind: u32, value: u64) -> Option<Self>;
}

impl MessageBody for Order {
    fn encode(self) -> (u32, u64) {
        let millis = |limit: Duration| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        match self {
            Order::Drain(limit) => (1, millis(limit)),
            Order::Stop(limit) => (2, millis(limit)),
            Order::ReopenLog => (3, 0),
            Order::StopPending => (5, 0),
            Order::Link(record) => (6, record.into()),
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
            4 => Some(Order::Rebalance(RebalanceOrder {
                give: (value >> 32) as u32 & !AFTER_CHANGE,
                take: value as u32,
                after_change: (value >> 32) as u32 & AFTER_CHANGE != 0,
            })),
            5 => Some(Order::StopPending),
            6 => u32::try_from(value).ok().map(Order::Link),
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
            _ => None,
        }
    }
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

    /// What a packet says, or `None` when it is none of this kind.
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

    #[test]
    fn every_message_survives_its_packet_and_nothing_else_does() {
        let about = |body| Message {
            pid: Pid(4242),
            generation: Generation(7),
            body,
        };
        for order in [
            Order::Drain(Duration::from_millis(30_000)),
            Order::Stop(Duration::from_millis(u64::MAX)),
            Order::ReopenLog,
            Order::StopPending,
            Order::Link(4095),
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
        check(Order::Rebalance(shares), 4, *b"\x02\0\0\0\x01\0\0\0");
        check(Order::StopPending, 5, [0; 8]);
        check(Order::Link(3), 6, *b"\x03\0\0\0\0\0\0\0");
        check(Report::Ready, 101, [0; 8]);
        check(Report::Retiring, 102, [0; 8]);
        check(Report::MaxCallsReached(258), 103, *b"\x02\x01\0\0\0\0\0\0");
        check(Report::AllThreadsStuck(8), 104, *b"\x08\0\0\0\0\0\0\0");
        check(Report::LinkWanted(3), 105, *b"\x03\0\0\0\0\0\0\0");
        check(Report::Uneven, 106, [0; 8]);
    }
}
