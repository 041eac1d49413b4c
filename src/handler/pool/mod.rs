//! Runs pools: long-lived programs in any language that answer many calls, one at a time or several at once
//! (`parallel`).
//!
//! The `dispatcher` queues the calls of a pool. It belongs to the event loop, which writes each call to a
//! program (`program_connection`) over its socket (`wire`) and reads the answer. Whatever takes time is
//! done by the `supervisor` of each program, a thread that starts the `process`, ends it, and kills what a
//! dead one has left. When a pool process stays at a reload, `rollout` decides which program is replaced
//! next. `life` decides when a program is ready or must be recycled. `lines` logs what it prints. A pool
//! process serves when each program has been ready once (`boot`).

mod boot;
pub mod definition;
mod dispatcher;
pub mod entry;
mod life;
mod lines;
mod parallel;
pub mod pool_table;
mod process;
pub mod process_pools;
mod program_connection;
pub mod program_deaths;
pub mod program_record;
mod rollout;
mod supervisor;
mod wire;

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;
use std::{io, mem, thread};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};

pub use boot::Stage;
pub use definition::{Pool, Pooled};

use super::call_state::{Done, HandlerCall, Reports};
use super::registry::Registry;
use crate::config;
use crate::sys::process::monotonic_ms;
use crate::sys::signal;
use crate::sys::waker::Waker;
use crate::throttle::limiter::Limiter;
use boot::{Boot, SpareRoom};
use dispatcher::{Dispatcher, SupervisorEvent, SupervisorHandle, SupervisorOrder};
use program_connection::Line;
use rollout::{Rollout, RolloutStep};
use supervisor::{ProgramSupervisor, SupervisorReport, SupervisorSetup};
use wire::PIECE;

/// The stack size of a supervisor, which runs no foreign code.
const STACK: usize = 256 * 1024;
/// How long a program may take to exit with its process: this time before SIGTERM, and again before SIGKILL.
const GRACE: Duration = Duration::from_secs(1);
/// How long a program may take to exit if the master has died. It is shorter, because all programs must be gone one
/// second after the master's death.
const SHORT_GRACE: Duration = Duration::from_millis(200);
/// How long a killed program may take to end.
const DYING: Duration = Duration::from_secs(1);
/// How often the worker records its heartbeat while programs exit.
const BEAT: Duration = Duration::from_millis(100);

/// How much time programs have to exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hurry {
    /// A normal exit: as much as they need, up to a limit.
    None,
    /// Little time: the master has died, and nothing may be left for long.
    Some,
    /// No time: they are killed at once.
    AtOnce,
}

/// What supervisors are started with.
#[derive(Debug)]
struct ProgramStarter {
    registry: Arc<Registry>,
    reports: Reports,
    events: Sender<SupervisorReport>,
    /// Each supervisor has one until it ends.
    lives: Sender<()>,
    waker: Arc<Waker>,
    spare: Arc<SpareRoom>,
}

impl ProgramStarter {
    /// Starts the supervisor of the program with this number. The program does not serve while `is_held`.
    /// `boot` gets the result of its first start.
    fn start(
        &self,
        pool: &Arc<Pool>,
        (number, is_held): (usize, bool),
        boot: Option<&Arc<Boot>>,
    ) -> io::Result<SupervisorHandle> {
        let (sender, orders) = unbounded();
        let waker = Arc::new(Waker::new()?);
        let channel = SupervisorHandle {
            orders: sender,
            waker: Arc::clone(&waker),
        };
        let is_rolling = pool.settings.reload == config::PoolReload::Rolling;
        let post = SupervisorSetup {
            number,
            pool: Arc::clone(pool),
            orders,
            waker,
            events: self.events.clone(),
            registry: Arc::clone(&self.registry),
            reports: self.reports.clone(),
            boot: boot.cloned(),
            is_held,
            spare: is_rolling.then(|| Arc::clone(&self.spare)),
        };
        let lives = self.lives.clone();
        let builder = thread::Builder::new().name(format!("pool-{}-{number}", pool.name));
        let body = move || {
            ProgramSupervisor::new(post).keep();
            drop(lives);
        };
        signal::with_signals_blocked(|| builder.stack_size(STACK).spawn(body))?;
        Ok(channel)
    }
}

