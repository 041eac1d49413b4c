//! The calls of a worker that are for its threads: which wait, which run, which are over.
//!
//! The loop decides alone; threads only get what is handed to them. A few more calls than there
//! are threads are handed out, so that none stands idle while the loop is busy. An entry lives
//! until its thread has reported, also when the caller was answered long before. The handler
//! threads and each pool have a lane of their own: what fills one keeps nobody waiting in another.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use slab::Slab;

use super::connection::{HIGH_WATER, Place, Reply};
use super::threads::{Done, Job, Threads};
use super::timers::CallKey;
use crate::handler::CallState;
use crate::handler::registry::{Method, Registry};
use crate::protocol::code::Code;
use crate::protocol::rpc_error::RpcError;
use crate::sys::event::Token;

/// A result from here up counts as large: how many of its like run for one connection is limited.
const LARGE: usize = 16 * 1024;

/// Bytes of params that may wait or run in a worker, of all its connections together.
const MOST_BYTES: usize = 64 * 1024 * 1024;

/// A call that waits or runs.
#[derive(Debug)]
pub struct Call {
    /// Whose it is.
    pub token: Token,
    /// Where its answer goes, and how it looks there.
    pub reply: Reply,
    /// Its id, as JSON.
    pub id: Option<Box<str>>,
    /// The number of its method.
    pub method: usize,
    /// When it was read, in milliseconds.
    pub read_ms: u64,
    /// When it must be answered, in milliseconds.
    pub deadline_ms: u64,
    /// Its armed timer; `Timers::arm` keeps it.
    pub timer: u64,
    /// Bytes of its params and id.
    size: usize,
    /// What it asks for; `None` once it was handed out or is over.
    params: Option<Box<str>>,
    state: Arc<CallState>,
    serial: u64,
    handed_out: bool,
    /// Nobody waits for its answer any more.
    over: bool,
    /// It runs for nobody: its thread is lost until it reports.
    lost: bool,
}

impl Call {
    /// Whether a thread runs it.
    pub fn is_running(&self) -> bool {
        self.state.is_running()
    }
}

/// A call that is to be answered now.
#[derive(Debug)]
pub struct Ended {
    /// Whose it is.
    pub token: Token,
    /// Where its answer goes, and how it looks there.
    pub reply: Reply,
    /// Its id, as JSON.
    pub id: Option<Box<str>>,
    /// The number of its method.
    pub method: usize,
    /// Its timer, to be disarmed.
    pub timer: u64,
    /// Bytes of its params and id.
    pub size: usize,
    /// Whether it had begun.
    pub begun: bool,
}

/// The calls that one crew of threads serves: the handler threads, or those of a pool.
#[derive(Debug, Default)]
struct Lane {
    queue: VecDeque<CallKey>,
    /// Those handed out, oldest first; ones that are done are skipped.
    handed_out: VecDeque<CallKey>,
    /// Entries that wait in `queue` or at the threads, to be answered.
    waiting: usize,
    /// Entries with the threads.
    out: usize,
    /// Of those, the ones that run and that nobody waits for.
    lost: usize,
}

/// A method's calls of late.
#[derive(Debug, Clone, Default)]
struct Load {
    /// Where its calls wait and run.
    lane: usize,
    /// Waiting and running ones.
    current: usize,
    /// Calls that the rate still allows, in thousandths.
    credit: u64,
    credited_ms: u64,
    /// Bytes of its last result: what the next one is expected to be.
    last_result: usize,
}

/// The table of calls.
#[derive(Debug)]
pub struct Calls {
    table: Slab<Call>,
    /// By `Load::lane`: each has its own queue, its own limit and its own threads.
    lanes: Vec<Lane>,
    /// Taken out of the queue because their connection has answers enough to send, until that
    /// changes; in their order.
    parked: HashMap<Token, Vec<CallKey>>,
    loads: Vec<Load>,
    registry: Arc<Registry>,
    limit: usize,
    serial: u64,
    /// Bytes of params and ids, of all entries.
    bytes: usize,
}

