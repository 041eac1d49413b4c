//! Measures listeners with a process for each connection: `cargo bench --bench sessions [-- --bar]`.
//!
//! - the time of connect, one `ping` and close, with and without a process that was forked ahead
//! - short connections per second, compared with a shared listener and Python's ForkingTCPServer
//! - the memory of an idle connection
//! - how much a source over `per-source` slows down other sources
#![allow(unsafe_code, clippy::print_stdout, clippy::print_stderr)]

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use hdrhistogram::Histogram;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, socket};

use support::figures::MissedBars;
use support::server::Server;
use support::{Failure, figures, words};

#[derive(Parser)]
struct Words {
    /// Rounds, each with everything that is compared
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Connections in each round, one after the other
    #[arg(long, default_value_t = 500)]
    connections: usize,
    /// Seconds of short connections in each round, on each server
    #[arg(long, default_value_t = 2)]
    seconds: u64,
    /// Fail beyond the bars
    #[arg(long)]
    bar: bool,
}

/// Clients that open short connections at once.
const CLIENTS: usize = 8;
/// The pause between two connections, so that the next process has been forked.
const PAUSE: Duration = Duration::from_millis(3);
/// Idle connections whose memory is measured.
const IDLE: usize = 64;
/// Connections of a source that has too many.
const FLOOD: usize = 10_000;

fn main() -> Result<(), Failure> {
    let words = Words::parse_from(["sessions".to_owned()].into_iter().chain(words()));
    let (_, most_files) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most_files, most_files)?;
    let mut missed = MissedBars::default();
    let [mut with, mut without] = [Vec::new(), Vec::new()];
    let [mut isolated, mut shared, mut python] = [Vec::new(), Vec::new(), Vec::new()];
    for _ in 0..words.rounds {
        let spares = of_listener("isolation = \"connection\"\nspare = 16\nprocesses = 1024\n")?;
        with.push(one_by_one(&spares, words.connections)?);
        isolated.push(per_second(&spares, words.seconds)?);
        drop(spares);
        let none = of_listener("isolation = \"connection\"\nspare = 0\n")?;
        without.push(one_by_one(&none, words.connections)?);
        drop(none);
        shared.push(per_second(&of_listener("")?, words.seconds)?);
        python.push(per_second(&forking()?, words.seconds)?);
    }
    let ms = |of: &[Histogram<u64>], quantile: f64| {
        let values: Vec<f64> = of
            .iter()
            .map(|one| one.value_at_quantile(quantile) as f64 / 1e6)
            .collect();
        figures::median(&values)
    };
    println!(
        "connect, ping, close, in ms, median of {} rounds:",
        words.rounds
    );
    missed.check("  with a spare process, p50", ms(&with, 0.5), 0.3);
    missed.check("  with a spare process, p99", ms(&with, 0.99), 2.0);
    missed.check("  without a spare process, p50", ms(&without, 0.5), 1.5);
    let [isolated, shared, python] = [&isolated, &shared, &python].map(|it| figures::median(it));
    println!(
        "short connections per second, {CLIENTS} at once: isolated {isolated:.0} (bar 2000), shared {shared:.0}, \
         ForkingTCPServer {python:.0}"
    );
    println!(
        "  ratio to the shared listener {:.2}, to ForkingTCPServer {:.2}",
        isolated / shared,
        isolated / python
    );
    missed.check(
        "  milliseconds for a short connection",
        1000.0 / isolated,
        0.5,
    );
    missed.check(
        "private MB of the process of an idle connection",
        memory()?,
        1.5,
    );
    missed.check(
        "p99 of others while one source is refused, ratio",
        flood(&words)?,
        2.0,
    );
    missed.end(words.bar)
}

/// Starts a server whose listener has these keys.
fn of_listener(keys: &str) -> Result<Server, Failure> {
    let tables = format!("{keys}[log]\nlevel = \"error\"\n[workers]\ncount = 2\n");
    Server::preforkd_with(&tables)
}

fn forking() -> Result<Server, Failure> {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/sessions/forking.py");
    Server::other(|address| {
        let mut command = Command::new("python3");
        command.arg(program).arg(address.to_string());
        command
    })
}

