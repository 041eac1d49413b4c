//! Measures how many of the possible calls per second a server runs. The number is lower if a call waits while
//! another worker is idle.
//!
//! 4 workers with 2 handler threads each, a pool of 8 programs, and a pool of one Python program that may have 100
//! calls at once. Each call sleeps for 0.1 s, so 80 calls per second are possible, and 1,000 in the last pool. Every
//! round starts a fresh server and opens all connections in one burst. Rows: lasting connections in a closed loop, a
//! new connection for each call, and one connection that sends 64 calls ahead. For comparison, gunicorn runs with the
//! same number of threads (gthread) and of processes (sync), over HTTP. The last rows measure short calls beside long
//! ones, and how soon a burst of connections is spread over the workers. `-- --bar` fails below the bar of any row.
#![allow(unsafe_code, clippy::print_stdout)]

#[path = "capacity/burst.rs"]
mod burst;
#[path = "capacity/peers.rs"]
mod peers;
mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use serde_json::Value;

use support::figures::median;
use support::load::frame;
use support::server::Server;
use support::{Failure, words};

const WORKERS: usize = 4;
const THREADS: usize = 2;
/// Seconds that a call takes.
const CALL: f64 = 0.1;
/// The possible calls per second.
const POSSIBLE: f64 = (WORKERS * THREADS) as f64 / CALL;
/// The calls at once in the program that runs several.
const CONCURRENCY: usize = 100;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Parser)]
struct Options {
    /// Rounds, each with a fresh server for each row
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of load in each round
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// Measure only rows of calls whose name contains this.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Leave gunicorn out.
    #[arg(long)]
    alone: bool,
    /// Fail below the bar.
    #[arg(long)]
    bar: bool,
}

/// A measurement: its name, the part of the possible calls that it must reach, and how it is made.
struct Row {
    name: String,
    /// The possible calls per second.
    possible: f64,
    bar: Option<f64>,
    server: Box<dyn Fn() -> Result<Server, Failure>>,
    load: Box<dyn Fn(SocketAddr, Duration) -> Result<f64, Failure>>,
}

fn main() -> ExitCode {
    let options = Options::parse_from(["capacity".to_owned()].into_iter().chain(words()));
    match measure(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            println!("{failure}");
            ExitCode::FAILURE
        }
    }
}

fn measure(options: &Options) -> Result<(), Failure> {
    println!(
        "{WORKERS} workers x {THREADS}, calls of {CALL} s: {POSSIBLE} calls/s are possible. Calls/s of \
         each round:"
    );
    let mut missed = Vec::new();
    let peers = match options.alone {
        true => Vec::new(),
        false => peers::rows()?,
    };
    let only = options.only.as_deref();
    for row in rows().into_iter().chain(peers) {
        if only.is_some_and(|text| !row.name.contains(text)) {
            continue;
        }
        let mut parts = Vec::new();
        for _ in 0..options.rounds {
            let server = (row.server)()?;
            let rate = (row.load)(server.address, Duration::from_secs(options.seconds))?;
            parts.push(rate / row.possible);
        }
        let lowest = parts.iter().copied().fold(f64::INFINITY, f64::min);
        let shown: Vec<String> = parts
            .iter()
            .map(|part| format!("{:.0}", part * row.possible))
            .collect();
        let bar = row.bar.map_or(String::new(), |bar| format!(" (bar {bar})"));
        println!(
            "{:<40} {:<24} lowest {lowest:.3} of what is possible{bar}",
            row.name,
            shown.join(" ")
        );
        if row.bar.is_some_and(|bar| lowest < bar) {
            missed.push(row.name);
        }
    }
    if only.is_none() && !mixed(options)? {
        missed.push("short beside long".to_owned());
    }
    if only.is_none() && !burst::burst(options.rounds)? {
        missed.push("burst of connections".to_owned());
    }
    match (options.bar, missed.is_empty()) {
        (true, false) => Err(format!("below the bar: {}", missed.join(", ")).into()),
        _ => Ok(()),
    }
}

