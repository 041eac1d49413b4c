//! Python functions behind preforkd, gunicorn and uWSGI: calls with a second of CPU time.
//!
//! All servers run the same functions (`python/function.py`) in two Python processes:
//!
//! - preforkd: a pool of 2 programs under one worker
//! - gunicorn: gthread and sync with 2 workers
//! - uWSGI: the http router with 2 processes
//!
//! The same generator (`preforkd bench`) sends the same HTTP requests over 64 lasting connections, to one server
//! after the other, in several rounds. Servers and generator are pinned to different cores. The user and system
//! time of all processes of a server counts, but not the time of the generator. gunicorn's sync workers close each
//! connection after its answer, so they have a generator of their own that makes a connection per call. preforkd
//! is measured over frames as well.
//!
//! The function `score` does some work, `trivial` does none. `-- --bar` fails below 4 times gunicorn's gthread with
//! `score`, 6 times both kinds of gunicorn with `trivial`, and 0.65 times the binary that `--against` names.
//!
//! gunicorn and uWSGI are installed by pip into `target/python-servers`, once.
#![allow(unsafe_code, clippy::print_stdout)]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use serde_json::Value;

use support::cores;
use support::figures::median;
use support::http::HttpClient;
use support::python_servers::{gunicorn, installed, uwsgi};
use support::server::Server;
use support::{Failure, words};

const PARAMS: &str = r#"["a great day, and not at all a bad one"]"#;
/// The functions, and what their results begin with.
const FUNCTIONS: [(&str, &str); 2] = [("score", "0.1"), ("trivial", "\"a great")];
/// The Python processes of each server.
const PROCESSES: usize = 2;

/// For a function and another server: how many times the calls of that server preforkd must answer over HTTP, per
/// second of CPU time.
const BARS: [(&str, &str, f64); 4] = [
    ("score", GTHREAD, 4.0),
    ("trivial", GTHREAD, 6.0),
    ("trivial", SYNC, 6.0),
    ("trivial", OTHER, 0.65),
];
const OURS: &str = "preforkd, http";
const GTHREAD: &str = "gunicorn gthread";
const SYNC: &str = "gunicorn sync";
const OTHER: &str = "the other binary";

#[derive(Parser)]
struct Words {
    /// Rounds, each with every server
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of load on each server in each round
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// Connections.
    #[arg(long, default_value_t = 64)]
    connections: usize,
    /// Compare with another binary of preforkd too, over HTTP.
    #[arg(long, value_name = "PATH")]
    against: Option<PathBuf>,
    /// Fail below the bar.
    #[arg(long)]
    bar: bool,
}

/// A server that is measured, and how it is called.
struct Subject {
    name: &'static str,
    server: Server,
    generator: Generator,
    /// The calls per second of CPU time in each round, by function.
    figures: [Vec<f64>; FUNCTIONS.len()],
}

