//! Files that are rotated, full, or cannot be opened.

use std::fs;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::json;

use super::{CONFIG, balance, lines_of, lost, reload};
use crate::support::load::{Load, Shape};
use crate::support::{Daemon, PATIENCE, alone, from_environment, pass, wait_for};

fn at(path: &str) -> String {
    CONFIG.replace("access.log", path)
}

#[test]
fn what_cannot_be_opened_is_refused_with_key_and_remedy() {
    let daemon = Daemon::builder()
        .config(CONFIG)
        .expect_log("reload refused")
        .start();
    let directory = daemon.dir().join("directory");
    fs::create_dir(&directory).unwrap();
    fs::write(daemon.dir().join("plain"), "").unwrap();
    for (path, expected) in [
        (directory.to_str().unwrap(), "access-log.file: "),
        ("none/access.log", "there is no directory"),
        ("plain/access.log", "access-log.file: "),
        (
            "/proc/none",
            "set access-log.file to a path that this user may write",
        ),
    ] {
        let told = daemon.refused_reload(&at(path));
        assert!(told.contains(expected), "{path}: {told}");
    }
    daemon.configure(CONFIG);
    daemon.client().call(&json!({"in": "ping"}));
    balance(&daemon);
}

/// 20,000 lines per second are rotated every 200 ms. PREFORKD_SECONDS says how long; 60 is the full test.
#[test]
fn a_rotation_loses_no_line_and_cuts_none() {
    let _alone = alone();
    let seconds = from_environment("PREFORKD_SECONDS", 3);
    let config = CONFIG.replace("count = 1", "count = 2");
    let daemon = Daemon::builder().config(&config).start();
    let pause = Duration::from_micros(150);
    let load = Load::paced(daemon.address(), 4, Shape::Pipelined(50), pause);
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut files = Vec::new();
    while Instant::now() < end {
        let name = format!("access.log.{}", files.len());
        fs::rename(daemon.dir().join("access.log"), daemon.dir().join(&name)).unwrap();
        files.push(name);
        daemon.signal(Signal::SIGUSR1);
        wait_for("the new file", PATIENCE, || {
            daemon.dir().join("access.log").exists()
        });
        pass(Duration::from_millis(200));
    }
    load.stop().assert_whole("while the log is rotated");
    let (written, lost) = balance(&daemon);
    files.push("access.log".to_owned());
    let (mut ids, mut used) = (Vec::new(), 0);
    for file in &files {
        let lines = lines_of(&daemon, file);
        used += usize::from(!lines.is_empty());
        let calls = lines
            .iter()
            .map(|line| line["call"].as_str().unwrap().to_owned());
        ids.extend(calls);
    }
    println!(
        "{} lines in {used} of {} files, {lost} lost",
        ids.len(),
        files.len()
    );
    assert_eq!((ids.len() as u64, lost), (written, 0));
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len() as u64, written, "lines that are there twice");
    assert!(
        used > files.len() / 2,
        "{used} of {} files have lines",
        files.len()
    );
}

#[test]
fn a_log_on_a_full_disk_or_without_a_reader_costs_no_call_and_each_line_is_counted() {
    let _alone = alone();
    for kind in ["/dev/full", "fifo"] {
        let daemon = Daemon::builder().config(CONFIG).start();
        if kind == "fifo" {
            mkfifo(&daemon.dir().join("fifo"), Mode::S_IRWXU).unwrap();
        }
        reload(&daemon, &at(kind));
        let load = Load::start(daemon.address(), 4, Shape::Pipelined(16));
        wait_for("many calls", PATIENCE, || load.answered() > 20_000);
        load.stop().assert_whole(kind);
        let (written, lost) = balance(&daemon);
        println!("{kind}: {written} written, {lost} lost");
        assert!(lost > 10_000, "{kind}: {lost}");
        let status = daemon.status();
        assert_eq!(status["master"]["lost_access_lines"], lost);
        // Writing resumes by itself with a file that has room.
        reload(&daemon, CONFIG);
        daemon.client().call(&json!({"in": "ping"}));
        balance(&daemon);
        assert!(!lines_of(&daemon, "access.log").is_empty());
    }
}

/// A file-size limit cuts a line, as a full disk does.
#[test]
fn a_line_that_a_full_disk_has_cut_leaves_only_valid_lines() {
    let daemon = Daemon::builder().config(CONFIG).start();
    let worker = daemon.ready_workers()[0];
    let limit = |size: &str| {
        let done = std::process::Command::new("prlimit")
            .args(["--pid", &worker.to_string(), &format!("--fsize={size}")])
            .status();
        assert!(done.unwrap().success());
    };
    let mut client = daemon.client();
    // Lines have several hundred bytes, so this is in the middle of one.
    limit("5000:unlimited");
    for _ in 0..40 {
        client.call(&json!({"in": "ping"}));
    }
    wait_for("lost lines", PATIENCE, || lost(&daemon) > 0);
    limit("unlimited");
    for _ in 0..10 {
        client.call(&json!({"in": "ping"}));
    }
    let (written, lost) = balance(&daemon);
    let lines = lines_of(&daemon, "access.log");
    assert_eq!(lines.len() as u64, written);
    assert_eq!(written + lost, 50);
    let text = daemon.dir().read("access.log");
    assert!(text.contains("\n "), "no line was cut: {text}");
}

#[test]
fn a_removed_file_is_made_again_and_one_that_cannot_be_opened_leaves_the_old_one() {
    let daemon = Daemon::builder()
        .config(CONFIG)
        .expect_log("access.log was removed")
        .expect_log("could not reopen")
        .start();
    let mut client = daemon.client();
    let log = daemon.dir().join("access.log");
    fs::remove_file(&log).unwrap();
    client.call(&json!({"in": "ping"}));
    // The line is lost, unless the master has looked just before.
    let (written, lost) = balance(&daemon);
    assert_eq!(written + lost, 1);
    daemon.wait_log("access.log was removed: its lines were lost, and it is opened again");
    wait_for("a line in a new file", PATIENCE, || {
        client.call(&json!({"in": "ping"}));
        log.exists() && !lines_of(&daemon, "access.log").is_empty()
    });
    let (_, lost) = balance(&daemon);
    fs::rename(&log, daemon.dir().join("old.log")).unwrap();
    fs::create_dir(&log).unwrap();
    daemon.signal(Signal::SIGUSR1);
    daemon.wait_log("the access log continues in the old file");
    client.call(&json!({"in": "ping"}));
    assert_eq!(balance(&daemon).1, lost);
}

#[test]
fn a_removed_log_is_made_again() {
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 1\n[log]\nfile = \"server.log\"\nlevel = \"info\"\n")
        .start();
    let log = daemon.dir().join("server.log");
    wait_for("the log", PATIENCE, || log.exists());
    fs::remove_file(&log).unwrap();
    wait_for("a new log", PATIENCE, || {
        fs::read_to_string(&log).is_ok_and(|text| text.contains("server.log was removed"))
    });
}
