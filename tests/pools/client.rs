//! Tests `map` and the crate's own client with a real daemon: what is in order, what is repeated and what
//! is not.
//!
//! Only these tests use the crate, because its client is under test here.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use preforkd::client::{ClientError, Options, Pipeline, Pool};

use crate::support::{Daemon, Dir, PATIENCE, binary, wait_for};

const WITH_SLEEP: &str = "
[workers]
count = 2
respawn-max-delay = \"0s\"
[methods.sleep]
builtin = \"sleep\"
";

/// Starts `map` with these arguments, and a pipe at each end.
fn map(daemon: &Daemon, words: &[&str]) -> Child {
    let mut command = Command::new(binary());
    command.arg("map").args(words);
    command.arg("--address").arg(daemon.address().to_string());
    command
        .env_remove("RUST_LOG")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Runs `map` on a whole input.
fn map_all(daemon: &Daemon, words: &[&str], input: &str) -> Output {
    let mut child = map(daemon, words);
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_owned();
    // Write from a thread, because the results fill their pipe meanwhile.
    let writer = thread::spawn(move || {
        // A program that has ended early reads no more.
        let _ = stdin.write_all(input.as_bytes());
    });
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    output
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn numbers(range: std::ops::Range<u64>) -> String {
    range.map(|number| format!("{number}\n")).collect()
}

#[test]
fn map_writes_the_results_in_the_order_of_the_lines() {
    let daemon = Daemon::builder().config(WITH_SLEEP).start();
    // The first calls take longest.
    let input = "0.3\n0.2\n\n0.1\n0.0\n";
    let output = map_all(&daemon, &["sleep", "--parallel", "4", "--tag"], input);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(text(&output.stdout), "1\t0.3\n2\t0.2\n4\t0.1\n5\t0.0\n");
    assert_eq!(text(&output.stderr), "");
}

#[test]
fn map_names_the_lines_that_fail_and_does_the_others() {
    let daemon = Daemon::start();
    let input = "1\n{bad\n[3]\n\"\n5";
    let output = map_all(&daemon, &["ping"], input);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!(text(&output.stdout), "1\n[3]\n5\n");
    let told = text(&output.stderr);
    assert!(told.contains("line 2: the params are not JSON"), "{told}");
    assert!(told.contains("line 4: "), "{told}");
    assert!(told.contains("3 lines done, 2 failed"), "{told}");

    let output = map_all(&daemon, &["nope"], "1\n2\n");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let told = text(&output.stderr);
    assert!(told.contains("line 1: nope: method-not-found"), "{told}");
    assert!(told.contains("0 lines done, 2 failed"), "{told}");
}

#[test]
fn map_ends_when_its_reader_leaves_and_when_there_is_no_server() {
    let mut daemon = Daemon::start();
    let mut child = map(&daemon, &["ping"]);
    let mut stdin = child.stdin.take().unwrap();
    let writer = thread::spawn(move || {
        // Much more than pipes and windows hold: it ends because no one reads on.
        let _ = stdin.write_all(numbers(0..1_000_000).as_bytes());
    });
    let mut first = [0; 2];
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut first).unwrap();
    drop(stdout);
    wait_for("the end of a map without a reader", PATIENCE, || {
        child.try_wait().unwrap().is_some()
    });
    assert!(child.wait().unwrap().success());
    writer.join().unwrap();

    daemon.signal(Signal::SIGTERM);
    daemon.wait_exit();
    let output = map_all(&daemon, &["ping"], "1\n");
    assert_eq!(output.status.code(), Some(69), "{output:?}");
}

/// On a terminal a bar shows finished calls, not those that were read ahead. Python makes the terminal.
#[test]
fn map_draws_a_bar_of_what_is_done_on_a_terminal_of_python() {
    const TERMINAL: &str = "
import os, pty, subprocess, sys
ours, theirs = pty.openpty()
map = subprocess.Popen(sys.argv[1:], stdin=0, stdout=subprocess.DEVNULL, stderr=theirs)
os.close(theirs)
while True:
    try:
        seen = os.read(ours, 4096)
    except OSError:
        break
    os.write(1, seen)
sys.exit(map.wait())
";
    let daemon = Daemon::builder().config(WITH_SLEEP).start();
    let dir = Dir::new();
    let lines = dir.write("lines", "0.02\n".repeat(100));
    let mut command = Command::new("python3");
    command.args(["-c", TERMINAL]).arg(binary());
    command.args(["map", "sleep", "--parallel", "2", "--address"]);
    command.arg(daemon.address().to_string());
    let output = command
        .stdin(std::fs::File::open(lines).unwrap())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let seen = text(&output.stdout);
    // `\r`, perhaps escapes, then ` 42% BAR 42 done …`.
    let frames: Vec<(u64, u64)> = seen
        .split('\r')
        .filter_map(|frame| {
            let (percent, rest) = frame.split_once("% ")?;
            let percent = percent.rsplit([' ', 'K']).next()?.parse().ok()?;
            let (done, _) = rest.split_once(" done")?;
            Some((percent, done.rsplit(' ').next()?.parse().ok()?))
        })
        .collect();
    assert!(frames.len() > 2, "{seen:?}");
    for (percent, done) in frames {
        assert!(percent <= done, "{percent} % at {done} of 100");
    }
}

/// Only calls that ran in the killed worker fail, and a second run does exactly these.
#[test]
fn map_over_a_thousand_lines_outlives_a_killed_worker_and_a_reload() {
    const LINES: u64 = 1_000;
    let daemon = Daemon::builder()
        .config(WITH_SLEEP)
        .expect_log("SIGKILL")
        .start();
    let dir = Dir::new();
    let record = dir.join("done");
    let words = [
        "sleep",
        "--parallel",
        "8",
        "--tag",
        "--resume",
        record.to_str().unwrap(),
    ];
    let input = "0.004\n".repeat(LINES as usize);

    let mut child = map(&daemon, &words);
    let mut stdin = child.stdin.take().unwrap();
    let lines = input.clone();
    let writer = thread::spawn(move || stdin.write_all(lines.as_bytes()).unwrap());
    let done = || {
        std::fs::read_to_string(&record)
            .unwrap_or_default()
            .lines()
            .count()
    };
    wait_for("a hundred lines", PATIENCE, || done() > 100);
    kill(Pid::from_raw(daemon.ready_workers()[0]), Signal::SIGKILL).unwrap();
    wait_for("a fresh worker", PATIENCE, || {
        daemon.ready_workers().len() == 2
    });
    let before = done();
    let reloaded = daemon.command(&["reload"]);
    assert!(reloaded.status.success(), "{reloaded:?}");
    let first = child.wait_with_output().unwrap();
    writer.join().unwrap();

    let lost = text(&first.stderr).matches("preforkd: line ").count() as u64;
    let results = text(&first.stdout);
    assert_eq!(results.lines().count() as u64 + lost, LINES);
    // At most one call of each connection ran there.
    assert!(lost <= 8, "{}", text(&first.stderr));
    assert_eq!(
        first.status.code(),
        Some(i32::from(lost > 0)),
        "{}",
        text(&first.stderr)
    );

    let second = map_all(&daemon, &words, &input);
    assert!(second.status.success(), "{second:?}");
    assert_eq!(text(&second.stdout).lines().count() as u64, lost);
    let all = results + &text(&second.stdout);
    let places: BTreeSet<u64> = all
        .lines()
        .map(|line| line.split('\t').next().unwrap().parse().unwrap())
        .collect();
    assert!(places.into_iter().eq(1..=LINES), "each line exactly once");
    println!(
        "map: {LINES} lines, one worker killed, one reload after {before} lines: {lost} lost with \
         the worker, all others done once; the second run did {lost}"
    );
}

/// A millisecond and a little more for each: one repeated call would be quarantined.
fn one_of_its_own(place: u64) -> f64 {
    0.001 + place as f64 * 1e-9
}

#[test]
fn a_pool_repeats_only_what_did_not_begin_while_workers_die() {
    const CALLS: u64 = 2_000;
    let daemon = Daemon::builder()
        .config(WITH_SLEEP)
        .expect_log("SIGKILL")
        .start();
    let options = Options {
        connections: 8,
        ..Options::default()
    };
    let pool = Pool::new(&daemon.address().to_string(), options).unwrap();
    let (mut done, mut lost, mut kills) = (0, 0, 0);
    for (place, outcome) in
        pool.imap_unordered::<_, f64, _>("sleep", (0..CALLS).map(one_of_its_own))
    {
        match outcome {
            Ok(_) => done += 1,
            Err(error) => {
                // It ran when its worker was killed: its connection continues, or has ended.
                let ran = match &error {
                    ClientError::Gone(_) => true,
                    ClientError::Refused(error) => error.name == "crashed" && error.started,
                    _ => false,
                };
                assert!(ran, "{place}: {error:?}");
                lost += 1;
            }
        }
        if (done + lost) % 500 == 250 {
            let workers = daemon.ready_workers();
            kill(Pid::from_raw(workers[0]), Signal::SIGKILL).unwrap();
            kills += 1;
            wait_for("a fresh worker", PATIENCE, || {
                let now = daemon.ready_workers();
                now.len() == 2 && now[0] != workers[0]
            });
        }
    }
    assert_eq!(done + lost, CALLS);
    assert!(lost <= kills * 8, "{lost} lost of {kills} kills");
    println!(
        "pool: {CALLS} calls, {kills} workers killed: {done} done, {lost} lost in running, \
         {} made again",
        pool.repeated()
    );
    pool.join();
}

#[test]
fn callbacks_of_a_pool_hear_of_every_call() {
    let daemon = Daemon::start();
    let pool = Pool::new(&daemon.address().to_string(), Options::default()).unwrap();
    let sum = Arc::new(AtomicU64::new(0));
    for number in 0..1_000_u64 {
        let sum = Arc::clone(&sum);
        pool.apply_async("ping", number, move |result: Result<u64, _>| {
            sum.fetch_add(result.unwrap(), Ordering::SeqCst);
        })
        .unwrap();
    }
    pool.join();
    assert_eq!(sum.load(Ordering::SeqCst), 499_500);
}

#[test]
fn a_pipeline_sends_more_ahead_than_the_server_reads_and_loses_none() {
    const CALLS: u64 = 20_000;
    let daemon = Daemon::builder().config(WITH_SLEEP).start();
    let address = daemon.address().to_string();
    let pipeline = Pipeline::connect(&address, Some(PATIENCE)).unwrap();
    let slow = pipeline.submit::<f64>("sleep", 5.0).unwrap();
    let first = pipeline.submit::<u64>("ping", CALLS).unwrap();
    assert_eq!(first.wait().unwrap(), CALLS);
    assert!(!slow.is_ready(), "an id overtakes a slow call");
    let handles: Vec<_> = (0..CALLS)
        .map(|number| pipeline.submit::<u64>("ping", number).unwrap())
        .collect();
    for (number, handle) in (0..).zip(handles) {
        assert_eq!(handle.wait().unwrap(), number);
    }
    slow.wait().unwrap();
    println!("pipeline: {CALLS} calls ahead, none lost, a slow one overtaken");
}

/// The server ends a call at its caller's deadline, so its thread is free for the next one.
#[test]
fn a_pipeline_call_ends_at_its_timeout() {
    let config = format!("{WITH_SLEEP}timeout = \"30s\"\n");
    let config = config.replace("count = 2", "count = 1\nthreads = 1");
    let daemon = Daemon::builder().config(&config).start();
    let address = daemon.address().to_string();
    let limit = Duration::from_secs(1);
    let pipeline = Pipeline::connect(&address, Some(limit)).unwrap();
    let begun = Instant::now();
    let error = pipeline.submit::<f64>("sleep", 30).unwrap().wait();
    // Both sides have a deadline, and either may be first.
    match error.unwrap_err() {
        ClientError::TimedOut(_) => {}
        ClientError::Refused(error) => assert_eq!(error.name, "timeout"),
        error => panic!("{error}"),
    }
    let patient = Pipeline::connect(&address, Some(PATIENCE)).unwrap();
    patient.submit::<f64>("sleep", 0.0).unwrap().wait().unwrap();
    let took = begun.elapsed();
    assert!(took >= limit && took < Duration::from_secs(20), "{took:?}");
}

/// The caller decides how long a client pool waits for a server that is gone.
#[test]
fn a_pool_without_patience_gives_up_at_once() {
    let mut daemon = Daemon::start();
    let options = Options {
        connections: 1,
        timeout: Some(Duration::from_secs(5)),
        patience: Duration::ZERO,
    };
    let pool = Pool::new(&daemon.address().to_string(), options).unwrap();
    assert_eq!(pool.apply::<u64>("ping", 1).unwrap(), 1);
    daemon.signal(Signal::SIGTERM);
    daemon.wait_exit();
    let error = pool.apply::<u64>("ping", 2).unwrap_err();
    assert!(error.is_safe_to_repeat(), "{error:?}");
    assert_eq!(pool.repeated(), 0);
}
