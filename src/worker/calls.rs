//! The calls of a worker that are for its handler threads: which wait, which run, which are over.
//!
//! The loop decides alone; threads only get what is handed to them. A few more calls than there
//! are threads are handed out, so that none stands idle while the loop is busy. An entry lives
//! until its thread has reported, also when the caller was answered long before.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use slab::Slab;

use super::connection::{HIGH_WATER, Place, Reply};
use super::threads::{Done, Job, Threads};
use super::timers::CallKey;
use crate::handler::CallState;
use crate::handler::registry::Registry;
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

/// A method's calls of late.
#[derive(Debug, Clone, Default)]
struct Load {
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
    queue: VecDeque<CallKey>,
    /// Taken out of the queue because their connection has answers enough to send, until that
    /// changes; in their order.
    parked: HashMap<Token, Vec<CallKey>>,
    /// Those handed out, oldest first; ones that are done are skipped.
    handed_out: VecDeque<CallKey>,
    loads: Vec<Load>,
    registry: Arc<Registry>,
    limit: usize,
    serial: u64,
    /// Entries that wait in `queue` or at the threads, to be answered.
    waiting: usize,
    /// Entries with the threads.
    out: usize,
    /// Of those, the ones that run and that nobody waits for.
    lost: usize,
    /// Bytes of params and ids, of all entries.
    bytes: usize,
}

impl Calls {
    /// An empty table that lets `limit` calls wait.
    pub fn new(registry: Arc<Registry>, limit: usize) -> Self {
        Calls {
            table: Slab::new(),
            queue: VecDeque::new(),
            parked: HashMap::new(),
            handed_out: VecDeque::new(),
            loads: vec![Load::default(); registry.methods().len()],
            registry,
            limit,
            serial: 0,
            waiting: 0,
            out: 0,
            lost: 0,
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

    /// Whether there is room for one more call of a method to wait.
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
        let begin = threads.saturating_sub(self.lost);
        if self.waiting >= self.limit + begin {
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
        self.queue.push_back(key);
        self.waiting += 1;
        self.loads[method].current += 1;
        key
    }

    /// Hands waiting calls to the threads, as long as one of them could soon be idle. `backlog`
    /// tells how many bytes of answers a connection has yet to send before such a call's.
    pub fn hand_out(&mut self, threads: &Threads, backlog: impl Fn(Token, Place) -> usize) {
        while self.out < threads.count() * 2
            && let Some(key) = self.queue.pop_front()
        {
            // One that was given up while it waited left its key behind.
            let Some(call) = self
                .table
                .get(key.index)
                .filter(|it| it.serial == key.serial)
            else {
                continue;
            };
            if !self.fits(call, backlog(call.token, call.reply.place), threads.count()) {
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
            self.out += 1;
            self.handed_out.push_back(key);
            threads.run(job);
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
        let running = self
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
            self.queue.push_front(key);
        }
    }

    /// A thread has reported: the call that is to be answered now, if anybody still waits.
    pub fn done(&mut self, done: &Done) -> Option<Ended> {
        let call = self.table.remove(done.key.index);
        debug_assert_eq!(call.serial, done.key.serial);
        self.out -= 1;
        self.lost -= usize::from(call.lost);
        self.bytes -= call.size;
        let load = &mut self.loads[call.method];
        load.current -= 1;
        if let Some(Ok(result)) = &done.outcome {
            load.last_result = result.len();
        }
        while let Some(&key) = self.handed_out.front()
            && self.get_mut(key).is_none()
        {
            self.handed_out.pop_front();
        }
        self.tidy();
        if call.over {
            return None;
        }
        self.waiting -= 1;
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
        self.waiting -= 1;
        if call_is_out(&self.table, key) {
            // It lives on until its thread reports.
            self.lost += usize::from(begun);
        } else {
            self.table.remove(key.index);
            self.bytes -= ended.size;
            self.loads[ended.method].current -= 1;
            self.tidy();
        }
        Some(ended)
    }

    /// Drops keys whose calls are gone, once they are the most of a queue: behind one call that
    /// never ends they would pile up for as long as the worker lives.
    fn tidy(&mut self) {
        let table = &self.table;
        let lives = |key: &CallKey| {
            let call = table.get(key.index);
            call.is_some_and(|call| call.serial == key.serial)
        };
        for queue in [&mut self.queue, &mut self.handed_out] {
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
        self.waiting == 0
    }

    /// How many run on a thread, wait for one, and run for nobody.
    pub fn counts(&self, threads: usize) -> (usize, usize, usize) {
        let wanted_out = self.out - self.lost;
        let running = wanted_out
            .min(threads.saturating_sub(self.lost))
            .min(self.waiting);
        (running, self.waiting - running, self.lost)
    }

    /// The method of the call that is the longest with the threads, and when it was read.
    pub fn oldest(&self) -> Option<(usize, u64)> {
        let key = self.handed_out.front()?;
        let call = self
            .table
            .get(key.index)
            .filter(|call| call.serial == key.serial)?;
        Some((call.method, call.read_ms))
    }
}

fn call_is_out(table: &Slab<Call>, key: CallKey) -> bool {
    table.get(key.index).is_some_and(|call| call.handed_out)
}

#[cfg(test)]
#[path = "calls_tests.rs"]
mod tests;
