//! The links of a worker to others of its generation, and the decision which of them runs a call.
//!
//! A call waits in its home worker and nowhere else. If shared memory shows that another worker has
//! capacity, the home worker sends the call there. A worker whose capacity becomes free while others
//! have waiting calls offers it to them. Both sides write what they have before they read what the
//! others have, with a fence between, so one of the two always sees the other. A call is answered once:
//! by its runner, or with `crashed` when the link to that ends.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::fence;

use slab::Slab;

use super::call_table::{RemoteCall, ScheduledCall};
use super::timers::CallKey;
use crate::link::call_frame::{AnswerFrame, CallFrame, Frame};
use crate::link::call_link::CallLink;
use crate::link::scoreboard::{LANES, WorkerRecord};
use crate::sys::event::{Interest, Reactor};

/// Links that a worker may have.
const MAX_LINKS: usize = 64;
/// After this number of unused records in a row no worker is expected behind them.
const SEARCH_GAP: usize = 64;
/// Between two requests to the master for the same link.
const ASK_AGAIN_MS: u64 = 100;
/// A worker whose event loop has not run for this long gets no calls. It runs once a second if idle.
const STALE_MS: u64 = 2000;
/// If no call came for what was offered within this time, it is offered to others.
const OFFER_TTL_MS: u64 = 2;
/// Bytes received from a link at once.
const PIECE_LEN: usize = 64 * 1024;
/// The numbers under which a reactor watches links.
pub const LINK_BASE: u16 = 0x8000;

/// What a worker shows of one of its lanes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LaneLoad {
    /// Calls that could begin now.
    pub idle: u32,
    /// Calls that wait and that another worker could run.
    pub waiting: u32,
}

/// Another worker.
#[derive(Debug)]
pub struct Peer {
    record: &'static WorkerRecord,
    record_index: usize,
    pub link: CallLink,
    /// Calls of our connections that it runs.
    pub sent: HashMap<u64, CallKey>,
    /// Its calls that run here, by its numbers.
    pub running: HashMap<u64, CallKey>,
    /// How far it was, by its capacity epoch, when `sent_since` was zero.
    epoch: u32,
    /// By lane, calls sent that its record may not show yet.
    sent_since: [u32; LANES],
    /// By lane, its epoch plus one when capacity was offered to it last.
    offered_at: [u32; LANES],
    interest: Option<Interest>,
}

/// The links, and what is shown to others.
#[derive(Debug)]
pub struct Forwarding {
    records: &'static [WorkerRecord],
    own: usize,
    /// As the records have it.
    generation: u32,
    pub peers: Slab<Peer>,
    shown: [LaneLoad; LANES],
    /// When the master was asked for the link to a record.
    asked: HashMap<usize, u64>,
    /// Records that the master is to be asked for.
    wanted: Vec<u32>,
    last_number: u64,
    /// Where the next search for a peer begins, so that all get their turn.
    turn: usize,
    /// Room to receive into, from the first link on.
    piece: Vec<u8>,
    /// When to look whether an offer was taken.
    pub recheck_ms: Option<u64>,
}

impl Forwarding {
    /// Without links. `own` is the index of this worker's record.
    pub fn new(records: &'static [WorkerRecord], own: usize, generation: u32) -> Self {
        Forwarding {
            records,
            own,
            generation: generation.wrapping_add(1).max(1),
            peers: Slab::new(),
            shown: [LaneLoad::default(); LANES],
            asked: HashMap::new(),
            wanted: Vec::new(),
            last_number: 0,
            turn: 0,
            piece: Vec::new(),
            recheck_ms: None,
        }
    }

    /// Shows the load of a lane to the other workers. Returns whether capacity was added.
    pub fn show(&mut self, lane: usize, load: LaneLoad) -> bool {
        let before = std::mem::replace(&mut self.shown[lane], load);
        if before == load {
            return false;
        }
        let record = &self.records[self.own];
        record.generation.store(self.generation, Relaxed);
        record.idle[lane].store(load.idle, Relaxed);
        record.waiting[lane].store(load.waiting, Relaxed);
        self.touch();
        load.idle > before.idle
    }

    /// Says that what is shown is newer than what was received so far. To be followed by a look at
    /// what others show.
    fn touch(&self) {
        self.records[self.own].capacity_epoch.fetch_add(1, Relaxed);
        fence(SeqCst);
    }

    pub fn load(&self, lane: usize) -> LaneLoad {
        self.shown[lane]
    }

