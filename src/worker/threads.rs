//! Runs the handler threads of a worker: each runs one call after the other and wakes the event loop. A pool process
//! has programs instead of threads.
//!
//! Threads take their calls from a `RunQueue`. They wake the event loop once for several short calls. A panic in a
//! handler is answered as an error.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, unbounded};

use super::crash::call_record::CurrentCall;
use super::run_queue::{NextCall, RunQueue};
use super::thread_calls::ThreadCalls;
use crate::handler::call_state::Reports;
pub use crate::handler::call_state::{Done, HandlerCall};
use crate::handler::pool::process_pools::ProcessPools;
use crate::handler::registry::Registry;
use crate::handler::{Context, guard};
use crate::link::session_table::{SessionRecord, may_warn};
use crate::logging;
use crate::protocol::call_id::CallRunner;
use crate::protocol::rpc_error::RpcError;
use crate::sys::process::{self, monotonic};
use crate::sys::signal;
use crate::sys::waker::Waker;

/// The stack size of a handler thread, the same as std's default: enough for the nesting limit of
/// serde_json.
const STACK: usize = 2 * 1024 * 1024;

/// After this much work the event loop is woken for the results.
const MAX_UNREPORTED: Duration = Duration::from_micros(100);

#[derive(Debug)]
pub struct Threads {
    /// The queue from which the threads take calls.
    pub queue: Arc<RunQueue>,
    done: Receiver<Done>,
    /// How many there are, or will be when calls need them.
    count: usize,
    started: usize,
    /// The records of all sessions of the listener; `Some` only in a session.
    sessions: Option<&'static [SessionRecord]>,
    starter: ThreadStarter,
    pools: ProcessPools,
    /// The lane whose calls run in this process: that of the threads, or of one pool.
    lane: usize,
    registry: Arc<Registry>,
    /// Which thread runs which call.
    pub calls: Arc<ThreadCalls>,
}

/// What each handler thread needs.
#[derive(Debug)]
struct ThreadStarter {
    slot: u16,
    queue: Arc<RunQueue>,
    reports: Reports,
    registry: Arc<Registry>,
    calls: Arc<ThreadCalls>,
    /// Where the threads record what they run, for the keeper; empty without one.
    running: &'static [CurrentCall],
}

impl ThreadStarter {
    /// Starts the thread with this number.
    fn start(&self, number: usize) -> io::Result<()> {
        let (slot, queue, reports) = (self.slot, Arc::clone(&self.queue), self.reports.clone());
        let (registry, calls) = (Arc::clone(&self.registry), Arc::clone(&self.calls));
        let running = self.running.get(number);
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
                if let Some(running) = running.filter(|_| begins) {
                    running.begins(call.state.key(), call.method);
                }
                signal::set_current_call(call.state.key());
                let outcome = begins.then(|| run(&call, slot, &registry));
                let took = monotonic().saturating_sub(begun);
                call.state.set_ended();
                signal::set_current_call(0);
                if let Some(running) = running {
                    running.ends();
                }
                let (program, cpu, max_rss_bytes) = process::take_reaped_use();
                let done = Done {
                    key: call.key,
                    outcome,
                    took,
                    runner: CallRunner {
                        process: 0,
                        program: program.0,
                        cpu,
                        max_rss_bytes,
                    },
                    out: None,
                };
                if !reports.leave(done) {
                    return;
                }
                unreported += took;
                // While calls wait, the event loop checks by itself now and then.
                if !is_short || unreported >= MAX_UNREPORTED || !queue.may_take_more() {
                    unreported = Duration::ZERO;
                    reports.wake();
                }
            }
        };
        // thread::spawn would panic if no thread can be started.
        let builder = thread::Builder::new().name(format!("handler-{number}"));
        // Signals are for the event loop, also if this thread is started late.
        signal::with_signals_blocked(|| builder.stack_size(STACK).spawn(body)).map(drop)
    }
}

