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
use engine::{Engine, LoadShare};
pub use options::BenchOptions;
use options::DEFAULT_DURATION;
use pace::Interval;
use report::BenchReport;
use totals::BenchTotals;

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
