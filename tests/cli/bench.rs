//! Tests `bench` with a real daemon: whether its counts are consistent in each dialect, and what its
//! latencies include.

use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::support::{Daemon, Dir, PATIENCE, binary, wait_for};

const WITH_SLEEP: &str = "
[workers]
count = 2
respawn-max-delay = \"0s\"
[methods.sleep]
builtin = \"sleep\"
";

/// Returns the exit code and the report of a load.
#[track_caller]
fn report(daemon: &Daemon, words: &[&str]) -> (Option<i32>, Value) {
    let output = daemon.command(words);
    let report = serde_json::from_slice(&output.stdout);
    (
        output.status.code(),
        report.unwrap_or_else(|_| panic!("{output:?}")),
    )
}

fn sum(counts: &Value) -> u64 {
    let counts = counts.as_object().unwrap().values();
    counts.map(|count| count.as_u64().unwrap()).sum()
}

#[test]
fn bench_prints_json_whose_counts_add_up() {
    let daemon = Daemon::builder().config(WITH_SLEEP).start();
    let report = |words: &[&str]| report(&daemon, words);
    for (words, code) in [
        (
            &[
                "bench", "ping", "--json", "-n", "10000", "-c", "16", "-P", "8", "-t", "2",
            ][..],
            0,
        ),
        (
            &[
                "bench", "ping", "--json", "-n", "500", "--rate", "2000", "-c", "4",
            ],
            0,
        ),
        (
            &["bench", "nope", "--json", "-n", "300", "-c", "3", "-P", "2"],
            1,
        ),
        (
            &["bench", "sleep", "--json", "-n", "20", "--params", "\"no\""],
            1,
        ),
        (&["bench", "ping", "--json", "-d", "300ms"], 0),
    ] {
        let (ended, report) = report(words);
        assert_eq!(ended, Some(code), "{words:?}: {report}");
        let calls = report["calls"].as_u64().unwrap();
        let ok = report["ok"].as_u64().unwrap();
        let errors = sum(&report["errors"]);
        assert_eq!(calls, ok + errors + sum(&report["unanswered"]), "{report}");
        assert_eq!(report["not_sent"], 0, "{report}");
        let drawn = report["histogram"].as_array().unwrap().iter();
        let drawn: u64 = drawn.map(|bucket| bucket["calls"].as_u64().unwrap()).sum();
        assert_eq!(drawn, ok + errors, "{report}");
        match words.iter().position(|word| *word == "-n") {
            Some(at) => assert_eq!(calls.to_string(), words[at + 1], "{report}"),
            None => assert!(calls > 0),
        }
    }
    let (_, refused) = report(&["bench", "nope", "--json", "-n", "300"]);
    assert_eq!(refused["errors"]["method-not-found"], 300, "{refused}");
}

/// A server that is stopped for a while delays every call that was due meanwhile, and an open loop counts
/// that.
#[test]
fn an_open_loop_counts_latency_from_when_a_call_was_due() {
    let daemon = Daemon::builder()
        .config("[workers]\ncount = 1\nthreads = 1\n[methods.sleep]\nbuiltin = \"sleep\"\n")
        .start();
    // One call of 20 ms at a time, one due each 10 ms: the last of 50 waits half a second.
    let output = daemon.command(&[
        "bench", "sleep", "--params", "0.02", "--rate", "100", "-n", "50", "-c", "1", "--json",
    ]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let longest = report["latency_us"]["max"].as_f64().unwrap();
    assert_eq!(report["ok"], 50, "{report}");
    assert!(longest > 400_000.0, "{report}");
}

#[test]
fn bench_goes_on_over_a_killed_worker_and_counts_what_it_took_along() {
    let daemon = Daemon::builder()
        .config(WITH_SLEEP)
        .expect_log("SIGKILL")
        .start();
    let mut bench = Command::new(binary());
    bench.args([
        "bench", "sleep", "--params", "0.002", "-n", "3000", "-c", "8", "--json",
    ]);
    bench.arg("--address").arg(daemon.address().to_string());
    let child = bench
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_for("calls", PATIENCE, || {
        daemon
            .workers()
            .iter()
            .map(|worker| worker.calls)
            .sum::<u64>()
            > 300
    });
    kill(Pid::from_raw(daemon.ready_workers()[0]), Signal::SIGKILL).unwrap();
    let output = child.wait_with_output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["calls"], 3000, "{report}");
    let lost = 3000 - report["ok"].as_u64().unwrap();
    assert!(lost <= 8, "{report}");
    println!("bench: 3000 calls, one worker killed: {lost} lost with it, the load went on");
}

