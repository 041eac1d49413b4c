//! Writes the lines of a process in a thread of their own, from a queue of their own. So they displace no line of
//! the log, and no call waits for a disk.
//!
//! The event loop sends the lines of a turn together. The thread waits 2 ms for more, because one write for many lines
//! costs less than one for each. If the queue is full or a line cannot be written, the line is lost and counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::AcqRel, Ordering::Acquire};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded, select, unbounded};

use super::line::{AccessLine, LineWriter};
use crate::link::access_counts::LineBatch;
use crate::link::metrics_board::BlockWriter;
use crate::link::session_table::SessionRecord;
use crate::logging::{self, AccessFile, BATCH_BYTES, LINE_BYTES};
use crate::sys::signal;

/// The lines that may wait.
pub const QUEUE: usize = 4096;
/// How long the thread waits for more lines before it writes.
const PATIENCE: Duration = Duration::from_millis(2);
const STACK: usize = 256 * 1024;

/// Where lines go.
#[derive(Debug, Clone)]
pub enum LineSink {
    File(Arc<AccessFile>),
    /// The log.
    Log,
}

/// Formats and writes lines, and counts them. For one thread.
#[derive(Debug)]
pub struct LineOutput {
    sink: LineSink,
    counts: BlockWriter,
    /// In a session, which shares its block: where it counts the lines that are due.
    session: Option<&'static SessionRecord>,
    writer: LineWriter,
    buffer: Vec<u8>,
    lines: u64,
    first_call: u64,
}

impl LineOutput {
    pub fn new(
        (sink, writer): (LineSink, LineWriter),
        counts: BlockWriter,
        session: Option<&'static SessionRecord>,
    ) -> Self {
        LineOutput {
            sink,
            counts,
            session,
            writer,
            buffer: Vec::new(),
            lines: 0,
            first_call: 0,
        }
    }

    /// Adds a line to the next write, and writes if there are enough.
    pub fn add(&mut self, line: &AccessLine) {
        if let LineSink::Log = self.sink {
            let (text, members) = self.writer.log_line(line);
            let written = u64::from(logging::write_access_line(&text, &members));
            self.counts.add(&self.counts.block.access.written, written);
            self.settle(1, written);
            return;
        }
        if self.buffer.len() > BATCH_BYTES - LINE_BYTES {
            self.flush();
        }
        if self.lines == 0 {
            self.writer.read_clocks();
            self.first_call = line.start.number;
        }
        self.lines += 1;
        self.writer.append(&mut self.buffer, line);
        // Write each line of a session at once, because no process recovers the lines of a session that was killed. A
        // kill can cut so short a write only between two pages of the file.
        if self.session.is_some() {
            self.flush();
        }
    }

    /// Writes the lines that were added.
    pub fn flush(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        let LineSink::File(file) = &self.sink else {
            return;
        };
        if lines == 0 {
            return;
        }
        let access = &self.counts.block.access;
        let written = if self.session.is_some() {
            let written = file.write(&self.buffer);
            self.counts.add(&access.written, written);
            written
        } else {
            access.begin_batch(LineBatch {
                lines,
                first_call: self.first_call,
                position: file.position(),
            });
            let written = file.write(&self.buffer);
            access.end_batch(written);
            written
        };
        self.buffer.clear();
        self.settle(lines, written);
    }

    /// Counts the result of a batch: of `lines`, `written` were written and the others are lost.
    fn settle(&self, lines: u64, written: u64) {
        self.counts.block.access.lose(lines.saturating_sub(written));
        if let Some(session) = self.session {
            session.add_lines(-(lines as i64));
        }
    }
}

/// The event loop's side.
#[derive(Debug)]
pub struct LineQueue {
    /// `Some` until the thread is started, with the first line.
    output: Option<LineOutput>,
    counts: BlockWriter,
    session: Option<&'static SessionRecord>,
    lines: Sender<Vec<AccessLine>>,
    received: Receiver<Vec<AccessLine>>,
    flush: Sender<Sender<()>>,
    flushes: Receiver<Sender<()>>,
    waiting: Arc<AtomicUsize>,
}

impl LineQueue {
    pub fn new(output: LineOutput) -> Self {
        let (lines, received) = unbounded();
        let (flush, flushes) = unbounded();
        LineQueue {
            counts: output.counts,
            session: output.session,
            output: Some(output),
            lines,
            received,
            flush,
            flushes,
            waiting: Arc::default(),
        }
    }

    /// Sends the lines of counted calls to the thread, as many as there is room for.
    pub fn send(&mut self, mut lines: Vec<AccessLine>) {
        if let Some(session) = self.session {
            session.add_lines(lines.len() as i64);
        }
        let room = match self.start() {
            true => QUEUE.saturating_sub(self.waiting.load(Acquire)),
            false => 0,
        };
        let lost = lines.len().saturating_sub(room);
        if lost > 0 {
            lines.truncate(room);
            self.counts.block.access.lose(lost as u64);
            if let Some(session) = self.session {
                session.add_lines(-(lost as i64));
            }
        }
        if !lines.is_empty() {
            self.waiting.fetch_add(lines.len(), AcqRel);
            // The receiver lives as long as this value.
            let _ = self.lines.send(lines);
        }
    }

    /// Waits until all lines are written, at most for this time.
    pub fn finish(&self, limit: Duration) {
        if self.output.is_none() {
            let (done, wait) = bounded(1);
            let _ = self.flush.send(done);
            let _ = wait.recv_timeout(limit);
        }
    }

    /// Starts the thread, unless it runs. Returns whether it runs.
    fn start(&mut self) -> bool {
        let Some(output) = self.output.take() else {
            return true;
        };
        let (received, flushes) = (self.received.clone(), self.flushes.clone());
        let waiting = Arc::clone(&self.waiting);
        // The thread inherits the mask: signals are for the event loop.
        let builder = thread::Builder::new().name("access-log".into());
        let output = Arc::new(std::sync::Mutex::new(Some(output)));
        let own = Arc::clone(&output);
        let body = move || {
            if let Some(output) = crate::sys::lock::lock(&own).take() {
                run(output, &received, &flushes, &waiting);
            }
        };
        let started = signal::with_signals_blocked(|| builder.stack_size(STACK).spawn(body));
        if started.is_err() {
            // The next line tries again.
            self.output = crate::sys::lock::lock(&output).take();
        }
        started.is_ok()
    }
}

fn run(
    mut output: LineOutput,
    received: &Receiver<Vec<AccessLine>>,
    flushes: &Receiver<Sender<()>>,
    waiting: &AtomicUsize,
) {
    loop {
        let (mut first, mut done) = (None, None);
        select! {
            recv(received) -> lines => match lines {
                Ok(lines) => first = Some(lines),
                Err(_) => return,
            },
            recv(flushes) -> flush => done = flush.ok(),
        }
        if done.is_none() {
            done = flushes.recv_timeout(PATIENCE).ok();
        }
        let mut written = 0;
        for lines in first.into_iter().chain(received.try_iter()) {
            for line in &lines {
                output.add(line);
            }
            written += lines.len();
            // The lines of one round are limited, because there is room for further lines only after the flush.
            if written >= QUEUE {
                break;
            }
        }
        output.flush();
        waiting.fetch_sub(written, AcqRel);
        if let Some(done) = done {
            for lines in received.try_iter() {
                lines.iter().for_each(|line| output.add(line));
                waiting.fetch_sub(lines.len(), AcqRel);
            }
            output.flush();
            let _ = done.send(());
        }
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
