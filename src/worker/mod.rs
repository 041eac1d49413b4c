//! A worker: one event loop, a pool of handler threads, and nothing of the master's.
//!
//! `run` is what a forked child does, from its first instruction to `_exit`; it never returns to
//! the master's code. A panic of the loop is logged and ends the worker, which the master
//! replaces; a panic of a handler is an answer.

mod accepting;
mod active_rebalance;
mod batch;
mod call_dispatcher;
mod call_errors;
mod call_room;
mod call_scheduler;
mod call_table;
mod connection;
mod connections;
mod crash;
mod deadlines;
mod drain;
mod event_loop;
mod fair_queue;
mod forwarding;
mod handoff;
mod input_parser;
mod lane;
mod method_stats;
mod orders;
mod path_listeners;
mod peer;
mod peer_calls;
mod post_fork;
mod rebalance;
mod recycle_check;
mod remote_calls;
mod run_queue;
mod shares;
mod silent;
mod silent_connections;
mod startup;
mod stop_hooks;
mod thread_calls;
mod threads;
mod timers;
mod unsent;

use std::collections::VecDeque;
use std::io;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crate::config::LimitsConfig;
use crate::link::adoption_queue::LONGEST;
use crate::link::ids::Slot;
use crate::logging;
use crate::sys::event::Reactor;
use crate::sys::memory;
use crate::sys::process::{descriptors_left, exit_now};
use crate::sys::signal;
use crate::sys::waker::Waker;
use crate::worker_init::WorkerInit;

use call_dispatcher::CallDispatcher;
use call_scheduler::CallScheduler;
use crash::journal::CallJournal;
use crash::keeper::KeeperSetup;
use event_loop::EventLoop;
use forwarding::Forwarding;
use path_listeners::PathListeners;
use shares::Shares;
use threads::Threads;
use timers::Timers;
use unsent::UnsentAnswers;

/// A worker ends with this when it could not start; sysexits(3head), EX_OSERR.
const CANT_START: i32 = 71;
/// Likewise for a bug of ours: EX_SOFTWARE.
const BUG: i32 = 70;
/// Arenas of the allocator: one for the loop, one for the threads that work for it.
const ARENAS: i32 = 2;
/// How long a leaving worker waits for its last log lines to be written.
const LAST_WORDS: Duration = Duration::from_millis(250);

/// Is the worker, in a freshly forked child with all signals blocked.
pub fn run(boot: WorkerInit<'_>) -> ! {
    let role = match boot.slot.pool() {
        Some(_) => "pool process",
        None => "worker",
    };
    let lived = catch_unwind(AssertUnwindSafe(|| live(boot)));
    let code = match lived {
        Ok(Ok(())) => 0,
        Ok(Err((attempt, error))) => {
            log::error!(
                "this {role} can't {attempt}: {error}; it leaves, the master decides what follows"
            );
            CANT_START
        }
        // The hook has logged it.
        Err(_) => BUG,
    };
    logging::flush(LAST_WORDS);
    exit_now(code)
}

/// Descriptors that connections leave to handlers, commands and links.
const KEPT_BACK: usize = 64;

/// Limits the connections so that handlers find descriptors: 64, at most a quarter of all.
fn keep_descriptors_back(limits: &mut LimitsConfig, slot: Slot) {
    let (limit, left) = descriptors_left();
    let room = left.saturating_sub((limit / 4).min(KEPT_BACK)).max(1);
    if room < limits.connections {
        if slot == Slot(0) {
            log::warn!(
                "limits.connections is {}, but the limit of open files, {limit}, has room for {room} connections in \
                 a worker: no more are accepted; raise the limit of open files (LimitNOFILE in a unit), or lower \
                 limits.connections",
                limits.connections
            );
        }
        limits.connections = room;
    }
}

