//! Tests that pool processes which leave begin no further attempt, while calls keep their workers alive.

use std::fs;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::json;

use crate::support::{Builder, Client, Daemon, PATIENCE, wait_for};

const CONFIG: &str = r#"
[workers]
count = 1
threads = 2
drain-timeout = "10s"
[jobs]
store = "sqlite:jobs.db"
[pools.p]
command = ["python3", "program.py"]
directory = "."
processes = 1
[methods.pooled]
pool = "p"
[methods.sleep]
builtin = "sleep"
"#;

/// Writes its pid at the begin of each attempt.
const PROGRAM: &str = "
import os, time
from preforkd import method, serve
@method
def pooled():
    with open('attempts', 'a') as file:
        print(os.getpid(), file=file)
    time.sleep(0.4)
serve()
";

fn daemon() -> Builder {
    Daemon::builder().config(CONFIG).python_program(PROGRAM)
}

/// Returns the pids of the programs that have begun attempts, in the order of the attempts.
fn attempts(daemon: &Daemon) -> Vec<String> {
    let text = fs::read_to_string(daemon.dir().join("attempts"));
    text.unwrap_or_default()
        .lines()
        .map(str::to_owned)
        .collect()
}

/// Enqueues jobs, waits until one has begun, and then sends a call of this number of seconds, which keeps its worker
/// alive. Returns the connection of the call.
#[track_caller]
fn jobs_and_a_long_call(daemon: &Daemon, jobs: usize, seconds: u64) -> Client {
    let mut client = daemon.client();
    let array = vec![json!({"method": "pooled"}); jobs];
    client.call(&json!({"in": "rpc.job.enqueue", "params": array}));
    wait_for("an attempt", PATIENCE, || !attempts(daemon).is_empty());
    client.send_together([
        json!({"in": "sleep", "params": seconds, "id": 1}),
        json!({"in": "ping", "id": 2}),
    ]);
    assert_eq!(client.recv_json()["id"], 2);
    client
}

#[test]
fn a_pool_begins_no_attempt_after_a_stop_has_begun() {
    let mut daemon = daemon().start();
    let mut client = jobs_and_a_long_call(&daemon, 100, 3);
    let begin = Instant::now();
    daemon.signal(Signal::SIGTERM);
    daemon.wait_log("stopping: ");
    let before = attempts(&daemon).len();
    assert_eq!(client.recv_json()["id"], 1);
    daemon.wait_exit();
    let took = begin.elapsed();
    assert!(
        took > Duration::from_secs(2),
        "the call was short: {took:?}"
    );
    // One claim may have been on its way.
    let begun = attempts(&daemon).len() - before;
    assert!(begun <= 1, "{begun} attempts began in {took:?}");
}

#[test]
fn the_pool_of_an_old_generation_begins_no_attempt_after_the_reload() {
    let daemon = daemon().start();
    // It is connected to the worker that drains after the reload, and waits for its call.
    let _old_client = jobs_and_a_long_call(&daemon, 20, 9);
    daemon.reload();
    let before = attempts(&daemon);
    let of_old = &before[0];
    // One claim may have been on its way.
    wait_for("attempts of the new program", PATIENCE, || {
        attempts(&daemon).len() >= before.len() + 5
    });
    let later = attempts(&daemon).split_off(before.len() + 1);
    assert!(
        !later.contains(of_old),
        "the old program {of_old} got one of {later:?}"
    );
    let workers = daemon.workers();
    assert!(
        workers.iter().any(|worker| worker.state == "draining"),
        "the old generation has left too early for this test"
    );
}
