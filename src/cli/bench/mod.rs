//! `bench`: loads a server with calls, and prints how it bears them.
//!
//! As redis-benchmark and wrk do it: so many connections, so many calls ahead on each, for a time or
//! for a count. Closed, a call follows an answer, and the server sets the pace; open (`--rate`), calls
//! are due at fixed times whatever the server does, and their latency counts from then, so that a
//! stall costs every call that it held up and not the one alone that was under way.
//!
//! Each thread has its own event loop (`engine`) and its share of everything; `report` is what is
//! printed at the end. An answer is looked at only so far as to tell a result from an error.

mod dialect;
mod engine;
mod http;
mod pace;
mod report;
mod totals;

use std::fs;
use std::num::{NonZeroU32, NonZeroU64};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use crossbeam_channel::{Receiver, unbounded};

use super::args::{duration, json};
use super::output;
use super::target::TargetArgs;
use super::units::plural;
use crate::client::Client;
use crate::config::Overrides;
use crate::error::{Error, Result};
use crate::sys::{process, signal};
pub use dialect::BenchDialect;
use dialect::CallEncoder;
use engine::{Engine, LoadShare};
use pace::Interval;
use report::BenchReport;
use totals::BenchTotals;

/// The words of `bench`.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct BenchOptions {
    /// The method's name
    pub method: String,
    /// The server
    #[command(flatten)]
    pub target: TargetArgs,
    /// How many connections
    #[arg(long, short, value_name = "N", default_value = "64")]
    pub connections: NonZeroU32,
    /// How many calls may be unanswered on each connection
    #[arg(long, short = 'P', value_name = "N", default_value = "1")]
    pub depth: NonZeroU32,
    /// For how long [default: 10s, unless there is --count]
    #[arg(long, short, value_name = "TIME", value_parser = duration, conflicts_with = "count")]
    pub duration: Option<Duration>,
    /// How many calls
    #[arg(long, short = 'n', value_name = "N")]
    pub count: Option<NonZeroU64>,
    /// Open loop: so many calls are due each second, whatever the server does
    #[arg(long, short, value_name = "N")]
    pub rate: Option<NonZeroU64>,
    /// Threads that make the load
    #[arg(long, short, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=256))]
    pub threads: u16,
    /// The params of each call, as JSON
    #[arg(
        long,
        value_name = "JSON",
        default_value = "null",
        allow_negative_numbers = true
    )]
    pub params: String,
    /// Params from a file, one JSON a line, in turn
    #[arg(long, value_name = "FILE", conflicts_with = "params")]
    pub params_file: Option<PathBuf>,
    /// How long an answer may take before its call has failed
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub timeout: Duration,
    /// How calls are written
    #[arg(long, value_name = "NAME", default_value = "frame")]
    pub dialect: BenchDialect,
    /// Print it as JSON, for programs
    #[arg(long)]
    pub json: bool,
}

impl BenchOptions {
    /// What no single word can be blamed for.
    pub(super) fn checked(self) -> Result<Self> {
        json(self.params.clone(), "--params")?;
        if u32::from(self.threads) > self.connections.get() {
            return Err(Error::Usage(format!(
                "{} threads have nothing to do with {}; each needs one at least",
                self.threads,
                plural(self.connections.get().into(), "connection")
            )));
        }
        if self.depth.get() > MOST_DEPTH {
            return Err(Error::Usage(format!(
                "--depth {} is more than {MOST_DEPTH}, and no server reads that far ahead",
                self.depth
            )));
        }
        // Too short for anybody to mean it, and the report would be of nothing.
        if self.duration.is_some_and(|duration| duration.is_zero()) {
            return Err(Error::Usage(
                "--duration is zero, and no call is made in that time; give 1s or more".into(),
            ));
        }
        if self.timeout.is_zero() {
            return Err(Error::Usage(
                "--timeout is zero; no answer comes that fast".into(),
            ));
        }
        Ok(self)
    }
}

/// The most calls ahead on one connection.
const MOST_DEPTH: u32 = 65_536;
/// For how long, where nothing else is said.
const DEFAULT_DURATION: Duration = Duration::from_secs(10);

