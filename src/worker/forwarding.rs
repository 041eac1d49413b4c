//! Holds the links of a worker to others of its generation, and decides which of them runs a call.
//!
//! A call waits only in its home worker. If shared memory shows that another worker has capacity, the
//! home worker sends the call there. A worker that gets free capacity while others have waiting calls
//! offers it to them. Both sides write their own numbers before they read those of the others, with a
//! fence between. So at least one of the two sees the other. A call is answered once: by its runner, or
//! with `crashed` when the link to the runner ends.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::fence;

use slab::Slab;

use super::call_table::RemoteCall;
use super::peer::{LeaveState, Load, Peer, SharedPools, has_all_pools, is_fresh, place, used};
use crate::handler::call_state::HandlerCall;
use crate::link::call_frame::{AnswerFrame, CallOrigin, Frame};
use crate::link::message::SessionLink;
use crate::link::scoreboard::WorkerRecord;
use crate::link::session_table::{self, SessionRecord};
use crate::sys::event::{Interest, Reactor};
use crate::sys::process::Pid;

const MAX_LINKS: usize = 64;
/// The time between two requests to the master for the same link.
const ASK_AGAIN_MS: u64 = 100;
/// Between two looks whether another worker has an idle thread.
const ACCEPT_LOOK_MS: u64 = 3;
/// If no call came for what was offered within this time, it is offered to others.
const OFFER_TTL_MS: u64 = 2;
/// How long an exiting process waits until the others have confirmed it.
const LEAVE_TTL_MS: u64 = 200;
/// The size of one read from a link in bytes.
const PIECE_LEN: usize = 64 * 1024;
/// The first number under which the reactor watches links.
pub const LINK_BASE: u16 = 0x8000;

pub fn shown_generation(generation: u32) -> u32 {
    generation.wrapping_add(1).max(1)
}

/// The links, and what is shown to others.
#[derive(Debug)]
pub struct Forwarding {
    records: &'static [WorkerRecord],
    sessions: &'static [SessionRecord],
    own: usize,
    own_record: &'static WorkerRecord,
    /// The pid in the ids of its calls.
    own_pid: i32,
    /// Whether this is a session, which sends only calls of pools.
    pub is_session: bool,
    /// The lane whose calls this process runs.
    pub lane: usize,
    pub generation: u32,
    pub peers: Slab<Peer>,
    pub pools: SharedPools,
    shown: Load,
    /// When the master was asked for the link to a record.
    asked: HashMap<usize, u64>,
    /// When capacity for short calls was offered last.
    short_offered_ms: u64,
    /// When links may again be requested in advance.
    prepare_ms: u64,
    /// When it may be looked again whether another worker is to accept instead.
    accept_look_ms: u64,
    /// Records that the master is to be asked for.
    wanted: Vec<u32>,
    /// Where the next search for a peer begins, so that all get a turn.
    turn: usize,
    /// The receive buffer, allocated with the first link.
    piece: Vec<u8>,
    /// When to check whether an offer was taken, or whether this process may exit.
    pub recheck_ms: Option<u64>,
    /// Whether calls have arrived since the load was published, so that their senders must stop counting
    /// them.
    pub is_stale: bool,
    pub owes_offer: bool,
    /// Until when this process waits for the others to confirm its exit.
    leave_by_ms: Option<u64>,
}

