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

use super::call_table::RemoteCall;
use super::peer::{LeaveState, Peer, is_fresh, used};
use crate::handler::call_state::HandlerCall;
use crate::link::call_frame::{AnswerFrame, CallFrame, Frame};
use crate::link::scoreboard::{LANES, WorkerRecord};
use crate::sys::event::{Interest, Reactor};

/// Links that a worker may have.
const MAX_LINKS: usize = 64;
/// Between two requests to the master for the same link.
const ASK_AGAIN_MS: u64 = 100;
/// If no call came for what was offered within this time, it is offered to others.
const OFFER_TTL_MS: u64 = 2;
/// How long a process that leaves waits until the others have noted that.
const LEAVE_TTL_MS: u64 = 200;
/// Bytes received from a link at once.
const PIECE_LEN: usize = 64 * 1024;
/// The numbers under which a reactor watches links.
pub const LINK_BASE: u16 = 0x8000;

/// What a worker shows to the others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    /// Calls of its own lane that could begin now.
    pub idle: u32,
    /// By place of the lane, calls that wait and that another process could run.
    pub waiting: [u32; LANES],
}

/// The place of a lane among the numbers of waiting calls.
pub fn place(lane: usize) -> usize {
    lane.min(LANES - 1)
}

/// The links, and what is shown to others.
#[derive(Debug)]
pub struct Forwarding {
    records: &'static [WorkerRecord],
    own: usize,
    /// The lane whose calls this process runs.
    pub lane: usize,
    /// As the records have it.
    generation: u32,
    pub peers: Slab<Peer>,
    shown: Load,
    /// When the master was asked for the link to a record.
    asked: HashMap<usize, u64>,
    /// When capacity for short calls was offered last.
    short_offered_ms: u64,
    /// When links may be asked for ahead of need again.
    prepare_ms: u64,
    /// Records that the master is to be asked for.
    wanted: Vec<u32>,
    last_number: u64,
    /// Where the next search for a peer begins, so that all get their turn.
    turn: usize,
    /// Room to receive into, from the first link on.
    piece: Vec<u8>,
    /// When to look whether an offer was taken, or whether this process may leave.
    pub recheck_ms: Option<u64>,
    /// Calls have come since the load was shown: their senders must not count them any more.
    pub is_stale: bool,
    /// Capacity was added that was not offered yet.
    pub owes_offer: bool,
    /// Until when it is waited for the others' notes that this process leaves.
    leave_by_ms: Option<u64>,
}

impl Forwarding {
    /// Without links. `own` is the index of this process's record, `lane` the lane whose calls it runs.
    pub fn new(records: &'static [WorkerRecord], own: usize, lane: usize, generation: u32) -> Self {
        Forwarding {
            records,
            own,
            lane,
            generation: generation.wrapping_add(1).max(1),
            peers: Slab::new(),
            shown: Load::default(),
            asked: HashMap::new(),
            short_offered_ms: 0,
            prepare_ms: 0,
            wanted: Vec::new(),
            last_number: 0,
            turn: 0,
            piece: Vec::new(),
            recheck_ms: None,
            is_stale: false,
            owes_offer: false,
            leave_by_ms: None,
        }
    }

    /// Shows the load to the other processes. Returns whether capacity was added.
    pub fn show(&mut self, load: Load) -> bool {
        let before = std::mem::replace(&mut self.shown, load);
        let was_stale = std::mem::take(&mut self.is_stale);
        if before == load {
            if was_stale {
                self.touch();
            }
            return was_stale;
        }
        let record = &self.records[self.own];
        record.generation.store(self.generation, Relaxed);
        record.lane.store(self.lane as u32, Relaxed);
        record.idle.store(load.idle, Relaxed);
        for (shown, waiting) in record.waiting.iter().zip(load.waiting) {
            shown.store(waiting, Relaxed);
        }
        self.touch();
        was_stale || load.idle > before.idle
    }