impl Threads {
    /// Starts `count` threads, or as many as the system allows. If `pool` is the number of a pool, starts its programs
    /// instead. `sessions` is `Some` in a session: it starts no thread, and `look` starts them when calls need them.
    /// The threads record in `running` what they run, if it is not empty.
    ///
    /// # Errors
    /// If no thread can be started, or no descriptor is left for the programs.
    pub fn start(
        (count, sessions): (usize, Option<&'static [SessionRecord]>),
        pool: Option<usize>,
        (slot, running): (u16, &'static [CurrentCall]),
        registry: &Arc<Registry>,
        waker: &Arc<Waker>,
    ) -> io::Result<Self> {
        let queue = Arc::new(RunQueue::new(registry.methods().len()));
        let (sender, done) = unbounded();
        let reports = Reports::new(sender, Arc::clone(waker));
        let count = if pool.is_some() { 0 } else { count };
        let starter = ThreadStarter {
            slot,
            queue: Arc::clone(&queue),
            reports: reports.clone(),
            registry: Arc::clone(registry),
            calls: Arc::new(ThreadCalls::new(count)),
            running,
        };
        let mut threads = Threads {
            queue,
            done,
            count,
            sessions,
            started: 0,
            pools: ProcessPools::start(registry, pool, &reports, waker)?,
            lane: pool.map_or(0, |pool| pool + 1),
            registry: Arc::clone(registry),
            calls: Arc::clone(&starter.calls),
            starter,
        };
        if sessions.is_none() {
            threads.start_more(count)?;
        }
        Ok(threads)
    }

    /// Starts this number of further threads, or as many as the system allows.
    fn start_more(&mut self, more: usize) -> io::Result<()> {
        for _ in 0..more {
            match self.starter.start(self.started) {
                Ok(()) => self.started += 1,
                Err(error) if self.started == 0 => return Err(error),
                Err(error) => {
                    self.warn(&format!(
                        "only {} of {} handler threads could be started, so fewer calls run at once; \
                         raise the limit of tasks, or lower workers.threads: {error}",
                        self.started, self.count
                    ));
                    self.count = self.started;
                    break;
                }
            }
        }
        Ok(())
    }

    /// Logs a lack of threads. All sessions of a listener have the same limit, so one line is for all of them.
    fn warn(&self, text: &str) {
        let now_ms = process::monotonic_ms();
        match self.sessions.is_none_or(|all| may_warn(all, now_ms)) {
            true => log::warn!("{text}"),
            false => log::debug!("{text}"),
        }
    }

    /// Returns the size of a lane's executor in this process: the number of handler threads or pool
    /// programs.
    pub fn count(&self, lane: usize) -> usize {
        match lane.checked_sub(1) {
            Some(_) if self.lane == lane => self.pools.main().capacity(),
            None if self.lane == 0 => self.count,
            Some(pool) if self.pools.numbers().contains(&pool) => self.crew(lane),
            _ => 0,
        }
    }

    /// Returns how many threads or programs serve a lane in total: this worker's handler threads, or all programs of
    /// the pool, also those of other processes.
    pub fn crew(&self, lane: usize) -> usize {
        match lane.checked_sub(1) {
            None => self.count,
            Some(pool) => (self.registry.all_pools().get(pool)).map_or(0, |pool| pool.capacity()),
        }
    }

    /// Returns how many threads or programs of a lane can run calls in this process. A program that is starting or
    /// throttled cannot.
    pub fn available(&self, lane: usize) -> usize {
        match lane {
            _ if lane != self.lane => 0,
            0 => self.count,
            _ => self.pools.main().available(),
        }
    }

    /// Returns whether the programs of the pool may run several calls at once.
    pub fn has_parallel_programs(&self) -> bool {
        self.pools.main().concurrency() > 1
    }

    /// Makes sure that no call waits without a thread. Returns whether to check again soon, because calls
    /// wait or there are results for which the event loop was not woken.
    pub fn look(&mut self, now_ms: u64) -> bool {
        if self.started < self.count {
            let more = self.queue.lacking().min(self.count - self.started);
            if let Err(error) = self.start_more(more) {
                self.warn(&format!(
                    "no handler thread can be started: {error}; calls wait until one can be started"
                ));
            }
        }
        self.queue.look(now_ms) || self.has_done()
    }

    /// Returns whether there are results that were not taken.
    pub fn has_done(&self) -> bool {
        !self.done.is_empty() || self.pools.has_done()
    }

    /// In a pool process, returns how many programs of its pool serve, and how many do not.
    pub fn programs(&self) -> (usize, usize) {
        self.pools.main().serving_and_down()
    }

    /// In a pool process, replaces the registry by one with more methods.
    pub fn set_registry(&mut self, registry: &Arc<Registry>) {
        self.registry = Arc::clone(registry);
        self.pools.main_mut().set_registry(registry);
    }

    pub fn pools(&mut self) -> &mut ProcessPools {
        &mut self.pools
    }

    pub fn take_done(&mut self) -> impl Iterator<Item = Done> {
        let mut done = Vec::new();
        self.pools.take_done(&mut done);
        self.done.try_iter().chain(done)
    }
}

fn run(handler_call: &HandlerCall, slot: u16, registry: &Registry) -> Result<Vec<u8>, RpcError> {
    let method = &registry.methods()[handler_call.method];
    let context = Context::on_thread(
        &method.name,
        slot,
        handler_call.deadline,
        &handler_call.state,
    )
    .with(
        (handler_call.id.as_deref(), handler_call.peer),
        registry.worker(),
    );
    let mut result = Vec::new();
    let call = || {
        method
            .handler
            .call(&handler_call.params, &context, &mut result)
    };
    let name = (&*method.name, handler_call.id.as_deref());
    logging::with_call(handler_call.state.identity().logged(), || {
        guard::run(name, call)
    })?;
    Ok(result)
}