fn live(mut boot: WorkerInit<'_>) -> Result<(), (&'static str, io::Error)> {
    let is_awaited = boot.startup_log_tx.is_some();
    logging::start_forwarding(boot.startup_log_tx.take());
    let cant = |attempt| move |error| (attempt, error);
    let (signals, keeping) = post_fork::init_worker_process(&mut boot)?;
    memory::limit_malloc_arenas(ARENAS);
    let waker = Arc::new(Waker::new().map_err(cant("make a waker"))?);
    // Threads inherit the mask: none of them hears a signal, TERM and QUIT are the loop's.
    signal::block_all();
    logging::init_worker_log(boot.slot.0);
    // With the log's thread, and signals as any program has them: it may start programs and threads.
    signal::unblock_all();
    let pool = boot.slot.pool();
    let (role, name) = (boot.role(), boot.name());
    if pool.is_none() {
        boot.registry
            .start_worker(boot.slot.0)
            .map_err(|reason| ("start", io::Error::other(reason)))?;
    }
    signal::block_all();
    let count = boot.settings.workers.threads;
    let threads = Threads::start(count, pool, boot.slot.0, &boot.registry, &waker)
        .map_err(cant("start handler threads"))?;
    signal::unblock_all();
    // Not dropped should the loop panic: what is open then is its keeper's.
    let reactor = Reactor::new().map_err(cant("make its event layer"))?;
    let mut reactor = ManuallyDrop::new(reactor);
    let mut ledger = CallJournal::default();
    let mut quarantine = None;
    if let Some(KeeperSetup { book, buffer }) = keeping {
        ledger = CallJournal::new(book);
        quarantine = Some(boot.quarantine);
        signal::set_fault_report(&boot.crash_report.fault, &boot.crash_report.faulting_call);
        reactor.attach_progress(book.witness, buffer);
    }
    let path_listeners = PathListeners::of(&boot.settings.listen, &boot.listeners);
    if pool.is_none() {
        reactor
            .listen(boot.listeners, (Rc::clone(&boot.adoption.rx), LONGEST))
            .map_err(cant("watch its listeners"))?;
    }
    let mut limits = boot.settings.limits.clone();
    keep_descriptors_back(&mut limits, boot.slot);
    let unsent_limit = limits.unfinished;
    let service = CallDispatcher {
        calls: CallScheduler::new(
            Arc::clone(&boot.registry),
            limits.queue,
            Arc::clone(&threads.queue),
        ),
        registry: boot.registry,
        threads,
        forwarding: Forwarding::new(
            boot.records.0,
            boot.records.1,
            pool.map_or(0, |pool| pool + 1),
            boot.generation.0,
        ),
        answered_elsewhere: Vec::new(),
        untaken_batches: VecDeque::new(),
        timers: Timers::default(),
        limits,
        path_listeners,
        origins: Vec::leak(boot.settings.http_origins.clone()),
        out: Vec::new(),
        now_ms: 0,
        stop_pending: false,
        accept_wait_ms: 0,
        longest_wait_ms: 0,
        last_wait_ms: 0,
        stopping: false,
        unfinished: 0,
        unfinished_shares: Shares::default(),
        unsent: UnsentAnswers::new(unsent_limit),
        read: 0,
        errors: 0,
        record: boot.record,
        slot: boot.slot.0,
        ledger,
        quarantine,
    };
    let mut event_loop = EventLoop::new(
        service,
        (boot.link, signals, waker),
        (boot.adoption, boot.stuck),
        Box::new(move || {
            if let Some(area) = boot.title {
                area.set(&format!("{}: {role} {name} draining", boot.program));
            }
        }),
        boot.generation,
        &boot.settings.workers,
    );
    event_loop.waits_for_pools = is_awaited && pool.is_none();
    // The process ends after this: threads that still run handlers end with it, unasked.
    let mut event_loop = ManuallyDrop::new(event_loop);
    let ran = event_loop.run(&mut reactor).map_err(cant("serve"));
    match ran {
        Ok(()) => event_loop.leaves(),
        // Its reason is to be heard before the master's patience ends, and nobody waits for a program.
        Err(_) => event_loop.drain.leave_now(),
    }
    event_loop.end_programs(&mut reactor);
    ran?;
    stop_hooks::run_stop_hooks(&mut event_loop);
    log::debug!("leaves");
    drop(ManuallyDrop::into_inner(reactor));
    Ok(())
}