/// The results so far are reported, although the run ended early.
#[test]
fn bench_reports_what_it_saw_before_the_server_went_away() {
    let daemon = Daemon::builder().config(WITH_SLEEP).start();
    let mut bench = Command::new(binary());
    bench.args(["bench", "ping", "-n", "1000000", "-t", "2", "--json"]);
    bench.args(["--rate", "10000"]);
    bench.arg("--address").arg(daemon.address().to_string());
    let pipes = bench.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = pipes.spawn().unwrap();
    wait_for("calls", PATIENCE, || {
        daemon.workers().iter().all(|worker| worker.calls > 300)
    });
    let stopped = daemon.command(&["stop"]);
    assert!(stopped.status.success(), "{stopped:?}");
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(69), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let number = |name: &str| report[name].as_u64().unwrap();
    assert!(number("ok") > 600, "{report}");
    let seen = number("ok") + sum(&report["errors"]) + sum(&report["unanswered"]);
    assert_eq!(number("calls"), seen, "{report}");
    // At most the calls of five seconds were not sent, and not all requested ones.
    assert!((1..200_000).contains(&number("not_sent")), "{report}");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains(&daemon.address().to_string()), "{error}");
}

/// Each dialect in turn, with params from a file.
#[test]
fn every_dialect_makes_the_same_calls() {
    let daemon = Daemon::builder().config(WITH_SLEEP).start();
    let dir = Dir::new();
    let file = dir.write("params", "0\n\n\"no\"\n 0.001 \n");
    let file = file.to_str().unwrap();
    for dialect in ["frame", "line", "http"] {
        let (code, report) = report(
            &daemon,
            &[
                "bench",
                "sleep",
                "--json",
                "--dialect",
                dialect,
                "-n",
                "3000",
                "-c",
                "4",
                "-P",
                "8",
                "-t",
                "2",
                "--params-file",
                file,
            ],
        );
        assert_eq!(code, Some(1), "{report}");
        assert_eq!(report["dialect"], dialect);
        assert_eq!(report["calls"], 3000, "{report}");
        // sleep refuses every third line, wherever a thread began.
        let refused = report["errors"]["invalid-params"].as_u64().unwrap();
        assert!((998..=1002).contains(&refused), "{report}");
        assert_eq!(report["ok"].as_u64().unwrap() + refused, 3000, "{report}");
        assert_eq!(sum(&report["unanswered"]) + sum(&report["errors"]), refused);
        assert_eq!(report["reconnects"], 0, "{report}");
    }
    wait_for("the server to have seen them", PATIENCE, || {
        daemon
            .workers()
            .iter()
            .map(|worker| worker.calls)
            .sum::<u64>()
            == 9000
    });
}

/// An open loop over HTTP and a unix socket, with a name that a path must escape.
#[test]
fn every_dialect_reaches_a_unix_socket_at_a_rate() {
    let dir = Dir::new();
    let socket = dir.join("rpc.sock");
    let daemon = Daemon::builder()
        .config(&format!(
            "[[listen]]\naddress = \"unix:{}\"\n[methods.\"a/b:c\"]\nbuiltin = \"echo\"\n",
            socket.display()
        ))
        .start();
    let address = format!("unix:{}", socket.display());
    for dialect in ["frame", "line", "http"] {
        let output = Command::new(binary())
            .args([
                "bench",
                "a/b:c",
                "--json",
                "--dialect",
                dialect,
                "-n",
                "400",
            ])
            .args([
                "--rate",
                "2000",
                "-c",
                "4",
                "--params",
                "[1,\n2]",
                "--address",
                &address,
            ])
            .output()
            .unwrap();
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["ok"], 400, "{report}");
        assert_eq!(report["rate"], 2000);
    }
    drop(daemon);
}

/// A server that is not preforkd is detected.
#[test]
fn what_is_no_answer_is_counted_as_such() {
    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = other.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for mut stream in other.incoming().flatten() {
            // It answers any request and closes the connection.
            std::thread::spawn(move || {
                let mut first = [0; 1];
                if std::io::Read::read(&mut stream, &mut first).is_ok_and(|count| count > 0) {
                    let _ = std::io::Write::write_all(&mut stream, b"220 mail.example ESMTP\r\n");
                }
            });
        }
    });
    for dialect in ["frame", "line", "http"] {
        let output = Command::new(binary())
            .args([
                "bench",
                "ping",
                "--json",
                "--dialect",
                dialect,
                "-n",
                "3",
                "-c",
                "1",
            ])
            .args(["--address", &address])
            .output()
            .unwrap();
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert_eq!(report["ok"], 0, "{report}");
        assert_eq!(report["unanswered"]["not an answer"], 3, "{report}");
    }
}
