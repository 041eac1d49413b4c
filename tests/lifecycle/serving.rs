//! Tests the main case once: the server starts, answers, replaces a worker, reloads, and stops without
//! cutting a running call.

use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::support::{Daemon, Dir, PATIENCE, check, process, wait_for};

const WITH_SLEEP: &str = "
[workers]
count = 2
[methods.sleep]
builtin = \"sleep\"
";

#[test]
fn a_call_is_answered() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    assert_eq!(
        client.call_text(r#"{"in": "ping", "params": "hello"}"#),
        r#"{"out":"pong","result":"hello"}"#
    );
    let answer = client.call(&json!({"in": "nope", "id": 7}));
    assert_eq!(answer["id"], 7);
    assert_eq!(answer["result"]["code"], -32601);
    assert_eq!(answer["result"]["started"], false);
}

/// The shape of the protocol's first clients: two sends for length and body, one recv.
#[test]
fn ten_lines_of_python_get_their_ten_pongs() {
    let daemon = Daemon::start();
    let dir = Dir::new();
    let program = dir.write(
        "client.py",
        r#"
import json, socket, struct, sys
s = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
for i in range(10):
    body = json.dumps({"in": "ping", "params": "ireader %d" % i}).encode()
    s.sendall(struct.pack("I", len(body)))
    s.sendall(body)
    length, = struct.unpack("I", s.recv(4))
    answer = json.loads(s.recv(length))
    print(answer["out"], answer["result"])
s.close()
"#,
    );
    let port = daemon.address().port().to_string();
    let output = Command::new("python3")
        .arg(program)
        .arg(port)
        .output()
        .unwrap();
    let expected: String = (0..10).map(|i| format!("pong ireader {i}\n")).collect();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        expected,
        "{output:?}"
    );
}

#[test]
fn a_killed_worker_is_replaced_in_its_slot() {
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 2\n")
        .expect_log("SIGKILL")
        .start();
    let before = daemon.ready_workers();
    assert_eq!(before.len(), 2);
    kill(Pid::from_raw(before[1]), Signal::SIGKILL).unwrap();
    wait_for("a fresh worker in slot 1", PATIENCE, || {
        let now = daemon.ready_workers();
        now.len() == 2 && now[0] == before[0] && now[1] != before[1]
    });
    let deaths = daemon.status()["deaths"].take();
    assert_eq!(deaths[0]["pid"], before[1], "{deaths}");
    assert_eq!(deaths[0]["signal"], "SIGKILL", "{deaths}");
    process::wait_for_no_zombies(daemon.pid());
}

#[test]
fn stopping_answers_the_running_call_first() {
    let mut daemon = Daemon::builder().config(WITH_SLEEP).start();
    let mut client = daemon.client();
    client.send(r#"{"in": "sleep", "params": 3}"#);
    daemon.wait_running(1);
    daemon.signal(Signal::SIGTERM);
    let answer = client.recv_json();
    assert_eq!(answer["out"], "sleep", "{answer}");
    client.assert_closed();
    assert!(daemon.wait_exit().success());
    daemon.wait_group_gone();
}

#[test]
fn reload_with_a_bad_config_keeps_serving() {
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 2\n")
        .expect_log("thread")
        .start();
    let before = daemon.ready_workers();
    daemon.configure("[workers]\ncount = 2\nthread = 4\n");
    let refused = daemon.command(&["reload"]);
    let reason = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success(), "{reason}");
    assert!(
        reason.contains("threads"),
        "the nearest key is named: {reason}"
    );
    assert_eq!(daemon.ready_workers(), before);
    assert_eq!(
        daemon.client().call(&json!({"in": "ping", "params": 1}))["result"],
        1
    );

    daemon.configure("[workers]\ncount = 3\n");
    let accepted = daemon.command(&["reload"]);
    assert!(accepted.status.success(), "{accepted:?}");
    assert_eq!(daemon.ready_workers().len(), 3);
}

#[test]
fn a_start_that_fails_says_why_and_ends_with_its_code() {
    let failure = Daemon::builder()
        .config("color = 1\n")
        .try_start()
        .err()
        .unwrap();
    assert_eq!(failure.code, Some(78), "{failure:?}");
    assert!(failure.log.contains("preforkd.toml:3:1"), "{failure:?}");
}

#[test]
fn every_shipped_configuration_is_accepted() {
    let mut checked = 0;
    for entry in std::fs::read_dir(crate::support::source().join("config")).unwrap() {
        let path = entry.unwrap().path();
        // Directories have files for other programs.
        if path.is_dir() {
            continue;
        }
        let output = check(&path);
        assert!(output.status.success(), "{}: {output:?}", path.display());
        checked += 1;
    }
    assert!(checked > 0, "config/ is empty");
}