    /// Another worker with capacity in a lane, if a link to one exists. Without a link the master is
    /// asked for one.
    pub fn find_idle(&mut self, lane: usize, now_ms: u64) -> Option<usize> {
        self.turn = self.turn.wrapping_add(1);
        let links = self.peers.len();
        let start = if links == 0 { 0 } else { self.turn % links };
        let order = self
            .peers
            .iter()
            .skip(start)
            .chain(self.peers.iter().take(start));
        let best = order
            .filter(|(_, peer)| !peer.link.is_congested() && is_fresh(peer.record, now_ms))
            .map(|(key, peer)| (peer.room(lane), key))
            .filter(|(room, _)| *room > 0)
            // Of equals the first one.
            .reduce(|best, next| if next.0 > best.0 { next } else { best });
        if best.is_none() {
            self.want_links(now_ms, |record| record.idle[lane].load(Relaxed) > 0);
        }
        best.map(|(_, key)| key)
    }

    /// Other workers with waiting calls in a lane to which nothing was offered since they showed that;
    /// at most `most`.
    pub fn find_waiting(&mut self, lane: usize, most: usize, now_ms: u64) -> Vec<usize> {
        self.turn = self.turn.wrapping_add(1);
        let links = self.peers.len();
        let start = if links == 0 { 0 } else { self.turn % links };
        let order = self
            .peers
            .iter()
            .skip(start)
            .chain(self.peers.iter().take(start));
        let waiting: Vec<usize> = order
            .filter(|(_, peer)| {
                let epoch = peer.record.capacity_epoch.load(Relaxed);
                peer.record.generation.load(Relaxed) == self.generation
                    && peer.record.waiting[lane].load(Relaxed) > 0
                    && peer.offered_at[lane] != epoch.wrapping_add(1)
            })
            .map(|(key, _)| key)
            .take(most)
            .collect();
        if waiting.len() < most {
            self.want_links(now_ms, |record| record.waiting[lane].load(Relaxed) > 0);
        }
        waiting
    }

    /// Offers capacity to another worker.
    pub fn offer(&mut self, peer: usize, lane: usize, count: usize, now_ms: u64) {
        if let Some(peer) = self.peers.get_mut(peer) {
            let epoch = peer.record.capacity_epoch.load(Relaxed);
            peer.offered_at[lane] = epoch.wrapping_add(1);
            peer.link.queue(&Frame::Offer {
                lane: lane as u16,
                count: count as u32,
            });
            self.recheck_ms.get_or_insert(now_ms + OFFER_TTL_MS);
        }
    }

    /// How many other workers of this generation serve, and the connections that they have.
    pub fn other_connections(&self) -> (usize, usize) {
        let (mut workers, mut connections, mut unused) = (0, 0, 0);
        for (index, record) in self.records.iter().enumerate() {
            let generation = record.generation.load(Relaxed);
            unused = if generation == 0 { unused + 1 } else { 0 };
            if unused > SEARCH_GAP {
                break;
            }
            if generation == self.generation && index != self.own {
                workers += 1;
                connections += record.connections.load(Relaxed) as usize;
            }
        }
        (workers, connections)
    }

    /// Remembers which workers the master is to be asked for: those without a link that are `useful`.
    fn want_links(&mut self, now_ms: u64, useful: impl Fn(&WorkerRecord) -> bool) {
        let mut unused = 0;
        for (index, record) in self.records.iter().enumerate() {
            let generation = record.generation.load(Relaxed);
            unused = if generation == 0 { unused + 1 } else { 0 };
            if unused > SEARCH_GAP || self.peers.len() + self.wanted.len() >= MAX_LINKS {
                return;
            }
            let is_asked = |at: &u64| now_ms.saturating_sub(*at) < ASK_AGAIN_MS;
            if index == self.own
                || generation != self.generation
                || !useful(record)
                || !is_fresh(record, now_ms)
                || self.asked.get(&index).is_some_and(is_asked)
                || self
                    .peers
                    .iter()
                    .any(|(_, peer)| peer.record_index == index)
            {
                continue;
            }
            self.asked.insert(index, now_ms);
            self.wanted.push(index as u32);
        }
    }

