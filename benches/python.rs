//! A Python function behind preforkd, gunicorn and uWSGI: calls with a second of CPU time.
//!
//! The same function (`python/function.py`), the same requests over HTTP from the same generator
//! (`preforkd bench`), 64 connections that last, two Python processes each: a pool of 2 under one
//! worker, gunicorn's gthread with 2 workers, uWSGI's http router with 2 processes. In turns, several
//! rounds. Counted is the user and system time of all processes of a server, the generator's left
//! out. preforkd is shown over frames as well. `-- --bar` fails below 4 times gunicorn.
//!
//! gunicorn and uWSGI are installed by pip into `target/python-servers`, once.
#![allow(unsafe_code, clippy::print_stdout, clippy::print_stderr)]

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::Parser;
use serde_json::Value;

use support::figures::median;
use support::server::Server;
use support::{Failure, words};

const PACKAGES: [&str; 2] = ["gunicorn==23.0.0", "uWSGI==2.0.31"];
const PARAMS: &str = r#"["a great day, and not at all a bad one"]"#;
const RESULT: &str = "0.1";
const BAR: f64 = 4.0;

#[derive(Parser)]
struct Words {
    /// Rounds, each with every server.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of load on each server in each round.
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// Connections.
    #[arg(long, default_value_t = 64)]
    connections: usize,
    /// Fail below the bar.
    #[arg(long)]
    bar: bool,
}

/// What is measured, and how it is called.
struct Subject {
    name: &'static str,
    server: Server,
    dialect: &'static str,
    /// Calls with a second of CPU time, of each round.
    figures: Vec<f64>,
}

fn main() -> Result<(), Failure> {
    let words = Words::parse_from(["python".to_owned()].into_iter().chain(words()));
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let programs = here.join("benches/python");
    let bin = installed(here)?;
    let python = bin.join("python");
    let config = format!(
        "[pools.p]\ncommand = [{python:?}, {:?}]\nprocesses = 2\nready = \"message\"\n\
         [methods.score]\npool = \"p\"\n",
        programs.join("pool.py"),
    );
    let preforkd = || Server::preforkd(1, &config);
    let gunicorn = Server::other(|address| {
        let mut command = Command::new(bin.join("gunicorn"));
        command.args([
            "--worker-class",
            "gthread",
            "--workers",
            "2",
            "--threads",
            "4",
        ]);
        command.args(["--keep-alive", "60", "--log-level", "warning", "--bind"]);
        command.arg(address.to_string()).arg("wsgi:application");
        command.current_dir(&programs);
        command
    })?;
    let uwsgi = Server::other(|address| {
        let mut command = Command::new(bin.join("uwsgi"));
        command.args([
            "--master",
            "--processes",
            "2",
            "--disable-logging",
            "--die-on-term",
        ]);
        command.args(["--listen", "128", "--http-keepalive", "--http-auto-chunked"]);
        command.args(["--need-app", "--wsgi-file", "wsgi.py", "--http"]);
        command.arg(address.to_string());
        command.current_dir(&programs).stderr(Stdio::null());
        command
    })?;
    let subject = |name, server, dialect| Subject {
        name,
        server,
        dialect,
        figures: Vec::new(),
    };
    let mut subjects = [
        subject("preforkd, http", preforkd()?, "http"),
        subject("preforkd, frames", preforkd()?, "frame"),
        subject("gunicorn gthread", gunicorn, "http"),
        subject("uWSGI, http", uwsgi, "http"),
    ];
    for subject in &subjects {
        check(subject)?;
    }
    println!(
        "{} connections, {} s each, 2 Python processes each; CPU of all processes of a server",
        words.connections, words.seconds
    );
    for round in 1..=words.rounds {
        for subject in &mut subjects {
            let (calls, seconds) = load(subject, words.connections, words.seconds)?;
            let figure = calls as f64 / seconds;
            println!(
                "{round} {:<17} {:>8.0} calls/s, {figure:>8.0} a CPU second",
                subject.name,
                calls as f64 / words.seconds as f64
            );
            subject.figures.push(figure);
        }
    }
    let of = |number: usize| median(&subjects[number].figures);
    println!(
        "calls with a second of CPU time, medians of {} rounds:",
        words.rounds
    );
    for (number, subject) in subjects.iter().enumerate() {
        println!("  {:<17} {:>8.0}", subject.name, of(number));
    }
    let ratio = of(0) / of(2);
    println!(
        "preforkd over http: {ratio:.1} times gunicorn (bar: {BAR}), {:.1} times uWSGI; over \
         frames {:.1} and {:.1} times",
        of(0) / of(3),
        of(1) / of(2),
        of(1) / of(3)
    );
    if words.bar && ratio < BAR {
        return Err(format!("{ratio:.2} is below {BAR}").into());
    }
    Ok(())
}

/// The programs of the virtual environment, which is made where it is not there.
fn installed(here: &Path) -> Result<PathBuf, Failure> {
    let environment = here.join("target/python-servers");
    let bin = environment.join("bin");
    if !bin.join("uwsgi").exists() || !bin.join("gunicorn").exists() {
        eprintln!("installing {PACKAGES:?} into {}", environment.display());
        run(Command::new("python3")
            .args(["-m", "venv"])
            .arg(&environment))?;
        run(Command::new(bin.join("pip"))
            .args(["install", "--quiet", "--disable-pip-version-check"])
            .args(PACKAGES))?;
    }
    Ok(bin)
}

fn run(command: &mut Command) -> Result<(), Failure> {
    let status = command.status()?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("{command:?} ended with {status}").into()),
    }
}

/// Each of them has to answer rightly, or there is nothing to compare.
fn check(subject: &Subject) -> Result<(), Failure> {
    let mut command = Command::new("curl");
    command.args(["-s", "-d", PARAMS]);
    command.arg(format!("http://{}/score", subject.server.address));
    let output = command.output()?;
    let answer = String::from_utf8_lossy(&output.stdout).into_owned();
    match answer.trim().starts_with(RESULT) {
        true => Ok(()),
        false => Err(format!("{} answers {answer:?}", subject.name).into()),
    }
}

/// Loads it; tells how many calls were answered, and the CPU time that it took for them.
fn load(subject: &Subject, connections: usize, seconds: u64) -> Result<(u64, f64), Failure> {
    let before = subject.server.cpu_time()?;
    let output = Command::new(env!("CARGO_BIN_EXE_preforkd"))
        .args(["bench", "score", "--json", "--params", PARAMS])
        .args(["--dialect", subject.dialect])
        .args(["--connections", &connections.to_string()])
        .args(["--duration", &format!("{seconds}s")])
        .args(["--address", &subject.server.address.to_string()])
        .output()?;
    let after = subject.server.cpu_time()?;
    let report: Value = serde_json::from_slice(&output.stdout)
        .map_err(|_| String::from_utf8_lossy(&output.stderr).into_owned())?;
    let ok = report["ok"].as_u64().unwrap_or(0);
    if ok == 0 || report["calls"] != report["ok"] {
        return Err(format!("{}: {report}", subject.name).into());
    }
    Ok((ok, (after - before).as_secs_f64()))
}
