//! `map`: a call for each line of stdin, the results on stdout in the lines' order.
//!
//! One thread reads lines, the pool makes the calls, and this one puts the results in order, writes
//! them and keeps the record. Between them is a window of a few lines for each connection: an endless
//! input, a slow reader or one slow call hold no more than that. A line that fails is told on stderr and
//! leaves no result; the others go on. Without a server, and with a reader that left, it ends.

mod lines;
pub(super) mod options;
mod progress;
mod reorder;
mod resume_file;

use std::io::{self, ErrorKind, Write};
use std::sync::Arc;

use crossbeam_channel::{Sender, bounded, never, select, unbounded};

use super::call::refusal;
use super::output;
use super::units::plural;
use crate::client::{ClientError, Options, Pool, Reply};
use crate::config::Overrides;
use crate::error::{Error, Result};
use crate::logging::printable_json;
use options::MapOptions;

use lines::{Incoming, InputLine};
use progress::ProgressBar;
use reorder::ReorderBuffer;
use resume_file::ResumeFile;

/// Lines for each connection that may be ahead of the results that were written.
const WINDOW: usize = 64;

/// A line whose call is under way.
#[derive(Debug, Clone, Copy)]
struct Origin {
    number: u64,
    /// Bytes of the input up to its end.
    read: u64,
}

/// How a line ended.
type Outcome = std::result::Result<Reply, ClientError>;

/// Does it; the error says how many lines failed.
pub(super) fn map(name: &str, options: &MapOptions, overrides: &Overrides) -> Result<()> {
    let address = options.target.address(overrides)?;
    let record = match &options.resume {
        Some(path) => Some(ResumeFile::open(path, &options.method)?),
        None => None,
    };
    let pool = Pool::new(
        &address,
        Options {
            connections: options.jobs.into(),
            timeout: options.timeout,
            patience: options.patience,
        },
    )?;
    let mut run = Run {
        name,
        options,
        method: options.method.as_str().into(),
        pool: &pool,
        order: ReorderBuffer::default(),
        record,
        progress: ProgressBar::new(),
        tally: MapTotals::default(),
    };
    let outcome = run.all();
    run.progress.clear();
    let tally = run.tally;
    let repeated = pool.repeated();
    if outcome.is_err() {
        pool.terminate();
    } else {
        pool.join();
    }
    let end = match outcome {
        Err(End::ReaderLeft) => return Ok(()),
        Err(End::Failed(error)) => Err(error),
        Ok(()) if tally.failed > 0 => Err(Error::Refused(String::new())),
        Ok(()) => Ok(()),
    };
    tell(name, options, &tally, repeated, end)
}

/// What became of the lines.
#[derive(Debug, Clone, Copy, Default)]
struct MapTotals {
    done: u64,
    failed: u64,
    /// Done in an earlier run.
    skipped: u64,
}

/// Puts the counts behind whatever the end was. Silent where all went well at the first attempt.
fn tell(
    name: &str,
    options: &MapOptions,
    tally: &MapTotals,
    repeated: u64,
    end: Result<()>,
) -> Result<()> {
    let mut counts = format!(
        "{} done, {} failed",
        plural(tally.done, "line"),
        tally.failed
    );
    if tally.skipped > 0 {
        counts += &format!(", {} done before", tally.skipped);
    }
    if repeated > 0 {
        counts += &format!("; calls made again: {repeated}");
    }
    let again = match &options.resume {
        Some(path) => format!(
            "; the same command does the rest, as {} has what is done",
            path.display()
        ),
        None => "; with --resume FILE a second run would do only the rest".into(),
    };
    match end {
        Ok(()) => {
            if tally.skipped > 0 || repeated > 0 {
                output::print_error(name, &counts);
            }
            Ok(())
        }
        Err(Error::Refused(_)) => Err(Error::Refused(counts + &again)),
        Err(error) => {
            output::print_error(name, &(counts + &again));
            Err(error)
        }
    }
}

/// Why it ends before the input does.
enum End {
    ReaderLeft,
    Failed(Error),
}

impl From<Error> for End {
    fn from(error: Error) -> Self {
        End::Failed(error)
    }
}

struct Run<'a> {
    name: &'a str,
    options: &'a MapOptions,
    method: Arc<str>,
    pool: &'a Pool,
    order: ReorderBuffer<(Origin, Outcome)>,
    record: Option<ResumeFile>,
    progress: ProgressBar,
    tally: MapTotals,
}

