//! Calls the program's functions for the end of a worker (`on_worker_stop`).
//!
//! They may use the rest of the drain time, on a separate thread. So nothing that they wait for keeps the
//! worker from exiting, or from getting the order to exit at once.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, bounded};

use super::event_loop::EventLoop;
use super::timers::millis;
use crate::sys::process::{monotonic, monotonic_ms};
use crate::sys::signal;

/// The time between two checks for a signal; each check records a heartbeat.
const LOOK: Duration = Duration::from_millis(100);

/// Calls the program's functions, if there are any, and waits for them until the end of the drain time.
pub fn run_stop_hooks(event_loop: &mut EventLoop) {
    let registry = &event_loop.service.registry;
    let Some(limit_ms) = event_loop.drain.stop_hook_budget_ms(monotonic_ms()) else {
        return;
    };
    if !registry.has_stop_hooks() {
        return;
    }
    let registry = Arc::clone(registry);
    let (done, wait) = bounded::<()>(0);
    let body = move || {
        registry.stop_worker();
        drop(done);
    };
    let builder = thread::Builder::new().name("stop".into());
    let spoken = signal::with_signals_blocked(|| builder.spawn(body));
    if let Err(error) = spoken {
        return log::warn!(
            "on_worker_stop is not called, because no thread could be started: {error}"
        );
    }
    let end = monotonic() + Duration::from_millis(limit_ms);
    loop {
        let now = monotonic();
        let left = end.saturating_sub(now);
        let heartbeat = &event_loop.service.record.heartbeat_ms;
        heartbeat.store(millis(now), Relaxed);
        if let Some(session) = &event_loop.session {
            session.beat(millis(now));
        }
        match wait.recv_timeout(left.min(LOOK)) {
            Err(RecvTimeoutError::Timeout) if left.is_zero() => {
                return log::warn!(
                    "on_worker_stop did not finish within the drain time: this worker exits without \
                     waiting for it; make it faster, or raise workers.drain-timeout"
                );
            }
            // A signal during this time (TERM or QUIT) ends the wait.
            Err(RecvTimeoutError::Timeout) if event_loop.signals.take().is_empty() => {}
            _ => return,
        }
    }
}
