//! Tests the access log: what a line says of each kind of call, that no line is missing without being counted, and
//! that nothing about its file delays a call.

mod balance;
mod fields;
mod files;
mod recipes;
mod sampling;

use std::time::Instant;

use serde_json::Value;

use crate::support::{Daemon, PATIENCE, pause, wait_for};

/// One worker with two threads, and the log in a file of the daemon's directory.
const CONFIG: &str = r#"
[workers]
count = 1
threads = 2
[access-log]
file = "access.log"
[methods.sleep]
builtin = "sleep"
[methods.shell]
command = ["sh", "-c", "echo 1"]
"#;

/// Returns the lines of a file; each must be JSON.
#[track_caller]
fn lines_of(daemon: &Daemon, name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(daemon.dir().join(name)).unwrap_or_default();
    let parse =
        |line: &str| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line:?}"));
    text.lines().map(parse).collect()
}

/// Waits until the log has this number of lines, and returns them.
#[track_caller]
fn wait_lines(daemon: &Daemon, count: usize) -> Vec<Value> {
    wait_for("the lines", PATIENCE, || {
        let text = daemon.dir().read("access.log");
        text.ends_with('\n') && text.lines().count() >= count
    });
    let lines = lines_of(daemon, "access.log");
    assert_eq!(lines.len(), count, "{lines:#?}");
    lines
}

/// Returns the sum of all samples whose names begin so.
#[track_caller]
fn sum(daemon: &Daemon, start: &str) -> u64 {
    let done = daemon.command(&["metrics"]);
    assert!(done.status.success(), "{done:?}");
    let text = String::from_utf8(done.stdout).unwrap();
    let lines = text.lines().filter(|line| line.starts_with(start));
    let values = lines.map(|line| line.rsplit_once(' ').unwrap().1);
    values
        .map(|value| value.parse::<f64>().unwrap())
        .sum::<f64>() as u64
}

fn written(daemon: &Daemon) -> u64 {
    sum(daemon, "preforkd_access_log_lines_total ")
}

fn lost(daemon: &Daemon) -> u64 {
    sum(daemon, "preforkd_log_lines_lost_total{log=\"access\"}")
}

fn calls(daemon: &Daemon) -> u64 {
    sum(daemon, "preforkd_calls_total{")
}

/// Reloads, and waits until no worker of before is left, which a new connection could meet.
#[track_caller]
fn reload(daemon: &Daemon, config: &str) {
    daemon.reload_with(config);
    wait_for("the end of the old workers", PATIENCE, || {
        daemon
            .workers()
            .iter()
            .all(|worker| worker.state == "ready")
    });
}

/// Waits until written and lost lines are as many as calls. Returns written lines and lost ones.
#[track_caller]
fn balance(daemon: &Daemon) -> (u64, u64) {
    let end = Instant::now() + PATIENCE;
    loop {
        let found = (written(daemon), lost(daemon), calls(daemon));
        if found.0 + found.1 == found.2 {
            return (found.0, found.1);
        }
        assert!(Instant::now() < end, "written, lost, calls: {found:?}");
        pause();
    }
}
