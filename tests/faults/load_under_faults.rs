//! Tests load that is checked call by call, alone and during faults: a log that cannot be written, many
//! signals.

use std::io::{self, Read};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use serde_json::{Value, json};

use crate::support::load::{self, Load, Shape};
use crate::support::{Daemon, Dir, PATIENCE, Sweep, alone, faketime, pass, wait_for};

const SHAPES: [(&str, Shape); 3] = [
    ("a connection a call", Shape::PerCall),
    ("lasting connections", Shape::Lasting),
    ("pipelined 16 deep", Shape::Pipelined(16)),
];

/// Logs something for each connection.
const TALKATIVE: &str = "[workers]\ncount = 2\n[log]\nlevel = \"trace\"\n";

/// Clients that disconnect in the middle, so that there is something to log.
fn break_off(daemon: &Daemon) {
    for _ in 0..200 {
        let mut client = daemon.client();
        client.send_raw(&[9, 0, 0, 0, 1]);
        client.reset();
    }
}

#[test]
fn every_call_of_every_kind_of_client_is_answered() {
    let _alone = alone();
    let daemon = Daemon::start();
    let sweep = Sweep::of(&daemon);
    for (name, shape) in SHAPES {
        load::run(daemon.address(), 8, shape, Duration::from_secs(2)).assert_whole(name);
    }
    sweep.assert_same(&daemon);
}

/// 10,000 calls, with something to log between them.
fn serve_without_a_log(daemon: &Daemon, what: &str) {
    let load = Load::start(daemon.address(), 4, Shape::Lasting);
    break_off(daemon);
    let mut client = daemon.client();
    for number in 0..10_000 {
        let answer = client.call(&json!({"in": "ping", "params": number}));
        assert_eq!(answer["result"], number);
    }
    break_off(daemon);
    load.stop().assert_whole(what);
}

#[test]
fn a_log_on_a_full_disk_costs_no_call() {
    let _alone = alone();
    let daemon = Daemon::builder()
        .config(&format!("{TALKATIVE}file = \"/dev/full\"\n"))
        .start();
    let sweep = Sweep::of(&daemon);
    serve_without_a_log(&daemon, "with its log on /dev/full");
    wait_for("a status that tells of it", PATIENCE, || {
        daemon.status()["master"]["lost_log_lines"].as_u64() > Some(0)
    });
    sweep.assert_same(&daemon);
}

#[test]
fn a_log_that_was_full_goes_on_when_there_is_room_and_says_what_was_lost() {
    let _alone = alone();
    let daemon = Daemon::builder()
        .config(&format!("{TALKATIVE}file = \"talk\"\n"))
        .start();
    let talk = daemon.dir().join("talk");
    let sweep = Sweep::of(&daemon);
    let reopen = |full: bool| {
        std::fs::remove_file(&talk).unwrap();
        if full {
            std::os::unix::fs::symlink("/dev/full", &talk).unwrap();
        }
        daemon.signal(Signal::SIGUSR1);
    };
    reopen(true);
    serve_without_a_log(&daemon, "with a log that has become full");
    reopen(false);
    wait_for(
        "both kinds of processes to tell what was lost",
        PATIENCE,
        || {
            break_off(&daemon);
            let log = daemon.dir().read("talk");
            let told = |role: &str| log.lines().any(|line| line.contains(role));
            log.matches("log lines were lost").count() >= 2 && told("master") && told("worker")
        },
    );
    sweep.assert_same(&daemon);
}

/// A file-size limit cuts a line, as a full disk does.
#[test]
fn a_line_that_a_full_disk_has_cut_is_ended_and_the_count_of_the_lost_is_a_line_like_any() {
    let _alone = alone();
    for form in ["text", "json"] {
        let daemon = Daemon::builder()
            .config(&format!(
                "{TALKATIVE}file = \"talk\"\nformat = \"{form}\"\n"
            ))
            .start();
        let workers = daemon.ready_workers();
        let mut all_pids = workers.clone();
        all_pids.push(daemon.pid());
        let limit = |size: &str| {
            for pid in &all_pids {
                let mut command = Command::new("prlimit");
                command.args([
                    "--pid",
                    &pid.to_string(),
                    &format!("--fsize={size}:unlimited"),
                ]);
                assert!(command.status().unwrap().success());
            }
        };
        let talk = || std::fs::read(daemon.dir().join("talk")).unwrap();
        let full = talk().len() + 20_000;
        limit(&full.to_string());
        wait_for("a full log", PATIENCE, || {
            break_off(&daemon);
            talk().len() == full
        });
        // The master logs something too, and has lost it when it answers the status.
        daemon.signal(Signal::SIGUSR1);
        assert_eq!(daemon.ready_workers(), workers);
        limit("unlimited");
        daemon.signal(Signal::SIGUSR1);
        let told = |role: &str| {
            let log = String::from_utf8(talk()).unwrap();
            let is_it = |line: &str| line.contains("log lines were lost") && line.contains(role);
            log.lines().any(is_it)
        };
        wait_for("all to tell what was lost", PATIENCE, || {
            break_off(&daemon);
            told("master") && told("worker")
        });
        assert_eq!(daemon.ready_workers(), workers);
        let log = talk();
        let (before, after) = log.split_at(full);
        assert!(
            before.ends_with(b"\n") || after.starts_with(b"\n"),
            "{form}: the line that was cut goes on: {}",
            String::from_utf8_lossy(after)
        );
        let end = after.iter().rposition(|&byte| byte == b'\n').unwrap();
        let after = String::from_utf8(after[..end].to_vec()).unwrap();
        let after = after.strip_prefix('\n').unwrap_or(&after);
        // Two processes that end the same line at once leave an empty one.
        for line in after.lines().filter(|line| !line.is_empty()) {
            let level = match form {
                "json" => serde_json::from_str(line)
                    .map(|line: Value| line["level"].as_str().unwrap_or("none").to_owned())
                    .unwrap_or_else(|error| error.to_string()),
                _ => line.split(' ').nth(1).unwrap_or("none").to_owned(),
            };
            let is_notice = line.contains("log lines were lost");
            let fits = level.parse::<log::Level>().is_ok() && (!is_notice || level == "WARN");
            assert!(fits, "{form}: {level}: {line:?}");
        }
    }
}

