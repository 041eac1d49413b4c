//! Holds the links of a worker to others of its generation, and decides which of them runs a call.
//!
//! Except for short calls, a call waits only in its home worker. If shared memory shows that another worker has
//! capacity, the home worker sends the call there. A worker that gets free capacity while others have waiting calls
//! offers them the capacity. Both sides write their own numbers before they read those of the others, with a fence
//! between. So one of them sees the other. A call is answered once: by its runner, or with `crashed` if its link ends.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::fence;

use slab::Slab;

use super::call_table::RemoteCall;
use super::link_requests::{ASK_AGAIN_MS, LinkRequests, LinkSeeker};
use super::peer::{
    LeaveState, Load, Peer, SharedPools, has_all_pools, is_lane_served, place, shown_generation,
    used,
};
use crate::handler::call_state::HandlerCall;
use crate::handler::job_methods::JobMethod;
use crate::link::call_frame::{AnswerFrame, CallOrigin, Frame};
use crate::link::message::{JOBS_LANE, PoolLink, SessionLink};
use crate::link::scoreboard::WorkerRecord;
use crate::link::session_memory;
use crate::link::session_table::SessionRecord;
use crate::sys::event::Reactor;
use crate::sys::process::Pid;

/// The time between two checks whether another worker has an idle thread, in milliseconds.
const ACCEPT_LOOK_MS: u64 = 3;
/// If no call has arrived for an offer within this time, in milliseconds, the capacity is offered to others.
const OFFER_TTL_MS: u64 = 2;
/// How long an exiting process waits until the others have confirmed its exit, in milliseconds.
const LEAVE_TTL_MS: u64 = 200;
/// The size of one read from a link in bytes.
const PIECE_LEN: usize = 64 * 1024;
/// The first number under which the reactor watches links.
pub const LINK_BASE: u16 = 0x8000;

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
    /// The links that the master is asked for.
    requests: LinkRequests,
    /// When capacity for short calls was offered last.
    short_offered_ms: u64,
    /// When links may again be requested in advance.
    prepare_ms: u64,
    /// When to check again whether another worker should accept instead, in milliseconds.
    accept_look_ms: u64,
    /// Where the next search for a peer begins, so that all get a turn.
    turn: usize,
    /// The receive buffer, allocated with the first link.
    piece: Vec<u8>,
    /// When to check whether an offer was taken, or whether this process may exit.
    pub recheck_ms: Option<u64>,
    /// Whether calls have arrived since the load was published. Their senders must stop counting them.
    pub is_stale: bool,
    pub owes_offer: bool,
    /// Until when this process waits for the others to confirm its exit.
    leave_by_ms: Option<u64>,
}

