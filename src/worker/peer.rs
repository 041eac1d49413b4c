//! Another process as a worker sees it: its link, the calls that run there or here, and its capacity.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering::Relaxed;

use super::timers::CallKey;
use crate::link::call_link::CallLink;
use crate::link::scoreboard::WorkerRecord;
use crate::sys::event::Interest;

/// A worker whose event loop has not run for this long gets no calls. It runs once a second if idle.
const STALE_MS: u64 = 2000;

/// After this number of unused records in a row no process is expected behind them.
const SEARCH_GAP: usize = 64;

/// Another worker.
#[derive(Debug)]
pub struct Peer {
    pub record: &'static WorkerRecord,
    pub record_index: usize,
    pub link: CallLink,
    /// Calls of our connections that it runs.
    pub sent: HashMap<u64, CallKey>,
    /// Its calls that run here, by its numbers.
    pub running: HashMap<u64, CallKey>,
    /// How far it was, by its capacity epoch, when `sent_since` was zero.
    pub epoch: u32,
    /// Calls sent that its record may not show yet.
    pub sent_since: u32,
    /// Its epoch plus one when capacity was offered to it last.
    pub offered_at: u32,
    pub interest: Option<Interest>,
    /// Until when its offers for short calls are not taken up, because it has returned one.
    pub no_short_until_ms: u64,
    /// It begins no further call.
    pub is_leaving: bool,
    /// It was told that this process leaves, and has answered.
    pub leave: LeaveState,
}

/// Whether another process knows that this one leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaveState {
    NotTold,
    Told,
    Noted,
}

impl Peer {
    /// The process with this record, over a link that the master has made.
    pub fn new(record: &'static WorkerRecord, record_index: usize, link: OwnedFd) -> Self {
        Peer {
            record,
            record_index,
            link: CallLink::new(link),
            sent: HashMap::new(),
            running: HashMap::new(),
            epoch: record.capacity_epoch.load(Relaxed),
            sent_since: 0,
            offered_at: 0,
            interest: None,
            no_short_until_ms: 0,
            is_leaving: false,
            leave: LeaveState::NotTold,
        }
    }

    /// Once its record has changed, what was sent before shows in it.
    pub fn note_epoch(&mut self) {
        let epoch = self.record.capacity_epoch.load(Relaxed);
        if epoch != self.epoch {
            self.epoch = epoch;
            self.sent_since = 0;
        }
    }

    /// Whether it runs calls of this lane.
    pub fn serves(&self, lane: usize, generation: u32) -> bool {
        self.record.lane.load(Relaxed) as usize == lane
            && self.record.generation.load(Relaxed) == generation
    }

    /// How many calls it could begin, as far as is known.
    pub fn room(&self) -> u32 {
        // A call on its event loop may take long, and what is sent waits for that.
        if self.record.inline_running.load(Relaxed) > 0 {
            return 0;
        }
        let sent = match self.record.capacity_epoch.load(Relaxed) == self.epoch {
            true => self.sent_since,
            false => 0,
        };
        self.record.idle.load(Relaxed).saturating_sub(sent)
    }
}

/// Whether the event loop of a worker has run lately.
pub fn is_fresh(record: &WorkerRecord, now_ms: u64) -> bool {
    now_ms.saturating_sub(record.heartbeat_ms.load(Relaxed)) < STALE_MS
}

/// The records of processes that take part in forwarding, with their indices: workers have the lowest ones
/// and pool processes the highest.
pub fn used(
    records: &'static [WorkerRecord],
) -> impl Iterator<Item = (usize, &'static WorkerRecord)> {
    let all = || records.iter().enumerate();
    until_gap(all()).chain(until_gap(all().rev()))
}

fn until_gap<'a>(
    records: impl Iterator<Item = (usize, &'a WorkerRecord)>,
) -> impl Iterator<Item = (usize, &'a WorkerRecord)> {
    let mut unused = 0;
    records.take_while(move |(_, record)| {
        let is_used = record.generation.load(Relaxed) != 0;
        unused = if is_used { 0 } else { unused + 1 };
        unused <= SEARCH_GAP
    })
}
