//! Tests `preforkd observe`: the same pages, from a process in the foreground.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::page;
use crate::support::Daemon;

#[test]
fn a_server_without_an_observer_is_observed_from_the_foreground() {
    let daemon = Daemon::start();
    daemon.client().call(&json!({"in": "ping"}));
    let mut command = daemon.asking(&["observe", "--address", "127.0.0.1:0"]);
    let mut observe = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    let mut out = BufReader::new(observe.stdout.take().unwrap());
    out.read_line(&mut line).unwrap();
    let address = line.trim().trim_start_matches("http://");
    let address: SocketAddr = address.trim_end_matches('/').parse().unwrap();
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
fn without_a_server_the_command_says_so() {
    let mut daemon = Daemon::start();
    daemon.signal(Signal::SIGTERM);
    daemon.wait_exit();
    let output = daemon.command(&["observe", "--address", "127.0.0.1:0"]);
    assert_eq!(output.status.code(), Some(69), "{output:?}");
    let output = daemon.command(&["observe", "--address", "localhost:1"]);
    assert_eq!(output.status.code(), Some(64), "{output:?}");
}
