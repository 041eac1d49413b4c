//! Tests `stop --after` and a whole stop under load: not ready but serving, then the answers, the
//! deadline, the end.

use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::json;

use crate::support::wire::{Wire, post};
use crate::support::{Callers, Client, Daemon, PATIENCE, alone, assert_within, control, wait_for};

const CONFIG: &str = "
[workers]
count = 4
[methods.sleep]
builtin = \"sleep\"
";

/// Returns the health on enough new connections to reach every worker.
fn health(daemon: &Daemon) -> Vec<u16> {
    let ask = |_| {
        let mut wire = Wire::to(daemon);
        wire.send("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n");
        wire.response().status
    };
    (0..64).map(ask).collect()
}

#[test]
fn a_lame_duck_is_not_ready_and_serves_until_its_time_is_over() {
    let mut daemon = Daemon::builder()
        .config(CONFIG)
        .expect_log("ended by SIGKILL")
        .start();
    assert!(health(&daemon).iter().all(|&status| status == 200));
    let told = daemon.notify().count();
    let (lasting, connecting) = (
        Callers::lasting(daemon.address(), 4),
        Callers::connecting(daemon.address(), 2),
    );
    let begin = Instant::now();
    let address = daemon.address();
    let mut stopping = daemon.asking(&["stop", "--after", "15s"]).spawn().unwrap();
    daemon
        .notify()
        .wait(told, PATIENCE, |line| line == "STOPPING=1")
        .expect("the service manager is told at the beginning");
    daemon.wait_log("stop scheduled in 15 s");
    wait_for("all workers to have read the order", PATIENCE, || {
        health(&daemon).iter().all(|&status| status == 503)
    });
    let not_ready_after = begin.elapsed();
    // A call in the worker that is killed next would be lost.
    let connecting = connecting.stop();
    assert!(connecting.lost.is_empty(), "{:?}", connecting.lost);
    // A replaced worker is not ready either.
    let worker = daemon.ready_workers()[0];
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(worker), Signal::SIGKILL).unwrap();
    wait_for("its successor", PATIENCE, || {
        let ready = daemon.ready_workers();
        ready.len() == 4 && !ready.contains(&worker)
    });
    assert!(health(&daemon).iter().all(|&status| status == 503));
    let status = daemon.status();
    let left = status["master"]["stops_in_ms"].as_u64().unwrap();
    assert!(left <= 15_000, "{left}");
    let refused = daemon.command(&["reload"]);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    let why = String::from_utf8(refused.stderr).unwrap();
    assert!(
        why.contains("reload refused: the server stops in "),
        "{why}"
    );
    daemon.signal(Signal::SIGHUP);
    daemon.wait_log("reload refused: the server stops in ");
    assert_eq!(daemon.client().call(&json!({"in": "ping"}))["out"], "pong");
    lasting.stop();
    let mut running = daemon.client();
    running.send(&json!({"in": "sleep", "params": 16}).to_string());
    wait_for("new connections refused", PATIENCE, || {
        TcpStream::connect(address).is_err()
    });
    let refused_after = begin.elapsed();
    assert_eq!(running.recv_json()["result"], 16);
    let stopped = stopping.wait().unwrap();
    assert!(stopped.success(), "{stopped:?}");
    assert_eq!(daemon.wait_exit().code(), Some(0));
    println!("not ready after {not_ready_after:?}, refused after {refused_after:?}");
    assert!(
        refused_after >= Duration::from_millis(14_900),
        "{refused_after:?}"
    );
    assert_within("refused", refused_after, Duration::from_secs(16));
}

