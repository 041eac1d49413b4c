//! Slow calls on the event loop. Nothing can look at them while they run, so they are recorded at their end.
//!
//! The clock of each inline call would cost more than a short one takes. So the cycles of the processor are
//! counted, and a clock is read only for what seems slow.

use std::sync::Arc;

use super::evidence::Target;
use super::record::{ShownCall, SlowEnd, SlowRecord};
use super::threshold_of;
use crate::handler::trace::CallIdentity;
use crate::link::metrics_board::layout::NAMES;
use crate::sys::cycles::{CycleBase, cycles};
use crate::sys::process::{monotonic_ns, unix_time_ms};
use crate::worker::call_dispatcher::CallDispatcher;
use crate::worker::connection::Connection;
use crate::worker::crash::call_record::CallRef;

/// What is needed to time inline calls.
#[derive(Debug, Clone, Copy)]
pub struct InlineTimer {
    base: CycleBase,
    /// Calls of fewer cycles are not slow; 0: nothing is slow.
    limit: u64,
}

/// When an inline call began, in cycles, and the errors before it; 0: it is not timed.
#[derive(Debug, Clone, Copy)]
pub struct InlineBegin {
    cycles: u64,
    errors: u64,
}

impl InlineTimer {
    pub(super) fn new() -> Self {
        InlineTimer {
            base: CycleBase::now(),
            limit: 0,
        }
    }

    /// Sets the lowest threshold.
    pub(super) fn set(&mut self, lowest_ns: Option<u64>) {
        // No processor counts slower than one cycle per nanosecond. What takes fewer cycles takes less time.
        self.limit = lowest_ns.unwrap_or(0);
    }

    /// Call it before an inline call. `errors` is the number of errors so far.
    #[inline]
    pub fn begin(&self, errors: u64) -> InlineBegin {
        let cycles = if self.limit == 0 { 0 } else { cycles() };
        InlineBegin { cycles, errors }
    }
}

/// An inline call has ended.
#[inline]
pub fn inline_ended(
    service: &mut CallDispatcher,
    begin: InlineBegin,
    call: (usize, &str, CallRef),
    (identity, connection): (&CallIdentity, &Connection),
) {
    if begin.cycles != 0 && cycles().wrapping_sub(begin.cycles) >= service.slow.inline.limit {
        seems_slow(service, begin, call, (identity, connection));
    }
}

#[cold]
fn seems_slow(
    service: &mut CallDispatcher,
    begin: InlineBegin,
    (method, params, mark): (usize, &str, CallRef),
    (identity, connection): (&CallIdentity, &Connection),
) {
    let now_ns = monotonic_ns();
    let read_ns = service.counts.turn_ns();
    let run_ns = service.slow.inline.base.ns_since(begin.cycles);
    // It began in this turn, whatever the counter says.
    let run_ns = run_ns.min(now_ns.saturating_sub(read_ns));
    let (place, threshold_ns) = threshold_of(service, method);
    if run_ns < threshold_ns {
        return;
    }
    let Some(number) = service.slow.count(&service.counts, place, service.now_ms) else {
        return;
    };
    let kinds = service.slow.header.methods.kinds(NAMES);
    let origin = (read_ns, service.accept_wait_ms).into();
    let most = service.slow.header.slow.params();
    let record = SlowRecord {
        call: identity.id(),
        trace_id: (identity.trace()).map_or(0, |trace| trace.into_context().trace_id),
        method: service.registry.name(method).to_owned(),
        kind: kinds.get(place).copied().flatten().unwrap_or("function"),
        params_key: mark.key(),
        received_bytes: params.len(),
        shown: ShownCall::new(origin, connection.peer, (params, most)),
        began_ns: now_ns.saturating_sub(run_ns),
        at_ms: unix_time_ms(),
    };
    let has_failed = service.errors > begin.errors;
    let recorder = &mut service.slow.recorder;
    recorder.begin(number, record, (Target::EventLoop, Arc::default()));
    let end = SlowEnd {
        outcome: if has_failed { "error" } else { "done" },
        code: None,
        run_ns,
        cpu: None,
    };
    recorder.end(number, end);
}