impl Forwarding {
    /// Creates the state without links. `own` is the index of its own record, `lane` the lane whose calls it runs.
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
            requests: LinkRequests::default(),
            short_offered_ms: 0,
            prepare_ms: 0,
            accept_look_ms: 0,
            turn: 0,
            piece: Vec::new(),
            recheck_ms: None,
            is_stale: false,
            owes_offer: false,
            leave_by_ms: None,
        }
    }

    /// Publishes the load of this process. Returns whether its capacity must be offered to others.
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
        // The new epoch says that these numbers include all calls received so far. The fence is before the next read
        // of the others' numbers.
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

    /// Returns another process with capacity in a lane, if there is a link to one. Otherwise asks the master for a
    /// link.
    pub fn find_idle(&mut self, lane: usize, now_ms: u64) -> Option<usize> {
        let generation = self.generation;
        let order = self.peers_in_turn();
        let best = order
            .filter(|(_, peer)| {
                !peer.is_leaving && !peer.link.is_congested() && peer.record.is_fresh(now_ms)
            })
            .filter(|(_, peer)| peer.serves(lane, generation))
            .map(|(key, peer)| (peer.room(), key))
            .filter(|(room, _)| *room > 0)
            .reduce(|best, next| if next.0 > best.0 { next } else { best });
        if best.is_none() {
            let is_idle = |peer: &Peer| {
                peer.serves(lane, self.generation)
                    && !peer.is_leaving
                    && peer.record.idle.load(Relaxed) > 0
            };
            if self.peers.iter().any(|(_, peer)| is_idle(peer)) {
                // A peer shows capacity that cannot be used now: it runs an inline call, or has not seen all sent
                // calls. It may not offer that capacity later, so check again.
                self.recheck_by(now_ms + OFFER_TTL_MS);
            }
            // A pool process does not see the calls that wait in a session without a link. The record may show the lane
            // of another generation, so the master decides which pool process is linked.
            let is_any = self.is_session && lane > 0 && !self.pools.jobs.is(lane);
            let shown = self.pools.jobs.shown(lane);
            self.want_links(now_ms, |record| {
                is_any || record.lane.load(Relaxed) == shown && record.idle.load(Relaxed) > 0
            });
        }
        best.map(|(_, key)| key)
    }

    /// Returns at most `most` workers with waiting calls of this lane; if `takes_jobs`, jobs processes with due jobs
    /// too. If `is_repeated`, returns only those that have got no offer since they showed the calls.
    pub fn find_waiting(
        &mut self,
        most: usize,
        (is_repeated, takes_jobs): (bool, bool),
        now_ms: u64,
    ) -> Vec<usize> {
        let (lane, generation) = (self.lane, self.generation);
        let order = self.peers_in_turn();
        let waiting: Vec<usize> = order
            .filter(|(_, peer)| {
                let epoch = peer.record.capacity_epoch.load(Relaxed);
                peer.is_with(generation)
                    && !peer.link.is_congested()
                    && (takes_jobs || !peer.is_jobs_process)
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
            self.recheck_by(now_ms + OFFER_TTL_MS);
        }
    }

    /// Lets `exchange` look again at this time at the latest.
    pub fn recheck_by(&mut self, at_ms: u64) {
        self.recheck_ms = Some(self.recheck_ms.map_or(at_ms, |at| at.min(at_ms)));
    }

    /// Returns whether each of this number of pools has a process that serves, and whether there is a jobs process if
    /// one is configured.
    pub fn has_all_pools(&self, pools: usize) -> bool {
        let (records, generation) = (self.records, self.generation);
        let jobs = self.pools.jobs.lane.map(|lane| self.pools.jobs.shown(lane));
        has_all_pools(records, generation, &self.pools.kept_lanes, pools)
            && jobs.is_none_or(|shown| is_lane_served(records, generation, shown as usize))
    }

    /// Returns the other workers of this generation that serve. A worker whose event loop has not run recently is
    /// left out.
    pub fn other_workers(&self, now_ms: u64) -> impl Iterator<Item = &WorkerRecord> {
        used(self.records).filter_map(move |(index, record)| {
            let is_worker = index != self.own && record.lane.load(Relaxed) == 0;
            let is_same = record.generation.load(Relaxed) == self.generation;
            (is_worker && is_same && record.is_fresh(now_ms)).then_some(record)
        })
    }

    /// Returns whether this worker has no idle thread and another one has. It checks only once per `ACCEPT_LOOK_MS`,
    /// because threads that run short calls are alternately idle and busy.
    pub fn should_yield_accepting(&mut self, now_ms: u64) -> bool {
        if self.lane > 0 || self.shown.idle > 0 || now_ms < self.accept_look_ms {
            return false;
        }
        self.accept_look_ms = now_ms + ACCEPT_LOOK_MS;
        (self.other_workers(now_ms)).any(|record| record.idle.load(Relaxed) > 0)
    }

    /// If all threads of this worker are busy, requests links to workers with capacity before a call waits for one.
    pub fn prepare_links(&mut self, now_ms: u64) {
        if self.lane == 0 && now_ms >= self.prepare_ms {
            self.prepare_ms = now_ms + ASK_AGAIN_MS;
            self.want_links(now_ms, |record| {
                record.lane.load(Relaxed) == 0 && record.idle.load(Relaxed) > 0
            });
        }
    }

    /// Asks the master for links to the `useful` processes without one.
    pub fn want_links(&mut self, now_ms: u64, useful: impl Fn(&WorkerRecord) -> bool) {
        let seeker = LinkSeeker {
            own: self.own,
            lane: self.lane,
            generation: self.generation,
            is_session: self.is_session,
        };
        (self.requests).want(self.records, &seeker, &self.peers, now_ms, useful);
    }

    /// Returns the records for which the master must be asked, once.
    pub fn take_wanted(&mut self) -> Vec<u32> {
        self.requests.take()
    }

    /// Adds a link that the master has made; `pool` as in `Peer::new`. Returns the number of the link.
    pub fn add(&mut self, record: u32, fd: OwnedFd, pool: Option<(usize, u32)>) -> Option<usize> {
        let index = record as usize;
        let record = session_memory::shown(self.records, self.sessions, index)?;
        self.requests.made(index);
        if self.peers.vacant_key() >= usize::from(u16::MAX - LINK_BASE) {
            return None;
        }
        Some(self.peers.insert(Peer::new(record, index, fd, pool)))
    }

    /// Adds a link between a worker and a pool process, or to the jobs process. Returns the number of the link.
    pub fn add_pool(&mut self, ends: PoolLink, fd: OwnedFd) -> Option<usize> {
        let lane = self.pools.jobs.of_order(ends.lane)?;
        let link = self.add(ends.record.into(), fd, Some((lane, ends.generation.0)))?;
        self.peers[link].is_jobs_process = ends.lane == JOBS_LANE;
        Some(link)
    }

    /// Returns whether a process has a link to this pool process, apart from the jobs process.
    pub fn has_users(&self) -> bool {
        (self.peers.iter()).any(|(_, peer)| !peer.is_jobs_process)
    }

    /// In a pool process, adds a link to a session, which the master has made. It replaces links to that session that
    /// run no call. A session has two links at most, because an untrusted session could ask for new ones endlessly.
    pub fn add_session(&mut self, link: SessionLink, fd: OwnedFd, reactor: &mut Reactor) {
        let session = link.session as usize;
        let index = session_memory::link_index(session);
        let links = self.peers.iter().filter(|(_, it)| it.record_index == index);
        let links: Vec<_> = links
            .map(|(key, it)| (key, it.running.is_empty()))
            .collect();
        let mut count = links.len();
        for (key, _) in links.iter().filter(|(_, is_idle)| *is_idle) {
            // A call may be on its way over the newest link.
            if count >= 2 {
                self.remove(*key, reactor);
                count -= 1;
            }
        }
        if let Some(record) = self.sessions.get(session).filter(|_| count < 2) {
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

    /// Queues a call for another process. `job` is its method if that is one of jobs.
    pub fn send(
        &mut self,
        to: RemoteCall,
        origin: CallOrigin,
        call: &HandlerCall,
        job: Option<JobMethod>,
    ) -> bool {
        let Some(peer) = self.peers.get_mut(to.link) else {
            return false;
        };
        let sent = (to.number, call.key);
        let form = match job {
            Some(job) => {
                let first_id = self.pools.jobs.send(sent, job, origin.read_ns / 1_000_000);
                (job.frame_number(), first_id)
            }
            None => (call.method as u32, call.id.as_deref()),
        };
        let is_queued = peer.send((self.own_pid, origin), call, form);
        if is_queued {
            let forwarded = &self.own_record.forwarded;
            forwarded.store(forwarded.load(Relaxed) + 1, Relaxed);
        }
        is_queued
    }

    /// Cancels a sent call whose caller does not wait any more.
    pub fn cancel(&mut self, call: RemoteCall) {
        self.pools.jobs.forget(call.number);
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

    pub fn answer(&mut self, link: usize, answer: AnswerFrame<'_>) {
        if let Some(peer) = self.peers.get_mut(link) {
            peer.answer(self.own_pid, answer);
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
            if peer.leave == LeaveState::NotSent {
                peer.leave = LeaveState::Sent;
                peer.link.queue(&Frame::Leave);
                // Only the first time counts: a process that is stopped while sending must not delay this
                // exit.
                self.leave_by_ms.get_or_insert(now_ms + LEAVE_TTL_MS);
            }
        }
        if !self.is_settled(now_ms)
            && let Some(at) = self.leave_by_ms.filter(|at| *at > now_ms)
        {
            self.recheck_by(at);
        }
    }

    /// Returns whether this process may exit: all is sent, and no call is in transit.
    pub fn is_settled(&self, now_ms: u64) -> bool {
        let is_noted = |peer: &Peer| peer.leave != LeaveState::Sent;
        let is_over = self.leave_by_ms.is_some_and(|at| at <= now_ms);
        (self.peers.iter()).all(|(_, peer)| !peer.link.has_unsent() && (is_over || is_noted(peer)))
    }

    pub fn running_for_others(&self) -> usize {
        self.peers.iter().map(|(_, peer)| peer.running.len()).sum()
    }

    /// Sends queued frames, and watches the links for the needed events.
    pub fn settle(&mut self, reactor: &mut Reactor) {
        for (key, peer) in &mut self.peers {
            peer.settle(LINK_BASE + key as u16, reactor);
        }
    }

    /// Removes a link that has ended.
    pub fn remove(&mut self, link: usize, reactor: &mut Reactor) -> Option<Peer> {
        let peer = self.peers.try_remove(link)?;
        reactor.unwatch(LINK_BASE + link as u16);
        Some(peer)
    }
}
