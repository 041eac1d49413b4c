//! Tests each row of the error table that Rust handlers can cause: code, name, `started`, echoed id, and
//! what happens to the connection.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::{Client, Daemon, PATIENCE, Sweep, alone, assert_within, example, wait_for};

/// Fails unless `answer` is this error.
#[track_caller]
pub fn assert_error(answer: &Value, code: i64, name: &str, started: bool) {
    let result = &answer["result"];
    assert_eq!(answer["out"], "error", "{answer}");
    assert_eq!(result["code"], code, "{answer}");
    assert_eq!(result["name"], name, "{answer}");
    assert_eq!(result["started"], started, "{answer}");
    assert!(result["message"].is_string(), "{answer}");
}

#[track_caller]
fn assert_kept(client: &mut Client) {
    let answer = client.call(&json!({"in": "ping", "params": "still here"}));
    assert_eq!(answer["result"], "still here", "{answer}");
}

/// One thread, so that a second slow call waits.
fn narrow(more: &str) -> Daemon {
    Daemon::builder()
        .config(&format!(
            "[workers]\ncount = 1\nthreads = 1\n{more}\n[methods.sleep]\nbuiltin = \"sleep\"\n"
        ))
        .start()
}

#[track_caller]
fn wait_running(daemon: &Daemon, running: u64, queued: u64) {
    daemon.wait_running(running);
    wait_for("calls to wait", PATIENCE, || {
        daemon.workers()[0].queued == queued
    });
}

#[test]
fn what_is_no_json_is_a_parse_error() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let deep = format!(
        r#"{{"in": "ping", "params": {}{}}}"#,
        "[".repeat(128),
        "]".repeat(128)
    );
    let cases: [&[u8]; 8] = [
        b"",
        b"{",
        b"hello",
        br#"{"in": "ping", "params": }"#,
        br#"{"in": "ping"} {}"#,
        b"{\"in\": \"p\xffng\"}",
        b"{\"in\": \"ping\", \"params\": \"\xc3\"}",
        deep.as_bytes(),
    ];
    for case in cases {
        client.send_raw(&crate::support::frame(case));
        assert_error(&client.recv_json(), -32700, "parse-error", false);
        assert_kept(&mut client);
    }
}

