//! Tests the slow log: what it says of a call that hangs, when, and how often.

mod limits;
mod programs;
mod records;
mod stalls;

use serde_json::{Value, json};

use crate::support::{Client, Daemon, PATIENCE, wait_for};

/// Returns the records of `preforkd slow --json`, oldest first.
fn records(daemon: &Daemon) -> Vec<Value> {
    let output = daemon.command(&["slow", "--json"]);
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Waits for a record of a method for which `is_wanted` holds, and returns it.
#[track_caller]
fn record(daemon: &Daemon, method: &str, is_wanted: impl Fn(&Value) -> bool) -> Value {
    let mut found = None;
    let is_there = |record: &Value| record["method"] == method && is_wanted(record);
    wait_for("the record of a slow call", PATIENCE, || {
        found = records(daemon).into_iter().rfind(is_there);
        found.is_some()
    });
    found.unwrap()
}

#[track_caller]
fn evidence(daemon: &Daemon, method: &str) -> String {
    let record = record(daemon, method, |_| true);
    record["evidence"].as_str().unwrap().to_owned()
}

/// Sends a call and does not wait for its answer.
fn send(daemon: &Daemon, method: &str, params: &Value) -> Client {
    let mut client = daemon.client();
    client.send(&json!({"in": method, "params": params}).to_string());
    client
}

/// Returns the JSON lines of the log with this event.
fn events(daemon: &Daemon, event: &str) -> Vec<Value> {
    let log = daemon.log();
    let lines = log.lines().filter(|line| line.starts_with('{'));
    let lines = lines.map(|line| serde_json::from_str(line).unwrap());
    lines
        .filter(|line: &Value| line["event"] == event)
        .collect()
}

/// Returns `slow_calls_total` of a method.
fn slow_calls(daemon: &Daemon, method: &str) -> u64 {
    let status = daemon.command(&["status", "--json"]);
    let status: Value = serde_json::from_slice(&status.stdout).unwrap();
    let mut methods = status["methods"].as_array().unwrap().iter();
    let method = methods.find(|it| it["name"] == method);
    method.and_then(|it| it["slow"].as_u64()).unwrap()
}