impl Run<'_> {
    fn all(&mut self) -> std::result::Result<(), End> {
        let window = usize::from(self.options.jobs) * WINDOW;
        let (sender, done) = unbounded();
        let (feed, lines) = bounded(window);
        lines::read(feed)?;
        let nothing = never();
        let mut over = false;
        loop {
            self.deliver()?;
            if over && self.order.is_empty() {
                return Ok(());
            }
            // Waits for results alone while the window is full.
            let full = self.order.len() >= window;
            let input = if over || full { &nothing } else { &lines };
            select! {
                recv(input) -> incoming => match incoming {
                    Ok(incoming) => self.begin(incoming, &sender)?,
                    Err(_) => over = true,
                },
                recv(done) -> outcome => {
                    // Never disconnected: there is a sender here.
                    if let Ok((place, origin, outcome)) = outcome {
                        self.end(place, origin, outcome)?;
                    }
                }
            }
        }
    }

    /// Makes the call for a line, or knows that there is none to make.
    fn begin(
        &mut self,
        incoming: Incoming,
        sender: &Sender<(u64, Origin, Outcome)>,
    ) -> std::result::Result<(), End> {
        let InputLine { number, text, read } = incoming.map_err(|error| {
            let attempt = "read the params from stdin";
            End::Failed(Error::system(attempt, error))
        })?;
        let text = match std::str::from_utf8(&text) {
            Ok(text) => text.trim_ascii(),
            Err(_) => {
                self.fail(number, "not UTF-8, so no JSON");
                return Ok(());
            }
        };
        if text.is_empty() {
            return Ok(());
        }
        if self
            .record
            .as_ref()
            .is_some_and(|record| record.has(number))
        {
            self.tally.skipped += 1;
            if self.order.is_empty() {
                self.show(Some(read));
            }
            return Ok(());
        }
        let place = self.order.expect();
        let origin = Origin { number, read };
        let sender = sender.clone();
        let started = self
            .pool
            .apply_async_raw(&self.method, text, move |outcome| {
                // Nobody is left to hear it when the run has ended early.
                let _ = sender.send((place, origin, outcome));
            });
        if let Err(error) = started {
            self.end(place, origin, Err(error))?;
        }
        Ok(())
    }

    /// A line's call has ended.
    fn end(
        &mut self,
        place: u64,
        origin: Origin,
        outcome: Outcome,
    ) -> std::result::Result<(), End> {
        // The lines behind would wait as long as this one, each for itself.
        if let Err(error @ ClientError::NoServer { .. }) = outcome {
            self.deliver()?;
            return Err(End::Failed(error.into()));
        }
        self.order.put(place, (origin, outcome));
        Ok(())
    }

    /// Writes the results whose turn it is.
    fn deliver(&mut self) -> std::result::Result<(), End> {
        let mut text = String::new();
        let mut numbers = Vec::new();
        let mut passed = None;
        while let Some((origin, outcome)) = self.order.next() {
            let number = origin.number;
            passed = Some(origin.read);
            match outcome {
                Ok(reply) => {
                    if self.options.tag {
                        text += &format!("{number}\t");
                    }
                    // One result, one line, however the handler wrote it; no string holds a line
                    // feed as it is.
                    text += &reply.result.get().replace(['\n', '\r'], " ");
                    text.push('\n');
                    numbers.push(number);
                }
                Err(ClientError::Refused(error)) => {
                    let what = refusal(&self.method, &error).replace('\n', "; ");
                    self.fail(number, &what);
                }
                Err(error) => self.fail(number, &error.to_string()),
            }
        }
        if numbers.is_empty() {
            self.show(passed);
            return Ok(());
        }
        let mut out = io::stdout().lock();
        match out
            .write_all(printable_json(&text).as_bytes())
            .and_then(|()| out.flush())
        {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return Err(End::ReaderLeft),
            outcome => outcome.map_err(|error| {
                Error::system_with("write to stdout", error, "the output is not complete")
            })?,
        }
        self.tally.done += numbers.len() as u64;
        self.show(passed);
        // After the results: a line that is on record twice is better than one that is lost.
        if let Some(record) = &mut self.record {
            record.add(&numbers)?;
        }
        Ok(())
    }

    /// On the bar, where the lines in so many bytes of the input have ended.
    fn show(&self, passed: Option<u64>) {
        if let Some(passed) = passed {
            let MapTotals { done, failed, .. } = self.tally;
            self.progress.show(done, failed, passed);
        }
    }

    fn fail(&mut self, number: u64, why: &str) {
        self.tally.failed += 1;
        let name = self.name;
        self.progress
            .aside(|| output::print_error(name, &format!("line {number}: {why}")));
    }
}
