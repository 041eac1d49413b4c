//! Tests that a command leaves no process behind: at its deadline, when its caller disconnects, when its
//! worker or the master is killed, even if it tries hard.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::support::leftover_check::{Hostile, gone};
use crate::support::{Daemon, Dir, PATIENCE, assert_within, process, wait_for};

/// Starts a daemon with the hostile program as a method.
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

/// Starts a process that has no parent, no mark in its environment and a session of its own. Writes its pid,
/// and sleeps for the time of its second argument.
const CLEARED: &str = r#"env -i setsid sh -c 'echo $$ >>"$0"; exec sleep 3600' "$1" </dev/null >/dev/null 2>&1 &
until [ -s "$1" ]; do sleep 0.02; done; exec sleep "$2""#;

/// Starts a daemon with that program as the methods `clear`, `late` and `stay`, which end at once, at their
/// deadline, and after 4 s.
fn clearing(pids: &str) -> Daemon {
    let command = |file: &str, seconds: &str| {
        let script = serde_json::to_string(CLEARED).unwrap();
        format!("command = [\"sh\", \"-c\", {script}, \"sh\", \"{file}\", \"{seconds}\"]\n")
    };
    let config = format!(
        "[workers]\ncount = 1\nthreads = 3\n[methods.clear]\n{}[methods.late]\n{}timeout = \"1s\"\n\
         [methods.stay]\n{}",
        command(&format!("{pids}.clear"), "0"),
        command(&format!("{pids}.late"), "3600"),
        command(&format!("{pids}.stay"), "4"),
    );
    Daemon::builder().config(&config).start()
}

fn pid_in(file: &str) -> i32 {
    wait_for("a pid", PATIENCE, || {
        std::fs::read_to_string(file).is_ok_and(|text| text.ends_with('\n'))
    });
    let text = std::fs::read_to_string(file).unwrap();
    text.trim().parse().unwrap()
}

#[test]
fn a_process_that_clears_its_environment_ends_with_its_call() {
    let dir = Dir::new();
    let pids = dir.join("pid").display().to_string();
    let daemon = clearing(&pids);
    let mut client = daemon.client();
    let answer = client.call(&json!({"in": "clear"}));
    assert_eq!(answer["out"], "clear", "{answer}");
    gone(&[pid_in(&format!("{pids}.clear"))], "program ended");
    let answer = client.call(&json!({"in": "late"}));
    assert_eq!(answer["result"]["name"], "timeout", "{answer}");
    gone(&[pid_in(&format!("{pids}.late"))], "deadline");
}

/// It is not known which of the calls has started it.
#[test]
fn a_process_that_clears_its_environment_ends_with_the_calls_that_ran_beside_it() {
    let dir = Dir::new();
    let pids = dir.join("pid").display().to_string();
    let daemon = clearing(&pids);
    let (mut client, mut other) = (daemon.client(), daemon.client());
    client.send(&json!({"in": "stay"}).to_string());
    let stays = pid_in(&format!("{pids}.stay"));
    // Other calls that end do not end what may belong to a running call.
    assert_eq!(other.call(&json!({"in": "clear"}))["out"], "clear");
    let cleared = pid_in(&format!("{pids}.clear"));
    for pid in [stays, cleared] {
        assert!(process::state(pid).is_some());
    }
    assert_eq!(client.recv_json()["out"], "stay");
    gone(&[stays, cleared], "all calls ended");
}

#[test]
fn nothing_is_left_when_the_worker_is_killed() {
    let setting = hostile("20s", "", &["SIGKILL"]);
    let mut client = setting.daemon.client();
    client.send(&json!({"in": "hostile"}).to_string());
    let pids = setting.started(1);
    setting.end_worker(Signal::SIGKILL, &pids, "worker killed");
    // The fresh one is not taken for a leftover.
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
    let setting = hostile("20s", "", &["exited without an order"]);
    let mut client = setting.daemon.client();
    client.send(&json!({"in": "hostile"}).to_string());
    let pids = setting.started(1);
    setting.end_worker(Signal::SIGQUIT, &pids, "worker quits");
    setting.daemon.wait_log("exited without an order");
}

#[test]
fn nothing_is_left_after_the_masters_death() {
    let mut setting = hostile("5s", "", &["the master has died"]);
    let mut client = setting.daemon.client();
    client.send(&json!({"in": "hostile"}).to_string());
    let pids = setting.started(1);
    setting.daemon.signal(Signal::SIGKILL);
    setting.daemon.wait_exit();
    // The running call is answered, so the command has its time.
    let answer = client.recv_json();
    assert_eq!(answer["result"]["name"], "timeout", "{answer}");
    gone(&pids, "master killed");
    setting.daemon.wait_group_gone();
}

/// As the kernel's OOM killer or a container runtime does it: no process remains that could kill the
/// command.
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
    // They are stopped first, so that none of them sees the death of another.
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

/// A command does not inherit the listener. So the port is free when the master has exited, although a command still
/// runs and is answered.
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