impl Calls {
    /// An empty table that lets `limit` calls wait in each lane.
    pub fn new(registry: Arc<Registry>, limit: usize) -> Self {
        let load = |method: &Method| Load {
            lane: method.handler.placement().lane(),
            ..Load::default()
        };
        let loads: Vec<Load> = registry.methods().iter().map(load).collect();
        let last = loads.iter().map(|load| load.lane).max().unwrap_or(0);
        Calls {
            table: Slab::new(),
            lanes: (0..=last).map(|_| Lane::default()).collect(),
            parked: HashMap::new(),
            loads,
            registry,
            limit,
            serial: 0,
            bytes: 0,
        }
    }

    /// Whether the rate of a method allows one more call now; counts it.
    ///
    /// # Errors
    /// `overloaded`.
    pub fn admit(&mut self, method: usize, now_ms: u64) -> Result<(), RpcError> {
        let rate = u64::from(self.registry.methods()[method].rate);
        if rate == 0 {
            return Ok(());
        }
        let load = &mut self.loads[method];
        // Thousandths a millisecond are calls a second; a second's worth can be saved up.
        let earned = now_ms.saturating_sub(load.credited_ms).saturating_mul(rate);
        load.credit = load.credit.saturating_add(earned).min(rate * 1000);
        load.credited_ms = now_ms;
        if load.credit < 1000 {
            return Err(self.overloaded(method, format!("its rate of {rate} calls a second")));
        }
        load.credit -= 1000;
        Ok(())
    }

    /// The lane of a method's calls.
    pub fn lane(&self, method: usize) -> usize {
        self.loads[method].lane
    }

    fn lane_of(&mut self, method: usize) -> &mut Lane {
        &mut self.lanes[self.loads[method].lane]
    }

    /// Whether there is room for one more call of a method to wait, with so many threads in its
    /// lane.
    ///
    /// # Errors
    /// `overloaded`.
    pub fn has_room(&self, method: usize, size: usize, threads: usize) -> Result<(), RpcError> {
        let concurrency = self.registry.methods()[method].concurrency;
        if concurrency > 0 && self.loads[method].current >= concurrency {
            let reason = format!("its concurrency of {concurrency} in this worker");
            return Err(self.overloaded(method, reason));
        }
        // Those that run, and those that will begin at once, do not wait.
        let lane = &self.lanes[self.loads[method].lane];
        let begin = threads.saturating_sub(lane.lost);
        if lane.waiting >= self.limit + begin {
            let reason = format!("the {} calls that may wait for a thread", self.limit);
            return Err(self.overloaded(method, reason));
        }
        // One of any size is taken where there is no other.
        if self.bytes > 0 && self.bytes.saturating_add(size) > MOST_BYTES {
            let reason = format!("the {} MiB of params that may wait", MOST_BYTES >> 20);
            return Err(self.overloaded(method, reason));
        }
        Ok(())
    }

    fn overloaded(&self, method: usize, limit: String) -> RpcError {
        let name = self.registry.name(method);
        let text = format!("{name} is refused: {limit} are reached; try again later");
        RpcError::of(Code::Overloaded, text, false)
    }

    /// Lets a call wait.
    pub fn add(
        &mut self,
        (token, reply, id): (Token, Reply, Option<&str>),
        (method, params): (usize, &str),
        (read_ms, deadline_ms): (u64, u64),
    ) -> CallKey {
        self.serial += 1;
        let serial = self.serial;
        let index = self.table.insert(Call {
            token,
            reply,
            id: id.map(Box::from),
            method,
            read_ms,
            deadline_ms,
            timer: 0,
            size: params.len() + id.map_or(0, str::len),
            params: Some(params.into()),
            state: Arc::default(),
            serial,
            handed_out: false,
            over: false,
            lost: false,
        });
        self.bytes += self.table[index].size;
        let key = CallKey { index, serial };
        let lane = self.lane_of(method);
        lane.queue.push_back(key);
        lane.waiting += 1;
        self.loads[method].current += 1;
        key
    }

