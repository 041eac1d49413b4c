//! Tests programs that run several calls at once (`concurrency` above 1).

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::one_program;
use crate::support::{Client, Daemon, PATIENCE, alone, process, source, wait_for};

/// Methods with the Python helper, of both kinds.
const PROGRAM: &str = r#"
import asyncio, os, time
from preforkd import Error, method, serve

running = 0

@method
async def nap(seconds):
    await asyncio.sleep(seconds)
    return seconds

@method
def block(seconds):
    time.sleep(seconds)
    return seconds

@method
async def held(file):
    global running
    running += 1
    try:
        while not os.path.exists(file):
            await asyncio.sleep(0.01)
        return os.getpid()
    finally:
        running -= 1

@method
async def count():
    return running

@method
async def fail(message):
    raise Error(7, message)

@method
async def pid():
    return os.getpid()

serve()
"#;

fn config(program: &str, methods: &[&str], keys: &str) -> String {
    let one = one_program(keys);
    let mut text = format!(
        "[workers]\ncount = 2\n[pools.p]\n{one}command = {program}\ndirectory = \".\"\n{keys}\n"
    );
    for method in methods {
        text += &format!("[methods.\"{method}\"]\npool = \"p\"\n");
        if *method == "block" {
            text += "timeout = \"3s\"\n";
        }
    }
    text
}

/// Starts a daemon with one program that may run `concurrency` calls at once.
fn python(concurrency: usize, expected: &[&str]) -> Daemon {
    let methods = ["nap", "block", "held", "count", "fail", "pid"];
    let keys = format!("concurrency = {concurrency}");
    let mut builder = Daemon::builder().python_program(PROGRAM).config(&config(
        "[\"python3\", \"program.py\"]",
        &methods,
        &keys,
    ));
    for text in expected {
        builder = builder.expect_log(text);
    }
    builder.start()
}

fn result(client: &mut Client, method: &str, params: &Value) -> Value {
    client.call(&json!({"in": method, "params": params}))["result"].take()
}

/// Returns how long `count` simultaneous calls take, each on a separate connection.
fn together(daemon: &Daemon, count: usize, method: &str, params: &Value) -> Duration {
    let mut clients: Vec<Client> = (0..count).map(|_| daemon.client()).collect();
    let begin = Instant::now();
    for client in &mut clients {
        client.send(&json!({"in": method, "params": params}).to_string());
    }
    for client in &mut clients {
        assert_eq!(client.recv_json()["result"], *params);
    }
    begin.elapsed()
}

#[test]
fn one_program_runs_async_functions_and_blocking_ones_together() {
    let _alone = alone();
    let daemon = python(40, &[]);
    let programs = process::children(daemon.pool());
    assert_eq!(programs.len(), 1);
    for method in ["nap", "block"] {
        let took = together(&daemon, 40, method, &json!(0.5));
        println!("40 calls of {method} at once: {took:?}");
        assert!(
            took < Duration::from_secs(4),
            "one after the other is 20 s: {took:?}"
        );
    }
    let mut client = daemon.client();
    assert_eq!(result(&mut client, "pid", &json!([])), programs[0]);
    let error = result(&mut client, "fail", &json!("no"));
    assert_eq!(
        (&error["code"], &error["message"]),
        (&json!(7), &json!("no"))
    );
    assert_eq!(result(&mut client, "nap", &json!([1, 2]))["code"], -32602);
}

#[test]
fn no_more_calls_than_concurrency_run_and_the_others_wait() {
    let daemon = python(3, &[]);
    let mut clients: Vec<Client> = (0..6).map(|_| daemon.client()).collect();
    for client in &mut clients {
        client.send(&json!({"in": "held", "params": "go"}).to_string());
    }
    wait_for("three that run and three that wait", PATIENCE, || {
        let pool = &daemon.status()["pools"][0];
        let queued = daemon.status()["workers"].as_array().map(|workers| {
            let queued = workers.iter().map(|worker| worker["queued"].as_u64());
            queued.flatten().sum::<u64>()
        });
        pool["busy"] == 3 && queued == Some(3)
    });
    daemon.dir().write("go", "");
    let pid = process::children(daemon.pool())[0];
    for client in &mut clients {
        assert_eq!(client.recv_json()["result"], pid);
    }
}

#[test]
fn a_cancelled_call_ends_in_the_program_and_the_others_go_on() {
    let daemon = python(8, &[]);
    let pid = process::children(daemon.pool())[0];
    let mut other = daemon.client();
    other.send(&json!({"in": "held", "params": "go"}).to_string());
    let mut client = daemon.client();
    let timed = json!({"in": "held", "params": "never", "timeout_ms": 200});
    let error = client.call(&timed)["result"].take();
    assert_eq!(
        (&error["name"], &error["started"]),
        (&json!("timeout"), &json!(true)),
        "{error}"
    );
    client.send(&json!({"in": "held", "params": "never", "id": "a"}).to_string());
    wait_for("two that run", PATIENCE, || {
        result(&mut daemon.client(), "count", &json!([])) == 2
    });
    client.send(&json!({"in": "rpc.cancel", "params": {"id": "a"}}).to_string());
    let answers = [client.recv_json(), client.recv_json()];
    assert!(
        answers.iter().any(|it| it["result"]["name"] == "cancelled"),
        "{answers:?}"
    );
    wait_for("the other one alone", PATIENCE, || {
        result(&mut daemon.client(), "count", &json!([])) == 1
    });
    daemon.dir().write("go", "");
    assert_eq!(other.recv_json()["result"], pid, "it is the same program");
}

