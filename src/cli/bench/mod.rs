//! Benchmarks a method: sends calls over many connections, and prints throughput and latency (`bench`).
//!
//! It works like redis-benchmark and wrk: a number of connections, a number of open calls on each, for a
//! time or a number of calls. In a closed loop each answer is followed by the next call, so the server sets
//! the pace. In an open loop (`--rate`) calls are due at fixed times, and latency counts from then. So a
//! stall of the server counts for every call that it delays.
//!
//! Each thread has its own event loop (`engine`) and a share of the load. `report` prints the result.
//! Answers are parsed only to tell results from errors.

mod dialect;
mod engine;
mod http;
mod options;
mod pace;
mod report;
mod totals;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Instant;

use crossbeam_channel::{Receiver, unbounded};

use super::output;
use super::parse::json;
use crate::client::Client;
use crate::config::Overrides;
use crate::error::{Error, Result};
use crate::logging::printable_json;
use crate::sys::{process, signal};
use dialect::CallEncoder;
use engine::{BenchEngine, LoadShare};
pub use options::BenchOptions;
use options::DEFAULT_DURATION;
use pace::Interval;
use report::BenchReport;
use totals::BenchTotals;

/// Runs `bench`. If calls failed, the error comes after the report.
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
    // Best effort. If it is not enough, connecting fails with the reason.
    let _ = process::raise_descriptor_limit();
    // Reports a missing or wrong server before the load begins.
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
        output::print(&printable_json(&report.to_json()?))?;
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

/// Runs the threads and adds up their counts. All connect before the first one begins. Also returns why a
/// thread has ended early, if one has.
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
            let engine = BenchEngine::connect(&address, share, calls, interrupted)?;
            // A thread that gets no start, because another one could not connect, ends.
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
    /// Returns the share of thread `number`.
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

/// Returns the share `index` if `whole` is divided into `parts`.
fn part(whole: u64, parts: u64, index: u64) -> u64 {
    whole / parts + u64::from(index < whole % parts)
}

/// Reads the lines of a file of params.
fn read_params(path: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(path)
        .map_err(|error| Error::system(format!("read {}", path.display()), error))?;
    let mut params = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        if !line.trim_ascii().is_empty() {
            json(line, &format!("{}:{number}", path.display()))?;
            params.push(line.to_owned());
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
