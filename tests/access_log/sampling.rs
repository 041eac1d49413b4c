//! Which calls have a line, and how that changes at a reload.

use std::time::Duration;

use serde_json::json;

use super::{CONFIG, calls, lines_of, lost, reload, wait_lines, written};
use crate::support::{Client, Daemon, PATIENCE, pass, wait_for};

fn with(keys: &str) -> String {
    CONFIG.replace(
        "file = \"access.log\"",
        &format!("file = \"access.log\"\n{keys}"),
    )
}

fn ping(client: &mut Client, count: usize) {
    for _ in 0..count {
        client.call(&json!({"in": "ping"}));
    }
}

#[test]
fn without_the_table_there_is_no_line_and_nothing_is_counted() {
    let daemon = Daemon::start();
    ping(&mut daemon.client(), 5);
    wait_for("the calls", PATIENCE, || calls(&daemon) == 5);
    assert_eq!((written(&daemon), lost(&daemon)), (0, 0));
    assert!(!daemon.dir().join("access.log").exists());
}

#[test]
fn errors_and_slow_calls_have_a_line_although_no_call_is_sampled() {
    let daemon = Daemon::builder()
        .config(&with("sample = 0.0\nalways-above = \"100ms\""))
        .start();
    let mut client = daemon.client();
    ping(&mut client, 50);
    client.call(&json!({"in": "none"}));
    client.call(&json!({"in": "sleep", "params": 0}));
    client.call(&json!({"in": "sleep", "params": 0.2}));
    let lines = wait_lines(&daemon, 2);
    assert_eq!(lines[0]["method"], "none");
    assert_eq!(lines[1]["method"], "sleep");
    assert_eq!((written(&daemon), lost(&daemon)), (2, 0));
}

#[test]
fn a_share_of_the_calls_and_only_listed_methods_have_a_line() {
    let daemon = Daemon::builder()
        .config(&with("sample = 0.5\nmethods = [\"ping\"]"))
        .start();
    let mut client = daemon.client();
    ping(&mut client, 400);
    client.call(&json!({"in": "none"}));
    wait_for("the calls", PATIENCE, || calls(&daemon) == 401);
    wait_for("lines, and no more of them", PATIENCE, || {
        let before = written(&daemon);
        pass(Duration::from_millis(200));
        before >= 120 && written(&daemon) == before
    });
    let lines = lines_of(&daemon, "access.log");
    assert!((120..280).contains(&lines.len()), "{} lines", lines.len());
    assert!(lines.iter().all(|line| line["method"] == "ping"));
    // A worker that dies has left out no line that was due.
    drop(client);
    daemon.reload();
    assert_eq!(lost(&daemon), 0);
}

#[test]
fn a_reload_begins_moves_and_ends_the_log() {
    let without = CONFIG.replace("[access-log]\nfile = \"access.log\"\n", "");
    let daemon = Daemon::builder().config(&without).start();
    ping(&mut daemon.client(), 3);
    reload(&daemon, CONFIG);
    ping(&mut daemon.client(), 4);
    wait_lines(&daemon, 4);
    reload(&daemon, &CONFIG.replace("access.log", "other.log"));
    ping(&mut daemon.client(), 5);
    wait_for("lines in the other file", PATIENCE, || {
        lines_of(&daemon, "other.log").len() == 5
    });
    reload(&daemon, &without);
    ping(&mut daemon.client(), 6);
    wait_for("the calls", PATIENCE, || calls(&daemon) == 18);
    assert_eq!((written(&daemon), lost(&daemon)), (9, 0));
    wait_lines(&daemon, 4);
}
