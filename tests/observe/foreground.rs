//! Tests `preforkd observe`: the same pages, from a process in the foreground.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::page;
use crate::support::{Daemon, PATIENCE, wait_for};

/// Starts an observer in the foreground. Returns it with its address.
fn observe(daemon: &Daemon) -> (Child, SocketAddr) {
    let mut command = daemon.asking(&["observe", "--address", "127.0.0.1:0"]);
    let mut observe = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    let mut out = BufReader::new(observe.stdout.take().unwrap());
    out.read_line(&mut line).unwrap();
    let address = line.trim().trim_start_matches("http://");
    let address = address.trim_end_matches('/').parse().unwrap();
    (observe, address)
}

#[test]
fn a_server_without_an_observer_is_observed_from_the_foreground() {
    let daemon = Daemon::start();
    daemon.client().call(&json!({"in": "ping"}));
    let (mut observe, address) = observe(&daemon);
    for path in ["/", "/healthz", "/status.json"] {
        assert_eq!(page(address, path).status, 200, "{path}");
    }
    let metrics = page(address, "/metrics").body;
    assert!(
        metrics.contains("preforkd_master_responding 1\n"),
        "{metrics}"
    );
    assert!(
        metrics.contains("preforkd_calls_total{method=\"ping\"} 1\n"),
        "{metrics}"
    );
    kill(Pid::from_raw(observe.id().cast_signed()), Signal::SIGTERM).unwrap();
    assert!(observe.wait().unwrap().success());
}

#[test]
fn a_foreground_observer_shows_the_counters_of_a_restarted_server() {
    let mut daemon = Daemon::start();
    let mut client = daemon.client();
    (0..3).for_each(|_| drop(client.call(&json!({"in": "ping"}))));
    let (mut observe, address) = observe(&daemon);
    let calls = || {
        let text = page(address, "/metrics").body;
        let prefix = "preforkd_calls_total{method=\"ping\"} ";
        let mut lines = text.lines();
        lines.find_map(|line| Some(line.strip_prefix(prefix)?.to_owned()))
    };
    assert_eq!(calls().as_deref(), Some("3"));
    daemon.signal(Signal::SIGTERM);
    daemon.wait_exit();
    let daemon = daemon.start_again();
    daemon.client().call(&json!({"in": "ping"}));
    wait_for("the new counters", PATIENCE, || {
        calls().as_deref() == Some("1")
    });
    observe.kill().unwrap();
    observe.wait().unwrap();
}

#[test]
fn without_a_server_the_command_says_so() {
    let mut daemon = Daemon::start();
    daemon.signal(Signal::SIGTERM);
    daemon.wait_exit();
    let output = daemon.command(&["observe", "--address", "127.0.0.1:0"]);
    assert_eq!(output.status.code(), Some(69), "{output:?}");
    let output = daemon.command(&["observe", "--address", "localhost:1"]);
    assert_eq!(output.status.code(), Some(64), "{output:?}");
}
