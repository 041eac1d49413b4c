//! Builds the parts of a worker, pool process or session after its post-fork steps, and lets them serve.

use std::collections::VecDeque;
use std::io;
use std::mem::ManuallyDrop;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::access_log::hooks::AccessLog;
use super::access_log::turn;
use super::attempts::AttemptTable;
use super::call_counts::{AcceptDelay, CallCounts};
use super::call_dispatcher::CallDispatcher;
use super::call_scheduler::CallScheduler;
use super::call_tracing::CallTracing;
use super::crash::journal::CallJournal;
use super::crash::keeper::KeeperSetup;
use super::event_loop::{EventLoop, LINK, SIGNALS, WAKER};
use super::forwarding::Forwarding;
use super::jobs_lane::JobsLane;
use super::path_listeners::PathListeners;
use super::peer::SharedPools;
use super::pool_health::WatchedPools;
use super::recycle_check::recycle_threshold;
use super::shares::Shares;
use super::slow_log::watch::SlowWatch;
use super::source_limits::SourceLimits;
use super::stop_hooks;
use super::threads::Threads;
use super::timers::{Timers, millis};
use super::unsent::UnsentAnswers;
use super::unused_connections::UnusedConnections;
use crate::config::{Histogram, LimitsConfig};
use crate::handler::trace;
use crate::link::adoption_queue::LONGEST;
use crate::link::ids::Slot;
use crate::link::quarantine::UsedQuarantine;
use crate::logging;
use crate::sys::event::{Interest, Reactor};
use crate::sys::memory;
use crate::sys::process::{descriptors_left, monotonic_ms};
use crate::sys::signal::{self, SignalPipe};
use crate::sys::waker::Waker;
use crate::worker_init::WorkerInit;

/// The arenas of the allocator: one for the loop, one for the threads that work for it.
const ARENAS: i32 = 2;
/// The descriptors reserved for handlers, commands and links.
const KEPT_BACK: usize = 64;

/// Limits the connections, so that handlers have descriptors: 64, but at most a quarter of all.
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

pub type Built = (ManuallyDrop<EventLoop>, ManuallyDrop<Reactor>);

