//! Counts the calls of a worker on the metrics board.
//!
//! Inline calls of one turn of the event loop are first counted here, and share the same times. The time begins with
//! the wake-up in which the calls were read. It ends with the turn, or earlier with the write after which the coarse
//! clock has advanced. So an inline call needs no clock. Other calls are counted when their answer is composed.
//! Nothing here fails.

use std::time::Duration;

use super::call_table::FinishedCall;
use super::connection::ConnectionEnd;
use crate::link::metrics_board::layout::{HANDLER_CODE, NAMES, OTHER};
use crate::link::metrics_board::{BlockWriter, MetricsAccess};
use crate::protocol::Dialect;
use crate::protocol::body::Form;
use crate::protocol::rpc_error::RpcError;
use crate::sys::process::{monotonic_coarse_ms, monotonic_ns};

/// How a call is counted when it is answered.
#[derive(Debug, Clone, Copy)]
pub enum CountedCall {
    /// Refused before it waited or ran, with the place of its method.
    Refused(usize),
    /// Ran inline.
    Inline(usize),
    /// Waited for a thread or program, and ran if there is a run time.
    Ended {
        place: usize,
        /// Its number in this process.
        number: u64,
        /// When it was read, in nanoseconds (CLOCK_MONOTONIC).
        read_ns: u64,
        /// `None` if it was given up.
        took: Option<Duration>,
        begun: bool,
    },
}

impl CountedCall {
    /// Returns the number of the call. A call that did not wait has the number `last`.
    pub fn number(self, last: u64) -> u64 {
        match self {
            CountedCall::Ended { number, .. } => number,
            CountedCall::Refused(_) | CountedCall::Inline(_) => last,
        }
    }

    /// Returns the place of its method.
    pub fn place(self) -> usize {
        match self {
            CountedCall::Refused(place)
            | CountedCall::Inline(place)
            | CountedCall::Ended { place, .. } => place,
        }
    }
}

/// How long connections waited until they were accepted, in milliseconds.
#[derive(Debug, Default)]
pub struct AcceptDelay {
    /// The delay of the connection whose first bytes are being handled; 0 for later bytes.
    pub now_ms: u64,
    pub longest_ms: u64,
    pub last_ms: u64,
}

impl AcceptDelay {
    /// Records the delay of the connection whose first bytes were received now.
    pub fn record(&mut self, wait_ms: u64) {
        self.now_ms = wait_ms;
        self.last_ms = wait_ms;
        self.longest_ms = self.longest_ms.max(wait_ms);
    }
}

#[derive(Debug)]
pub struct CallCounts {
    pub writer: BlockWriter,
    methods: MetricsAccess,
    /// When this turn began, in nanoseconds.
    turn_ns: u64,
    /// The last time that was read.
    now_ns: u64,
    /// The coarse clock at the beginning of this turn.
    coarse_ms: u64,
    /// Inline calls of this turn by method, and the methods that have some.
    inline: Box<[u32]>,
    answered: Vec<u16>,
    /// Bodies of this read, by form.
    bodies: [u32; 2],
    records_runs: bool,
}

impl CallCounts {
    /// `is_shared` says whether others write to the same block. `records_runs` says whether run times are
    /// recorded.
    pub fn new(methods: MetricsAccess, is_shared: bool, records_runs: bool) -> Self {
        CallCounts {
            writer: BlockWriter::new(methods.block, is_shared),
            methods,
            turn_ns: 0,
            now_ns: 0,
            coarse_ms: 0,
            inline: vec![0; NAMES + 1].into(),
            answered: Vec::new(),
            bodies: [0; 2],
            records_runs,
        }
    }

    /// Begins a turn of the event loop.
    pub fn begin_turn(&mut self, now_ns: u64) {
        self.turn_ns = now_ns;
        self.now_ns = now_ns;
        if !cfg!(preforkd_uncounted) {
            self.coarse_ms = monotonic_coarse_ms();
        }
    }

    /// Returns when the calls of this turn were read, in nanoseconds.
    pub fn turn_ns(&self) -> u64 {
        self.turn_ns
    }

    /// Reads the clock for a batch of answers.
    pub fn read_clock(&mut self) {
        if !cfg!(preforkd_uncounted) {
            self.now_ns = monotonic_ns();
        }
    }

    /// Returns the place of a method on the board by its number; without a number, the place for all other methods.
    #[inline]
    pub fn place(&self, method: Option<usize>) -> usize {
        method.map_or(OTHER, |method| self.methods.method(method))
    }

    /// Counts a body that was read.
    #[inline]
    pub fn count_body(&mut self, form: Form) {
        if !cfg!(preforkd_uncounted) {
            let is_json_rpc = matches!(form, Form::JsonRpc | Form::Notification);
            self.bodies[usize::from(is_json_rpc)] += 1;
        }
    }

    /// Adds the bodies of a read to those of their dialect.
    pub fn add_bodies(&mut self, dialect: Option<Dialect>) {
        if self.bodies == [0; 2] {
            return;
        }
        let requests = &self.writer.block.requests[dialect_place(dialect)];
        for (counter, bodies) in requests.iter().zip(std::mem::take(&mut self.bodies)) {
            self.writer.add(counter, bodies.into());
        }
    }

    /// Counts received bytes.
    pub fn add_received(&self, dialect: Option<Dialect>, bytes: usize) {
        let counter = &self.writer.block.received_bytes[dialect_place(dialect)];
        self.writer.add(counter, bytes as u64);
    }

    /// Counts bytes to be sent.
    pub fn add_sent(&self, dialect: Option<Dialect>, bytes: usize) {
        let counter = &self.writer.block.sent_bytes[dialect_place(dialect)];
        self.writer.add(counter, bytes as u64);
    }

