//! Represents another process in a worker: its link, the calls that the two run for each other, and its capacity.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering::Relaxed;

use super::jobs_lane::JobsLane;
use super::timers::{CallKey, millis};
use crate::handler::call_state::HandlerCall;
use crate::handler::pool::Stage;
use crate::handler::pool::pool_table::MethodNumbers;
use crate::handler::trace::Trace;
use crate::link::call_frame::{AnswerFrame, CallFrame, CallOrigin, Frame};
use crate::link::call_link::CallLink;
use crate::link::ids::Generation;
use crate::link::scoreboard::{LANES, RECORDS, WorkerRecord};
use crate::protocol::call_id::{CallId, CallRunner};
use crate::sys::event::Reactor;
use crate::throttle::limiter::Limiter;

/// After this number of unused records in a row, no further process is expected.
const SEARCH_GAP: usize = 64;

/// The numbers that a worker shows to the others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    /// How many calls of its own lane could begin now.
    pub idle: u32,
    /// Waiting calls that another process could run, by the index of their lane.
    pub waiting: [u32; LANES],
}

/// Returns the index of a lane among the numbers of waiting calls.
pub fn place(lane: usize) -> usize {
    lane.min(LANES - 1)
}

/// A process with a link to this one.
#[derive(Debug)]
pub struct Peer {
    pub record: &'static WorkerRecord,
    pub record_index: usize,
    /// If one of the two processes is a pool process: the lane of its pool in the other process. If one is the jobs
    /// process: the lane of jobs. 0 if both are workers.
    pub lane: usize,
    /// Whether the master has linked it as a jobs process. Its record says that too, but later, and a session can write
    /// its own record.
    pub is_jobs_process: bool,
    /// In a pool process, the generation of the worker.
    pub generation: u32,
    pub link: CallLink,
    /// The calls of our connections that it runs.
    pub sent: HashMap<u64, CallKey>,
    /// The calls of the other process that run here, by their numbers in that process.
    pub running: HashMap<u64, CallKey>,
    /// Its capacity epoch when `sent_since` was zero.
    pub epoch: u32,
    /// The number of sent calls that its record may not show yet.
    pub sent_since: u32,
    /// Its epoch plus one at the last offer to it.
    pub offered_at: u32,
    /// Until when its offers for short calls are ignored, because it has returned one.
    pub no_short_until_ms: u64,
    /// Whether the other process begins no further call.
    pub is_leaving: bool,
    /// Whether there is a newer link to the jobs process of its generation.
    pub is_replaced: bool,
    /// Whether the other process knows that this process is exiting.
    pub leave: LeaveState,
    /// The limit on log lines about invalid results of this process.
    pub warning_limiter: Limiter,
}

/// Whether another process knows that this one is exiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaveState {
    NotSent,
    Sent,
    Noted,
}

/// Pool processes that stay at reloads.
#[derive(Debug, Default)]
pub struct SharedPools {
    /// In a worker, the lanes of the pools whose processes have stayed.
    pub kept_lanes: Vec<usize>,
    /// Whether a pool process that ends is not replaced: after an upgrade, in a worker of the program before it.
    pub is_final: bool,
    /// The calls to the jobs process.
    pub jobs: JobsLane,
    /// In a pool process, the numbers of its methods.
    pub methods: MethodNumbers,
    /// The lane that the pool process shows, if it is not the lane of its start.
    pub shown_lane: Option<usize>,
    /// The update that the master waits for.
    pub update: Option<PoolUpdate>,
}

/// The update of a pool process that will also serve the next generation.
#[derive(Debug)]
pub struct PoolUpdate {
    pub generation: Generation,
    pub stage: Stage,
    /// The file for the reason if the pool process cannot serve that generation.
    pub file: Option<OwnedFd>,
    /// The lane of the pool in that generation.
    pub lane: usize,
    /// When the report is due; `None` once it is sent.
    pub report_at_ms: Option<u64>,
}

impl Peer {
    /// Creates the entry for the process with this record, over a link that the master has made. If one of the two is
    /// a pool process, `pool` has the lane and the generation of the worker.
    pub fn new(
        record: &'static WorkerRecord,
        record_index: usize,
        link: OwnedFd,
        pool: Option<(usize, u32)>,
    ) -> Self {
        let (lane, generation) = pool.unwrap_or_default();
        Peer {
            record,
            record_index,
            lane,
            is_jobs_process: false,
            generation,
            link: CallLink::new(link),
            sent: HashMap::new(),
            running: HashMap::new(),
            epoch: record.capacity_epoch.load(Relaxed),
            sent_since: 0,
            offered_at: 0,
            no_short_until_ms: 0,
            is_leaving: false,
            is_replaced: false,
            leave: LeaveState::NotSent,
            warning_limiter: Limiter::rare(),
        }
    }

