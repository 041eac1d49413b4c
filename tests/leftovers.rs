//! A command leaves no process behind: not at its deadline, not when its caller leaves, not when
//! its worker or the master is killed, however hard it tries.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::support::{Daemon, Dir, PATIENCE, process, wait_for};

/// Forks twice with a session of its own, in the middle and at the end; ignores what can be
/// ignored; each writes its pid and sleeps for an hour.
const HOSTILE: &str = r#"
import os, signal, sys, time
for number in range(1, 32):
    try:
        signal.signal(number, signal.SIG_IGN)
    except OSError:
        pass
def note():
    with open(sys.argv[1], "a") as file:
        file.write("%d\n" % os.getpid())
note()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid() if os.getpid() != os.getsid(0) else None
        note()
        if os.fork() == 0:
            os.setpgid(0, 0)
            note()
        time.sleep(3600)
    note()
    os._exit(0)
if os.fork() == 0:
    note()
    time.sleep(3600)
if len(sys.argv) > 2:
    sys.exit(0)
time.sleep(3600)
"#;

/// A daemon with that as a method, and where the pids are written.
struct Setting {
    daemon: Daemon,
    pids: std::path::PathBuf,
    _dir: Dir,
}

fn setting(timeout: &str, more: &str, expect: &[&str]) -> Setting {
    let dir = Dir::new();
    let program = dir.write("hostile.py", HOSTILE);
    let pids = dir.join("pids");
    let config = format!(
        "[workers]\ncount = 1\n[methods.hostile]\ncommand = [\"python3\", {:?}, {:?}{more}]\n\
         timeout = \"{timeout}\"\n",
        program.to_str().unwrap(),
        pids.to_str().unwrap(),
    );
    let mut builder = Daemon::builder().config(&config);
    for line in expect {
        builder = builder.expect_log(line);
    }
    Setting {
        daemon: builder.start(),
        pids,
        _dir: dir,
    }
}

impl Setting {
    /// Waits until all five have written their pids.
    fn started(&self) -> Vec<i32> {
        let mut pids = Vec::new();
        wait_for("five processes of one command", PATIENCE, || {
            let text = std::fs::read_to_string(&self.pids).unwrap_or_default();
            pids = text.lines().filter_map(|line| line.parse().ok()).collect();
            pids.len() == 5
        });
        pids
    }
}

/// Waits until none of them is left, not even as a zombie, and tells how long that took.
#[track_caller]
fn gone(pids: &[i32], what: &str) {
    let began = Instant::now();
    wait_for("the end of all processes of a command", PATIENCE, || {
        pids.iter().all(|&pid| process::state(pid).is_none())
    });
    let took = began.elapsed();
    println!("{what}: {} processes gone after {took:?}", pids.len());
    assert!(took < Duration::from_secs(1), "{what}: {took:?}");
}

#[test]
fn nothing_is_left_after_the_deadline() {
    let setting = setting("2s", "", &[]);
    let mut client = setting.daemon.client();
    client.send(&json!({"in": "hostile"}).to_string());
    let pids = setting.started();
    let answer = client.recv_json();
    assert_eq!(answer["result"]["name"], "timeout", "{answer}");
    gone(&pids, "deadline");
    assert!(process::children(setting.daemon.ready_workers()[0]).is_empty());
}

#[test]
fn nothing_is_left_when_the_caller_has_gone() {
    let setting = setting("20s", "", &[]);
    let mut client = setting.daemon.client();
    client.send(&json!({"in": "hostile"}).to_string());
    let pids = setting.started();
    client.reset();
    gone(&pids, "caller gone");
}

#[test]
fn nothing_is_left_when_the_call_is_cancelled() {
    let setting = setting("20s", "", &[]);
    let mut client = setting.daemon.client();
    client.send(&json!({"in": "hostile", "id": 7}).to_string());
    let pids = setting.started();
    client.send(r#"{"in": "rpc.cancel", "params": {"id": 7}}"#);
    let answer = client.recv_json();
    assert_eq!(answer["result"]["name"], "cancelled", "{answer}");
    gone(&pids, "cancelled");
}

#[test]
fn nothing_is_left_when_the_program_just_ends() {
    let setting = setting("20s", ", \"leave\"", &[]);
    let mut client = setting.daemon.client();
    let answer = client.call(&json!({"in": "hostile"}));
    assert_eq!(answer["out"], "hostile", "{answer}");
    let text = std::fs::read_to_string(&setting.pids).unwrap();
    let pids: Vec<i32> = text.lines().filter_map(|line| line.parse().ok()).collect();
    assert!(!pids.is_empty());
    gone(&pids, "program ended");
    let worker = setting.daemon.ready_workers()[0];
    wait_for("no child of the worker", PATIENCE, || {
        process::children(worker).is_empty()
    });
}

#[test]
fn nothing_is_left_when_the_worker_is_killed() {
    let setting = setting("20s", "", &["SIGKILL"]);
    let mut client = setting.daemon.client();
    client.send(&json!({"in": "hostile"}).to_string());
    let pids = setting.started();
    let worker = setting.daemon.ready_workers()[0];
    kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
    gone(&pids, "worker killed");
    wait_for("a fresh worker and no zombie", PATIENCE, || {
        let now = setting.daemon.ready_workers();
        now.len() == 1 && now[0] != worker && process::zombies(setting.daemon.pid()).is_empty()
    });
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
    let setting = setting("20s", "", &["left unasked"]);
    let mut client = setting.daemon.client();
    client.send(&json!({"in": "hostile"}).to_string());
    let pids = setting.started();
    let worker = setting.daemon.ready_workers()[0];
    kill(Pid::from_raw(worker), Signal::SIGQUIT).unwrap();
    gone(&pids, "worker quits");
    setting.daemon.wait_log("left unasked");
}

#[test]
fn nothing_is_left_after_the_masters_death() {
    let mut setting = setting("2s", "", &["the master has died"]);
    let mut client = setting.daemon.client();
    client.send(&json!({"in": "hostile"}).to_string());
    let pids = setting.started();
    setting.daemon.signal(Signal::SIGKILL);
    setting.daemon.wait_exit();
    // what runs is answered, so the command has its time
    let answer = client.recv_json();
    assert_eq!(answer["result"]["name"], "timeout", "{answer}");
    gone(&pids, "master killed");
    setting.daemon.wait_group_gone();
}

#[test]
fn a_stop_waits_for_the_command_and_leaves_nothing() {
    let mut daemon = Daemon::builder()
        .config(
            "[workers]\ncount = 1\n[methods.nap]\ncommand = [\"sh\", \"-c\", \"sleep 0.5; echo up\"]\n",
        )
        .start();
    let mut client = daemon.client();
    client.send(r#"{"in": "nap"}"#);
    wait_for("the command to run", PATIENCE, || {
        daemon.workers().iter().any(|worker| worker.running == 1)
    });
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
    println!("port free {took:?} after the master's death, beside a command that runs");
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert!(process::state(children[0]).is_some(), "it still runs");
    kill(Pid::from_raw(children[0]), Signal::SIGKILL).unwrap();
    let answer = client.recv_json();
    assert_eq!(answer["result"]["data"]["signal"], "SIGKILL", "{answer}");
    daemon.wait_group_gone();
}
