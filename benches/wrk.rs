//! Measures whether `preforkd bench` could be the bottleneck: its calls per second of its own CPU time,
//! compared with wrk on the same server with the same requests.
//!
//! The server has two workers. Both clients run in turn, in several rounds, with the same number of
//! connections and one thread each. It counts only the user and system time of the client process,
//! including its start and connecting. It prints the medians and their ratio; with `--bar` a ratio below
//! 1 is a failure. Without wrk (Debian has a package) it says so.
#![allow(unsafe_code, clippy::print_stdout, clippy::print_stderr)]

mod support;

use std::fs;
use std::process::{Command, Stdio};

use clap::Parser;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

use support::figures::median;
use support::server::Server;
use support::{Failure, Rounds, words};

/// The script of wrk: the same method and params.
const SCRIPT: &str = "wrk.method = \"POST\"\nwrk.body = '\"hello\"'\n";
const PARAMS: &str = "\"hello\"";

#[derive(Parser)]
struct Words {
    #[command(flatten)]
    of: Rounds,
}

fn main() -> Result<(), Failure> {
    let program = "wrk".to_owned();
    let words = Words::parse_from([program].into_iter().chain(words()));
    let there = Command::new("wrk")
        .arg("-v")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if there.is_err() {
        eprintln!("there is no wrk here to compare with; Debian's package is called wrk");
        return Ok(());
    }
    let server = Server::preforkd(2, "")?;
    let script = std::env::temp_dir().join(format!("preforkd-bench-{}.lua", std::process::id()));
    fs::write(&script, SCRIPT)?;
    let (connections, seconds) = (
        words.of.connections.to_string(),
        words.of.seconds.to_string(),
    );
    let address = server.address.to_string();
    let wrk = || {
        let mut wrk = Command::new("wrk");
        wrk.args(["-t", "1", "-c", &connections, "-d", &seconds, "-s"])
            .arg(&script)
            .arg(format!("http://{address}/ping"));
        client(&mut wrk, answered_by_wrk)
    };
    let ours = |dialect: &str| {
        let mut bench = Command::new(env!("CARGO_BIN_EXE_preforkd"));
        bench
            .args(["bench", "ping", "--json", "--params", PARAMS])
            .args(["-c", &connections, "-d", &format!("{seconds}s")])
            .args(["--dialect", dialect, "--address", &address]);
        client(&mut bench, answered_by_us)
    };
    let mut figures = [const { Vec::new() }; 4];
    for _ in 0..words.of.rounds {
        let round = [wrk()?, ours("http")?, ours("line")?, ours("frame")?];
        println!(
            "calls per CPU second of the client: wrk {:>7.0}, preforkd bench {:>7.0} over HTTP, \
             {:>7.0} in lines, {:>7.0} in frames",
            round[0], round[1], round[2], round[3]
        );
        for (all, one) in figures.iter_mut().zip(round) {
            all.push(one);
        }
    }
    fs::remove_file(&script)?;
    let [wrk, http, line, frame] = figures.map(|all| median(&all));
    println!(
        "medians of {} rounds, {connections} connections: wrk {wrk:.0}, preforkd bench {http:.0} \
         ({:.2} of wrk's), in lines {:.2}, in frames {:.2} (bar: 1)",
        words.of.rounds,
        http / wrk,
        line / wrk,
        frame / wrk,
    );
    if words.of.bar && (http.is_nan() || http < wrk) {
        return Err(format!("{:.2} of wrk's calls is below the bar of 1", http / wrk).into());
    }
    Ok(())
}

/// Runs a client. Returns its answered calls per second of its CPU time.
fn client(command: &mut Command, answered: impl Fn(&str) -> Option<u64>) -> Result<f64, Failure> {
    let before = cpu_of_children()?;
    let output = command.output()?;
    let used = cpu_of_children()? - before;
    let text = String::from_utf8_lossy(&output.stdout);
    match answered(&text) {
        Some(calls) if output.status.success() => Ok(calls as f64 / used),
        _ => {
            let told = String::from_utf8_lossy(&output.stderr);
            Err(format!("{:?}: {text}{told}", command.get_program()).into())
        }
    }
}

/// Returns the CPU time of ended children in seconds: the clients, because the server still runs.
fn cpu_of_children() -> Result<f64, Failure> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(micros as f64 / 1e6)
}

/// Parses the output of wrk: `  123 requests in 3.00s, …`, and its errors.
fn answered_by_wrk(text: &str) -> Option<u64> {
    if text.contains("Non-2xx") || text.contains("Socket errors") {
        return None;
    }
    let (before, _) = text.split_once(" requests in ")?;
    before.split_whitespace().last()?.parse().ok()
}

fn answered_by_us(text: &str) -> Option<u64> {
    let report: serde_json::Value = serde_json::from_str(text).ok()?;
    report["ok"].as_u64()
}
