//! Checks what readers make of a board that is not as it should be.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use serde_json::json;

use super::{assert_no_decrease, scrape, text, value, wait_value};
use crate::support::Daemon;
use crate::support::installed::{Installed, upgrade};

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
        .expect_log("has an unknown version: it is replaced, and its totals are added")
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