fn config() -> String {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/capacity");
    let (program, asynchronous) = (
        directory.join("sleep.py"),
        directory.join("asynchronous.py"),
    );
    format!(
        "[workers]\ncount = {WORKERS}\nthreads = {THREADS}\n\
         [methods.thread]\nbuiltin = \"sleep\"\n\
         [pools.p]\ncommand = [\"python3\", {program:?}]\nprocesses = {}\n\
         [methods.pool]\npool = \"p\"\n\
         [pools.a]\nprocesses = 1\ncommand = [\"python3\", {asynchronous:?}]\nconcurrency = {CONCURRENCY}\n\
         [methods.async]\npool = \"a\"\n",
        WORKERS * THREADS
    )
}

fn ours() -> Result<Server, Failure> {
    Server::preforkd_with(&config())
}

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for method in ["thread", "pool"] {
        for connections in [8, 16, 32] {
            rows.push(Row {
                name: format!("{method}, {connections} connections"),
                possible: POSSIBLE,
                bar: Some(0.95),
                server: Box::new(ours),
                load: Box::new(move |address, length| {
                    lasting(address, method, connections, length)
                }),
            });
        }
        rows.push(Row {
            name: format!("{method}, a connection per call"),
            possible: POSSIBLE,
            bar: Some(0.93),
            server: Box::new(ours),
            load: Box::new(move |address, length| one_call_each(address, method, length)),
        });
        rows.push(Row {
            name: format!("{method}, 64 ahead"),
            possible: POSSIBLE,
            bar: Some(0.95),
            server: Box::new(ours),
            load: Box::new(move |address, length| ahead(address, method, length)),
        });
    }
    rows.push(Row {
        name: format!("async, {CONCURRENCY} connections"),
        possible: CONCURRENCY as f64 / CALL,
        bar: Some(0.9),
        server: Box::new(ours),
        load: Box::new(|address, length| lasting(address, "async", CONCURRENCY, length)),
    });
    rows
}

fn connect(address: SocketAddr) -> Result<TcpStream, Failure> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn request(method: &str, seconds: f64, id: usize) -> Vec<u8> {
    frame(&format!(
        r#"{{"in": "{method}", "params": {seconds}, "id": {id}}}"#
    ))
}

/// Reads one answer, which must be a result.
fn answer(stream: &mut TcpStream) -> Result<(), Failure> {
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let mut body = vec![0; u32::from_le_bytes(length) as usize];
    stream.read_exact(&mut body)?;
    let body: Value = serde_json::from_slice(&body)?;
    match body["out"] == "error" {
        true => Err(format!("an error: {body}").into()),
        false => Ok(()),
    }
}

/// Runs `client` on this number of threads until the time is over. Returns calls per second. A call in
/// progress at the end counts in part.
fn clients(
    count: usize,
    length: Duration,
    client: impl Fn(usize, &dyn Fn() -> bool) -> Result<(), String> + Sync,
) -> Result<f64, Failure> {
    let done = Mutex::new(0.0);
    let begin = Instant::now();
    // Whether to make another call. The last one is counted when it asks again.
    let goes_on = |last: &std::cell::Cell<Option<Duration>>| {
        let now = begin.elapsed();
        if let Some(sent) = last.get() {
            let part = (length.min(now) - sent.min(length)).as_secs_f64();
            let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
            *done += part / (now - sent).as_secs_f64();
        }
        last.set(Some(now));
        now < length
    };
    let failures: Vec<String> = thread::scope(|scope| {
        let running: Vec<_> = (0..count)
            .map(|number| {
                let (client, goes_on) = (&client, &goes_on);
                scope.spawn(move || {
                    let last = std::cell::Cell::new(None);
                    client(number, &|| goes_on(&last))
                })
            })
            .collect();
        let ended = running.into_iter().map(|one| one.join());
        ended
            .filter_map(|ended| {
                ended
                    .unwrap_or_else(|_| Err("a client has panicked".into()))
                    .err()
            })
            .collect()
    });
    match failures.first() {
        Some(failure) => Err(failure.as_str().into()),
        None => {
            let done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
            Ok(done / length.as_secs_f64())
        }
    }
}

