//! The handler threads of a worker: they run one call after the other and wake the loop. Beside them
//! the programs of pools, which take calls in the same way.
//!
//! What waits for a thread, and which goes first, is decided by `calls`; here is only a short
//! queue that keeps threads from standing idle in between. A panic in a handler is an answer.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::posts::Posts;
use crate::handler::job::Reports;
pub use crate::handler::job::{Done, Job};
use crate::handler::pool::Pools;
use crate::handler::registry::Registry;
use crate::handler::{Context, guard};
use crate::protocol::rpc_error::RpcError;
use crate::sys::waker::Waker;

/// Stack of a handler thread, the same as std's default: deep enough for serde_json's own limit.
const STACK: usize = 2 * 1024 * 1024;

/// The threads.
#[derive(Debug)]
pub struct Threads {
    jobs: Sender<Job>,
    done: Receiver<Done>,
    count: usize,
    pools: Pools,
    /// Which thread runs what.
    pub(super) posts: Arc<Posts>,
}

impl Threads {
    /// Starts `count` threads, or as many as the system gives.
    ///
    /// # Errors
    /// When it gives none at all.
    pub fn start(
        count: usize,
        slot: u16,
        registry: &Arc<Registry>,
        waker: &Arc<Waker>,
    ) -> io::Result<Self> {
        let (jobs, to_do) = unbounded::<Job>();
        let (sender, done) = unbounded();
        let reports = Reports::new(sender, Arc::clone(waker));
        let posts = Arc::new(Posts::new(count));
        let mut started = 0;
        for number in 0..count {
            let (to_do, reports) = (to_do.clone(), reports.clone());
            let (registry, posts) = (Arc::clone(registry), Arc::clone(&posts));
            let body = move || {
                posts.arrive(number);
                for job in to_do {
                    posts.take_on(number, job.key.serial);
                    let begun = Instant::now();
                    let outcome = job.state.begin().then(|| run(&job, slot, &registry));
                    let done = Done {
                        key: job.key,
                        outcome,
                        took: begun.elapsed(),
                        out: None,
                    };
                    if !reports.send(done) {
                        return;
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
            jobs,
            done,
            count: started,
            pools: Pools::start(registry, &reports, waker)?,
            posts,
        })
    }

    /// How many serve a lane: handler threads, or programs of a pool.
    pub fn count(&self, lane: usize) -> usize {
        match lane.checked_sub(1) {
            None => self.count,
            Some(pool) => self.pools.count(pool),
        }
    }

    /// Hands a job over to a lane.
    pub fn run(&self, lane: usize, job: Job) {
        match lane.checked_sub(1) {
            None => self
                .jobs
                .send(job)
                .expect("the threads live as long as the worker"),
            Some(pool) => self.pools.put(pool, job),
        }
    }

    /// The programs of all pools.
    pub fn pools(&self) -> &Pools {
        &self.pools
    }

    /// Takes what is done, without waiting.
    pub fn take_done(&self) -> impl Iterator<Item = Done> {
        self.done.try_iter()
    }
}

fn run(job: &Job, slot: u16, registry: &Registry) -> Result<Vec<u8>, RpcError> {
    let method = &registry.methods()[job.method];
    let context = Context::on_thread(&method.name, slot, job.deadline, &job.state)
        .with((job.id.as_deref(), job.peer), registry.worker());
    let mut result = Vec::new();
    let call = || method.handler.call(&job.params, &context, &mut result);
    guard::run(&method.name, call)?;
    Ok(result)
}