    /// Hands waiting calls to the threads, as long as one of them could soon be idle. `backlog`
    /// tells how many bytes of answers a connection has yet to send before such a call's.
    pub fn hand_out(&mut self, threads: &Threads, backlog: impl Fn(Token, Place) -> usize) {
        for lane in 0..self.lanes.len() {
            self.hand_out_lane(lane, threads, &backlog);
        }
    }

    fn hand_out_lane(
        &mut self,
        lane: usize,
        threads: &Threads,
        backlog: &impl Fn(Token, Place) -> usize,
    ) {
        let count = threads.count(lane);
        while self.lanes[lane].out < count * 2
            && let Some(key) = self.lanes[lane].queue.pop_front()
        {
            // One that was given up while it waited left its key behind.
            let Some(call) = self
                .table
                .get(key.index)
                .filter(|it| it.serial == key.serial)
            else {
                continue;
            };
            if !self.fits(call, backlog(call.token, call.reply.place), count) {
                let token = call.token;
                self.parked.entry(token).or_default().push(key);
                continue;
            }
            let Some(call) = self.get_mut(key) else {
                continue;
            };
            let Some(params) = call.params.take() else {
                continue;
            };
            call.handed_out = true;
            let job = Job {
                key,
                method: call.method,
                params,
                deadline: Duration::from_millis(call.deadline_ms),
                state: Arc::clone(&call.state),
            };
            self.lanes[lane].out += 1;
            self.lanes[lane].handed_out.push_back(key);
            threads.run(lane, job);
        }
    }

    /// Whether a call's answer will find room: a client that never reads must not fill the memory
    /// with answers to what it sent ahead. A result's size is known once it is there, so the last
    /// one of its method speaks for it. While the client takes all it gets, each thread may work
    /// for it; once it lags, no more than what a few answers take.
    fn fits(&self, call: &Call, backlog: usize, threads: usize) -> bool {
        if backlog >= HIGH_WATER {
            return false;
        }
        let expected = self.loads[call.method].last_result;
        if expected < LARGE {
            return true;
        }
        let running = self.lanes[self.loads[call.method].lane]
            .handed_out
            .iter()
            .filter_map(|key| Some((key, self.table.get(key.index)?)))
            .filter(|(key, it)| it.serial == key.serial && !it.over && it.token == call.token)
            .count();
        match running {
            0 => true,
            _ if backlog == 0 => running < threads,
            _ => backlog + (running + 1) * expected <= 3 * HIGH_WATER,
        }
    }

    /// Whether calls of any connection are held back.
    pub fn are_parked(&self) -> bool {
        !self.parked.is_empty()
    }

    /// A connection may have room again: its calls stand before those that came later.
    pub fn unpark(&mut self, token: Token) {
        for key in self.parked.remove(&token).into_iter().flatten().rev() {
            // Of one that is over, nothing is left to say where it belonged.
            if let Some(method) = self.get_mut(key).map(|call| call.method) {
                self.lane_of(method).queue.push_front(key);
            }
        }
    }

    /// A thread has reported: the call that is to be answered now, if anybody still waits.
    pub fn done(&mut self, done: &Done) -> Option<Ended> {
        let call = self.table.remove(done.key.index);
        debug_assert_eq!(call.serial, done.key.serial);
        let index = self.loads[call.method].lane;
        let lane = &mut self.lanes[index];
        lane.out -= 1;
        lane.lost -= usize::from(call.lost);
        lane.waiting -= usize::from(!call.over);
        self.bytes -= call.size;
        let load = &mut self.loads[call.method];
        load.current -= 1;
        if let Some(Ok(result)) = &done.outcome {
            load.last_result = result.len();
        }
        while let Some(&key) = self.lanes[index].handed_out.front()
            && self.get_mut(key).is_none()
        {
            self.lanes[index].handed_out.pop_front();
        }
        self.tidy(index);
        if call.over {
            return None;
        }
        Some(Ended {
            token: call.token,
            reply: call.reply,
            id: call.id,
            method: call.method,
            timer: call.timer,
            size: call.size,
            begun: true,
        })
    }

