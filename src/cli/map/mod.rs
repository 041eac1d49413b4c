//! Makes a call for each line of stdin, and prints the results in the order of the lines (`map`).
//!
//! One thread reads lines, the pool makes the calls, and the main thread orders and writes the results and
//! keeps the resume file. A window of some lines for each connection limits what is in memory, even for an
//! endless input, a slow reader or one slow call. A line that fails is reported on stderr and has no
//! result; the others continue. `map` ends early without a server, or when the reader has closed the pipe.

mod lines;
pub(super) mod options;
mod progress;
mod resume_file;

use std::io::{self, ErrorKind, Write};
use std::sync::Arc;

use crossbeam_channel::{Sender, bounded, never, select, unbounded};

use super::call::refusal;
use super::output;
use super::units::plural;
use crate::client::reorder::ReorderBuffer;
use crate::client::{ClientError, Options, Pool, Reply};
use crate::config::Overrides;
use crate::error::{Error, Result};
use crate::logging::printable_json;
use options::MapOptions;

use lines::{Incoming, InputLine};
use progress::ProgressBar;
use resume_file::ResumeFile;

/// The largest number of lines for each connection that are ahead of the written results.
const WINDOW: usize = 64;

/// A line with a call under way.
#[derive(Debug, Clone, Copy)]
struct Origin {
    number: u64,
    /// The bytes of the input up to its end.
    read: u64,
}

/// The result of a line.
type Outcome = std::result::Result<Reply, ClientError>;

/// Runs `map`. The error says how many lines failed.
pub(super) fn map(name: &str, options: &MapOptions, overrides: &Overrides) -> Result<()> {
    let address = options.target.address(overrides)?;
    let record = match &options.resume {
        Some(path) => Some(ResumeFile::open(path, &options.method)?),
        None => None,
    };
    let pool = Pool::new(
        &address,
        Options {
            connections: options.parallel.into(),
            timeout: options.timeout,
            patience: options.patience,
        },
    )?;
    let mut run = Run {
        name,
        options,
        method: options.method.as_str().into(),
        pool: &pool,
        begun: 0,
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

/// The numbers of lines by their result.
#[derive(Debug, Clone, Copy, Default)]
struct MapTotals {
    done: u64,
    failed: u64,
    /// Completed in an earlier run.
    skipped: u64,
}

/// Prints the counts after the end. Prints nothing if all lines succeeded at the first attempt.
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
        counts += &format!("; repeated calls: {repeated}");
    }
    let again = match &options.resume {
        Some(path) => format!(
            "; run the same command again for the rest: {} has the lines that are done",
            path.display()
        ),
        None => "; if this run had --resume FILE, a second run would repeat only the lines that are not done".into(),
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

/// Why `map` ends before its input.
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
    /// The number of lines whose calls were begun.
    begun: usize,
    order: ReorderBuffer<(Origin, Outcome)>,
    record: Option<ResumeFile>,
    progress: ProgressBar,
    tally: MapTotals,
}

impl Run<'_> {
    fn all(&mut self) -> std::result::Result<(), End> {
        let window = usize::from(self.options.parallel) * WINDOW;
        let (sender, done) = unbounded();
        let (feed, lines) = bounded(window);
        lines::read(feed)?;
        let nothing = never();
        let mut over = false;
        loop {
            self.deliver()?;
            let ahead = self.ahead();
            if over && ahead == 0 {
                return Ok(());
            }
            // While the window is full, only results are awaited.
            let full = ahead >= window;
            let input = if over || full { &nothing } else { &lines };
            select! {
                recv(input) -> incoming => match incoming {
                    Ok(incoming) => self.begin(incoming, &sender)?,
                    Err(_) => over = true,
                },
                recv(done) -> outcome => {
                    // Never disconnected, because `sender` above still exists.
                    if let Ok((place, origin, outcome)) = outcome {
                        self.end(place, origin, outcome)?;
                    }
                }
            }
        }
    }

    /// Returns the number of lines whose calls were begun and whose results were not written.
    fn ahead(&self) -> usize {
        self.begun - self.order.passed()
    }

    /// Begins the call for a line, or skips the line.
    fn begin(
        &mut self,
        incoming: Incoming,
        sender: &Sender<(usize, Origin, Outcome)>,
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
            if self.ahead() == 0 {
                self.show(Some(read));
            }
            return Ok(());
        }
        let place = self.begun;
        self.begun += 1;
        let origin = Origin { number, read };
        let sender = sender.clone();
        let started = self
            .pool
            .apply_async_raw(&self.method, text, move |outcome| {
                // The receiver is gone if `map` has ended early.
                let _ = sender.send((place, origin, outcome));
            });
        if let Err(error) = started {
            self.end(place, origin, Err(error))?;
        }
        Ok(())
    }

    /// Handles the end of a line's call.
    fn end(
        &mut self,
        place: usize,
        origin: Origin,
        outcome: Outcome,
    ) -> std::result::Result<(), End> {
        // All further lines would wait as long and fail, too.
        if let Err(error @ ClientError::NoServer { .. }) = outcome {
            self.deliver()?;
            return Err(End::Failed(error.into()));
        }
        self.order.put(place, (origin, outcome));
        Ok(())
    }

    /// Writes the results that are next in order.
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
                    // Line breaks outside of strings are replaced, so that each result is one line. Strings
                    // contain none.
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
        // After the results, because a repeated line is better than a lost one.
        if let Some(record) = &mut self.record {
            record.add(&numbers)?;
        }
        Ok(())
    }

    /// Updates the bar. `passed` is the bytes of the input with completed lines.
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