/// A table that takes effect if the reload succeeds.
#[derive(Debug)]
struct NextTable {
    pool: Arc<Pool>,
    /// The progress of its first program.
    boot: Arc<Boot>,
}

/// The pool of a pool process; empty in a worker. Programs are numbered.
#[derive(Debug)]
pub struct Pools {
    /// The programs and the calls that wait for them; `None` in a worker.
    queue: Option<Dispatcher>,
    events: Receiver<SupervisorReport>,
    boot: Arc<Boot>,
    /// Nothing is ever sent. The channel closes when the last supervisor has ended.
    supervisors: Receiver<()>,
    piece: Box<[u8]>,
    /// The number of calls that one program may run at once.
    concurrency: usize,
    /// Whether a call that a program may be running was given up.
    one_is_in_vain: bool,
    /// What further supervisors are started with; `None` in workers and sessions, and once the process exits.
    starter: Option<ProgramStarter>,
    /// The pool with the table in effect.
    pool: Option<Arc<Pool>>,
    next: Option<NextTable>,
    rollout: Rollout,
    /// Whether room was taken for one more program than `processes`.
    has_spare: bool,
    /// Limits the warnings that no program can be started.
    warning_limiter: Limiter,
}

impl Pools {
    /// Starts a supervisor for each program of the pool with this number in the registry, or none without
    /// a number.
    ///
    /// # Errors
    /// If no thread can be started or no descriptor is left.
    pub fn start(
        registry: &Arc<Registry>,
        pool: Option<usize>,
        reports: &Reports,
        waker: &Arc<Waker>,
    ) -> io::Result<Self> {
        let pool = pool.and_then(|number| registry.all_pools().get(number).cloned());
        let programs = pool.as_ref().map_or(0, |pool| pool.processes());
        let boot = Arc::new(Boot::new(programs, false, Arc::clone(waker)));
        let (lives, supervisors) = bounded::<()>(0);
        let (event_sender, events) = unbounded();
        let starter = ProgramStarter {
            registry: Arc::clone(registry),
            reports: reports.clone(),
            events: event_sender,
            lives,
            waker: Arc::clone(waker),
            spare: Arc::default(),
        };
        let mut queue = None;
        if let Some(pool) = &pool {
            let start = |number| starter.start(pool, (number, false), Some(&boot));
            let supervisors = (0..programs).map(start).collect::<io::Result<Vec<_>>>()?;
            let line = Line {
                waiting: VecDeque::new(),
                done: Vec::new(),
                registry: Arc::clone(registry),
                name: pool.name.clone(),
                warning_limiter: Limiter::rare(),
                limit: pool.limit,
                depth: pool.depth,
                pool: Some(Arc::clone(pool)),
            };
            queue = Some(Dispatcher::new(line, supervisors));
        }
        let has_successors = pool.as_ref().is_some_and(|it| !it.is_of_connection());
        Ok(Pools {
            piece: vec![0; if queue.is_some() { PIECE } else { 0 }].into(),
            queue,
            events,
            boot,
            supervisors,
            concurrency: pool.as_ref().map_or(1, |pool| pool.concurrency()),
            one_is_in_vain: false,
            starter: has_successors.then_some(starter),
            pool,
            next: None,
            rollout: Rollout::new(programs),
            has_spare: false,
            warning_limiter: Limiter::rare(),
        })
    }

    /// Passes on a registry with more methods.
    pub fn set_registry(&mut self, registry: &Arc<Registry>) {
        if let Some(queue) = &mut self.queue {
            queue.line.registry = Arc::clone(registry);
            queue.send_to_all(|| SupervisorOrder::Registry(Arc::clone(registry)));
        }
        if let Some(starter) = &mut self.starter {
            starter.registry = Arc::clone(registry);
        }
    }

