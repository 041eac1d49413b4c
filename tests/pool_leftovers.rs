//! A pool's programs leave no process behind: not at a call's deadline, not when their worker or the
//! master is killed, not at a stop, however hard they try.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::support::{Daemon, Dir, PATIENCE, process, wait_for};

/// Forks twice with a session of its own, ignores what can be ignored, and keeps its calls' socket
/// open in each child; then it answers calls, but for one that never ends.
const HOSTILE: &str = r#"
import json, os, signal, socket, struct, sys, time
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

/// A daemon with that as a pool, and where the pids are written.
struct Setting {
    daemon: Daemon,
    pids: PathBuf,
    _dir: Dir,
}

fn setting(expect: &[&str]) -> Setting {
    let dir = Dir::new();
    let program = dir.write("hostile.py", HOSTILE);
    let pids = dir.join("pids");
    let config = format!(
        "[workers]\ncount = 1\n[pools.p]\ncommand = [\"python3\", {:?}, {:?}]\n\
         [methods.hang]\npool = \"p\"\ntimeout = \"1s\"\n[methods.pid]\npool = \"p\"\n",
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
    /// The five of the first program, once all have written their pids.
    fn started(&self) -> Vec<i32> {
        let mut pids: Vec<i32> = Vec::new();
        wait_for("five processes of one program", PATIENCE, || {
            let text = std::fs::read_to_string(&self.pids).unwrap_or_default();
            pids = text.lines().filter_map(|line| line.parse().ok()).collect();
            pids.len() >= 5
        });
        pids.truncate(5);
        pids
    }
}

/// Waits until none of them is left, not even as a zombie, and tells how long that took.
#[track_caller]
fn gone(pids: &[i32], what: &str) {
    let began = Instant::now();
    wait_for("the end of all processes of a program", PATIENCE, || {
        pids.iter().all(|&pid| process::state(pid).is_none())
    });
    let took = began.elapsed();
    println!("{what}: {} processes gone after {took:?}", pids.len());
    assert!(took < Duration::from_secs(1), "{what}: {took:?}");
}

#[test]
fn nothing_is_left_of_a_program_after_its_calls_deadline() {
    let setting = setting(&[]);
    let pids = setting.started();
    let mut client = setting.daemon.client();
    // what it has started lives with it, and is not taken for a leftover of a call
    for _ in 0..20 {
        let answer = client.call(&json!({"in": "pid"}));
        assert_eq!(answer["result"], pids[0], "{answer}");
    }
    let alive = pids.iter().filter(|&&pid| process::runs(pid)).count();
    assert_eq!(alive, 4, "all but the one that has left by itself");
    let answer = client.call(&json!({"in": "hang"}));
    assert_eq!(answer["result"]["name"], "timeout", "{answer}");
    gone(&pids, "deadline");
    let answer = client.call(&json!({"in": "pid"}));
    assert_ne!(answer["result"], pids[0], "{answer}");
}

#[test]
fn nothing_is_left_of_a_program_when_its_worker_is_killed() {
    let setting = setting(&["SIGKILL"]);
    let pids = setting.started();
    let worker = setting.daemon.ready_workers()[0];
    kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
    gone(&pids, "worker killed");
    wait_for("a fresh worker and no zombie", PATIENCE, || {
        let now = setting.daemon.ready_workers();
        now.len() == 1 && now[0] != worker && process::zombies(setting.daemon.pid()).is_empty()
    });
    // whose program is not taken for a leftover
    let answer = setting.daemon.client().call(&json!({"in": "pid"}));
    assert_eq!(answer["out"], "pid", "{answer}");
}

#[test]
fn nothing_is_left_of_a_program_after_the_masters_death() {
    let mut setting = setting(&["the master has died"]);
    let pids = setting.started();
    setting.daemon.signal(Signal::SIGKILL);
    setting.daemon.wait_exit();
    gone(&pids, "master killed");
    setting.daemon.wait_group_gone();
}

#[test]
fn nothing_is_left_of_a_program_after_a_quit_and_a_stop() {
    let mut setting = setting(&["left unasked"]);
    let pids = setting.started();
    let worker = setting.daemon.ready_workers()[0];
    kill(Pid::from_raw(worker), Signal::SIGQUIT).unwrap();
    gone(&pids, "worker quits");
    wait_for("a fresh worker", PATIENCE, || {
        let now = setting.daemon.ready_workers();
        now.len() == 1 && now[0] != worker
    });
    let text = || std::fs::read_to_string(&setting.pids).unwrap();
    wait_for("its program", PATIENCE, || text().lines().count() >= 10);
    let pids: Vec<i32> = text()
        .lines()
        .filter_map(|line| line.parse().ok())
        .collect();
    setting.daemon.signal(Signal::SIGTERM);
    assert!(setting.daemon.wait_exit().success());
    gone(&pids, "stopped");
    setting.daemon.wait_group_gone();
}
