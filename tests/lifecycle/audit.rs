//! Tests that each control request leaves a log line that says who sent it and how it ended.

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use nix::unistd::geteuid;

use crate::support::{Daemon, PATIENCE, control, wait_for};

const CONFIG: &str = "[log]\nlevel = \"debug\"\n[workers]\ncount = 1\n";

/// Returns the audit lines of a command with a result.
fn lines(daemon: &Daemon, command: &str, result: &str) -> Vec<String> {
    let fields = format!(" command={command} result={result} uid=");
    let log = daemon.log();
    let lines = log.lines().filter(|line| line.contains(&fields));
    lines.map(str::to_owned).collect()
}

/// Waits for the only line of a command with a result, and compares what does not change.
#[track_caller]
fn expect(daemon: &Daemon, level: &str, text: &str, command: &str, result: &str) {
    wait_for(&format!("{command} {result}"), PATIENCE, || {
        !lines(daemon, command, result).is_empty()
    });
    let lines = lines(daemon, command, result);
    assert_eq!(lines.len(), 1, "{lines:?}");
    let comm = fs::read_to_string("/proc/self/comm").unwrap();
    let who = format!(
        "{text} command={command} result={result} uid={} pid={} comm=\"{}\" took_ms=",
        geteuid(),
        std::process::id(),
        comm.trim_end()
    );
    assert!(lines[0].contains(&who), "{who}: {lines:?}");
    assert!(
        lines[0].to_lowercase().contains(level),
        "{level}: {lines:?}"
    );
}

#[test]
fn each_control_request_leaves_a_line_that_says_who_sent_it_and_how_it_ended() {
    let mut daemon = Daemon::builder()
        .config(CONFIG)
        .expect_log("refused")
        .start();
    let socket = daemon.dir().join("control.sock");
    let ask = |request: &str| control::ask(&socket, request);
    ask(r#"{"command":"scale","count":2}"#);
    expect(&daemon, "info", "control scale done", "scale", "done");
    ask(r#"{"command":"scale","count":0}"#);
    let reason = "control scale refused: 0 workers: the number must be 1 to 1024";
    expect(&daemon, "warn", reason, "scale", "refused");
    ask(r#"{"command":"reload","config":"/elsewhere"}"#);
    let reason = "control reload refused: this server reads";
    wait_for("the refused reload", PATIENCE, || {
        lines(&daemon, "reload", "refused")
            .iter()
            .any(|line| line.contains(reason))
    });
    ask(r#"{"command":"upgrade","config":"/elsewhere"}"#);
    wait_for("the refused upgrade", PATIENCE, || {
        !lines(&daemon, "upgrade", "refused").is_empty()
    });
    ask(r#"{"command":"reload"}"#);
    expect(&daemon, "info", "control reload done", "reload", "done");
    // The next program answers, and knows who had asked the one before.
    ask(r#"{"command":"upgrade"}"#);
    expect(&daemon, "info", "control upgrade done", "upgrade", "done");
    ask(r#"{"command":"stop","after_ms":86400001}"#);
    let reason = "control stop refused: the delay is longer than a day; give 1d at most";
    expect(&daemon, "warn", reason, "stop", "refused");
    let took = |line: &str| -> u64 { line.rsplit_once('=').unwrap().1.parse().unwrap() };
    let reload = lines(&daemon, "reload", "done");
    assert!(took(&reload[0]) < 60_000, "{reload:?}");
    control::status(&socket);
    let status = lines(&daemon, "status", "done");
    assert!(!status.is_empty());
    let is_debug = |line: &String| line.to_lowercase().contains("debug");
    assert!(status.iter().all(is_debug), "{status:?}");
    ask(r#"{"command":"stop"}"#);
    assert!(daemon.wait_exit().success());
    expect(&daemon, "info", "control stop done", "stop", "done");
}

#[test]
fn a_malformed_and_a_long_request_leave_a_line_each() {
    let daemon = Daemon::builder()
        .config(CONFIG)
        .expect_log("refused")
        .start();
    let socket = daemon.dir().join("control.sock");
    control::ask(&socket, "{\"command\":\"\u{1b}[2J\"}");
    let text = "control request refused: \"this master does not know the command";
    wait_for("the malformed request", PATIENCE, || {
        lines(&daemon, "unknown", "refused").len() == 1
    });
    let line = lines(&daemon, "unknown", "refused").remove(0);
    assert!(line.contains(text) && !line.contains('\u{1b}'), "{line}");
    // What looks like fields stays in quotes.
    control::ask(&socket, r#"{"command":"x\" uid=77 comm=\"y"}"#);
    wait_for("the forged request", PATIENCE, || {
        lines(&daemon, "unknown", "refused").len() == 2
    });
    let line = lines(&daemon, "unknown", "refused").remove(1);
    assert!(line.contains(r#"`x\" uid=77 comm=\"y`"#), "{line}");
    let mut stream = control::connect(&socket);
    stream.write_all(&[b' '; 200_000]).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(
        answer.contains("the request is longer than 16384 bytes"),
        "{answer}"
    );
    wait_for("the long request", PATIENCE, || {
        let lines = lines(&daemon, "unknown", "refused");
        lines
            .iter()
            .any(|line| line.contains("the request is longer than 16384 bytes"))
    });
}

#[test]
fn a_python_program_of_another_user_leaves_a_line_with_that_user() {
    if !geteuid().is_root() {
        return;
    }
    let daemon = Daemon::builder()
        .config(CONFIG)
        .expect_log("refused")
        .start();
    let socket = daemon.dir().join("control.sock");
    let open = |path: &Path| fs::set_permissions(path, Permissions::from_mode(0o777)).unwrap();
    open(&socket);
    let mut outer: Vec<&Path> = socket.ancestors().skip(1).collect();
    outer.retain(|path| path.starts_with(std::env::temp_dir()) && *path != std::env::temp_dir());
    outer.into_iter().for_each(open);
    // The name of the process is made of what could end the quotes or the line.
    let connect = "import os, socket, sys; open('/proc/self/comm', 'w').write('a\"b\\nc'); \
         os.setgid(65534); os.setuid(65534); \
         s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.recv(1)";
    let mut python = Command::new("python3");
    let mut child = python.args(["-c", connect]).arg(&socket).spawn().unwrap();
    let pid = child.id();
    child.wait().unwrap();
    let line = format!("uid=65534 pid={pid} comm=\"a\\\"b\\nc\" took_ms=0");
    daemon.wait_log(&line);
    assert_eq!(lines(&daemon, "unknown", "refused").len(), 1);
}
