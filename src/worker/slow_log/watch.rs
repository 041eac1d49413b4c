//! Finds the calls that this process has run for longer than their threshold.
//!
//! There is no timer per call. While calls run, one timer is armed. It expires when the oldest call passes its
//! threshold, but at the latest after the lowest threshold. A call is then handed to a thread (`recorder`), which
//! reads /proc and writes the record. The event loop reads nothing.
//!
//! The process that runs a call records it: a worker, a pool process or a session. The rules are on the metrics
//! board, so a reload also changes what counts as slow for the calls that run.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::evidence::Target;
use super::inline::{InlineBegin, InlineTimer};
use super::record::{ShownCall, SlowEnd, SlowRecord};
use super::recorder::Recorder;
use crate::handler::Placement;
use crate::handler::registry::Registry;
use crate::handler::trace::CallIdentity;
use crate::link::call_frame::CallOrigin;
use crate::link::metrics_board::MetricsAccess;
use crate::link::metrics_board::layout::{BoardHeader, NAMES, OTHER};
use crate::protocol::code::Code;
use crate::protocol::rpc_error::RpcError;
use crate::sys::process::monotonic_ns;
use crate::sys::waker::Waker;
use crate::worker::call_counts::CallCounts;
use crate::worker::call_scheduler::CallScheduler;
use crate::worker::call_table::ScheduledCall;
use crate::worker::crash::call_record::CallRef;
use crate::worker::threads::{Done, Threads};
use crate::worker::timers::{CallKey, TimerTarget, Timers};

const NS_PER_MS: u64 = 1_000_000;
/// The shortest time between two checks, in milliseconds, so that short thresholds cost little.
const SHORTEST_LOOK_MS: u64 = 5;
/// The time in which at most `lines` records begin.
const SECOND_MS: u64 = 1000;
/// How long the last records may take when the process exits.
const LAST_RECORDS: Duration = Duration::from_millis(250);

/// A slow call that runs.
#[derive(Debug, Clone, Copy)]
struct OpenCall {
    /// The number of its record; `None`: it was only counted.
    record: Option<u64>,
    began_ns: u64,
}

/// The state of the process that the watch needs: its calls, their methods, its counters, and the time in
/// milliseconds.
type Around<'a> = (&'a CallScheduler, &'a Registry, &'a CallCounts, u64);

/// How an inline call is described: the number of its method, its name, its params and its journal entry.
type InlineCall<'a> = (usize, &'a str, &'a str, CallRef);

/// What a process knows about its slow calls.
#[derive(Debug)]
pub struct SlowWatch {
    header: &'static BoardHeader,
    /// Which version of the rules was seen.
    seen: u64,
    /// See `Timers::arm`.
    timer: u64,
    /// Whether to check in this turn.
    is_due: bool,
    open: BTreeMap<CallKey, OpenCall>,
    recorder: Recorder,
    last_record: u64,
    /// When this second began, and how many records it had.
    second_ms: u64,
    begun: u64,
    /// The place of each method on the metrics board, by the number of the method.
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

    /// Waits until all records are written, at most for `LAST_RECORDS`. Call it before the process exits.
    pub fn finish(&mut self) {
        self.recorder.finish(LAST_RECORDS);
    }

    /// Handles its timer, which has expired.
    pub fn expire(&mut self) {
        (self.timer, self.is_due) = (0, true);
    }

    /// Returns the facts about a call for its record that only the dispatcher knows.
    #[inline]
    pub fn shown(&self, origin: CallOrigin, peer: Option<SocketAddr>, params: &str) -> ShownCall {
        match self.header.slow.lowest_ns() {
            None => ShownCall::default(),
            Some(_) => ShownCall::new(origin, peer, (params, self.header.slow.params())),
        }
    }

    /// Returns the lowest threshold; `u64::MAX` if no method has one but a slow call runs, `None` if none runs either.
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

    /// Looks for slow calls, if that is due. Call it in each turn of the event loop. Returns whether the master must be
    /// asked for facts that this process may not read.
    #[must_use]
    pub fn watch(
        &mut self,
        around: Around<'_>,
        (threads, timers): (&mut Threads, &mut Timers),
    ) -> bool {
        self.inline.set(self.header.slow.lowest_ns());
        if self.lowest_ns().is_none() {
            return false;
        }
        let changes = self.header.slow.changes();
        self.is_due |= std::mem::replace(&mut self.seen, changes) != changes;
        if self.is_due || self.timer == 0 && !around.0.is_empty() {
            self.look(around, (threads, timers));
        }
        self.recorder.takes_question()
    }

