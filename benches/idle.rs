//! Measures the cost of ten thousand idle connections: memory of each, CPU, and the latency of one active
//! client. `cargo bench --bench idle -- [--connections N] [--rounds N]`.
//!
//! Two servers run side by side, one with the idle connections and one without. The active client
//! alternates between them, so that other load on the machine affects both.
#![allow(unsafe_code, clippy::print_stdout, clippy::print_stderr)]

mod support;

use std::fs;
use std::time::Duration;

use clap::Parser;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use support::load::{Load, Until};
use support::server::Server;
use support::{Failure, figures, words};

#[derive(Parser)]
struct Words {
    /// Idle connections, after one call of 3 kB each.
    #[arg(long, default_value_t = 10_000)]
    connections: usize,
    /// Runs of the active client with each server
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Workers of each server.
    #[arg(long, default_value_t = 2)]
    workers: usize,
}

/// How long the CPU time of idle connections is measured.
const WATCHED: Duration = Duration::from_secs(5);

fn main() -> Result<(), Failure> {
    let words = Words::parse_from(["idle".to_owned()].into_iter().chain(words()));
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    if hard < words.connections as u64 + 100 {
        return Err(format!("{hard} descriptors are all that this process may have").into());
    }
    let params = format!("\"{}\"", "x".repeat(3000));
    let crowded = Server::preforkd(words.workers, "")?;
    let empty = Server::preforkd(words.workers, "")?;
    // Allocate what a worker has once, for any number of clients.
    drop(Load::open(crowded.address, 64, &params)?);
    let before = memory(&crowded)?;
    let idle = Load::open(crowded.address, words.connections, &params)?;
    let apiece = memory(&crowded)?.saturating_sub(before) / words.connections as u64;
    println!(
        "{} idle connections: {apiece} bytes of RSS apiece",
        words.connections
    );

    let cpu = crowded.cpu_time()?;
    std::thread::sleep(WATCHED);
    let cpu = crowded.cpu_time()?.saturating_sub(cpu);
    println!("CPU in {WATCHED:?} of idleness: {cpu:?}, master and heartbeats included");

    let mut with = Load::open(crowded.address, 1, "\"hello\"")?;
    let mut without = Load::open(empty.address, 1, "\"hello\"")?;
    let (mut p99_with, mut p99_without) = (Vec::new(), Vec::new());
    for round in 0..words.rounds * 2 {
        // The order alternates.
        let crowded_now = (round % 2 == 0) == (round / 2 % 2 == 0);
        let (load, p99) = match crowded_now {
            true => (&mut with, &mut p99_with),
            false => (&mut without, &mut p99_without),
        };
        let outcome = load.run(Until::Elapsed(Duration::from_millis(700)))?;
        p99.push(outcome.latencies.value_at_quantile(0.99) as f64 / 1e3);
    }
    let (with, without) = (figures::median(&p99_with), figures::median(&p99_without));
    println!(
        "an active client's p99, median of {} runs: {without:.1} us without, {with:.1} us with \
         them, ratio {:.3} (bar 1.10)",
        words.rounds,
        with / without
    );
    drop(idle);
    Ok(())
}

/// Returns the resident memory of all workers in bytes.
fn memory(server: &Server) -> Result<u64, Failure> {
    let mut sum = 0;
    for process in server.processes()?.iter().skip(1) {
        let status = fs::read_to_string(format!("/proc/{}/status", process.pid))?;
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().nth(1));
        sum += kib.ok_or("no VmRSS")?.parse::<u64>()? * 1024;
    }
    Ok(sum)
}
