//! Writes the records of slow calls, in a thread of its own: gathers the evidence, logs the two lines, and fills
//! the ring on the metrics board. So neither /proc nor a slow log delays a call.
//!
//! If this process dropped from root, the kernel shows it no system call of its threads. Then the master is asked
//! and the line waits for its answer, but only a short time. If no thread can be started, slow calls are only
//! counted.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};

use super::evidence::{self, Target};
use super::record::{SlowEnd, SlowLine, SlowRecord};
use crate::handler::CallState;
use crate::link::slow_calls::{SlowCall, SlowRing};
use crate::logging;
use crate::sys::process::{Pid, monotonic, monotonic_ns};
use crate::sys::signal;
use crate::sys::waker::Waker;

const STACK: usize = 256 * 1024;
/// How long a line waits for the master.
const PATIENCE: Duration = Duration::from_millis(60);
/// The time between two checks for the answer of the master.
const LOOK: Duration = Duration::from_millis(2);

enum RecordStep {
    Begin {
        number: u64,
        record: Box<SlowRecord>,
        target: Target,
        state: Arc<CallState>,
        /// When it was seen running.
        seen: Duration,
    },
    End {
        number: u64,
        end: SlowEnd,
    },
}

/// The event loop's side of the recorder.
#[derive(Debug)]
pub(super) struct Recorder {
    ring: &'static SlowRing,
    /// The thread; `None` before the first slow call. Nothing is ever received: the channel closes with the
    /// thread.
    thread: Option<(Sender<RecordStep>, Receiver<()>)>,
    asks_master: bool,
    /// Whether a new record has a question for the master.
    question: Arc<AtomicBool>,
    waker: Arc<Waker>,
}

impl Recorder {
    pub fn new(ring: &'static SlowRing, asks_master: bool, waker: &Arc<Waker>) -> Self {
        Recorder {
            ring,
            thread: None,
            asks_master,
            question: Arc::default(),
            waker: Arc::clone(waker),
        }
    }

    /// Begins the record with this number.
    pub fn begin(
        &mut self,
        number: u64,
        record: SlowRecord,
        (target, state): (Target, Arc<CallState>),
    ) {
        let (steps, _) = match &self.thread {
            Some(thread) => thread,
            None => {
                let thread = self.start();
                self.thread.insert(thread)
            }
        };
        // Without a thread there is no receiver.
        let _ = steps.send(RecordStep::Begin {
            number,
            record: Box::new(record),
            target,
            state,
            seen: monotonic(),
        });
    }

    /// Completes the record with this number.
    pub fn end(&self, number: u64, end: SlowEnd) {
        if let Some((steps, _)) = &self.thread {
            let _ = steps.send(RecordStep::End { number, end });
        }
    }

    /// Waits until all records are written, at most for this time. Call it before the process exits.
    pub fn finish(&mut self, limit: Duration) {
        if let Some((steps, end)) = self.thread.take() {
            drop(steps);
            let _ = end.recv_timeout(limit);
        }
    }

    /// Returns whether the master must be asked. Returns true once for all questions since the last call.
    pub fn takes_question(&self) -> bool {
        self.asks_master && self.question.swap(false, Ordering::Relaxed)
    }

    fn start(&self) -> (Sender<RecordStep>, Receiver<()>) {
        let (sender, steps) = unbounded();
        let (life, end) = bounded(0);
        let thread = RecorderThread {
            ring: self.ring,
            asks_master: self.asks_master,
            question: Arc::clone(&self.question),
            waker: Arc::clone(&self.waker),
            open: HashMap::new(),
            waiting: Vec::new(),
        };
        // The thread inherits the mask: signals are for the event loop.
        let builder = thread::Builder::new()
            .name("slow-log".into())
            .stack_size(STACK);
        let body = move || {
            thread.run(&steps);
            drop::<Sender<()>>(life);
        };
        let started = signal::with_signals_blocked(|| builder.spawn(body));
        if let Err(error) = started {
            log::warn!(
                "slow calls are only counted until this process ends: no thread could be started: {error}"
            );
        }
        (sender, end)
    }
}

