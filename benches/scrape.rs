//! Measures the observer: the time of a scrape on a busy server, what scrapes cost calls and the master, and the
//! memory of the observer and of the metrics board. `cargo bench --bench scrape [-- --bar] [--short]`.
//!
//! A scrape comes once per second, as from Prometheus, so that each one asks the master. All figures of a server
//! come from the same server.
#![allow(unsafe_code, clippy::print_stdout, clippy::print_stderr)]

mod support;

use std::fs;
use std::hint::black_box;
use std::net::{SocketAddr, TcpStream};
use std::os::linux::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use support::figures::{MissedBars, median, quantile};
use support::http::HttpClient;
use support::load::{Call, Load, Until, frame};
use support::server::{Server, cpu_time_of};
use support::{Failure, words};

#[derive(Parser)]
struct Words {
    /// Scrapes of each server, one per second [default: 100, or 8 with --short]
    #[arg(long)]
    scrapes: Option<usize>,
    /// Pairs of calls with and without scrapes [default: 60, or 6 with --short]
    #[arg(long)]
    pairs: Option<usize>,
    /// Connections to each server [default: 10000, or 1000 with --short]
    #[arg(long)]
    connections: Option<usize>,
    /// Fail beyond the bars
    #[arg(long)]
    bar: bool,
    /// Measure for less than a minute
    #[arg(long)]
    short: bool,
}

/// What is measured on each server.
struct Extent {
    scrapes: usize,
    pairs: usize,
    connections: usize,
}

/// Between two scrapes, so that the answer of the master is not current any more.
const PERIOD: Duration = Duration::from_millis(1_010);
/// How long the observer is watched without a request.
const WATCHED: Duration = Duration::from_secs(10);
/// Connections over which each method is called, so that each worker has counted each.
const CALLING: usize = 512;

fn main() -> Result<(), Failure> {
    let words = Words::parse_from(["scrape".to_owned()].into_iter().chain(words()));
    let default = |long, short| if words.short { short } else { long };
    let extent = Extent {
        scrapes: words.scrapes.unwrap_or(default(100, 8)),
        pairs: words.pairs.unwrap_or(default(60, 6)),
        connections: words.connections.unwrap_or(default(10_000, 1_000)),
    };
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    if hard < extent.connections as u64 + 200 {
        return Err(format!("{hard} descriptors are all that this process may have").into());
    }
    let mut missed = MissedBars::default();
    let small = Observed::start(8, 50, &extent)?;
    missed.check(
        "p99 of a scrape in ms, 8 workers x 50 methods",
        small.scrapes(&extent)?,
        5.0,
    );
    let busy = with_busy_cpus(|| small.scrapes(&extent))?;
    missed.check("  the same with all CPUs busy", busy, 25.0);
    missed.check(
        "bytes of the board per method and worker",
        small.board_bytes,
        5_000.0,
    );
    drop(small);

    let large = Observed::start(64, 200, &extent)?;
    missed.check(
        "p99 of a scrape in ms, 64 workers x 200 methods",
        large.scrapes(&extent)?,
        20.0,
    );
    missed.check(
        "CPU of the master per scrape in ms, 64 workers",
        large.master_ms(&extent)?,
        1.0,
    );
    missed.check("private MB of the observer", large.private_mb()?, 6.0);
    missed.check(
        "wake-ups of the observer in 10 s without requests",
        large.wake_ups()?,
        0.0,
    );
    drop(large);

    let ratio = calls_beside_scrapes(&extent)?;
    missed.check("p99 of calls with 1 scrape/s to none, ratio", ratio, 1.05);
    missed.end(words.bar)
}

/// A server with an observer, on which all threads run a call.
struct Observed {
    server: Server,
    observer: SocketAddr,
    observer_pid: u32,
    board_bytes: f64,
    _connections: Vec<TcpStream>,
}