    /// Starts a program with another table of the pool, to find out whether it becomes ready. Call `commit`
    /// or `revert` afterwards.
    pub fn prepare(&mut self, config: config::PoolConfig) {
        if let (Some(pool), Some(starter)) = (&self.pool, &self.starter) {
            self.next = Some(NextTable {
                pool: Arc::new(pool.with_config(config)),
                boot: Arc::new(Boot::new(1, true, Arc::clone(&starter.waker))),
            });
            self.rollout.prepare();
        }
    }

    /// Returns the progress of the program that is started with the next table; `None` without such a table.
    pub fn next_stage(&self) -> Option<Stage> {
        self.next.as_ref().map(|next| next.boot.stage())
    }

    /// Puts that table into effect: the programs are replaced one by one.
    pub fn commit(&mut self) {
        let canary = self.rollout.canary();
        let Some(next) = self.next.take() else {
            return;
        };
        self.rollout.commit(next.pool.processes());
        self.pool = Some(next.pool);
        if let (Some(number), Some(queue)) = (canary, &self.queue) {
            queue.send(number, SupervisorOrder::Serve);
        }
    }

    /// Drops that table.
    pub fn revert(&mut self) {
        self.next = None;
        self.rollout.revert();
    }

    /// Starts and ends programs until all have the table in effect.
    fn advance_rollout(&mut self) {
        let (Some(starter), Some(queue), Some(pool)) = (&self.starter, &mut self.queue, &self.pool)
        else {
            return;
        };
        let has_started = self.rollout.is_done() || self.boot.stage() == Stage::Ready;
        while has_started && !self.rollout.is_done() {
            match self.rollout.step(|number| queue.serves(number)) {
                RolloutStep::Wait => break,
                RolloutStep::Leave(number) => {
                    queue.send(number, SupervisorOrder::Leave);
                    self.rollout.told_to_leave(number);
                }
                RolloutStep::Start(number) => {
                    let is_failed = |it: &NextTable| matches!(it.boot.stage(), Stage::Failed(_));
                    if self.next.as_ref().is_some_and(is_failed) {
                        break;
                    }
                    if self.rollout.has_one_more() && !self.has_spare {
                        if !starter.spare.take(&starter.waker) {
                            break;
                        }
                        self.has_spare = true;
                    }
                    let started = match &self.next {
                        Some(next) => starter.start(&next.pool, (number, true), Some(&next.boot)),
                        None => starter.start(pool, (number, false), None),
                    };
                    match (started, &self.next) {
                        (Ok(channel), _) => {
                            queue.add(number, channel);
                            self.rollout.started(number);
                        }
                        (Err(error), Some(next)) => next.boot.fail(format!(
                            "the program of the pool {} could not be started: {error}",
                            pool.name
                        )),
                        (Err(error), None) => {
                            if self.warning_limiter.admit(monotonic_ms()).is_some() {
                                log::warn!(
                                    "pool {}: a program could not be started: {error}; it is \
                                     tried again within a second",
                                    pool.name
                                );
                            }
                            break;
                        }
                    }
                }
            }
        }
        // While programs are replaced, a call may go to an old or to a new one, so the smaller concurrency counts.
        self.concurrency = match self.rollout.is_done() {
            true => pool.concurrency(),
            false => self.concurrency.min(pool.concurrency()),
        };
        if self.has_spare && self.rollout.is_done() {
            self.has_spare = false;
            starter.spare.release();
        }
    }

    pub fn concurrency(&self) -> usize {
        self.concurrency
    }

    /// Returns how many calls the programs may run now. A sleeping program counts, because the next call
    /// starts it.
    pub fn available(&self) -> usize {
        (self.queue.as_ref()).map_or(0, |queue| queue.capacity(self.concurrency))
    }

