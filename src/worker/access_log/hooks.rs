//! Collects what the line of a call says, when the dispatcher takes the call and when it answers it.
//!
//! Without `[access-log]` each hook is one comparison. A line is kept until the end of the turn of the event loop,
//! after the calls of the turn are counted: so there are never more lines than calls. Inline calls share the time of
//! that end, as in the metrics.

use std::borrow::Cow;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use super::line::{
    AccessLine, CallStart, LineProcess, LineTrace, LineWriter, cut_method, form_name,
};
use super::queue::{LineOutput, LineQueue, LineSink, QUEUE};
use super::rules::AccessRules;
use crate::handler::trace::{self, CallIdentity};
use crate::link::metrics_board::BlockWriter;
use crate::link::metrics_board::layout::{NAMES, OTHER, labels};
use crate::link::session_table::SessionRecord;
use crate::logging::AccessFile;
use crate::protocol::body::Form;
use crate::protocol::call::is_reserved;
use crate::protocol::code::Code;
use crate::protocol::rpc_error::RpcError;
use crate::sys::process::{Pid, monotonic_ns};
use crate::worker::call_counts::{CallCounts, CountedCall};
use crate::worker::call_table::FinishedCall;
use crate::worker::connection::Connection;
use crate::worker::crash::call_record::CallRef;
use crate::worker_init::WorkerInit;

/// How long the last lines may take when the process exits.
const LAST_LINES: Duration = Duration::from_millis(250);
/// The total time of a line whose call is not over.
const OPEN: u64 = u64::MAX;
/// The kind of the methods of the protocol.
const BUILTIN: &str = labels::KINDS[0];

/// The access log of a process.
#[derive(Debug, Default)]
pub struct AccessLog {
    /// `None` without the table.
    active: Option<Box<ActiveLog>>,
    /// The `X-Request-Id` of the current HTTP request.
    pub request_id: Option<Box<str>>,
}

#[derive(Debug)]
struct ActiveLog {
    rules: AccessRules,
    pid: i32,
    /// Name and kind by the place of a method on the metrics board.
    methods: Box<[(&'static str, &'static str)]>,
    /// The call that is taken or answered now.
    current: Box<CallStart>,
    /// The lines of this turn.
    lines: Vec<AccessLine>,
    /// Inline calls of this turn without a line.
    exempt: u64,
    file: Option<Arc<AccessFile>>,
    queue: LineQueue,
    counts: BlockWriter,
}

/// An answer: its form, the error that it has, and the bytes of its body.
pub type AnswerFacts<'a> = (Form, Option<&'a RpcError>, usize);

/// How the call of an answer is counted: where, how, and the number of the last call that was read.
type AnswerCounts<'a> = (&'a CallCounts, CountedCall, u64);

impl AccessLog {
    /// Makes the access log of this process, if its generation has one.
    pub fn new(boot: &WorkerInit<'_>, session: Option<&'static SessionRecord>) -> Self {
        let active = boot.settings.access_log.as_ref().and_then(|config| {
            // A pool process has no calls of its own.
            let is_home = boot.slot.is_worker() || session.is_some();
            let is_shown = config.file.is_some() || log::log_enabled!(log::Level::Info);
            let file = boot.access_file.clone();
            let sink = match (&config.file, &file) {
                (Some(_), Some(file)) => LineSink::File(Arc::clone(file)),
                (Some(_), None) => return None,
                (None, _) => LineSink::Log,
            };
            (is_home && is_shown).then(|| {
                let writer = LineWriter::new(line_process(boot), config.format);
                let counts = BlockWriter::new(boot.metrics.block, session.is_some());
                let output = LineOutput::new((sink, writer), counts, session);
                if session.is_none() {
                    let block = counts.block;
                    block.access.begin(block.all_calls());
                }
                trace::sample(config.sample);
                let methods = method_table(boot);
                let place = |name: &str| {
                    let found = methods.iter().position(|(it, _)| *it == name);
                    found.unwrap_or(OTHER)
                };
                Box::new(ActiveLog {
                    rules: AccessRules::new(config, place),
                    pid: Pid::current().0,
                    methods,
                    current: Box::default(),
                    lines: Vec::new(),
                    exempt: 0,
                    file,
                    queue: LineQueue::new(output),
                    counts,
                })
            })
        });
        AccessLog {
            active,
            request_id: None,
        }
    }

    /// Returns whether there are lines.
    #[inline]
    pub fn is_on(&self) -> bool {
        self.active.is_some()
    }

    /// Writes to another file from now on.
    pub fn reopen(&self, by: Option<OwnedFd>) {
        let file = self.active.as_ref().and_then(|it| it.file.as_ref());
        match (file, by) {
            (Some(file), Some(by)) => {
                if let Err(error) = file.replace(by) {
                    log::warn!("the access log continues in the old file: {error}");
                }
            }
            (Some(_), None) => log::warn!(
                "the reopened access log was not received, because no descriptor is left: this process \
                 continues with the old one"
            ),
            (None, _) => {}
        }
    }

