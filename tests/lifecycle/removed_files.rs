//! Tests sockets and the pid file whose files were removed or replaced: a reload detects and repairs
//! that.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::support::{Client, Daemon, binary, control};

const PING: &str = r#"{"in": "ping"}"#;

/// Starts a daemon that also listens at `rpc.sock`.
fn daemon() -> Daemon {
    let daemon = Daemon::builder().config("[workers]\ncount = 2\n").start();
    daemon.configure(&format!(
        "[workers]\ncount = 2\n[[listen]]\naddress = \"{}\"\n\
         [[listen]]\naddress = \"unix:rpc.sock\"\nmode = \"0640\"\n",
        daemon.address()
    ));
    let done = daemon.command(&["reload"]);
    assert!(done.status.success(), "{done:?}");
    daemon
}

/// Receives one answer of the control socket.
fn status(stream: &mut UnixStream) -> Value {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
}

#[test]
fn sockets_that_were_removed_are_made_again_at_a_reload_and_nobody_is_lost() {
    let daemon = daemon();
    let rpc = daemon.dir().join("rpc.sock");
    let own = daemon.dir().join("control.sock");
    let mut lasting = Client::connect_unix(&rpc);
    lasting.call_text(PING);
    let mut commands = vec![control::connect(&own)];
    let all_pids = daemon.ready_workers();
    let all = |signal| {
        for &pid in &all_pids {
            kill(Pid::from_raw(pid), signal).unwrap();
        }
    };
    // No worker accepts, so a new client waits in the old queues.
    all(Signal::SIGSTOP);
    daemon.signal(Signal::SIGSTOP);
    let mut waiting: Vec<Client> = (0..5).map(|_| Client::connect_unix(&rpc)).collect();
    waiting.iter_mut().for_each(|client| client.send(PING));
    commands.extend((0..5).map(|_| control::connect(&own)));
    for command in &mut commands {
        command.write_all(control::STATUS).unwrap();
    }
    for path in [&rpc, &own] {
        fs::remove_file(path).unwrap();
    }
    daemon.signal(Signal::SIGHUP);
    daemon.signal(Signal::SIGCONT);
    daemon.wait_log("generation 3 serves");
    for command in &mut commands {
        let answer = status(command);
        assert_eq!(answer["ok"], true, "{answer}");
    }
    let mut late = Client::connect_unix(&rpc);
    assert_eq!(late.call(&json!({"in": "ping"}))["out"], "pong");
    all(Signal::SIGCONT);
    lasting.send(PING);
    for client in waiting.iter_mut().chain([&mut lasting]) {
        assert_eq!(client.recv_json()["out"], "pong");
    }
    assert_eq!(daemon.status()["master"]["generation"], 3);
    let log = daemon.log();
    for path in ["rpc.sock", "control.sock"] {
        let told = |line: &str| line.contains("was removed: recreated it") && line.contains(path);
        assert!(log.lines().any(told), "{path}: {log}");
    }
    let mode = |path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&rpc), mode(&own)), (0o640, 0o600));
    // Existing files are kept: the next reload creates none.
    let again = daemon.command(&["reload"]);
    assert!(again.status.success(), "{again:?}");
    assert_eq!(daemon.log().matches("was removed: recreated it").count(), 2);
}

#[test]
fn what_somebody_else_has_put_in_a_sockets_place_is_left_alone_and_named() {
    let daemon = daemon();
    let paths = ["rpc.sock", "control.sock"].map(|name| daemon.dir().join(name));
    let mut lasting = Client::connect_unix(&paths[0]);
    for path in &paths {
        fs::remove_file(path).unwrap();
        fs::write(path, "precious").unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o604)).unwrap();
    }
    daemon.signal(Signal::SIGHUP);
    daemon.wait_log("generation 3 serves");
    let log = daemon.log();
    for path in &paths {
        assert_eq!(fs::read_to_string(path).unwrap(), "precious");
        assert_eq!(
            fs::metadata(path).unwrap().permissions().mode() & 0o777,
            0o604
        );
        let name = path.file_name().unwrap().to_str().unwrap();
        let told = |line: &str| line.contains("there is another file at") && line.contains(name);
        assert!(log.lines().any(told), "{name}: {log}");
    }
    assert_eq!(lasting.call(&json!({"in": "ping"}))["out"], "pong");
    for path in &paths {
        fs::remove_file(path).unwrap();
    }
    daemon.signal(Signal::SIGHUP);
    daemon.wait_log("generation 4 serves");
    for path in &paths {
        assert!(fs::metadata(path).unwrap().file_type().is_socket());
    }
    assert_eq!(daemon.status()["master"]["generation"], 4);
    let mut late = Client::connect_unix(&paths[0]);
    assert_eq!(late.call(&json!({"in": "ping"}))["out"], "pong");
}

#[test]
fn a_pid_file_that_was_removed_is_made_again_at_a_reload_with_its_lock() {
    let daemon = Daemon::builder().config("[workers]\ncount = 1\n").start();
    let path = daemon.dir().join("preforkd.pid");
    let before = fs::read_to_string(&path).unwrap();
    fs::remove_file(&path).unwrap();
    let done = daemon.command(&["reload"]);
    assert!(done.status.success(), "{done:?}");
    assert_eq!(fs::read_to_string(&path).unwrap(), before);
    assert!(daemon.log().contains("was removed: recreated it"));
    let assert_locked = || {
        let second = Command::new("timeout")
            .arg("10")
            .arg(binary())
            .args(["run", "--config"])
            .arg(daemon.dir().join("preforkd.toml"))
            .output()
            .unwrap();
        assert_eq!(second.status.code(), Some(71), "{second:?}");
        let said = String::from_utf8_lossy(&second.stderr);
        assert!(said.contains("preforkd.pid"), "{said}");
    };
    assert_locked();
    let done = daemon.command(&["upgrade"]);
    assert!(done.status.success(), "{done:?}");
    assert_locked();
    // A file of another process is left alone.
    fs::remove_file(&path).unwrap();
    fs::write(&path, "precious").unwrap();
    let done = daemon.command(&["reload"]);
    assert!(done.status.success(), "{done:?}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    assert!(daemon.log().contains("where the pid file was"));
}
