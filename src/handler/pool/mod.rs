//! Pools: programs in any language that live long and answer many calls, one at a time each or several
//! (`parallel`).
//!
//! A call of a pool's method goes to a `desk`, where each program has a `seat`: the event loop writes
//! it there over the program's `wire`, and reads the answer. What takes time is done by the `keeper`
//! of each program, a thread that starts the `process`, ends it, and sees to it that nothing of a dead
//! one is left. `life` says when a program is ready or worn out, `lines` makes a log of what it
//! prints. A worker serves when each program has been ready once (`boot`).

mod boot;
mod desk;
mod entry;
mod keeper;
mod life;
mod lines;
mod parallel;
mod process;
pub mod program_record;
mod seat;
mod wire;

use std::collections::VecDeque;
use std::ffi::CString;
use std::io;
use std::mem;
use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, bounded, unbounded};

pub use boot::Stage;

use super::call_state::{Done, HandlerCall, Reports};
use super::prepared_program::{PreparedProgram, c_string};
use super::registry::Registry;
use super::{Context, Handler, Placement};
use crate::config;
use crate::protocol::code::Code;
use crate::protocol::rpc_error::RpcError;
use crate::sys::shared_memory::OwnedArray;
use crate::sys::waker::Waker;
use crate::throttle::limiter::Limiter;
use boot::Boot;
use desk::{Desk, Ear};
use keeper::{Keeper, Post, Told};
use program_record::ProgramRecord;
use seat::Line;
use wire::PIECE;

/// Stack of a keeper: it calls nobody's code.
const STACK: usize = 256 * 1024;
/// How long a program may take to leave with its worker, before SIGTERM and after.
const GRACE: Duration = Duration::from_secs(1);
/// The same where the master has died: nothing is to be left of it a second later.
const SHORT_GRACE: Duration = Duration::from_millis(200);
/// How long what is killed may take to end.
const DYING: Duration = Duration::from_secs(1);
/// While programs leave, the worker shows so often that it lives.
const BEAT: Duration = Duration::from_millis(100);

/// A pool, as configured.
#[derive(Debug)]
pub struct Pool {
    name: String,
    program: PreparedProgram,
    arguments: Vec<CString>,
    settings: config::PoolConfig,
    /// How long the first start of each program may take, which a new worker waits for.
    first_boot: u64,
    /// Bytes of an answer.
    limit: usize,
    /// Its nesting.
    depth: usize,
    /// What its programs do; `None` if there was no memory for it.
    records: Option<OwnedArray<ProgramRecord>>,
}

impl Pool {
    /// The pool of that name in these settings.
    pub fn new(name: &str, pool: &config::PoolConfig, settings: &config::Settings) -> Self {
        // Somewhat earlier than the master would give the worker up without knowing why.
        let worker = settings.workers.boot_timeout;
        let first_boot = pool.boot_timeout.min(worker - worker / 10);
        Pool {
            name: name.to_owned(),
            program: PreparedProgram::new(&pool.program),
            arguments: pool
                .program
                .arguments
                .iter()
                .map(|argument| c_string(argument.as_str()))
                .collect(),
            settings: pool.clone(),
            first_boot: life::millis(first_boot),
            limit: settings.limits.frame,
            depth: settings.limits.depth,
            records: NonZeroUsize::new(pool.processes)
                .and_then(|count| OwnedArray::new(count).ok()),
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// What its programs do, as the pool process shows it.
    pub fn records(&self) -> &[ProgramRecord] {
        self.records.as_deref().unwrap_or_default()
    }

    /// How many calls its programs may have at once.
    pub fn capacity(&self) -> usize {
        self.settings.processes * self.settings.concurrency
    }

    /// How many calls one program may have at once.
    pub fn concurrency(&self) -> usize {
        self.settings.concurrency
    }

    /// How many programs the server has of it.
    pub fn processes(&self) -> usize {
        self.settings.processes
    }
}

/// What a method of a pool has for a handler: the way to the pool.
#[derive(Debug)]
pub struct Pooled {
    /// The number of the pool in the registry.
    pub number: usize,
}

impl Handler for Pooled {
    fn call(&self, _: &str, _: &Context<'_>, _: &mut Vec<u8>) -> Result<(), RpcError> {
        let text = "this method is answered by a program, and not by a thread";
        Err(RpcError::of(Code::Internal, text, false))
    }

    fn placement(&self) -> Placement {
        Placement::Pool(self.number)
    }
}

/// How much time programs have to leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hurry {
    /// As much as they need, within reason.
    None,
    /// Little: the master has died, and nothing is to be left of it for long.
    Some,
    /// None.
    AtOnce,
}

/// The pools of a worker at work. Programs are numbered through, those of the first pool first.
#[derive(Debug)]
pub struct Pools {
    desks: Vec<Desk>,
    /// The number of each desk's first program.
    firsts: Vec<usize>,
    words: Receiver<Told>,
    boot: Arc<Boot>,
    /// Nothing is ever sent: it ends when the last keeper has.
    keepers: Receiver<()>,
    piece: Box<[u8]>,
    /// Calls that a program may have at once.
    concurrency: usize,
    /// A call that may have been with a program was given up.
    one_is_in_vain: bool,
}

impl Pools {
    /// Starts a keeper for each program of the pool with this number in the registry; of none without.
    ///
    /// # Errors
    /// When there is no thread or no descriptor to be had.
    pub fn start(
        registry: &Arc<Registry>,
        pool: Option<usize>,
        reports: &Reports,
        waker: &Arc<Waker>,
    ) -> io::Result<Self> {
        let pools: Vec<_> = (registry.pools().iter().enumerate())
            .filter(|(number, _)| Some(*number) == pool)
            .map(|(_, pool)| pool)
            .collect();
        let concurrency = pools.iter().map(|pool| pool.concurrency()).max();
        let programs = pools.iter().map(|pool| pool.processes());
        let boot = Arc::new(Boot::new(programs.sum(), Arc::clone(waker)));
        let (lives, keepers) = bounded::<()>(0);
        let (teller, words) = unbounded();
        let (mut desks, mut firsts, mut first) = (Vec::new(), Vec::new(), 0);
        for (desk, pool) in pools.into_iter().enumerate() {
            let mut ears = Vec::new();
            for number in 0..pool.processes() {
                let (sender, orders) = unbounded();
                let waker = Arc::new(Waker::new()?);
                ears.push(Ear {
                    orders: sender,
                    waker: Arc::clone(&waker),
                });
                let post = Post {
                    number,
                    desk,
                    pool: Arc::clone(pool),
                    orders,
                    waker,
                    words: teller.clone(),
                    registry: Arc::clone(registry),
                    reports: reports.clone(),
                    boot: Arc::clone(&boot),
                };
                let lives = lives.clone();
                thread::Builder::new()
                    .name(format!("pool-{}-{number}", pool.name))
                    .stack_size(STACK)
                    .spawn(move || {
                        Keeper::new(post).keep();
                        drop(lives);
                    })?;
            }
            firsts.push(first);
            first += ears.len();
            let line = Line {
                waiting: VecDeque::new(),
                done: Vec::new(),
                registry: Arc::clone(registry),
                name: pool.name.clone(),
                complaints: Limiter::rare(),
                limit: pool.limit,
                depth: pool.depth,
                pool: Some(Arc::clone(pool)),
            };
            desks.push(Desk::new(line, ears));
        }
        Ok(Pools {
            piece: vec![0; if desks.is_empty() { 0 } else { PIECE }].into(),
            desks,
            firsts,
            words,
            boot,
            keepers,
            concurrency: concurrency.unwrap_or(1),
            one_is_in_vain: false,
        })
    }

