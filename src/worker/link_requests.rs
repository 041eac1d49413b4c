//! Decides which links a process asks the master for. Pure: it reads the scoreboard, and the caller passes the time.

use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;

use slab::Slab;

use super::peer::{Peer, used};
use crate::link::call_link::MAX_LINKS;
use crate::link::scoreboard::WorkerRecord;

/// The time between two requests to the master for the same link.
pub const ASK_AGAIN_MS: u64 = 100;

/// The process that needs links.
#[derive(Debug)]
pub struct LinkSeeker {
    /// The index of its record.
    pub own: usize,
    /// The number of the call queue whose calls it runs.
    pub lane: usize,
    /// Its generation, as records show it.
    pub generation: u32,
    pub is_session: bool,
}

/// The links that the master is asked for.
#[derive(Debug, Default)]
pub struct LinkRequests {
    /// When the master was asked for the link to a record.
    asked: HashMap<usize, u64>,
    /// The records for which it must be asked.
    wanted: Vec<u32>,
}

impl LinkRequests {
    /// Adds the `useful` processes without a link to those that the master must be asked for.
    pub fn want(
        &mut self,
        records: &'static [WorkerRecord],
        seeker: &LinkSeeker,
        peers: &Slab<Peer>,
        now_ms: u64,
        useful: impl Fn(&WorkerRecord) -> bool,
    ) {
        let is_worker = |index: usize| {
            let record = records.get(index);
            record.is_some_and(|record| record.lane.load(Relaxed) == 0)
        };
        let linked = peers.iter().filter(|(_, it)| is_worker(it.record_index));
        let wanted = self.wanted.iter().filter(|it| is_worker(**it as usize));
        let mut workers = linked.count() + wanted.count();
        for (index, record) in used(records) {
            let generation = record.generation.load(Relaxed);
            // A link to or from a pool process is always made.
            let is_pool = seeker.lane > 0 || record.lane.load(Relaxed) > 0;
            let is_other = match seeker.is_session {
                true => generation == 0 || !is_pool,
                false => generation != seeker.generation,
            };
            if !is_pool && workers >= MAX_LINKS {
                continue;
            }
            let is_asked = |at: &u64| now_ms.saturating_sub(*at) < ASK_AGAIN_MS;
            if index == seeker.own
                || is_other
                || !useful(record)
                || !record.is_fresh(now_ms)
                || self.asked.get(&index).is_some_and(is_asked)
                || peers.iter().any(|(_, peer)| peer.record_index == index)
            {
                continue;
            }
            workers += usize::from(!is_pool);
            self.asked.insert(index, now_ms);
            self.wanted.push(index as u32);
        }
    }

    /// Records that a link was made.
    pub fn made(&mut self, index: usize) {
        self.asked.remove(&index);
    }

    /// Returns the records for which the master must be asked, once.
    pub fn take(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.wanted)
    }
}