    /// Says that what is shown is newer than what was received so far. To be followed by a look at
    /// what others show.
    fn touch(&self) {
        self.records[self.own].capacity_epoch.fetch_add(1, Relaxed);
        fence(SeqCst);
    }

    /// All peers, each time from another one on.
    fn peers_in_turn(&mut self) -> impl Iterator<Item = (usize, &Peer)> {
        self.turn = self.turn.wrapping_add(1);
        let start = self.turn % self.peers.len().max(1);
        let peers = &self.peers;
        peers.iter().skip(start).chain(peers.iter().take(start))
    }

    /// Another worker with capacity in a lane, if a link to one exists. Without a link the master is
    /// asked for one.
    pub fn find_idle(&mut self, lane: usize, now_ms: u64) -> Option<usize> {
        let generation = self.generation;
        let order = self.peers_in_turn();
        let best = order
            .filter(|(_, peer)| {
                !peer.is_leaving && !peer.link.is_congested() && is_fresh(peer.record, now_ms)
            })
            .filter(|(_, peer)| peer.serves(lane, generation))
            .map(|(key, peer)| (peer.room(), key))
            .filter(|(room, _)| *room > 0)
            // Of equals the first one.
            .reduce(|best, next| if next.0 > best.0 { next } else { best });
        if best.is_none() {
            let is_idle = |peer: &Peer| {
                peer.serves(lane, self.generation)
                    && !peer.is_leaving
                    && peer.record.idle.load(Relaxed) > 0
            };
            if self.peers.iter().any(|(_, peer)| is_idle(peer)) {
                // It is at an inline call, or has not seen what was sent: it may not offer its capacity.
                self.recheck_ms.get_or_insert(now_ms + OFFER_TTL_MS);
            }
            self.want_links(now_ms, |record| {
                record.lane.load(Relaxed) as usize == lane && record.idle.load(Relaxed) > 0
            });
        }
        best.map(|(_, key)| key)
    }

    /// Workers with waiting calls of the own lane, at most `most`. If `is_repeated`, only those to which
    /// nothing was offered since they showed that.
    pub fn find_waiting(&mut self, most: usize, is_repeated: bool, now_ms: u64) -> Vec<usize> {
        let place = place(self.lane);
        let generation = self.generation;
        let order = self.peers_in_turn();
        let waiting: Vec<usize> = order
            .filter(|(_, peer)| {
                let epoch = peer.record.capacity_epoch.load(Relaxed);
                peer.record.generation.load(Relaxed) == generation
                    && peer.record.waiting[place].load(Relaxed) > 0
                    && (!is_repeated || peer.offered_at != epoch.wrapping_add(1))
            })
            .map(|(key, _)| key)
            .take(most)
            .collect();
        // Workers and pool processes have links already.
        if waiting.len() < most && self.lane == 0 {
            self.want_links(now_ms, |record| record.waiting[place].load(Relaxed) > 0);
        }
        waiting
    }

    /// Whether capacity for short calls may be offered again.
    pub fn may_offer_short(&mut self, now_ms: u64) -> bool {
        let may = now_ms > self.short_offered_ms && !self.peers.is_empty();
        if may {
            self.short_offered_ms = now_ms;
        }
        may
    }

    /// Offers capacity to another worker: for `count` calls, and for `short` more that are short.
    pub fn offer(&mut self, peer: usize, (count, short): (usize, usize), now_ms: u64) {
        let lane = self.lane;
        if let Some(peer) = self.peers.get_mut(peer) {
            let epoch = peer.record.capacity_epoch.load(Relaxed);
            peer.offered_at = epoch.wrapping_add(1);
            peer.link.queue(&Frame::Offer {
                lane: lane as u16,
                count: count as u32,
                short: short as u32,
            });
            self.recheck_ms.get_or_insert(now_ms + OFFER_TTL_MS);
        }
    }

    /// Whether a process of this generation runs the calls of a lane.
    pub fn is_served(&self, lane: usize) -> bool {
        let mut used = used(self.records);
        used.any(|(_, record)| {
            record.lane.load(Relaxed) as usize == lane
                && record.generation.load(Relaxed) == self.generation
        })
    }

