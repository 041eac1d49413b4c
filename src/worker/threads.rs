//! The handler threads of a worker: they run one call after the other and wake the loop. Beside them
//! the programs of pools, which take calls in the same way.
//!
//! What waits for a thread, and which goes first, is decided by `calls`; `shelf` is a short queue that
//! keeps threads from standing idle in between. Of calls that take microseconds the loop hears of
//! a handful at once. A panic in a handler is an answer.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, unbounded};

use super::posts::Posts;
use super::shelf::Shelf;
use crate::handler::call_state::Reports;
pub use crate::handler::call_state::{Done, HandlerCall};
use crate::handler::pool::Pools;
use crate::handler::registry::Registry;
use crate::handler::{Context, guard};
use crate::protocol::rpc_error::RpcError;
use crate::sys::signal;
use crate::sys::waker::Waker;

/// Stack of a handler thread, the same as std's default: deep enough for serde_json's own limit.
const STACK: usize = 2 * 1024 * 1024;

/// The loop hears of what is done after so much work at the latest.
const UNTOLD: Duration = Duration::from_micros(100);

#[derive(Debug)]
pub struct Threads {
    /// Calls that were handed out and that no thread has taken.
    ahead: Arc<Shelf>,
    done: Receiver<Done>,
    count: usize,
    pools: Pools,
    /// The lane whose calls run in this process: that of the threads, or of one pool.
    lane: usize,
    registry: Arc<Registry>,
    /// Which thread runs what.
    pub(super) posts: Arc<Posts>,
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
        let shelf = Arc::new(Shelf::default());
        let (sender, done) = unbounded();
        let reports = Reports::new(sender, Arc::clone(waker));
        let posts = Arc::new(Posts::new(count));
        let mut started = 0;
        let count = if pool.is_some() { 0 } else { count };
        for number in 0..count {
            let (shelf, reports) = (Arc::clone(&shelf), reports.clone());
            let (registry, posts) = (Arc::clone(registry), Arc::clone(&posts));
            let body = move || {
                posts.arrive(number);
                let (mut untold, mut brisk) = (Duration::ZERO, false);
                loop {
                    let job;
                    (job, brisk) = shelf.take(brisk);
                    posts.take_on(number, job.key.serial);
                    let begun = Instant::now();
                    signal::set_current_call(job.state.key());
                    let outcome = job.state.begin().then(|| run(&job, slot, &registry));
                    let took = begun.elapsed();
                    signal::set_current_call(0);
                    let done = Done {
                        key: job.key,
                        outcome,
                        took,
                        out: None,
                    };
                    if !reports.leave(done) {
                        return;
                    }
                    untold += took;
                    // While jobs lie there, the loop looks by itself now and then.
                    if !brisk || untold >= UNTOLD || !shelf.goes_on() {
                        untold = Duration::ZERO;
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
            ahead: shelf,
            done,
            count: started,
            pools: Pools::start(registry, pool, &reports, waker)?,
            lane: pool.map_or(0, |pool| pool + 1),
            registry: Arc::clone(registry),
            posts,
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

    /// Hands a job over to a lane; `ring` is to follow.
    pub fn run(&mut self, lane: usize, job: HandlerCall) {
        match lane {
            0 => self.ahead.put(job),
            _ => self.pools.put(0, job),
        }
    }

    /// Wakes whom the jobs need that were handed over.
    pub fn ring(&self) {
        self.ahead.ring();
    }

    /// Sees to it that no job lies there for want of a thread; tells whether any lies there, or any
    /// was done that the loop was not woken for: it is to look again soon.
    pub fn look(&self, now_ms: u64) -> bool {
        self.ahead.look(now_ms) || self.has_done()
    }

    /// Whether what is handed out ahead in a lane would wait behind calls that take long.
    pub fn is_blocked(&self, lane: usize) -> bool {
        lane == 0 && self.ahead.is_blocked()
    }

    /// Takes back what was handed out ahead and waits behind calls that take long.
    pub fn take_back_ahead(&self) -> Vec<HandlerCall> {
        match self.ahead.is_blocked() {
            true => self.ahead.take_back(),
            false => Vec::new(),
        }
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