impl Observed {
    fn start(workers: usize, methods: usize, extent: &Extent) -> Result<Self, Failure> {
        let tables: String = (0..methods)
            .map(|number| {
                format!("[methods.method_{number:03}]\nbuiltin = \"sleep\"\ntimeout = \"10min\"\n")
            })
            .collect();
        let config = format!(
            "[workers]\ncount = {workers}\nthreads = 2\ndrain-timeout = \"10min\"\n[observe]\naddress = \"127.0.0.1:0\"\n\
             {tables}"
        );
        let server = Server::preforkd_with(&config)?;
        let (observer, observer_pid) = observer_of(&server)?;
        let mut load = Load::open(server.address, CALLING, "1")?;
        load.run(Until::Calls(CALLING as u64))?;
        drop(load);
        let before = board(&server)?;
        for number in 0..methods {
            let method = format!("method_{number:03}");
            let call = Call {
                method: &method,
                params: "0",
                result: "0",
                http: false,
            };
            // Opening makes one call on each connection.
            drop(Load::calling(server.address, CALLING, &call)?);
        }
        let board_bytes = (board(&server)? - before) / (workers * methods) as f64;
        let connections = occupied(&server, 2 * workers, extent.connections)?;
        println!(
            "{workers} workers, {methods} methods, {} connections",
            connections.len()
        );
        Ok(Observed {
            server,
            observer,
            observer_pid,
            board_bytes,
            _connections: connections,
        })
    }

    /// Returns the p99 of scrapes in milliseconds, one per second.
    fn scrapes(&self, extent: &Extent) -> Result<f64, Failure> {
        let mut client = HttpClient::new(self.observer);
        let mut times = Vec::new();
        let mut bytes = 0;
        // The first one finds cold caches.
        for number in 0..=extent.scrapes {
            thread::sleep(PERIOD);
            let begin = Instant::now();
            let text = client.get("/metrics")?;
            let took = begin.elapsed().as_secs_f64() * 1e3;
            if !text.contains("preforkd_master_responding 1\n") {
                return Err("the master does not respond".into());
            }
            bytes = text.len();
            if number > 0 {
                times.push(took);
            }
        }
        println!(
            "  {} scrapes of {bytes} bytes in ms: p50 {:.2}, p99 {:.2}, longest {:.2}",
            times.len(),
            quantile(&times, 0.5),
            quantile(&times, 0.99),
            quantile(&times, 1.0)
        );
        Ok(quantile(&times, 0.99))
    }

    /// Returns the CPU time that a scrape costs the master, in milliseconds.
    fn master_ms(&self, extent: &Extent) -> Result<f64, Failure> {
        let seconds = extent.scrapes.min(30);
        let of = |scrapes: bool| -> Result<f64, Failure> {
            let mut client = HttpClient::new(self.observer);
            let before = cpu_time_of(self.server.pid())?;
            for _ in 0..seconds {
                thread::sleep(PERIOD);
                if scrapes {
                    client.get("/metrics")?;
                }
            }
            let used = cpu_time_of(self.server.pid())?.saturating_sub(before);
            Ok(used.as_secs_f64() * 1e3 / seconds as f64)
        };
        let (idle, scraped) = (of(false)?, of(true)?);
        println!("  master: {idle:.3} ms per second without scrapes, {scraped:.3} with them");
        Ok((scraped - idle).max(0.0))
    }

    fn private_mb(&self) -> Result<f64, Failure> {
        let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", self.observer_pid))?;
        let lines = rollup.lines().filter(|line| line.starts_with("Private_"));
        let kib = lines.filter_map(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok());
        Ok(kib.sum::<f64>() * 1024.0 / 1e6)
    }

    /// Returns how often the observer has waited in that time.
    fn wake_ups(&self) -> Result<f64, Failure> {
        let waits = || -> Result<f64, Failure> {
            let status = fs::read_to_string(format!("/proc/{}/status", self.observer_pid))?;
            let mut lines = status.lines();
            let line = lines.find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            Ok(line.ok_or("no count of switches")?.trim().parse()?)
        };
        // Until the last connection is forgotten.
        thread::sleep(PERIOD);
        let before = waits()?;
        thread::sleep(WATCHED);
        Ok(waits()? - before)
    }
}

fn observer_of(server: &Server) -> Result<(SocketAddr, u32), Failure> {
    let status = server.status()?;
    let observer = &status["master"]["observer"];
    let address = observer["address"].as_str().ok_or("no observer")?;
    let pid = observer["pid"].as_u64().ok_or("no observer")?;
    Ok((address.parse()?, u32::try_from(pid)?))
}