    /// Begins the records of calls that have become slow, and arms the timer for the next look.
    fn look(&mut self, around: Around<'_>, (threads, timers): (&mut Threads, &mut Timers)) {
        self.is_due = false;
        let (calls, _, _, now_ms) = around;
        let now_ns = monotonic_ns();
        let lowest_ns = self.header.slow.lowest_ns();
        let mut next_ns = lowest_ns.filter(|_| !calls.is_empty());
        let on_threads = threads.calls.keys();
        let keys = on_threads.chain(calls.with_programs.iter().copied());
        for key in keys.collect::<Vec<_>>() {
            let Some((call, began_ns)) = running(calls, key) else {
                continue;
            };
            let threshold_ns = self.threshold(around.1, call.method).1;
            let age_ns = now_ns.saturating_sub(began_ns);
            if age_ns < threshold_ns {
                let left_ns = Some(threshold_ns - age_ns);
                next_ns = [next_ns, left_ns].into_iter().flatten().min();
            } else if !self.open.contains_key(&key) {
                let find = |kind: &str| target(call, key, kind, (around.1, threads));
                self.begin(around, (key, call), began_ns, find);
            }
        }
        match next_ns {
            Some(left_ns) => {
                let left_ms = left_ns.div_ceil(NS_PER_MS).max(SHORTEST_LOOK_MS);
                let at = now_ms.saturating_add(left_ms);
                timers.arm(&mut self.timer, at, TimerTarget::Slow);
            }
            None => timers.disarm(&mut self.timer, TimerTarget::Slow),
        }
    }

    /// Returns the place of a method on the board, and its threshold.
    fn threshold(&mut self, registry: &Registry, method: usize) -> (usize, u64) {
        let place = self.place(method, registry.name(method));
        (place, self.header.slow.threshold_ns(place))
    }

    /// Counts a slow call and begins its record, if there is room for one. `find` says what runs it.
    fn begin(
        &mut self,
        (_, registry, counts, now_ms): Around<'_>,
        (key, call): (CallKey, &ScheduledCall),
        began_ns: u64,
        find: impl FnOnce(&str) -> Target,
    ) {
        let (place, _) = self.threshold(registry, call.method);
        let record = self.count(counts, place, now_ms);
        self.open.insert(key, OpenCall { record, began_ns });
        let Some(number) = record else {
            return;
        };
        let kind = self.kind(place);
        let record = SlowRecord {
            params_key: call.state.key(),
            received_bytes: call.size,
            shown: call.shown.clone(),
            began_ns,
            ..SlowRecord::new(call.state.identity(), registry.name(call.method), kind)
        };
        let state = Arc::clone(&call.state);
        self.recorder.begin(number, record, (find(kind), state));
    }

