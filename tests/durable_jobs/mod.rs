//! Checks durable jobs with a real server: what is acknowledged is stored, whatever dies.

#![cfg(feature = "jobs-sqlite")]

mod attempts;
mod broken;
mod calls;
mod capacity;
mod commands;
mod counters;
mod deaths;
mod disk;
mod durability;
mod faults;
mod isolated;
mod kill_points;
mod kills;
mod leaving;
mod limits;
mod power_loss;
mod recording;
mod reloads;
mod surface;

use std::path::Path;
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::support::{Builder, Client, Daemon, PATIENCE, process, wait_for};

/// Two workers and a store beside the configuration.
const CONFIG: &str = "[workers]\ncount = 2\n[jobs]\nstore = \"sqlite:jobs.db\"\n";

/// A method that returns its params, one that fails, and a store.
const JOBS: &str = "
[jobs]
store = \"sqlite:jobs.db\"
backoff = \"10ms\"
[methods.echo]
builtin = \"echo\"
[methods.fails]
command = [\"/bin/false\"]
[methods.fails.job]
max-attempts = 1
";

/// Returns a server with these methods, and more tables behind them.
fn with_jobs(more: &str) -> Builder {
    Daemon::builder().config(&format!("{JOBS}{more}"))
}

/// A delay after which no test still runs, in milliseconds.
const LATER: u64 = 3_600_000;

/// Calls a method, and returns the whole answer.
#[track_caller]
fn call(client: &mut Client, method: &str, params: &Value) -> Value {
    client.call(&json!({"in": method, "params": params}))
}

/// Calls a method, and returns its result.
#[track_caller]
fn result(client: &mut Client, method: &str, params: &Value) -> Value {
    let mut answer = call(client, method, params);
    assert_ne!(answer["out"], "error", "{answer}");
    answer["result"].take()
}

/// Calls a method, and returns its error.
#[track_caller]
fn error(client: &mut Client, method: &str, params: &Value) -> Value {
    let mut answer = call(client, method, params);
    assert_eq!(answer["out"], "error", "{answer}");
    answer["result"].take()
}

/// Returns an enqueue whose job is not due during the test.
fn later(params: &Value) -> Value {
    json!({"method": "ping", "params": params, "delay_ms": LATER})
}

/// Enqueues a job that is not due during the test. Returns its id.
#[track_caller]
fn enqueue(client: &mut Client, params: &Value) -> String {
    enqueue_job(client, &later(params))
}

/// A command that writes its pid into the file `attempts`, and does not end.
const NAP: &str = r#"
[methods.nap]
command = ["sh", "-c", "echo $$ >> attempts; exec sleep 60"]
directory = "."
"#;

/// Enqueues a job. Returns its id.
#[track_caller]
fn enqueue_job(client: &mut Client, params: &Value) -> String {
    let stored = result(client, "rpc.job.enqueue", params);
    stored["job"].as_str().unwrap().to_owned()
}

/// Waits until a job has ended. Returns its record.
#[track_caller]
fn wait_job(client: &mut Client, job: &str) -> Value {
    let wait = json!({"in": "rpc.job.wait", "params": {"job": job, "timeout_ms": 1_000}});
    let mut record = Value::Null;
    wait_for("the end of a job", PATIENCE, || {
        record = client.call(&wait)["result"].take();
        record["ended"] == true
    });
    record
}

/// Returns the pid of the first attempt of `nap`.
#[track_caller]
fn first_nap(daemon: &Daemon) -> i32 {
    let path = daemon.dir().join("attempts");
    let first = || -> Option<i32> {
        let text = std::fs::read_to_string(&path).ok()?;
        text.lines().next()?.parse().ok()
    };
    wait_for("an attempt", PATIENCE, || first().is_some());
    first().unwrap()
}

/// Waits until the metrics have this line.
#[track_caller]
fn wait_metric(daemon: &Daemon, line: &str) {
    wait_for(line, PATIENCE, || {
        let text = String::from_utf8(daemon.command(&["metrics"]).stdout).unwrap();
        text.lines().any(|it| it == line)
    });
}

/// Returns the jobs processes that do not drain.
fn jobs_processes(daemon: &Daemon) -> Vec<i32> {
    let all = daemon.processes().into_iter();
    all.filter(|pid| process::title(*pid).ends_with(": jobs"))
        .collect()
}

/// Returns the jobs process.
#[track_caller]
fn jobs_process(daemon: &Daemon) -> i32 {
    let mut found = Vec::new();
    wait_for("one jobs process", PATIENCE, || {
        found = jobs_processes(daemon);
        found.len() == 1
    });
    found[0]
}

/// Returns the number that a query of a store gives. It reads beside the server.
#[track_caller]
fn query(store: &Path, sql: &str) -> i64 {
    let script = "
import sqlite3, sys
print(sqlite3.connect(sys.argv[1], timeout=20).execute(sys.argv[2]).fetchone()[0])
";
    let output = Command::new("python3")
        .args(["-c", script])
        .arg(store)
        .arg(sql)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let number = text.trim().parse();
    number.unwrap_or_else(|_| panic!("{output:?}"))
}

/// Kills all processes of a server at once, as a machine that fails does.
#[track_caller]
fn kill_all(daemon: &mut Daemon) {
    let all = daemon.processes();
    send_kills(daemon);
    daemon.wait_exit();
    wait_for("all processes to be gone", PATIENCE, || {
        all.iter().all(|pid| !process::runs(*pid))
    });
}

/// Sends SIGKILL to all processes of a server. The master replaces none, and it dies last, so that none can log that it
/// has died.
fn send_kills(daemon: &Daemon) {
    let master = Pid::from_raw(daemon.pid());
    let _ = kill(master, Signal::SIGSTOP);
    let all = daemon.processes().into_iter();
    for pid in all.filter(|pid| *pid != master.as_raw()) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    let _ = kill(master, Signal::SIGKILL);
}