    /// How many calls a program may have at once.
    pub fn concurrency(&self) -> usize {
        self.concurrency
    }

    /// How many calls the programs of a pool may have now. One that sleeps counts: it starts as soon as a
    /// call comes.
    pub fn available(&self, pool: usize) -> usize {
        let pool = self.desks.get(pool);
        pool.map_or(0, |it| it.capacity(self.concurrency))
    }

    /// How many programs of all pools do not serve: they start, or wait until they may.
    pub fn down(&self) -> usize {
        self.desks.iter().map(Desk::down).sum()
    }

    /// Hands a call to a pool.
    pub fn put(&mut self, pool: usize, job: HandlerCall) {
        self.desks[pool].put(job);
    }

    /// Whether all programs have been ready.
    pub fn stage(&self) -> Stage {
        self.boot.stage()
    }

    /// The wire of the program with this number can be read or written.
    pub fn attend(&mut self, program: usize) {
        let pool = self.firsts.partition_point(|&first| first <= program) - 1;
        self.desks[pool].attend(program - self.firsts[pool], &mut self.piece);
    }

    /// A call was given up that had begun: a program that works for nobody is ended by `settle`.
    pub fn give_up(&mut self) {
        self.one_is_in_vain = true;
    }

    /// Hears what the keepers have to say.
    pub fn hear(&mut self) {
        while let Ok(Told { pool, number, word }) = self.words.try_recv() {
            self.desks[pool].hear(number, word, &mut self.piece);
        }
    }

    /// Whether calls are done that nobody has taken.
    pub fn has_done(&self) -> bool {
        self.desks.iter().any(Desk::has_done)
    }

    /// Moves what is done there.
    pub fn take_done(&mut self, done: &mut Vec<Done>) {
        self.desks.iter_mut().for_each(|desk| desk.take_done(done));
    }

    /// Ends what works for nobody, and brings up to date what is waited for: `watch` is told of each
    /// program, by its number, whose wire is to be watched, and whether for writing too, or not to
    /// be watched any more. Where it fails it is asked again the next time.
    pub fn settle(
        &mut self,
        mut watch: impl FnMut(usize, Option<(BorrowedFd<'_>, bool)>) -> io::Result<()>,
    ) {
        let in_vain = mem::take(&mut self.one_is_in_vain);
        for (desk, first) in self.desks.iter_mut().zip(&self.firsts) {
            if in_vain {
                desk.cancel_given_up();
            }
            desk.settle(|number, wire| watch(first + number, wire));
        }
    }

    /// When `settle` is to be called again at the latest. Milliseconds (CLOCK_MONOTONIC).
    pub fn next_overdue(&self) -> Option<u64> {
        self.desks.iter().filter_map(|it| it.next_overdue).min()
    }

    /// No program serves from now on; `settle` is to follow, and then `leave`.
    pub fn send_home(&mut self) {
        self.hear();
        self.desks.iter_mut().for_each(Desk::send_home);
    }

    /// Lets all programs leave, and waits for it, `beat`ing now and then.
    pub fn leave(&mut self, hurry: Hurry, mut beat: impl FnMut()) {
        let grace = match hurry {
            Hurry::None => GRACE,
            Hurry::Some => SHORT_GRACE,
            Hurry::AtOnce => Duration::ZERO,
        };
        for desk in &self.desks {
            desk.close(life::millis(grace));
        }
        let most = (2 * grace + DYING).as_millis() / BEAT.as_millis();
        for _ in 0..=most {
            beat();
            // Whoever was on the way to its desk has nobody there.
            self.words.try_iter().for_each(drop);
            if self.keepers.recv_timeout(BEAT) == Err(RecvTimeoutError::Disconnected) {
                return;
            }
        }
    }
}
