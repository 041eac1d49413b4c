//! Runs a worker: one event loop and a pool of handler threads. Pool processes and sessions are workers
//! with other parts.
//!
//! `run` is the code of a forked child from its first instruction to `_exit`; it never returns to the
//! master's code. A panic of the loop is logged and ends the worker, and the master replaces it. A panic
//! of a handler is answered as an error.

mod accepting;
mod access_log;
mod active_rebalance;
mod assembly;
mod attempts;
mod batch;
mod call_counts;
mod call_dispatcher;
mod call_errors;
mod call_room;
mod call_scheduler;
mod call_table;
mod call_tracing;
mod connection;
mod connection_room;
mod connections;
mod crash;
mod deadlines;
mod drain;
mod event_loop;
mod fair_queue;
mod forwarding;
mod handoff;
mod input_parser;
mod job_calls;
mod jobs_lane;
mod lane;
mod link_requests;
mod method_stats;
mod orders;
mod path_listeners;
pub mod peer;
mod peer_calls;
mod peer_frames;
mod pool_health;
mod pool_update;
pub mod post_fork;
mod publishing;
mod ranking;
mod rebalance;
mod recycle_check;
pub mod refused_connections;
mod remote_calls;
mod run_queue;
pub mod session;
mod session_state;
mod shares;
mod slow_log;
mod source_limits;
mod startup;
mod stop_hooks;
mod thread_calls;
mod threads;
mod timers;
mod turns;
mod unsent;
mod unused_connections;

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use crate::logging;
use crate::sys::process::exit_now;
use crate::sys::signal;
use crate::worker_init::WorkerInit;

use assembly::{build, serve};
use path_listeners::PathListeners;

/// The exit code of a worker that could not start (EX_OSERR, sysexits(3head)).
const CANT_START: i32 = 71;
/// The exit code for a bug of preforkd (EX_SOFTWARE).
const BUG: i32 = 70;
/// How long an exiting worker waits until its last log lines are written.
const LOG_FLUSH_LIMIT: Duration = Duration::from_millis(250);

/// Runs the worker, pool process or session in a newly forked child in which all signals are blocked.
pub fn run(boot: WorkerInit<'_>) -> ! {
    run_as(boot, live)
}

/// Runs `live` as the whole life of a forked child, and exits with its result. Never returns.
pub fn run_as<'a>(
    boot: WorkerInit<'a>,
    live: fn(WorkerInit<'a>) -> Result<(), (&'static str, io::Error)>,
) -> ! {
    let role = boot.slot.role();
    let lived = catch_unwind(AssertUnwindSafe(|| live(boot)));
    let code = match lived {
        Ok(Ok(())) => 0,
        Ok(Err((attempt, error))) => {
            log::error!(
                "this {role} could not {attempt}: {error}; it exits, and the master decides what follows"
            );
            CANT_START
        }
        // The panic hook has logged it.
        Err(_) => BUG,
    };
    if code != 0 {
        signal::record_own_fault();
    }
    logging::flush(LOG_FLUSH_LIMIT);
    exit_now(code)
}

fn live(mut boot: WorkerInit<'_>) -> Result<(), (&'static str, io::Error)> {
    if boot.slot.session().is_some() {
        return session::live(boot);
    }
    let is_awaited = boot.startup_log_tx.is_some();
    logging::start_forwarding(boot.startup_log_tx.take());
    let (signals, keeping) = post_fork::init_worker_process(&mut boot)?;
    let pool = boot.slot.pool();
    let configured = boot.settings.listen.iter();
    let shared = configured.filter(|listen| listen.isolation.is_none());
    let path_listeners = PathListeners::of(shared, &boot.listeners);
    let (role, name) = (boot.role(), boot.name());
    let (title, program) = (boot.title, boot.program.clone());
    let show_draining = Box::new(move || {
        if let Some(area) = title {
            area.set(&format!("{program}: {role} {name} draining"));
        }
    });
    let (mut event_loop, reactor) = build(boot, signals, keeping, path_listeners, show_draining)?;
    event_loop.waits_for_pools = is_awaited && pool.is_none();
    serve(event_loop, reactor)
}
