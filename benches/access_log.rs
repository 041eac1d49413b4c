//! Measures the CPU time of a line of the access log, and of a call that is sampled out.
//! `cargo bench --bench access_log [-- --bar]`.
//!
//! Three servers run side by side: without the log, with all lines, and with none of them (`sample = 0.0`). Each of
//! the other two is measured in pairs with the first one, in the order ABBA, under the same load. It counts the user
//! and system time of all processes of a server, and the writing threads with them. It prints the medians of the
//! differences; with `--bar` more than 1.5 us for a line or 20 ns for a call that is sampled out is a failure.
#![allow(unsafe_code, clippy::print_stdout)]

mod support;

use std::thread;
use std::time::Duration;

use clap::Parser;

use support::figures::median;
use support::load::{Load, Until};
use support::server::Server;
use support::{Failure, words};

/// The most microseconds of a line.
const BAR_LINE: f64 = 1.5;
/// The most microseconds of a call that is sampled out.
const BAR_SAMPLED_OUT: f64 = 0.02;
/// Longer than lines wait for each other before they are written.
const LAST_LINES: Duration = Duration::from_millis(10);

#[derive(Parser)]
struct Words {
    /// Pairs of measurements
    #[arg(long, default_value_t = 100)]
    pairs: usize,
    /// Calls of each measurement
    #[arg(long, default_value_t = 2_000)]
    calls: u64,
    /// Connections, with one outstanding call each
    #[arg(long, default_value_t = 64)]
    connections: usize,
    /// Fail above the bars
    #[arg(long)]
    bar: bool,
}

struct Measured {
    server: Server,
    load: Load,
}

impl Measured {
    fn start(table: &str, words: &Words) -> Result<Self, Failure> {
        let server = Server::preforkd(1, table)?;
        let mut load = Load::open(server.address, words.connections, "1")?;
        load.run(Until::Calls(10_000))?;
        Ok(Measured { server, load })
    }

    /// Returns the microseconds of CPU time per call.
    fn cost(&mut self, calls: u64) -> Result<f64, Failure> {
        let before = self.server.own_cpu_time()?;
        let outcome = self.load.run(Until::Calls(calls))?;
        thread::sleep(LAST_LINES);
        let used = self.server.own_cpu_time()?.saturating_sub(before);
        Ok(used.as_secs_f64() * 1e6 / outcome.calls as f64)
    }
}

fn main() -> Result<(), Failure> {
    let words = Words::parse_from(["access_log".to_owned()].into_iter().chain(words()));
    let table = |sample: &str| format!("[access-log]\nfile = \"access.log\"\nsample = {sample}\n");
    let line = compare(&words, &table("1.0"))?;
    let sampled_out = compare(&words, &table("0.0"))?;
    println!("CPU time of a line: {line:.3} us (bar: {BAR_LINE})");
    println!(
        "CPU time of a call that is sampled out: {:.1} ns (bar: {:.0})",
        sampled_out * 1e3,
        BAR_SAMPLED_OUT * 1e3
    );
    let is_within = line <= BAR_LINE && sampled_out <= BAR_SAMPLED_OUT;
    if words.bar && !is_within {
        return Err("above a bar".into());
    }
    Ok(())
}

/// Returns the median of the differences to a server without the log.
fn compare(words: &Words, table: &str) -> Result<f64, Failure> {
    let mut without = Measured::start("", words)?;
    let mut with = Measured::start(table, words)?;
    let (mut differences, mut costs) = (Vec::new(), Vec::new());
    for pair in 0..words.pairs {
        let (one, other) = match pair % 2 {
            0 => {
                let one = without.cost(words.calls)?;
                (one, with.cost(words.calls)?)
            }
            _ => {
                let other = with.cost(words.calls)?;
                (without.cost(words.calls)?, other)
            }
        };
        costs.push(one);
        differences.push(other - one);
    }
    println!(
        "without the log {:.3} us per call, median of {} pairs",
        median(&costs),
        words.pairs
    );
    Ok(median(&differences))
}