#[test]
fn a_program_that_dies_costs_the_calls_that_it_had() {
    let daemon = python(8, &["was ended by SIGKILL"]);
    let pid = process::children(daemon.pool())[0];
    let mut clients: Vec<Client> = (0..5).map(|_| daemon.client()).collect();
    for client in &mut clients {
        client.send(&json!({"in": "held", "params": "never"}).to_string());
    }
    wait_for("all to run", PATIENCE, || {
        result(&mut daemon.client(), "count", &json!([])) == 5
    });
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    for client in &mut clients {
        let error = client.recv_json()["result"].take();
        assert_eq!(
            (&error["name"], &error["started"]),
            (&json!("crashed"), &json!(true))
        );
    }
    let next = result(&mut clients[0], "pid", &json!([]));
    assert!(next.is_number() && next != pid);
}

/// A blocking function cannot be cancelled: its program is ended when it has no other call.
#[test]
fn a_program_that_keeps_a_cancelled_call_is_replaced() {
    let daemon = python(2, &[]);
    let pid = process::children(daemon.pool())[0];
    let mut client = daemon.client();
    let timed = json!({"in": "block", "params": 30, "timeout_ms": 100});
    assert_eq!(client.call(&timed)["result"]["name"], "timeout");
    wait_for("another program", PATIENCE, || {
        let programs = process::children(daemon.pool());
        programs.len() == 1 && programs[0] != pid
    });
    assert_ne!(result(&mut client, "pid", &json!([])), pid);
}

#[test]
fn node_runs_calls_together() {
    if std::process::Command::new("node")
        .arg("--version")
        .output()
        .is_err()
    {
        println!("not run: there is no node here");
        return;
    }
    let _alone = alone();
    let program = source().join("examples/node/pool.js");
    let command = format!("[\"node\", {program:?}]");
    let text = config(&command, &["js.nap", "js.upper"], "concurrency = 20");
    let daemon = Daemon::builder().config(&text).start();
    let took = together(&daemon, 20, "js.nap", &json!(0.5));
    assert!(
        took < Duration::from_secs(4),
        "one after the other is 10 s: {took:?}"
    );
    let mut client = daemon.client();
    assert_eq!(result(&mut client, "js.upper", &json!("a")), "A");
    assert_eq!(result(&mut client, "js.nap", &json!(0)), 0);
}

#[test]
fn the_status_lists_each_program() {
    let keys = "processes = 2\nidle-timeout = \"1s\"";
    let daemon = Daemon::builder()
        .python_program(PROGRAM)
        .config(&config(
            "[\"python3\", \"program.py\"]",
            &["held", "pid"],
            keys,
        ))
        .expect_log("was ended by SIGKILL")
        .start();
    let list = || {
        daemon.status()["pools"][0]["list"]
            .as_array()
            .unwrap()
            .clone()
    };
    let mut pids: Vec<i64> = Vec::new();
    for program in list() {
        assert_eq!(
            (&program["state"], &program["calls"]),
            (&json!("idle"), &json!(0))
        );
        assert!(program["rss_bytes"].as_u64() > Some(1 << 20), "{program}");
        pids.extend(program["pid"].as_i64());
    }
    let mut children = process::children(daemon.pool());
    children.sort_unstable();
    let mut listed: Vec<i32> = pids.iter().map(|pid| *pid as i32).collect();
    listed.sort_unstable();
    assert_eq!(listed, children);
    let mut client = daemon.client();
    client.send(&json!({"in": "held", "params": "go"}).to_string());
    let states = || -> Vec<String> {
        let states = list()
            .into_iter()
            .map(|it| it["state"].as_str().unwrap().to_owned());
        states.collect()
    };
    wait_for("one that is busy", PATIENCE, || {
        states() == ["busy", "idle"]
    });
    wait_for("the other one asleep", PATIENCE, || {
        states() == ["busy", "asleep"]
    });
    assert_eq!(list()[1]["pid"], Value::Null);
    daemon.dir().write("go", "");
    client.recv_json();
    wait_for("a call that is counted", PATIENCE, || {
        list()[0]["calls"] == 1
    });
    let pid = Pid::from_raw(pids[0] as i32);
    kill(pid, Signal::SIGKILL).unwrap();
    wait_for("the next program", PATIENCE, || {
        let first = &list()[0];
        first["state"] == "idle" && first["pid"] != pids[0] && first["calls"] == 0
    });
}
