//! Checks pools with `scope = "connection"`: a program for each connection, with its state.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::{METHODS, acceptor, ping, session_of, wait_running};
use crate::support::wire::{Dialect, Wire};
use crate::support::{Builder, Client, Daemon, PATIENCE, assert_within, pass, process, wait_for};

/// A program that adds up what its connection sends. Its answers have the sum and its pid.
const SUM: &str = "import json, os, socket, struct, sys, time
calls = socket.socket(fileno=3)
total = 0
while True:
    head = calls.recv(4)
    if not head:
        break
    call = json.loads(calls.recv(struct.unpack('<I', head)[0]).decode())
    params = call['params']
    if params == 'exit':
        sys.exit(3)
    if params == 'sleep':
        time.sleep(1.0)
        params = 1
    total += params
    body = json.dumps({'out': call['in'], 'result': [total, os.getpid()]}).encode()
    calls.sendall(struct.pack('<I', len(body)) + body)
";
const TABLES: &str = "[pools.sum]\ncommand = [\"python3\", \"sum.py\"]\nready = \"alive\"\n\
                      directory = \".\"\nscope = \"connection\"\n[methods.add]\npool = \"sum\"\n";

/// Builds a daemon with an isolated listener and the program.
fn builder(tables: &str) -> Builder {
    super::builder(&(tables.to_owned() + TABLES), "").file("sum.py", SUM)
}

#[track_caller]
fn add(client: &mut Client, number: u64) -> (u64, i32) {
    let answer = client.call(&json!({"in": "add", "params": number}));
    let result = &answer["result"];
    let sum = result[0].as_u64().unwrap_or_else(|| panic!("{answer}"));
    (sum, result[1].as_i64().unwrap() as i32)
}

/// Checks that a call gets `crashed`, and the connection ends.
#[track_caller]
fn assert_crashed_and_closed(client: &mut Client, answer: &Value) {
    assert_eq!(answer["result"]["name"], "crashed", "{answer}");
    client.assert_closed();
}

#[test]
fn each_connection_has_a_program_from_its_first_call_to_its_end() {
    let daemon = builder("").start();
    let (mut one, mut other) = (daemon.client(), daemon.client());
    ping(&mut one);
    assert!(
        process::children(session_of(&one)).is_empty(),
        "no call yet"
    );
    let (sum, first) = add(&mut one, 5);
    assert_eq!(sum, 5);
    let (sum, second) = add(&mut other, 1);
    assert_eq!(sum, 1);
    assert_ne!(first, second);
    assert_eq!(add(&mut one, 6), (11, first));
    assert_eq!(process::parent(first), Some(session_of(&one)));
    drop(one);
    wait_for("its end", PATIENCE, || !process::runs(first));
    assert_eq!(add(&mut other, 1), (2, second));
}