/// Does it. Calls that failed are the exit code's affair, after the report.
pub(super) fn bench(name: &str, options: &BenchOptions, overrides: &Overrides) -> Result<()> {
    let address = options.target.address(overrides)?;
    let params = match &options.params_file {
        Some(path) => read_params(path)?,
        None => vec![options.params.clone()],
    };
    let calls = Arc::new(CallEncoder::new(
        options.dialect,
        &address,
        &options.method,
        &params,
    )?);
    // So many connections as asked for; where that is not to be had, connecting says so.
    let _ = process::raise_descriptor_limit();
    // A server that is not there, or another one, is told before the load is.
    Client::connect(&address, Some(options.timeout))?;
    let interrupted = signal::interrupt_flag()
        .map_err(|error| Error::system("catch the interrupt signal", error))?;
    let cpu_before = process::cpu_time();
    let (tally, gone) = load(options, &address, &calls, &interrupted)?;
    let report = BenchReport {
        options,
        address: &address,
        tally: &tally,
        cpu: process::cpu_time().saturating_sub(cpu_before),
    };
    if options.json {
        output::print(&report.to_json()?)?;
    } else {
        output::print(&report.to_text(output::wants_colours()))?;
        if let Some(warning) = report.warning() {
            output::print_error(name, &format!("warning: {warning}"));
        }
    }
    match (gone, report.failure()) {
        (Some(error), _) => Err(error),
        (None, Some(sentence)) => Err(Error::Refused(sentence)),
        (None, None) => Ok(()),
    }
}

/// Runs the threads, and adds up what they saw; with it comes why one of them ended early, if any did.
/// All connect before the first one begins.
fn load(
    options: &BenchOptions,
    address: &str,
    calls: &Arc<CallEncoder>,
    interrupted: &Arc<AtomicBool>,
) -> Result<(BenchTotals, Option<Error>)> {
    let threads = u64::from(options.threads);
    let (connected, ready) = unbounded();
    let (go, start) = unbounded();
    let mut running = Vec::new();
    for number in 0..threads {
        let share = LoadShare::of(options, threads, number);
        let (address, calls) = (address.to_owned(), Arc::clone(calls));
        let (interrupted, connected) = (Arc::clone(interrupted), connected.clone());
        let start: Receiver<Instant> = start.clone();
        let work = move || {
            let engine = Engine::connect(&address, share, calls, interrupted)?;
            // Whoever gets no word, because somebody else could not connect, has nothing to do.
            let _ = connected.send(());
            drop(connected);
            match start.recv() {
                Ok(begin) => engine.run(begin),
                Err(_) => Ok((BenchTotals::new()?, None)),
            }
        };
        let thread = thread::Builder::new()
            .name("load".into())
            .spawn(work)
            .map_err(|error| Error::system("start a thread for the load", error))?;
        running.push(thread);
    }
    drop(connected);
    if ready.iter().count() == running.len() {
        let begin = Instant::now();
        for _ in 0..threads {
            let _ = go.send(begin);
        }
    }
    drop(go);
    let (mut tally, mut gone) = (BenchTotals::new()?, None);
    for thread in running {
        let (one, left) = thread
            .join()
            .map_err(|_| Error::Bug("a thread of the load panicked".into()))??;
        tally.add(&one)?;
        gone = gone.or(left);
    }
    Ok((tally, gone))
}

impl LoadShare {
    /// What number `number` of so many threads has to do.
    fn of(options: &BenchOptions, threads: u64, number: u64) -> Self {
        LoadShare {
            connections: part(options.connections.get().into(), threads, number),
            depth: options.depth.get() as usize,
            count: options
                .count
                .map(|count| part(count.get(), threads, number)),
            duration: match (options.duration, options.count) {
                (None, None) => Some(DEFAULT_DURATION),
                (duration, _) => duration,
            },
            interval: options.rate.map(|rate| Interval {
                rate: rate.get(),
                every: threads,
                offset: number,
            }),
            timeout: options.timeout,
            first: number,
        }
    }
}

/// The share of `whole` that number `index` of `parts` gets.
fn part(whole: u64, parts: u64, index: u64) -> u64 {
    whole / parts + u64::from(index < whole % parts)
}

/// The lines of a file of params.
fn read_params(path: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(path)
        .map_err(|error| Error::system(format!("read {}", path.display()), error))?;
    let mut params = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        if !line.trim_ascii().is_empty() {
            params.push(json(
                line.to_owned(),
                &format!("{}:{number}", path.display()),
            )?);
        }
    }
    if params.is_empty() {
        return Err(Error::Usage(format!(
            "{} has no params; write one JSON value on each line",
            path.display()
        )));
    }
    Ok(params)
}