    /// Begins the line of a call that was read: its number, and the bytes of its body. `times` are when it was read, in
    /// nanoseconds, and how long its connection had waited, in milliseconds.
    #[inline]
    pub fn begin(
        &mut self,
        connection: &Connection,
        number: u64,
        received_bytes: usize,
        times: (u64, u64),
    ) {
        if self.active.is_some() {
            self.begin_line(connection, number, received_bytes, times);
        }
    }

    // Not inlined, so that without an access log a call pays only for the check above.
    #[inline(never)]
    fn begin_line(
        &mut self,
        connection: &Connection,
        number: u64,
        received_bytes: usize,
        times: (u64, u64),
    ) {
        if let Some(active) = &mut self.active {
            active.begin(number, received_bytes, times);
            active.current.from = (connection.peer, connection.dialect);
            if self.request_id.is_some() || active.current.request_id.is_some() {
                active.current.request_id.clone_from(&self.request_id);
            }
        }
    }

    /// Copies what the line says so far to the journal entry of the current call, for the keeper.
    #[inline]
    pub fn recorded(&self, mark: CallRef) {
        if let Some(active) = &self.active {
            mark.set_line(active.current.read_ns, active.current.received_bytes);
        }
    }

    /// Records the method of the current call: its place on the metrics board, and its name. `parent_id` is the span
    /// of the caller; 0 if it sent none.
    #[inline]
    pub fn found(
        &mut self,
        (place, name): (usize, &str),
        (identity, parent_id): (&CallIdentity, u64),
        mark: CallRef,
    ) {
        if let Some(active) = &mut self.active {
            active.found(place, name);
            if let Some(trace) = identity.trace() {
                let context = trace.into_context();
                active.current.trace = LineTrace {
                    trace_id: context.trace_id,
                    span_id: context.parent_id,
                    parent_id,
                    flags: context.flags,
                };
                mark.set_trace(context.trace_id);
            }
        }
    }

    /// Returns what is known of the current call, which waits from now on.
    #[inline]
    pub fn start(&self) -> Option<Box<CallStart>> {
        let active = self.active.as_ref()?;
        Some(active.current.clone())
    }

    /// Makes a call that has waited the current call. Returns the previous one, for `switch_back`.
    #[inline]
    pub fn switch_to(&mut self, ended: &FinishedCall) -> Option<Box<CallStart>> {
        let active = self.active.as_mut()?;
        let start = ended.access.take().unwrap_or_default();
        Some(std::mem::replace(&mut active.current, start))
    }

    /// Makes the previous call the current call again.
    #[inline]
    pub fn switch_back(&mut self, before: Option<Box<CallStart>>) {
        if let (Some(active), Some(before)) = (&mut self.active, before) {
            active.current = before;
        }
    }

    /// Completes the line of the current call, which is answered and counted. `connection` is `None` if it is closed.
    #[inline]
    pub fn answered(
        &mut self,
        connection: Option<&Connection>,
        answer: AnswerFacts<'_>,
        counts: AnswerCounts<'_>,
    ) {
        if let Some(active) = &mut self.active {
            active.answered(connection, answer, counts);
        }
    }

    /// Ends the inline calls so far at `now_ns`.
    #[inline]
    pub fn end_inline(&mut self, now_ns: u64) {
        if let Some(active) = &mut self.active {
            active.end_inline(now_ns);
        }
    }

    /// Sends the lines of this turn to the thread. Its calls are counted.
    #[inline]
    pub fn flush(&mut self, counts: &CallCounts) {
        if let Some(active) = &mut self.active
            && (!active.lines.is_empty() || active.exempt > 0)
        {
            active.end_inline(counts.now_ns());
            let lines = std::mem::take(&mut active.lines);
            if !lines.is_empty() {
                active.queue.send(lines);
            }
        }
    }

    /// Returns whether this turn has as many lines as the queue takes. Then end the turn, because further lines would
    /// only take memory.
    #[inline]
    pub fn is_full(&self) -> bool {
        (self.active.as_ref()).is_some_and(|active| active.lines.len() >= QUEUE)
    }

    /// Waits until all lines are written, at most for `LAST_LINES`. Call it before the process exits.
    pub fn finish(&mut self) {
        if let Some(active) = &self.active {
            active.queue.finish(LAST_LINES);
        }
    }
}

/// Returns what the lines of this process have in common.
pub fn line_process(boot: &WorkerInit<'_>) -> LineProcess {
    LineProcess {
        pid: Pid::current().0,
        slot: boot.slot.number(),
        generation: boot.generation.0,
    }
}

