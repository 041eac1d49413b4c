//! Checks listeners with a process for each connection.

mod bars;
mod deaths;
mod examples;
mod handovers;
mod hostile;
mod orphans;
mod programs;
mod sessions;
mod shortages;
mod sources;
mod takeovers;

use serde_json::{Value, json};

use crate::support::{Builder, Client, Daemon, PATIENCE, process, wait_for};

const METHODS: &str = "[methods.sleep]\nbuiltin = \"sleep\"\n";

/// Builds a daemon with `tables`, and a listener with a process for each connection that has `more` keys.
fn builder(tables: &str, more: &str) -> Builder {
    let config = format!("{METHODS}[workers]\ncount = 1\n{tables}");
    let listen = format!("isolation = \"connection\"\n{more}");
    Daemon::builder().config(&config).listen(&listen)
}

/// Starts a daemon with an isolated listener and no further tables. `more` is added to the listener.
fn isolated(more: &str) -> Daemon {
    builder("", more).start()
}

/// Returns the acceptor of a daemon.
#[track_caller]
fn acceptor(daemon: &Daemon) -> i32 {
    let children = process::children(daemon.pid());
    let is_one = |pid: &&i32| process::title(**pid).starts_with("preforkd: acceptor ");
    *children.iter().find(is_one).unwrap()
}

/// Returns the process of a client's connection.
#[track_caller]
fn session_of(client: &Client) -> i32 {
    let title = format!("connection {}", client.stream().local_addr().unwrap());
    let mut found = None;
    wait_for(&title, PATIENCE, || {
        let all = std::fs::read_dir("/proc").unwrap();
        let mut pids = all.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
        found = pids.find(|&pid: &i32| process::title(pid).ends_with(&title));
        found.is_some()
    });
    found.unwrap()
}

/// Checks that a client's connection works.
#[track_caller]
fn ping(client: &mut Client) {
    assert_eq!(client.call(&json!({"in": "ping"}))["out"], "pong");
}

/// Waits until a call runs in the process of a connection.
#[track_caller]
fn wait_running(daemon: &Daemon, session: i32) {
    wait_for("the running call", PATIENCE, || {
        let list = status(daemon)["list"].clone();
        let list = list.as_array().cloned().unwrap_or_default();
        let runs = |it: &Value| it["pid"] == session && it["running"] == 1;
        list.iter().any(runs)
    });
}

/// Returns the first acceptor in the status.
fn status(daemon: &Daemon) -> Value {
    daemon.status()["isolated"][0].clone()
}
