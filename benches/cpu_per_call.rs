//! Measures the CPU time per call of preforkd, compared with a bare epoll server that parses nothing.
//!
//! Both run with two workers, in turn, in several rounds, under the same load: 64 connections with one
//! outstanding ping each. It counts the user and system time of all processes of the server during the
//! load, without connecting. It prints the medians and their ratio; with `--bar` a ratio above [`BAR`] is
//! a failure. The order changes from round to round, so that neither is always the first.
//!
//! `--against PATH` compares this build with another binary of preforkd instead: see `against`.
#![allow(unsafe_code, clippy::print_stdout)]

#[path = "cpu_per_call/against.rs"]
mod against;
mod support;

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

use support::figures::{line, median};
use support::load::{self, Load, Until};
use support::server::Server;
use support::{Failure, bare, words};

/// The highest ratio of preforkd's cost to the bare server's.
const BAR: f64 = 1.25;

#[derive(Parser)]
struct Words {
    /// Rounds, each with everything that is compared [default: 5, or 9 with --against]
    #[arg(long)]
    rounds: Option<usize>,
    /// Seconds of load in each round, on each server. Not used with --against
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// Connections, with one outstanding call each.
    #[arg(long, default_value_t = 64)]
    connections: usize,
    /// Workers of each server [default: 2, or 1 with --against]
    #[arg(long)]
    workers: Option<usize>,
    /// Fail above the bar
    #[arg(long)]
    bar: bool,
    /// Compare the bare server (with --against: that binary) with itself: the ratio shows the noise
    #[arg(long)]
    self_check: bool,
    /// Compare this build with another binary of preforkd.
    #[arg(long, value_name = "PATH")]
    against: Option<PathBuf>,
    /// With --against: use this binary instead of the one that was built with this program.
    #[arg(long, value_name = "PATH", requires = "against")]
    binary: Option<PathBuf>,
    /// With --against: inline calls to each server in each round. There are fewer calls of slower kinds
    #[arg(long, value_name = "N", default_value_t = 100_000)]
    calls: u64,
}

fn main() -> Result<(), Failure> {
    let words = words();
    if let ["serve", address, workers] = words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        let answer = load::frame(bare::PONG);
        return bare::serve(address.parse()?, workers.parse()?, &answer);
    }
    if words.first().is_some_and(|word| word == "answer") {
        return against::answer();
    }
    let program = "cpu_per_call".to_owned();
    let words = Words::parse_from([program].into_iter().chain(words));
    if let Some(path) = &words.against {
        return against::compare(path, &words);
    }
    let (rounds, workers) = (words.rounds.unwrap_or(5), words.workers.unwrap_or(2));
    let other = if words.self_check {
        "bare again"
    } else {
        "preforkd"
    };

    let (mut bare, mut ours) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        for turn in [round % 2, 1 - round % 2] {
            let (name, figures) = match turn {
                0 => ("bare", &mut bare),
                _ => (other, &mut ours),
            };
            let server = match name {
                "preforkd" => Server::preforkd(workers, "")?,
                _ => Server::bare(workers)?,
            };
            let cost = measure(&server, &words, name)?;
            figures.push(cost);
        }
    }
    let ratio = median(&ours) / median(&bare);
    println!(
        "CPU time per call at {} connections, medians of {rounds} rounds: bare {:.2} us, {other} {:.2} us, \
         ratio {ratio:.3} (bar: {BAR})",
        words.connections,
        median(&bare),
        median(&ours),
    );
    if words.bar && (ratio.is_nan() || ratio > BAR) {
        return Err(format!("the ratio {ratio:.3} is above the bar of {BAR}").into());
    }
    Ok(())
}

/// Returns the microseconds of CPU time per call.
fn measure(server: &Server, words: &Words, name: &str) -> Result<f64, Failure> {
    let mut load = Load::open(server.address, words.connections, bare::PARAMS)?;
    // Bring caches, buffers and clock speed into the state under load.
    load.run(Until::Calls(20_000))?;
    let before = server.cpu_time()?;
    let outcome = load.run(Until::Elapsed(Duration::from_secs(words.seconds)))?;
    let used = server.cpu_time()?.saturating_sub(before);
    let cost = used.as_secs_f64() * 1e6 / outcome.calls as f64;
    println!("{name:>10}: {cost:.2} us CPU per call; {}", line(&outcome));
    Ok(cost)
}