impl Forwarding {
    /// Without links. `own` is this process's record with its index, `lane` the lane whose calls it runs.
    pub fn new(
        (records, sessions): (&'static [WorkerRecord], &'static [SessionRecord]),
        (own_record, own): (&'static WorkerRecord, usize),
        lane: usize,
        generation: u32,
        pools: SharedPools,
    ) -> Self {
        Forwarding {
            pools,
            records,
            sessions,
            own,
            own_record,
            own_pid: Pid::current().0,
            is_session: own >= records.len(),
            lane,
            generation: shown_generation(generation),
            peers: Slab::new(),
            shown: Load::default(),
            asked: HashMap::new(),
            short_offered_ms: 0,
            prepare_ms: 0,
            accept_look_ms: 0,
            wanted: Vec::new(),
            turn: 0,
            piece: Vec::new(),
            recheck_ms: None,
            is_stale: false,
            owes_offer: false,
            leave_by_ms: None,
        }
    }

    pub fn show(&mut self, load: Load) -> bool {
        let before = std::mem::replace(&mut self.shown, load);
        let was_stale = std::mem::take(&mut self.is_stale);
        if before == load && !was_stale {
            return false;
        }
        let record = self.own_record;
        record.generation.store(self.generation, Relaxed);
        let lane = self.pools.shown_lane.unwrap_or(self.lane);
        record.lane.store(lane as u32, Relaxed);
        record.idle.store(load.idle, Relaxed);
        for (shown, waiting) in record.waiting.iter().zip(load.waiting) {
            shown.store(waiting, Relaxed);
        }
        // It is newer than what was received so far. A look at what others show follows.
        record.capacity_epoch.fetch_add(1, Relaxed);
        fence(SeqCst);
        was_stale || load.idle > before.idle
    }

    /// Returns all peers, starting with another one each time.
    fn peers_in_turn(&mut self) -> impl Iterator<Item = (usize, &Peer)> {
        self.turn = self.turn.wrapping_add(1);
        let start = self.turn % self.peers.len().max(1);
        let peers = &self.peers;
        peers.iter().skip(start).chain(peers.iter().take(start))
    }

    /// Returns another worker with capacity in a lane, if there is a link to it. If there is none, the
    /// master is asked for one.
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
            // Among equals take the first.
            .reduce(|best, next| if next.0 > best.0 { next } else { best });
        if best.is_none() {
            let is_idle = |peer: &Peer| {
                peer.serves(lane, self.generation)
                    && !peer.is_leaving
                    && peer.record.idle.load(Relaxed) > 0
            };
            if self.peers.iter().any(|(_, peer)| is_idle(peer)) {
                // It runs an inline call or has not seen the sent calls, so it may not offer its
                // capacity.
                self.recheck_ms.get_or_insert(now_ms + OFFER_TTL_MS);
            }
            // A pool process finds a session with waiting calls over a link only. It may show the lane
            // of another generation, so the master decides which one is linked.
            let is_any = self.is_session && lane > 0;
            self.want_links(now_ms, |record| {
                is_any
                    || record.lane.load(Relaxed) as usize == lane && record.idle.load(Relaxed) > 0
            });
        }
        best.map(|(_, key)| key)
    }

    /// Returns at most `most` workers with waiting calls of this lane. If `is_repeated`, only those that
    /// have got no offer since they showed the calls.
    pub fn find_waiting(&mut self, most: usize, is_repeated: bool, now_ms: u64) -> Vec<usize> {
        let (lane, generation) = (self.lane, self.generation);
        let order = self.peers_in_turn();
        let waiting: Vec<usize> = order
            .filter(|(_, peer)| {
                let epoch = peer.record.capacity_epoch.load(Relaxed);
                peer.is_with(generation)
                    && peer.record.waiting[place(peer.lane_there(lane))].load(Relaxed) > 0
                    && (!is_repeated || peer.offered_at != epoch.wrapping_add(1))
            })
            .map(|(key, _)| key)
            .take(most)
            .collect();
        // Workers and pool processes always have links.
        if waiting.len() < most && self.lane == 0 {
            self.want_links(now_ms, |record| record.waiting[0].load(Relaxed) > 0);
        }
        waiting
    }

    /// Returns whether capacity for short calls may be offered again.
    pub fn may_offer_short(&mut self, now_ms: u64) -> bool {
        let may = now_ms > self.short_offered_ms && !self.peers.is_empty();
        if may {
            self.short_offered_ms = now_ms;
        }
        may
    }

