//! Tests the observer: what it answers, whom it refuses, and its life beside workers and master.

mod faults;
mod foreground;
mod hostile;
mod life;
mod page;
mod pages;
mod top;

use std::net::SocketAddr;

use crate::support::wire::{Response, Wire};
use crate::support::{Builder, Daemon, PATIENCE, process, wait_for};

/// Workers and an observer on a free port.
const CONFIG: &str = "[workers]\ncount = 2\n[observe]\naddress = \"127.0.0.1:0\"\n";

fn builder() -> Builder {
    Daemon::builder().config(CONFIG)
}

/// Returns the address and the pid of the observer that the status names.
fn observer(daemon: &Daemon) -> Option<(SocketAddr, i32)> {
    let status = daemon.status();
    let observer = &status["master"]["observer"];
    let pid = i32::try_from(observer["pid"].as_i64()?).ok()?;
    Some((observer["address"].as_str()?.parse().unwrap(), pid))
}

/// Returns the address of the observer.
#[track_caller]
fn address(daemon: &Daemon) -> SocketAddr {
    observer(daemon).expect("there is an observer").0
}

/// Returns the processes whose title is that of an observer.
fn observers(master: i32) -> Vec<i32> {
    let mut children = process::children(master);
    children.retain(|&pid| process::title(pid).ends_with(": observer"));
    children
}

/// Waits until there is one observer, and another one than `before`. Returns its pid.
#[track_caller]
fn wait_replaced(daemon: &Daemon, before: i32) -> i32 {
    let mut found = None;
    wait_for("another observer, alone", PATIENCE, || {
        let all = observers(daemon.pid());
        found = observer(daemon).map(|(_, pid)| pid);
        found.is_some_and(|pid| pid != before && all == [pid])
    });
    found.unwrap()
}

/// Sends a request for a page, with a `Host` that is accepted.
fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n")
}

/// Gets a page over a connection of its own.
#[track_caller]
fn page(address: SocketAddr, path: &str) -> Response {
    Wire::open(address).send(get(path)).response()
}

/// Returns the value of a series in the metrics.
#[track_caller]
fn series(address: SocketAddr, name: &str) -> Option<String> {
    let text = page(address, "/metrics").body;
    let value = |line: &str| Some(line.strip_prefix(name)?.strip_prefix(' ')?.to_owned());
    text.lines().find_map(value)
}
