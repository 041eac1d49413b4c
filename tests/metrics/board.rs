//! Checks what readers make of a board that is not as it should be.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::{assert_no_decrease, scrape, text, value, wait_value};
use crate::support::installed::{Installed, upgrade};
use crate::support::wire::Wire;
use crate::support::{Client, Daemon, PATIENCE, wait_for};

/// The bytes from one block to the next.
const STRIDE: u64 = 2 << 20;

/// Opens the board of a daemon for writing, as only its own user can.
#[track_caller]
fn board(daemon: &Daemon) -> File {
    let fds = format!("/proc/{}/fd", daemon.pid());
    let mut fds = fs::read_dir(fds)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let is_board = |path: &PathBuf| {
        let target = fs::read_link(path).unwrap_or_default();
        target.to_string_lossy().contains("preforkd-metrics")
    };
    let path = fds.find(is_board).unwrap();
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap()
}

fn garbage(length: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let bytes = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    });
    bytes.take(length).collect()
}

#[test]
fn garbage_in_a_block_harms_no_reader() {
    let daemon = Daemon::builder().config("[workers]\ncount = 1\n").start();
    let starts = value(&scrape(&daemon), "worker_starts_total");
    let board = board(&daemon);
    board
        .write_all_at(&garbage(STRIDE as usize - 4096), STRIDE)
        .unwrap();
    let seen = scrape(&daemon);
    assert_eq!(value(&seen, "worker_starts_total"), starts);
    daemon.client().call(&json!({"in": "ping"}));
    let done = daemon.command(&["status", "--json"]);
    assert!(done.status.success(), "{done:?}");
    daemon.reload();
    text(&daemon);
}

/// Returns the calls of all methods together, which are exact also among garbage.
#[track_caller]
fn calls(daemon: &Daemon) -> u64 {
    let done = daemon.command(&["status", "--json"]);
    let status: Value = serde_json::from_slice(&done.stdout).unwrap();
    status["totals"]["calls"].as_u64().unwrap()
}

/// Lets every command read. None may fail, and none may print what controls a terminal.
#[track_caller]
fn read_all(daemon: &Daemon) {
    for words in [
        &["metrics"][..],
        &["status"],
        &["status", "--json"],
        &["slow"],
        &["slow", "--json"],
        &["top", "--once", "--interval", "100ms"],
        &["top", "--once", "--json", "--interval", "100ms"],
    ] {
        let done = daemon.command(words);
        assert!(done.status.success(), "{words:?}: {done:?}");
        let text = String::from_utf8(done.stdout).unwrap();
        if words.contains(&"--json") {
            serde_json::from_str::<Value>(&text).unwrap();
            continue;
        }
        let is_harmless = |c: char| "\n\t".contains(c) || !c.is_control();
        assert!(text.chars().all(is_harmless), "{words:?}: {text:?}");
    }
}

/// Gets every page of the observer, and returns the history.
#[track_caller]
fn read_pages(daemon: &Daemon) -> Value {
    let status = daemon.status();
    let address = status["master"]["observer"]["address"].as_str().unwrap();
    let get = |path: &str| {
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
        let answer = Wire::open(address.parse().unwrap())
            .send(request)
            .response();
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
        answer
    };
    for path in ["/", "/metrics", "/healthz"] {
        get(path);
    }
    get("/status.json").json();
    get("/history.json").json()
}

