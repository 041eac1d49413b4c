//! Runs the jobs process: the only process that opens the store.
//!
//! It is a child of the master beside the workers, with an event loop and two threads for the store. Workers, sessions
//! and pool processes reach it over internal links. During a reload each generation has its own jobs process, and both
//! use the store.
//!
//! - [`event_loop`]: orders of the master, and how it drains and exits
//! - [`frames`]: what other processes send; [`replies`]: what the store replies. Both pass it on
//! - [`core`]: the state that the parts share; [`ticket`]: what a request to the store was made for
//! - [`commands`], [`command_tasks`]: the commands of operators; [`status`]: what `status` shows of the store
//! - [`calls`]: the methods `rpc.job.*`; [`waits`]: the calls of `rpc.job.wait`
//! - [`links`]: the links to other processes
//! - [`attempts`]: the attempts of jobs; [`executors`], [`executor`]: which process runs which; [`claims`],
//!   [`claiming`]: when and for which process jobs are claimed; [`comparison`]: what the store and the processes know
//! - [`store_handle`]: requests to the threads of the store; [`store_event`]: what these report
//! - [`writer`], [`reader`]: the threads; [`pending`]: the requests that wait for the next group; [`health`]: when a
//!   store that is away is tried again; [`leftovers`]: which processes must be gone before this instance begins
//!
//! A store that cannot be used ends the process at its start, and so fails the start or reload. Later faults end it
//! only after a failed sync.

mod attempts;
mod calls;
mod claiming;
mod claims;
mod command_tasks;
mod commands;
mod comparison;
mod core;
mod event_loop;
mod executor;
mod executors;
mod frames;
mod health;
mod leftovers;
mod links;
mod lost_executors;
mod pending;
mod reader;
mod replies;
mod schedule;
mod status;
mod store_event;
mod store_handle;
mod store_mark;
mod ticket;
mod waits;
mod writer;

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::sync::Arc;

use self::command_tasks::Commands;
use self::core::{JobsCore, has_other_process};
use event_loop::{JobsLoop, LINK, LoopParts, SIGNALS, WAKER};
use executor::ExecutorLimits;
use executors::Executors;
use links::JobLinks;
use store_handle::StoreHandle;
use store_mark::StoreMark;
use waits::Waits;

use crate::jobs::figures::JobFigures;
use crate::jobs::store::request::{InstanceInfo, StoreCounts};
use crate::link::call_frame::longest_payload;
use crate::logging;
use crate::protocol::job_id::JobId;
use crate::sys::event::{Interest, Reactor};
use crate::sys::memory;
use crate::sys::process::monotonic_ms;
use crate::sys::waker::Waker;
use crate::worker;
use crate::worker_init::WorkerInit;

/// The arenas of the allocator: one for the loop, one for the threads of the store.
const ARENAS: i32 = 2;

/// Runs the jobs process in a new child, with all signals blocked.
pub fn run(boot: WorkerInit<'_>) -> ! {
    worker::run_as(boot, live)
}

fn live(mut boot: WorkerInit<'_>) -> Result<(), (&'static str, io::Error)> {
    let is_awaited = boot.startup_log_tx.is_some();
    logging::start_forwarding(boot.startup_log_tx.take());
    let (signals, _) = worker::post_fork::init_worker_process(&mut boot)?;
    memory::limit_malloc_arenas(ARENAS);
    logging::init_worker_log(boot.slot.0, false);
    let missing = || ("start", io::Error::other("the configuration has no [jobs]"));
    let config = boot.settings.jobs.clone().ok_or_else(missing)?;
    let instance = boot.jobs.take().ok_or_else(missing)?;
    let waker = Arc::new(Waker::new().map_err(|error| ("make a waker", error))?);
    let info = InstanceInfo {
        id: JobId(instance.id),
        host: host(),
        pid: boot.master.0,
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let (own, records) = (info.id, boot.records);
    let is_shared = Box::new(move || has_other_process(records));
    let mark = StoreMark::new(records, &instance);
    let store = StoreHandle::start(
        &config,
        info,
        (instance, is_awaited),
        (mark, is_shared),
        &waker,
    )
    .map_err(|error| ("start the threads of the store", error))?;
    let methods = boot.registry.methods().iter();
    let counters = JobFigures::new(&boot.metrics, methods.map(|method| method.name.as_str()));
    let plan = attempts::plan(&boot.registry);
    let pools = boot.registry.pools().iter().map(|pool| pool.capacity());
    let limits = ExecutorLimits {
        places: [config.concurrency].into_iter().chain(pools).collect(),
        generation: worker::peer::shown_generation(boot.generation.0),
        longest_params: longest_payload(boot.settings.limits.frame),
    };
    let core = JobsCore {
        executors: Executors::new(own, config.clone(), plan, limits),
        config,
        limits: boot.settings.limits.clone(),
        commands: Commands::new(&waker, &boot.registry),
        registry: boot.registry,
        instance: own,
        links: JobLinks::new(boot.settings.limits.frame),
        store,
        awaited: HashMap::new(),
        awaited_until: BTreeSet::new(),
        waits: Waits::default(),
        looks: 0,
        counters,
        is_counting: false,
        has_changed: true,
        count_times: (0, 0),
        counts: StoreCounts::default(),
        unserved: BTreeSet::new(),
        now_ms: monotonic_ms(),
        is_draining: false,
        calls: 0,
        records,
    };
    let (title, program) = (boot.title, boot.program.clone());
    let show_draining = Box::new(move || {
        if let Some(area) = title {
            area.set(&format!("{program}: jobs draining"));
        }
    });
    let mut reactor = Reactor::new().map_err(|error| ("create the epoll instance", error))?;
    let watched = [
        reactor.watch(SIGNALS, &signals, Interest::Read),
        reactor.watch(LINK, &boot.link, Interest::Read),
        reactor.watch(WAKER, &*waker, Interest::Read),
    ];
    let watched: io::Result<()> = watched.into_iter().collect();
    watched.map_err(|error| ("watch its own descriptors", error))?;
    let mut event_loop = JobsLoop::new(LoopParts {
        core,
        link: boot.link,
        signals,
        waker,
        generation: boot.generation,
        record: boot.record,
        drain_timeout: boot.settings.longest_drain(),
        heartbeat_timeout: boot.settings.workers.heartbeat_timeout,
        show_draining,
    });
    event_loop
        .run(&mut reactor)
        .map_err(|error| ("serve", error))
}

/// Returns the name of this machine, for the store.
fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname");
    name.unwrap_or_default().trim().to_owned()
}