#[test]
fn json_that_is_no_call_is_an_invalid_request() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    for (body, id) in [
        ("1", Value::Null),
        ("null", Value::Null),
        (r#""ping""#, Value::Null),
        (r#"{"params": 1, "id": 5}"#, json!(5)),
        (r#"{"in": 7, "id": "a"}"#, json!("a")),
        (r#"{"in": "ping", "in": "ping", "id": 1}"#, json!(1)),
        (
            r#"{"in": "ping", "params": 1, "params": 1, "id": 1}"#,
            json!(1),
        ),
        (r#"{"in": "ping", "method": "ping", "id": 1}"#, json!(1)),
        (r#"{"in": "ping", "id": 1, "id": 2}"#, Value::Null),
        (r#"{"in": "ping", "id": [1]}"#, Value::Null),
        (r#"{"in": "ping", "timeout_ms": -1, "id": 1}"#, json!(1)),
        (r#"{"in": "ping", "timeout_ms": "1", "id": 1}"#, json!(1)),
        (r#"{"in": "ping", "timeout_ms": 1.5, "id": 1}"#, json!(1)),
    ] {
        client.send(body);
        let answer = client.recv_json();
        assert_error(&answer, -32600, "invalid-request", false);
        assert_eq!(answer["id"], id, "{body}: {answer}");
        assert_kept(&mut client);
    }
}

#[test]
fn an_unknown_method_and_wrong_params_are_refused_by_name() {
    let daemon = narrow("");
    let mut client = daemon.client();
    let answer = client.call(&json!({"in": "nope", "id": 7}));
    assert_error(&answer, -32601, "method-not-found", false);
    assert_eq!(answer["id"], 7);
    for params in [json!("long"), json!(-1), json!(null), json!({})] {
        let answer = client.call(&json!({"in": "sleep", "params": params, "id": "x"}));
        assert_error(&answer, -32602, "invalid-params", false);
        assert_eq!(answer["id"], "x");
    }
    assert_kept(&mut client);
}

/// The cost of an answer to an unknown method does not grow with the length of the name.
#[test]
fn a_refusal_is_short_however_long_the_name() {
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 1\n")
        .program(example("minimal"))
        .start();
    let mut client = daemon.client();
    let long = "\u{7f}".repeat(1 << 20);
    for call in [
        json!({"in": long, "id": 1}),
        json!({"in": "add", "params": long, "id": 1}),
        json!({"in": "add", "params": {(&*long): 1}, "id": 1}),
    ] {
        let answer = client.call_text(&call.to_string());
        assert!(answer.len() < 10_000, "{} bytes", answer.len());
        assert!(answer.contains(r#""id":1"#));
    }
}

#[test]
fn time_that_is_over_ends_a_call_that_waits_and_one_that_runs() {
    let _alone = alone();
    let daemon = narrow("");
    let mut client = daemon.client();
    let mut late = Vec::new();
    for round in 0..5 {
        let begin = Instant::now();
        client.send_together([("runs", 800), ("waits", 200)].map(
            |(id, limit)| json!({"in": "sleep", "params": 30, "id": id, "timeout_ms": limit}),
        ));
        for (id, after, started) in [("waits", 200, false), ("runs", 800, true)] {
            let answer = client.recv_json();
            assert_eq!(answer["id"], id, "{round}: {answer}");
            assert_error(&answer, -32001, "timeout", started);
            late.push(lateness(begin, after));
        }
    }
    let answer = client.call(&json!({"in": "ping", "timeout_ms": 0}));
    assert_error(&answer, -32001, "timeout", false);
    assert_kept(&mut client);
    assert_prompt(late);
}

/// Returns how much later an answer comes than `due_ms` after its call was sent. It must never be early.
#[track_caller]
fn lateness(sent: Instant, due_ms: u64) -> Duration {
    let (took, due) = (sent.elapsed(), Duration::from_millis(due_ms));
    // The loop counts whole milliseconds from its last wake-up.
    assert!(
        took + Duration::from_millis(5) >= due,
        "after {took:?}, and {due:?} were its time"
    );
    took.saturating_sub(due)
}

/// Asserts that most are on time; a delayed one may be late once.
#[track_caller]
fn assert_prompt(mut late: Vec<Duration>) {
    late.sort();
    let median = late[late.len() / 2];
    assert_within("late, in the median", median, Duration::from_millis(100));
}

#[test]
fn the_shorter_of_the_callers_and_the_methods_time_holds() {
    let _alone = alone();
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 1\n[methods.sleep]\nbuiltin = \"sleep\"\ntimeout = \"300ms\"\n")
        .start();
    let mut client = daemon.client();
    for (asked, holds) in [
        ("", 300),
        (r#", "timeout_ms": 5000"#, 300),
        (r#", "timeout_ms": 100"#, 100),
    ] {
        let late = (0..3).map(|_| {
            let begin = Instant::now();
            client.send(&format!(r#"{{"in": "sleep", "params": 30{asked}}}"#));
            assert_error(&client.recv_json(), -32001, "timeout", true);
            lateness(begin, holds)
        });
        assert_prompt(late.collect());
    }
}

#[test]
fn a_full_queue_refuses_at_once_and_every_call_is_answered() {
    let daemon = narrow("[limits]\nqueue = 2\n");
    let mut client = daemon.client();
    client.send_together((0..8).map(|id| json!({"in": "sleep", "params": 0.3, "id": id})));
    let answers: Vec<Value> = (0..8).map(|_| client.recv_json()).collect();
    // One begins, two wait.
    let refused: Vec<&Value> = answers.iter().filter(|it| it["out"] == "error").collect();
    assert_eq!(refused.len(), 5, "{answers:?}");
    for answer in &refused {
        assert_error(answer, -32002, "overloaded", false);
    }
    assert!(answers[..5].iter().all(|it| it["out"] == "error"));
    assert_kept(&mut client);
}

#[test]
fn concurrency_and_rate_of_a_method_are_kept() {
    let daemon = Daemon::builder()
        .config(
            "[workers]\ncount = 1\n[methods.sleep]\nbuiltin = \"sleep\"\nconcurrency = 2\n\
             [methods.echo]\nbuiltin = \"echo\"\nrate = 5\n",
        )
        .start();
    let mut client = daemon.client();
    client.send_together((0..5).map(|id| json!({"in": "sleep", "params": 0.2, "id": id})));
    let refused = (0..5)
        .map(|_| client.recv_json())
        .filter(|answer| answer["result"]["code"] == -32002)
        .inspect(|answer| assert_error(answer, -32002, "overloaded", false))
        .count();
    assert_eq!(refused, 3);
    let answer = client.call(&json!({"in": "sleep", "params": 0}));
    assert_eq!(answer["out"], "sleep", "there is room again: {answer}");

    let begin = Instant::now();
    let allowed = (0..50)
        .map(|id| client.call(&json!({"in": "echo", "id": id})))
        .filter(|answer| answer["out"] == "echo")
        .count();
    let most = 5 + (begin.elapsed().as_millis() * 5).div_ceil(1000) as usize;
    assert!(
        (5..=most).contains(&allowed),
        "{allowed} of 50, at most {most}"
    );
    assert_kept(&mut client);
}

#[test]
fn a_length_over_the_limit_is_answered_and_closed() {
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 1\n[limits]\nframe = \"1KiB\"\n[methods.sleep]\nbuiltin = \"sleep\"\n")
        .start();
    let sweep = Sweep::of(&daemon);
    for before in [false, true] {
        let mut client = daemon.client();
        if before {
            // Calls that were read before are answered first.
            client.send(r#"{"in": "sleep", "params": 0.1}"#);
        }
        client.send_raw(&1025_u32.to_le_bytes());
        // More than the kernel would hold: it is read and dropped, and no reset loses the answer.
        client.send_raw(&[b' '; 100_000]);
        if before {
            assert_eq!(client.recv_json()["out"], "sleep");
        }
        assert_error(&client.recv_json(), -32004, "too-large", false);
        client.assert_closed();
    }
    let mut client = daemon.client();
    let body = format!("{:<1024}", r#"{"in": "ping", "params": "just fits"}"#);
    assert_eq!(
        client.call_text(&body),
        r#"{"out":"pong","result":"just fits"}"#
    );
    drop(client);
    sweep.assert_same(&daemon);
}

#[test]
fn stopping_refuses_what_has_not_begun_and_closes() {
    let mut daemon = narrow("drain-timeout = \"9s\"\n[limits]\ntimeout = \"9s\"\n");
    let mut client = daemon.client();
    client.send(r#"{"in": "sleep", "params": 3, "id": "runs"}"#);
    wait_running(&daemon, 1, 0);
    daemon.signal(Signal::SIGTERM);
    daemon.wait_log("stop");
    wait_for("a call to be refused", PATIENCE, || {
        let answer = client.call(&json!({"in": "ping", "id": "late"}));
        let refused = answer["out"] == "error";
        if refused {
            assert_error(&answer, -32005, "stopping", false);
        }
        refused
    });
    let answer = client.recv_json();
    assert_eq!(answer["id"], "runs");
    client.assert_closed();
    assert!(daemon.wait_exit().success());
}

#[test]
fn a_running_call_at_the_drain_deadline_is_told_so() {
    let mut daemon = narrow("drain-timeout = \"3s\"\n[limits]\ntimeout = \"3s\"\n");
    let mut client = daemon.client();
    client.send(r#"{"in": "sleep", "params": 20, "id": "runs"}"#);
    client.send(r#"{"in": "sleep", "params": 20, "id": "waits"}"#);
    wait_running(&daemon, 1, 1);
    let begin = Instant::now();
    daemon.signal(Signal::SIGTERM);
    let answers = client.recv_all();
    println!("answered {:?} after TERM", begin.elapsed());
    assert_eq!(answers.len(), 2, "{answers:?}");
    for answer in answers {
        let answer: Value = serde_json::from_slice(&answer).unwrap();
        let name = answer["result"]["name"].as_str().unwrap();
        // Its own deadline is just before the end of the drain.
        assert!(matches!(name, "stopping" | "timeout"), "{answer}");
        // The other call may begin when this one ends.
        let runs = answer["id"] == "runs";
        assert!(!runs || answer["result"]["started"] == true, "{answer}");
    }
    assert!(daemon.wait_exit().success());
}

#[test]
fn a_call_is_cancelled_by_its_id_on_its_own_connection_alone() {
    let daemon = narrow("");
    let (mut client, mut other) = (daemon.client(), daemon.client());
    client.send(r#"{"in": "sleep", "params": 30, "id": "runs"}"#);
    wait_running(&daemon, 1, 0);
    client.send(r#"{"in": "sleep", "params": 30, "id": "waits"}"#);
    wait_running(&daemon, 1, 1);
    let cancel = |id| json!({"in": "rpc.cancel", "params": {"id": id}, "id": "c"});
    assert_eq!(other.call(&cancel("runs"))["result"], false);
    for (id, started) in [("waits", false), ("runs", true)] {
        let mut answers = [client.call(&cancel(id)), client.recv_json()];
        answers.sort_by_key(|answer| answer["id"] == "c");
        assert_eq!(answers[0]["id"], id);
        assert_error(&answers[0], -32006, "cancelled", started);
        assert_eq!(answers[1]["result"], true, "{answers:?}");
    }
    assert_eq!(client.call(&cancel("runs"))["result"], false);
    let answer = client.call(&json!({"in": "rpc.cancel", "params": 1}));
    assert_error(&answer, -32602, "invalid-params", false);
    // The thread is free again.
    assert_eq!(
        client.call(&json!({"in": "sleep", "params": 0}))["result"],
        0
    );
}

#[test]
fn a_function_that_panics_is_answered_and_hurts_nobody() {
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 1\n")
        .program(example("minimal"))
        .expect_log("panic at examples/minimal.rs")
        .start();
    let sweep = Sweep::of(&daemon);
    let mut client = daemon.client();
    let mut panics = 0;
    for round in 0..50 {
        for method in ["divide", "divide_inline"] {
            client.send(&json!({"in": "add", "params": [round, 1], "id": "sum"}).to_string());
            let answer = client.recv_json();
            assert_eq!(answer["result"], round + 1, "{answer}");
            let answer = client.call(&json!({"in": method, "params": [1, 0], "id": round}));
            assert_error(&answer, -32603, "internal", true);
            assert_eq!(answer["id"], round);
            let answer = client.call(&json!({"in": method, "params": [6, 3]}));
            assert_eq!(answer["result"], 2, "{answer}");
            panics += 1;
        }
    }
    let answer = client.call(&json!({"in": "refuse", "params": "no room"}));
    assert_eq!(answer["result"]["code"], 1, "{answer}");
    assert_eq!(answer["result"]["message"], "no room");
    assert_eq!(answer["result"]["data"], json!(["its", "own", "data"]));
    for method in ["divide", "divide_inline"] {
        let line = format!(" in a call of {method}, id 0: ");
        assert!(
            daemon.log().contains(&line),
            "{line:?} is not in\n{}",
            daemon.log()
        );
    }
    println!("{panics} panics, each answered to its caller alone, no worker lost");
    drop(client);
    sweep.assert_same(&daemon);
}

/// A function that ignores its deadline blocks its thread, but no other call of the worker.
#[test]
fn a_stuck_function_costs_one_thread_and_its_caller_hears_in_time() {
    let _alone = alone();
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 1\nthreads = 2\n")
        .program(example("minimal"))
        .start();
    let mut client = daemon.client();
    let begin = Instant::now();
    client.send_together([
        json!({"in": "spin", "params": 5000, "id": "stuck", "timeout_ms": 1000}),
        json!({"in": "spin", "params": 1, "id": "fine"}),
    ]);
    assert_eq!(client.recv_json()["id"], "fine");
    let answer = client.recv_json();
    assert_error(&answer, -32001, "timeout", true);
    let late = lateness(begin, 1000);
    assert!(late < Duration::from_secs(2), "{late:?}");
    for number in 0..100 {
        let answer = client.call(&json!({"in": "add", "params": [number, 1]}));
        assert_eq!(answer["result"], number + 1);
    }
}

#[test]
fn a_sum_that_is_no_integer_is_refused_and_does_not_wrap() {
    let cases = [
        ("minimal", json!({"in": "add", "params": [i64::MAX, 1]})),
        ("arithmetic", json!({"in": "sum", "params": [i64::MAX, 1]})),
        (
            "arithmetic",
            json!({"in": "subtract", "params": [i64::MIN, 1]}),
        ),
    ];
    for (program, call) in cases {
        let daemon = Daemon::builder()
            .config("[workers]\ncount = 1\n")
            .program(example(program))
            .start();
        let answer = daemon.client().call(&call);
        assert_eq!(answer["result"]["name"], "invalid-params", "{answer}");
    }
}