#[test]
fn a_closed_standard_error_costs_no_call() {
    let _alone = alone();
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let daemon = Daemon::builder().config(TALKATIVE).stderr(writer).start();
    let sweep = Sweep::of(&daemon);
    serve_without_a_log(&daemon, "with a closed pipe for its standard error");
    sweep.assert_same(&daemon);
}

#[test]
fn a_pipe_that_nobody_reads_costs_no_call_and_says_later_what_was_lost() {
    let _alone = alone();
    let (mut reader, writer) = io::pipe().unwrap();
    let daemon = Daemon::builder().config(TALKATIVE).stderr(writer).start();
    let sweep = Sweep::of(&daemon);
    // More than a pipe holds.
    for _ in 0..10 {
        break_off(&daemon);
    }
    serve_without_a_log(&daemon, "with a full pipe for its standard error");
    let text = std::thread::spawn(move || {
        let mut text = Vec::new();
        reader.read_to_end(&mut text).map(|_| text)
    });
    sweep.assert_same(&daemon);
    break_off(&daemon);
    drop(daemon);
    let text = text.join().unwrap().unwrap();
    let text = String::from_utf8_lossy(&text);
    println!("{} bytes of log in the end", text.len());
    assert!(text.contains("log lines were lost"));
}

#[test]
fn a_fifo_that_nobody_reads_costs_no_call() {
    let _alone = alone();
    let dir = Dir::new();
    let fifo = dir.join("log.fifo");
    mkfifo(&fifo, Mode::from_bits_truncate(0o600)).unwrap();
    let daemon = Daemon::builder()
        .config(&format!("{TALKATIVE}file = \"{}\"\n", fifo.display()))
        .start();
    let sweep = Sweep::of(&daemon);
    for _ in 0..10 {
        break_off(&daemon);
    }
    serve_without_a_log(&daemon, "with a fifo without a reader for a log");
    sweep.assert_same(&daemon);
}

/// About a thousand signals per second to the master and to all workers: each interrupts a system call
/// and has no other effect.
#[test]
fn a_storm_of_signals_costs_no_call() {
    let _alone = alone();
    let daemon = Daemon::start();
    let sweep = Sweep::of(&daemon);
    let mut all_pids = daemon.ready_workers();
    all_pids.push(daemon.pid());
    let loads: Vec<Load> = SHAPES
        .iter()
        .map(|&(_, shape)| Load::start(daemon.address(), 2, shape))
        .collect();
    let mut signals = 0;
    for _ in 0..1000 {
        for &pid in &all_pids {
            for signal in [Signal::SIGUSR1, Signal::SIGWINCH, Signal::SIGCHLD] {
                kill(Pid::from_raw(pid), signal).unwrap();
                signals += 1;
            }
        }
        pass(Duration::from_millis(3));
    }
    println!("{signals} signals to {} processes", all_pids.len());
    for (load, (name, _)) in loads.into_iter().zip(SHAPES) {
        load.stop().assert_whole(name);
    }
    sweep.assert_same(&daemon);
}

/// All times use the monotonic clock, so no process is killed and no call is late.
#[test]
#[ignore = "needs libfaketime; tests/run fetches it"]
fn a_clock_that_jumps_by_a_day_and_a_year_costs_no_call() {
    let _alone = alone();
    let library = faketime().expect("tests/run has fetched libfaketime");
    let clock = Dir::new();
    clock.write("jump", "+0\n");
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 2\nheartbeat-timeout = \"2s\"\n[limits]\ntimeout = \"5s\"\n")
        .env("LD_PRELOAD", library)
        .env("FAKETIME_TIMESTAMP_FILE", clock.join("jump"))
        .env("FAKETIME_NO_CACHE", "1")
        .env("DONT_FAKE_MONOTONIC", "1")
        .start();
    let sweep = Sweep::of(&daemon);
    let loads = SHAPES.map(|(_, shape)| Load::start(daemon.address(), 2, shape));
    for jump in ["-1d", "+1d", "+1y", "-1y", "+0"] {
        clock.write("jump", format!("{jump}\n"));
        pass(Duration::from_millis(700));
        assert!(daemon.command(&["status"]).status.success());
    }
    clock.write("jump", "+1y\n");
    daemon.signal(Signal::SIGUSR1);
    daemon.wait_log("nothing to reopen");
    let log = daemon.log();
    let year = |line: Option<&str>| line.and_then(|it| it.get(..4)?.parse::<u32>().ok());
    let (first, last) = (year(log.lines().next()), year(log.lines().last()));
    println!("the log goes from {first:?} to {last:?}");
    assert!(last > first, "the clock did not jump: {log}");
    for (load, (name, _)) in loads.into_iter().zip(SHAPES) {
        load.stop().assert_whole(name);
    }
    sweep.assert_same(&daemon);
}