/// Returns the memory that the metrics board takes, in bytes.
fn board(server: &Server) -> Result<f64, Failure> {
    for entry in fs::read_dir(format!("/proc/{}/fd", server.pid()))? {
        let path = entry?.path();
        let target = fs::read_link(&path).unwrap_or_default();
        if target.to_string_lossy().contains("preforkd-metrics") {
            return Ok(fs::metadata(path)?.st_blocks() as f64 * 512.0);
        }
    }
    Err("the master has no metrics board".into())
}

/// Opens connections, and has a call run on all threads.
fn occupied(server: &Server, threads: usize, count: usize) -> Result<Vec<TcpStream>, Failure> {
    use std::io::Write;
    let mut connections = Vec::with_capacity(count);
    let call = frame(r#"{"in":"method_000","params":600}"#);
    let running = |connections: &mut Vec<TcpStream>| -> Result<usize, Failure> {
        connections.push(TcpStream::connect(server.address)?);
        let status = server.status()?;
        let workers = status["workers"].as_array().ok_or("no workers")?;
        let running = workers.iter().filter_map(|it| it["running"].as_u64());
        Ok(running.sum::<u64>() as usize)
    };
    while connections.len() < count {
        let mut stream = TcpStream::connect(server.address)?;
        if connections.len() < threads {
            stream.write_all(&call)?;
        }
        connections.push(stream);
    }
    // Calls of full workers go to others within milliseconds.
    let end = Instant::now() + Duration::from_secs(30);
    while running(&mut connections)? < threads {
        if Instant::now() > end {
            return Err("not every thread runs a call".into());
        }
        thread::sleep(Duration::from_millis(100));
    }
    Ok(connections)
}

/// Measures while a thread spins for each CPU.
fn with_busy_cpus<T>(measure: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let cpus = thread::available_parallelism()?.get();
        for _ in 0..cpus {
            scope.spawn(|| {
                let mut number = 0_u64;
                while !is_over.load(Relaxed) {
                    number = black_box(number.wrapping_add(1));
                }
            });
        }
        let measured = measure();
        is_over.store(true, Relaxed);
        measured
    })
}

/// Returns the median ratio of the p99 of calls with one scrape per second to that without.
fn calls_beside_scrapes(extent: &Extent) -> Result<f64, Failure> {
    let methods: String = (0..50)
        .map(|number| format!("[methods.method_{number:03}]\nbuiltin = \"sleep\"\n"))
        .collect();
    let config = format!(
        "[workers]\ncount = 8\nthreads = 2\n[observe]\naddress = \"127.0.0.1:0\"\n{methods}"
    );
    let server = Server::preforkd_with(&config)?;
    let (observer, _) = observer_of(&server)?;
    let mut load = Load::open(server.address, 16, "1")?;
    let time = Duration::from_secs(2);
    load.run(Until::Elapsed(time))?;
    let mut p99 = |scrapes: bool| -> Result<f64, Failure> {
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            let scraper = scope.spawn(|| -> Result<usize, String> {
                let (mut client, mut count) = (HttpClient::new(observer), 0);
                while scrapes && !is_over.load(Relaxed) {
                    client.get("/metrics").map_err(|error| error.to_string())?;
                    count += 1;
                    thread::park_timeout(PERIOD);
                }
                Ok(count)
            });
            let outcome = load.run(Until::Elapsed(time));
            is_over.store(true, Relaxed);
            scraper.thread().unpark();
            let scrapes_made = scraper.join().map_err(|_| "the scraper panicked")??;
            if scrapes && scrapes_made < 2 {
                return Err(format!("{scrapes_made} scrapes in 2 s").into());
            }
            Ok(outcome?.latencies.value_at_quantile(0.99) as f64 / 1e3)
        })
    };
    let mut ratios = Vec::new();
    for pair in 0..extent.pairs {
        // ABBA: what changes slowly affects both.
        let (with, without) = match pair % 2 {
            0 => (p99(true)?, p99(false)?),
            _ => {
                let without = p99(false)?;
                (p99(true)?, without)
            }
        };
        ratios.push(with / without);
    }
    println!(
        "  {} pairs, ratios from {:.3} to {:.3}",
        ratios.len(),
        quantile(&ratios, 0.0),
        quantile(&ratios, 1.0)
    );
    Ok(median(&ratios))
}