    /// Returns the number of programs that serve, and of those that do not: they start, or wait until they may.
    pub fn serving_and_down(&self) -> (usize, usize) {
        let processes = self.pool.as_ref().map_or(0, |pool| pool.processes());
        let serving = self.queue.as_ref().map_or(0, Dispatcher::serving);
        (serving, processes.saturating_sub(serving))
    }

    /// Returns the number of calls that the programs may have at once.
    pub fn capacity(&self) -> usize {
        self.pool.as_ref().map_or(0, |pool| pool.capacity())
    }

    /// Gives a call to the programs of a pool process.
    pub fn put(&mut self, call: HandlerCall) {
        let queue = self.queue.as_mut();
        queue
            .expect("calls of a pool come to its process only")
            .put(call);
    }

    /// Returns how far the start of the programs is.
    pub fn stage(&self) -> Stage {
        self.boot.stage()
    }

    /// Serves the wire of this program, which can be read or written.
    pub fn attend(&mut self, program: usize) {
        if let Some(queue) = &mut self.queue {
            queue.attend(program, &mut self.piece);
        }
    }

    /// Records that a running call was given up. `settle` ends programs that run only abandoned calls.
    pub fn give_up(&mut self) {
        self.one_is_in_vain = true;
    }

    /// Handles the messages of the supervisors.
    pub fn receive_events(&mut self) {
        while let Ok(SupervisorReport { number, event }) = self.events.try_recv() {
            if matches!(event, SupervisorEvent::Gone) {
                self.rollout.gone(number);
            }
            if let Some(queue) = &mut self.queue {
                queue.receive(number, event, &mut self.piece);
            }
        }
    }

    /// Returns whether there are results that were not taken yet.
    pub fn has_done(&self) -> bool {
        (self.queue.as_ref()).is_some_and(|queue| !queue.line.done.is_empty())
    }

    /// Moves all results to `done`.
    pub fn take_done(&mut self, done: &mut Vec<Done>) {
        if let Some(queue) = &mut self.queue {
            done.append(&mut queue.line.done);
        }
    }

    /// Ends programs that run only abandoned calls, and updates the watches. `watch` gets the number of
    /// each program whose wire must be watched (and whether also for writing) or not watched any more. If
    /// it fails, it is called again the next time.
    pub fn settle(
        &mut self,
        mut watch: impl FnMut(usize, Option<(BorrowedFd<'_>, bool)>) -> io::Result<()>,
    ) {
        let in_vain = mem::take(&mut self.one_is_in_vain);
        self.advance_rollout();
        if let Some(queue) = &mut self.queue {
            if in_vain {
                queue.cancel_given_up();
            }
            queue.settle(&mut watch);
        }
    }

    /// Returns when `settle` must be called again at the latest, in milliseconds (CLOCK_MONOTONIC).
    pub fn next_overdue(&self) -> Option<u64> {
        self.queue.as_ref()?.next_overdue
    }

    /// Stops giving calls to all programs. Call `settle` and then `leave` afterwards.
    pub fn release_all_programs(&mut self) {
        self.starter = None;
        self.receive_events();
        self.queue.iter_mut().for_each(Dispatcher::release_all);
    }

    /// Makes all programs exit and waits for that. Calls `beat` now and then.
    pub fn leave(&mut self, hurry: Hurry, mut beat: impl FnMut()) {
        let grace = match hurry {
            Hurry::None => GRACE,
            Hurry::Some => SHORT_GRACE,
            Hurry::AtOnce => Duration::ZERO,
        };
        if let Some(queue) = &self.queue {
            queue.send_to_all(|| SupervisorOrder::Close(life::millis(grace)));
        }
        let most = (2 * grace + DYING).as_millis() / BEAT.as_millis();
        for _ in 0..=most {
            beat();
            // Drops messages that are still on their way to the dispatcher.
            self.events.try_iter().for_each(drop);
            if self.supervisors.recv_timeout(BEAT) == Err(RecvTimeoutError::Disconnected) {
                return;
            }
        }
    }
}