#[test]
fn a_reload_that_waits_for_another_is_refused_by_a_lame_duck() {
    let mut daemon = Daemon::builder()
        .config(CONFIG)
        .expect_log("the server stops")
        .expect_log("not needed any more before it was ready")
        .start();
    let never_ready = "
[pools.p]
processes = 1
command = [\"sh\", \"-c\", \"trap '' TERM; while :; do sleep 1; done\"]
ready = \"message\"
[methods.slow]
pool = \"p\"
";
    daemon.configure(&format!("{CONFIG}{never_ready}"));
    let order = |words: &[&str]| {
        let mut command = daemon.asking(words);
        command.stderr(Stdio::piped()).spawn().unwrap()
    };
    let first = order(&["reload"]);
    daemon.wait_log("reload: reading the configuration");
    let mut second = order(&["reload"]);
    let mut told = BufReader::new(second.stderr.take().unwrap());
    // It reports this when it waits.
    let mut line = String::new();
    told.read_line(&mut line).unwrap();
    assert!(line.contains("waiting for"), "{line}");
    let later = order(&["stop", "--after", "10m"]);
    line.clear();
    told.read_line(&mut line).unwrap();
    assert!(line.contains("the server stops in "), "{line}");
    assert_eq!(second.wait().unwrap().code(), Some(1));
    daemon.signal(Signal::SIGTERM);
    assert_eq!(first.wait_with_output().unwrap().status.code(), Some(1));
    assert!(later.wait_with_output().unwrap().status.success());
    assert_eq!(daemon.wait_exit().code(), Some(0));
}

#[test]
fn a_stop_and_a_term_are_heard_at_once_in_a_lame_duck() {
    for term in [false, true] {
        let mut daemon = Daemon::builder().config(CONFIG).start();
        let mut later = daemon.asking(&["stop", "--after", "10m"]).spawn().unwrap();
        daemon.wait_log("stop scheduled in 600 s");
        let mut running = daemon.client();
        running.send(&json!({"in": "sleep", "params": 3}).to_string());
        daemon.wait_running(1);
        let begin = Instant::now();
        match term {
            true => daemon.signal(Signal::SIGTERM),
            false => assert!(daemon.command(&["stop"]).status.success()),
        }
        // A graceful stop: the running call is answered.
        assert_eq!(running.recv_json()["result"], 3);
        assert_eq!(daemon.wait_exit().code(), Some(0));
        assert_within("left", begin.elapsed(), Duration::from_secs(5));
        assert!(later.wait().unwrap().success());
    }
}

/// The promise for TERM as a whole: 100 calls of three seconds, one of a minute, 50 idle connections.
#[test]
fn a_stop_answers_a_hundred_calls_gives_the_endless_one_up_and_keeps_to_its_deadline() {
    const DEADLINE: Duration = Duration::from_secs(5);
    let _alone = alone();
    let mut daemon = Daemon::builder()
        .config(
            "
[workers]
count = 2
threads = 110
drain-timeout = \"5s\"
[limits]
timeout = \"5s\"
[methods.sleep]
builtin = \"sleep\"
",
        )
        .start();
    let idle: Vec<Client> = (0..50).map(|_| daemon.client()).collect();
    let mut calls: Vec<Client> = (0..100).map(|_| daemon.client()).collect();
    let mut endless = daemon.client();
    let mut web = Wire::to(&daemon);
    web.send(post("/sleep", "3"));
    for (id, client) in calls.iter_mut().enumerate() {
        client.send(&json!({"in": "sleep", "params": 3, "id": id}).to_string());
    }
    endless.send(&json!({"in": "sleep", "params": 60, "id": "endless"}).to_string());
    wait_for("all of them to run", PATIENCE, || {
        daemon.workers().iter().map(|it| it.running).sum::<u64>() == 102
    });
    let begin = Instant::now();
    daemon.signal(Signal::SIGTERM);
    wait_for("new connections refused", PATIENCE, || {
        TcpStream::connect(daemon.address()).is_err()
    });
    let refused_after = begin.elapsed();
    let answered = calls
        .iter_mut()
        .enumerate()
        .filter_map(|(id, client)| {
            let answer = client.recv_json();
            client.assert_closed();
            (answer["result"] == 3 && answer["id"] == id).then_some(())
        })
        .count();
    let response = web.response();
    assert!(response.status == 200 && response.closes(), "{response:?}");
    let given_up = endless.recv_json();
    endless.assert_closed();
    let status = daemon.wait_exit();
    let took = begin.elapsed();
    println!(
        "{answered} of 100 answered, refused after {refused_after:?}, the endless one: {given_up}; \
         left after {took:?} with {status:?}"
    );
    assert_eq!(answered, 100);
    assert_within("refused", refused_after, Duration::from_millis(100));
    assert!(
        matches!(given_up["result"]["code"].as_i64(), Some(-32005 | -32001)),
        "{given_up}"
    );
    assert_eq!(given_up["result"]["started"], true);
    assert_eq!(status.code(), Some(0));
    assert_within("left", took, DEADLINE + Duration::from_millis(500));
    drop(idle);
    daemon.wait_group_gone();
}

#[test]
fn a_stop_after_more_than_a_day_is_refused() {
    let daemon = Daemon::start();
    let refused = daemon.command(&["stop", "--after", "25h"]);
    assert_eq!(refused.status.code(), Some(64));
    assert!(
        String::from_utf8(refused.stderr)
            .unwrap()
            .contains("give 1d at most")
    );
    let request = r#"{"command":"stop","now":false,"after_ms":86400001}"#;
    let answer = control::ask(&daemon.dir().join("control.sock"), request);
    assert!(answer.contains("stop refused"), "{answer}");
    assert_eq!(daemon.client().call(&json!({"in": "ping"}))["out"], "pong");
}