#[test]
fn status_lists_the_programs_of_connections_and_their_deaths() {
    let daemon = builder("").start();
    let pool = |daemon: &Daemon| daemon.status()["pools"][0].clone();
    let before = pool(&daemon);
    assert_eq!(
        (&before["name"], &before["pid"], &before["programs"]),
        (&json!("sum"), &Value::Null, &json!(0)),
        "{before}"
    );
    let (mut one, mut other) = (daemon.client(), daemon.client());
    let (_, first) = add(&mut one, 1);
    let (_, second) = add(&mut other, 1);
    let listed = |daemon: &Daemon| -> Vec<Value> {
        let list = pool(daemon)["list"].clone();
        list.as_array()
            .unwrap()
            .iter()
            .map(|it| it["pid"].clone())
            .collect()
    };
    wait_for("both programs", PATIENCE, || {
        let pids = listed(&daemon);
        pids.len() == 2 && pids.contains(&json!(first)) && pids.contains(&json!(second))
    });
    other.send(r#"{"in": "add", "params": "exit"}"#);
    other.recv_json();
    other.assert_closed();
    let mut death = Value::Null;
    wait_for("its death record", PATIENCE, || {
        let deaths = daemon.status()["deaths"].clone();
        let mut deaths = deaths.as_array().unwrap().iter();
        death = deaths
            .find(|it| it["pid"] == second)
            .cloned()
            .unwrap_or_default();
        !death.is_null()
    });
    assert_eq!(
        (
            &death["kind"],
            &death["name"],
            &death["exit"],
            &death["method"],
            &death["slot"]
        ),
        (
            &json!("program"),
            &json!("sum"),
            &json!(3),
            &json!("add"),
            &Value::Null
        ),
        "{death}"
    );
    assert!(death["rss_bytes"].as_u64() > Some(0), "{death}");
    wait_for("the other program alone", PATIENCE, || {
        listed(&daemon) == [json!(first)]
    });
    // After a reload, those of the generation before are listed as long as they live.
    assert!(daemon.command(&["reload"]).status.success());
    let pools = daemon.status()["pools"].clone();
    let of = |generation: u64| {
        let mut pools = pools.as_array().unwrap().iter();
        pools.find(|it| it["generation"] == generation).cloned()
    };
    assert_eq!(of(1).unwrap()["programs"], 1, "{pools}");
    assert_eq!(of(2).unwrap()["programs"], 0, "{pools}");
}

#[test]
fn calls_that_are_sent_together_are_run_in_their_order() {
    let daemon = builder("").start();
    let mut client = daemon.client();
    client.send_together((1..=50).map(|number| json!({"in": "add", "params": number})));
    let sums: Vec<u64> = (0..50)
        .map(|_| client.recv_json()["result"][0].as_u64().unwrap())
        .collect();
    let expected: Vec<u64> = (1..=50).map(|number| number * (number + 1) / 2).collect();
    assert_eq!(sums, expected);
}

#[test]
fn its_methods_exist_only_on_isolated_listeners() {
    let shared = "[[listen]]\naddress = \"127.0.0.1:0\"\n\
                  [[listen]]\naddress = \"127.0.0.2:0\"\nisolation = \"connection\"\n";
    let config = format!("{METHODS}[workers]\ncount = 1\n{shared}{TABLES}");
    let daemon = Daemon::builder()
        .config(&config)
        .file("sum.py", SUM)
        .start();
    let status = daemon.status();
    let at = |index: usize| {
        status["listeners"][index]["address"]
            .as_str()
            .unwrap()
            .parse()
    };
    let mut shared = Wire::open(at(0).unwrap());
    let mut isolated = Wire::open(at(1).unwrap());
    let call = r#"{"in": "add", "params": 7}"#;
    let answer = shared.ask(Dialect::Line, call).line();
    assert!(answer.contains("method-not-found"), "{answer}");
    assert!(isolated.ask(Dialect::Line, call).line().contains("[7, "));
    let discover = r#"{"in": "rpc.discover"}"#;
    let lists = |wire: &mut Wire| wire.ask(Dialect::Line, discover).line().contains("\"add\"");
    assert!(!lists(&mut shared) && lists(&mut isolated));
}

#[test]
fn a_dead_program_ends_its_connection_and_no_other() {
    let daemon = builder("").expect_log("SIGKILL").start();
    let mut other = daemon.client();
    let (_, kept) = add(&mut other, 1);
    for end_by in ["exit", "kill while it runs", "kill between calls"] {
        let mut client = daemon.client();
        let (_, program) = add(&mut client, 1);
        match end_by {
            "exit" => {
                let answer = client.call(&json!({"in": "add", "params": "exit"}));
                let message = answer["result"]["message"].as_str().unwrap_or_default();
                assert!(message.contains("exit code 3"), "{answer}");
                assert_crashed_and_closed(&mut client, &answer);
            }
            "kill between calls" => {
                kill(Pid::from_raw(program), Signal::SIGKILL).unwrap();
                client.assert_closed();
            }
            _ => {
                client.send_together(
                    [json!("sleep"), json!(1)].map(|params| json!({"in": "add", "params": params})),
                );
                wait_running(&daemon, session_of(&client));
                kill(Pid::from_raw(program), Signal::SIGKILL).unwrap();
                assert_eq!(client.recv_json()["result"]["name"], "crashed");
                let answer = client.recv_json();
                assert_crashed_and_closed(&mut client, &answer);
            }
        }
    }
    assert_eq!(add(&mut other, 1), (2, kept));
    process::wait_for_no_zombies(acceptor(&daemon));
}

#[test]
fn a_program_that_does_not_become_ready_ends_the_connection_with_the_reason() {
    let tables = "[pools.bad]\ncommand = [\"sh\", \"-c\", \"exit 4\"]\nscope = \"connection\"\n\
                  [methods.bad]\npool = \"bad\"\n";
    let daemon = builder(tables).start();
    let mut client = daemon.client();
    let answer = client.call(&json!({"in": "bad"}));
    let message = answer["result"]["message"].as_str().unwrap_or_default();
    assert!(message.contains("exit code 4"), "{answer}");
    assert_crashed_and_closed(&mut client, &answer);
}

#[test]
fn a_call_that_takes_too_long_times_out_and_the_next_one_finds_the_state() {
    let daemon = builder("").start();
    let mut client = daemon.client();
    let (_, program) = add(&mut client, 1);
    let answer = client.call(&json!({"in": "add", "params": "sleep", "timeout_ms": 100}));
    assert_eq!(answer["result"]["name"], "timeout", "{answer}");
    // The abandoned call runs to its end.
    assert_eq!(add(&mut client, 1), (3, program));
}

#[test]
fn a_session_with_a_program_stays_at_a_reload_until_it_ends() {
    let daemon = builder("drain-timeout = \"20s\"\n[limits]\ntimeout = \"5s\"\n").start();
    let (mut with, mut without) = (daemon.client(), daemon.client());
    let (_, program) = add(&mut with, 1);
    ping(&mut without);
    let (session, other) = (session_of(&with), session_of(&without));
    let old = acceptor(&daemon);
    for change in ["reload", "upgrade"] {
        assert!(daemon.command(&[change]).status.success(), "{change}");
    }
    wait_for("the move of the other one", PATIENCE, || {
        !process::runs(other)
    });
    ping(&mut without);
    // After a second, calls that wait for the pool processes of a replaced generation are given up.
    for sum in 2..18 {
        assert_eq!(add(&mut with, 1), (sum, program));
        pass(Duration::from_millis(100));
    }
    assert_eq!(session_of(&with), session);
    drop(with);
    wait_for("the end of the old acceptor", PATIENCE, || {
        !process::runs(old) && !process::runs(program)
    });
}

#[test]
fn the_end_of_a_drain_ends_a_session_with_a_program_between_two_calls() {
    let daemon = builder("drain-timeout = \"3s\"\n[limits]\ntimeout = \"3s\"\n").start();
    let mut client = daemon.client();
    let (_, program) = add(&mut client, 1);
    let old = acceptor(&daemon);
    let begin = Instant::now();
    assert!(daemon.command(&["reload"]).status.success());
    client.assert_closed();
    let took = begin.elapsed();
    assert!(took > Duration::from_millis(1500), "{took:?}");
    assert_within("the end", took, Duration::from_secs(5));
    wait_for("the end of the program", PATIENCE, || {
        !process::runs(program)
    });
    daemon.wait_log("workers.drain-timeout is nearly over: the connection");
    // The old acceptor must exit although the client has not closed its end.
    wait_for("the old acceptor gone", PATIENCE, || !process::runs(old));
    assert!(!daemon.log().contains("SIGTERM"), "{}", daemon.log());
    drop(client);
}

#[test]
fn a_stop_ends_the_programs() {
    let mut daemon = builder("").start();
    let mut client = daemon.client();
    let (_, program) = add(&mut client, 1);
    client.send(r#"{"in": "add", "params": "sleep"}"#);
    wait_running(&daemon, session_of(&client));
    daemon.signal(Signal::SIGTERM);
    assert_eq!(client.recv_json()["result"][0], 2);
    client.assert_closed();
    assert!(daemon.wait_exit().success());
    assert!(!process::runs(program));
}