fn lasting(
    address: SocketAddr,
    method: &str,
    connections: usize,
    length: Duration,
) -> Result<f64, Failure> {
    let mut streams = Vec::new();
    for _ in 0..connections {
        streams.push(connect(address)?);
    }
    clients(connections, length, |number, goes_on| {
        let mut stream = streams[number]
            .try_clone()
            .map_err(|error| error.to_string())?;
        while goes_on() {
            stream
                .write_all(&request(method, CALL, 0))
                .map_err(|error| error.to_string())?;
            answer(&mut stream).map_err(|error| error.to_string())?;
        }
        Ok(())
    })
}

fn one_call_each(address: SocketAddr, method: &str, length: Duration) -> Result<f64, Failure> {
    clients(WORKERS * THREADS, length, |_, goes_on| {
        let call = || {
            let mut stream = connect(address)?;
            stream.write_all(&request(method, CALL, 0))?;
            answer(&mut stream)
        };
        while goes_on() {
            call().map_err(|error: Failure| error.to_string())?;
        }
        Ok(())
    })
}

fn ahead(address: SocketAddr, method: &str, length: Duration) -> Result<f64, Failure> {
    let mut stream = connect(address)?;
    for id in 0..64 {
        stream.write_all(&request(method, CALL, id))?;
    }
    let begin = Instant::now();
    let (mut sent, mut done) = (64, 0);
    let mut rate = None;
    while done < sent {
        answer(&mut stream)?;
        done += 1;
        if begin.elapsed() < length {
            stream.write_all(&request(method, CALL, sent))?;
            sent += 1;
            // They end together, as many as can run at once.
            if done % (WORKERS * THREADS) == 0 {
                rate = Some(done as f64 / begin.elapsed().as_secs_f64());
            }
        }
    }
    rate.ok_or_else(|| "no call was answered in time".into())
}

/// Makes 1,000 short calls from 32 connections while six threads run long calls. Their p99 may be at most
/// three times the one on one worker with all threads.
fn mixed(options: &Options) -> Result<bool, Failure> {
    let several = config();
    let one = format!(
        "[workers]\ncount = 1\nthreads = {}\n[methods.thread]\nbuiltin = \"sleep\"\n",
        WORKERS * THREADS
    );
    let mut ratios = Vec::new();
    let mut shown = Vec::new();
    for _ in 0..options.rounds {
        let (several, one) = (short_beside_long(&several)?, short_beside_long(&one)?);
        ratios.push(several.as_secs_f64() / one.as_secs_f64());
        shown.push(format!("{several:.1?}/{one:.1?}"));
    }
    let ratio = median(&ratios);
    println!(
        "{:<40} {}: median {ratio:.2} times one worker's p99 (bar 3)",
        "short beside long",
        shown.join(" ")
    );
    Ok(ratio <= 3.0)
}

fn short_beside_long(config: &str) -> Result<Duration, Failure> {
    let server = Server::preforkd_with(config)?;
    let address = server.address;
    // Short calls first, so that their run time is known.
    for _ in 0..64 {
        let mut stream = connect(address)?;
        stream.write_all(&request("thread", 0.0, 0))?;
        answer(&mut stream)?;
    }
    let mut held = Vec::new();
    for _ in 0..6 {
        let mut stream = connect(address)?;
        stream.write_all(&request("thread", 10.0, 0))?;
        held.push(stream);
    }
    thread::sleep(Duration::from_millis(200));
    let times: Result<Vec<Vec<Duration>>, Failure> = thread::scope(|scope| {
        let clients: Vec<_> = (0..32)
            .map(|_| {
                scope.spawn(move || {
                    let calls = || {
                        let mut stream = connect(address)?;
                        let mut times = Vec::new();
                        for _ in 0..1000 / 32 {
                            let begin = Instant::now();
                            stream.write_all(&request("thread", 0.0, 0))?;
                            answer(&mut stream)?;
                            times.push(begin.elapsed());
                        }
                        Ok(times)
                    };
                    calls().map_err(|error: Failure| error.to_string())
                })
            })
            .collect();
        let ended = clients.into_iter().map(|client| match client.join() {
            Ok(times) => times.map_err(Failure::from),
            Err(_) => Err("a client has panicked".into()),
        });
        ended.collect()
    });
    let mut times: Vec<Duration> = times?.concat();
    times.sort_unstable();
    let place = (times.len() * 99 / 100).min(times.len().saturating_sub(1));
    times.get(place).copied().ok_or_else(|| "no call".into())
}
