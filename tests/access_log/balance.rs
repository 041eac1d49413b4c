//! Written and lost lines together are as many as the counted calls, whatever happens to workers.
//!
//! The environment sets how much: PREFORKD_KILLS. With 100 kills there are 20 reloads, 5 upgrades and a million
//! calls.

use std::collections::BTreeSet;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::{balance, calls, lines_of};
use crate::support::installed::{Installed, upgrade};
use crate::support::load::{Load, Shape};
use crate::support::{Client, Daemon, PATIENCE, alone, from_environment, pass, process, wait_for};

const CONFIG: &str = r#"
[workers]
count = 2
threads = 2
respawn-burst = 100000
respawn-max-delay = "0s"
[access-log]
file = "access.log"
[methods.sleep]
builtin = "sleep"
"#;

/// Calls that wait for a thread, time out or are refused, until it is stopped.
fn mix(daemon: &Daemon, stop: &Arc<AtomicBool>) -> thread::JoinHandle<()> {
    let (address, stop) = (daemon.address(), Arc::clone(stop));
    thread::spawn(move || {
        let calls = [
            json!({"in": "sleep", "params": 0.001}),
            json!({"in": "sleep", "params": 1, "timeout_ms": 2}),
            json!({"in": "none"}),
        ];
        let mut client = Client::connect(address);
        let mut turn = calls.iter().cycle();
        while !stop.load(Relaxed) {
            let call = turn.next().unwrap().to_string();
            if client.try_send(&call).and_then(|()| client.recv()).is_err() {
                client = Client::connect(address);
            }
        }
    })
}

/// Checks that the file has each written line once, as valid JSON.
#[track_caller]
fn check_file(daemon: &Daemon, written: u64) {
    let lines = lines_of(daemon, "access.log");
    assert_eq!(
        lines.len() as u64,
        written,
        "lines in the file and counted ones"
    );
    let ids: BTreeSet<&str> = lines
        .iter()
        .map(|it| it["call"].as_str().unwrap())
        .collect();
    assert_eq!(ids.len(), lines.len(), "lines that are there twice");
    let log = daemon.dir().join("access.log");
    match Command::new("jq").args(["-e", ".call"]).arg(log).output() {
        Ok(done) => assert!(done.status.success(), "{:?}", done.status),
        Err(error) => println!("not checked with jq: {error}"),
    }
}

fn kill_one(daemon: &Daemon, turn: u64) {
    let workers = daemon.ready_workers();
    let Some(worker) = workers.get(turn as usize % 2) else {
        return;
    };
    kill(Pid::from_raw(*worker), Signal::SIGKILL).unwrap();
    wait_for("another worker", PATIENCE, || {
        let ready = daemon.ready_workers();
        ready.len() == 2 && !ready.contains(worker)
    });
}

#[test]
fn no_line_is_missing_without_being_counted_through_kills_reloads_and_upgrades() {
    let _alone = alone();
    let kills = from_environment("PREFORKD_KILLS", 20);
    let installed = Installed::new();
    let daemon = installed
        .daemon(CONFIG)
        .expect_log("ended by SIGKILL")
        .start();
    let stop = Arc::new(AtomicBool::new(false));
    let mixed = mix(&daemon, &stop);
    let load = Load::start(daemon.address(), 4, Shape::Pipelined(32));
    let single = Load::start(daemon.address(), 2, Shape::Lasting);
    for turn in 0..kills {
        let before = load.answered();
        wait_for("calls", PATIENCE, || load.answered() >= before + 10_000);
        kill_one(&daemon, turn);
        if turn % 5 == 4 {
            daemon.reload();
        }
        if turn % 20 == 19 {
            installed.renew();
            upgrade(&daemon);
        }
    }
    stop.store(true, Relaxed);
    mixed.join().unwrap();
    drop((load.stop(), single.stop()));
    let (written, lost) = balance(&daemon);
    let all = calls(&daemon);
    println!("{kills} kills, {all} calls, {written} lines, {lost} lost");
    check_file(&daemon, written);
}

#[test]
fn a_flood_of_calls_takes_no_memory_for_its_lines() {
    let config = CONFIG.replace("count = 2", "count = 1");
    let daemon = Daemon::builder().config(&config).start();
    let worker = daemon.ready_workers()[0];
    let call = "{\"in\":\"ping\"}\n";
    let flood = call.repeat(64 * 1024 / call.len());
    // All bytes are there when the worker continues, so that it takes them in one turn.
    kill(Pid::from_raw(worker), Signal::SIGSTOP).unwrap();
    let clients: Vec<Client> = (0..100)
        .map(|_| {
            let mut client = daemon.client();
            client.send_raw(flood.as_bytes());
            client
        })
        .collect();
    kill(Pid::from_raw(worker), Signal::SIGCONT).unwrap();
    let all = (clients.len() * (flood.len() / call.len())) as u64;
    wait_for("all calls", PATIENCE, || calls(&daemon) == all);
    let peak = process::field(worker, "VmHWM").unwrap();
    let peak: u64 = peak.trim_end_matches("kB").trim().parse().unwrap();
    println!("{all} calls, {peak} KiB");
    assert!(peak < 40_000, "{peak} KiB");
    balance(&daemon);
}