enum Generator {
    /// `preforkd bench` with this dialect.
    Lasting(&'static str),
    /// A connection per call.
    OneCallEach,
}

fn main() -> Result<(), Failure> {
    let words = Words::parse_from(["python".to_owned()].into_iter().chain(words()));
    let (server_cpu, load_cpu) = cores::two()?;
    cores::pin(server_cpu)?;
    let mut subjects = subjects(&words)?;
    cores::pin(load_cpu)?;
    for subject in &subjects {
        for (function, result) in FUNCTIONS {
            let answer = HttpClient::new(subject.server.address).call(function, PARAMS)?;
            // A server with a wrong result cannot be compared.
            if !answer.trim().starts_with(result) {
                return Err(format!("{} answers {answer:?}", subject.name).into());
            }
        }
    }
    println!(
        "{} connections, {} s each, {PROCESSES} Python processes each, servers and load pinned to different cores; CPU of all \
         processes of a server",
        words.connections, words.seconds
    );
    for round in 1..=words.rounds {
        for (number, (function, _)) in FUNCTIONS.iter().enumerate() {
            for subject in &mut subjects {
                let (calls, seconds) = load(subject, function, &words)?;
                let figure = calls as f64 / seconds;
                println!(
                    "{round} {function:<8} {:<17} {:>8.0} calls/s, {figure:>8.0} a CPU second",
                    subject.name,
                    calls as f64 / words.seconds as f64
                );
                subject.figures[number].push(figure);
            }
        }
    }
    println!(
        "calls per second of CPU time, medians of {} rounds; the last column is {OURS} divided by that server:",
        words.rounds
    );
    let mut missed = Vec::new();
    for (number, (function, _)) in FUNCTIONS.iter().enumerate() {
        let of = |subject: &Subject| median(&subject.figures[number]);
        let ours = subjects.first().map_or(f64::NAN, of);
        for subject in &subjects {
            let bar = BARS
                .iter()
                .find(|bar| (bar.0, bar.1) == (*function, subject.name));
            let ratio = ours / of(subject);
            let shown = bar.map_or(String::new(), |bar| format!(" (bar {})", bar.2));
            println!(
                "  {function:<8} {:<17} {:>8.0}  {ratio:.2}{shown}",
                subject.name,
                of(subject)
            );
            if bar.is_some_and(|bar| ratio.is_nan() || ratio < bar.2) {
                missed.push(format!("{function}, {}", subject.name));
            }
        }
    }
    match (words.bar, missed.is_empty()) {
        (true, false) => Err(format!("below the bar: {}", missed.join("; ")).into()),
        _ => Ok(()),
    }
}

/// Starts all servers that are compared; this build over HTTP comes first.
fn subjects(words: &Words) -> Result<Vec<Subject>, Failure> {
    let programs = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/python");
    let bin = installed()?;
    let mut config = format!(
        "[workers]\ncount = 1\n[pools.p]\ncommand = [{:?}, {:?}]\nprocesses = {PROCESSES}\n\
         ready = \"message\"\n",
        bin.join("python"),
        programs.join("pool.py"),
    );
    for (function, _) in FUNCTIONS {
        config += &format!("[methods.{function}]\npool = \"p\"\n");
    }
    let subject = |name, server, generator| Subject {
        name,
        server,
        generator,
        figures: Default::default(),
    };
    let preforkd = || Server::preforkd_with(&config);
    let gunicorn = |threads| gunicorn(&bin, &programs, PROCESSES, threads);
    let uwsgi = uwsgi(&bin, &programs, PROCESSES)?;
    let mut subjects = vec![
        subject(OURS, preforkd()?, Generator::Lasting("http")),
        subject("preforkd, frames", preforkd()?, Generator::Lasting("frame")),
        subject(GTHREAD, gunicorn(Some(4))?, Generator::Lasting("http")),
        subject(SYNC, gunicorn(None)?, Generator::OneCallEach),
        subject("uWSGI, http", uwsgi, Generator::Lasting("http")),
    ];
    if let Some(other) = &words.against {
        let server = Server::program(other.clone(), &config)?;
        subjects.push(subject(OTHER, server, Generator::Lasting("http")));
    }
    Ok(subjects)
}

/// Sends calls to a server for one round. Returns the number of answered calls, and the CPU time in seconds that the
/// server used for them.
fn load(subject: &Subject, function: &str, words: &Words) -> Result<(u64, f64), Failure> {
    let before = subject.server.cpu_time()?;
    let calls = match subject.generator {
        Generator::Lasting(dialect) => lasting(subject, function, dialect, words)?,
        Generator::OneCallEach => one_call_each(subject, function, words)?,
    };
    let after = subject.server.cpu_time()?;
    Ok((calls, (after - before).as_secs_f64()))
}

fn lasting(
    subject: &Subject,
    function: &str,
    dialect: &str,
    words: &Words,
) -> Result<u64, Failure> {
    let output = Command::new(env!("CARGO_BIN_EXE_preforkd"))
        .args(["bench", function, "--json", "--params", PARAMS])
        .args(["--dialect", dialect])
        .args(["--connections", &words.connections.to_string()])
        .args(["--duration", &format!("{}s", words.seconds)])
        .args(["--address", &subject.server.address.to_string()])
        .output()?;
    let report: Value = serde_json::from_slice(&output.stdout)
        .map_err(|_| String::from_utf8_lossy(&output.stderr).into_owned())?;
    let ok = report["ok"].as_u64().unwrap_or(0);
    if ok == 0 || report["calls"] != report["ok"] {
        return Err(format!("{}: {report}", subject.name).into());
    }
    Ok(ok)
}

fn one_call_each(subject: &Subject, function: &str, words: &Words) -> Result<u64, Failure> {
    let end = Instant::now() + Duration::from_secs(words.seconds);
    let client = || {
        let mut client = HttpClient::new(subject.server.address);
        let mut calls = 0;
        while Instant::now() < end {
            let called = client.call(function, PARAMS);
            called.map_err(|error| format!("{}: {error}", subject.name))?;
            calls += 1;
        }
        Ok(calls)
    };
    let counts: Result<Vec<u64>, String> = thread::scope(|scope| {
        let clients: Vec<_> = (0..words.connections)
            .map(|_| scope.spawn(client))
            .collect();
        let ended = clients.into_iter().map(|one| one.join());
        ended
            .map(|ended| ended.unwrap_or_else(|_| Err("a client has panicked".into())))
            .collect()
    });
    Ok(counts?.into_iter().sum())
}