#[test]
fn garbage_of_a_worker_a_pool_process_or_a_session_harms_no_reader_and_no_other_block() {
    let config = "[workers]\ncount = 1\n[observe]\naddress = \"127.0.0.1:0\"\n[slow-log]\nthreshold = \"1s\"\n\
        [pools.cat]\nprocesses = 1\ncommand = [\"/bin/sleep\", \"1000\"]\nready = \"alive\"\n[methods.cat]\npool = \"cat\"\n\
        [[listen]]\naddress = \"127.0.0.1:0\"\n\
        [[listen]]\naddress = \"127.0.0.2:0\"\nisolation = \"connection\"\n";
    let daemon = Daemon::builder().config(config).start();
    let status = daemon.status();
    let at = |index: usize| {
        let address = status["listeners"][index]["address"].as_str().unwrap();
        Client::connect(address.parse().unwrap())
    };
    let (mut shared, mut isolated) = (at(0), at(1));
    let ping = |client: &mut Client, count: usize| {
        for _ in 0..count {
            assert_eq!(client.call(&json!({"in": "ping"}))["out"], "pong");
        }
    };
    ping(&mut shared, 3);
    ping(&mut isolated, 3);
    let board = board(&daemon);
    // The observer compares each reading with the one before, so it needs one without garbage.
    read_pages(&daemon);
    // The acceptor, whose sessions share its block, and the pool process have the highest records.
    for place in [2, 4] {
        let bytes = garbage(STRIDE as usize);
        board.write_all_at(&bytes, place * STRIDE).unwrap();
    }
    read_all(&daemon);
    wait_for("a second with garbage", PATIENCE, || {
        let seconds = read_pages(&daemon)["seconds"].take();
        let mut calls = (seconds.as_array().unwrap().iter()).map(|second| &second["calls"]);
        calls.any(|calls| calls.as_u64().unwrap() > 1 << 32)
    });
    let before = calls(&daemon);
    ping(&mut shared, 25);
    assert_eq!(calls(&daemon).wrapping_sub(before), 25);
    ping(&mut isolated, 1);
    // And the block of the worker.
    board
        .write_all_at(&garbage(STRIDE as usize), STRIDE)
        .unwrap();
    read_all(&daemon);
    let before = calls(&daemon);
    ping(&mut isolated, 25);
    assert_eq!(calls(&daemon).wrapping_sub(before), 25);
    ping(&mut shared, 1);
    let observer = daemon.status()["master"]["observer"]["pid"].clone();
    assert_eq!(
        observer, status["master"]["observer"]["pid"],
        "no reader died"
    );
    assert_eq!(daemon.status()["deaths"], json!([]));
    daemon.reload();
    read_all(&daemon);
}

#[test]
fn garbage_in_the_header_harms_no_reader() {
    let daemon = Daemon::builder().config("[workers]\ncount = 1\n").start();
    let board = board(&daemon);
    // All but the magic number and the version: blocks, names, counters.
    board.write_all_at(&garbage(128 * 1024), 16).unwrap();
    let seen = text(&daemon);
    let is_harmless = |c: char| c == '\n' || !c.is_control();
    assert!(seen.chars().all(is_harmless), "{seen:?}");
    assert!(daemon.command(&["status", "--json"]).status.success());
    daemon.client().call(&json!({"in": "ping"}));
    daemon.reload();
    text(&daemon);
}

#[test]
fn a_board_of_an_unknown_version_is_left_out() {
    let daemon = Daemon::builder().config("[workers]\ncount = 1\n").start();
    board(&daemon)
        .write_all_at(&77_u64.to_ne_bytes(), 8)
        .unwrap();
    let done = daemon.command(&["metrics"]);
    assert!(done.status.success());
    let warning = String::from_utf8(done.stderr).unwrap();
    assert!(
        warning.contains("figures of calls and connections are left out"),
        "{warning}"
    );
    let text = String::from_utf8(done.stdout).unwrap();
    assert!(text.contains("preforkd_workers_target 1\n"), "{text}");
    assert!(!text.contains("calls_total"), "{text}");
}

#[test]
fn the_totals_of_a_board_of_an_unknown_version_stay_after_an_upgrade() {
    let installed = Installed::new();
    let config = "[workers]\ncount = 1\n[observe]\nhistograms = [\"duration\", \"run\"]\n\
                  [methods.sleep]\nbuiltin = \"sleep\"\n";
    let daemon = installed
        .daemon(config)
        .expect_log("has another format: a new board takes over its totals")
        .start();
    let mut client = daemon.client();
    for (method, params) in [
        ("ping", json!(1)),
        ("sleep", json!(0)),
        ("nothing", json!(0)),
    ] {
        client.call(&json!({"in": method, "params": params}));
    }
    drop(client);
    wait_value(&daemon, "worker_connections{slot=\"0\"}", 0.0);
    let before = scrape(&daemon);
    board(&daemon)
        .write_all_at(&77_u64.to_ne_bytes(), 8)
        .unwrap();
    installed.renew();
    upgrade(&daemon);
    let after = scrape(&daemon);
    assert_no_decrease(&before, &after);
    for name in [
        "calls_total{method=\"ping\"}",
        "calls_total{method=\"_OTHER\"}",
        "call_run_seconds_count{method=\"sleep\"}",
        "call_duration_seconds_sum{method=\"sleep\"}",
        "call_errors_total{method=\"_OTHER\",code=\"method-not-found\",started=\"false\"}",
        "connections_accepted_total",
    ] {
        assert!(value(&before, name) > 0.0, "{name}");
        assert_eq!(value(&before, name), value(&after, name), "{name}");
    }
    daemon.client().call(&json!({"in": "ping"}));
    wait_value(&daemon, "calls_total{method=\"ping\"}", 2.0);
}