    /// Counts the CPU time of a command.
    pub fn add_command_cpu(&self, method: usize, cpu: Duration) {
        let counter = &self.writer.block.command_cpu_ns[self.place(Some(method))];
        self.writer.add(counter, cpu.as_nanos() as u64);
    }

    /// Counts an accepted connection.
    pub fn count_accepted(&self) {
        self.writer.add(&self.writer.block.accepted, 1);
    }

    /// Counts the end of a connection.
    pub fn count_end(&self, end: ConnectionEnd) {
        let block = self.writer.block;
        let counter = match end {
            ConnectionEnd::Closed(reason) => &block.closed[reason as usize],
            ConnectionEnd::Moved(reason) => &block.moved[reason as usize],
        };
        self.writer.add(counter, 1);
    }

    /// Counts the time that a TCP connection waited in the accept queue.
    pub fn add_accept_wait(&self, wait_ms: u64) {
        let cells = &self.writer.block.accept_wait;
        self.writer.observe(cells, wait_ms * 1_000_000, 1);
    }

    /// Counts a call that is over.
    #[inline]
    pub fn count(&mut self, call: CountedCall) {
        if cfg!(preforkd_uncounted) {
            return;
        }
        match call {
            CountedCall::Inline(place) => {
                let count = &mut self.inline[place];
                if *count == 0 {
                    self.answered.push(place as u16);
                }
                *count += 1;
            }
            CountedCall::Refused(place) => {
                self.writer.count_calls(place, 1);
            }
            CountedCall::Ended {
                place,
                read_ns,
                took,
                begun,
                ..
            } => {
                self.count_ended(place, read_ns, took, begun);
            }
        }
    }

    /// Returns how a call is counted that has waited or run. `took` is its run time; `None` if it was given
    /// up.
    pub fn ended(&self, ended: &FinishedCall, took: Option<Duration>) -> CountedCall {
        CountedCall::Ended {
            place: self.place(Some(ended.method)),
            number: ended.number,
            read_ns: ended.read_ns,
            took,
            begun: ended.begun,
        }
    }

    /// Counts a call whose connection is gone, so that it gets no answer.
    pub fn count_unanswered(&mut self, ended: &FinishedCall, error: &RpcError) -> CountedCall {
        let counted = self.ended(ended, None);
        self.count_error(counted, error);
        self.count(counted);
        counted
    }

    /// Counts a call that was sent to another worker. Pool processes are no workers.
    pub fn count_forwarded(&self, lane: usize) {
        self.writer
            .add(&self.writer.block.forwarded, u64::from(lane == 0));
    }

    /// Counts a call that another worker has returned without beginning it. Pool processes are no workers.
    pub fn count_returned(&self, lane: usize) {
        self.writer
            .add(&self.writer.block.returned, u64::from(lane == 0));
    }

    /// Counts the error with which a call was answered. Call it before [`Self::count`].
    #[cold]
    pub fn count_error(&self, call: CountedCall, error: &RpcError) {
        let code = error
            .table_code()
            .map_or(HANDLER_CODE, |code| code as usize);
        self.writer.count_error(call.place(), code, error.started);
    }

    fn count_ended(&self, place: usize, read_ns: u64, took: Option<Duration>, begun: bool) {
        let (writer, block) = (&self.writer, self.writer.block);
        let cells = &block.methods[place];
        let total = self.now_ns.saturating_sub(read_ns);
        writer.observe(&cells.duration, total, 1);
        writer.raise(&cells.longest_ns, total);
        let run = took.filter(|_| begun).map(|took| took.as_nanos() as u64);
        // If a call is given up while it runs, it is unknown when it began.
        if let Some(run) = run.or((!begun).then_some(0)) {
            writer.observe(&cells.queue, total.saturating_sub(run), 1);
        }
        if let Some(run) = run.filter(|_| self.records_runs) {
            writer.observe(&block.runs[place], run, 1);
        }
        writer.count_calls(place, 1);
    }

    /// Counts the inline calls so far if the coarse clock has moved, because the next ones end later. Returns whether
    /// it has counted them.
    #[inline]
    pub fn flush_if_late(&mut self) -> bool {
        let is_late = !self.answered.is_empty() && monotonic_coarse_ms() != self.coarse_ms;
        if is_late {
            self.flush();
        }
        is_late
    }

    /// Returns the last time that was read, in nanoseconds.
    pub fn now_ns(&self) -> u64 {
        self.now_ns
    }

    /// Counts the inline calls of this turn, which end now.
    #[inline]
    pub fn flush(&mut self) {
        if !self.answered.is_empty() {
            self.add_inline();
        }
    }

    fn add_inline(&mut self) {
        self.read_clock();
        let (writer, block) = (self.writer, self.writer.block);
        let took = self.now_ns.saturating_sub(self.turn_ns);
        for place in self.answered.drain(..).map(usize::from) {
            let count = u64::from(std::mem::take(&mut self.inline[place]));
            let cells = &block.methods[place];
            writer.observe(&cells.duration, took, count);
            writer.raise(&cells.longest_ns, took);
            if self.records_runs {
                writer.observe(&block.runs[place], took, count);
            }
            writer.count_calls(place, count);
        }
        self.coarse_ms = monotonic_coarse_ms();
    }
}

fn dialect_place(dialect: Option<Dialect>) -> usize {
    match dialect {
        Some(Dialect::Frame) => 0,
        Some(Dialect::Line) => 1,
        Some(Dialect::Http) => 2,
        Some(Dialect::Unknown) | None => 3,
    }
}