/// The lines of calls that a keeper answers.
#[test]
fn a_call_that_its_worker_took_with_it_has_a_line_of_its_keeper() {
    let daemon = Daemon::builder()
        .config(CONFIG)
        .expect_log("ended by SIGKILL")
        .start();
    let mut client = daemon.client();
    client.send(&json!({"in": "sleep", "params": 30}).to_string());
    let worker = daemon.wait_running(1);
    kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
    assert_eq!(client.recv_json()["result"]["name"], "crashed");
    wait_for("its line", PATIENCE, || {
        daemon.dir().read("access.log").ends_with('\n')
    });
    let lines = lines_of(&daemon, "access.log");
    let line = &lines[0];
    let peer = client.stream().local_addr().unwrap().to_string();
    for (name, expected) in [
        ("outcome", json!("crashed")),
        ("code", json!("crashed")),
        ("method", json!("sleep")),
        ("kind", json!("builtin")),
        ("worker", json!(worker)),
        ("started", json!(true)),
        ("peer", json!(peer)),
        ("dialect", json!("frame")),
        (
            "received_bytes",
            json!(r#"{"in":"sleep","params":30}"#.len()),
        ),
    ] {
        assert_eq!(line[name], expected, "{name}: {line}");
    }
    assert!(line["sent_bytes"].as_u64() > Some(40), "{line}");
    let (written, lost) = balance(&daemon);
    assert_eq!((written, lost), (1, 0));
}

/// A worker that is stopped has lines in its queue, which a KILL takes away.
#[test]
fn lines_that_a_killed_worker_had_not_written_are_counted() {
    for keeps in [true, false] {
        let config = CONFIG.replace(
            "threads = 2",
            &format!("threads = 2\nkeep-connections = {keeps}"),
        );
        let daemon = Daemon::builder()
            .config(&config)
            .expect_log("ended by SIGKILL")
            .start();
        for turn in 0..10 {
            let load = Load::start(daemon.address(), 2, Shape::Pipelined(64));
            wait_for("calls", PATIENCE, || load.answered() > 2_000);
            kill_one(&daemon, turn);
            drop(load.stop());
        }
        let (written, lost) = balance(&daemon);
        println!("keep-connections = {keeps}: {written} lines, {lost} lost");
        check_file(&daemon, written);
    }
}

#[test]
fn lines_of_a_killed_process_of_a_connection_are_counted() {
    let daemon = Daemon::builder()
        .config(CONFIG)
        .listen("isolation = \"connection\"\n")
        .expect_log("SIGKILL")
        .start();
    for _ in 0..5 {
        let load = Load::start(daemon.address(), 2, Shape::Pipelined(64));
        wait_for("calls", PATIENCE, || load.answered() > 1_000);
        let sessions = process::descendants(daemon.pid())
            .into_iter()
            .filter(|pid| process::title(*pid).starts_with("preforkd: connection 127"));
        for session in sessions {
            let _ = kill(Pid::from_raw(session), Signal::SIGKILL);
        }
        drop(load.stop());
    }
    let counts = || {
        (
            super::written(&daemon),
            super::lost(&daemon),
            calls(&daemon),
        )
    };
    wait_for(
        "the lines of all calls, and counters that stay the same",
        PATIENCE,
        || {
            let (written, lost, all) = counts();
            pass(Duration::from_millis(200));
            (written + lost).abs_diff(all) <= 10 * 64 && counts() == (written, lost, all)
        },
    );
    let (written, lost) = (super::written(&daemon), super::lost(&daemon));
    let all = calls(&daemon);
    println!("{all} calls, {written} lines, {lost} lost");
    // The processes share their counters, so one killed in between may count a call or a line too much.
    assert!(
        (written + lost).abs_diff(all) <= 10 * 64,
        "{written} + {lost} of {all}"
    );
    // Nothing repairs the line that such a process was writing.
    let text = daemon.dir().read("access.log");
    let is_json = |line: &&str| serde_json::from_str::<serde_json::Value>(line).is_ok();
    let cut = text.lines().filter(|line| !is_json(line)).count();
    assert!(cut <= 1, "{cut} lines are cut");
}
