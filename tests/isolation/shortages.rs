//! Checks what connections get while the system gives no process or descriptor, and what becomes of a session
//! that ignores its deadline.

use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};

use super::{acceptor, builder, isolated, ping, session_of, status};
use crate::support::{PATIENCE, assert_within, pass, process, wait_for};

/// A user with no other process.
const USER: u32 = 54_329;

/// Sets the soft limit of a process of this user, as `prlimit` names it.
fn limit(user: u32, pid: i32, limit: &str) {
    let id = user.to_string();
    let mut command = Command::new("setpriv");
    command.args([
        "--reuid",
        &id,
        "--regid",
        &id,
        "--clear-groups",
        "prlimit",
        "--pid",
    ]);
    let set = command.arg(pid.to_string()).arg(limit).status();
    assert!(set.unwrap().success());
}

/// Returns the hard limit of processes of a process.
fn most_processes(pid: i32) -> String {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max processes"));
    line.and_then(|line| line.split_whitespace().nth(3))
        .unwrap()
        .to_owned()
}

#[test]
fn a_connection_without_a_process_waits_for_one_until_the_read_timeout() {
    if !Uid::effective().is_root() {
        return;
    }
    let tables = "[limits]\nread-timeout = \"2s\"\n";
    let daemon = builder(tables, "spare = 0\n").user(USER).start();
    let acceptor = acceptor(&daemon);
    let mut open = daemon.client();
    ping(&mut open);
    // The first process, which has shown that sessions can start, is used up.
    wait_for("no spare process", PATIENCE, || {
        status(&daemon)["spare"] == 0
    });
    limit(USER, acceptor, "--nproc=1:");
    let begin = Instant::now();
    let mut refused: Vec<_> = (0..3).map(|_| daemon.client()).collect();
    refused
        .iter_mut()
        .for_each(|client| client.send(r#"{"in": "ping"}"#));
    let before = process::cpu_ticks(acceptor).unwrap();
    for client in &mut refused {
        let answer = client.recv_json();
        assert_eq!(answer["result"]["name"], "overloaded", "{answer}");
        assert_eq!(answer["result"]["started"], false);
        client.assert_closed();
    }
    assert!(begin.elapsed() >= Duration::from_secs(2));
    assert_within("the refusal", begin.elapsed(), Duration::from_secs(5));
    let used = process::cpu_ticks(acceptor).unwrap() - before;
    assert!(used < 50, "the acceptor has spun: {used} ticks");
    daemon.wait_log("no connection can be accepted");
    assert_eq!(status(&daemon)["refused_no_process"], 3);
    ping(&mut open);
    let mut waiting = daemon.client();
    waiting.send(r#"{"in": "ping"}"#);
    pass(Duration::from_millis(500));
    limit(
        USER,
        acceptor,
        &format!("--nproc={}:", most_processes(acceptor)),
    );
    assert_eq!(waiting.recv_json()["out"], "pong");
}

#[test]
fn without_a_descriptor_connections_wait_in_the_kernel() {
    if !Uid::effective().is_root() {
        return;
    }
    let daemon = isolated("spare = 1\n");
    let mut open = daemon.client();
    ping(&mut open);
    let acceptor = acceptor(&daemon);
    limit(0, acceptor, "--nofile=4:");
    let mut waiting = daemon.client();
    waiting.send(r#"{"in": "ping"}"#);
    daemon.wait_log("no connection can be accepted");
    ping(&mut open);
    limit(0, acceptor, "--nofile=1024:");
    assert_eq!(waiting.recv_json()["out"], "pong");
    ping(&mut daemon.client());
}

#[test]
fn a_session_whose_loop_is_stuck_is_killed_with_all_it_started() {
    let tables = "heartbeat-timeout = \"1s\"\n[methods.run]\n\
                  command = [\"sh\", \"-c\", \"setsid sleep 4322 & sleep 60\"]\n";
    let builder = builder(tables, "");
    let daemon = builder
        .expect_log("its event loop has not run")
        .expect_log("SIGKILL")
        .start();
    let (mut other, mut client) = (daemon.client(), daemon.client());
    ping(&mut other);
    client.send(r#"{"in": "run"}"#);
    let session = session_of(&client);
    let mut started = Vec::new();
    wait_for("what it starts", PATIENCE, || {
        started = process::descendants(session);
        started.len() >= 3
    });
    kill(Pid::from_raw(session), Signal::SIGSTOP).unwrap();
    client.assert_closed();
    wait_for("the end of all", PATIENCE, || {
        !started.iter().any(|&pid| process::runs(pid))
    });
    // The acceptor counts it when it has reaped it.
    wait_for("the crash to be counted", PATIENCE, || {
        status(&daemon)["crashed"] == 1
    });
    ping(&mut other);
}
