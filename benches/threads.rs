//! Measures the CPU time per call of one function on a handler thread, compared with the same function
//! inline on the event loop.
//!
//! The server is this program with two workers. Both methods run in turn, in several rounds, under the
//! same load: 64 connections with one outstanding call each. It counts the user and system time of all
//! processes of the server. It prints the medians and their ratio; with `--bar` a ratio above [`BAR`] is
//! a failure.
#![allow(unsafe_code, clippy::print_stdout)]

mod support;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

use support::figures::{line, median};
use support::load::{Load, Until};
use support::server::Server;
use support::{Failure, Rounds, words};

/// The highest ratio of a call's cost on a thread to its cost inline.
const BAR: f64 = 2.0;

#[derive(Parser)]
struct Words {
    #[command(flatten)]
    of: Rounds,
    /// Workers.
    #[arg(long, default_value_t = 2)]
    workers: usize,
    /// Handler threads of each.
    #[arg(long, default_value_t = 8)]
    threads: usize,
}

fn main() -> ExitCode {
    let words = words();
    if words.first().is_some_and(|word| word == "run") {
        return preforkd::Server::new()
            .named("preforkd")
            .inline("inline", |text: String| Ok(text))
            .method("thread", |text: String| Ok(text))
            .run();
    }
    match compare(Words::parse_from(
        ["threads".to_owned()].into_iter().chain(words),
    )) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            println!("{failure}");
            ExitCode::FAILURE
        }
    }
}

fn compare(words: Words) -> Result<(), Failure> {
    let more = format!(
        "[workers]\ncount = {}\nthreads = {}\n",
        words.workers, words.threads
    );
    let server = Server::of_this_program(&more)?;
    let (mut inline, mut thread) = (Vec::new(), Vec::new());
    for round in 0..words.of.rounds {
        for turn in [round % 2, 1 - round % 2] {
            let (name, figures) = match turn {
                0 => ("inline", &mut inline),
                _ => ("thread", &mut thread),
            };
            figures.push(measure(&server, &words, name)?);
        }
    }
    let ratio = median(&thread) / median(&inline);
    println!(
        "CPU time per call at {} connections, medians of {} rounds: inline {:.2} us, on a thread {:.2} us, \
         ratio {ratio:.3} (bar: {BAR})",
        words.of.connections,
        words.of.rounds,
        median(&inline),
        median(&thread),
    );
    if words.of.bar && (ratio.is_nan() || ratio > BAR) {
        return Err(format!("the ratio {ratio:.3} is above the bar of {BAR}").into());
    }
    Ok(())
}

/// Returns the microseconds of CPU time per call.
fn measure(server: &Server, words: &Words, method: &str) -> Result<f64, Failure> {
    let mut load = Load::of(server.address, words.of.connections, method, "\"hello\"")?;
    load.run(Until::Calls(20_000))?;
    let before = server.cpu_time()?;
    let outcome = load.run(Until::Elapsed(Duration::from_secs(words.of.seconds)))?;
    let used = server.cpu_time()?.saturating_sub(before);
    let cost = used.as_secs_f64() * 1e6 / outcome.calls as f64;
    println!(
        "{method:>10}: {cost:.2} us CPU per call; {}",
        line(&outcome)
    );
    Ok(cost)
}