    /// Offers capacity to another worker: for `count` calls, and for `short` more short ones.
    pub fn offer(&mut self, peer: usize, (count, short): (usize, usize), now_ms: u64) {
        let lane = self.lane;
        if let Some(peer) = self.peers.get_mut(peer) {
            let epoch = peer.record.capacity_epoch.load(Relaxed);
            peer.offered_at = epoch.wrapping_add(1);
            peer.link.queue(&Frame::Offer {
                lane: peer.lane_there(lane) as u16,
                count: count as u32,
                short: short as u32,
            });
            self.recheck_ms.get_or_insert(now_ms + OFFER_TTL_MS);
        }
    }

    /// Returns whether each of this number of pools has a process that serves.
    pub fn has_all_pools(&self, pools: usize) -> bool {
        has_all_pools(self.records, self.generation, &self.pools.kept_lanes, pools)
    }

    /// The other workers of this generation that serve. One that is stopped does not count.
    pub fn other_workers(&self, now_ms: u64) -> impl Iterator<Item = &WorkerRecord> {
        used(self.records).filter_map(move |(index, record)| {
            let is_worker = index != self.own && record.lane.load(Relaxed) == 0;
            let is_same = record.generation.load(Relaxed) == self.generation;
            (is_worker && is_same && is_fresh(record, now_ms)).then_some(record)
        })
    }

    /// Whether this worker has no idle thread, and another one has. It looks once in a while only, because
    /// threads that run short calls are idle and busy in turn.
    pub fn leaves_accepting(&mut self, now_ms: u64) -> bool {
        if self.lane > 0 || self.shown.idle > 0 || now_ms < self.accept_look_ms {
            return false;
        }
        self.accept_look_ms = now_ms + ACCEPT_LOOK_MS;
        (self.other_workers(now_ms)).any(|record| record.idle.load(Relaxed) > 0)
    }

    /// Requests links to all pool processes: later, a session may have no acceptor that could.
    pub fn want_pools(&mut self, now_ms: u64) {
        self.want_links(now_ms, |record| record.lane.load(Relaxed) > 0);
    }

    /// If all threads of this worker are busy, requests links to workers with capacity before a call
    /// waits for one.
    pub fn prepare_links(&mut self, now_ms: u64) {
        if self.lane == 0 && now_ms >= self.prepare_ms {
            self.prepare_ms = now_ms + ASK_AGAIN_MS;
            self.want_links(now_ms, |record| {
                record.lane.load(Relaxed) == 0 && record.idle.load(Relaxed) > 0
            });
        }
    }

