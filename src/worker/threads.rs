//! The handler threads of a worker: they run one call after the other and wake the event loop. Beside them
//! the programs of pools, in a pool process.
//!
//! Threads take their calls from a `RunQueue`. Of calls that take microseconds the event loop hears of
//! several at once. A panic in a handler is an answer.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, unbounded};

use super::run_queue::{NextCall, RunQueue};
use super::thread_calls::ThreadCalls;
use crate::handler::call_state::Reports;
pub use crate::handler::call_state::{Done, HandlerCall};
use crate::handler::pool::Pools;
use crate::handler::registry::Registry;
use crate::handler::{Context, guard};
use crate::protocol::rpc_error::RpcError;
use crate::sys::process::monotonic;
use crate::sys::signal;
use crate::sys::waker::Waker;

/// Stack of a handler thread, the same as std's default: deep enough for serde_json's own limit.
const STACK: usize = 2 * 1024 * 1024;

/// After this much work the event loop is woken for what is done.
const MAX_UNREPORTED: Duration = Duration::from_micros(100);

#[derive(Debug)]
pub struct Threads {
    /// Where the threads take their calls from.
    pub queue: Arc<RunQueue>,
    done: Receiver<Done>,
    count: usize,
    pools: Pools,
    /// The lane whose calls run in this process: that of the threads, or of one pool.
    lane: usize,
    registry: Arc<Registry>,
    /// Which thread runs what.
    pub calls: Arc<ThreadCalls>,
}

impl Threads {
    /// Starts `count` threads, or as many as the system gives; with the number of a pool, its programs
    /// instead.
    ///
    /// # Errors
    /// When it gives none at all.
    pub fn start(
        count: usize,
        pool: Option<usize>,
        slot: u16,
        registry: &Arc<Registry>,
        waker: &Arc<Waker>,
    ) -> io::Result<Self> {
        let queue = Arc::new(RunQueue::new(registry.methods().len()));
        let (sender, done) = unbounded();
        let reports = Reports::new(sender, Arc::clone(waker));
        let calls = Arc::new(ThreadCalls::new(count));
        let mut started = 0;
        let count = if pool.is_some() { 0 } else { count };
        for number in 0..count {
            let (queue, reports) = (Arc::clone(&queue), reports.clone());
            let (registry, calls) = (Arc::clone(registry), Arc::clone(&calls));
            let body = move || {
                calls.register(number);
                let (mut unreported, mut was_short) = (Duration::ZERO, false);
                loop {
                    let NextCall {
                        call,
                        begins,
                        is_short,
                        begun,
                    } = queue.take(was_short);
                    was_short = is_short;
                    calls.set(number, call.key);
                    signal::set_current_call(call.state.key());
                    let outcome = begins.then(|| run(&call, slot, &registry));
                    let took = monotonic().saturating_sub(begun);
                    signal::set_current_call(0);
                    let done = Done {
                        key: call.key,
                        outcome,
                        took,
                        out: None,
                    };
                    if !reports.leave(done) {
                        return;
                    }
                    unreported += took;
                    // While calls wait, the event loop looks by itself now and then.
                    if !is_short || unreported >= MAX_UNREPORTED || !queue.goes_on() {
                        unreported = Duration::ZERO;
                        reports.wake();
                    }
                }
            };
            let name = format!("handler-{number}");
            // Not thread::spawn, which panics when there is no thread to be had.
            match thread::Builder::new()
                .name(name)
                .stack_size(STACK)
                .spawn(body)
            {
                Ok(_) => started += 1,
                Err(error) if started == 0 => return Err(error),
                Err(error) => {
                    log::warn!(
                        "only {started} of {count} handler threads could be started, so fewer \
                         calls run at once; raise the limit of tasks, or lower workers.threads: \
                         {error}"
                    );
                    break;
                }
            }
        }
        Ok(Threads {
            queue,
            done,
            count: started,
            pools: Pools::start(registry, pool, &reports, waker)?,
            lane: pool.map_or(0, |pool| pool + 1),
            registry: Arc::clone(registry),
            calls,
        })
    }

    /// How many serve a lane in this process: handler threads, or programs of a pool.
    pub fn count(&self, lane: usize) -> usize {
        match self.lane == lane {
            true => self.crew(lane),
            false => 0,
        }
    }

    /// How many serve a lane: the handler threads of this worker, or all programs of a pool.
    pub fn crew(&self, lane: usize) -> usize {
        match lane.checked_sub(1) {
            None => self.count,
            Some(pool) => (self.registry.pools().get(pool)).map_or(0, |pool| pool.capacity()),
        }
    }

    /// How many of those in this process are there for calls; a program that starts or waits until it
    /// may is not.
    pub fn available(&self, lane: usize) -> usize {
        match lane {
            _ if lane != self.lane => 0,
            0 => self.count,
            _ => self.pools.available(0),
        }
    }

    /// Whether the programs of the pool may have several calls at once.
    pub fn has_parallel_programs(&self) -> bool {
        self.pools.concurrency() > 1
    }

    /// Sees to it that no call waits for want of a thread. Returns whether any waits, or any was done that
    /// the event loop was not woken for: it is to look again soon.
    pub fn look(&self, now_ms: u64) -> bool {
        self.queue.look(now_ms) || self.has_done()
    }

    /// Whether any job is done that was not taken.
    pub fn has_done(&self) -> bool {
        !self.done.is_empty() || self.pools.has_done()
    }

    /// How many programs of all pools do not serve.
    pub fn programs_down(&self) -> usize {
        self.pools.down()
    }

    pub fn pools(&mut self) -> &mut Pools {
        &mut self.pools
    }

    pub fn take_done(&mut self) -> impl Iterator<Item = Done> {
        let mut done = Vec::new();
        self.pools.take_done(&mut done);
        self.done.try_iter().chain(done)
    }
}

fn run(job: &HandlerCall, slot: u16, registry: &Registry) -> Result<Vec<u8>, RpcError> {
    let method = &registry.methods()[job.method];
    let context = Context::on_thread(&method.name, slot, job.deadline, &job.state)
        .with((job.id.as_deref(), job.peer), registry.worker());
    let mut result = Vec::new();
    let call = || method.handler.call(&job.params, &context, &mut result);
    guard::run((&method.name, job.id.as_deref()), call)?;
    Ok(result)
}
