//! Pools: programs in any language that live long and answer many calls, one at a time each.
//!
//! A call of a pool's method goes to a `desk`, from which the `keeper` of each program takes it: a
//! thread that starts the `process`, writes calls to it and reads answers, and sees to it that
//! nothing of a dead one is left. `life` says when a program is ready or worn out, `lines` makes a
//! log of what it prints. A worker serves when each program has been ready once (`boot`).

mod boot;
mod desk;
mod keeper;
mod life;
mod lines;
mod process;

use std::ffi::CString;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};

pub use boot::Stage;

use super::job::{Job, Reports};
use super::program::{Program, c_string};
use super::registry::Registry;
use super::{Context, Handler, Placement};
use crate::config;
use crate::protocol::code::Code;
use crate::protocol::rpc_error::RpcError;
use crate::sys::waker::Waker;
use boot::Boot;
use desk::Desk;
use keeper::{Keeper, Post};

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
    program: Program,
    arguments: Vec<CString>,
    settings: config::Pool,
    /// How long the first start of each program may take, which a new worker waits for.
    first_boot: u64,
    /// Bytes of an answer.
    limit: usize,
    /// Its nesting.
    depth: usize,
}

impl Pool {
    /// The pool of that name in these settings.
    pub fn new(name: &str, pool: &config::Pool, settings: &config::Settings) -> Self {
        // Somewhat earlier than the master would give the worker up without knowing why.
        let worker = settings.workers.boot_timeout;
        let first_boot = pool.boot_timeout.min(worker - worker / 10);
        Pool {
            name: name.to_owned(),
            program: Program::new(&pool.program),
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
        }
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

/// The pools of a worker at work.
#[derive(Debug)]
pub struct Pools {
    desks: Vec<Arc<Desk>>,
    boot: Arc<Boot>,
    /// Nothing is ever sent: it ends when the last keeper has.
    keepers: Receiver<()>,
}

impl Pools {
    /// Starts a keeper for each program of the registry's pools.
    ///
    /// # Errors
    /// When there is no thread or no descriptor to be had.
    pub fn start(
        registry: &Arc<Registry>,
        reports: &Reports,
        waker: &Arc<Waker>,
    ) -> io::Result<Self> {
        let programs = registry.pools().iter().map(|pool| pool.settings.processes);
        let boot = Arc::new(Boot::new(programs.sum(), Arc::clone(waker)));
        let (lives, keepers) = bounded::<()>(0);
        let mut desks = Vec::new();
        for pool in registry.pools() {
            let wakers = (0..pool.settings.processes).map(|_| Waker::new().map(Arc::new));
            let desk = Arc::new(Desk::new(wakers.collect::<io::Result<_>>()?));
            for number in 0..desk.count() {
                let post = Post {
                    number,
                    pool: Arc::clone(pool),
                    desk: Arc::clone(&desk),
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
            desks.push(desk);
        }
        Ok(Pools {
            desks,
            boot,
            keepers,
        })
    }

    /// How many programs a pool has.
    pub fn count(&self, pool: usize) -> usize {
        self.desks.get(pool).map_or(0, |desk| desk.count())
    }

    /// Hands a call to a pool.
    pub fn put(&self, pool: usize, job: Job) {
        self.desks[pool].put(job);
    }

    /// Whether all programs have been ready.
    pub fn stage(&self) -> Stage {
        self.boot.stage()
    }

    /// Lets all programs leave, and waits for it, `beat`ing now and then.
    pub fn leave(&self, hurry: Hurry, mut beat: impl FnMut()) {
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
            if self.keepers.recv_timeout(BEAT) == Err(RecvTimeoutError::Disconnected) {
                return;
            }
        }
    }
}
