//! Measures the results of a worker under five times its capacity.
//!
//! One worker, eight threads, a method of 5 ms, callers that wait 100 ms. First it finds the peak with
//! rates around the capacity: results per second that are in time. Then it offers five times the peak.
//! With `--bar` less than [`BAR`] of the peak is a failure.
#![allow(unsafe_code, clippy::print_stdout)]

#[path = "../tests/support/open_loop.rs"]
mod open_loop;
mod support;

use std::time::Duration;

use clap::Parser;

use open_loop::{Offer, offer};
use support::server::Server;
use support::{Failure, words};

/// The least part of the peak that must remain.
const BAR: f64 = 0.9;

/// How many times the capacity is offered.
const TIMES: f64 = 5.0;

#[derive(Parser)]
struct Words {
    /// Seconds at each rate.
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// Seconds at five times the peak.
    #[arg(long, default_value_t = 10)]
    overload_seconds: u64,
    /// Handler threads.
    #[arg(long, default_value_t = 8)]
    threads: u32,
    /// The run time of a call in milliseconds
    #[arg(long, default_value_t = 5)]
    work: u32,
    /// The timeout of a caller in milliseconds
    #[arg(long, default_value_t = 100)]
    patience: u64,
    /// Connections.
    #[arg(long, default_value_t = 16)]
    connections: usize,
    /// Fail below the bar
    #[arg(long)]
    bar: bool,
}

fn main() -> Result<(), Failure> {
    let program = "goodput".to_owned();
    let words = Words::parse_from([program].into_iter().chain(words()));
    let more = format!(
        "[methods.sleep]\nbuiltin = \"sleep\"\n[workers]\ncount = 1\nthreads = {}\n",
        words.threads
    );
    let server = Server::preforkd_with(&more)?;
    let params = format!("{}", f64::from(words.work) / 1000.0);
    let calls = Offer {
        connections: words.connections,
        method: "sleep",
        params: &params,
        patience: Duration::from_millis(words.patience),
    };
    let can = f64::from(words.threads) * 1000.0 / f64::from(words.work);
    let mut peak: f64 = 0.0;
    for share in [0.6, 0.8, 0.9, 1.0, 1.1, 1.25] {
        let length = Duration::from_secs(words.seconds);
        let outcome = offer(server.address, calls, can * share, length)?;
        println!("{share:>5} of what the threads can do: {}", outcome.line());
        peak = peak.max(outcome.goodput());
    }
    let length = Duration::from_secs(words.overload_seconds);
    let outcome = offer(server.address, calls, peak * TIMES, length)?;
    println!("{TIMES:>5} times the peak: {}", outcome.line());
    let ratio = outcome.goodput() / peak;
    println!(
        "goodput with {} ms of work and {} ms of patience: peak {peak:.0}/s, at {TIMES} times that \
         {:.0}/s, ratio {ratio:.3} (bar: {BAR})",
        words.work,
        words.patience,
        outcome.goodput(),
    );
    if words.bar && ratio < BAR {
        return Err(format!("{ratio:.3} of the peak is below the bar of {BAR}").into());
    }
    Ok(())
}