    fn kind(&self, place: usize) -> &'static str {
        let kinds = self.header.methods.kinds(NAMES);
        kinds.get(place).copied().flatten().unwrap_or("function")
    }

    /// Handles a call that has ended. Call it while the call is still in the table.
    #[inline]
    pub fn ended(&mut self, around: Around<'_>, done: &Done) {
        let took_ns = done.took.as_nanos() as u64;
        if let Some(lowest_ns) = self.lowest_ns()
            && (took_ns >= lowest_ns || !self.open.is_empty())
        {
            self.end_slow(around, done, took_ns);
        }
    }

    #[cold]
    fn end_slow(&mut self, around: Around<'_>, done: &Done, took_ns: u64) {
        let is_here = |call: &&ScheduledCall| !call.is_answered && call.sent_to.is_none();
        let Some(call) = around.0.get(done.key).filter(is_here) else {
            return;
        };
        let (outcome, code) = match &done.outcome {
            Some(Ok(_)) => ("done", None),
            Some(Err(error)) => of_error(error),
            None => return,
        };
        let cpu = Some(done.runner.cpu).filter(|cpu| !cpu.is_zero());
        let end = SlowEnd {
            outcome,
            code,
            run_ns: took_ns,
            cpu,
        };
        self.end(around, (done.key, call), end);
    }

    /// Completes the record of a call. If it was slow and no look has found it, the record begins first.
    fn end(&mut self, around: Around<'_>, (key, call): (CallKey, &ScheduledCall), end: SlowEnd) {
        if !self.open.contains_key(&key) {
            if end.run_ns < self.threshold(around.1, call.method).1 {
                return;
            }
            let began_ns = monotonic_ns().saturating_sub(end.run_ns);
            self.begin(around, (key, call), began_ns, |_| Target::Ended);
        }
        if let Some(open) = self.open.remove(&key)
            && let Some(record) = open.record
        {
            self.recorder.end(record, end);
        }
    }

    /// Handles a call that is about to be given up: it timed out, or its caller is gone or has cancelled it.
    #[inline]
    pub fn given_up(&mut self, around: Around<'_>, key: CallKey) {
        if self.lowest_ns().is_some() {
            self.give_up(around, key);
        }
    }

    #[cold]
    fn give_up(&mut self, around: Around<'_>, key: CallKey) {
        let (calls, _, _, now_ms) = around;
        let cancelled = self.cancelled.take();
        let Some(call) = calls.get(key) else {
            return;
        };
        let open = self.open.get(&key).map(|open| open.began_ns);
        let Some(began_ns) = open.or_else(|| Some(running(calls, key)?.1)) else {
            return;
        };
        let outcome = match cancelled {
            _ if now_ms >= call.deadline_ms => "timeout",
            cancelled if cancelled == Some(key) || !call.is_own() => "cancelled",
            _ => "disconnected",
        };
        let code = match outcome {
            "timeout" => Code::Timeout,
            _ => Code::Cancelled,
        };
        let end = SlowEnd {
            outcome,
            code: Some(code.name()),
            run_ns: monotonic_ns().saturating_sub(began_ns),
            cpu: None,
        };
        self.end(around, (key, call), end);
    }

    /// Handles an inline call that has ended. `errors` is the number of errors so far, and `waited_ms` how long the
    /// connection of the call waited.
    #[inline]
    pub fn inline_ended(
        &mut self,
        begin: InlineBegin,
        call: InlineCall<'_>,
        (identity, peer): (&CallIdentity, Option<SocketAddr>),
        (counts, now_ms, errors, waited_ms): (&CallCounts, u64, u64, u64),
    ) {
        if self.inline.seems_slow(begin) {
            let origin = (counts.turn_ns(), waited_ms).into();
            let shown = (call.2, self.header.slow.params());
            let shown = ShownCall::new(origin, peer, shown);
            let has_failed = errors > begin.errors;
            self.end_inline(begin, call, (identity, shown), (counts, now_ms, has_failed));
        }
    }

    #[cold]
    fn end_inline(
        &mut self,
        begin: InlineBegin,
        (method, name, params, mark): InlineCall<'_>,
        (identity, shown): (&CallIdentity, ShownCall),
        (counts, now_ms, has_failed): (&CallCounts, u64, bool),
    ) {
        let now_ns = monotonic_ns();
        // It began in this turn, whatever the cycles say.
        let run_ns = self.inline.ns_since(begin);
        let run_ns = run_ns.min(now_ns.saturating_sub(counts.turn_ns()));
        let place = self.place(method, name);
        if run_ns < self.header.slow.threshold_ns(place) {
            return;
        }
        let Some(number) = self.count(counts, place, now_ms) else {
            return;
        };
        let record = SlowRecord {
            params_key: mark.key(),
            received_bytes: params.len(),
            shown,
            began_ns: now_ns.saturating_sub(run_ns),
            ..SlowRecord::new(identity, name, self.kind(place))
        };
        let end = SlowEnd {
            outcome: if has_failed { "error" } else { "done" },
            code: None,
            run_ns,
            cpu: None,
        };
        let target = (Target::EventLoop, Arc::default());
        self.recorder.begin(number, record, target);
        self.recorder.end(number, end);
    }
}

/// Returns a call that runs in this process for a caller that waits, and when its handler began.
fn running(calls: &CallScheduler, key: CallKey) -> Option<(&ScheduledCall, u64)> {
    let call = calls.get(key)?;
    let is_here = call.is_running() && call.sent_to.is_none() && !call.is_answered;
    let began_ns = call.state.begun_ns().filter(|_| is_here)?;
    Some((call, began_ns))
}

/// Returns what runs a call.
fn target(
    call: &ScheduledCall,
    key: CallKey,
    kind: &str,
    (registry, threads): (&Registry, &mut Threads),
) -> Target {
    match registry.methods()[call.method].handler.placement() {
        Placement::Pool(number) => match threads.pools().program_of(key) {
            Some(program) => {
                let name = registry
                    .all_pools()
                    .get(number)
                    .map_or("", |pool| pool.name());
                Target::Program(program, name.to_owned())
            }
            None => Target::Ended,
        },
        _ if kind == "command" => Target::Command(call.state.identity().number),
        _ => Target::Thread(threads.calls.thread_of(key.serial)),
    }
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