    /// The records of workers that the master is to be asked for, once.
    pub fn take_wanted(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.wanted)
    }

    /// Adds a link that the master has made.
    pub fn add(&mut self, record_index: u32, fd: OwnedFd) {
        let index = record_index as usize;
        let Some(record) = self.records.get(index) else {
            return;
        };
        self.asked.remove(&index);
        if self.peers.len() >= MAX_LINKS {
            return;
        }
        self.peers.insert(Peer {
            record,
            record_index: index,
            link: CallLink::new(fd),
            sent: HashMap::new(),
            running: HashMap::new(),
            epoch: record.capacity_epoch.load(Relaxed),
            sent_since: [0; LANES],
            offered_at: [0; LANES],
            interest: None,
        });
    }

    /// Room to receive into; `put_piece` gives it back.
    pub fn take_piece(&mut self) -> Vec<u8> {
        if self.piece.is_empty() {
            self.piece = vec![0; PIECE_LEN];
        }
        std::mem::take(&mut self.piece)
    }

    pub fn put_piece(&mut self, piece: Vec<u8>) {
        self.piece = piece;
    }

    /// The name that the next call gets on the link to `peer`.
    pub fn next_call(&mut self, peer: usize) -> RemoteCall {
        self.last_number += 1;
        RemoteCall {
            link: peer,
            number: self.last_number,
        }
    }

    /// Sends a call. `key` is its key in quarantine.
    pub fn send(
        &mut self,
        to: RemoteCall,
        lane: usize,
        key: CallKey,
        call: &ScheduledCall,
    ) -> bool {
        let Some(peer) = self.peers.get_mut(to.link) else {
            return false;
        };
        let queued = peer.link.queue(&Frame::Call(CallFrame {
            id: to.number,
            method: call.method as u32,
            key: call.state.key(),
            deadline_ms: call.deadline_ms,
            client_id: call.id.as_deref().map(Into::into),
            peer: call.peer,
            params: call.params.as_deref().unwrap_or("null").into(),
        }));
        if queued {
            peer.sent.insert(to.number, key);
            peer.note_epoch();
            peer.sent_since[lane] += 1;
            let record = &self.records[self.own];
            record
                .forwarded
                .store(record.forwarded.load(Relaxed) + 1, Relaxed);
        }
        queued
    }

    /// The caller of a sent call does not wait any more.
    pub fn cancel(&mut self, call: RemoteCall) {
        if let Some(peer) = self.peers.get_mut(call.link)
            && peer.sent.remove(&call.number).is_some()
        {
            peer.link.queue(&Frame::Cancel { id: call.number });
        }
    }

    /// Answers a call of another worker.
    pub fn answer(&mut self, link: usize, answer: &AnswerFrame<'_>) {
        if let Some(peer) = self.peers.get_mut(link)
            && peer.running.remove(&answer.id).is_some()
        {
            peer.link.queue(&Frame::Answer(AnswerFrame {
                id: answer.id,
                took_us: answer.took_us,
                name: answer.name.as_deref().map(Into::into),
                outcome: match &answer.outcome {
                    Ok(result) => Ok(result.as_ref().into()),
                    Err(error) => Err(std::borrow::Cow::Borrowed(error.as_ref())),
                },
            }));
        }
    }

    /// Returns a call that could not begin here.
    pub fn return_call(&mut self, link: usize, id: u64) {
        if let Some(peer) = self.peers.get_mut(link) {
            peer.link.queue(&Frame::Returned { id });
        }
        // Its home worker must not send it here again for what it saw before.
        self.touch();
    }

    /// Whether something is not sent that another worker waits for.
    pub fn has_unsent(&self) -> bool {
        self.peers.iter().any(|(_, peer)| peer.link.has_unsent())
    }

    /// How many calls of other workers run here.
    pub fn running_for_others(&self) -> usize {
        self.peers.iter().map(|(_, peer)| peer.running.len()).sum()
    }

    /// Sends what is queued, and watches the links for what follows.
    pub fn settle(&mut self, reactor: &mut Reactor) {
        for (key, peer) in &mut self.peers {
            if peer.link.has_unsent() {
                peer.link.flush();
            }
            let wanted = match peer.link.has_unsent() {
                true => Interest::Both,
                false => Interest::Read,
            };
            if peer.interest != Some(wanted) {
                match reactor.watch(LINK_BASE + key as u16, &peer.link, wanted) {
                    Ok(()) => peer.interest = Some(wanted),
                    Err(error) => log::debug!("a link to a worker cannot be watched: {error}"),
                }
            }
        }
    }

    /// Removes a link that has ended.
    pub fn remove(&mut self, link: usize, reactor: &mut Reactor) -> Option<Peer> {
        let peer = self.peers.try_remove(link)?;
        reactor.unwatch(LINK_BASE + link as u16);
        Some(peer)
    }
}

impl Peer {
    /// Once its record has changed, what was sent before shows in it.
    fn note_epoch(&mut self) {
        let epoch = self.record.capacity_epoch.load(Relaxed);
        if epoch != self.epoch {
            self.epoch = epoch;
            self.sent_since = [0; LANES];
        }
    }

    /// How many calls of a lane it could begin, as far as is known.
    fn room(&self, lane: usize) -> u32 {
        // A call on its event loop may take long, and what is sent waits for that.
        if self.record.inline_running.load(Relaxed) > 0 {
            return 0;
        }
        let sent = match self.record.capacity_epoch.load(Relaxed) == self.epoch {
            true => self.sent_since[lane],
            false => 0,
        };
        self.record.idle[lane].load(Relaxed).saturating_sub(sent)
    }
}

/// Whether the event loop of a worker has run lately.
fn is_fresh(record: &WorkerRecord, now_ms: u64) -> bool {
    now_ms.saturating_sub(record.heartbeat_ms.load(Relaxed)) < STALE_MS
}