    /// Adds the `useful` workers without a link to those that the master must be asked for.
    fn want_links(&mut self, now_ms: u64, useful: impl Fn(&WorkerRecord) -> bool) {
        for (index, record) in used(self.records) {
            let generation = record.generation.load(Relaxed);
            // A link to or from a pool process is always made.
            let is_pool = self.lane > 0 || record.lane.load(Relaxed) > 0;
            let is_other = match self.is_session {
                true => generation == 0 || !is_pool,
                false => generation != self.generation,
            };
            if !is_pool && self.peers.len() + self.wanted.len() >= MAX_LINKS {
                continue;
            }
            let is_asked = |at: &u64| now_ms.saturating_sub(*at) < ASK_AGAIN_MS;
            if index == self.own
                || is_other
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

    /// Returns the records for which the master must be asked, once.
    pub fn take_wanted(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.wanted)
    }

    /// Adds a link that the master has made; `pool` as in `Peer::new`.
    pub fn add(&mut self, record_index: u32, fd: OwnedFd, pool: Option<(usize, u32)>) {
        let index = record_index as usize;
        let Some(record) = session_table::shown(self.records, self.sessions, index) else {
            return;
        };
        self.asked.remove(&index);
        self.peers.insert(Peer::new(record, index, fd, pool));
    }

    /// In a pool process, adds a link to a session that the master has made. It replaces those of the session
    /// that run nothing, and a session has two at most: it may ask again and again.
    pub fn add_session(&mut self, link: SessionLink, fd: OwnedFd, reactor: &mut Reactor) {
        let session = link.session as usize;
        let index = session_table::link_index(session);
        let peers = self.peers.iter();
        let links = peers.filter(|(_, peer)| peer.record_index == index);
        let (idle, busy): (Vec<_>, Vec<_>) = links.partition(|(_, peer)| peer.running.is_empty());
        let (idle, busy) = (idle.iter().map(|(key, _)| *key).collect(), busy.len());
        let idle: Vec<usize> = idle;
        for key in idle {
            self.remove(key, reactor);
        }
        if let Some(record) = self.sessions.get(session).filter(|_| busy < 2) {
            let pool = (link.lane.into(), record.generation().0);
            self.add(index as u32, fd, Some(pool));
        }
    }

    /// Takes the receive buffer; `put_piece` returns it.
    pub fn take_piece(&mut self) -> Vec<u8> {
        if self.piece.is_empty() {
            self.piece = vec![0; PIECE_LEN];
        }
        std::mem::take(&mut self.piece)
    }

    pub fn put_piece(&mut self, piece: Vec<u8>) {
        self.piece = piece;
    }

    pub fn send(&mut self, to: RemoteCall, origin: CallOrigin, call: &HandlerCall) -> bool {
        let Some(peer) = self.peers.get_mut(to.link) else {
            return false;
        };
        let is_queued = peer.send(self.own_pid, origin, call);
        if is_queued {
            let forwarded = &self.own_record.forwarded;
            forwarded.store(forwarded.load(Relaxed) + 1, Relaxed);
        }
        is_queued
    }

    /// Cancels a sent call whose caller does not wait any more.
    pub fn cancel(&mut self, call: RemoteCall) {
        if let Some(peer) = self.peers.get_mut(call.link)
            && peer.sent.remove(&call.number).is_some()
        {
            peer.link.queue(&Frame::Cancel { id: call.number });
        }
    }

    /// Returns whether calls of a lane may be sent over a link.
    pub fn may_send(&self, link: usize, lane: usize) -> bool {
        self.peers.get(link).is_some_and(|peer| {
            peer.serves(lane, self.generation) && !peer.is_leaving && !peer.link.is_congested()
        })
    }

    pub fn answer(&mut self, link: usize, answer: &AnswerFrame<'_>) {
        if let Some(peer) = self.peers.get_mut(link) {
            peer.answer(answer);
        }
    }

    pub fn return_call(&mut self, link: usize, id: u64) {
        if let Some(peer) = self.peers.get_mut(link) {
            peer.running.remove(&id);
            peer.link.queue(&Frame::Returned { id });
        }
    }

    /// Announces, once, that this process begins no further call. A process that has just seen capacity
    /// may have sent a call.
    pub fn leave(&mut self, now_ms: u64) {
        for (_, peer) in &mut self.peers {
            if peer.leave == LeaveState::NotTold {
                peer.leave = LeaveState::Told;
                peer.link.queue(&Frame::Leave);
                // Only the first time counts: a process that is stopped while sending must not delay this
                // exit.
                self.leave_by_ms.get_or_insert(now_ms + LEAVE_TTL_MS);
            }
        }
        if !self.is_settled(now_ms) {
            self.recheck_ms = self.leave_by_ms.filter(|at| *at > now_ms);
        }
    }

    /// Returns whether this process may exit: all is sent, and no call is in transit.
    pub fn is_settled(&self, now_ms: u64) -> bool {
        let is_noted = |peer: &Peer| peer.leave != LeaveState::Told;
        let is_over = self.leave_by_ms.is_some_and(|at| at <= now_ms);
        (self.peers.iter()).all(|(_, peer)| !peer.link.has_unsent() && (is_over || is_noted(peer)))
    }

    pub fn running_for_others(&self) -> usize {
        self.peers.iter().map(|(_, peer)| peer.running.len()).sum()
    }

    /// Sends queued frames, and watches the links for the needed events.
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