    /// Queues a call of this process for the other one. `pid` is that of this process. `method` and `client_id` are
    /// sent instead of those of the call. Returns false if there is no room.
    pub fn send(
        &mut self,
        (pid, origin): (i32, CallOrigin),
        call: &HandlerCall,
        (method, client_id): (u32, Option<&str>),
    ) -> bool {
        let identity = call.state.identity();
        let number = identity.number;
        let is_queued = self.link.queue(&Frame::Call(CallFrame {
            id: CallId { pid, number },
            method,
            key: call.state.key(),
            deadline_ms: millis(call.deadline),
            origin,
            client_id: client_id.map(Into::into),
            peer: call.peer,
            trace: identity.trace().map(Trace::into_context),
            params: call.params.as_ref().into(),
        }));
        if is_queued {
            self.sent.insert(number, call.key);
            self.note_epoch();
            self.sent_since += 1;
        }
        is_queued
    }

    /// Queues the answer to one of its calls, if that was not answered yet. `pid` is that of this process.
    pub fn answer(&mut self, pid: i32, answer: AnswerFrame<'_>) {
        if self.running.remove(&answer.id).is_some() {
            let runner = CallRunner {
                process: pid,
                ..answer.runner
            };
            self.link
                .queue(&Frame::Answer(AnswerFrame { runner, ..answer }));
        }
    }

    /// Records a change of its record, which then includes the calls sent before.
    pub fn note_epoch(&mut self) {
        let epoch = self.record.capacity_epoch.load(Relaxed);
        if epoch != self.epoch {
            self.epoch = epoch;
            self.sent_since = 0;
        }
    }

    /// Returns whether it takes part in forwarding with processes of this generation. A pool process may serve several
    /// generations, and shows one of them.
    pub fn is_with(&self, generation: u32) -> bool {
        match self.record.generation.load(Relaxed) {
            shown if self.lane == 0 => shown == generation,
            shown => shown != 0,
        }
    }

    /// Sends queued frames, and watches the link under this number for the needed events.
    pub fn settle(&mut self, watch: u16, reactor: &mut Reactor) {
        // A session that does not read is not read either. For workers this rule would be wrong: two of them could wait
        // for each other.
        let stops_reading = self.is_session();
        self.link.settle(watch, stops_reading, reactor);
    }

    /// Returns whether it is a session.
    pub fn is_session(&self) -> bool {
        self.record_index >= RECORDS
    }

    /// Returns whether the other process runs calls of this lane.
    pub fn serves(&self, lane: usize, generation: u32) -> bool {
        let own = match self.lane {
            0 => self.record.lane.load(Relaxed) as usize,
            lane => lane,
        };
        own == lane && self.is_with(generation)
    }

    /// Returns the number of a lane in the other process; `own` is its number in this process.
    pub fn lane_there(&self, own: usize) -> usize {
        match self.lane {
            // A jobs process numbers the lanes of its generation as its executors do.
            lane if lane > 0 && !self.is_jobs_process => lane,
            _ => own,
        }
    }

    /// Returns how many calls it could begin, as far as is known.
    pub fn room(&self) -> u32 {
        // A call on its event loop may take long, and sent calls would wait for it.
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

/// Returns a generation as records show it: 0 stands for a process that takes no part in forwarding.
pub fn shown_generation(generation: u32) -> u32 {
    generation.wrapping_add(1).max(1)
}

/// Returns whether a process of this generation (as records show it) runs the calls of a lane, as it is shown.
pub fn is_lane_served(records: &'static [WorkerRecord], generation: u32, lane: usize) -> bool {
    used(records).any(|(_, record)| {
        record.lane.load(Relaxed) as usize == lane && record.generation.load(Relaxed) == generation
    })
}

/// Returns whether each of the first `pools` pools has a process that serves this generation (as records show it).
/// The pools of the lanes in `kept` have one of an earlier generation.
pub fn has_all_pools(
    records: &'static [WorkerRecord],
    generation: u32,
    kept: &[usize],
    pools: usize,
) -> bool {
    let is_served = |lane| kept.contains(&lane) || is_lane_served(records, generation, lane);
    (1..=pools).all(is_served)
}

/// Returns the records of processes that take part in forwarding, with their indexes. Workers have the
/// lowest indexes and pool processes the highest.
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
