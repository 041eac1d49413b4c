//! A command leaves no process behind: not at its deadline, not when its caller leaves, not when
//! its worker or the master is killed, however hard it tries.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::support::leftover_check::{Hostile, gone};
use crate::support::{Daemon, PATIENCE, assert_within, process, wait_for};

/// A daemon with that as a method.
fn hostile(timeout: &str, more: &str, expect: &[&str]) -> Hostile {
    const REST: &str = "if len(sys.argv) > 2:\n    sys.exit(0)\ntime.sleep(3600)\n";
    let config = |command: &str| {
        format!("[methods.hostile]\ncommand = [{command}{more}]\ntimeout = \"{timeout}\"\n")
    };
    Hostile::start(REST, config, expect)
}

#[test]
fn nothing_is_left_after_the_deadline() {
    let setting = hostile("5s", "", &[]);
    let mut client = setting.daemon.client();
    client.send(&json!({"in": "hostile"}).to_string());
    let pids = setting.started(1);
    let answer = client.recv_json();
    assert_eq!(answer["result"]["name"], "timeout", "{answer}");
    gone(&pids, "deadline");
    assert!(process::children(setting.daemon.ready_workers()[0]).is_empty());
}

#[test]
fn nothing_is_left_when_the_caller_has_gone() {
    let setting = hostile("20s", "", &[]);
    let mut client = setting.daemon.client();
    client.send(&json!({"in": "hostile"}).to_string());
    let pids = setting.started(1);
    client.reset();
    gone(&pids, "caller gone");
}

#[test]
fn nothing_is_left_when_the_call_is_cancelled() {
    let setting = hostile("20s", "", &[]);
    let mut client = setting.daemon.client();
    client.send(&json!({"in": "hostile", "id": 7}).to_string());
    let pids = setting.started(1);
    client.send(r#"{"in": "rpc.cancel", "params": {"id": 7}}"#);
    let answer = client.recv_json();
    assert_eq!(answer["result"]["name"], "cancelled", "{answer}");
    gone(&pids, "cancelled");
}

#[test]
fn nothing_is_left_when_the_program_just_ends() {
    let setting = hostile("20s", ", \"leave\"", &[]);
    let mut client = setting.daemon.client();
    let answer = client.call(&json!({"in": "hostile"}));
    assert_eq!(answer["out"], "hostile", "{answer}");
    let pids = setting.all();
    assert!(!pids.is_empty());
    gone(&pids, "program ended");
    let worker = setting.daemon.ready_workers()[0];
    wait_for("no child of the worker", PATIENCE, || {
        process::children(worker).is_empty()
    });
}

#[test]
fn nothing_is_left_when_the_worker_is_killed() {
    let setting = hostile("20s", "", &["SIGKILL"]);
    let mut client = setting.daemon.client();
    client.send(&json!({"in": "hostile"}).to_string());
    let pids = setting.started(1);
    setting.end_worker(Signal::SIGKILL, &pids, "worker killed");
    // and the fresh one is not taken for a leftover
    assert_eq!(
        setting
            .daemon
            .client()
            .call(&json!({"in": "ping", "params": 1}))["result"],
        1
    );
}

#[test]
fn nothing_is_left_when_a_worker_is_told_to_quit() {
    let setting = hostile("20s", "", &["left unasked"]);
    let mut client = setting.daemon.client();
    client.send(&json!({"in": "hostile"}).to_string());
    let pids = setting.started(1);
    setting.end_worker(Signal::SIGQUIT, &pids, "worker quits");
    setting.daemon.wait_log("left unasked");
}

#[test]
fn nothing_is_left_after_the_masters_death() {
    let mut setting = hostile("5s", "", &["the master has died"]);
    let mut client = setting.daemon.client();
    client.send(&json!({"in": "hostile"}).to_string());
    let pids = setting.started(1);
    setting.daemon.signal(Signal::SIGKILL);
    setting.daemon.wait_exit();
    // what runs is answered, so the command has its time
    let answer = client.recv_json();
    assert_eq!(answer["result"]["name"], "timeout", "{answer}");
    gone(&pids, "master killed");
    setting.daemon.wait_group_gone();
}

/// As the kernel's OOM killer or a container runtime does it: no process is left that could kill the command.
#[test]
fn a_command_ends_when_master_worker_and_keeper_are_killed_together() {
    let mut daemon = Daemon::builder()
        .config("[workers]\ncount = 1\n[methods.nap]\ncommand = [\"sleep\", \"60\"]\n")
        .start();
    let mut client = daemon.client();
    client.send(r#"{"in": "nap"}"#);
    let worker = daemon.wait_running(1);
    let command = process::children(worker);
    assert_eq!(command.len(), 1, "{command:?}");
    let mut all = process::children(daemon.pid());
    all.push(daemon.pid());
    assert_eq!(all.len(), 3, "{all:?}");
    // Stopped first, so that none of them sees another one die.
    for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
        for &pid in &all {
            kill(Pid::from_raw(pid), signal).unwrap();
        }
    }
    daemon.wait_exit();
    gone(&command, "master, worker and keeper killed");
    daemon.wait_group_gone();
}

#[test]
fn a_stop_waits_for_the_command_and_leaves_nothing() {
    let mut daemon = Daemon::builder()
        .config(
            "[workers]\ncount = 1\n[methods.nap]\ncommand = [\"sh\", \"-c\", \"sleep 3; echo up\"]\n",
        )
        .start();
    let mut client = daemon.client();
    client.send(r#"{"in": "nap"}"#);
    daemon.wait_running(1);
    daemon.signal(Signal::SIGTERM);
    assert_eq!(client.recv_json()["result"], "up\n");
    assert!(daemon.wait_exit().success());
    daemon.wait_group_gone();
}

/// Nothing of the listener is in a command: the port is free as soon as the master is gone, though one
/// still runs and is answered.
#[test]
fn a_command_that_outlives_the_master_holds_no_port() {
    let mut daemon = Daemon::builder()
        .config("[workers]\ncount = 1\n[methods.nap]\ncommand = [\"sleep\", \"60\"]\n")
        .expect_log("the master has died")
        .start();
    let mut client = daemon.client();
    client.send(r#"{"in": "nap"}"#);
    let worker = daemon.ready_workers()[0];
    let mut children = Vec::new();
    wait_for("the command to run", PATIENCE, || {
        children = process::children(worker);
        !children.is_empty()
    });
    let address = daemon.address();
    daemon.signal(Signal::SIGKILL);
    daemon.wait_exit();
    let began = Instant::now();
    wait_for("the port to be free", PATIENCE, || {
        std::net::TcpListener::bind(address).is_ok()
    });
    let took = began.elapsed();
    assert_within("the port free", took, Duration::from_secs(1));
    assert!(process::state(children[0]).is_some(), "it still runs");
    kill(Pid::from_raw(children[0]), Signal::SIGKILL).unwrap();
    let answer = client.recv_json();
    assert_eq!(answer["result"]["data"]["signal"], "SIGKILL", "{answer}");
    daemon.wait_group_gone();
}
