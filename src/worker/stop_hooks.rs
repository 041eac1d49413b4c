//! The end of a worker, told to the program: `on_worker_stop`.
//!
//! It has what is left of the drain, and a thread of its own, so that nothing it waits for keeps
//! the worker from leaving, or from being told to leave at once.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, bounded};

use super::call_dispatcher::millis;
use super::event_loop::EventLoop;
use crate::sys::process::{monotonic, monotonic_ms};

/// Between two looks for a signal, with a heartbeat each.
const LOOK: Duration = Duration::from_millis(100);

/// Lets the program say its last words, if it has any.
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
    let spoken = thread::Builder::new().name("stop".into()).spawn(move || {
        registry.stop_worker();
        drop(done);
    });
    if let Err(error) = spoken {
        return log::warn!("on_worker_stop is not called, for want of a thread: {error}");
    }
    let end = monotonic() + Duration::from_millis(limit_ms);
    loop {
        let now = monotonic();
        let left = end.saturating_sub(now);
        let heartbeat = &event_loop.service.record.heartbeat_ms;
        heartbeat.store(millis(now), Relaxed);
        match wait.recv_timeout(left.min(LOOK)) {
            Err(RecvTimeoutError::Timeout) if left.is_zero() => {
                return log::warn!(
                    "on_worker_stop is not done, and the drain is over: this worker leaves without \
                     it; make it quicker, or raise workers.drain-timeout"
                );
            }
            // A signal now, TERM or QUIT, says that it has waited long enough.
            Err(RecvTimeoutError::Timeout) if event_loop.signals.take().is_empty() => {}
            _ => return,
        }
    }
}
