//! Checks that sessions whose acceptor has died are served and watched like others, and that an acceptor without
//! a link to its master does not stay for ever.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::takeovers::{POOL, config, end_acceptor, pool};
use super::{acceptor, builder, isolated, ping, session_of, wait_running};
use crate::support::{Daemon, PATIENCE, pass, process, wait_for};

fn end(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

/// Kills the pool process, and waits for the next one.
fn end_pool(daemon: &Daemon) {
    let first = daemon.pool();
    end(first, Signal::SIGKILL);
    wait_for("the next pool process", PATIENCE, || {
        let pools = daemon.status()["pools"].clone();
        pools[0]["state"] == "ready" && pools[0]["pid"] != first
    });
}

#[test]
fn a_session_without_an_acceptor_gets_a_link_to_the_next_pool_process() {
    let daemon = builder(&pool(0.0, 0.0, "5s"), "")
        .file("pool.py", POOL)
        .expect_log("SIGKILL")
        .start();
    let mut client = daemon.client();
    ping(&mut client);
    let session = session_of(&client);
    end_acceptor(&daemon);
    end_pool(&daemon);
    let answer = client.call(&json!({"in": "work"}));
    assert_eq!(answer["result"], "done", "{answer}");
    assert_eq!(session_of(&client), session);
    // The session must also survive the death of the acceptor to which it has sent its new link.
    end_acceptor(&daemon);
    end_pool(&daemon);
    let answer = client.call(&json!({"in": "work"}));
    assert_eq!(answer["result"], "done", "{answer}");
}

#[test]
fn a_stuck_session_without_an_acceptor_is_killed_and_its_death_has_a_reason() {
    let daemon = builder("heartbeat-timeout = \"1s\"\n", "")
        .expect_log("SIGKILL")
        .expect_log("its event loop has not run")
        .start();
    let (mut client, mut other) = (daemon.client(), daemon.client());
    ping(&mut client);
    ping(&mut other);
    let stuck = session_of(&client);
    end_acceptor(&daemon);
    end(stuck, Signal::SIGSTOP);
    client.assert_closed();
    daemon.wait_log("event loop stuck for");
    let mut reason = Value::Null;
    wait_for("its death record", PATIENCE, || {
        let deaths = daemon.status()["deaths"].clone();
        let mut deaths = deaths.as_array().unwrap().iter();
        let death = deaths.find(|it| it["pid"] == stuck);
        reason = death.map_or(Value::Null, |it| it["reason"].clone());
        death.is_some()
    });
    assert!(
        reason.as_str().unwrap().starts_with("event loop stuck"),
        "{reason}"
    );
    ping(&mut other);
}

/// Returns how many calls of a method run, as `status` says.
fn running(daemon: &Daemon, method: &str) -> u64 {
    // The command adds what the metrics board has.
    let status = daemon.command(&["status", "--json"]).stdout;
    let status: Value = serde_json::from_slice(&status).unwrap();
    let mut methods = status["methods"].as_array().unwrap().iter();
    let found = methods.find(|it| it["name"] == method);
    found.map_or(0, |it| it["running"].as_u64().unwrap())
}

#[test]
fn running_calls_of_all_sessions_are_added_and_those_of_dead_ones_are_not() {
    let daemon = builder("", "").expect_log("SIGKILL").start();
    let mut clients: Vec<_> = (0..3).map(|_| daemon.client()).collect();
    for client in &mut clients {
        client.send(r#"{"in": "sleep", "params": 20}"#);
        wait_running(&daemon, session_of(client));
    }
    wait_for("three calls", PATIENCE, || running(&daemon, "sleep") == 3);
    end(session_of(&clients[0]), Signal::SIGKILL);
    wait_for("two calls", PATIENCE, || running(&daemon, "sleep") == 2);
    end_acceptor(&daemon);
    wait_for(
        "the calls of sessions without an acceptor",
        PATIENCE,
        || running(&daemon, "sleep") == 2,
    );
    end(session_of(&clients[1]), Signal::SIGKILL);
    wait_for("one call", PATIENCE, || running(&daemon, "sleep") == 1);
}

#[test]
fn an_acceptor_that_a_failed_upgrade_has_cut_off_leaves_its_sessions_to_the_next_one() {
    let daemon = builder(&pool(0.0, 0.0, "5s"), "")
        .file("pool.py", POOL)
        .file("broken.py", "import sys\nsys.exit(3)\n")
        .expect_log("before it was ready")
        .expect_log("upgrade")
        .start();
    let mut client = daemon.client();
    ping(&mut client);
    let (cut_off, session) = (acceptor(&daemon), session_of(&client));
    let broken = config(&pool(0.0, 0.0, "5s").replace("pool.py", "broken.py"));
    daemon.configure(&broken);
    assert!(!daemon.command(&["upgrade"]).status.success());
    wait_for("the end of the old acceptor", PATIENCE, || {
        !process::runs(cut_off)
    });
    assert_eq!(process::parent(session), Some(daemon.pid()));
    let answer = client.call(&json!({"in": "work"}));
    assert_eq!(answer["result"], "done", "{answer}");
    ping(&mut daemon.client());
}

#[test]
fn a_connection_for_which_the_system_has_no_room_is_sent_again() {
    let daemon = isolated("spare = 1\n");
    ping(&mut daemon.client());
    let mut strace = Command::new("strace")
        .args(["-e", "trace=sendmsg", "-e"])
        .arg("inject=sendmsg:error=ETOOMANYREFS:when=1..2")
        .args(["-p", &acceptor(&daemon).to_string()])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = strace.stderr.take().unwrap();
    let mut text = Vec::new();
    while !String::from_utf8_lossy(&text).contains("attached") {
        let mut byte = [0];
        assert_eq!(stderr.read(&mut byte).unwrap(), 1, "strace cannot attach");
        text.push(byte[0]);
    }
    ping(&mut daemon.client());
    end(strace.id() as i32, Signal::SIGTERM);
    strace.wait().unwrap();
    daemon.wait_log("no connection can be accepted");
    pass(Duration::from_millis(100));
    assert!(
        !daemon.log().contains("the connection is closed"),
        "{}",
        daemon.log()
    );
    ping(&mut daemon.client());
}
