//! Tests that pool programs leave no process behind: at a call's deadline, when their worker or the
//! master is killed, at a stop, even if they try hard.

use nix::sys::signal::Signal;
use serde_json::json;

use crate::support::leftover_check::{Hostile, gone};
use crate::support::{PATIENCE, process, wait_for};

/// Answers calls, except one that never ends.
const REST: &str = r#"
import json, socket, struct
calls = socket.socket(fileno=3)
while True:
    try:
        header = calls.recv(4)
        if not header:
            time.sleep(3600)  # told to leave, and does not
        call = json.loads(calls.recv(struct.unpack("<I", header)[0]).decode())
    except (OSError, ValueError):
        continue
    if call["in"] == "hang":
        time.sleep(3600)
    body = json.dumps({"out": call["in"], "result": os.getpid()}).encode()
    calls.sendall(struct.pack("<I", len(body)) + body)
"#;

/// Starts a daemon with this program as a pool.
fn hostile(expect: &[&str]) -> Hostile {
    let config = |command: &str| {
        format!(
            "[pools.p]\nprocesses = 1\ncommand = [{command}]\nready = \"alive\"\n\
             [methods.hang]\npool = \"p\"\ntimeout = \"1s\"\n[methods.pid]\npool = \"p\"\n"
        )
    };
    Hostile::start(REST, config, expect)
}

#[test]
fn nothing_is_left_of_a_program_after_its_calls_deadline() {
    let setting = hostile(&[]);
    let pids = setting.started(1);
    let mut client = setting.daemon.client();
    // Processes that it has started live with it, and are not taken for leftovers of a call.
    for _ in 0..20 {
        let answer = client.call(&json!({"in": "pid"}));
        assert_eq!(answer["result"], pids[0], "{answer}");
    }
    wait_for("the one that leaves by itself", PATIENCE, || {
        pids.iter().filter(|&&pid| process::runs(pid)).count() <= 4
    });
    let alive = pids.iter().filter(|&&pid| process::runs(pid)).count();
    assert_eq!(alive, 4, "all but that one");
    let answer = client.call(&json!({"in": "hang"}));
    assert_eq!(answer["result"]["name"], "timeout", "{answer}");
    gone(&pids, "deadline");
    let answer = client.call(&json!({"in": "pid"}));
    assert_ne!(answer["result"], pids[0], "{answer}");
}

#[test]
fn nothing_is_left_of_a_program_when_its_pool_process_is_killed() {
    let setting = hostile(&["SIGKILL"]);
    let pids = setting.started(1);
    setting.end_pool(Signal::SIGKILL, &pids, "pool process killed");
    // Its program is not taken for a leftover.
    let answer = setting.daemon.client().call(&json!({"in": "pid"}));
    assert_eq!(answer["out"], "pid", "{answer}");
}

#[test]
fn nothing_is_left_of_a_program_after_the_masters_death() {
    let mut setting = hostile(&["the master has died"]);
    let pids = setting.started(1);
    setting.daemon.signal(Signal::SIGKILL);
    setting.daemon.wait_exit();
    gone(&pids, "master killed");
    setting.daemon.wait_group_gone();
}

#[test]
fn nothing_is_left_of_a_program_after_a_quit_and_a_stop() {
    let mut setting = hostile(&["exited without an order"]);
    let pids = setting.started(1);
    setting.end_pool(Signal::SIGQUIT, &pids, "pool process quits");
    let pids = setting.started(2);
    setting.daemon.signal(Signal::SIGTERM);
    assert!(setting.daemon.wait_exit().success());
    gone(&pids, "stopped");
    setting.daemon.wait_group_gone();
}