/// A line that waits for the master.
struct WaitingLine {
    number: u64,
    until: Duration,
    /// What this process knows.
    evidence: String,
    /// The state of the call.
    state: Arc<CallState>,
}

/// An open record.
struct OpenRecord {
    record: Box<SlowRecord>,
    /// Its number in the ring.
    place: u64,
}

struct RecorderThread {
    ring: &'static SlowRing,
    asks_master: bool,
    question: Arc<AtomicBool>,
    waker: Arc<Waker>,
    open: HashMap<u64, OpenRecord>,
    waiting: Vec<WaitingLine>,
}

impl RecorderThread {
    fn run(mut self, steps: &Receiver<RecordStep>) {
        loop {
            let step = match self.waiting.is_empty() {
                true => steps.recv().map_err(|_| RecvTimeoutError::Disconnected),
                false => steps.recv_timeout(LOOK),
            };
            match step {
                Ok(RecordStep::Begin {
                    number,
                    record,
                    target,
                    state,
                    seen,
                }) => self.begin(number, record, (&target, &state, seen)),
                Ok(RecordStep::End { number, end }) => self.end(number, &end),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return self.log_answered(|_| true),
            }
            let now = monotonic();
            self.log_answered(|line| now >= line.until);
        }
    }

    fn begin(
        &mut self,
        number: u64,
        record: Box<SlowRecord>,
        (target, state, seen): (&Target, &Arc<CallState>, Duration),
    ) {
        let found = evidence::look(target, state, (seen, record.began_ns));
        let asks_for = if self.asks_master {
            found.refused_thread
        } else {
            0
        };
        let call = SlowCall {
            call: record.call,
            trace_id: None,
            method: record.method.clone(),
            runner: Pid::current().0,
            at_ms: record.at_ms,
            began_ns: record.began_ns,
            end: None,
            evidence: found.text,
        };
        let place = self.ring.add(&call, record.trace_id, asks_for);
        self.open.insert(number, OpenRecord { record, place });
        if asks_for == 0 {
            return self.log_begin(number, &call.evidence);
        }
        self.waiting.push(WaitingLine {
            number,
            until: monotonic() + PATIENCE,
            evidence: call.evidence,
            state: Arc::clone(state),
        });
        self.question.store(true, Ordering::Relaxed);
        self.waker.wake();
    }

    fn end(&mut self, number: u64, end: &SlowEnd) {
        self.log_answered(|line| line.number == number);
        if let Some(OpenRecord { record, place }) = self.open.remove(&number) {
            log_line(&record.end_line(end));
            self.ring.end(place, end.outcome, end.run_ns);
        }
    }

    /// Logs the lines for which the master has answered, and those that must not wait any longer.
    fn log_answered(&mut self, must: impl Fn(&WaitingLine) -> bool) {
        for line in std::mem::take(&mut self.waiting) {
            let open = self.open.get(&line.number);
            match open.and_then(|open| self.ring.answered(open.place)) {
                Some(evidence) => {
                    // If it still runs, the master has looked at this call. Otherwise its thread may have had another.
                    let began_ns = open.map(|open| open.record.began_ns);
                    let is_same = line.state.begun_ns() == began_ns && !evidence.is_empty();
                    if let Some(open) = open.filter(|_| !is_same) {
                        self.ring.correct(open.place, &line.evidence);
                    }
                    let evidence = if is_same { evidence } else { line.evidence };
                    self.log_begin(line.number, &evidence);
                }
                None if must(&line) => self.log_begin(line.number, &line.evidence),
                None => self.waiting.push(line),
            }
        }
    }

    fn log_begin(&self, number: u64, evidence: &str) {
        if let Some(open) = self.open.get(&number) {
            log_line(&open.record.begin_line(monotonic_ns(), evidence));
        }
    }
}

fn log_line(line: &SlowLine) {
    logging::with_members(&line.members, || log::warn!("{}", line.text));
}