    /// Gives a call up: its time is over, or the caller does not want it any more. `None` when it
    /// is over already.
    pub fn give_up(&mut self, key: CallKey) -> Option<Ended> {
        let call = self.get_mut(key)?;
        if call.over {
            return None;
        }
        call.over = true;
        let begun = call.state.give_up();
        let ended = Ended {
            token: call.token,
            reply: call.reply,
            id: call.id.take(),
            method: call.method,
            timer: std::mem::take(&mut call.timer),
            size: call.size,
            begun,
        };
        call.params = None;
        call.lost = begun;
        let index = self.loads[ended.method].lane;
        self.lanes[index].waiting -= 1;
        if call_is_out(&self.table, key) {
            // It lives on until its thread reports.
            self.lanes[index].lost += usize::from(begun);
        } else {
            self.table.remove(key.index);
            self.bytes -= ended.size;
            self.loads[ended.method].current -= 1;
            self.tidy(index);
        }
        Some(ended)
    }

    /// Drops keys whose calls are gone, once they are the most of a queue: behind one call that
    /// never ends they would pile up for as long as the worker lives.
    fn tidy(&mut self, lane: usize) {
        let table = &self.table;
        let lives = |key: &CallKey| {
            let call = table.get(key.index);
            call.is_some_and(|call| call.serial == key.serial)
        };
        let lane = &mut self.lanes[lane];
        for queue in [&mut lane.queue, &mut lane.handed_out] {
            if queue.len() > 2 * table.len() + 64 {
                queue.retain(lives);
            }
        }
    }

    /// The call of a connection with this id, as JSON.
    pub fn find(&self, token: Token, id: &str) -> Option<CallKey> {
        self.of(|call| call.token == token && call.id.as_deref() == Some(id))
            .next()
    }

    /// All calls that match and are not over.
    pub fn of(&self, matches: impl Fn(&Call) -> bool) -> impl Iterator<Item = CallKey> {
        self.table
            .iter()
            .filter(move |(_, call)| !call.over && matches(call))
            .map(|(index, call)| CallKey {
                index,
                serial: call.serial,
            })
    }

    /// A call, to keep its timer.
    pub fn get_mut(&mut self, key: CallKey) -> Option<&mut Call> {
        self.table
            .get_mut(key.index)
            .filter(|call| call.serial == key.serial)
    }

    /// Whether no call waits or runs.
    pub fn is_empty(&self) -> bool {
        self.lanes.iter().all(|lane| lane.waiting == 0)
    }

    /// How many run on a thread, wait for one, and run for nobody. Of the latter, those of the
    /// handler threads alone: a pool's program is ended then.
    pub fn counts(&self, threads: &Threads) -> (usize, usize, usize) {
        let (mut running, mut queued) = (0, 0);
        for (number, lane) in self.lanes.iter().enumerate() {
            let at_work = (lane.out - lane.lost)
                .min(threads.count(number).saturating_sub(lane.lost))
                .min(lane.waiting);
            running += at_work;
            queued += lane.waiting - at_work;
        }
        (running, queued, self.lanes[0].lost)
    }

    /// The method of the call that is the longest with the threads, and when it was read.
    pub fn oldest(&self) -> Option<(usize, u64)> {
        let oldest = |lane: &Lane| {
            let key = lane.handed_out.front()?;
            let call = self.table.get(key.index);
            let call = call.filter(|call| call.serial == key.serial)?;
            Some((call.method, call.read_ms))
        };
        let lanes = self.lanes.iter().filter_map(oldest);
        lanes.min_by_key(|&(_, read_ms)| read_ms)
    }
}

fn call_is_out(table: &Slab<Call>, key: CallKey) -> bool {
    table.get(key.index).is_some_and(|call| call.handed_out)
}

#[cfg(test)]
#[path = "calls_tests.rs"]
mod tests;
