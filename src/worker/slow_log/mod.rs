//! The slow log of a process: finds the calls that it has run for longer than their threshold.
//!
//! There is no timer per call. One timer is armed while calls run: for the moment at which the oldest of them
//! passes its threshold, and after the lowest threshold at the latest. A call is then handed to a thread
//! (`recorder`), which reads /proc and writes the record. The event loop reads nothing.
//!
//! The process that runs a call records it: a worker, a pool process or a session. The rules are on the metrics
//! board, so a reload also changes what counts as slow for the calls that run.

mod evidence;
mod inline;
mod record;
mod recorder;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::call_counts::CallCounts;
use super::call_dispatcher::CallDispatcher;
use super::call_table::ScheduledCall;
use super::threads::Done;
use super::timers::{CallKey, TimerTarget};
use crate::handler::Placement;
use crate::link::call_frame::CallOrigin;
use crate::link::metrics_board::MetricsAccess;
use crate::link::metrics_board::layout::{BoardHeader, NAMES, OTHER};
use crate::protocol::code::Code;
use crate::protocol::rpc_error::RpcError;
use crate::sys::process::{monotonic_ns, unix_time_ms};
use crate::sys::waker::Waker;
use evidence::Target;
use record::{SlowEnd, SlowRecord};
use recorder::Recorder;

pub use inline::{InlineTimer, inline_ended};
pub use record::ShownCall;

const NS_PER_MS: u64 = 1_000_000;
/// The shortest time between two looks, in milliseconds, so that short thresholds cost little.
const SHORTEST_LOOK_MS: u64 = 5;
/// The time in which at most `lines` records begin.
const SECOND_MS: u64 = 1000;

/// A slow call that runs.
#[derive(Debug, Clone, Copy)]
struct OpenCall {
    /// The number of its record; `None`: it was only counted.
    record: Option<u64>,
    began_ns: u64,
}

/// What a process knows of its slow calls.
#[derive(Debug)]
pub struct SlowWatch {
    header: &'static BoardHeader,
    /// Which version of the rules was seen.
    seen: u64,
    /// See `Timers::arm`.
    timer: u64,
    /// Whether to look in this turn.
    is_due: bool,
    open: BTreeMap<CallKey, OpenCall>,
    recorder: Recorder,
    last_record: u64,
    /// When this second began, and how many records it had.
    second_ms: u64,
    begun: u64,
    /// By method, its place on the board.
    places: BTreeMap<usize, usize>,
    /// The call that `rpc.cancel` ends now.
    pub cancelled: Option<CallKey>,
    pub inline: InlineTimer,
}

impl SlowWatch {
    /// `asks_master` says whether this process dropped from root, so that only the master may read all facts of
    /// its threads. `waker` wakes the event loop.
    pub fn new(metrics: &MetricsAccess, asks_master: bool, waker: &Arc<Waker>) -> Self {
        SlowWatch {
            header: metrics.header,
            seen: 0,
            timer: 0,
            is_due: false,
            open: BTreeMap::new(),
            recorder: Recorder::new(&metrics.block.slow, asks_master, waker),
            last_record: 0,
            second_ms: 0,
            begun: 0,
            places: BTreeMap::new(),
            cancelled: None,
            inline: InlineTimer::new(),
        }
    }

    /// Its timer has expired.
    pub fn expire(&mut self) {
        (self.timer, self.is_due) = (0, true);
    }

    /// Returns what a record is to show of a call and only its dispatcher knows.
    #[inline]
    pub fn shown(&self, origin: CallOrigin, peer: Option<SocketAddr>, params: &str) -> ShownCall {
        match self.header.slow.lowest_ns() {
            None => ShownCall::default(),
            Some(_) => ShownCall::new(origin, peer, (params, self.header.slow.params())),
        }
    }

    /// Returns the lowest threshold; `None` if nothing is slow and no slow call runs.
    #[inline]
    fn lowest_ns(&self) -> Option<u64> {
        let lowest = self.header.slow.lowest_ns();
        lowest.or((!self.open.is_empty()).then_some(u64::MAX))
    }

    fn place(&mut self, method: usize, name: &str) -> usize {
        if let Some(place) = self.places.get(&method) {
            return *place;
        }
        let names = self.header.methods.names(NAMES);
        let Some(place) = names.iter().position(|it| it == name) else {
            return OTHER;
        };
        self.places.insert(method, place);
        place
    }