/// Returns name and kind of the methods by their places on the metrics board. They live as long as the process.
pub fn method_table(boot: &WorkerInit<'_>) -> Box<[(&'static str, &'static str)]> {
    let mut table = vec![("", ""); NAMES];
    let kinds = boot.metrics.header.methods.kinds(NAMES);
    for (number, method) in boot.registry.methods().iter().enumerate() {
        let place = boot.metrics.method(number);
        if let Some(entry) = table.get_mut(place) {
            let name: &'static str = String::leak(method.name.clone());
            *entry = (name, kinds.get(place).copied().flatten().unwrap_or(""));
        }
    }
    table.into()
}

impl ActiveLog {
    fn begin(&mut self, number: u64, received_bytes: usize, times: (u64, u64)) {
        let current = &mut self.current;
        (current.number, current.received_bytes) = (number, received_bytes);
        (current.read_ns, current.accept_wait_ms) = times;
        current.method = Cow::Borrowed("");
        current.kind = None;
        current.trace = LineTrace::default();
    }

    fn found(&mut self, place: usize, name: &str) {
        let known = self.methods.get(place).filter(|(it, _)| !it.is_empty());
        (self.current.method, self.current.kind) = match known {
            Some((name, kind)) => (
                Cow::Borrowed(*name),
                Some(*kind).filter(|it| !it.is_empty()),
            ),
            None => {
                let kind = is_reserved(name).then_some(BUILTIN);
                (Cow::Owned(cut_method(name)), kind)
            }
        };
    }

    fn answered(
        &mut self,
        connection: Option<&Connection>,
        (form, error, sent_bytes): AnswerFacts<'_>,
        (counts, counted, last_call): AnswerCounts<'_>,
    ) {
        let number = counted.number(last_call);
        let is_inline = matches!(counted, CountedCall::Inline(_));
        let needs_time = is_inline && self.rules.has_time();
        let now_ns = match needs_time {
            true => monotonic_ns(),
            false => counts.now_ns(),
        };
        if self.current.number != number {
            // It was refused before it was read completely.
            self.begin(number, 0, (now_ns, 0));
            self.current.request_id = None;
            self.current.from = connection.map_or((None, None), |it| (it.peer, it.dialect));
        }
        if self.current.method.is_empty() {
            self.found(counted.place(), "");
        }
        let start = &self.current;
        let total_ns = now_ns.saturating_sub(start.read_ns);
        let ids = (start.trace.trace_id, self.pid, number);
        let place = (counted.place(), &*start.method);
        if !self.rules.takes(place, ids, error.is_some(), total_ns) {
            match is_inline {
                // Not yet: such calls are counted at the end of the turn.
                true => self.exempt += 1,
                false => self.counts.block.access.exempt(1),
            }
            return;
        }
        let started = error.is_none_or(|error| error.started);
        let is_gone = connection.is_none_or(|it| it.drops_answer(form));
        let (queue_ns, run_ns) = match counted {
            CountedCall::Refused(_) => (Some(0), None),
            CountedCall::Inline(_) => (Some(0), Some(OPEN)),
            CountedCall::Ended { took, begun, .. } => {
                let since = now_ns.saturating_sub(start.began_ns);
                let given_up = (start.began_ns > 0).then_some(since);
                let run = took.map(|took| took.as_nanos() as u64).or(given_up);
                let run = run.filter(|_| begun);
                let waited = if begun { run } else { Some(0) };
                (waited.map(|run| total_ns.saturating_sub(run)), run)
            }
        };
        let line = AccessLine {
            start: (**start).clone(),
            form: form_name(form),
            outcome: error.map_or("done", |error| outcome(error, is_gone)),
            code: error.map(code),
            started,
            queue_ns,
            run_ns,
            total_ns: if is_inline { OPEN } else { total_ns },
            sent_bytes,
        };
        self.lines.push(line);
    }

    fn end_inline(&mut self, now_ns: u64) {
        let open = self.lines.iter_mut().rev();
        for line in open.filter(|line| line.total_ns == OPEN) {
            line.total_ns = now_ns.saturating_sub(line.start.read_ns);
            line.run_ns = Some(line.total_ns);
        }
        let exempt = std::mem::take(&mut self.exempt);
        self.counts.block.access.exempt(exempt);
    }
}

/// Returns how a call has ended that was answered with this error.
fn outcome(error: &RpcError, is_gone: bool) -> &'static str {
    match (error.table_code(), error.started) {
        (Some(Code::Timeout), true) => "timeout",
        (Some(Code::Timeout | Code::Overloaded | Code::Stopping | Code::Unavailable), false) => {
            "shed"
        }
        (Some(Code::Cancelled), _) if is_gone => "disconnected",
        (Some(Code::Cancelled), _) => "cancelled",
        (Some(Code::Crashed), _) => "crashed",
        _ => "error",
    }
}

/// Returns the name of an error code, as the metrics have it.
fn code(error: &RpcError) -> &'static str {
    error.table_code().map_or("handler", Code::name)
}

#[cfg(test)]
#[path = "hooks_tests.rs"]
mod tests;
