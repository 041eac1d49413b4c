//! Measures the cost of `workers.keep-connections`: CPU time per call over lasting connections, per
//! connection with one call, and per connection with two. `cargo bench --bench keeper`.
//!
//! Two servers run side by side, one with keepers and one without. Each is measured in turn in every
//! round; the order changes from round to round. It counts the user and system time of all processes of a
//! server, including keepers. It prints medians and ratios; with `--bar` a ratio above 1.10 for calls or
//! 1.05 for connections with one call is a failure.
#![allow(unsafe_code, clippy::print_stdout)]

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use clap::Parser;

use support::figures::median;
use support::load::{self, Load, Until};
use support::server::Server;
use support::{Failure, words};

/// The highest ratio of a call's cost to its cost without keepers.
const BAR_CALL: f64 = 1.10;
/// The same for a connection with one call.
const BAR_CONNECTION: f64 = 1.05;

#[derive(Parser)]
struct Words {
    /// Rounds, each with both servers.
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Seconds of each kind of load on each server in each round.
    #[arg(long, default_value_t = 2)]
    seconds: u64,
    /// Lasting connections, with one outstanding call each.
    #[arg(long, default_value_t = 64)]
    connections: usize,
    /// Workers of each server.
    #[arg(long, default_value_t = 2)]
    workers: usize,
    /// Fail above the bars
    #[arg(long)]
    bar: bool,
    /// Measure without keepers on both sides: the ratios show the noise
    #[arg(long)]
    self_check: bool,
}

/// Microseconds of CPU time, one figure per round.
#[derive(Default)]
struct Costs {
    call: Vec<f64>,
    one: Vec<f64>,
    two: Vec<f64>,
}

fn main() -> Result<(), Failure> {
    let words = Words::parse_from(["keeper".to_owned()].into_iter().chain(words()));
    let server = |keeps: bool| {
        let workers = words.workers;
        Server::preforkd_with(&format!(
            "[workers]\ncount = {workers}\nkeep-connections = {keeps}\n"
        ))
    };
    let servers = [server(false)?, server(!words.self_check)?];
    let mut costs = [Costs::default(), Costs::default()];
    for round in 0..words.rounds {
        for turn in [round % 2, 1 - round % 2] {
            measure(&servers[turn], &words, &mut costs[turn])?;
        }
    }
    let [without, with] = &costs;
    let call = tell("call over lasting connections", &without.call, &with.call);
    let one = tell("connection that carries one call", &without.one, &with.one);
    tell("connection that carries two calls", &without.two, &with.two);
    if words.bar && !(call <= BAR_CALL && one <= BAR_CONNECTION) {
        return Err(format!("above the bars of {BAR_CALL} and {BAR_CONNECTION}").into());
    }
    Ok(())
}

fn tell(what: &str, without: &[f64], with: &[f64]) -> f64 {
    let (without, with) = (median(without), median(with));
    let ratio = with / without;
    println!(
        "CPU time per {what}: {without:.2} us without keepers, {with:.2} us with them, ratio {ratio:.3}"
    );
    ratio
}

fn measure(server: &Server, words: &Words, costs: &mut Costs) -> Result<(), Failure> {
    let length = Duration::from_secs(words.seconds);
    let mut lasting = Load::open(server.address, words.connections, "1")?;
    lasting.run(Until::Calls(10_000))?;
    let before = server.cpu_time()?;
    let outcome = lasting.run(Until::Elapsed(length))?;
    costs.call.push(apiece(server, before, outcome.calls)?);
    drop(lasting);
    for calls in [1, 2] {
        let before = server.cpu_time()?;
        let connections = connect_and_call(server, calls, length)?;
        let cost = apiece(server, before, connections)?;
        match calls {
            1 => costs.one.push(cost),
            _ => costs.two.push(cost),
        }
    }
    Ok(())
}

fn apiece(server: &Server, before: Duration, count: u64) -> Result<f64, Failure> {
    let used = server.cpu_time()?.saturating_sub(before);
    Ok(used.as_secs_f64() * 1e6 / count as f64)
}

/// Connects, makes `calls` calls one after the other and closes, repeatedly. Returns how often.
fn connect_and_call(server: &Server, calls: usize, length: Duration) -> Result<u64, Failure> {
    let request = load::frame(r#"{"in":"ping","params":1}"#);
    let answer = load::frame(r#"{"out":"pong","result":1}"#);
    let mut received = vec![0; answer.len()];
    let begin = Instant::now();
    let mut count = 0;
    while begin.elapsed() < length {
        let mut stream = TcpStream::connect(server.address)?;
        stream.set_nodelay(true)?;
        for _ in 0..calls {
            stream.write_all(&request)?;
            stream.read_exact(&mut received)?;
            if received != answer {
                return Err("a wrong answer".into());
            }
        }
        count += 1;
    }
    Ok(count)
}