    /// Counts a slow call of the method at a place. Returns the number of its record; `None` if this second has
    /// had enough.
    fn count(&mut self, counts: &CallCounts, place: usize, now_ms: u64) -> Option<u64> {
        let writer = counts.writer;
        writer.add(&writer.block.slow_calls, 1);
        writer.add(&writer.block.methods[place].slow, 1);
        if now_ms >= self.second_ms + SECOND_MS {
            (self.second_ms, self.begun) = (now_ms, 0);
        }
        self.begun += 1;
        (self.begun <= self.header.slow.lines()).then(|| {
            self.last_record += 1;
            self.last_record
        })
    }
}

/// Looks for slow calls, if that is due. Call it in each turn of the event loop. Returns whether the master is to
/// read what this process may not.
#[must_use]
pub fn watch(service: &mut CallDispatcher) -> bool {
    service
        .slow
        .inline
        .set(service.slow.header.slow.lowest_ns());
    if service.slow.lowest_ns().is_none() {
        return false;
    }
    let slow = &mut service.slow;
    let changes = slow.header.slow.changes();
    slow.is_due |= std::mem::replace(&mut slow.seen, changes) != changes;
    if slow.is_due || slow.timer == 0 && !service.calls.is_empty() {
        look(service);
    }
    service.slow.recorder.takes_question()
}

/// Begins the records of calls that have become slow, and arms the timer for the next look.
fn look(service: &mut CallDispatcher) {
    service.slow.is_due = false;
    let (now_ns, now_ms) = (monotonic_ns(), service.now_ms);
    let lowest_ns = service.slow.header.slow.lowest_ns();
    let mut next_ns = lowest_ns.filter(|_| !service.calls.is_empty());
    let threads = service.threads.calls.keys();
    let with_programs = service.calls.with_programs.iter().copied();
    for key in threads.chain(with_programs).collect::<Vec<_>>() {
        let Some(began_ns) = service.calls.get(key).and_then(running_since) else {
            continue;
        };
        let threshold_ns = threshold_ns(service, key);
        let age_ns = now_ns.saturating_sub(began_ns);
        if age_ns < threshold_ns {
            let left_ns = Some(threshold_ns - age_ns);
            next_ns = [next_ns, left_ns].into_iter().flatten().min();
        } else if !service.slow.open.contains_key(&key) {
            begin(service, key, began_ns, true);
        }
    }
    let CallDispatcher { slow, timers, .. } = service;
    match next_ns {
        // A threshold beyond this will be looked at again.
        Some(left_ns) => {
            let left_ms = left_ns.div_ceil(NS_PER_MS).max(SHORTEST_LOOK_MS);
            timers.arm(
                &mut slow.timer,
                now_ms.saturating_add(left_ms),
                TimerTarget::Slow,
            );
        }
        None => timers.disarm(&mut slow.timer, TimerTarget::Slow),
    }
}

/// Returns since when a call runs in this process, for a caller that waits.
fn running_since(call: &ScheduledCall) -> Option<u64> {
    let is_here = call.is_running() && call.sent_to.is_none() && !call.is_answered;
    call.state.begun_ns().filter(|_| is_here)
}

fn threshold_ns(service: &mut CallDispatcher, key: CallKey) -> u64 {
    let method = service.calls.get(key).map_or(0, |call| call.method);
    threshold_of(service, method).1
}

/// Returns the place of a method on the board, and its threshold.
fn threshold_of(service: &mut CallDispatcher, method: usize) -> (usize, u64) {
    let place = service.slow.place(method, service.registry.name(method));
    (place, service.slow.header.slow.threshold_ns(place))
}