    /// How many other workers of this generation serve, and the connections that they have. One that is
    /// stopped does not count.
    pub fn other_connections(&self, now_ms: u64) -> (usize, usize) {
        let (mut workers, mut connections) = (0, 0);
        for (index, record) in used(self.records) {
            let is_worker = record.lane.load(Relaxed) == 0;
            let is_same = record.generation.load(Relaxed) == self.generation;
            if is_same && index != self.own && is_worker && is_fresh(record, now_ms) {
                workers += 1;
                connections += record.connections.load(Relaxed) as usize;
            }
        }
        (workers, connections)
    }

    /// All threads of this worker are busy: asks for links to workers with capacity before a call waits for
    /// one.
    pub fn prepare_links(&mut self, now_ms: u64) {
        if self.lane == 0 && now_ms >= self.prepare_ms {
            self.prepare_ms = now_ms + ASK_AGAIN_MS;
            self.want_links(now_ms, |record| {
                record.lane.load(Relaxed) == 0 && record.idle.load(Relaxed) > 0
            });
        }
    }

    /// Remembers which workers the master is to be asked for: those without a link that are `useful`.
    fn want_links(&mut self, now_ms: u64, useful: impl Fn(&WorkerRecord) -> bool) {
        for (index, record) in used(self.records) {
            let generation = record.generation.load(Relaxed);
            // A link to or from a pool process is always made.
            let is_pool = self.lane > 0 || record.lane.load(Relaxed) > 0;
            if !is_pool && self.peers.len() + self.wanted.len() >= MAX_LINKS {
                continue;
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
        self.peers.insert(Peer::new(record, index, fd));
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

    /// Sends a call of the connection with number `client`.
    pub fn send(&mut self, to: RemoteCall, client: u32, call: &HandlerCall) -> bool {
        let Some(peer) = self.peers.get_mut(to.link) else {
            return false;
        };
        let queued = peer.link.queue(&Frame::Call(CallFrame {
            id: to.number,
            method: call.method as u32,
            key: call.state.key(),
            deadline_ms: u64::try_from(call.deadline.as_millis()).unwrap_or(u64::MAX),
            client,
            client_id: call.id.as_deref().map(Into::into),
            peer: call.peer,
            params: call.params.as_ref().into(),
        }));
        if queued {
            peer.sent.insert(to.number, call.key);
            peer.note_epoch();
            peer.sent_since += 1;
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

    /// Whether calls of a lane may be sent over a link.
    pub fn may_send(&self, link: usize, lane: usize) -> bool {
        self.peers.get(link).is_some_and(|peer| {
            peer.serves(lane, self.generation) && !peer.is_leaving && !peer.link.is_congested()
        })
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
            peer.running.remove(&id);
            peer.link.queue(&Frame::Returned { id });
        }
    }

    /// Tells the others that this process begins no further call, once. A call may be on its way from one
    /// that has seen capacity just before.
    pub fn leave(&mut self, now_ms: u64) {
        for (_, peer) in &mut self.peers {
            if peer.leave == LeaveState::NotTold {
                peer.leave = LeaveState::Told;
                peer.link.queue(&Frame::Leave);
                // The first one counts: who is stopped in the middle of sending keeps nobody here.
                self.leave_by_ms.get_or_insert(now_ms + LEAVE_TTL_MS);
            }
        }
        if !self.is_settled(now_ms) {
            self.recheck_ms = self.leave_by_ms.filter(|at| *at > now_ms);
        }
    }

    /// Whether this process may leave: nothing is unsent, and no call is on its way.
    pub fn is_settled(&self, now_ms: u64) -> bool {
        let is_noted = |peer: &Peer| peer.leave != LeaveState::Told;
        let is_over = self.leave_by_ms.is_some_and(|at| at <= now_ms);
        (self.peers.iter()).all(|(_, peer)| !peer.link.has_unsent() && (is_over || is_noted(peer)))
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