/// Builds the parts of the process after its post-fork steps. They are not dropped if the loop panics, because the
/// keeper uses the open descriptors. Threads that still run handlers end with the process.
///
/// # Errors
/// What could not be done, and why.
pub fn build(
    mut boot: WorkerInit<'_>,
    signals: SignalPipe,
    keeping: Option<KeeperSetup>,
    path_listeners: PathListeners,
    show_draining: Box<dyn Fn()>,
) -> Result<Built, (&'static str, io::Error)> {
    let cant = |attempt| move |error| (attempt, error);
    memory::limit_malloc_arenas(ARENAS);
    let waker = Arc::new(Waker::new().map_err(cant("make a waker"))?);
    let is_session = boot.slot.session().is_some();
    // The master does not know sessions by their pids.
    let asks_master = boot.account().is_some() && !is_session;
    let access_log = boot.settings.access_log.as_ref();
    let is_in_log = access_log.is_some_and(|config| config.file.is_none());
    match is_session {
        true => logging::init_session_log(boot.slot.0, is_in_log),
        false => logging::init_worker_log(boot.slot.0, is_in_log),
    }
    let (pool, slot) = (boot.slot.pool(), boot.slot.number());
    if let Some(pool) = pool
        && let Some(complete) = boot.methods.complete(&boot.registry, pool)
    {
        boot.registry = complete;
    }
    if pool.is_none() {
        boot.registry
            .start_worker(slot)
            .map_err(|reason| ("start", io::Error::other(reason)))?;
    }
    // Threads inherit the signal mask, so they get no signals. TERM and QUIT are for the loop.
    signal::block_all();
    if let Some(number) = pool {
        boot.count_programs(number);
    }
    if boot.settings.trace {
        trace::seed().map_err(cant("seed the ids of traces"))?;
    }
    let count = boot.settings.workers.threads;
    let keeps = keeping.as_ref();
    let running = keeps.map_or(&[][..], |keeping| &keeping.journal.running[1..]);
    let (registry, place) = (&boot.registry, (slot, running));
    let sessions = boot.isolated.as_ref().map(|isolated| isolated.range.0);
    let threads = Threads::start((count, sessions), pool, place, registry, &waker)
        .map_err(cant("start handler threads"))?;
    signal::unblock_all();
    let reactor = Reactor::new().map_err(cant("create the epoll instance"))?;
    let mut reactor = ManuallyDrop::new(reactor);
    let mut journal = CallJournal::default();
    let mut quarantine = UsedQuarantine::default();
    if let Some(KeeperSetup {
        journal: shared,
        buffer,
    }) = keeping
    {
        journal = CallJournal::new(shared);
        quarantine = UsedQuarantine(Some(boot.quarantine.clone()));
        signal::set_fault_report(&boot.crash_report.fault, &boot.crash_report.faulting_call);
        reactor.attach_progress(shared.progress, buffer);
    }
    let session = sessions.and_then(|all| all.get(boot.slot.session()?));
    let access = AccessLog::new(&boot, session);
    let mut limits = boot.settings.limits.clone();
    let isolation = boot
        .settings
        .listen
        .get(boot.isolated.as_ref().map_or(usize::MAX, |it| it.listen));
    if let Some(isolation) = isolation.and_then(|listen| listen.isolation.as_ref()) {
        limits.unfinished = isolation.unfinished;
    } else {
        keep_descriptors_back(&mut limits, boot.slot);
    }
    let source_limits = SourceLimits::new(boot.sources, &boot.listeners, boot.records.1)
        .map_err(cant("make its limits of sources"))?;
    if boot.slot.is_worker() {
        reactor
            .listen(boot.listeners, (Rc::clone(&boot.adoption.rx), LONGEST))
            .map_err(cant("watch its listeners"))?;
    }
    let jobs_lane = boot.registry.jobs_lane();
    let enqueue_timeout =
        (boot.settings.jobs.as_ref()).map_or(Duration::MAX, |it| it.enqueue_timeout);
    let records_runs = boot.settings.observe.exports(Histogram::Run);
    let unsent_limit = limits.unfinished;
    let pool_health = WatchedPools::new(
        (&boot.settings, &boot.registry),
        (boot.records.0, boot.generation),
        &boot.kept_lanes,
        monotonic_ms(),
    );
    let service = CallDispatcher {
        access,
        calls: CallScheduler::new(
            Arc::clone(&boot.registry),
            limits.queue,
            Arc::clone(&threads.queue),
        ),
        registry: boot.registry,
        threads,
        forwarding: Forwarding::new(
            (boot.records.0, boot.session_records),
            (boot.record, boot.records.1),
            pool.map_or(0, |pool| pool + 1),
            boot.generation.0,
            SharedPools {
                jobs: JobsLane::new(jobs_lane, millis(enqueue_timeout)),
                kept_lanes: boot.kept_lanes,
                methods: boot.methods,
                ..SharedPools::default()
            },
        ),
        answered_elsewhere: Vec::new(),
        attempts: AttemptTable::new(
            boot.settings.jobs.as_ref(),
            boot.settings.workers.drain_timeout,
        ),
        untaken_batches: VecDeque::new(),
        timers: Timers::default(),
        limits,
        path_listeners,
        source_limits,
        origins: Vec::leak(boot.settings.http_origins.clone()),
        out: Vec::new(),
        now_ms: 0,
        stop_pending: false,
        accept_wait: AcceptDelay::default(),
        stopping: false,
        unfinished: 0,
        unfinished_shares: Shares::default(),
        unsent: UnsentAnswers::new(unsent_limit),
        unused: UnusedConnections::default(),
        met_protocol: None,
        last_call: 0,
        foreign: 0,
        errors: 0,
        pool_health,
        slow: SlowWatch::new(&boot.metrics, asks_master, &waker),
        // Sessions add to the block of their acceptor. If it has died, a pool process can have that block.
        counts: CallCounts::new(boot.metrics, !boot.slot.is_worker(), records_runs),
        tracing: CallTracing::new(boot.settings.trace),
        record: boot.record,
        slot,
        journal,
        quarantine,
    };
    let mut event_loop = EventLoop::new(
        service,
        (boot.link, signals, waker),
        (boot.adoption, boot.stuck),
        show_draining,
        boot.generation,
        &boot.settings.workers,
    );
    // A pool process counts the calls of others and has limits of its own. A session has one client.
    if boot.slot.is_worker() {
        event_loop.recycle_at = recycle_threshold(boot.settings.workers.max_calls);
    }
    let watched = [
        reactor.watch(SIGNALS, &event_loop.signals, Interest::Read),
        reactor.watch(LINK, &event_loop.link, Interest::Read),
        reactor.watch(WAKER, &*event_loop.waker, Interest::Read),
    ];
    let watched: io::Result<()> = watched.into_iter().collect();
    watched.map_err(cant("watch its own descriptors"))?;
    Ok((ManuallyDrop::new(event_loop), reactor))
}

/// Serves until it is time to exit. Then ends the programs and runs the stop hooks.
///
/// # Errors
/// Why the event loop failed.
pub fn serve(
    mut event_loop: ManuallyDrop<EventLoop>,
    mut reactor: ManuallyDrop<Reactor>,
) -> Result<(), (&'static str, io::Error)> {
    let ran = event_loop
        .run(&mut reactor)
        .map_err(|error| ("serve", error));
    match ran {
        Ok(()) => {
            event_loop.leaves(&reactor);
            event_loop.publish_tick();
        }
        // The master must get the reason before its timeout, so do not wait for programs.
        Err(_) => event_loop.drain.leave_now(),
    }
    event_loop.end_programs(&mut reactor);
    ran?;
    finish(event_loop, reactor);
    Ok(())
}

/// Runs the stop hooks of a process that leaves.
pub fn finish(mut event_loop: ManuallyDrop<EventLoop>, reactor: ManuallyDrop<Reactor>) {
    stop_hooks::run_stop_hooks(&mut event_loop);
    event_loop.service.slow.finish();
    turn::end(&mut event_loop.service);
    event_loop.service.access.finish();
    log::debug!("leaves");
    drop(ManuallyDrop::into_inner(reactor));
}