/// Counts a slow call and begins its record, if there is room for one. `runs` says whether it still runs.
fn begin(service: &mut CallDispatcher, key: CallKey, began_ns: u64, runs: bool) {
    let Some(call) = service.calls.get(key) else {
        return;
    };
    let method = call.method;
    let place = service.slow.place(method, service.registry.name(method));
    let record = (service.slow).count(&service.counts, place, service.now_ms);
    service.slow.open.insert(key, OpenCall { record, began_ns });
    let (Some(number), Some(call)) = (record, service.calls.get(key)) else {
        return;
    };
    let kinds = service.slow.header.methods.kinds(NAMES);
    let kind = kinds.get(place).copied().flatten().unwrap_or("function");
    let identity = call.state.identity();
    let record = SlowRecord {
        call: identity.id(),
        trace_id: (identity.trace()).map_or(0, |trace| trace.into_context().trace_id),
        method: service.registry.name(method).to_owned(),
        kind,
        params_key: call.state.key(),
        received_bytes: call.size,
        shown: call.shown.clone(),
        began_ns,
        at_ms: unix_time_ms(),
    };
    let number_here = identity.number;
    let state = Arc::clone(&call.state);
    let target = match service.registry.methods()[method].handler.placement() {
        _ if !runs => Target::Ended,
        Placement::Pool(number) => match service.threads.pools().program_of(key) {
            Some(program) => {
                let pools = service.registry.all_pools();
                let name = pools.get(number).map_or("", |pool| pool.name());
                Target::Program(program, name.to_owned())
            }
            None => Target::Ended,
        },
        _ if kind == "command" => Target::Command(number_here),
        _ => Target::Thread(service.threads.calls.thread_of(key.serial)),
    };
    (service.slow.recorder).begin(number, record, (target, state));
}

/// A call has ended. Call it before its result is taken out of the table.
#[inline]
pub fn ended(service: &mut CallDispatcher, done: &Done) {
    let took_ns = done.took.as_nanos() as u64;
    if let Some(lowest_ns) = service.slow.lowest_ns()
        && (took_ns >= lowest_ns || !service.slow.open.is_empty())
    {
        end_slow(service, done, took_ns);
    }
}

#[cold]
fn end_slow(service: &mut CallDispatcher, done: &Done, took_ns: u64) {
    let key = done.key;
    let is_over = |call: &ScheduledCall| call.is_answered || call.sent_to.is_some();
    if service.calls.get(key).is_none_or(is_over) {
        return;
    }
    let (outcome, code) = match &done.outcome {
        Some(Ok(_)) => ("done", None),
        Some(Err(error)) => of_error(error),
        None => return,
    };
    let cpu = (!done.cpu.is_zero()).then_some(done.cpu);
    end(service, key, took_ns, (outcome, code, cpu));
}

/// Completes the record of a call that ran for `run_ns`. If it was slow and no look has found it, the record
/// begins first.
fn end(
    service: &mut CallDispatcher,
    key: CallKey,
    run_ns: u64,
    (outcome, code, cpu): (&'static str, Option<&'static str>, Option<Duration>),
) {
    if !service.slow.open.contains_key(&key) {
        if run_ns < threshold_ns(service, key) {
            return;
        }
        begin(service, key, monotonic_ns().saturating_sub(run_ns), false);
    }
    if let Some(open) = service.slow.open.remove(&key)
        && let Some(record) = open.record
    {
        let end = SlowEnd {
            outcome,
            code,
            run_ns,
            cpu,
        };
        service.slow.recorder.end(record, end);
    }
}

/// A call is about to be given up: it timed out, or its caller is gone or has cancelled it.
pub fn given_up(service: &mut CallDispatcher, key: CallKey) {
    if service.slow.lowest_ns().is_none() {
        return;
    }
    let Some(call) = service.calls.get(key) else {
        return;
    };
    let open = service.slow.open.get(&key).map(|open| open.began_ns);
    let Some(began_ns) = open.or_else(|| running_since(call)) else {
        return;
    };
    let (outcome, code) = match service.slow.cancelled.take() {
        _ if service.now_ms >= call.deadline_ms => ("timeout", Code::Timeout.name()),
        cancelled if cancelled == Some(key) || !call.is_own() => {
            ("cancelled", Code::Cancelled.name())
        }
        _ => ("disconnected", Code::Cancelled.name()),
    };
    let run_ns = monotonic_ns().saturating_sub(began_ns);
    end(service, key, run_ns, (outcome, Some(code), None));
}

fn of_error(error: &RpcError) -> (&'static str, Option<&'static str>) {
    match error.table_code() {
        Some(code @ Code::Timeout) => ("timeout", Some(code.name())),
        Some(code @ Code::Crashed) => ("crashed", Some(code.name())),
        Some(code @ Code::Cancelled) => ("cancelled", Some(code.name())),
        Some(code) => ("error", Some(code.name())),
        None => ("error", Some("handler")),
    }
}