/// Connects, calls `ping` and closes.
fn session(address: SocketAddr) -> Result<(), Failure> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    ping(&mut stream)
}

fn ping(stream: &mut TcpStream) -> Result<(), Failure> {
    let body = br#"{"in": "ping", "params": 1}"#;
    let mut frame = (body.len() as u32).to_le_bytes().to_vec();
    frame.extend_from_slice(body);
    stream.write_all(&frame)?;
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let mut answer = vec![0; u32::from_le_bytes(length) as usize];
    stream.read_exact(&mut answer)?;
    match answer.windows(4).any(|it| it == b"pong") {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&answer).into_owned().into()),
    }
}

/// Returns the times of connections one after the other, in nanoseconds.
fn one_by_one(server: &Server, count: usize) -> Result<Histogram<u64>, Failure> {
    let mut times = Histogram::new(3)?;
    for number in 0..count + 20 {
        thread::sleep(PAUSE);
        let begin = Instant::now();
        session(server.address)?;
        // The first ones find cold caches.
        if number >= 20 {
            times.record(u64::try_from(begin.elapsed().as_nanos())?)?;
        }
    }
    Ok(times)
}

/// Returns how many short connections a server serves per second.
fn per_second(server: &Server, seconds: u64) -> Result<f64, Failure> {
    let end = Instant::now() + Duration::from_secs(seconds);
    let address = server.address;
    let client = move || {
        let mut count = 0;
        while Instant::now() < end {
            session(address).map_err(|error| error.to_string())?;
            count += 1;
        }
        Ok::<u64, String>(count)
    };
    let clients: Vec<_> = (0..CLIENTS).map(|_| thread::spawn(client)).collect();
    let mut sum = 0;
    for client in clients {
        sum += client.join().map_err(|_| "a client panicked")??;
    }
    Ok(sum as f64 / seconds as f64)
}

/// Returns the private memory of a connection's process that has answered one call, in MB.
fn memory() -> Result<f64, Failure> {
    let server = of_listener("isolation = \"connection\"\nspare = 0\n")?;
    let mut idle = Vec::new();
    for _ in 0..IDLE {
        let mut stream = TcpStream::connect(server.address)?;
        ping(&mut stream)?;
        idle.push(stream);
    }
    let mut sizes = Vec::new();
    for process in server.processes()? {
        let title = fs::read(format!("/proc/{}/cmdline", process.pid))?;
        if !String::from_utf8_lossy(&title).contains(": connection 127") {
            continue;
        }
        let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", process.pid))?;
        let lines = rollup.lines().filter(|line| line.starts_with("Private_"));
        let kib = lines.filter_map(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok());
        sizes.push(kib.sum::<f64>() / 1000.0);
    }
    println!("{} idle connections", sizes.len());
    Ok(figures::median(&sizes))
}

/// Returns the ratio of the p99 of one source with and without another source that is over its limit, and keeps all
/// connections that it opens.
fn flood(words: &Words) -> Result<f64, Failure> {
    let mut ratios = Vec::new();
    for _ in 0..words.rounds {
        let server = of_listener("isolation = \"connection\"\nspare = 16\nper-source = 16\n")?;
        let quiet = one_by_one(&server, words.connections)?;
        let is_over = AtomicBool::new(false);
        let loud = thread::scope(|scope| {
            let flood = scope.spawn(|| {
                let mut opened = Vec::new();
                while opened.len() < FLOOD && !is_over.load(Relaxed) {
                    opened.extend(connect_from(server.address));
                }
                opened.len()
            });
            let loud = one_by_one(&server, words.connections);
            is_over.store(true, Relaxed);
            let opened = flood.join().unwrap_or_default();
            println!("  {opened} connections of the other source");
            loud
        })?;
        ratios.push(loud.value_at_quantile(0.99) as f64 / quiet.value_at_quantile(0.99) as f64);
    }
    Ok(figures::median(&ratios))
}

/// Connects from another address.
fn connect_from(address: SocketAddr) -> Result<OwnedFd, Failure> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
    let source = SocketAddr::from((Ipv4Addr::new(127, 0, 0, 2), 0));
    bind(socket.as_raw_fd(), &SockaddrStorage::from(source))?;
    connect(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    Ok(socket)
}
